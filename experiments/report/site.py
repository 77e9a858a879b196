"""The tree of pages: what is on which page, rendered, written, its links checked."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from experiments.analysis.measuring.quantities import duration
from experiments.errors import UserError
from experiments.report.claims_page import PAPERS, SYMBOLS, claim_rows, filters, tally
from experiments.report.experiment_page import section
from experiments.report.judged import OUTCOMES
from experiments.report.markdown import inline
from experiments.report.material import Material, load_material
from experiments.report.other_pages import (
    Document,
    benchmark_documents,
    ledger_rows,
    theory_document,
    tuning_documents,
)
from experiments.report.prose import experiment_prose

_HERE = Path(__file__).resolve().parent
STATIC = ("report.css", "report.js")
_LINK = re.compile(r'\s(?:href|src)="([^"#][^"]*)"')
_ANCHOR = re.compile(r'href="#([^"]+)"')
_SOURCES = re.compile(r'data-src="([^"]+)"')
_ID = re.compile(r'\bid="([^"]+)"')


@dataclass(frozen=True)
class Page:
    """One page.

    Attributes:
        file: its name.
        title: of the page and of its entry in the navigation.
        group: heading in the navigation.
        template: what renders it.
        values: what the template shows.
    """

    file: str
    title: str
    group: str
    template: str
    values: Mapping[str, Any]


def build(results_dir: Path, out_dir: Path) -> list[Path]:
    """Write the report.

    Args:
        results_dir: the directory that holds `runs/` and `summary/claims.json`.
        out_dir: where the tree goes; what an earlier report left there is replaced.

    Returns:
        The files written.

    Raises:
        UserError: the results cannot be read, contradict the prose, or the directory cannot be
            written.
    """
    material = load_material(results_dir)
    to_results = Path(os.path.relpath(results_dir, out_dir)).as_posix()
    theory = theory_document(material, to_results)
    pages = _pages(material, to_results, theory)
    environment = _environment()
    shared = {"pages": pages, "summary": _summary(material)}
    assert len({page.file for page in pages}) == len(pages), "two pages of one name"
    texts = {
        page.file: environment.get_template(page.template).render(
            page=page, **shared, **page.values
        )
        for page in pages
    }
    images = {f"images/theory-{p.name}": p for p in (theory.images if theory else ())}
    _check_links(texts, {*texts, *STATIC, *images}, out_dir)
    return _write(out_dir, texts, images)


def _pages(material: Material, to_results: str, theory: Document | None) -> list[Page]:
    rows = claim_rows(material, material.claims)
    shared = {"symbols": SYMBOLS, "papers": PAPERS, "outcomes": OUTCOMES, "to_results": to_results}
    first = {"rows": rows, "tally": tally(rows), "filters": filters(rows)}
    pages = [Page("index.html", "Claims and verdicts", "", "index.html", {**shared, **first})]
    for name, results in material.experiments.items():
        values = {
            **shared,
            "name": name,
            "prose": experiment_prose(name, results),
            "sections": [section(material, entry, to_results) for entry in results],
            "rows": claim_rows(material, material.claims_about(name)),
        }
        pages.append(Page(f"{name}.html", name, "Experiments", "experiment.html", values))
    committed = {
        "Theory": [theory] if theory is not None else [],
        "Tuning": tuning_documents(material, to_results),
        "Benchmarks": benchmark_documents(material, to_results),
    }
    for title, documents in committed.items():
        if documents:
            file, values = f"{title.lower()}.html", {"documents": documents}
            pages.append(Page(file, title, "More", "document.html", values))
    if material.deviations:
        values = {"ledger": ledger_rows(material, to_results)}
        pages.append(Page("ledger.html", "Deviations", "More", "ledger.html", values))
    return pages


def _summary(material: Material) -> dict[str, Any]:
    runs = material.runs
    return {
        "runs": len(runs),
        "experiments": len(material.experiments),
        "training": duration(sum(run.train_time_s for run in runs)),
        "fingerprint": material.fingerprint(),
    }


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    environment.filters["inline"] = inline
    return environment


def _check_links(texts: Mapping[str, str], files: set[str], out_dir: Path) -> None:
    """Every link leads to a file of the tree or to an existing file outside of it."""
    for name, text in texts.items():
        ids = set(_ID.findall(text))
        named = {word for found in _SOURCES.findall(text) for word in found.split()}
        for anchor in {*_ANCHOR.findall(text), *named} - ids:
            raise UserError(f"{name}: the link #{anchor} leads nowhere")
        for link in sorted(set(_LINK.findall(text))):
            target = unquote(link.partition("#")[0])
            if target not in files and not os.path.exists(os.path.normpath(out_dir / target)):
                raise UserError(f"{name}: the link {link} leads nowhere")


def _write(out_dir: Path, texts: Mapping[str, str], images: Mapping[str, Path]) -> list[Path]:
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for old in (*out_dir.glob("*.html"), *out_dir.glob("images/*")):
            old.unlink()
        written = []
        for name, text in texts.items():
            (out_dir / name).write_text(text, encoding="utf-8")
            written.append(out_dir / name)
        for name, source in (*((s, _HERE / "static" / s) for s in STATIC), *images.items()):
            (out_dir / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, out_dir / name)
            written.append(out_dir / name)
    except OSError as error:
        raise UserError(
            f"cannot write to {out_dir}: {error.strerror}; name another --out"
        ) from error
    return written
