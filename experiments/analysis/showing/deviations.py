"""The ledger of deviations: `results/deviations.yaml` in, `docs/deviations.md` out.

A row says what the papers print, what the authors' released code does, what is done here, and which
switch chooses another reading. Its effect is a difference of two contestants of an experiment, read
from the run files of `results/runs/`: as long as there are none, the command that would make them
stands in its place. No number of it is typed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.analysis.judging.claims import reproduce_command
from experiments.analysis.measuring import quantities
from experiments.analysis.measuring.groups import Group, Results, display_name, group_runs
from experiments.analysis.measuring.pairing import compare_groups
from experiments.analysis.measuring.runs import load_runs
from experiments.contestants import arms, options
from experiments.errors import UserError, nearest
from experiments.yaml_text import read_yaml

LEDGER = "results/deviations.yaml"
# What an effect is measured by, and the scale of the command that measures it.
METRIC = "final_top1"
COMMAND_SCALE = "reduced"
_TEXTS = ("printed", "released", "ours", "why")
_KEYS = (*_TEXTS, "switch", "sources", "effect", "unmeasured")
_EFFECT_KEYS = ("experiment", "subject", "reference")


@dataclass(frozen=True)
class Contrast:
    """The comparison that is an effect: subject minus reference."""

    experiment: str
    subject: str
    reference: str

    @property
    def command(self) -> str:
        """What runs both."""
        return reproduce_command(self.experiment, (self.reference, self.subject), COMMAND_SCALE)


@dataclass(frozen=True)
class Deviation:
    """One row of the ledger.

    Attributes:
        id: stable name.
        printed: what the papers print, with the place.
        released: what the authors' released code does.
        ours: what is done here by default.
        why: the reason.
        switch: config keys, or group=option, that choose another reading.
        sources: the items of the papers' unclear places and of the released code's table.
        effect: what measures it; None where nothing can.
        unmeasured: why nothing can; "" where something can.
    """

    id: str
    printed: str
    released: str
    ours: str
    why: str
    switch: tuple[str, ...]
    sources: tuple[str, ...]
    effect: Contrast | None
    unmeasured: str


def load_ledger(path: Path) -> tuple[Deviation, ...]:
    """Read the ledger.

    Raises:
        UserError: the file is missing or a row breaks the schema; the message names the row.
    """
    try:
        content = read_yaml(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a mapping from ids to rows is needed")
    return tuple(_parse(str(name), row, f"{path}, {name}") for name, row in content.items())


def ledger_document(root: Path) -> str:
    """The text of `docs/deviations.md`.

    Args:
        root: the directory that holds `results/`.

    Raises:
        UserError: the ledger or a run file cannot be read.
    """
    ledger = load_ledger(root / LEDGER)
    experiments = {row.effect.experiment for row in ledger if row.effect is not None}
    results = {name: _results_of(root / "results", name) for name in sorted(experiments)}
    lines = [_HEAD, *_table(("id", *_TEXTS_AS_HEADERS, "switch"), map(_row, ledger))]
    lines += ["", _EFFECTS_HEAD]
    lines += _table(
        ("id", "comparison", "effect on final top-1, points", "from"),
        (_effect_row(row, results) for row in ledger),
    )
    return "\n".join(lines) + "\n"


def measured(contrast: Contrast, all_results: Sequence[Results]) -> tuple[str, str] | None:
    """An effect in words, and the runs that it was read from; None where there are none.

    Args:
        contrast: the two contestants.
        all_results: the runs of its experiment, one entry per scale.
    """
    effects, runs = [], []
    for results in all_results:
        pair = [
            [group for group in results.of_contestant(name) if group.ended]
            for name in (contrast.subject, contrast.reference)
        ]
        if not all(pair):
            continue
        if any(len(groups) > 1 for groups in pair):
            effects.append(f"{results.scale}: not computable, several configs of one contestant")
            continue
        (subject,), (reference,) = pair
        comparison = compare_groups(results, subject, reference, METRIC)
        text = quantities.comparison(comparison, "percent")
        counted = f", n = {comparison.n}" if comparison.interval else ""  # else the text says it
        lost = "".join(map(_diverged, (subject, reference)))
        effects.append(f"{results.scale}: {text}{counted}{lost}")
        runs.append(f"{_keys(subject)}; {_keys(reference)}")
    return ("; ".join(effects), "; ".join(runs)) if effects else None


def _diverged(group: Group) -> str:
    """Which of the group's runs count with an accuracy of before their end."""
    lost = sum(run.status == "diverged" for run in group.ended)
    return f", {group.contestant} diverged in {lost} of {len(group.ended)}" if lost else ""


