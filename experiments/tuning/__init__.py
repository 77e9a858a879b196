"""Equal tuning: the same search, budget and held-out images for every optimizer.

`space` reads what is searched, `study` runs it, `chosen` hands the result to the reporting runs,
`report` writes the table of all trials.
"""
