"""The README's generated blocks equal their files, or the check fails."""

from __future__ import annotations

import pytest

from experiments.analysis import readme
from experiments.errors import UserError

TEXT = "# Name\n\n<!-- generated: table.md -->\nold\n<!-- end generated -->\n\nafter\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "table.md").write_text("| a |\n| --- |\n")
    (tmp_path / "README.md").write_text(TEXT)
    return tmp_path


def test_block_is_replaced_and_the_rest_kept(folder):
    assert readme.main([], readme=folder / "README.md") == 0
    assert (folder / "README.md").read_text() == (
        "# Name\n\n<!-- generated: table.md -->\n\n| a |\n| --- |\n\n"
        "<!-- end generated -->\n\nafter\n"
    )


def test_check_fails_until_written_and_after_the_file_changed(folder, capsys):
    path = folder / "README.md"
    assert readme.main(["--check"], readme=path) == 1
    assert "README.md differs" in capsys.readouterr().err
    assert path.read_text() == TEXT  # the check writes nothing
    readme.main([], readme=path)
    assert readme.main(["--check"], readme=path) == 0
    (folder / "table.md").write_text("| b |\n")
    assert readme.main(["--check"], readme=path) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- generated: table.md -->\n", "has no line"),
        ("<!-- end generated -->\n", "line 1: .* without a beginning"),
        ("<!-- generated: none.md -->\n<!-- end generated -->\n", "none.md does not exist"),
        ("<!-- generated: table.md -->\n<!-- generated: table.md -->\n", "before has no end"),
    ],
)
def test_broken_markers_are_named(folder, text, message):
    with pytest.raises(UserError, match=message):
        readme.fill(text, folder)


def test_missing_readme_is_one_line(tmp_path, capsys):
    assert readme.main(["--check"], readme=tmp_path / "README.md") == 2
    assert capsys.readouterr().err.count("\n") == 1
