"""The page over all claims, `results/summary/README.md`: every row of the registry, judged.

One command writes it and `claims.json` beside it: `python -m experiments.analysis results --all`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.analysis.judging.claims import DEFAULT_CLAIMS, OURS, Claim, reproduce_command
from experiments.analysis.judging.registry import (
    Entry,
    Judgement,
    Registry,
    judge_registry,
    write_json,
)
from experiments.analysis.judging.verdicts import Verdict, zone_of
from experiments.analysis.measuring import quantities
from experiments.analysis.measuring.groups import display_name
from experiments.analysis.showing.tables import (
    Table,
    effect_in_words,
    kind_of,
    ours_cell,
    paper_cell,
)
from experiments.analysis.showing.theory_page import allowed, ours
from experiments.errors import UserError
from experiments.runs.owned_folder import OwnedFolder

JSON_FILE, PAGE_FILE = "claims.json", "README.md"
SHORT_FILE = "verdicts.md"  # for the README of the project
OUTCOMES = ("reproduced", "not reproduced", "inconclusive", "not run")  # as they are told
_HEAD = """# Every claim and its verdict

Computed from the files in `runs/`, from `theory/` and from the registry `claims.yaml`, which says
the rule and the margin of every claim; both were written down before the runs. The same as JSON:
[claims.json](claims.json). The rules:

- *reproduced*: the 95 % interval of our effect lies inside what the claim allows; *not reproduced*:
  it lies outside; *inconclusive*: neither, or there is no interval; *not run*: there are no runs
  that may judge it.
- Seeds are compared in pairs where they share initial weights and the order of images. A target
  never reached counts as infinite. It is seen at evaluations, once an epoch, so that steps and
  seconds to it are rounded up to that, and coarse in short runs.
- Seconds are compared where all runs are of one machine.
- Where more seeds came in than a claim asks for, and its own say something else alone, that stands
  beside the verdict. Who looks again, and who asks many claims, finds differences that are none:
  no interval is corrected for either, so a verdict near an edge is weak.
- A claim may presuppose another ("damping prevents divergence": that there is one without it).
  Where that is not reproduced, it is inconclusive.
