"""Keep the generated blocks of README.md equal to committed files.

A block stands between `<!-- generated: <path of a Markdown file> -->` and `<!-- end generated -->`;
its content is that file's content. `python -m experiments.analysis.readme` writes the blocks,
`--check` only compares, so that a number in the README cannot drift from the results.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.errors import UserError

README = Path(__file__).resolve().parents[2] / "README.md"
_OPEN = re.compile(r"^<!-- generated: (?P<path>\S+) -->$")
_CLOSE = "<!-- end generated -->"


def fill(text: str, root: Path) -> str:
    """Replace the content of every generated block.

    Args:
        text: of the README.
        root: the directory that the paths in the markers start from.

    Returns:
        The text with current blocks; unchanged if it has none.

    Raises:
        UserError: a block has no end or no beginning, or its file is missing.
    """
    lines: list[str] = []
    inside = ""
    for number, line in enumerate(text.splitlines(), start=1):
        opening = _OPEN.match(line)
        if opening:
            if inside:
                raise UserError(f"README.md, line {number}: the block {inside} before has no end")
            inside = opening["path"]
            lines += [line, "", _content(root / inside, number), ""]
        elif line == _CLOSE:
            if not inside:
                raise UserError(f"README.md, line {number}: {_CLOSE!r} without a beginning")
            inside = ""
            lines.append(line)
        elif not inside:
            lines.append(line)
    if inside:
        raise UserError(f"README.md: the block {inside} has no line {_CLOSE!r}")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None, *, readme: Path = README) -> int:
    """Run the command.

    Args:
        arguments: of the command line; None: those of the process.
        readme: the file.

    Returns:
        0; 1 if `--check` finds a difference; 2 after a mistake of the user.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.analysis.readme",
        description="Write the generated blocks of README.md.",
    )
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 if they differ")
    options = parser.parse_args(arguments)
    try:
        before = _read(readme)
        after = fill(before, readme.parent)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if before == after:
        return 0
    if options.check:
        print(
            f"{readme.name} differs from the files it is generated from: "
            "run python -m experiments.analysis.readme",
            file=sys.stderr,
        )
        return 1
    readme.write_text(after, encoding="utf-8")
    return 0


def _content(path: Path, number: int) -> str:
    try:
        return path.read_text(encoding="utf-8").strip("\n")
    except FileNotFoundError as error:
        raise UserError(f"README.md, line {number}: {path} does not exist") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error


if __name__ == "__main__":
    sys.exit(main())
