"""What the trials came to: counts by kind and outcome, as JSON and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from experiments.faults.trial import KINDS, Account

WHAT = {kind: (function.__doc__ or "").splitlines()[0] for kind, function in KINDS.items()}


def summary(accounts: Sequence[Account]) -> dict[str, Any]:
    """Counts of the trials, by kind.

    Returns:
        For each kind `trials`, `outcomes`, `signals`, `refused` (commands that ended with one line
        for the user) and `traces` (commands that showed a traceback); and what did not end equal.
    """
    kinds = {}
    for kind in KINDS:
        mine = [account for account in accounts if account.kind == kind]
        if mine:
            kinds[kind] = {
                "trials": len(mine),
                "outcomes": dict(Counter(account.outcome for account in mine)),
                "signals": sum(account.signals for account in mine),
                "refused": sum(account.refused for account in mine),
                "traces": sum(account.traces for account in mine),
            }
    failures = [
        {"trial": account.trial, "kind": account.kind, "outcome": account.outcome}
        | {"detail": " | ".join(account.detail)[:400]}
        for account in accounts
        if account.outcome != "equal"
    ]
    return {"trials": len(accounts), "kinds": kinds, "not_equal": failures}


def markdown(result: dict[str, Any]) -> str:
    """The table of a campaign.

    Args:
        result: the content of faults.json.
    """
    commits = ", ".join(result["commits"])
    head = ["fault", "trials", "signals", "equal", "others", "refused in a line", "tracebacks"]
    rows = []
    for kind, found in result["kinds"].items():
        outcomes = dict(found["outcomes"])
        equal = outcomes.pop("equal", 0)
        others = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
        counts = [found["trials"], found["signals"], equal, others or "none"]
        rows.append([f"{kind}: {WHAT[kind]}", *counts, found["refused"], found["traces"]])
    rows.append(["all", *_sums(rows)])
    table = tabulate(rows, head, tablefmt="github", disable_numparse=True)
    return (
        "# Faults at random\n\n"
        f"{result['trials']} trials, seed {result['seed']}, commit {commits}. *equal*: records, "
        "weights, optimizer and random state are those of an undisturbed run, bit for bit.\n\n"
        f"{table}\n"
    )


def _sums(rows: Sequence[Sequence[Any]]) -> list[Any]:
    trials, signals, equal, refused, traces = (
        sum(row[column] for row in rows) for column in (1, 2, 3, 5, 6)
    )
    return [trials, signals, equal, trials - equal or "none", refused, traces]
