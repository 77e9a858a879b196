"""Results of somebody else: what stands in them is text on the pages, and never a part of them."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path

import pytest
import yaml

from experiments.analysis.showing.registry_page import write_registry
from experiments.errors import UserError
from experiments.report.site import build
from tests.browser import Browser, chromium
from tests.experiments.analysis.run_factory import FakeRun, curvature_record, write_runs

# A tag without a slash, so that it can be a name of a folder; and one with everything.
NAME = '"><img src=x onerror=window.pwned=1>'
TEXT = (
    "<script>window.pwned=2</script>'\"><svg onload=window.pwned=3></svg><base href='//x.test/'>"
    "<meta http-equiv=refresh content='0;url=//x.test'><!-- <style>*{display:none}</style>"
)
MARKDOWN = f"""# {TEXT}

{TEXT}

[a link](javascript:window.pwned=4) [data](data:text/html,<script>alert(1)</script>)
<javascript:window.pwned=5> <a href="javascript:window.pwned=6">x</a>

<details open ontoggle="window.pwned=7"><summary>{TEXT}</summary>

| a | {TEXT} |
|---|---|
| `{TEXT}` | \ue0000\ue001 \ue0020\ue003 |

</details>

<details><summary>{TEXT}</summary>

{TEXT}
</details>
"""
#: What may be no name of an experiment or a contestant, and what may.
NO_NAMES = ("javascript:alert(1)", NAME, "a#b?c%20d&e", "data:text,x")
EXPERIMENTS = ("on.error-1", "javascript", "a+b", "data_text.x")
ARM = "not-sgd"
OURS = {"report.css", "report.js"}


def hostile_results(folder: Path) -> Path:
    for experiment in EXPERIMENTS:
        roles = {"baseline": ARM, "figures": {TEXT: [ARM], "other": ["sgd"]}}
        extra = {
            "dataset": {"name": TEXT},
            "model": {"name": TEXT, "depth": TEXT},
            "train": {"batch_size": TEXT, "epochs": TEXT},
        }
        for arm in (ARM, "sgd", "javascript.x"):
            for seed in range(2):
                run = FakeRun(
                    arm=arm,
                    seed=seed,
                    experiment=experiment,
                    roles=roles,
                    extra_config=extra,
                    settings={"lr": 0.1, "blocks": TEXT if seed else "one"},
                    message=TEXT,
                    status=("done", "running")[seed],
                    hardware={"cpu": TEXT, "gpu": None},
                    curvature=[curvature_record(100)],
                )
                path = run.write(folder)
                meta = json.loads((path / "meta.json").read_text())
                meta["git"] = {"commit": TEXT, "dirty": True}
                (path / "meta.json").write_text(json.dumps(meta))
    claim = {
        **{"row": TEXT, "paper": "mL-BFGS", "place": TEXT, "statement": TEXT, "note": TEXT},
        **{"experiment": EXPERIMENTS[0], "metric": "final_top1", "kind": "ordering"},
        **{"optimizer": ARM, "reference": "sgd", "rule": "above"},
    }
    (folder / "claims.yaml").write_text(yaml.safe_dump({"hostile": claim}))
    (folder / "predictions.json").write_text(json.dumps({"machine": TEXT, "runs": {}}))
    write_registry(folder, folder / "claims.yaml")
    for place in ("theory/README.md", "benchmarks/b.md", f"benchmarks/{NAME}.md"):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text(MARKDOWN)
    (folder / "benchmarks" / "b.txt").write_text(TEXT)
    empty = {"subject": NAME, "settings": {}, "quantities": {}, "tables": [], "series": {}}
    (folder / "theory" / f"{NAME}.json").write_text(json.dumps({**empty, "notes": [TEXT]}))
    (folder / "tuning" / NAME).mkdir(parents=True)
    (folder / "tuning" / NAME / "summary.md").write_text(MARKDOWN)
    entry = dict.fromkeys(("printed", "released", "ours", "why", "unmeasured"), TEXT)
    entry = {**entry, "switch": [TEXT], "sources": []}
    (folder / "deviations.yaml").write_text(yaml.safe_dump({"hostile": entry}))
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = hostile_results(tmp_path_factory.mktemp("hostile"))
    build(folder, folder / "report")
    return folder / "report"


@pytest.mark.parametrize("name", NO_NAMES)
@pytest.mark.parametrize("role", ["experiment", "arm"])
def test_a_name_that_is_no_name_ends_the_report_in_one_line(name, role, tmp_path):
    write_runs(tmp_path / "results", FakeRun(**{"optimizer": "sgd", role: name}))
    with pytest.raises(UserError, match="letters, digits and") as told:
        build(tmp_path / "results", tmp_path / "report")
    assert "\n" not in str(told.value)


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_no_tag_attribute_or_address_comes_from_the_results(report):
    pages = sorted(report.glob("*.html"))
    assert len(pages) == 1 + len(EXPERIMENTS) + 4
    for path in pages:
        tags = Tags()
        text = path.read_text("utf-8")
        tags.feed(text)
        assert "window.pwned=2" in text.replace("&lt;", "<"), path.name  # it is there, as text
        scripts = [attributes for tag, attributes in tags.found if tag == "script"]
        assert [attributes["src"] for attributes in scripts] == ["report.js"]
        assert [tag for tag, _ in tags.found].count("meta") == 4, path.name
        for tag, attributes in tags.found:
            assert tag not in ("base", "style", "iframe", "object", "embed", "img"), path.name
            assert not [name for name in attributes if name.startswith("on")], (path.name, tag)
            for address in (attributes.get("href") or "", attributes.get("src") or ""):
                assert ":" not in address and not address.startswith("//"), (path.name, address)


@pytest.mark.skipif(chromium() is None, reason="no Chromium: apt-get install chromium")
def test_a_browser_runs_nothing_of_the_results(report, tmp_path):
    with Browser(tmp_path) as browser:
        for path in sorted(report.glob("*.html")):
            page = browser.open(path)
            assert page.errors == [], path.name
            assert page.evaluate("window.pwned === undefined && document.baseURI === location.href")
            links = page.evaluate("[...document.querySelectorAll('[href]')].map((e) => e.href)")
            assert links and all(link.startswith("file:///") for link in links), path.name
            # the page's own script does run
            assert page.evaluate("document.documentElement.classList.contains('js')")
            page.close()


@pytest.mark.skipif(chromium() is None, reason="no Chromium: apt-get install chromium")
def test_the_policy_stops_what_would_still_get_in(report, tmp_path):
    """Each of these runs or loads where the page has no policy."""
    intruders = {
        "inline script": "const s = document.createElement('script');"
        "s.textContent = 'window.pwned = 1'; document.body.append(s)",
        "script of a file": "const s = document.createElement('script');"
        f"s.src = '{(tmp_path / 'evil.js').as_uri()}'; document.body.append(s)",
        "handler": "document.body.insertAdjacentHTML('beforeend',"
        '\'<img src="nothing.png" onerror="window.pwned = 1">\')',
        "style": "const s = document.createElement('style');"
        "s.textContent = 'main { display: none }'; document.body.append(s);"
        "window.pwned = getComputedStyle(document.querySelector('main')).display === 'none' || "
        "undefined",
        "address of a script": "const a = document.createElement('a');"
        "a.href = 'javascript:window.pwned=1'; document.body.append(a); a.click()",
    }
    (tmp_path / "evil.js").write_text("window.pwned = 1")
    wait = "new Promise((done) => setTimeout(() => done(String(window.pwned)), 300))"
    bare = report / "bare.html"
    policy = '<meta http-equiv="Content-Security-Policy"'
    text = (report / "index.html").read_text("utf-8")
    bare.write_text(text.replace(policy, "<meta http-equiv=x"), "utf-8")
    with Browser(tmp_path) as browser:
        for name, script in intruders.items():
            found = []
            for path in (report / "index.html", bare):
                page = browser.open(path)
                page.evaluate(f"(() => {{ {script} }})()")
                answer = page.call(
                    "Runtime.evaluate", expression=wait, awaitPromise=True, returnByValue=True
                )
                found.append(answer["result"]["value"])
                page.close()
            assert found[0] == "undefined" and found[1] != "undefined", (name, found)
    bare.unlink()


@pytest.mark.parametrize("name", ["index", "theory", "ledger", "tuning", "benchmarks"])
def test_an_experiment_named_as_a_page_is_refused(tmp_path, name):
    write_runs(tmp_path, FakeRun(experiment=name))
    (tmp_path / "claims.yaml").write_text("{}\n")
    (tmp_path / "predictions.json").write_text(json.dumps({"machine": "m", "runs": {}}))
    for place in ("theory/README.md", "benchmarks/b.md", "tuning/t/summary.md"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).write_text("# title\n")
    entry = dict.fromkeys(("printed", "released", "ours", "why", "unmeasured"), "text")
    ledger = {"entry": {**entry, "switch": [], "sources": []}}
    (tmp_path / "deviations.yaml").write_text(yaml.safe_dump(ledger))
    write_registry(tmp_path, tmp_path / "claims.yaml")
    with pytest.raises(UserError, match=f"is named '{name}'"):
        build(tmp_path, tmp_path / "report")


@pytest.mark.parametrize(
    "place", ["theory/README.md", "benchmarks/b.md", "benchmarks/b.txt", "tuning/t/summary.md"]
)
def test_a_text_that_is_a_link_is_refused(tmp_path, place):
    secret = tmp_path / "secret"
    secret.write_text("SECRET")
    results = tmp_path / "results"
    hostile_results(results)
    (results / place).parent.mkdir(exist_ok=True)
    (results / place).unlink(missing_ok=True)
    (results / place).symlink_to(secret)
    with pytest.raises(UserError, match="is a link"):
        build(results, tmp_path / "report")
    assert not list((tmp_path / "report").glob("*.html"))


@pytest.mark.parametrize("name", ["../../secret.png", "{secret}", "evil.svg", "page.html", "l.png"])
def test_only_pictures_beside_the_text_are_copied(tmp_path, name):
    secret = tmp_path / "secret.png"
    secret.write_text("SECRET")
    results = tmp_path / "results"
    hostile_results(results)
    (results / "theory" / "evil.svg").write_text("<svg onload='window.pwned=1'></svg>")
    (results / "theory" / "page.html").write_text("<script>window.pwned=1</script>")
    (results / "theory" / "l.png").symlink_to(secret)
    shown = name.format(secret=secret)
    (results / "theory" / "README.md").write_text(f"# t\n\n![x]({shown})\n")
    with pytest.raises(UserError, match=r"leads nowhere|is a link"):
        build(results, tmp_path / "report")
    assert not (tmp_path / "report" / "images").exists()
