"""What changed between two sets of results: verdicts, numbers, runs, quantities of theory.

Runs are compared by their directory. Two runs of one key are the same where every record of theirs
agrees in everything but seconds and memory: a run repeated elsewhere gives the same losses, not the
same times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from experiments.analysis.judging.theory import load_subjects
from experiments.analysis.measuring.measures import measure_named
from experiments.analysis.measuring.quantities import MINUS, number
from experiments.analysis.measuring.runs import Record, Run, load_runs
from experiments.errors import UserError
from experiments.report.judged import CLAIMS_FILE, JudgedClaim, Judgement, load_judged

# Fields of records that differ whenever a run is repeated.
_MACHINE = ("_time_s", "_bytes", "_per_second")
_MEASURES = ("final_top1", "final_train_loss")


@dataclass(frozen=True)
class Part:
    """One heading of the comparison.

    Attributes:
        title: what is compared.
        lines: one a difference.
        remarks: what a reader must know and what is no difference.
    """

    title: str
    lines: tuple[str, ...]
    remarks: tuple[str, ...] = ()


def compare_results(before: Path, after: Path, experiment: str | None = None) -> list[Part]:
    """Compare two results directories.

    Args:
        before: the first set.
        after: the second set.
        experiment: compare this experiment alone.

    Raises:
        UserError: a directory holds no runs, or a file in it cannot be read.
    """
    claims = _claims(before, after, experiment)
    runs = _runs(_load(before, experiment), _load(after, experiment))
    parts = [claims, runs]
    return parts if experiment else [*parts, _theory(before, after)]


def text(parts: Sequence[Part]) -> str:
    """The comparison as text."""
    blocks = []
    for part in parts:
        head = f"{part.title}: {len(part.lines) or 'no'} difference{'s'[: len(part.lines) != 1]}"
        lines = [f"  {line}" for line in part.lines]
        blocks.append("\n".join([head, *lines, *(f"  ({remark})" for remark in part.remarks)]))
    return "\n".join(blocks) + "\n"


def _claims(before: Path, after: Path, experiment: str | None) -> Part:
    missing = [str(folder) for folder in (before, after) if not (folder / CLAIMS_FILE).is_file()]
    if missing:
        return Part("claims", (), (f"not compared: no {CLAIMS_FILE} in {' and '.join(missing)}",))
    old, new = (_judgements(load_judged(f), experiment) for f in (before, after))
    lines = []
    for key in _keys(old, new):
        name = " at ".join(filter(None, key))
        if key not in old:
            lines.append(f"+ {name}: {_judged(*new[key])}")
        elif key not in new:
            lines.append(f"- {name}: {_judged(*old[key])}")
        elif _judged(*old[key]) != _judged(*new[key]):
            lines.append(f"~ {name}: {_judged(*old[key])} -> {_judged(*new[key])}")
    changed = sum(old[key][1].outcome != new[key][1].outcome for key in old.keys() & new.keys())
    return Part("claims", tuple(lines), (f"{changed} with another verdict",))


def _judgements(
    claims: Sequence[JudgedClaim], experiment: str | None
) -> dict[tuple[str, str], tuple[JudgedClaim, Judgement]]:
    return {
        (claim.id, part.scale if part.runs else ""): (claim, part)
        for claim in claims
        if experiment in (None, claim.experiment)
        for part in claim.judgements
    }


def _judged(claim: JudgedClaim, judgement: Judgement) -> str:
    if judgement.centre is None:
        return judgement.outcome
    kind = claim.number_kind
    text = f"{judgement.outcome}, {_number(judgement.centre, kind)}"
    if judgement.low is not None and judgement.high is not None:
        text += f" [{_number(judgement.low, kind)}, {_number(judgement.high, kind)}]"
    return f"{text} (n = {judgement.n})"


def _load(results_dir: Path, experiment: str | None) -> dict[str, Run]:
    root = results_dir / "runs"
    if not root.is_dir():
        raise UserError(f"no runs in {results_dir}: the directory {root} does not exist")
    names = [experiment] if experiment else sorted(p.name for p in root.iterdir() if p.is_dir())
    runs = (run for name in names for run in load_runs(results_dir, name).runs)
    return {run.path.relative_to(root).as_posix(): run for run in runs}


def _runs(old: Mapping[str, Run], new: Mapping[str, Run]) -> Part:
    lines, same = [], 0
    for key in _keys(old, new):
        if key not in old:
            lines.append(f"+ {key}: {_run(new[key])}")
        elif key not in new:
            lines.append(f"- {key}: {_run(old[key])}")
        else:
            change = _change(old[key], new[key])
            same += not change
            lines += [f"~ {key}: {change}"] if change else []
    return Part("runs", tuple(lines), (f"{same} with the same numbers, seconds and memory aside",))


def _run(run: Run) -> str:
    measures = [measure_named(name) for name in _MEASURES]
    found = [(measure, measure(run)) for measure in measures]
    told = [f"{each.name} {_number(v, each.kind)}" for each, v in found if v is not None]
    return ", ".join([run.status, *told])


def _change(old: Run, new: Run) -> str:
    if _run(old) != _run(new):
        return f"{_run(old)} -> {_run(new)}"
    for kind in ("epochs", "steps", "curvature"):
        for first, second in zip_longest(getattr(old, kind), getattr(new, kind)):
            field = _differing(first, second)
            if field:
                at = (first or second).get("step")
                values = (None if r is None else r.get(field) for r in (first, second))
                return f"{kind} differ from step {at} on: {field} {' -> '.join(map(str, values))}"
    return ""


def _differing(first: Record | None, second: Record | None) -> str:
    """The first field in which two records differ, seconds and memory aside; "" where none does."""
    if first is None or second is None:
        return "step"
    for name in sorted(first.keys() | second.keys()):
        if not name.endswith(_MACHINE) and first.get(name) != second.get(name):
            return name
    return ""


def _theory(before: Path, after: Path) -> Part:
    old, new = (dict(_quantities(folder / "theory")) for folder in (before, after))
    lines = []
    for key in _keys(old, new):
        if key not in old:
            lines.append(f"+ {key}: {new[key]}")
        elif key not in new:
            lines.append(f"- {key}: {old[key]}")
        elif old[key] != new[key]:
            lines.append(f"~ {key}: {old[key]} -> {new[key]}")
    return Part("theory", tuple(lines))


def _quantities(folder: Path) -> Iterator[tuple[str, str]]:
    for name, subject in load_subjects(folder).items():
        for quantity, effect in subject.quantities.items():
            assert effect.centre is not None and effect.interval is not None
            values = (effect.centre, effect.interval.low, effect.interval.high)
            centre, low, high = (_number(value, "plain") for value in values)
            yield f"{name}/{quantity}", f"{centre} [{low}, {high}]"


def _keys(old: Mapping[Any, object], new: Mapping[Any, object]) -> list[Any]:
    """The keys of both, those of the second alone last."""
    return [*old, *(key for key in new if key not in old)]


def _number(value: float, kind: str) -> str:
    """A finite number in more digits than a table has, so that a change is seen."""
    if math.isinf(value):
        return number(value, kind)
    return f"{value:.6g}".replace("-", MINUS)
