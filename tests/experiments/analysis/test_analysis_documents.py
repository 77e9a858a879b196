"""The documents' generated blocks equal their files, or the check fails."""

from __future__ import annotations

import pytest

from experiments.analysis import documents
from experiments.errors import UserError

TEXT = "# Name\n\n<!-- generated: table.md -->\nold\n<!-- end generated -->\n\nafter\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "table.md").write_text("| a |\n| --- |\n")
    (tmp_path / "README.md").write_text(TEXT)
    return tmp_path


def run(folder, *arguments):
    return documents.main(arguments, root=folder, documents=["README.md"])


def test_block_is_replaced_and_the_rest_kept(folder):
    assert run(folder) == 0
    assert (folder / "README.md").read_text() == (
        "# Name\n\n<!-- generated: table.md -->\n\n| a |\n| --- |\n\n"
        "<!-- end generated -->\n\nafter\n"
    )


def test_headings_of_a_block_stand_below_those_around_it(folder):
    (folder / "table.md").write_text("# One\n\ntext # not a heading\n\n## Two\n")
    run(folder)
    text = (folder / "README.md").read_text()
    assert "\n### One\n\ntext # not a heading\n\n#### Two\n" in text


def test_check_fails_until_written_and_after_the_file_changed(folder, capsys):
    assert run(folder, "--check") == 1
    assert "README.md differs" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == TEXT  # the check writes nothing
    run(folder)
    assert run(folder, "--check") == 0
    (folder / "table.md").write_text("| b |\n")
    assert run(folder, "--check") == 1


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
        documents.fill(text, folder, "README.md")


def test_missing_document_is_one_line(tmp_path, capsys):
    assert run(tmp_path, "--check") == 2
    assert capsys.readouterr().err.count("\n") == 1
