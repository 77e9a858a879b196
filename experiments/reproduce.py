"""Which runs a comparison needs, which of them exist; runs the missing ones, then judges.

    python -m experiments.reproduce digits_mlp --seeds 0,1,2
    python -m experiments.reproduce cifar10_resnet18 --optimizers sgd,mlbfgs --scale reduced --plan
    python -m experiments.reproduce controls --arms sgd_lr1.0,mlbfgs --scale reduced --status

What is finished is found by its run key and not repeated, so the same command, typed again, goes on
where a killed one was. A run that diverges is a result; one that crashes is reported and does not
keep the others from running.

Exit code 0: all runs ended and were judged; 1: a run crashed; 2: something that the user wrote will
not do, told in one line; 130: interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.composition import compose_config, recipe_note
from experiments.contestants import arms, optimizers_with_recipe, options
from experiments.errors import UserError, nearest
from experiments.launch import launch
from experiments.outcome import Outcome, finished_outcome, freeze
from experiments.pool import WorkerPool
from experiments.progress import Progress
from experiments.replay import fill, missing_source
from experiments.run_directory import read_status
from experiments.spec import RunSpec
from experiments.tuning.chosen import Chosen

logger = logging.getLogger(__name__)

# Overrides that would make the runs others than the options say, and what to write instead.
OPTION_OF = {
    "experiment": "the first argument",
    "optimizer": "--optimizers",
    "arm": "--arms",
    "seed": "--seeds",
    "scale": "--scale",
    "results_dir": "--results-dir",
}


@dataclass(frozen=True)
class Plan:
    """The runs of a campaign, as far as they are known.

    Attributes:
        runs: the override that chooses the contestant, and the run.
        waiting: one line for every run whose config wants a run that is not finished.
    """

    runs: tuple[tuple[str, RunSpec], ...]
    waiting: tuple[str, ...]

    @property
    def specs(self) -> list[RunSpec]:
        """The runs alone."""
        return [spec for _, spec in self.runs]


@dataclass(frozen=True)
class Campaign:
    """The runs of one comparison.

    Attributes:
        experiment: name of the experiment.
        optimizers: options of the config group `optimizer`.
        arms: arms of the experiment.
        seeds: one run each per optimizer and arm.
        scale: full, reduced or smoke.
        results_dir: where `runs/` and `summary/` are.
        overrides: further Hydra overrides, the same for all runs.
        ranks: processes that train each run together; 1: the pool's own.
        outlook: print data, disk and predicted hours before the runs.
        tuned: settings that a search chose, for each optimizer; they win over the recipe.
    """

    experiment: str
    optimizers: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    scale: str
    results_dir: Path
    overrides: tuple[str, ...] = ()
    ranks: int = 1
    outlook: bool = False
    tuned: Chosen | None = None

    @property
    def choices(self) -> tuple[str, ...]:
        """The override that chooses each contestant, optimizers first."""
        return (
            *(f"optimizer={name}" for name in self.optimizers),
            *(f"arm={name}" for name in self.arms),
        )

    def arguments(self, choice: str) -> list[str]:
        """Hydra overrides of one contestant's runs, without the seed and the results directory."""
        group, _, name = choice.partition("=")
        tuned = self.tuned.overrides(name) if self.tuned and group == "optimizer" else ()
        first = [f"experiment={self.experiment}", choice, f"scale={self.scale}"]
        launch = ["launch=torchrun", f"launch.nproc={self.ranks}"] if self.ranks > 1 else []
        return [*first, *launch, *tuned, *self.overrides]

    def compose(self) -> Plan:
        """Compose every run, seed by seed, so that a part of a campaign compares as well.

        Raises:
            UserError: a name, a key or a value will not do.
        """
        configs = []
        for choice in self.choices:
            config = compose_config(self.arguments(choice))
            # Set here and not as an override: a path may hold what Hydra's grammar reserves.
            config.results_dir = str(self.results_dir)
            configs.append(config)
            note = recipe_note(config)
            if note is not None:
                logger.warning(note)
        runs, waiting = [], []
        for seed in self.seeds:
            for choice, composed in zip(self.choices, configs, strict=True):
                config = composed.copy()
                config.seed = seed
                if fill(config):
                    runs.append((choice, RunSpec.from_config(config)))
                else:
                    waiting.append(missing_source(config))
        return Plan(tuple(runs), tuple(waiting))

    @property
    def summary_dir(self) -> Path:
        """Where the judgement goes; one folder for each scale, since scales are never mixed."""
        tuned = "-tuned" if self.tuned else ""
        return self.results_dir / "summary" / f"{self.experiment}-{self.scale}{tuned}"