- A verdict at a scale other than full speaks for that scale alone, never for the paper.
"""


@dataclass(frozen=True)
class Section:
    """Rows of the registry that a reader wants to see together."""

    title: str
    paper: str
    theory: bool

    def holds(self, claim: Claim) -> bool:
        """Whether a claim belongs here."""
        return claim.paper == self.paper and (claim.kind == "theory") == self.theory


SECTIONS = (
    Section("mL-BFGS paper: what needs training", "mL-BFGS", theory=False),
    Section("SLIM-QN paper: what needs training", "SLIM-QN", theory=False),
    Section("Questions of our own", OURS, theory=False),
    Section("mL-BFGS paper: what needs no training", "mL-BFGS", theory=True),
    Section("SLIM-QN paper: what needs no training", "SLIM-QN", theory=True),
    Section("Our own, without training", OURS, theory=True),
)


def write_registry(results_dir: Path, claims_path: Path = DEFAULT_CLAIMS) -> tuple[Path, ...]:
    """Judge the registry; write `claims.json`, `README.md` and `verdicts.md` in `summary/`.

    Args:
        results_dir: the directory that holds `runs/`.
        claims_path: the registry.

    Returns:
        The page, the JSON file and the short form of the page.

    Raises:
        UserError: a file cannot be read or written, or a paper has no section.
    """
    return write_page(judge_registry(results_dir, claims_path))


def write_page(registry: Registry) -> tuple[Path, ...]:
    """Write the page and the JSON file of a judged registry.

    Raises:
        UserError: the folder cannot be written, is reached through a link or holds files of these
            names from elsewhere, or a paper has no section.
    """
    texts = {PAGE_FILE: page(registry), SHORT_FILE: short_page(registry)}
    folder = OwnedFolder(registry.results_dir / "summary", below=registry.results_dir)
    folder.claim([*texts, JSON_FILE])
    write_json(registry, folder.path / JSON_FILE)
    first, second = folder.replace(texts)
    return first, folder.path / JSON_FILE, second


def short_page(registry: Registry) -> str:
    """How many verdicts there are of each kind, what training has settled, what was trained."""
    blocks = [_counts(registry.entries)]
    settled, open_ones = [], 0
    for entry in registry.entries:
        for verdict in _judged(entry):
            if verdict.outcome == "inconclusive":
                open_ones += 1
                continue
            claim = entry.claim
            said = f"{claim.statement} ({claim.paper}, {claim.place})"
            words = "; ".join(filter(None, (str(verdict), verdict.after_a_look)))
            settled.append((said, verdict.scale, _paper(verdict), ours_cell(verdict), words))
    if settled:
        columns = ("claim", "scale", "paper", "ours", "verdict")
        blocks.append(_table("What training has settled", columns, settled))
    if open_ones:
        blocks.append(
            f"Inconclusive so far: {open_ones} of what training judged. The list of every claim "
            "has their intervals, the seeds that would settle them, and the cost.\n"
        )
    return "\n".join([*blocks, _trained(registry)])


def _judged(entry: Entry) -> list[Verdict]:
    """The verdicts of a claim, one a scale, that runs have decided or left open."""
    verdicts = [judgement.verdict for judgement in entry.judgements]
    return [v for v in verdicts if v.outcome != "not run" and entry.claim.kind != "theory"]


def _trained(registry: Registry) -> str:
    """The runs of every experiment; those without any, that a claim is about, last."""
    rows: list[tuple[str, ...]] = []
    for name, all_results in registry.results.items():
        own = [entry for entry in registry.entries if entry.claim.experiment == name]
        for results in all_results:
            runs = [run for group in results.groups for run in group.ended]
            seconds = sum(run.train_time_s for run in runs)
            trained = sum(bool(group.ended) for group in results.groups)
            begun = sum(len(group.unfinished) for group in results.groups)
            many = f"{len(runs)}{f', {begun} unfinished' if begun else ''}"
            counts = (str(trained), many, quantities.duration(seconds))
            found = [v.outcome for e in own for v in _judged(e) if v.scale == results.scale]
            words = [f"{found.count(o)} {o}" for o in OUTCOMES if o in found]
            verdicts = ", ".join(words) or quantities.NOTHING
            rows.append((f"`{name}`", results.scale, *counts, verdicts))
    missing = [f"`{name}`" for name, all_results in registry.results.items() if not all_results]
    if missing:
        rows.append((", ".join(missing), "not run", "", "", "", ""))
    columns = ("experiment", "scale", "contestants", "runs", "training", "verdicts")
    return _table("What was trained, and what was not", columns, rows)


def page(registry: Registry) -> str:
    """The page as Markdown.

    Raises:
        UserError: a claim's paper has no section.
    """
    blocks = [_HEAD, _counts(registry.entries)]
    shown = 0
    for section in SECTIONS:
        entries = [entry for entry in registry.entries if section.holds(entry.claim)]
        shown += len(entries)
        if entries:
            blocks.append(f"## {section.title}\n")
            if section.theory:
                blocks.append("Figures, tables and reasons: [theory](../theory/README.md).\n")
            blocks += [_row(row, entries) for row in _rows(entries)]
    if shown < len(registry.entries):
        strange = next(
            entry.claim
            for entry in registry.entries
            if not any(section.holds(entry.claim) for section in SECTIONS)
        )
        known = ", ".join(dict.fromkeys(section.paper for section in SECTIONS))
        raise UserError(f"claim {strange.id}: paper {strange.paper!r} is none of {known}")
    blocks += _contradictions(registry.entries)
    blocks += _still_to_run(registry.entries)
    blocks += _summaries(registry.results_dir / "summary")
    return "\n".join(blocks)


def _counts(entries: Sequence[Entry]) -> str:
    """Claims by section and verdict; of the scales that have runs and may judge."""
    columns: dict[str, None] = {}
    counted: list[tuple[str, dict[str, int], int]] = []
    for section in SECTIONS:
        own = [entry for entry in entries if section.holds(entry.claim)]
        counts: dict[str, int] = {}
        for judgement in (each for entry in own for each in entry.judgements):
            verdict = judgement.verdict
            name = str(verdict).split(" (")[0]
            if verdict.outcome == "not run" and verdict.scale != "full":
                if verdict.scale not in verdict.claim.judged_at:
                    continue  # its number is shown, and may not judge
                name = f"not run at {verdict.scale} scale"
            counts[name] = counts.get(name, 0) + 1
        columns |= dict.fromkeys(counts)
        if own:
            counted.append((section.title, counts, len(own)))
    order = sorted(columns, key=_verdict_position)
    rows = tuple(
        (title, str(total), *(str(counts.get(name, "")) for name in order))
        for title, counts, total in counted
    )
    rows += (
        (
            "together",
            str(len(entries)),
            *(str(sum(counts.get(name, 0) for _, counts, _ in counted)) for name in order),
        ),
    )
    return _table(
        "Claims and verdicts (a claim can have one at each scale)", ("", "claims", *order), rows
    )


def _rows(entries: Iterable[Entry]) -> list[str]:
    return list(dict.fromkeys(entry.claim.row for entry in entries))


def _row(row: str, entries: Sequence[Entry]) -> str:
    """The claims of one row, a line for each scale."""
    own = [entry for entry in entries if entry.claim.row == row]
    places = ", ".join(dict.fromkeys(entry.claim.place for entry in own))
    lines = []
    for entry in own:
        for number, judgement in enumerate(entry.judgements):
            first = number == 0
            claim, verdict = entry.claim, judgement.verdict
            theory = claim.kind == "theory"
            lines.append(
                (
                    f"`{claim.id}`" if first else "",
                    _said(entry, judgement) if first else "",
                    (allowed(verdict) if theory else _paper(verdict)) if first else "",
                    "" if theory else verdict.scale,
                    (ours if theory else ours_cell)(verdict),
                    "" if theory else _runs(judgement),
                    _verdict_words(judgement),
                )
            )
    columns = ("claim", "what is claimed", "paper", "scale", "ours", "runs", "verdict")
    return f"### {row}\n\n{_table(places, columns, lines)}"


def _said(entry: Entry, judgement: Judgement) -> str:
    claim = entry.claim
    measured = "" if claim.kind == "theory" else f" ({effect_in_words(judgement.verdict)})"
    note = f" *{claim.note}*" if claim.note else ""
    return f"{claim.statement}{measured}{note}"


def _paper(verdict: Verdict) -> str:
    """What is printed, and what the claim allows."""
    claim = verdict.claim
    if not claim.margin:
        return paper_cell(verdict)
    zone, kind = zone_of(claim), kind_of(verdict)
    low, high = (quantities.number(edge, kind) for edge in (zone.low, zone.high))
    words = {"within": f"{low} to {high}", "above": f"above {low}", "below": f"below {high}"}
    return f"{paper_cell(verdict)}; allowed: {words[claim.rule]}"


def _runs(judgement: Judgement) -> str:
    """How many runs of whom, with links to their folders."""
    parts = []
    for group in judgement.verdict.groups:
        folder = f"../runs/{group.experiment}/{group.contestant}"
        parts.append(f"[{len(group.ended)} {display_name(group.contestant)}]({folder})")
    return ", ".join(parts) or quantities.NOTHING


def _verdict_words(judgement: Judgement) -> str:
    """The verdict, with what would settle it and what that costs."""
    verdict, more = judgement.verdict, judgement.verdict.more
    text = f"**{verdict}**"
    missed = verdict.effect is not None and verdict.effect.missed > 0
    if (verdict.outcome == "not reproduced" and missed) or verdict.reason.startswith(
        "no ended run"
    ):
        text += f" ({verdict.reason})"
    if verdict.after_a_look:
        text += f"; {verdict.after_a_look}"
    if judgement.cost is not None:
        text += f"; {quantities.duration(judgement.cost.seconds)} {judgement.cost.source}"
    if more is None:
        return text
    if more.seeds is None:
        return f"{text}; {more.reason}"
    cost = verdict.more_cost_s
    price = "" if cost is None else f" (about {quantities.duration(cost)} of training)"
    seeds = "seed" if more.seeds == 1 else "seeds"
    return f"{text}; {more.seeds} more {seeds}{price}: {more.reason}"


def _contradictions(entries: Sequence[Entry]) -> list[str]:
    by_id = {entry.claim.id: entry for entry in entries}
    lines, told = [], set()
    for entry in entries:
        for other in entry.claim.contradicts:
            pair = frozenset((entry.claim.id, other))
            if pair in told:
                continue
            told.add(pair)
            lines.append(
                f"- `{entry.claim.id}` ({_at_all_scales(entry)}) and `{other}` "
                f"({_at_all_scales(by_id[other])})"
            )
    if not lines:
        return []
    return ["## Claims that point opposite ways\n", "\n".join(lines) + "\n"]


def _at_all_scales(entry: Entry) -> str:
    return ", ".join(str(judgement.verdict) for judgement in entry.judgements)


def _still_to_run(entries: Sequence[Entry]) -> list[str]:
    """One command for each experiment and scale that has claims not run, with its cost."""
    contestants: dict[tuple[str, str], dict[str, None]] = {}
    own: dict[str, None] = {}
    for entry in entries:
        claim = entry.claim
        for judgement in entry.judgements:
            if judgement.verdict.outcome != "not run" or judgement.verdict.scale != "full":
                continue
            if claim.command or claim.kind == "theory":
                own[claim.settled_by()] = None
            else:
                names = contestants.setdefault((claim.experiment, "full"), {})
                names.update(dict.fromkeys(claim.optimizers))
    if not contestants and not own:
        return []
    rows = [
        (experiment, f"`{reproduce_command(experiment, tuple(names), scale)}`")
        for (experiment, scale), names in contestants.items()
    ]
    rows += [(quantities.NOTHING, f"`{command}`") for command in own]
    return [
        "## What would settle the rest at full scale\n",
        "`python -m experiments.reproduce all --scale full --plan` prints what of it is missing, "
        "with its predicted time.\n",
        _table("Commands", ("experiment", "command"), rows),
    ]


def _summaries(folder: Path) -> list[str]:
    """Links to the tables and figures of each experiment."""
    found = sorted(path.parent.name for path in folder.glob("*/summary.md"))
    if not found:
        return []
    lines = "\n".join(f"- [{name}]({name}/summary.md)" for name in found)
    return [f"## Tables and figures of each experiment\n\n{lines}\n"]


def _verdict_position(name: str) -> tuple[int, int]:
    """Full scale first; at each scale reproduced, not reproduced, inconclusive, not run."""
    outcome, _, scale = name.partition(" at ")
    scales = ("", "reduced scale", "smoke scale")
    return scales.index(scale), OUTCOMES.index(outcome)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = tuple(tuple(row) for row in rows)
    return Table(title, tuple(columns), body, tuple(0 for _ in columns)).markdown()
