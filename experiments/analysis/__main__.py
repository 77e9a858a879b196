"""Judge what has been run: one experiment, each of them, or the whole registry of claims.

python -m experiments.analysis results --experiment NAME    tables, figures, verdicts
python -m experiments.analysis results --summaries          the same of every experiment with runs
python -m experiments.analysis results --all                summary/README.md, summary/claims.json
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.analysis.measuring.runs import SCALES
from experiments.analysis.showing.registry_page import write_registry
from experiments.analysis.showing.summary import Summary, summarise, summary_folder
from experiments.entry import entry
from experiments.errors import UserError
from experiments.given import user_path, visible


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; None: those of the process.

    Returns:
        0, or 2 after a mistake of the user, told in one line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.analysis",
        description="Judge an experiment, or all claims, from run directories.",
    )
    parser.add_argument("results_dir", type=user_path, help="the directory that holds runs/")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--experiment", help="tables, figures and verdicts of one experiment")
    what.add_argument("--summaries", action="store_true", help="the same of every experiment")
    what.add_argument("--all", action="store_true", help="the page over all claims")
    parser.add_argument("--scale", help=f"only this scale: {', '.join(SCALES)} (default: each)")
    parser.add_argument(
        "--out",
        type=user_path,
        help="where one experiment's files go (default: summary/<experiment>-<scale> there)",
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if options.all:
        return _whole_registry(options.results_dir, options)
    summaries = _summaries(options.results_dir, options)
    for summary in summaries:
        if options.experiment:
            print(summary.terminal())
            print("Written:" if summary.paths else "Nothing written.")
            for path in summary.paths:
                print(f"  {path}")
        else:
            print(*summary.paths[:1])
    unwritten = [summary.unwritten for summary in summaries if summary.unwritten]
    for reason in unwritten:
        print(f"error: {reason}", file=sys.stderr)
    return 2 if unwritten else 0


def _summaries(results_dir: Path, options: argparse.Namespace) -> list[Summary]:
    """One experiment, or each that has runs: a folder for each scale, since none is mixed."""
    if options.summaries and options.out:
        raise UserError("--summaries writes to <results_dir>/summary")
    if options.out:
        return [summarise(results_dir, options.experiment, options.out, scale=options.scale)]
    runs = results_dir / "runs"
    names = [options.experiment]
    if options.summaries:
        names = [path.name for path in visible(runs, "*")]
    scales = [options.scale] if options.scale else list(SCALES)
    found = [
        (name, scale) for name in names for scale in scales if any(runs.glob(f"{name}/*/{scale}-*"))
    ]
    if options.experiment and not found:  # what is missing is told where it is read
        found = [(options.experiment, scales[0])]
    if not found:
        raise UserError(f"no runs in {results_dir}")
    return [
        summarise(results_dir, name, summary_folder(results_dir, name, scale), scale=scale)
        for name, scale in found
    ]


def _whole_registry(results_dir: Path, options: argparse.Namespace) -> int:
    if options.scale or options.out:
        raise UserError("--all judges every scale and writes to <results_dir>/summary")
    if not results_dir.is_dir():
        raise UserError(f"{results_dir} does not exist")
    for path in write_registry(results_dir):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
