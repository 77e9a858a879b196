"""What a campaign shows at its end: tables and figures, verdicts, the page over all claims."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.campaign.campaign import Campaign, Plan
from experiments.campaign.selection import Selection
from experiments.runs.atomic import UnwritableError
from experiments.runs.outcome import Outcome


def judge(
    campaigns: Sequence[Campaign],
    plans: Sequence[Plan],
    outcomes: Sequence[Outcome],
    selection: Selection,
    *,
    results_dir: Path,
    scale: str,
) -> int:
    """Judge what there is, print it, and turn the outcomes into an exit code.

    Where this user may not write into the results, verdicts are printed and a line says that no
    file was written.

    Args:
        campaigns: what was run.
        plans: their runs.
        outcomes: what became of those that this command is about.
        selection: what was asked for.
        results_dir: where `runs/` and `summary/` are.
        scale: of the runs.

    Returns:
        0, 1 if a run crashed, 2 if one could not start or waits for another.
    """
    failed = {outcome.directory for outcome in outcomes if outcome.status in ("crashed", "refused")}
    ended = {outcome.directory for outcome in outcomes} - failed
    for campaign, plan in zip(campaigns, plans, strict=True):
        judged = any(spec.directory in ended for spec in plan.specs)
        if judged and campaign.experiment in selection.whole:
            _summarise(campaign, plan, alone=len(campaigns) == 1)
    if selection.claims:
        _judge_claims(selection, results_dir, scale)
    waiting = [line for plan in plans for _, _, line in plan.waiting]
    return _exit_code(outcomes, waiting)


def _summarise(campaign: Campaign, plan: Plan, *, alone: bool) -> None:
    """Tables and figures of one experiment; on the terminal too where it is the only one."""
    # Imported here because it loads the plotting library.
    from experiments.analysis.showing.summary import summarise, verdict_lines

    summary = summarise(
        campaign.results_dir,
        campaign.experiment,
        campaign.summary_dir,
        scale=campaign.scale,
        keys=campaign.comparable_keys(plan),
    )
    if alone:
        print(f"\n{summary.terminal()}\n")
        for path in summary.paths:
            print(path)
    else:
        counts = verdict_lines(summary.verdicts)[0] if summary.verdicts else "no claim"
        print(f"{campaign.experiment}: {counts}; {campaign.summary_dir / 'summary.md'}", flush=True)
    if summary.unwritten:
        print(f"not written: {summary.unwritten}", file=sys.stderr)


def _judge_claims(selection: Selection, results_dir: Path, scale: str) -> None:
    """The page over all claims; the verdicts on the terminal where claims were asked for."""
    from experiments.analysis.judging.registry import judge_registry
    from experiments.analysis.showing.registry_page import write_page
    from experiments.analysis.showing.tables import comparison_table

    registry = judge_registry(results_dir)
    if not selection.whole:
        asked = {claim.id for claim in selection.claims}
        verdicts = [
            judgement.verdict
            for entry in registry.entries
            for judgement in entry.judgements
            if entry.claim.id in asked
        ]
        trained = [v for v in verdicts if v.claim.kind != "theory" and v.scale == scale]
        if trained:
            print(f"\n{comparison_table(trained, f'{scale} scale').terminal()}")
        for verdict in verdicts:
            if verdict.claim.kind == "theory":
                print(f"{verdict.claim.id}: {verdict}")
    try:
        for path in write_page(registry):
            print(path)
    except UnwritableError as error:
        if not error.forbidden:
            raise
        print(f"not written: {error}", file=sys.stderr)


def _exit_code(outcomes: Sequence[Outcome], waiting: Sequence[str]) -> int:
    failed = [outcome for outcome in outcomes if outcome.status in ("crashed", "refused")]
    for message in dict.fromkeys(outcome.message for outcome in failed):
        affected = [outcome for outcome in failed if outcome.message == message]
        print(f"error: {message} ({len(affected)} of {len(outcomes)} runs)", file=sys.stderr)
    for line in waiting:
        print(f"error: {line}", file=sys.stderr)
    statuses = {outcome.status for outcome in failed}
    if "crashed" in statuses:
        return 1
    return 2 if "refused" in statuses or waiting else 0
