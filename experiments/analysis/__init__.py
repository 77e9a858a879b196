"""From run directories to curves, statistics, verdicts, tables and figures.

Data flows one way: `runs` reads, `measures` turns a run into numbers, `statistics` turns the
numbers of several seeds into an interval, `verdicts` compares the interval with a claim that was
written down before the run, `tables` and `figures` show it, `summary` writes it all.
"""
