"""The first page: what was claimed, what we found, at which scale, at which cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.analysis.judging.claims import OURS
from experiments.analysis.judging.theory import short
from experiments.analysis.measuring import quantities
from experiments.analysis.measuring.runs import SCALES
from experiments.report import svg
from experiments.report.judged import OUTCOMES, JudgedClaim, Judgement
from experiments.report.material import Material

PAPERS = {"mL-BFGS": "mL-BFGS (2023)", "SLIM-QN": "SLIM-QN (2021)", OURS: "our own questions"}
SYMBOLS = {"reproduced": "✓", "not reproduced": "✗", "inconclusive": "?", "not run": "○"}
NO_TRAINING = "no training"
SCALES_SHOWN = (NO_TRAINING, *SCALES)
_UNITS = {
    "percent": " %",
    "seconds": " s",
    "bytes": " MiB",
    "mean_log_train_loss": " in log loss",
    "mean_log_train_loss_before_drop": " in log loss",
    "final_train_loss": " in loss",
}


@dataclass(frozen=True)
class Row:
    """One claim at one scale, in words.

    Attributes:
        claim: the claim.
        judgement: the judgement.
        scale: full, reduced or smoke; "no training".
        paper: the paper's number with the rule.
        allowed: what still counts as reproduced.
        ours: our number with its interval; "" without one.
        picture: what the claim allows, and our number in it, as a drawing; "" without a number.
        n: how many runs or pairs, in words.
        shown: our number at a scale that may not judge the claim; "" without one.
        sort_ours: what it sorts by.
        cost: of the runs, in words; predicted where nothing was run.
        cost_source: what a prediction rests on; "" where the runs tell the cost.
        cost_s: seconds; None where unknown.
        files: the run directories, or the file of findings, relative to the results directory.
        page: of the experiment; "" where it has none.
    """

    claim: JudgedClaim
    judgement: Judgement
    scale: str
    paper: str
    allowed: str
    ours: str
    picture: str
    n: str
    shown: str
    sort_ours: str
    cost: str
    cost_source: str
    cost_s: float | None
    files: tuple[str, ...]
    page: str

    @property
    def anchor(self) -> str:
        """Id on the page."""
        return f"{self.claim.id}-{self.judgement.scale}"


def claim_rows(material: Material, claims: Sequence[JudgedClaim]) -> list[Row]:
    """One row per claim and scale: what training settled first, then what it left open.

    Then the claims that need no training, and what was not run last.

    A scale that may not judge a claim has no row of its own; what its runs say stands beside the
    verdict of the scale that may.
    """
    rows = [
        _row(material, claim, part)
        for claim in claims
        for part in claim.judgements
        if part.scale in claim.judged_at
    ]

    def place(row: Row) -> int:
        if row.judgement.outcome == "not run":
            return 3
        if row.claim.kind == "theory":
            return 2
        return 1 if row.judgement.outcome == "inconclusive" else 0

    return sorted(rows, key=place)


def tally(rows: Sequence[Row]) -> list[tuple[str, str, dict[str, int]]]:
    """How many rows have each outcome: by paper and scale, and all together."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        counts.setdefault((row.claim.paper, row.scale), Counter())[row.judgement.outcome] += 1
    order = [(paper, scale) for paper in PAPERS for scale in SCALES_SHOWN]
    lines = [
        (PAPERS[paper], scale, dict(counts[paper, scale]))
        for paper, scale in order
        if (paper, scale) in counts
    ]
    return [*lines, ("together", "", dict(sum(counts.values(), Counter())))]


