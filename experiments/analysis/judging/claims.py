"""What the papers claim: read from `results/claims.yaml` and the printed cells beside it.

A claim names an effect, where its printed value stands, a margin and a rule, all fixed before the
run. Printed numbers stand once, in `results/paper/<paper>.yaml`; a claim points to their cells.

Effect of a claim, by kind (subject: `optimizer`, reference: `reference`):

* `value`: the metric of the subject;
* `difference`: subject minus reference;
* `ordering`: the same, where the paper prints no number: above or below zero;
* `ratio`: subject over reference;
* `speedup`: reference over subject (for times: how many times faster the subject is);
* `share`: in which share of the seeds a flag of the subject is 1 (such as `failed`); "it
  diverges" is read as: in more than half of all seeds, `printed: 0.5`;
* `theory`: a quantity that needs no run, `<file>/<quantity>` of `results/theory/<file>.json`
  (`experiments.analysis.judging.theory`); such a claim names no optimizer.

`paper: ours` marks a question of this project, asked before the run like the papers' claims: no
paper is quoted, and its verdict says whether our own statement holds.

Subject and reference are contestants of the experiment: an optimizer, or an arm by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.analysis.measuring.measures import MEASURES, measure_named
from experiments.analysis.measuring.runs import SCALES
from experiments.contestants import arms
from experiments.errors import UserError, nearest
from experiments.given import is_number, visible
from experiments.yaml_text import read_yaml

DEFAULT_CLAIMS = Path(__file__).resolve().parents[3] / "results" / "claims.yaml"
KINDS = ("value", "difference", "ordering", "ratio", "speedup", "share", "theory")
RULES = ("within", "above", "below")
_WITHOUT_REFERENCE = ("value", "share", "theory")
OURS = "ours"  # in the place of a paper
SEEDS = (0, 1, 2)  # of the command that would settle a claim
SEEDS_OF_SHARES = tuple(range(6))  # the fewest that can settle one (`statistics.share_interval`)
_REQUIRED = ("row", "paper", "place", "statement", "experiment", "metric", "kind", "optimizer")
_OPTIONAL = (
    "reference",
    "cell",
    "reference_cell",
    "printed",
    "margin",
    "rule",
    "judged_at",
    "deterministic",
    "contradicts",
    "presupposes",
    "command",
    "note",
)
_NUMBERS = ("printed", "margin")
_LISTS = ("judged_at", "contradicts")
# They become folders and parts of commands.
_NAMES = ("experiment", "optimizer", "reference")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class Printed:
    """A number as a paper prints it.

    Attributes:
        value: the number.
        spread: what stands after the ±; None if nothing does.
        n: number of runs behind it, if the paper says.
    """

    value: float
    spread: float | None = None
    n: int | None = None

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:g}"
        return f"{self.value:g}{spread}"


@dataclass(frozen=True)
class Claim:
    """One entry of the registry.

    Attributes:
        id: stable name of the entry.
        row: the row of the papers' list of claims it belongs to, such as M-T3.
        paper: SLIM-QN or mL-BFGS; `OURS` for a statement of this project.
        place: table, figure or section; of a statement of ours, what it is about.
        statement: quotation, or the cell in words.
        experiment: the experiment that tests it.
        metric: a measure of a run, or the quantity of a claim of theory.
        kind: one of `KINDS`.
        optimizer: the subject, an optimizer or an arm; "" for a claim of theory.
        reference: the other optimizer or arm; None for a value or a share.
        printed: what the paper prints for the effect; None if it prints no number.
        margin: how far the effect may lie from it, in units of the effect.
        rule: within, above or below.
        judged_at: the scales whose runs may give a verdict.
        deterministic: whether one run is exact, so that it needs no interval.
        contradicts: ids of claims that point the other way.
        presupposes: id of a claim of the same experiment without which this one says nothing, and
            which presupposes nothing itself; "" if there is none.
        command: what would settle it; "" for the training runs themselves.
        note: whatever else a reader must know.
    """

    id: str
    row: str
    paper: str
    place: str
    statement: str
    experiment: str
    metric: str
    kind: str
    optimizer: str
    reference: str | None
    printed: Printed | None
    margin: float
    rule: str
    judged_at: tuple[str, ...]
    deterministic: bool
    contradicts: tuple[str, ...]
    presupposes: str
    command: str
    note: str

    def settled_by(self, scale: str = "full") -> str:
        """The command whose runs would settle the claim."""
        if self.kind == "theory":
            return "make theory"
        return self.command or reproduce_command(
            self.experiment, self.optimizers, scale, self.seeds
        )

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the command that would settle it."""
        return SEEDS_OF_SHARES if self.kind == "share" else SEEDS

    @property
    def optimizers(self) -> tuple[str, ...]:
        """The optimizers and arms it speaks of, the reference first."""
        return tuple(name for name in (self.reference, self.optimizer) if name)


