"""The table of all trials, and the best and the median one of each optimizer."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from experiments.runs.owned_folder import OwnedFolder
from experiments.tuning.chosen import Chosen
from experiments.tuning.study import OptimizerStudy, Search, Trial

TRIALS_FILE = "trials.csv"
SUMMARY_FILE = "summary.md"
CHOSEN_FILE = "chosen.yaml"


def ranked(trials: Sequence[Trial], search: Search) -> list[Trial]:
    """The trials, best first; those that diverged last."""
    metric, sign = search.space.rules.metric, -1.0 if search.maximises else 1.0

    def order(trial: Trial) -> tuple[bool, float, int]:
        result = trial.result(metric)
        diverged = math.isnan(result)
        return diverged, 0.0 if diverged else sign * result, trial.number

    return sorted(trials, key=order)


def write_report(search: Search, studies: Sequence[OptimizerStudy]) -> list[Path]:
    """Write `trials.csv`, `summary.md` and `chosen.yaml`.

    Args:
        search: the search.
        studies: one for each optimizer, all trials finished.

    Returns:
        The files.

    Raises:
        UserError: the folder cannot be written, or holds files of these names from elsewhere.
    """
    best = {study.optimizer: ranked(study.trials, search)[0] for study in studies}
    chosen = Chosen(
        experiment=search.experiment,
        scale=search.scale,
        space=search.space.name,
        metric=search.space.rules.metric,
        holdout=_holdout(studies),
        seeds=list(search.seeds),
        trials=search.trials,
        settings={name: trial.values for name, trial in best.items() if not trial.diverged},
    )
    folder = OwnedFolder(search.folder, below=search.folder.parents[1])
    files = {
        TRIALS_FILE: trials_csv(search, studies),
        SUMMARY_FILE: summary_markdown(search, studies),
        CHOSEN_FILE: chosen.text(),
    }
    return list(folder.replace(files))


def trials_csv(search: Search, studies: Sequence[OptimizerStudy]) -> str:
    """Every trial in a row: its settings, what became of it, its runs."""
    metric = search.space.rules.metric
    keys = sorted({key for study in studies for key in search.space.search[study.optimizer]})
    of_seeds = [f"{metric} of seed {seed}" for seed in search.seeds]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["optimizer", "trial", *keys, "status", metric, *of_seeds, "runs"])
    for study in studies:
        for trial in study.trials:
            values = [trial.values.get(key, "") for key in keys]
            status = "diverged" if trial.diverged else "done"
            results = [trial.result(metric), *trial.of_seeds(metric)]
            shown = ["" if math.isnan(result) else f"{result:.6g}" for result in results]
            runs = " ".join(spec.directory.name for spec in trial.specs)
            writer.writerow([trial.optimizer, trial.number, *values, status, *shown, runs])
    return text.getvalue()


def summary_markdown(search: Search, studies: Sequence[OptimizerStudy]) -> str:
    """The best and the median trial of each optimizer, and how they were found."""
    metric = search.space.rules.metric
    rows, notes = [], []
    for study in studies:
        order = ranked(study.trials, search)
        # Of an even number the worse one of the middle two.
        best, median = order[0], order[len(order) // 2]
        diverged = sum(trial.diverged for trial in order)
        rows.append(
            [
                study.optimizer,
                len(order),
                diverged,
                "" if best.diverged else _settings(best),
                _result(best, metric),
                _settings(median),
                _result(median, metric),
            ]
        )
        notes += _notes(study, best)
    header = ["optimizer", "trials", "diverged", "best", metric, "median trial", metric]
    table = tabulate(rows, headers=header, tablefmt="github", disable_numparse=True)
    seeds = f"the mean of seeds {', '.join(map(str, search.seeds))}"
    if len(search.seeds) == 1:
        seeds = f"with seed {search.seeds[0]}"
    lines = [
        f"# Tuning of {search.experiment}, scale {search.scale}",
        "",
        f"Space `{search.space.name}`, {search.trials} trials for each optimizer, each "
        f"{seeds}. `{metric}` is that of {_holdout(studies)} held-out training images after "
        "the last epoch; no trial looked at the test set. A diverged trial counts as the worst. "
        f"All trials: `{TRIALS_FILE}`.",
        "",
        table,
        *(["", *notes] if notes else []),
    ]
    return "\n".join(lines) + "\n"


def _notes(study: OptimizerStudy, best: Trial) -> list[str]:
    if best.diverged:
        return [f"- {study.optimizer}: every trial diverged; nothing was chosen."]
    notes = []
    for key, value in best.values.items():
        tried = [trial.values[key] for trial in study.trials]
        for end, word in ((min(tried), "smaller"), (max(tried), "larger")):
            if value == end:
                notes.append(
                    f"- {study.optimizer}: no {key} {word} than the best, {value:.3g}, was tried; "
                    "there may be a better one."
                )
    return notes


def _settings(trial: Trial) -> str:
    return ", ".join(f"{key.removeprefix('optimizer.')} {v:.3g}" for key, v in trial.values.items())


def _result(trial: Trial, metric: str) -> str:
    return "diverged" if trial.diverged else f"{trial.result(metric):.4g}"


def _holdout(studies: Sequence[OptimizerStudy]) -> int:
    return int(studies[0].trials[0].specs[0].config.dataset.holdout)
