"""The tree of pages: what is on which page, rendered, written, its links checked."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

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
from experiments.runs.owned_folder import OwnedFolder

_HERE = Path(__file__).resolve().parent
STATIC = ("report.css", "report.js")
# What a page may load and run: its own style and script, which carry the number `{nonce}`, and
# images. Nothing that found its way into a page does, whatever it is.
POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
    "style-src-attr 'unsafe-inline'; img-src 'self' file:; base-uri 'none'; form-action 'none'"
)
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
        results_dir: the directory that holds `runs/` and `summary/claims.json`; what stands in it
            may come from anybody.
        out_dir: where the tree goes: a new or empty folder, or an earlier report, which is
            replaced.

    Returns:
        The files written.

    Raises:
        UserError: the results cannot be read, contradict the prose, or the directory cannot be
            written or holds something else.
    """
    material = load_material(results_dir)
    to_results = Path(os.path.relpath(results_dir, out_dir)).as_posix()
    theory = theory_document(material, to_results)
    pages = _pages(material, to_results, theory)
    environment = _environment()
    nonce = hashlib.sha256(f"nonce {material.digest()}".encode()).hexdigest()[:32]
    shared = {"pages": pages, "summary": _summary(material), "nonce": nonce}
    shared["policy"] = POLICY.format(nonce=nonce)
    for page in pages:
        if sum(page.file == other.file for other in pages) > 1:
            raise UserError(
                f"an experiment of {results_dir} is named {page.file.removesuffix('.html')!r}, as "
                "a page of the report is: rename its folder"
            )
    texts = {
        page.file: environment.get_template(page.template).render(
            page=page, **shared, **page.values
        )
        for page in pages
    }
    files: dict[str, str | bytes] = {**texts}
    files |= {name: (_HERE / "static" / name).read_bytes() for name in STATIC}
    for path in theory.images if theory else ():
        files[f"images/theory-{path.name}"] = path.read_bytes()
    _check_links(texts, set(files), out_dir)
    folder = OwnedFolder(out_dir, alone=True)
    return list(folder.replace(files, outdated=lambda name: True))


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
    environment.filters["link"] = link
    environment.filters["inline"] = inline
    return environment


def link(path: str) -> str:
    """The address of a file by its path: no character of a name means anything in it."""
    return quote(path, safe="/")


def _check_links(texts: Mapping[str, str], files: set[str], out_dir: Path) -> None:
    """Every link is relative, and leads to a file of the tree or to an existing one outside."""
    for name, text in texts.items():
        ids = set(_ID.findall(text))
        named = {word for found in _SOURCES.findall(text) for word in found.split()}
        for anchor in {*_ANCHOR.findall(text), *named} - ids:
            raise UserError(f"{name}: the link #{anchor} leads nowhere")
        for link in sorted(set(_LINK.findall(text))):
            target = unquote(link.partition("#")[0])
            there = os.path.exists(os.path.normpath(out_dir / target))
            if target not in files and (target.startswith("/") or not there):
                raise UserError(f"{name}: the link {link} leads nowhere")
