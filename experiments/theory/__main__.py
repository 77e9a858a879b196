"""`python -m experiments.theory`: settle every claim that needs no training, then judge.

Subjects are independent and seeded, so they run side by side in two processes and give the same
numbers in any order. `--judge-only` computes the verdicts from the committed files again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from experiments.analysis.showing.theory_page import write_page
from experiments.entry import entry
from experiments.errors import UserError, nearest
from experiments.given import user_path
from experiments.runs.owned_folder import OwnedFolder
from experiments.supervision import end_with_parent
from experiments.theory.settling import settle

DEFAULT_OUT = Path(__file__).resolve().parents[2] / "results" / "theory"
#: The longest first, so that two processes end together.
SUBJECTS = (
    "hessian_bounds",
    "quadratic",
    "linear_rate",
    "complexity",
    "noise",
    "lemmas",
    "counterexamples",
    "damping_bound",
)


@entry
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: of the command line; None: those of the process.

    Returns:
        0, or 2 after a mistake of the user, told in one line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.theory", description="The claims that need no training."
    )
    parser.add_argument("subjects", nargs="*", help=f"default: all of {', '.join(SUBJECTS)}")
    parser.add_argument(
        "--out", type=user_path, default=DEFAULT_OUT, help="default: results/theory"
    )
    parser.add_argument("--judge-only", action="store_true", help="only judge the files there")
    options = parser.parse_args(arguments)
    chosen = _chosen(options.subjects)
    OwnedFolder(options.out).claim([*(f"{subject}.json" for subject in chosen), "README.md"])
    if not options.judge_only:
        _settle_all(chosen, options.out)
    page = write_page(options.out)
    print(page.terminal())
    return 0


def _settle_all(subjects: Sequence[str], folder: Path) -> None:
    jobs = min(2, os.cpu_count() or 1, len(subjects))
    # spawned: torch's threads do not survive a fork
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=end_with_parent
    ) as pool:
        futures = [pool.submit(settle, subject, folder) for subject in subjects]
        for future in futures:
            subject, seconds = future.result()
            print(f"{subject}: {seconds:.0f} s", flush=True)


def _chosen(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if name not in SUBJECTS:
            raise UserError(f"there is no subject {name!r}: {nearest(name, SUBJECTS)}")
    return tuple(name for name in SUBJECTS if name in names) if names else SUBJECTS


if __name__ == "__main__":
    sys.exit(main())
