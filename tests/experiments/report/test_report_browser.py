"""The committed report in a real browser: no error, nothing cut off, tables sort, switches work."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.analysis.showing.registry_page import write_registry
from experiments.report.site import build
from tests.browser import Browser, chromium
from tests.experiments.report.report_toys import write_results

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [
    pytest.mark.skipif(
        chromium() is None, reason="no Chromium: apt-get install chromium (Debian's package)"
    ),
]
WIDTHS = (400, 1400)
# What reaches beyond the window and is in no box of its own that scrolls.
CUT_OFF = """[...document.querySelectorAll("body *")]
  .filter((e) => !e.closest(".scroll, pre, svg, .hidden, .skip, dialog"))
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5)
  .map((e) => e.tagName + ": " + e.textContent.trim().slice(0, 60))"""
# Text of a drawing that leaves the drawing, or is too small to read.
BAD_LABELS = """[...document.querySelectorAll("svg.panel")].flatMap((panel) => {
  const box = panel.getBoundingClientRect();
  return [...panel.querySelectorAll("text")].filter((text) => {
    const own = text.getBoundingClientRect();
    const outside = own.left < box.left - 0.5 || own.right > box.right + 0.5;
    return own.width && (outside || own.height < 10);
  }).map((text) => text.textContent);
})"""
# Boxes of a table that scroll must be reached by keyboard; all images need words.
UNREACHABLE = """[...document.querySelectorAll(
  ".scroll:not([tabindex]), img:not([alt]), svg.panel:not([aria-label]),\
  th:not([scope])")].length"""
COLUMN = """[...document.querySelectorAll("{table} tbody tr")].filter((row) => !row.hidden)
  .map((row) => row.cells[{column}].dataset.sort)"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of the committed results, judged as they are now."""
    results = tmp_path_factory.mktemp("results")
    for path in (ROOT / "results").iterdir():
        if path.name not in ("summary", "report"):
            (results / path.name).symlink_to(path)
    (results / "summary").mkdir()
    write_registry(results)
    build(results, results / "report")
    return results / "report"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def visible(page, selector):
    """How many elements take room on the page."""
    return page.evaluate(
        f"[...document.querySelectorAll('{selector}')].map((e) => e.getBoundingClientRect())"
        ".filter((box) => box.width + box.height > 0).length"
    )


def test_no_page_has_an_error_or_is_cut_off_at_any_width(browser, report):
    pages = sorted(report.glob("*.html"))
    assert len(pages) >= 5  # claims, an experiment, theory, benchmarks, deviations
    for path in pages:
        page = browser.open(path, WIDTHS[0])
        for width in WIDTHS:
            page.resize(width, 900)
            where = f"{path.name} at {width} pixels"
            assert page.evaluate("document.documentElement.scrollWidth") <= width, where
            assert page.evaluate(CUT_OFF) == [], where
            assert page.evaluate(BAD_LABELS) == [], where
        assert page.evaluate(UNREACHABLE) == 0, path.name
        assert page.errors == [], path.name
        page.close()


def test_a_table_sorts_both_ways_with_nothing_last(browser, report):
    page = browser.open(report / "digits_mlp.html")
    button = "#full-runs th:nth-child(8) button"  # seconds to the target, which KFAC missed once
    script = COLUMN.format(table="#full-runs", column=7)

    def shown():
        return [float(value.replace("Infinity", "inf")) for value in page.evaluate(script)]

    before = shown()
    assert before != sorted(before)
    page.click(button)
    assert shown() == sorted(before)
    page.click(button)
    assert shown() == sorted(before, reverse=True)
    header = "document.querySelector('#full-runs th:nth-child(8)')"
    assert page.evaluate(f"{header}.getAttribute('aria-sort')") == "descending"
    page.close()


def test_claims_are_filtered_searched_and_sorted(browser, report):
    page = browser.open(report / "index.html")
    total = visible(page, "#claims tbody tr")
    assert (
        page.evaluate("document.querySelector('.count').textContent") == f"{total} of {total} shown"
    )
    page.click('#filters input[value="not run"]')
    shown = visible(page, "#claims tbody tr")
    assert shown == total - page.evaluate(
        "document.querySelectorAll('#claims tr[data-verdict=\"not run\"]').length"
    )
    assert 0 < shown < total
    page.click('#filters input[type="search"]')
    page.type("Lemma 1")
    found = page.evaluate(
        "[...document.querySelectorAll('#claims tbody tr')].filter((r) => !r.hidden)"
        ".map((r) => r.textContent.toLowerCase())"
    )
    assert 0 < len(found) < shown and all("lemma" in text and "1" in text for text in found)
    page.click("#claims th:nth-child(2) button")
    order = [int(v) for v in page.evaluate(COLUMN.format(table="#claims", column=1))]
    assert order == sorted(order)
    assert page.errors == []
    page.close()


