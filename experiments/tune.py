"""Search the settings of every optimizer with the same budget, on held-out training images.

    python -m experiments.tune digits_mlp --optimizers sgd,mlbfgs --trials 10 --jobs 2
    python -m experiments.reproduce digits_mlp --tuned results/tuning/digits_mlp-full/chosen.yaml

The runs of the trials are ordinary run directories in results/tuning/<experiment>-<scale>/; what is
finished is found there and not repeated, so the same command, typed again, goes on where a killed
one was, with the same trials.

Exit code 0: all trials ended; 1: a run crashed; 2: something that the user wrote will not do, told
in one line; 3: another process trains some of the runs, which are left alone; 130: interrupted.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.campaign.campaign import refuse_options
from experiments.campaign.running import run_missing
from experiments.contestants import CONFIG_DIR, optimizers_with_recipe, options
from experiments.entry import entry
from experiments.errors import UserError, nearest
from experiments.given import user_path
from experiments.reproduce import INCOMPLETE, seeds_of, split_list
from experiments.runs.atomic import UnwritableError, refuse_links
from experiments.runs.directory import read_status
from experiments.tuning.chosen import Chosen
from experiments.tuning.report import CHOSEN_FILE, summary_markdown, write_report
from experiments.tuning.space import GROUP, check_seeds, read_space
from experiments.tuning.study import OptimizerStudy, Search, Trial, with_holdout


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; that of this process by default.

    Returns:
        The exit code.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    command = _parser().parse_intermixed_args(arguments)
    try:
        search = _search(command)
        if command.status or command.plan:
            print(known_trials(search, missing_only=command.plan))
            return 0
        code = run(search, jobs=command.jobs)
        if code == 0 and command.adopt:
            adopt(search)
        return code
    except KeyboardInterrupt:
        print("\ninterrupted; what is finished stays, the same command goes on", file=sys.stderr)
        return 130


def run(search: Search, *, jobs: int) -> int:
    """Make all trials, round by round, and write the report.

    Returns:
        The exit code: 0, or that of the first round in which a run crashed, could not start, or is
        with another process.
    """
    refuse_links(search.folder, search.folder.parents[1])
    studies = [OptimizerStudy(search, optimizer) for optimizer in search.optimizers]
    while trials := [trial for study in studies for trial in study.choose_round()]:
        last = max(trial.number for trial in trials)
        print(f"trials {trials[0].number + 1} to {last + 1} of {search.trials}, all optimizers")
        specs = [spec for trial in trials for spec in trial.specs]
        outcomes = run_missing(specs, jobs=jobs)
        left = [outcome for outcome in outcomes if outcome.status == "elsewhere"]
        failed = [o for o in outcomes if o.status not in ("done", "diverged", "elsewhere")]
        for outcome in failed:
            print(
                f"error: {outcome.directory} {outcome.status}: {outcome.message}", file=sys.stderr
            )
        if failed:
            return 2 if all(outcome.status == "refused" for outcome in failed) else 1
        if left:
            print(
                f"{len(left)} runs are with another process: left alone; this command, typed again "
                "when they have ended, goes on",
                file=sys.stderr,
            )
            return INCOMPLETE
    try:
        for path in write_report(search, studies):
            print(path)
    except UnwritableError as error:
        if not error.forbidden:
            raise
        print(summary_markdown(search, studies))
        print(f"not written: {error}", file=sys.stderr)
    return 0


def adopt(search: Search) -> None:
    """Write what a finished search chose into the configs, and say how runs come to use it."""
    chosen = Chosen.load(search.folder / CHOSEN_FILE)
    for path in chosen.adopt(CONFIG_DIR):
        print(path)
    scale_file = CONFIG_DIR / "experiment/scale" / search.experiment / f"{search.scale}.yaml"
    if chosen.adoption() not in scale_file.read_text(encoding="utf-8"):
        print(f"to train with them, add to the defaults of {scale_file}:\n  - {chosen.adoption()}")


def known_trials(search: Search, *, missing_only: bool) -> str:
    """The trials that are known by now, a line for each run; later rounds follow from them."""
    studies = [OptimizerStudy(search, optimizer) for optimizer in search.optimizers]
    known: list[Trial] = []
    for study in studies:
        while trials := study.choose_round():
            known += trials
            if not all(trial.finished for trial in trials):
                break
    finished = sum(trial.finished for trial in known)
    total = search.trials * len(studies)
    lines = [
        f"{search.experiment}, scale {search.scale}, in {search.folder}: {total} trials of "
        f"{len(search.seeds)} runs, {finished} finished, {len(known) - finished} to run now, "
        f"{total - len(known)} to be chosen after them"
    ]
    for trial in known:
        if missing_only and trial.finished:
            continue
        for spec in trial.specs:
            status = read_status(spec.directory)
            state = "missing" if status is None else status.status
            lines.append(f"  {state:<9} trial {trial.number:>3}  {spec.directory}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tune",
        description="Search every optimizer's settings with the same budget, on held-out images.",
    )
    parser.add_argument("experiment", help=f"one of {', '.join(options('experiment'))}")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for all runs: key=value")
    parser.add_argument("--space", default="learning_rate", help="a file of configs/tune")
    parser.add_argument("--optimizers", help="comma-separated; default: all that have a recipe")
    parser.add_argument("--trials", type=int, help="for every optimizer; default: the space's")
    parser.add_argument("--seeds", help="comma-separated tuning seeds; default: the space's")
    parser.add_argument("--scale", default="full", help="full (default), reduced or smoke")
    parser.add_argument("--results-dir", type=user_path, default=Path("results"))
    parser.add_argument(
        "--adopt", action="store_true", help="at the end, write what was chosen into configs/"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side; default: 1")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--plan", action="store_true", help="print the runs that would come next")
    shown.add_argument("--status", action="store_true", help="print how far each run is")
    return parser


def _search(command: argparse.Namespace) -> Search:
    """Check the command line.

    Raises:
        UserError: a name or a number will not do.
    """
    if command.experiment not in options("experiment"):
        known = nearest(command.experiment, options("experiment"))
        raise UserError(f"experiment {command.experiment!r} does not exist; {known}")
    space = read_space(command.space)
    seeds = space.rules.seeds if command.seeds is None else seeds_of(command.seeds)
    check_seeds(seeds, space.rules.reporting_seeds)
    trials = space.rules.trials if command.trials is None else command.trials
    for option, value in (("--trials", trials), ("--jobs", command.jobs)):
        if value < 1:
            raise UserError(f"{option} {value} must be at least 1")
    optimizers = optimizers_with_recipe(command.experiment)
    if command.optimizers is not None:
        optimizers = tuple(split_list(command.optimizers, "--optimizers"))
    if not optimizers:
        raise UserError(f"experiment {command.experiment} has no recipes: name --optimizers")
    for name in optimizers:
        if name not in space.search:
            where = f"configs/{GROUP}/{space.name}.yaml"
            raise UserError(f"{where} searches no {name!r}; {nearest(name, space.search)}")
    _check_overrides(command.overrides, {key for name in optimizers for key in space.search[name]})
    return Search(
        space=space,
        experiment=command.experiment,
        scale=command.scale,
        optimizers=optimizers,
        seeds=seeds,
        trials=trials,
        folder=command.results_dir / "tuning" / f"{command.experiment}-{command.scale}",
        overrides=with_holdout(space, command.experiment, command.overrides),
    )


def _check_overrides(overrides: Sequence[str], searched: set[str]) -> None:
    refuse_options(overrides)
    for item in overrides:
        key = item.lstrip("+~").split("=", 1)[0]
        if key in searched:
            raise UserError(f"{item}: {key} is what is searched; give another space with --space")


if __name__ == "__main__":
    sys.exit(main())
