"""Keep the generated blocks of README.md and docs/ equal to committed files.

A block stands between `<!-- generated: <path of a Markdown file> -->` and `<!-- end generated -->`;
its content is that file's content, its headings two levels lower.
`python -m experiments.analysis.documents` writes the blocks, `--check` only compares, so that a
number in the documents cannot drift from the results. `docs/deviations.md` is generated as a whole,
from `results/deviations.yaml` and the runs it points to.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.analysis.showing.deviations import ledger_document
from experiments.entry import entry
from experiments.errors import UserError
from experiments.given import read_text
from experiments.runs.atomic import write_atomically

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "docs/optimizer.md", "docs/distributed.md", "docs/deviations.md")
# Documents without a line of their own.
_GENERATED: dict[str, Callable[[Path], str]] = {"docs/deviations.md": ledger_document}
_OPEN = re.compile(r"^<!-- generated: (?P<path>\S+) -->$")
_CLOSE = "<!-- end generated -->"


def fill(text: str, root: Path, name: str) -> str:
    """Replace the content of every generated block.

    Args:
        text: of the document.
        root: the directory that the paths in the markers start from.
        name: of the document, for messages.

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
                raise UserError(f"{name}, line {number}: the block {inside} before has no end")
            inside = opening["path"]
            content = _read(root / inside, f"{name}, line {number}: ").strip("\n")
            lines += [line, "", re.sub(r"^(?=#+ )", "##", content, flags=re.M), ""]
        elif line == _CLOSE:
            if not inside:
                raise UserError(f"{name}, line {number}: {_CLOSE!r} without a beginning")
            inside = ""
            lines.append(line)
        elif not inside:
            lines.append(line)
    if inside:
        raise UserError(f"{name}: the block {inside} has no line {_CLOSE!r}")
    return "\n".join(lines) + "\n"


@entry
def main(
    arguments: Sequence[str] | None = None,
    *,
    root: Path = ROOT,
    documents: Sequence[str] = DOCUMENTS,
) -> int:
    """Run the command.

    Args:
        arguments: of the command line; None: those of the process.
        root: the directory that all paths start from.
        documents: the documents with generated blocks.

    Returns:
        0; 1 if `--check` finds a difference; 2 after a mistake of the user.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.analysis.documents",
        description="Write what is generated in README.md and docs/.",
    )
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 if they differ")
    options = parser.parse_args(arguments)
    code = 0
    for name in documents:
        before = _read(root / name)
        generate = _GENERATED.get(name)
        after = generate(root) if generate else fill(before, root, name)
        if before == after:
            continue
        if options.check:
            print(
                f"{name} differs from the files it is generated from: run make documents",
                file=sys.stderr,
            )
            code = 1
        else:
            try:
                write_atomically(root / name, after)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
    return code


def _read(path: Path, where: str = "") -> str:
    try:
        return read_text(path)
    except FileNotFoundError as error:
        raise UserError(f"{where}{path} does not exist") from error


if __name__ == "__main__":
    sys.exit(main())