def settling_commands(claims: Sequence[Claim], scale: str = "full") -> tuple[str, ...]:
    """The fewest commands that would settle all of the claims: one per experiment."""
    optimizers: dict[str, dict[str, None]] = {}
    seeds: dict[str, tuple[int, ...]] = {}
    own = []
    for claim in claims:
        name = claim.experiment
        if claim.command or claim.kind == "theory":
            own.append(claim.settled_by())
        else:
            optimizers.setdefault(name, {}).update(dict.fromkeys(claim.optimizers))
            seeds[name] = max(seeds.get(name, SEEDS), claim.seeds, key=len)
    runs = [
        reproduce_command(name, tuple(needed), scale, seeds[name])
        for name, needed in optimizers.items()
    ]
    return (*runs, *dict.fromkeys(own))


def reproduce_command(
    experiment: str, contestants: Sequence[str], scale: str, seeds: Sequence[int] = SEEDS
) -> str:
    """The command that runs these optimizers and arms of an experiment."""
    own_arms = arms(experiment)
    groups = {
        "--optimizers": [name for name in contestants if name not in own_arms],
        "--arms": [name for name in contestants if name in own_arms],
    }
    chosen = " ".join(f"{option} {','.join(names)}" for option, names in groups.items() if names)
    listed = ",".join(map(str, seeds))
    return f"python -m experiments.reproduce {experiment} {chosen} --seeds {listed} --scale {scale}"


def load_claims(path: Path = DEFAULT_CLAIMS) -> tuple[Claim, ...]:
    """Read the registry and the printed numbers in `paper/` beside it.

    Raises:
        UserError: a file is missing, or an entry breaks the schema; the message names the entry.
    """
    entries = _load(path)
    cells = {file.stem: _load(file) for file in visible(path.parent / "paper", "*.yaml")}
    claims = tuple(_parse(name, entry, cells, path) for name, entry in entries.items())
    known = {claim.id: claim for claim in claims}
    for claim in claims:
        named = [("contradicts", other) for other in claim.contradicts]
        named += [("presupposes", claim.presupposes)] if claim.presupposes else []
        for key, other in named:
            if other not in known:
                raise UserError(f"{path}, {claim.id}: {key} {other!r}: {nearest(other, known)}")
        if claim.presupposes and known[claim.presupposes].experiment != claim.experiment:
            raise UserError(
                f"{path}, {claim.id}: presupposes {claim.presupposes!r}, which is about "
                f"{known[claim.presupposes].experiment}: a claim about {claim.experiment} is needed"
            )
        if claim.presupposes and known[claim.presupposes].presupposes:
            raise UserError(
                f"{path}, {claim.id}: presupposes {claim.presupposes!r}, which presupposes "
                f"{known[claim.presupposes].presupposes!r} itself: a claim that stands alone is "
                "needed"
            )
    return claims


def _load(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a mapping from names to entries is needed")
    return content


def _parse(name: str, entry: Any, cells: Mapping[str, Any], path: Path) -> Claim:
    where = f"{path}, {name}"
    if not isinstance(entry, dict):
        raise UserError(f"{where}: a mapping is needed, got {entry!r}")
    for key, value in entry.items():
        if key not in (*_REQUIRED, *_OPTIONAL):
            raise UserError(f"{where}: unknown key {key!r}: {nearest(str(key), _ALL)}")
        _check_type(key, value, where)
    theory = entry.get("kind") == "theory"
    required = [key for key in _REQUIRED if not (theory and key == "optimizer")]
    missing = [key for key in required if not entry.get(key)]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} missing")
    kind, rule = str(entry["kind"]), str(entry.get("rule", "within"))
    judged_at = tuple(entry.get("judged_at", SCALES))
    for value, valid in ((kind, KINDS), (rule, RULES), *((s, SCALES) for s in judged_at)):
        if value not in valid:
            raise UserError(f"{where}: {value!r} is not valid: {nearest(str(value), valid)}")
    if theory and "optimizer" in entry:
        raise UserError(f"{where}: kind 'theory' has no optimizer")
    if not theory:
        _check_metric(str(entry["metric"]), kind, where)
    if (kind in _WITHOUT_REFERENCE) == ("reference" in entry):
        needed = "no reference" if kind in _WITHOUT_REFERENCE else "a reference optimizer"
        raise UserError(f"{where}: kind {kind!r} needs {needed}")
    if entry["paper"] == OURS and "cell" in entry:
        raise UserError(f"{where}: paper {OURS!r} prints nothing: it cannot have a cell")
    printed = _printed(entry, kind, cells, where)
    _check_consistency(entry, kind, rule, printed, where)
    return Claim(
        id=name,
        **{key: str(entry.get(key, "")) for key in _REQUIRED},
        reference=entry.get("reference"),
        printed=printed,
        margin=float(entry.get("margin", 0.0)),
        rule=rule,
        judged_at=judged_at,
        deterministic=bool(entry.get("deterministic", False)),
        contradicts=tuple(entry.get("contradicts", ())),
        presupposes=str(entry.get("presupposes", "")),
        command=str(entry.get("command", "")),
        note=" ".join(str(entry.get("note", "")).split()),
    )


