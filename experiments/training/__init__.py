"""One run being trained, on one process or on several."""
