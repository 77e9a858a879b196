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
# # Your own model with MLBFGS
#
# `mlbfgs` needs torch alone. It is used like any torch optimizer; named parameters let it find blocks of layers.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import torch

import mlbfgs
from mlbfgs import MLBFGS

torch.manual_seed(0)
inputs = torch.randn(2048, 20)
labels = (inputs[:, :5].sum(dim=1) > 0).long()


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))


# %% [markdown]
# ## Before training: blocks and memory
#
# The history is 2M vectors of the model's size. `plan` says what a setting costs before anything is allocated.

# %%
print(mlbfgs.plan(make_model(), blocks=2, history_size=10))

# %% [markdown]
# ## The loop


# %%
def train(optimizer_of, steps: int = 300):
    model = make_model()
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    batches = torch.Generator().manual_seed(0)
    losses, records = [], []
    for step in range(1, steps + 1):
        batch = torch.randint(len(inputs), (128,), generator=batches)
        loss = torch.nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if isinstance(optimizer, MLBFGS) and step % 20 == 0:
            records += optimizer.curvature_records()  # of the newest pair, one for each block
    return losses, records, optimizer


quasi_newton, records, optimizer = train(
    lambda model: MLBFGS(model.named_parameters(), lr=0.1, weight_decay=2e-4, update_interval=20)
)
gradient, *_ = train(lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
figure, panel = plt.subplots(figsize=(6, 3.4), layout="constrained")
panel.semilogy(gradient, label="SGD", color="#0072B2")
panel.semilogy(quasi_newton, label="mL-BFGS", color="#D55E00")
panel.set(xlabel="step", ylabel="batch loss")
panel.legend();

# %% [markdown]
# ## Curvature or step length?
#
# The first question to ask of a quasi-Newton run: where cos(d, g) stays near 1, its direction is the gradient's, and
# what differs from SGD is the length of the step. Compare it then with SGD at a larger learning rate.

# %%
for record in records[::3]:
    print(
        f"step {record['step']:3d}: μ {record['mu']:.3g} (damped {record['mu_damped']:.3g}), "
        f"γ {record['gamma']:.2f}, ‖d‖/‖g‖ {record['direction_over_gradient']:.2f}, "
        f"cos(d, g) {record['cos_direction_gradient']:.3f}"
    )

# %% [markdown]
# ## A checkpoint is bit-equal
#
# Averages, history and counters are all in `state_dict`.

# %%
model = make_model()
copy = MLBFGS(model.named_parameters(), lr=0.1, weight_decay=2e-4, update_interval=20)
copy.load_state_dict(optimizer.state_dict())
same = [
    torch.equal(mine, theirs) if torch.is_tensor(mine) else mine == theirs
    for ours, others in zip(copy.state.values(), optimizer.state.values(), strict=True)
    for mine, theirs in zip(ours.values(), others.values(), strict=True)
]
print(f"{sum(same)} of {len(same)} entries of the state are equal")
assert all(same)
