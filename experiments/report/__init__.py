"""The report: one static tree of HTML pages about everything under `results/`.

Data flows one way: `material` reads run directories, the judged claims and the other files of
results; `claims_page`, `experiment_page` and `other_pages` turn them into what a page shows;
`charts` draws curves as SVG; `site` renders the templates and checks the links. No verdict is
computed here: they are read from `results/summary/claims.json`. `diff` compares two sets.
"""