def filters(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The values to filter by that occur."""
    return {
        "verdict": [o for o in OUTCOMES if any(r.judgement.outcome == o for r in rows)],
        "paper": [paper for paper in PAPERS if any(row.claim.paper == paper for row in rows)],
        "scale": [scale for scale in SCALES_SHOWN if any(row.scale == scale for row in rows)],
    }


def printed_in_words(claim: JudgedClaim) -> tuple[str, str]:
    """The paper's number, and what still counts as reproduced."""
    sign = {"above": "> ", "below": "< ", "within": ""}[claim.rule]
    if claim.printed is None:
        text = "1 ×" if claim.kind in ("ratio", "speedup") else "0"
    else:
        text = _with_unit(claim, claim.printed)
    if not claim.margin:
        return f"{sign}{text}", ""
    side = {"above": quantities.MINUS, "below": "+", "within": "±"}[claim.rule]
    return f"{sign}{text}", f"{side} {claim.margin:.4g}"


def ours_in_words(claim: JudgedClaim, judgement: Judgement) -> str:
    """Our effect with its interval; "" where there is none."""
    if judgement.centre is None:
        return ""
    text = _with_unit(claim, judgement.centre)
    low, high = judgement.low, judgement.high
    if low is None or high is None or low == high:
        return text
    return f"{text} [{_number(claim, low)}, {_number(claim, high)}]"


def _row(material: Material, claim: JudgedClaim, judgement: Judgement) -> Row:
    paper, allowed = printed_in_words(claim)
    theory = claim.kind == "theory"
    findings = f"theory/{claim.metric.partition('/')[0]}.json"
    files = judgement.runs
    if theory and (material.results_dir / findings).is_file():
        files = (findings,)
    cost_s = material.training_seconds(judgement.runs)
    cost = quantities.NOTHING if cost_s is None else quantities.duration(cost_s)
    cost_source = ""
    if judgement.outcome == "not run" and judgement.predicted_cost_s is not None:
        cost_s = judgement.predicted_cost_s
        cost = f"about {quantities.duration(cost_s)}"
        cost_source = judgement.predicted_from
    ours = ours_in_words(claim, judgement)
    exact = theory and judgement.low == judgement.high
    if theory:
        page = "theory.html"
    else:
        page = f"{claim.experiment}.html" if claim.experiment in material.experiments else ""
    return Row(
        claim=claim,
        judgement=judgement,
        scale=NO_TRAINING if theory else judgement.scale,
        paper=paper,
        allowed=allowed,
        ours=ours,
        picture=_picture(claim, judgement),
        n="" if not ours else "exact" if exact else f"n = {judgement.n}",
        shown=_shown(claim),
        sort_ours="" if judgement.centre is None else f"{judgement.centre:.6g}",
        cost=cost,
        cost_source=cost_source,
        cost_s=cost_s,
        files=files,
        page=page,
    )


def _picture(claim: JudgedClaim, judgement: Judgement) -> str:
    """Shaded: what the claim allows; on it our number and its interval."""
    if judgement.centre is None:
        return ""
    centre, (low, high) = judgement.centre, claim.zone
    ends = (judgement.low, judgement.high)
    left, right = (centre if end is None else end for end in ends)
    return svg.zone_picture(low, high, centre, left, right)


def _shown(claim: JudgedClaim) -> str:
    """What runs say that may not judge the claim, such as an accuracy at reduced scale."""
    parts = [part for part in claim.judgements if part.scale not in claim.judged_at]
    told = ((ours_in_words(claim, part), part) for part in parts)
    return "; ".join(f"{text} at {part.scale} scale (n = {part.n})" for text, part in told if text)


def _number(claim: JudgedClaim, value: float) -> str:
    if claim.kind == "theory":
        text = "∞" if value == float("inf") else short(value)
        return text.replace("-", quantities.MINUS)
    return quantities.number(value, claim.number_kind)


def _with_unit(claim: JudgedClaim, value: float) -> str:
    text = _number(claim, value)
    if claim.kind == "theory" or text in ("never", "none"):
        return text
    if claim.kind in ("ratio", "speedup"):
        return f"{text} ×"
    if claim.number_kind == "percent" and claim.kind != "value":
        return f"{text} points"
    return text + _UNITS.get(claim.metric, _UNITS.get(claim.number_kind, ""))
