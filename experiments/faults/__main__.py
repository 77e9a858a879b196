"""Random faults, each in a small run that is then compared with an undisturbed one.

    python -m experiments.faults --trials 200

Kills processes, ranks, torchrun, process groups, launchers and campaigns; fills a disk; damages
files of runs and swaps them for links. A trial that is over is on file in the working folder, so
the same command goes on where it was stopped; with more --trials it adds to them. For Linux.

Exit code 0: every trial ended equal to an undisturbed run, or was skipped; 1: one did not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from experiments.entry import entry
from experiments.errors import UserError, nearest
from experiments.faults.report import markdown, summary
from experiments.faults.trial import CYCLE, KINDS, Account, make_reference, run_trial
from experiments.given import read_text, user_path
from experiments.runs.atomic import make_folder
from experiments.runs.owned_folder import OwnedFolder
from experiments.runs.provenance import describe_origin

TRIALS_FILE = "trials.jsonl"


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.faults", description=__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="decides what each trial does")
    parser.add_argument("--kinds", help=f"comma-separated, of: {', '.join(KINDS)}; default: all")
    parser.add_argument(
        "--redo", action="store_true", help="make again what did not end equal or had a traceback"
    )
    parser.add_argument(
        "--work", type=user_path, default=Path("outputs/faults"), help="runs and logs"
    )
    parser.add_argument("--out", type=user_path, default=Path("results/benchmarks"))
    options = parser.parse_args(arguments)
    kinds = _kinds(options.kinds)
    if options.trials < 1:
        raise UserError(f"--trials {options.trials} must be at least 1")
    if sys.platform != "linux":
        raise UserError("processes are found in /proc, so this needs Linux")
    try:
        accounts = _trials(options, kinds)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with the next trial", file=sys.stderr)
        return 130
    return 0 if all(account.outcome in ("equal", "skipped") for account in accounts) else 1


def _trials(options: argparse.Namespace, kinds: tuple[str, ...]) -> list[Account]:
    """Make the trials that are not on file, each noted when it is over."""
    folder = OwnedFolder(options.out)
    folder.refuse_foreign(["faults.json", "faults.md"])
    work = make_folder(options.work.resolve())
    found, commits = _on_file(work / TRIALS_FILE, options.seed, kinds)
    accounts = {account.trial: account for account in found}
    if options.redo:
        accounts = {i: a for i, a in accounts.items() if a.outcome == "equal" and not a.traces}
    origin = describe_origin(torch.device("cpu"))
    git = origin["git"] or {"commit": "unknown", "dirty": True}
    commit = git["commit"] + (" (with uncommitted changes)" if git["dirty"] else "")
    reference = partial(make_reference, work=work)
    for number in range(options.trials):
        if number in accounts:
            continue
        account = run_trial(number, seed=options.seed, work=work, reference=reference, kinds=kinds)
        accounts[number] = account
        commits = list(dict.fromkeys([*commits, commit]))
        line = {"seed": options.seed, "kinds": kinds, "commit": commit, "account": asdict(account)}
        with open(work / TRIALS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{number + 1}/{options.trials} {account.kind}: {account.outcome}", flush=True)
        ordered = [accounts[i] for i in sorted(accounts)]
        result = {"seed": options.seed, "origin": origin, "commits": commits, **summary(ordered)}
        page = markdown(result)
        folder.replace({"faults.json": json.dumps(result, indent=2) + "\n", "faults.md": page})
    return list(accounts.values())


def _on_file(file: Path, seed: int, kinds: tuple[str, ...]) -> tuple[list[Account], list[str]]:
    """The trials that are over, as they were made last, and all their commits.

    Raises:
        UserError: they are those of another campaign.
    """
    if not file.exists():
        return [], []
    lines = [json.loads(line) for line in read_text(file).splitlines()]
    for line in lines:
        if (line["seed"], tuple(line["kinds"])) != (seed, kinds):
            raise UserError(f"{file} has trials of another --seed or --kinds: name another --work")
    latest = {line["account"]["trial"]: line for line in lines}
    commits = list(dict.fromkeys(line["commit"] for line in latest.values()))
    return [Account(**line["account"]) for line in latest.values()], commits


def _kinds(text: str | None) -> tuple[str, ...]:
    if text is None:
        return CYCLE
    named = tuple(name.strip() for name in text.split(","))
    for name in named:
        if name not in KINDS:
            raise UserError(f"--kinds {name!r} does not exist; {nearest(name, KINDS)}")
    return named


if __name__ == "__main__":
    sys.exit(main())
