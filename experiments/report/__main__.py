"""`python -m experiments.report`: build the report; `... diff A B`: compare two sets of results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.entry import entry
from experiments.given import user_path

ROOT = Path(__file__).resolve().parents[2]


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; None: those of the process.

    Returns:
        0; of `diff` 1 if the sets differ; 2 after a mistake of the user, told in one line.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["diff"]:
        return _diff(given[1:])
    return _build(given)


def _build(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description="Write the report, a static tree of pages, from a results directory alone.",
        epilog="python -m experiments.report diff A B compares two results directories.",
    )
    parser.add_argument(
        "--results-dir",
        type=user_path,
        default=ROOT / "results",
        help="holds runs/ and summary/claims.json (default: the committed results)",
    )
    parser.add_argument(
        "--out", type=user_path, help="where the pages go (default: <results dir>/report)"
    )
    options = parser.parse_args(arguments)
    # The pages take the import of matplotlib; a wrong option need not wait for it.
    from experiments.report.site import build

    out = options.out or options.results_dir / "report"
    written = build(options.results_dir.resolve(), out.resolve())
    size = sum(path.stat().st_size for path in written)
    print(f"{out / 'index.html'}: {len(written)} files, {size / 2**20:.1f} MiB")
    return 0


def _diff(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report diff",
        description="Tell what changed from results directory A to results directory B.",
        epilog="Exit status: 0 if nothing did, 1 if something did, 2 after a mistake.",
    )
    parser.add_argument("before", metavar="A", type=user_path, help="results directory")
    parser.add_argument("after", metavar="B", type=user_path, help="results directory")
    parser.add_argument("--experiment", help="compare the runs of this experiment alone")
    options = parser.parse_args(arguments)
    from experiments.report.diff import compare_results, text

    parts = compare_results(options.before, options.after, options.experiment)
    print(text(parts), end="")
    return 1 if any(part.lines for part in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
