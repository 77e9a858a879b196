"""How a run is started: here, in a worker, on several ranks, by a scheduler."""
