"""The claims of both papers that need no training, settled on small problems: `make theory`.

Every module settles one subject and returns a `Findings` (`experiments.theory.findings`): named
quantities with their intervals, tables and series, written to `results/theory/<subject>.json`. The
verdicts are computed from these files by `experiments.analysis.judging.theory`, which knows neither
torch nor the optimizer.
"""
