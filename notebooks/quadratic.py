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
# # The optimizer on a quadratic in the plane
#
# Figure 1 of both papers: L(θ) = ½‖θ‖² with noisy gradients, by SGD, exact Newton, L-BFGS on plain differences
# ("naive") and L-BFGS on averages ("momentum"). The papers print neither start nor learning rate; the choices
# made here stand in `Setting`.

# %%
# %matplotlib inline
import logging
from dataclasses import replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from IPython.display import display

import experiments
from experiments.analysis.showing.figures import STYLE
from experiments.analysis.judging.theory import load_subjects
from experiments.analysis.showing.theory_figures import METHODS, figure1
from experiments.theory.quadratic import Setting, losses, steps_to_goal, trajectory
from mlbfgs import MLBFGS

logging.getLogger("mlbfgs").setLevel(logging.ERROR)  # runs that blow up refuse many pairs
RESULTS = Path(experiments.__file__).parents[1] / "results"

# %% [markdown]
# ## The committed figure
#
# Drawn from `results/theory/quadratic.json`, which `make theory` writes. On ½‖θ‖² the Hessian is the identity, so
# exact Newton and SGD are the same iteration.

# %%
with matplotlib.rc_context(STYLE):
    display(figure1(load_subjects(RESULTS / "theory")["quadratic"]))

# %% [markdown]
# ## Other settings
#
# A badly scaled quadratic tells Newton and SGD apart. Change `setting` and run this cell again.

# %%
setting = replace(Setting(), diagonal=(1.0, 0.1), interval=5)
with matplotlib.rc_context(STYLE):
    figure, (plane, curves) = plt.subplots(1, 2, figsize=(9.2, 3.9), layout="constrained")
for method, (label, look) in METHODS.items():
    path = trajectory(method, setting, seed=0)
    loss = losses(path, setting)
    goal = steps_to_goal(loss, setting.tolerance)
    plane.plot(*path.T, color=look.colour, marker=look.marker, markevery=8, ms=4, label=label)
    curves.semilogy(loss, color=look.colour, label=f"{label}: goal after {goal:g} steps")
plane.set(xlabel="θ₁", ylabel="θ₂", title="one seed")
curves.set(xlabel="step", ylabel="loss without noise")
curves.legend(fontsize=8);

# %% [markdown]
# ## The optimizer itself
#
# `mlbfgs.MLBFGS` is a torch optimizer. After each new pair a record says what the curvature did: the ratio μ = sᵀy / sᵀs
# (the eigenvalue seen along s), γ, the scale that H starts from, and the angle between the direction and the gradient.

# %%
torch.manual_seed(0)
theta = torch.nn.Parameter(torch.tensor([-4.0, 3.0], dtype=torch.float64))
curvature = torch.tensor([1.0, 0.1], dtype=torch.float64)
optimizer = MLBFGS([theta], lr=0.1, momentum=0.0, betas=0.9, update_interval=5, history_size=10, variant="paper")
for step in range(1, 121):
    theta.grad = curvature * theta.detach() + 0.2 * torch.randn(2, dtype=torch.float64)
    optimizer.step()
    if step % 20 == 0:
        (record,) = optimizer.curvature_records()  # of the newest pair, one for each block
        print(
            f"step {record['step']:3d}: μ {record['mu']:.3f}, γ {record['gamma']:.2f}, "
            f"cos(d, g) {record['cos_direction_gradient']:.3f}"
        )
