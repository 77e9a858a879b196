"""Fill the schedule `replay` from the run whose γ it replays.

With γ_t the initial inverse-Hessian scale that a quasi-Newton run stored at its step t, that run
used γ_t from the step after t to the next accepted pair, and d = g before the first. The
multipliers are therefore [0, 1] and one [t, γ_t] for each accepted pair, steps counted from 0. They
stand in the frozen config, so that the run depends on no other file; `schedule.source_key` says
whose they are.
"""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from experiments.errors import UserError
from experiments.given import visible
from experiments.runs.directory import CONFIG_FILE, FINISHED, METRICS_FILE, read_status
from experiments.runs.metrics import read_metrics
from experiments.runs.spec import RunSpec

logger = logging.getLogger(__name__)

# A source may differ in these: they are what makes it another contestant.
_FREE = ("optimizer", "schedule")


def wants_source(config: DictConfig) -> bool:
    """Whether a composed config has a schedule that is still to be filled."""
    return config.schedule.get("name") == "replay" and not config.schedule.get("multipliers")


def fill(config: DictConfig) -> bool:
    """Put the trajectory of the source into the config.

    Args:
        config: a composed config with its seed and results directory; changed in place. One that
            wants no source is left as it is.

    Returns:
        Whether the config is complete: False where the source has no finished run yet.

    Raises:
        UserError: several runs would do, or the source's γ is no schedule.
    """
    if not wants_source(config):
        return True
    source = find_source(config)
    if source is None:
        return False
    config.schedule.source_key = source.key
    config.schedule.multipliers = [
        [step, gamma] for step, gamma in trajectory(source.directory / METRICS_FILE)
    ]
    return True


def find_source(config: DictConfig) -> RunSpec | None:
    """The finished run whose γ is to be replayed; None where there is none yet.

    It is a run of `schedule.source` in the same experiment, at the same scale and seed, of which
    everything but optimizer and schedule decides the same numbers.

    Raises:
        UserError: several runs fit.
    """
    spec = RunSpec.from_config(config)
    wanted, results_dir = _shared_values(spec), Path(spec.config.results_dir)
    folder = results_dir / "runs" / spec.experiment / config.schedule.source
    found = []
    for path in visible(folder, f"{config.scale.name}-seed{config.seed}-*"):
        status = read_status(path)
        if status is None or status.status not in FINISHED:
            continue
        spec = RunSpec.load(path / CONFIG_FILE)
        # Another key than the folder's: of another version of the numerics.
        if path.name == spec.directory.name and _shared_values(spec) == wanted:
            found.append((path, spec))
    if len(found) > 1:
        keys = ", ".join(spec.key for _, spec in found)
        raise UserError(
            f"schedule.source={config.schedule.source} has {len(found)} runs in {folder} whose "
            f"γ could be replayed ({keys}): move all but one away"
        )
    if not found:
        return None
    path, spec = found[0]
    moved = OmegaConf.merge(spec.config, {"results_dir": config.results_dir})
    assert isinstance(moved, DictConfig)
    return RunSpec.from_config(moved, source=str(path / CONFIG_FILE))


def trajectory(metrics: Path) -> list[tuple[int, float]]:
    """The γ in use along a run, as (step, γ) pairs, steps counted from 0.

    Args:
        metrics: the `metrics.jsonl` of the run.

    Raises:
        UserError: the run has several blocks, no curvature records, or a γ that is no learning
            rate.
    """
    records = [record for record in read_metrics(metrics) if record["kind"] == "curvature"]
    if not records:
        raise UserError(f"{metrics} has no curvature records: there is no γ to replay")
    blocks = {record["block"] for record in records}
    if len(blocks) > 1:
        raise UserError(
            f"{metrics} has {len(blocks)} blocks with a γ each; a schedule has one multiplier: "
            "replay a run with one block (optimizer.blocks=null)"
        )
    points = [(0, 1.0)]
    for record in records:
        if not record["accepted"]:
            continue
        gamma = record["gamma"]
        if gamma is None or gamma <= 0:
            raise UserError(f"{metrics}, step {record['step']}: γ is {gamma}, no learning rate")
        points.append((int(record["step"]), float(gamma)))
    return points


def missing_source(config: DictConfig) -> str:
    """Say what a config that cannot be filled yet waits for."""
    return (
        f"{config.experiment.arm or config.optimizer.name} seed {config.seed} replays "
        f"{config.schedule.source}, which has no finished run of scale {config.scale.name} and seed"
        f" {config.seed} in {config.results_dir}: run it first"
    )


def _shared_values(spec: RunSpec) -> dict[str, object]:
    values = spec.deciding_values.items()
    return {key: value for key, value in values if key.split(".")[0] not in _FREE}
