"""Pages about no single experiment: theory, tuning, benchmarks, the ledger of deviations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from experiments.analysis.measuring import quantities
from experiments.analysis.measuring.groups import Group, Results, display_name
from experiments.analysis.showing.deviations import Deviation, measured
from experiments.errors import UserError
from experiments.given import read_text, visible
from experiments.report.markdown import images_in, to_html
from experiments.report.material import Material

# Of a picture beside a text; SVG may hold scripts.
_PICTURE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.(png|jpe?g)")


@dataclass(frozen=True)
class Document:
    """A committed file as a part of a page.

    Attributes:
        name: id on the page.
        title: its first heading, or its name.
        body: HTML.
        sources: text and link of the files it comes from.
        images: files to copy beside the page.
    """

    name: str
    title: str
    body: Markup
    sources: tuple[tuple[str, str], ...]
    images: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Effect:
    """A measured effect of a deviation at one scale.

    Attributes:
        scale: of the runs.
        text: the difference in words.
        runs: text and link of the run directories.
    """

    scale: str
    text: str
    runs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class LedgerRow:
    """A deviation with what was measured of it."""

    deviation: Deviation
    comparison: str
    effects: tuple[Effect, ...]
    missing: str
    command: str


def own_file(path: Path) -> Path:
    """A file of the results whose content a page shows.

    Raises:
        UserError: it is a link, which may show what belongs to no results.
    """
    if path.is_symlink():
        raise UserError(f"{path} is a link, whose target no report shows: put the file there")
    return path


def theory_document(material: Material, to_results: str) -> Document | None:
    """The page of the claims that need no training; None where the results have none."""
    folder = material.results_dir / "theory"
    path = folder / "README.md"
    if not path.is_file():
        return None
    text = read_text(own_file(path))
    names = [name for name in images_in(text) if _PICTURE.fullmatch(name)]
    names = [name for name in names if own_file(folder / name).is_file()]
    title, body = _without_title(text)
    return Document(
        name="theory",
        title=title or "The claims that need no training",
        body=to_html(body, lower=0, images={name: f"images/theory-{name}" for name in names}),
        sources=_links(visible(folder, "*.json"), material, to_results),
        images=tuple(folder / name for name in names),
    )


def benchmark_documents(material: Material, to_results: str) -> list[Document]:
    """Every benchmark: its Markdown as it is, its text in a box, its measurements linked."""
    folder = material.results_dir / "benchmarks"
    documents = []
    for path in sorted((*visible(folder, "*.md"), *visible(folder, "*.txt"))):
        text = read_text(own_file(path))
        sources = [path, *(p for p in [path.with_suffix(".json")] if p.is_file())]
        if path.suffix == ".md":
            title, rest = _without_title(text)
            body = to_html(rest)
        else:
            title, body = "", Markup('<pre tabindex="0">{}</pre>').format(text)
        name = path.stem.replace("_", " ")
        links = _links(sources, material, to_results)
        documents.append(Document(path.stem, title or name, body, links))
    return documents


def tuning_documents(material: Material, to_results: str) -> list[Document]:
    """Every search of settings: best and median trials, all trials and what was chosen linked."""
    documents = []
    for path in visible(material.results_dir / "tuning", "*/summary.md"):
        title, rest = _without_title(read_text(own_file(path)))
        sources = [file for file in visible(path.parent, "*") if _is_shown(file)]
        links = _links(sources, material, to_results)
        documents.append(Document(path.parent.name, title, to_html(rest), links))
    return documents


def ledger_rows(material: Material, to_results: str) -> list[LedgerRow]:
    """The ledger with measured effects; the command that measures one where nothing stands yet."""
    return [_ledger_row(row, material, to_results) for row in material.deviations]


def _ledger_row(row: Deviation, material: Material, to_results: str) -> LedgerRow:
    contrast = row.effect
    if contrast is None:
        return LedgerRow(row, "", (), row.unmeasured, "")
    comparison = f"{display_name(contrast.subject)} {quantities.MINUS} "
    comparison += f"{display_name(contrast.reference)} ({contrast.experiment})"
    effects = []
    for results in material.experiments.get(contrast.experiment, ()):
        found = measured(contrast, [results])
        if found is None:
            continue
        pair = [results.of_contestant(who) for who in (contrast.subject, contrast.reference)]
        groups = [group for groups in pair for group in groups if group.ended]
        effects.append(_effect(results, found[0], groups, material, to_results))
    return LedgerRow(row, comparison, tuple(effects), "", contrast.command)


def _effect(
    results: Results, text: str, groups: Sequence[Group], material: Material, to_results: str
) -> Effect:
    runs = tuple(
        (material.place(run).removeprefix("runs/"), f"{to_results}/{material.place(run)}")
        for group in groups
        for run in group.ended
    )
    return Effect(results.scale, text.removeprefix(f"{results.scale}: "), runs)


def _links(
    paths: Sequence[Path], material: Material, to_results: str
) -> tuple[tuple[str, str], ...]:
    places = [path.relative_to(material.results_dir).as_posix() for path in paths]
    return tuple((place, f"{to_results}/{place}") for place in places)


def _is_shown(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def _without_title(text: str) -> tuple[str, str]:
    found = re.match(r"# (?P<title>[^\n]*)\n", text)
    return (found["title"], text[found.end() :]) if found else ("", text)
