"""What to run on the day there is a GPU for ten minutes; `python -m experiments.gpu_check`."""
