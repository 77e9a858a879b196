"""A small set of results with a registry, runs of two scales, curvature and a divergence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from experiments.analysis.showing.registry_page import write_registry
from tests.experiments.analysis.run_factory import FakeRun, curvature_record, write_runs

CLAIMS = """
close: &base
  {row: X-T1, paper: mL-BFGS, place: Table 1, statement: better than <SGD>, experiment: toy,
   metric: final_top1, kind: ordering, optimizer: kfac, reference: sgd, rule: above}
ordering: {<<: *base, optimizer: mlbfgs}
accuracy: {row: X-T1, paper: mL-BFGS, place: Table 1, statement: top-1 of SGD, experiment: toy,
   metric: final_top1, kind: value, optimizer: sgd, printed: 94.1, margin: 0.5, judged_at: [full]}
speed: {<<: *base, optimizer: mlbfgs, row: X-F2, paper: SLIM-QN, metric: steps_to_target,
   kind: speedup}
mine: {<<: *base, optimizer: mlbfgs, row: C, paper: ours, experiment: never}
"""
WORK = {"epochs": 1, "steps": 10, "flops": 1e9, "seconds": 60.0}
PREDICTIONS = {
    "machine": "a fast machine",
    "runs": {"never": {"full": {"mlbfgs": WORK, "sgd": WORK}}},
}
ROLES = {"baseline": "sgd", "figures": {"quasi_newton": ["mlbfgs", "sgd"], "rest": ["adam"]}}
TOP1 = {"mlbfgs": (93.0, 94.0, 95.0), "sgd": (91.0, 91.5, 92.5)}  # differences 2, 2.5, 2.5


def toy_runs() -> Iterator[FakeRun]:
    for seed in range(3):
        records = [
            curvature_record(step, gamma=2.0 + step / 100, cos_direction_gradient=0.9 - seed / 100)
            for step in (100, 200)
        ]
        ours, theirs = (
            (70.0 + i, 80.0 + i, TOP1[w][seed]) for i, w in ((12, "mlbfgs"), (0, "sgd"))
        )
        yield FakeRun("mlbfgs", seed, top1=ours, curvature=records, roles=ROLES)
        yield FakeRun("sgd", seed, top1=theirs, roles=ROLES)
        third = (70.0, 80.0, (91.5, 91.0, 92.6)[seed])  # differences to SGD: 0.5, -0.5, 0.1
        yield FakeRun("kfac", seed, top1=third, roles=ROLES)
    gone = {"top1": (60.0, 50.0, None), "loss": (2.0, 90.0, None), "status": "diverged"}
    yield FakeRun("adam", 0, roles=ROLES, **gone)
    yield FakeRun("sgd", 0, scale="full", top1=(70.0, 80.0, 93.8))


def write_results(folder: Path) -> Path:
    """Runs, registry, judged claims: everything that a report needs."""
    write_runs(folder, *toy_runs())
    (folder / "claims.yaml").write_text(CLAIMS)
    (folder / "predictions.json").write_text(json.dumps(PREDICTIONS))
    (folder / "summary").mkdir()
    write_registry(folder, folder / "claims.yaml")
    return folder
