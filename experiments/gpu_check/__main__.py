r"""Try the suite on a GPU in ten minutes, and write one JSON with everything.

    scripts/gpu_check.sh
    python -m experiments.gpu_check --device cpu        # the same without what needs a GPU

Trains a few steps of every experiment in every precision, with generated images, once compiled;
looks whether a step makes the host wait, runs the optimizers' conformance list and measures their
steps. What fails is named, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.entry import entry
from experiments.errors import UserError, nearest
from experiments.given import user_path
from experiments.gpu_check.device_checks import (
    conformance_on,
    speed_check,
    synchronisation_checks,
)
from experiments.gpu_check.outcome import Check, run_checks
from experiments.gpu_check.trainings import (
    Scope,
    all_experiments,
    compile_check,
    training_checks,
)
from experiments.runs.owned_folder import OwnedFolder
from experiments.runs.provenance import describe_origin
from experiments.training.task import choose_device

PRECISIONS = ("float32", "bfloat16", "float16")
PARTS = ("train", "compile", "wait", "conformance", "speed")


def checks(parts: Sequence[str], scope: Scope) -> Iterator[Check]:
    """The checks of these parts, those of a minute before those of many."""
    if "speed" in parts:
        yield speed_check(scope)
    if "wait" in parts:
        yield from synchronisation_checks(scope)
    if "compile" in parts:
        yield compile_check(scope)
    if "conformance" in parts:
        yield from conformance_on(scope)
    if "train" in parts:
        yield from training_checks(scope)


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks and write the report; 1 where one failed, 2 for a mistake of the user."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("experiments.gpu_check").setLevel(logging.INFO)
    parser = argparse.ArgumentParser(prog="python -m experiments.gpu_check", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--scale", choices=("full", "smoke"), help="default: smoke on a CPU")
    parser.add_argument("--experiments", help="comma-separated; default: all")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="comma-separated")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--limit-s", type=float, default=600.0, help="begin nothing after it")
    parser.add_argument("--out", type=user_path, default=Path("results/benchmarks/gpu_check.json"))
    chosen = parser.parse_args(arguments)
    folder_of_report = OwnedFolder(chosen.out.parent)
    folder_of_report.refuse_foreign([chosen.out.name])
    parts = _chosen("--parts", chosen.parts, PARTS)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU; --device cpu tries the rest")
    device = choose_device(chosen.device)
    with tempfile.TemporaryDirectory(prefix="gpu_check.") as folder:
        scope = Scope(
            device=device,
            scale=chosen.scale or ("smoke" if device.type == "cpu" else "full"),
            experiments=_chosen("--experiments", chosen.experiments, all_experiments()),
            precisions=_chosen("--precisions", chosen.precisions, PRECISIONS),
            folder=Path(folder),
        )
        records = run_checks(checks(parts, scope), device, limit_s=chosen.limit_s)
    report = _report(scope, records)
    print(f"{', '.join(f'{n} {status}' for status, n in report['counts'].items())}: {chosen.out}")
    for name in report["failed"]:
        print(f"FAILED {name}")
    folder_of_report.replace({chosen.out.name: json.dumps(report, indent=2) + "\n"})
    return 1 if report["failed"] else 0


def _report(scope: Scope, records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "origin": describe_origin(scope.device),
        "torch": torch.__version__,
        "device": scope.device.type,
        "scale": scope.scale,
        "seconds": round(sum(record.get("seconds", 0.0) for record in records), 1),
        "counts": dict(Counter(record["status"] for record in records)),
        "failed": [record["name"] for record in records if record["status"] == "fail"],
        "checks": records,
    }


def _chosen(option: str, given: str | None, known: Sequence[str]) -> list[str]:
    if given is None:
        return list(known)
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"{option} {name!r} does not exist; {nearest(name, known)}")
    return [name for name in known if name in names]


if __name__ == "__main__":
    sys.exit(main())