def run_missing(specs: Sequence[RunSpec], *, jobs: int) -> list[Outcome]:
    """Run what is not finished, and say what became of every run.

    Args:
        specs: the runs.
        jobs: processes side by side; each gets its share of the cores.

    Returns:
        One outcome per run, those that were finished before first.

    Raises:
        UserError: the directory of a run cannot be used.
    """
    outcomes, missing = [], []
    for spec in specs:
        finished = finished_outcome(spec)
        if finished is None:
            missing.append(spec)
        else:
            outcomes.append(finished)
    if not missing:
        return outcomes
    for spec in missing:
        freeze(spec)
    threads = None if jobs == 1 else max(1, available_cores() // jobs)
    progress = Progress(missing, finished_before=len(outcomes))
    if any(spec.config.launch.name == "torchrun" for spec in missing):
        for spec in missing:
            progress.show((spec.directory,))
            outcomes.append(launch(spec))
            progress.ended(outcomes[-1])
        return outcomes
    with WorkerPool(min(jobs, len(missing)), threads) as pool:
        for report in pool.outcomes([spec.directory for spec in missing]):
            if isinstance(report, Outcome):
                outcomes.append(report)
                progress.ended(report)
            else:
                progress.show(report)
    return outcomes


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
        campaign = _campaign(command)
        plan = campaign.compose()
        if command.status:
            print(status_table(campaign, plan))
            return 0
        if command.plan:
            print(plan_text(campaign, plan))
            _show_outlook(campaign, plan)
            return 0
        if campaign.outlook:
            print(_headline(campaign, plan))
        problem = _show_outlook(campaign, plan)
        if problem is not None:
            raise problem
        outcomes = run_missing(plan.specs, jobs=command.jobs)
        if plan.waiting:
            before = {spec.directory for spec in plan.specs}
            plan = campaign.compose()
            ready = [spec for spec in plan.specs if spec.directory not in before]
            outcomes += run_missing(ready, jobs=command.jobs)
        return _report(campaign, plan, outcomes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\ninterrupted; what is finished stays, and the same command goes on from the last"
            " checkpoints",
            file=sys.stderr,
        )
        return 130


def _show_outlook(campaign: Campaign, plan: Plan) -> UserError | None:
    """Print what a campaign with `--ranks` will meet; returns why it cannot start, if it cannot."""
    missing = [spec for spec in plan.specs if finished_outcome(spec) is None]
    if not campaign.outlook or not missing:
        return None
    # Imported here because it loads torch.
    from experiments.outlook import look_ahead

    outlook = look_ahead(missing, ranks=campaign.ranks, results_dir=campaign.results_dir)
    print("\n".join(outlook.lines), flush=True)
    return outlook.problem


def status_table(campaign: Campaign, plan: Plan) -> str:
    """How far every run is, a line each."""
    lines = [_headline(campaign, plan)]
    for spec in plan.specs:
        status = read_status(spec.directory)
        state = "missing" if status is None else status.status
        epoch = 0 if status is None else status.epoch
        note = "" if status is None or not status.message else f"  ({status.message})"
        lines.append(
            f"  {state:<9} epoch {epoch:>3}/{spec.config.train.epochs:<3} {spec.directory}{note}"
        )
    return "\n".join([*lines, *_waiting_lines(plan)])


def plan_text(campaign: Campaign, plan: Plan) -> str:
    """The commands that would run what is missing, a line each."""
    lines = [_headline(campaign, plan)]
    for choice, spec in plan.runs:
        if finished_outcome(spec) is None:
            arguments = campaign.arguments(choice)
            arguments += [f"seed={spec.seed}", f"results_dir={campaign.results_dir}"]
            lines.append(f"  {shlex.join(['python', '-m', 'experiments.train', *arguments])}")
    return "\n".join([*lines, *_waiting_lines(plan)])


def _waiting_lines(plan: Plan) -> list[str]:
    return [f"  waiting   {line}" for line in plan.waiting]


def _headline(campaign: Campaign, plan: Plan) -> str:
    finished = sum(finished_outcome(spec) is not None for spec in plan.specs)
    total = len(plan.runs) + len(plan.waiting)
    return (
        f"{campaign.experiment}, scale {campaign.scale}, in {campaign.results_dir}: "
        f"{total} runs, {finished} finished, {total - finished} to run"
    )


def _report(campaign: Campaign, plan: Plan, outcomes: Sequence[Outcome]) -> int:
    """Judge what there is, print it, and turn the outcomes into an exit code."""
    failed = [outcome for outcome in outcomes if outcome.status in ("crashed", "refused")]
    if len(failed) < len(outcomes):
        # Imported here because it loads the plotting library.
        from experiments.analysis.summary import summarise

        summary = summarise(
            campaign.results_dir,
            campaign.experiment,
            campaign.summary_dir,
            scale=campaign.scale,
            keys={spec.key for spec in plan.specs},
        )
        print(f"\n{summary.terminal()}\n")
        for path in summary.paths:
            print(path)
    for message in dict.fromkeys(outcome.message for outcome in failed):
        affected = [outcome for outcome in failed if outcome.message == message]
        print(f"error: {message} ({len(affected)} of {len(outcomes)} runs)", file=sys.stderr)
    for line in plan.waiting:
        print(f"error: {line}", file=sys.stderr)
    statuses = {outcome.status for outcome in failed}
    if "crashed" in statuses:
        return 1
    return 2 if "refused" in statuses or plan.waiting else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduce",
        description="Run what is missing of one experiment, then judge it.",
    )
    parser.add_argument("experiment", help=f"one of {', '.join(options('experiment'))}")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for all runs: key=value")
    parser.add_argument("--optimizers", help="comma-separated; default: all that have a recipe")
    parser.add_argument("--arms", help="comma-separated; default: all of the experiment")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; default: 0,1,2")
    parser.add_argument("--scale", default="full", help="full (default), reduced or smoke")
    parser.add_argument(
        "--tuned", type=Path, help="chosen.yaml of experiments.tune: settings in place of recipes'"
    )
    parser.add_argument("--results-dir", type=Path, default=Path("results"))
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side; default: 1")
    parser.add_argument(
        "--ranks",
        help="train each run on so many ranks, or auto: on all GPUs found; prints data, disk and "
        "predicted hours first",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--plan", action="store_true", help="print the missing runs' commands")
    shown.add_argument("--status", action="store_true", help="print how far each run is")
    return parser


def _campaign(arguments: argparse.Namespace) -> Campaign:
    """Check the command line.

    Raises:
        UserError: a name or a number will not do.
    """
    if arguments.experiment not in options("experiment"):
        raise UserError(
            f"experiment {arguments.experiment!r} does not exist; "
            f"{nearest(arguments.experiment, options('experiment'))}"
        )
    if arguments.jobs < 1:
        raise UserError(f"--jobs {arguments.jobs} must be at least 1")
    for item in arguments.overrides:
        key = item.lstrip("+~").split("=", 1)[0]
        if key in OPTION_OF:
            raise UserError(f"{item}: write {OPTION_OF[key]} instead of this override")
    optimizers, chosen_arms = _contestants(arguments)
    seeds = seeds_of(arguments.seeds)
    ranks = _ranks(arguments.ranks, arguments.scale)
    if ranks > 1 and arguments.jobs > 1:
        raise UserError(f"--jobs {arguments.jobs} with --ranks {ranks}: use --jobs 1 or --ranks 1")
    tuned = None if arguments.tuned is None else Chosen.load(arguments.tuned)
    if tuned is not None:
        tuned.check(arguments.experiment, seeds)
        if chosen_arms:
            raise UserError(f"--tuned has settings of optimizers, not of arms: {chosen_arms[0]!r}")
    return Campaign(
        experiment=arguments.experiment,
        optimizers=optimizers,
        arms=chosen_arms,
        seeds=seeds,
        scale=arguments.scale,
        results_dir=arguments.results_dir,
        overrides=tuple(arguments.overrides),
        ranks=ranks,
        outlook=arguments.ranks is not None,
        tuned=tuned,
    )


def _ranks(text: str | None, scale: str) -> int:
    """Read `--ranks`.

    Raises:
        UserError: it is no number of ranks.
    """
    if text is None:
        return 1
    if text == "auto":
        from experiments.outlook import ranks_found  # loads torch

        return ranks_found(scale)
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--ranks {text!r} must be auto or a number of at least 1")
    return int(text)


def _contestants(arguments: argparse.Namespace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The optimizers and arms that were asked for; all of both where neither was.

    Raises:
        UserError: there is nothing to run, or a list will not do.
    """
    experiment = arguments.experiment
    if arguments.optimizers is None and arguments.arms is None:
        found = optimizers_with_recipe(experiment), arms(experiment)
        if not any(found):
            raise UserError(
                f"experiment {experiment} has neither a recipe nor an arm: name --optimizers"
            )
        return found
    return (
        tuple(split_list(arguments.optimizers, "--optimizers"))
        if arguments.optimizers is not None
        else (),
        tuple(split_list(arguments.arms, "--arms")) if arguments.arms is not None else (),
    )


def split_list(text: str, option: str) -> list[str]:
    """Split a comma-separated list and refuse an empty or a double entry."""
    entries = [entry.strip() for entry in text.split(",")]
    if "" in entries or len(set(entries)) < len(entries):
        raise UserError(f"{option} {text!r} must be a comma-separated list, each entry once")
    return entries


def seeds_of(text: str) -> tuple[int, ...]:
    """Read a comma-separated list of seeds."""
    entries = split_list(text, "--seeds")
    if not all(entry.isdecimal() for entry in entries):
        raise UserError(f"--seeds {text!r} must be whole numbers of at least 0: 0,1,2")
    return tuple(int(entry) for entry in entries)


if __name__ == "__main__":
    sys.exit(main())
