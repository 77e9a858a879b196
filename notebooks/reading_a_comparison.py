# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Reading a comparison
#
# A comparison is a folder of run directories. Everything below is computed from their files: nothing is
# trained here. Set `EXPERIMENT` and `RESULTS` to read another one.

# %%
# %matplotlib inline
from pathlib import Path

import matplotlib
from IPython.display import Markdown, display

import experiments
from experiments.analysis.measuring.curvature import summarise_curvature
from experiments.analysis.showing.figures import STYLE, curvature_figure, training_figure
from experiments.analysis.measuring.groups import group_runs
from experiments.analysis.measuring.measures import measure_named
from experiments.analysis.measuring.pairing import compare_groups
from experiments.analysis.measuring.runs import load_runs
from experiments.analysis.showing.tables import result_tables

RESULTS = Path(experiments.__file__).parents[1] / "results"
EXPERIMENT = "digits_mlp"

# One entry per scale; a group is the seeds of one config.
found = load_runs(RESULTS, EXPERIMENT)
results = group_runs(found)[0]
[(group.label, group.status_counts) for group in results.groups], found.problems

# %% [markdown]
# ## The tables
#
# Mean ± half width of the 95 % t-interval over seeds. A run that misses its target counts as infinite, never as
# absent: the mean then gives way to the median.

# %%
display(*(Markdown(table.markdown()) for table in result_tables(results)))

# %% [markdown]
# ## The curves

# %%
with matplotlib.rc_context(STYLE):
    display(training_figure(results))

# %% [markdown]
# ## Is a difference certain?
#
# Two optimizers with equal seeds began with the same weights and saw the same batches: they are compared seed by
# seed. Where the interval of the mean difference holds 0, these seeds do not tell the two apart.

# %%
baseline = results.baseline()
for group in results.groups:
    if group is not baseline:
        difference = compare_groups(results, group, baseline, "final_top1")
        bounds = difference.interval
        told = "no interval" if bounds is None else f"[{bounds.low:+.2f}, {bounds.high:+.2f}]"
        print(f"{group.label:>8} - {baseline.label}: {difference.centre:+.2f} points {told}")

# %% [markdown]
# ## One run
#
# A measure is a name and a function of one run; `metrics.jsonl` has everything else.

# %%
run = results.groups[-1].runs[0]
print(run.path.relative_to(RESULTS), run.status)
print({name: measure_named(name)(run) for name in ("final_top1", "steps_to_target", "optimizer_share")})
run.epochs[-1]

# %% [markdown]
# ## What the curvature did

# %%
for group in results.groups:
    summary = summarise_curvature(group)
    if summary is not None:
        print(f"{group.label}: {summary.words()}\n")
with matplotlib.rc_context(STYLE):
    display(curvature_figure(results))
