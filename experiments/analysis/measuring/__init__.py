"""From run files to numbers: curves, estimates over seeds, comparisons."""