def test_a_phone_sorts_by_its_own_menu(browser, report):
    page = browser.open(report / "index.html", 400)
    assert visible(page, "#claims thead") == 0 and visible(page, ".sorter") == 1
    page.evaluate(
        "(() => { const s = document.querySelector('.sorter select'); s.value = '1 descending';"
        "s.dispatchEvent(new Event('change')); })()"
    )
    order = [int(v) for v in page.evaluate(COLUMN.format(table="#claims", column=1))]
    assert order == sorted(order, reverse=True) and len(set(order)) > 1
    page.close()


def test_the_switches_of_the_curves_work(browser, report):
    page = browser.open(report / "digits_mlp.html")
    assert visible(page, ".training svg") == 3
    titles = "[...document.querySelectorAll('.training svg')].filter((e) => e.checkVisibility())"
    axis = f"{titles}.map((e) => e.querySelector('.label').textContent)"
    assert page.evaluate(axis) == ["epochs"] * 3
    page.click('.axis input[value="train_time_s"]')
    assert page.evaluate(axis) == ["training time, seconds"] * 3

    assert visible(page, ".training .seed") == 0 and visible(page, ".training .band") > 0
    page.click('.chart-controls input[value="seeds"]')
    seeds = visible(page, ".training .seed")
    assert seeds == 3 * page.evaluate("document.querySelectorAll('.source li').length")
    page.click('.chart-controls input[value="bands"]')
    assert visible(page, ".training .band") == 0
    page.click('.legend input[value="g0"]')
    assert visible(page, "svg .g0") == 0 and visible(page, ".training .g1") == 3
    assert visible(page, ".training .seed") < seeds
    assert page.errors == []
    page.close()


def test_a_figure_of_the_configs_chooses_its_lines(browser, tmp_path):
    folder = write_results(tmp_path)
    build(folder, folder / "report")
    page = browser.open(folder / "report" / "toy.html")
    lines = "[...document.querySelectorAll('#reduced .legend label')]"
    lines += (
        ".filter((e) => e.querySelector('input').checked).map((e) => e.innerText.split('\\n')[0])"
    )
    assert len(page.evaluate(lines)) == 4
    page.click("#reduced .subsets input", index=1)
    assert sorted(text.strip() for text in page.evaluate(lines)) == ["SGD", "mL-BFGS"]
    assert visible(page, "#reduced .training .cross") == 0
    page.click("#reduced .subsets input", index=2)
    assert [text.strip() for text in page.evaluate(lines)] == ["Adam"]
    assert visible(page, "#reduced .training .cross") > 0  # it diverged
    assert page.errors == []
    page.close()


def test_a_number_tells_its_runs_and_its_command(browser, report):
    page = browser.open(report / "digits_mlp.html")
    assert visible(page, "dialog") == 0
    page.click("#main section > .scroll table a.n", index=1)
    assert visible(page, "dialog") == 1
    links = page.evaluate("[...document.querySelectorAll('dialog li a')].map((a) => a.href)")
    assert len(links) == 3 and all("/runs/digits_mlp/sgd/full-seed" in link for link in links)
    command = page.evaluate("document.querySelector('dialog code').textContent")
    assert command.startswith("python -m experiments.reproduce digits_mlp --optimizers sgd --seeds")
    page.click("dialog button")
    assert visible(page, "dialog") == 0
    page.close()


def test_without_scripts_everything_is_still_there(browser, report):
    page = browser.open(report / "digits_mlp.html", scripts=False)
    assert visible(page, ".training svg") == 9 and visible(page, "#main section table") >= 4
    assert visible(page, "fieldset.axis") == 0
    page.close()


def test_print_and_dark_keep_what_is_read(browser, report):
    page = browser.open(report / "digits_mlp.html", medium="print")
    assert visible(page, ".training svg") == 9 and visible(page, "nav, fieldset.axis") == 0
    page.close()
    page = browser.open(report / "index.html", prefers_color_scheme="dark")
    light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert max(page.evaluate(light)) < 60
    page.close()


def test_contrast_of_text_is_enough_in_light_and_dark(browser, report):
    script = """(() => {
      const lum = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map((v) => {
        const s = v / 255; return s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4; });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const ground = (e) => { for (; e; e = e.parentElement) {
        const c = getComputedStyle(e).backgroundColor; if (!c.endsWith(", 0)")) return c; }
        return "rgb(255, 255, 255)"; };
      return [...document.querySelectorAll("p, small, td, th, a, .verdict, summary, legend")]
        .filter((e) => e.checkVisibility() && e.textContent.trim())
        .map((e) => { const [a, b] = [lum(getComputedStyle(e).color), lum(ground(e))]
          .sort((x, y) => y - x); return [(a + 0.05) / (b + 0.05), e.className, e.textContent]; })
        .filter(([ratio]) => ratio < 4.5).slice(0, 5); })()"""
    for scheme in ("light", "dark"):
        page = browser.open(report / "index.html", prefers_color_scheme=scheme)
        assert page.evaluate(script) == [], scheme
        page.close()
