"""Judge what has been run: one experiment, or the whole registry of claims.

python -m experiments.analysis results --experiment NAME    tables, figures, verdicts
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
from experiments.analysis.showing.summary import summarise
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
        description="Judge an experiment, or all claims, from run directories.",
    )
    parser.add_argument("results_dir", type=Path, help="the directory that holds runs/")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--experiment", help="tables, figures and verdicts of one experiment")
    what.add_argument("--all", action="store_true", help="the page over all claims")
    parser.add_argument("--scale", help=f"only this scale: {', '.join(SCALES)} (default: each)")
    parser.add_argument(
        "--out", type=Path, help="where the files go (default: <results_dir>/summary/<experiment>)"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if options.all:
        return _whole_registry(options.results_dir, options)
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


def _whole_registry(results_dir: Path, options: argparse.Namespace) -> int:
    try:
        if options.scale or options.out:
            raise UserError("--all judges every scale and writes to <results_dir>/summary")
        if not results_dir.is_dir():
            raise UserError(f"{results_dir} does not exist")
        paths = write_registry(results_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
