"""Which runs experiments or claims need, which of them exist; runs the missing ones, then judges.

    python -m experiments.reproduce digits_mlp --seeds 0,1,2                  one experiment
    python -m experiments.reproduce M-T3-cifar10-resnet18-mlbfgs M-F3 --plan  a claim, a row of them
    python -m experiments.reproduce all --scale smoke --jobs 2                all claims
    python -m experiments.reproduce controls --arms sgd_lr1.0,mlbfgs --scale reduced --status

Claims share runs. What is finished is found by its run key and not repeated, so the same command,
typed again, goes on where a killed one was. A run that diverges is a result; one that crashes is
reported and does not keep the others from running. Every command tries again what failed before,
but for --missing-only; --retry-failed does nothing else.

Exit code 0: all runs ended and were judged; 1: a run crashed; 2: something that the user wrote will
not do, told in one line; 3: some runs could not be made, because their data are missing or another
process has them; 130: interrupted.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.analysis.judging.claims import DEFAULT_CLAIMS, load_claims
from experiments.analysis.judging.costs import PREDICTIONS, load_predictions
from experiments.campaign.campaign import Campaign, Plan, refuse_options
from experiments.campaign.judging import judge
from experiments.campaign.matrix import Standing, standing, time_left_lines, totals
from experiments.campaign.running import run_missing
from experiments.campaign.selection import Contestants, Selection, select
from experiments.campaign.states import Choice, choose
from experiments.contestants import options
from experiments.entry import entry
from experiments.errors import UserError
from experiments.given import user_path
from experiments.runs.outcome import Outcome, recorded_outcome
from experiments.runs.spec import RunSpec
from experiments.tuning.chosen import Chosen

INCOMPLETE = 3


@dataclass(frozen=True)
class Command:
    """A checked command line.

    Attributes:
        options: what argparse read.
        selection: what is asked for.
        campaigns: one an experiment.
    """

    options: argparse.Namespace
    selection: Selection
    campaigns: tuple[Campaign, ...]

    @property
    def choice(self) -> Choice:
        """Which runs are to be made."""
        if self.options.retry_failed:
            return "failed"
        return "missing" if self.options.missing_only else "unfinished"


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; that of this process by default.

    Returns:
        The exit code.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        command = _checked(_parser().parse_intermixed_args(arguments))
        plans = [campaign.compose() for campaign in command.campaigns]
        if command.options.status or command.options.plan:
            _show(command, plans)
            return 0
        return _run(command, plans)
    except KeyboardInterrupt:
        print(
            "\ninterrupted; what is finished stays, and the same command goes on from the last"
            " checkpoints",
            file=sys.stderr,
        )
        return 130


def _show(command: Command, plans: Sequence[Plan]) -> None:
    """Print how far everything is; with `--plan` also the data, and the commands."""
    standings = _standings(command, plans)
    missing = _missing_data(standings) if command.options.plan else {}
    for each in standings:
        campaign = each.campaign
        print(f"{each.headline()}\n{each.table()}")
        if command.options.plan:
            for choice, spec in each.plan.runs:
                if not each.states[spec.contestant, spec.seed].finished:
                    print(f"  {campaign.command(choice, spec.seed)}")
            if command.options.ranks is not None:
                _outlook(each)
            elif campaign.experiment in missing:
                print(f"  {_data_line(command, campaign.experiment, missing[campaign.experiment])}")
    if len(standings) > 1:
        print(totals(standings))
    predictions = load_predictions(DEFAULT_CLAIMS.parent / PREDICTIONS)
    left = time_left_lines(standings, predictions, command.options.jobs, missing)
    for line in (*left, *_elsewhere(command.selection)):
        print(line)


def _run(command: Command, plans: Sequence[Plan]) -> int:
    """Run what is missing, all campaigns in one pool; judge, and say how it went."""
    standings = _standings(command, plans)
    if command.options.ranks is None:
        missing = _missing_data(standings)
    else:
        missing = _outlooks(command, standings)
    if missing and len(missing) == len(standings):
        raise next(iter(missing.values()))
    ready = [each for each in standings if each.campaign.experiment not in missing]
    if len(standings) > 1:
        print(totals(standings), flush=True)
    made = _make(command, ready)
    code = judge(
        [each.campaign for each in ready],
        made.plans,
        made.outcomes,
        command.selection,
        results_dir=command.options.results_dir,
        scale=command.options.scale,
    )
    for line in _elsewhere(command.selection):
        print(line)
    lines = [_data_line(command, name, error) for name, error in missing.items()]
    for line in (*lines, *made.left):
        print(line, file=sys.stderr)
    return code or (INCOMPLETE if lines or made.left else 0)


@dataclass(frozen=True)
class Made:
    """What came of making runs.

    Attributes:
        outcomes: of all runs that are not with others.
        left: a line for people about those that are.
        plans: of the campaigns, as they are now.
    """

    outcomes: list[Outcome]
    left: list[str]
    plans: list[Plan]


def _make(command: Command, standings: Sequence[Standing]) -> Made:
    """Make the runs; then those that waited for them."""
    plans = [each.plan for each in standings]
    outcomes, left = _make_once(command, [spec for plan in plans for spec in plan.specs])
    if any(plan.waiting for plan in plans):
        before = {spec.directory for plan in plans for spec in plan.specs}
        plans = [
            each.campaign.compose() if plan.waiting else plan
            for each, plan in zip(standings, plans, strict=True)
        ]
        ready = [spec for plan in plans for spec in plan.specs if spec.directory not in before]
        more, more_left = _make_once(command, ready)
        outcomes, left = outcomes + more, left + more_left
    submitted = sum(outcome.status == "submitted" for outcome in outcomes)
    lines = []
    if submitted:
        lines.append(
            f"{submitted} runs submitted: --status shows how far they are, and this command, typed "
            "again when they have ended, judges them"
        )
    if left:
        lines.append(f"{left} runs are queued, or another process trains them: left alone")
    return Made([o for o in outcomes if o.status != "submitted"], lines, plans)


def _make_once(command: Command, specs: Sequence[RunSpec]) -> tuple[list[Outcome], int]:
    """Make the runs that the command chooses; returns outcomes, and how many are with others."""
    chosen = choose(specs, command.choice)
    outcomes = [recorded_outcome(spec.directory) for spec in chosen.passed_over]
    made = run_missing([*chosen.finished, *chosen.to_run], jobs=command.options.jobs)
    # another process may have taken one of them since
    outcomes += [outcome for outcome in made if outcome.status != "elsewhere"]
    left = sum(outcome.status == "elsewhere" for outcome in made)
    return outcomes, len(chosen.elsewhere) + left


def _standings(command: Command, plans: Sequence[Plan]) -> list[Standing]:
    return [
        standing(campaign, plan) for campaign, plan in zip(command.campaigns, plans, strict=True)
    ]


def _missing_data(standings: Sequence[Standing]) -> dict[str, UserError]:
    """Why the data of experiments are not there; of those that have something to run."""
    open_campaigns = [each for each in standings if each.finished < len(each.plan.runs)]
    if not open_campaigns:
        return {}
    from experiments.data.presence import missing_data  # loads torch

    found = {}
    for each in open_campaigns:
        problem = missing_data(each.plan.specs[0].config.dataset)
        if problem is not None:
            found[each.campaign.experiment] = problem
    return found


def _outlooks(command: Command, standings: Sequence[Standing]) -> dict[str, UserError]:
    """Print what each campaign with `--ranks` will meet; returns why some cannot start."""
    missing = {}
    for each in standings:
        print(each.headline())
        problem = _outlook(each)
        if problem is not None:
            missing[each.campaign.experiment] = problem
    return missing


def _outlook(each: Standing) -> UserError | None:
    campaign = each.campaign
    unfinished = [
        spec for spec in each.plan.specs if not each.states[spec.contestant, spec.seed].finished
    ]
    if not unfinished:
        return None
    # Imported here because it loads torch.
    from experiments.campaign.outlook import look_ahead

    outlook = look_ahead(unfinished, ranks=campaign.ranks, results_dir=campaign.results_dir)
    print("\n".join(outlook.lines), flush=True)
    return outlook.problem


def _data_line(command: Command, experiment: str, error: UserError) -> str:
    rows = dict.fromkeys(
        claim.row for claim in command.selection.claims if claim.experiment == experiment
    )
    named = f" (rows {', '.join(rows)})" if rows else ""
    return f"data missing for {experiment}{named}: {error}"


def _elsewhere(selection: Selection) -> list[str]:
    """What no training run settles."""
    return [f"settled by: {command}" for command in selection.elsewhere]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduce",
        description="Run what is missing of experiments or claims, then judge them.",
    )
    parser.add_argument(
        "ids",
        nargs="*",
        help=f"experiments ({', '.join(options('experiment'))}), claims of results/claims.yaml, "
        "rows of claims (M-T3), or all (the default); and Hydra overrides for all runs: key=value",
    )
    parser.add_argument("--optimizers", help="comma-separated; default: all that have a recipe")
    parser.add_argument("--arms", help="comma-separated; default: all of the experiment")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; default: 0,1,2")
    parser.add_argument("--scale", default="full", help="full (default), reduced or smoke")
    parser.add_argument(
        "--tuned",
        type=user_path,
        help="chosen.yaml of experiments.tune: settings in place of recipes'",
    )
    parser.add_argument("--results-dir", type=user_path, default=Path("results"))
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side; default: 1")
    parser.add_argument(
        "--ranks",
        help="train each run on so many ranks, or auto: on all GPUs found; prints data, disk and "
        "predicted hours first",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--plan", action="store_true", help="print the missing runs' commands")
    shown.add_argument("--status", action="store_true", help="print how far each run is")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--missing-only", action="store_true", help="leave runs alone that failed before"
    )
    chosen.add_argument(
        "--retry-failed",
        action="store_true",
        help="run again what crashed, was refused, ran out of time or never came out of a queue, "
        "and nothing else",
    )
    return parser


def _checked(arguments: argparse.Namespace) -> Command:
    """Check the command line.

    Raises:
        UserError: a name or a number will not do.
    """
    overrides = tuple(item for item in arguments.ids if "=" in item)
    ids = [item for item in arguments.ids if "=" not in item]
    selection = _with_contestants(arguments, ids, select(ids, load_claims()))
    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs} must be at least 1")
    refuse_options(overrides)
    seeds = seeds_of(arguments.seeds)
    ranks = _ranks(arguments.ranks, arguments.scale)
    if ranks > 1 and arguments.jobs > 1:
        raise UserError(f"--jobs {arguments.jobs} with --ranks {ranks}: use --jobs 1 or --ranks 1")
    tuned = None if arguments.tuned is None else Chosen.load(arguments.tuned)
    if tuned is not None:
        (only,) = selection.contestants
        tuned.check(only.experiment, arguments.scale, seeds)
        if only.arms:
            raise UserError(f"--tuned has settings of optimizers, not of arms: {only.arms[0]!r}")
    campaigns = tuple(
        Campaign(
            experiment=each.experiment,
            optimizers=each.optimizers,
            arms=each.arms,
            seeds=seeds,
            scale=arguments.scale,
            results_dir=arguments.results_dir,
            overrides=overrides,
            ranks=ranks,
            tuned=tuned,
        )
        for each in selection.contestants
    )
    return Command(arguments, selection, campaigns)


def _with_contestants(
    arguments: argparse.Namespace, ids: Sequence[str], selection: Selection
) -> Selection:
    """Put the optimizers and arms of the command line in place of all of an experiment.

    Raises:
        UserError: they are named beside something else than one experiment.
    """
    named = [o for o in ("optimizers", "arms", "tuned") if getattr(arguments, o) is not None]
    if not named:
        return selection
    if len(ids) != 1 or ids[0] not in options("experiment"):
        raise UserError(f"--{named[0]} belongs to one experiment: name it, and nothing else")
    if named == ["tuned"]:
        return selection
    optimizers, chosen_arms = (
        () if text is None else tuple(split_list(text, option))
        for text, option in ((arguments.optimizers, "--optimizers"), (arguments.arms, "--arms"))
    )
    return replace(selection, contestants=(Contestants(ids[0], optimizers, chosen_arms),))


def _ranks(text: str | None, scale: str) -> int:
    """Read `--ranks`.

    Raises:
        UserError: it is no number of ranks.
    """
    if text is None:
        return 1
    if text == "auto":
        from experiments.campaign.outlook import ranks_found  # loads torch

        return ranks_found(scale)
    if not (text.isascii() and text.isdigit() and len(text) <= 6) or int(text) < 1:
        raise UserError(f"--ranks {text!r} must be auto or a number from 1 to 999999")
    return int(text)


def split_list(text: str, option: str) -> list[str]:
    """Split a comma-separated list and refuse an empty or a double entry."""
    entries = [entry.strip() for entry in text.split(",")]
    if "" in entries or len(set(entries)) < len(entries):
        raise UserError(f"{option} {text!r} must be a comma-separated list, each entry once")
    return entries


def seeds_of(text: str) -> tuple[int, ...]:
    """Read a comma-separated list of seeds."""
    entries = split_list(text, "--seeds")
    # 19 digits: more than a seed can have, and fewer than Python refuses to read
    if not all(entry.isascii() and entry.isdigit() and len(entry) <= 19 for entry in entries):
        raise UserError(f"--seeds {text!r} must be whole numbers of at least 0: 0,1,2")
    seeds = tuple(int(entry) for entry in entries)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text!r} names a seed twice")
    return seeds


if __name__ == "__main__":
    sys.exit(main())
