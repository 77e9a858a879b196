"""`python -m experiments.analysis <results_dir> --experiment NAME`: judge what has been run."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.analysis.runs import SCALES
from experiments.analysis.summary import summarise
from experiments.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; None: those of the process.

    Returns:
        0, or 2 after a mistake of the user, told in one line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.analysis",
        description="Judge an experiment from its run directories: tables, figures, verdicts.",
    )
    parser.add_argument("results_dir", type=Path, help="the directory that holds runs/")
    parser.add_argument("--experiment", required=True, help="name of the experiment")
    parser.add_argument("--scale", help=f"only this scale: {', '.join(SCALES)} (default: each)")
    parser.add_argument(
        "--out", type=Path, help="where the files go (default: <results_dir>/summary/<experiment>)"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    out = options.out or options.results_dir / "summary" / options.experiment
    try:
        summary = summarise(options.results_dir, options.experiment, out, scale=options.scale)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary.terminal())
    print("Written:")
    for path in summary.paths:
        print(f"  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