def _check_type(key: str, value: Any, where: str) -> None:
    """Refuse a value of another kind than its key has; null is as good as none."""
    if value is None:
        return
    if key in _NUMBERS:
        good, wanted = is_number(value), "a number"
    elif key in _LISTS:
        good = isinstance(value, list) and all(isinstance(item, str) for item in value)
        wanted = "a list of names"
    elif key == "deterministic":
        good, wanted = isinstance(value, bool), "true or false"
    elif key in _NAMES:
        good = isinstance(value, str) and _NAME.fullmatch(value) is not None
        wanted = "a name of letters, digits and . _ + -"
    else:
        good, wanted = isinstance(value, str), "a text"
    if not good:
        raise UserError(f"{where}: {key} is {value!r}, {wanted} is needed")


def _check_metric(name: str, kind: str, where: str) -> None:
    try:
        measure = measure_named(name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if kind == "share" and measure.kind != "flag":
        flags = ", ".join(m.name for m in MEASURES.values() if m.kind == "flag")
        raise UserError(f"{where}: kind 'share' needs a metric that is 1 or 0: {flags}")


def _check_consistency(
    entry: Mapping[str, Any], kind: str, rule: str, printed: Printed | None, where: str
) -> None:
    if kind == "ordering" and (printed is not None or rule == "within"):
        raise UserError(
            f"{where}: an ordering has no printed number and the rule 'above' or 'below'"
        )
    if kind == "share" and rule == "within":
        raise UserError(f"{where}: kind 'share' needs the rule 'above' or 'below'")
    margin = entry.get("margin")
    if printed is None:
        # A factor may be claimed without a number too ("faster"): then 1 is a tie.
        if kind in ("value", "difference", "share", "theory") or rule == "within":
            raise UserError(f"{where}: kind {kind!r}, rule {rule!r} needs 'cell' or 'printed'")
    elif margin is None:
        raise UserError(f"{where}: margin missing: it must be fixed before the run")
    if margin is not None and margin < 0:
        raise UserError(f"{where}: margin is {margin!r}, a number of at least 0 is needed")


def _printed(
    entry: Mapping[str, Any], kind: str, cells: Mapping[str, Any], where: str
) -> Printed | None:
    """The printed effect: given as a number, or computed from one or two cells."""
    if "cell" not in entry:
        value = entry.get("printed")
        return None if value is None else Printed(float(value))
    if "printed" in entry:
        raise UserError(f"{where}: 'printed' stands in the cell already; name one of the two")
    subject = _cell(str(entry["cell"]), cells, where)
    if kind in _WITHOUT_REFERENCE:
        return subject
    if "reference_cell" not in entry:
        raise UserError(f"{where}: kind {kind!r} with a cell needs a reference_cell too")
    reference = _cell(str(entry["reference_cell"]), cells, where)
    below = {"ratio": reference, "speedup": subject}.get(kind)
    if below is not None and below.value == 0:
        raise UserError(f"{where}: kind {kind!r} divides by a cell that is 0")
    # Rounded because decimal fractions are not exact: 93.9 - 94.1 is -0.2 on paper.
    if kind == "ratio":
        return Printed(round(subject.value / reference.value, 4))
    if kind == "speedup":
        return Printed(round(reference.value / subject.value, 4))
    return Printed(round(subject.value - reference.value, 6))


def _cell(name: str, cells: Mapping[str, Any], where: str) -> Printed:
    """Look up `<paper file>/<table>/<task>/<optimizer>/<quantity>`."""
    node: Any = cells
    for part in name.split("/"):
        if not isinstance(node, Mapping) or part not in node:
            valid = node if isinstance(node, Mapping) else ()
            hint = nearest(part, map(str, valid))
            raise UserError(f"{where}: cell {name!r} does not exist at {part!r}: {hint}")
        node = node[part]
    entries = node if isinstance(node, Mapping) else {}
    rest = [entries.get(key) for key in ("spread", "n")]
    if not is_number(entries.get("value")) or not all(x is None or is_number(x) for x in rest):
        raise UserError(f"{where}: cell {name!r} is {node!r}, {{value, spread, n}} is needed")
    return Printed(float(node["value"]), node.get("spread"), node.get("n"))


_ALL = (*_REQUIRED, *_OPTIONAL)
