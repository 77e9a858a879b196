"""Write run directories as docs/architecture.md describes them, with numbers the test chose."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

TARGET = {"metric": "test_top1", "value": 90.0}


@dataclass(frozen=True)
class FakeRun:
    """A run directory to write; `loss` and `top1` hold one value per epoch, None is null."""

    optimizer: str = "sgd"
    seed: int = 0
    scale: str = "reduced"
    experiment: str = "toy"
    status: str = "done"
    message: str = ""
    top1: Sequence[float | None] = (50.0, 80.0, 91.0)
    loss: Sequence[float | None] = (2.0, 1.0, 0.5)
    seconds_per_epoch: float = 10.0
    steps_per_epoch: int = 100
    target: Mapping[str, Any] | None = field(default_factory=lambda: TARGET)
    settings: Mapping[str, Any] = field(default_factory=lambda: {"lr": 0.1})
    curvature: Sequence[Mapping[str, Any]] = ()
    gradients: Sequence[Mapping[str, Any]] = ()
    extra: Mapping[str, float] = field(default_factory=dict)
    arm: str = ""
    roles: Mapping[str, Any] = field(default_factory=dict)
    numerics_version: int | None = None
    numerics_rounding: int | None = None
    extra_config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 1
    resumes: Sequence[Mapping[str, Any]] = ()

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "seed": self.seed,
            "results_dir": f"results-{self.seed}",
            "experiment": {
                "name": self.experiment,
                "target": self.target and dict(self.target),
                **({"arm": self.arm} if self.arm else {}),
                **self.roles,
            },
            "optimizer": {"name": self.optimizer, **self.settings},
            "scale": {"name": self.scale},
            "train": {"epochs": 30, "threads": 1},
        }
        for node, values in self.extra_config.items():
            config[node] = {**config.get(node, {}), **values}
        return config

    @property
    def key(self) -> str:
        decides = [self.optimizer, self.scale, self.seed, dict(self.settings)]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]

    def records(self) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        for epoch, (loss, top1) in enumerate(zip(self.loss, self.top1, strict=True), start=1):
            step, seconds = epoch * self.steps_per_epoch, epoch * self.seconds_per_epoch
            shared = {"step": step, "train_time_s": seconds}
            records.append({"kind": "step", "epoch": epoch - 1, "loss": loss, "lr": 0.1, **shared})
            records.append(
                {
                    "kind": "epoch",
                    "epoch": epoch,
                    **shared,
                    "train_loss": loss,
                    "test_loss": loss,
                    "test_top1": top1,
                    "test_top5": top1,
                    "data_time_s": 0.0,
                    "forward_backward_time_s": 0.9 * seconds,
                    "optimizer_time_s": 0.1 * seconds,
                    "images_per_second": 1000.0,
                    "peak_memory_bytes": 100 * 2**20,
                    **self.extra,
                }
            )
        records += [{"kind": "gradient", **record} for record in self.gradients]
        return records + [{"kind": "curvature", **record} for record in self.curvature]

    def write(self, results_dir: Path) -> Path:
        name = f"{self.scale}-seed{self.seed}-{self.key}"
        path = results_dir / "runs" / self.experiment / (self.arm or self.optimizer) / name
        path.mkdir(parents=True)
        meta = {"key": self.key, "experiment": self.experiment, "optimizer": self.optimizer}
        meta |= {"seed": self.seed, "scale": self.scale, "parameters": 1000}
        meta |= {"arm": self.arm} if self.arm else {}
        meta |= {"hardware": dict(self.hardware)} if self.hardware else {}
        meta |= {"ranks": self.ranks, "resumes": [dict(origin) for origin in self.resumes]}
        if self.numerics_version is not None:
            meta["numerics_version"] = self.numerics_version
        if self.numerics_rounding is not None:
            meta["numerics_rounding"] = self.numerics_rounding
        status = {"status": self.status, "epoch": len(self.top1), "message": self.message}
        (path / "config.yaml").write_text(yaml.safe_dump(self.config))
        (path / "meta.json").write_text(json.dumps(meta))
        (path / "status.json").write_text(json.dumps(status))
        lines = [json.dumps(record) + "\n" for record in self.records()]
        (path / "metrics.jsonl").write_text("".join(lines))
        return path


def write_runs(results_dir: Path, *runs: FakeRun) -> Path:
    """Write all runs and return the results directory."""
    for run in runs:
        run.write(results_dir)
    return results_dir


def curvature_record(step: int, **values: Any) -> dict[str, Any]:
    """A curvature record with every field of the contract."""
    record = {"step": step, "block": 0, "mu": 0.8, "mu_damped": 0.802, "tau": 0.99}
    record |= {"damped": False, "accepted": True, "gamma": 2.1}
    record |= {"cos_direction_gradient": 0.99, "direction_over_gradient": 2.2}
    record |= {"pairs": 2, "skipped": 0, "times_damped": 0}
    return record | values