def _keys(group: Group) -> str:
    return f"{group.contestant} {', '.join(run.key for run in group.ended)}"


def _effect_row(row: Deviation, results: Mapping[str, tuple[Results, ...]]) -> tuple[str, ...]:
    if row.effect is None:
        return (row.id, quantities.NOTHING, "", row.unmeasured)
    contrast = row.effect
    what = f"{contrast.experiment}: {display_name(contrast.subject)} {quantities.MINUS} "
    what += display_name(contrast.reference)
    found = measured(contrast, results[contrast.experiment])
    if found is None:
        return (row.id, what, "", f"not measured: `{contrast.command}`")
    return (row.id, what, *found)


def _results_of(results_dir: Path, experiment: str) -> tuple[Results, ...]:
    """The runs of an experiment, one entry per scale; empty where there are none."""
    if not (results_dir / "runs" / experiment).is_dir():
        return ()
    return group_runs(load_runs(results_dir, experiment))


def _row(row: Deviation) -> tuple[str, ...]:
    switch = ", ".join(f"`{switch}`" for switch in row.switch) or quantities.NOTHING
    return (row.id, row.printed, row.released, row.ours, row.why, switch)


def _table(headers: Sequence[str], rows: Any) -> list[str]:
    head = [tuple(headers), tuple("---" for _ in headers)]
    return [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (*head, *rows)
    ]


def _parse(name: str, row: Any, where: str) -> Deviation:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: a mapping is needed, got {row!r}")
    for key in row:
        if key not in _KEYS:
            raise UserError(f"{where}: unknown key {key!r}: {nearest(str(key), _KEYS)}")
    missing = [key for key in _TEXTS if not row.get(key)]
    missing += [key for key in ("switch", "sources") if not isinstance(row.get(key), list)]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} missing")
    if ("effect" in row) == ("unmeasured" in row):
        raise UserError(f"{where}: either 'effect' or 'unmeasured' is needed")
    return Deviation(
        id=name,
        **{key: str(row[key]) for key in _TEXTS},
        switch=tuple(map(str, row["switch"])),
        sources=tuple(map(str, row["sources"])),
        effect=_contrast(row["effect"], where) if "effect" in row else None,
        unmeasured=str(row.get("unmeasured", "")),
    )


def _contrast(entry: Any, where: str) -> Contrast:
    if not isinstance(entry, Mapping) or set(entry) != set(_EFFECT_KEYS):
        raise UserError(f"{where}: effect is {entry!r}, {{{', '.join(_EFFECT_KEYS)}}} is needed")
    contrast = Contrast(**{key: str(entry[key]) for key in _EFFECT_KEYS})
    if contrast.experiment not in options("experiment"):
        hint = nearest(contrast.experiment, options("experiment"))
        raise UserError(f"{where}: no experiment {contrast.experiment!r}; {hint}")
    valid = (*arms(contrast.experiment), *options("optimizer"))
    for name in (contrast.subject, contrast.reference):
        if name not in valid:
            raise UserError(
                f"{where}: {name!r} is no contestant of {contrast.experiment}; "
                f"{nearest(name, valid)}"
            )
    return contrast


_TEXTS_AS_HEADERS = ("printed", "released code", "here by default", "why")
_HEAD = f"""# Deviations

Where the papers (S: SLIM-QN, M: mL-BFGS) are silent, unclear or contradict themselves, where the
code that their authors released differs from them, and what is done here. Generated from
`{LEDGER}` by `make documents`.
"""
_EFFECTS_HEAD = """## Measured effects

Subject minus reference in final test top-1, paired by seed, with the 95 % interval of the mean;
read from the runs with these keys in `results/runs/`; a run that diverged counts with its last
evaluated accuracy. Both sides have the same learning rate; no reading was tuned for itself. Where
nothing stands yet, the command that measures it.
"""
