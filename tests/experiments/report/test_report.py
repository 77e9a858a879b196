"""The pages: numbers found by hand, sources that exist, what stops the build."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from experiments.analysis.judging.registry import results_of
from experiments.analysis.showing.registry_page import write_registry
from experiments.contestants import options
from experiments.errors import UserError
from experiments.report import prose
from experiments.report.__main__ import main
from experiments.report.cells import sort_key
from experiments.report.judged import refuse_outdated
from experiments.report.site import build
from experiments.report.words import findings
from tests.experiments.analysis.run_factory import FakeRun, write_runs
from tests.experiments.report.report_toys import ROLES, write_results

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return write_results(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def pages(results):
    written = build(results, results / "report")
    return {path.name: path.read_text("utf-8") for path in written if path.suffix == ".html"}


def row_of(page, claim):
    (row,) = re.findall(rf'<tr id="{claim}".*?</tr>', page, re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", row)).strip()


def test_a_claim_says_verdict_scale_paper_ours_and_cost(pages):
    row = row_of(pages["index.html"], "ordering-reduced")
    # mean of 2, 2.5, 2.5 is 2.333, s = 0.2887, t_2 = 4.303: half width 0.717; 6 runs of 30 s
    for part in (
        "✓ reproduced",
        "reduced",
        "&gt; 0",
        "2.33 points [1.62, 3.05]",
        "n = 3",
        "3 min 00 s",
    ):
        assert part in row
    assert row.startswith("better than &lt;SGD&gt;")
    missed = row_of(pages["index.html"], "accuracy-full")
    assert "? inconclusive" in missed and "94.10 %" in missed and "allowed ± 0.5" in missed
    # its runs at reduced scale: (91 + 91.5 + 92.5) / 3, s = 0.7638, half width 1.897
    assert "not judged: 91.67 % [89.77, 93.56] at reduced scale (n = 3)" in missed
    assert "accuracy-reduced" not in pages["index.html"]
    never = row_of(pages["index.html"], "mine-full")  # three seeds of two, a minute each
    assert "○ not run" in never and "about 6 min 00 s predicted for a fast machine" in never


def test_claims_that_are_settled_stand_before_open_ones_and_those_never_run(pages):
    rows = re.findall(r'<tr id="(\S+)".*?data-verdict="([^"]*)"', pages["index.html"], re.S)
    places = {name: place for place, (name, _) in enumerate(rows)}
    assert places["ordering-reduced"] < places["close-reduced"] < places["mine-full"]
    order = ["reproduced", "inconclusive", "not run"]
    assert [verdict for _, verdict in rows] == sorted((v for _, v in rows), key=order.index)


def test_every_run_is_linked_from_its_page_and_every_link_exists(results, pages):
    tables = re.findall(
        r'<table[^>]* id="(?:reduced|full)-runs">.*?</table>', pages["toy.html"], re.S
    )
    links = set(re.findall(r'href="(\.\./runs/[^"]*)"', "".join(tables)))
    runs = {f"../{p.parent.relative_to(results)}" for p in results.glob("runs/*/*/*/meta.json")}
    assert links == runs and len(runs) == 11
    for name, page in pages.items():
        for link in re.findall(r'\shref="([^"#]+)"', page):
            assert (results / "report" / link).exists(), f"{name}: {link}"


def test_numbers_of_a_table_name_the_blocks_that_list_their_runs(pages):
    page = pages["toy.html"]
    sources = re.findall(r'data-src="([^"]*)">1\.500 \[1\.500, 1\.500\]<', page)[0]
    blocks = [
        re.findall(rf'<div class="source" id="{name}">(.*?)</div>', page, re.S)[0]
        for name in sources.split()
    ]
    assert ["<h4>mL-BFGS" in block for block in blocks] == [True, False]  # the speed-up
    assert "<h4>SGD" in blocks[1] and blocks[1].count("../runs/toy/sgd/reduced-seed") == 3
    assert "experiments.reproduce toy --optimizers sgd --seeds 0,1,2 --scale reduced" in blocks[1]


def test_words_tell_contestants_apart_by_intervals_alone(pages):
    text = pages["toy.html"]
    assert "above SGD in final top-1: mL-BFGS (2.33 [1.62, 3.05] points)" in text
    # mean 0.033, s = 0.503: half width 1.25
    told = "not told apart from SGD in final top-1: KFAC (0.03 [−1.22, 1.28] points)"
    assert told in text
    assert "missed test_top1 &gt;= 90: Adam (1 of 1)" in text
    assert "adam/reduced-seed0" in text and "diverged" in text
    assert "cos(d, g) 0.89 (median): a direction of its own, near the gradient" in text


def test_a_target_that_the_baseline_never_reaches_is_told_without_ratios(tmp_path):
    roles = {"baseline": "sgd"}
    target = {"metric": "test_top1", "value": 90.0}
    for seed in range(2):
        slow = FakeRun("sgd", seed, top1=(70.0, 80.0, 85.0), target=target, roles=roles)
        fast = FakeRun("adam", seed, top1=(70.0, 80.0, 91.0 + seed), target=target, roles=roles)
        write_runs(tmp_path, slow, fast)
    (results,) = results_of(tmp_path, "toy")
    told = findings(results)
    assert "reached test_top1 >= 90, which no run of SGD did: Adam" in told
    assert "missed test_top1 >= 90: SGD (2 of 2)" in told
    assert not any("faster" in line for line in told)


def test_who_never_reaches_the_target_is_slower_in_no_run(tmp_path):
    for seed in range(6):
        never = FakeRun("adam", seed, top1=(70.0, 80.0, 85.0))
        late = FakeRun("kfac", seed, top1=(70.0, 91.0, 92.0), steps_per_epoch=200)
        write_runs(tmp_path, FakeRun("sgd", seed, top1=(91.0, 92.0, 92.0)), never, late)
    (results,) = results_of(tmp_path, "toy")
    told = "slower than SGD to test_top1 >= 90, steps: Adam (in no run), KFAC (0.250 [0.250, 0.250]"
    told += " times)"
    assert told in findings(results)


def test_findings_compare_within_a_family(tmp_path):
    """The second figure lacks the baseline: its contestants are compared with its first."""
    roles = {"baseline": "a", "figures": {"one": ["a", "b"], "two": ["c", "d"]}}
    finals = {"a": 60.0, "b": 70.0, "c": 80.0, "d": 85.0}
    for number, (arm, top1) in enumerate(finals.items()):
        for seed in range(2):
            settings = {"lr": 0.1 + number}
            run = FakeRun(arm=arm, seed=seed, top1=(1.0, 2.0, top1), settings=settings, roles=roles)
            write_runs(tmp_path, run)
    (results,) = results_of(tmp_path, "toy")
    told = findings(results)
    assert "above a in final top-1: b (10.00 [10.00, 10.00] points)" in told
    assert "above c in final top-1: d (5.00 [5.00, 5.00] points)" in told
    highest = [line.partition(":")[0] for line in told if line.startswith("highest mean")]
    assert highest == [f"highest mean final top-1 of {name} and those beside it" for name in "ac"]


def test_of_equals_the_baseline_is_the_highest(tmp_path):
    for arm, lr in {"aa": 0.1, "b": 0.2}.items():
        write_runs(tmp_path, FakeRun(arm=arm, settings={"lr": lr}, roles={"baseline": "b"}))
    (results,) = results_of(tmp_path, "toy")
    told = [line for line in findings(results) if line.startswith("highest mean")]
    assert told == ["highest mean final top-1: b, 91.00 % (n = 1)"]


def test_seed_that_diverges_at_once_leaves_medians_to_compare(tmp_path):
    """Without an accuracy it counts as below every number, so that there is no mean."""
    for seed, top1 in enumerate((90.0, 91.0, None)):
        gone = {"top1": (None,), "loss": (90.0,), "status": "diverged"}
        fast = gone if top1 is None else {"top1": (1.0, 2.0, top1)}
        write_runs(tmp_path, FakeRun("adam", seed, **fast))
        write_runs(tmp_path, FakeRun("sgd", seed, top1=(1.0, 2.0, 80.0 + seed)))
    (results,) = results_of(tmp_path, "toy")
    told = findings(results)[1]
    assert told == "highest median final top-1: Adam, 90.00 %; the baseline SGD has 81.00 %"
    assert any(
        line.endswith("diverged; counts with none: below every other") for line in results.problems
    )


def test_unfinished_run_is_drawn_told_and_linked_and_counts_nowhere(pages, tmp_path):
    folder = write_results(tmp_path)
    begun = {"status": "running", "top1": (70.0, 80.5), "loss": (2.0, 1.0)}
    write_runs(folder, FakeRun("shampoo", 4, roles=ROLES, **begun))
    write_registry(folder, folder / "claims.yaml")
    trained = (folder / "summary" / "verdicts.md").read_text("utf-8")
    assert "| `toy` | reduced | 4 | 10, 1 unfinished |" in trained
    written = build(folder, folder / "report")
    (page,) = (path.read_text("utf-8") for path in written if path.name == "toy.html")
    assert "Thin line with a ring: a seed that has not ended" in page
    assert "<title>seed 4 so far, epoch 2 of 30: 80.5; not counted</title>" in page
    assert "Shampoo, seed 4 so far, from 70 to 80.5" in page
    assert re.search(r"Shampoo <small>n = 0</small>", page)
    told = "unfinished at epoch 2 of 30 (running, or killed without a trace); not counted"
    assert told in page
    (source,) = re.findall(r'<div class="source"[^>]*><h4>Shampoo</h4>.*?</div>', page, re.S)
    assert "/shampoo/reduced-seed4-" in source
    assert not any("with a ring" in page or 'class="ring"' in page for page in pages.values())


def test_nobody_is_highest_alone_or_compared_with_what_has_not_ended(tmp_path):
    begun = FakeRun("sgd", status="running", roles={"baseline": "sgd"})
    write_runs(tmp_path, begun, FakeRun("adam", roles={"baseline": "sgd"}))
    (results,) = results_of(tmp_path, "toy")
    told = findings(results)
    reached = "reached test_top1 >= 90: Adam"
    assert told[0].startswith("2 runs (1 unfinished) of 2 contestants, ")
    assert told[1:] == ["mean final top-1: Adam, 91.00 % (n = 1)", reached]


def test_learning_rates_of_a_search_are_told_with_its_trials(tmp_path):
    folder = write_results(tmp_path)
    for path in folder.glob("runs/toy/sgd/reduced-*"):
        shutil.rmtree(path)
    tuned = {"search": "toy-reduced", "settings": {"optimizer": {"lr": 0.0312}}}
    for optimizer, rate in (("sgd", 0.0312), ("adam", 0.5)):  # the second: typed by a user
        roles = {"tuned": tuned, "baseline": "sgd"}
        write_runs(folder, FakeRun(optimizer, 1, settings={"lr": rate}, roles=roles))
    search = folder / "tuning" / "toy-reduced"
    search.mkdir(parents=True)
    (search / "summary.md").write_text("# Tuning of toy\n\n| trials |\n| --- |\n| 5 |\n")
    (search / "trials.csv").write_text("optimizer,trial\n")
    (search / "runs").mkdir()
    write_registry(folder, folder / "claims.yaml")
    build(folder, folder / "report")
    page = (folder / "report" / "toy.html").read_text("utf-8")
    assert "<dt>learning rates</dt><dd>SGD 0.0312 (search toy-reduced)</dd>" in page
    page = (folder / "report" / "tuning.html").read_text("utf-8")
    assert "<h1>Tuning of toy</h1>" in page and "<td>5</td>" in page
    assert re.findall(r'href="(\.\./tuning/[^"]*)"', page) == [
        "../tuning/toy-reduced/summary.md",
        "../tuning/toy-reduced/trials.csv",
    ]


def test_the_same_results_give_the_same_bytes_wherever_they_lie(results, pages, tmp_path):
    copy = shutil.copytree(results, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("report"))
    build(copy, copy / "report")
    for name, page in pages.items():
        assert (copy / "report" / name).read_text("utf-8") == page


def test_an_outdated_verdict_stops_the_build(tmp_path, capsys):
    folder = write_results(tmp_path)
    FakeRun("mlbfgs", 3, top1=(1.0, 1.0, 1.0)).write(folder)
    assert main(["--results-dir", str(folder)]) == 2
    assert "differs at ordering: write it with" in capsys.readouterr().err
    assert not (folder / "report").exists()
    write_registry(folder, folder / "claims.yaml")
    assert main(["--results-dir", str(folder)]) == 0


def test_the_committed_verdicts_are_those_of_the_committed_runs():
    refuse_outdated(ROOT / "results")


def test_missing_or_broken_claims_are_one_line(tmp_path, capsys):
    folder = write_results(tmp_path)
    path = folder / "summary" / "claims.json"
    entries = json.loads(path.read_text())
    entries[0]["judgements"][0]["outcome"] = "perhaps"
    path.write_text(json.dumps(entries))
    assert main(["--results-dir", str(folder)]) == 2
    assert "outcome 'perhaps'" in capsys.readouterr().err
    path.unlink()
    assert main(["--results-dir", str(folder)]) == 2
    assert "claims.json is missing: write it with" in capsys.readouterr().err


def test_a_dead_link_stops_the_build(results, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.report.site.STATIC", ("report.css",))
    with pytest.raises(UserError, match=r"the link report\.js leads nowhere"):
        build(results, tmp_path / "report")


@pytest.fixture
def write_prose(results, tmp_path):
    def fill(text):
        (tmp_path / "toy.md").write_text(text)
        return prose.experiment_prose("toy", results_of(results, "toy"), tmp_path)

    return fill


def test_prose_takes_its_numbers_from_the_runs(write_prose):
    html = write_prose(
        'SGD ends at {{ ours("sgd", "final_top1", scale="reduced") }}, '
        '{{ difference("mlbfgs", "sgd", "final_top1", scale="reduced") }} below, '
        'after {{ setting("train.epochs", scale="reduced") }} epochs of ResNet-18 (Table 3).'
    )
    assert (
        '<a class="n" href="#source-reduced-0" data-src="source-reduced-0">91.67 ± 1.90</a>' in html
    )
    assert ">2.33 [1.62, 3.05]</a> below, after 30 epochs of ResNet-18" in html


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("fine\nSGD reaches 91.67 %.", r"prose/toy\.md, line 2: the number '91.67' is typed"),
        ('{{ ours("sdg", "final_top1") }}', r"groups of 'sdg': did you mean 'sgd'"),
        ('{{ ours("sgd", "final_top2") }}', r"unknown metric 'final_top2'"),
        ("{{ our('sgd') }}", r"prose/toy\.md: 'our' is undefined"),
        ('{{ setting("train.epoch") }}', r"no setting 'train\.epoch'"),
        (
            '{{ holds("mlbfgs", "below", "sgd", "final_top1", scale="reduced") }}',
            r"is below that of sgd, the runs say \[1\.62, 3\.05\]",
        ),
        (
            '{{ holds("mlbfgs", "not apart from", "sgd", "final_top1", scale="reduced") }}',
            r"is not apart from that of sgd, the runs say \[1\.62, 3\.05\]",
        ),
        (
            '{{ holds("mlbfgs", "within", "sgd", "final_top1", scale="reduced", margin=3) }}',
            r"is within that of sgd, the runs say \[1\.62, 3\.05\]",
        ),
        (
            '{{ holds("sgd", "within", "mlbfgs", "final_top1", scale="reduced", margin=3) }}',
            r"is within that of mlbfgs, the runs say \[.3\.05, .1\.62\]",
        ),
    ],
)
def test_prose_that_the_runs_do_not_bear_stops_the_build(write_prose, text, complaint):
    with pytest.raises(UserError, match=complaint):
        write_prose(text)


def test_every_experiment_has_a_text_of_its_own():
    assert {path.stem for path in prose.FOLDER.glob("*.md")} == set(options("experiment"))


@pytest.mark.parametrize("path", sorted(prose.FOLDER.glob("*.md")), ids=lambda path: path.stem)
def test_every_text_is_about_an_experiment_has_a_title_and_no_typed_number(path):
    assert (ROOT / "configs" / "experiment" / f"{path.stem}.yaml").is_file()
    text = path.read_text("utf-8")
    assert text.startswith("# ") and "\n# " not in text
    prose.refuse_typed_numbers(text, path.name)


@pytest.mark.parametrize("path", sorted(prose.FOLDER.glob("*.md")), ids=lambda path: path.stem)
def test_no_text_speaks_of_runs_that_there_are_not(path, tmp_path):
    """A user's own results may be one run of any scale."""
    for scale in ("full", "reduced", "smoke"):
        write_runs(tmp_path / scale, FakeRun("sgd", experiment=path.stem, scale=scale))
        assert "<h1>" in prose.experiment_prose(path.stem, results_of(tmp_path / scale, path.stem))


def test_a_text_asks_before_it_speaks_of_a_scale(write_prose):
    text = '{% if has("reduced", "sgd", "mlbfgs") %}both{% endif %}'
    assert write_prose(text) == "<p>both</p>\n"
    assert write_prose('{% if has("full") %}full{% endif %}') == "<p>full</p>\n"
    text = (
        '{% if has("reduced", "sgd", "adam") or has("smoke") or has("full", "sgd") %}no{% endif %}'
    )
    assert write_prose(text) == ""


def test_a_text_says_how_far_a_run_is_that_is_not_over(tmp_path):
    begun = FakeRun("sgd", 1, status="running", top1=(70.0, 80.0, None))
    found = results_of(write_runs(tmp_path, begun), "toy")

    def written(text):
        (tmp_path / "toy.md").write_text(text)
        return prose.experiment_prose("toy", found, tmp_path)

    assert ">80.00 % at epoch 2</a>" in written('{{ so_far("sgd", "test_top1", "reduced") }}')
    assert ">0.5000 at epoch 3</a>" in written('{{ so_far("sgd", "train_loss") }}')
    asked = '{% if unfinished("reduced", "sgd") and not unfinished("full", "sgd") %}yes{% endif %}'
    assert written(asked) == "<p>yes</p>\n"
    with pytest.raises(UserError, match="metric 'top1': did you mean"):
        written('{{ so_far("sgd", "top1") }}')
    found = results_of(write_runs(tmp_path / "ended", FakeRun("sgd")), "toy")
    with pytest.raises(UserError, match="no unfinished run of 'sgd'"):
        written('{{ so_far("sgd", "test_top1") }}')


def test_a_statement_that_holds_prints_nothing(write_prose):
    text = '{{ holds("mlbfgs", "above", "sgd", "final_top1", scale="reduced") }}better'
    assert write_prose(text) == "<p>better</p>\n"
    text = '{{ holds("kfac", "not apart from", "sgd", "final_top1", scale="reduced") }}open'
    assert write_prose(text) == "<p>open</p>\n"
    text = '{{ holds("mlbfgs", "within", "sgd", "final_top1", "reduced", margin=3.1) }}close'
    assert write_prose(text) == "<p>close</p>\n"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("67.80 ± 0.31", "67.80"),
        ("−2.3 [−3, −1]", "-2.3"),
        ("miss 1/3", "Infinity"),
        ("−∞ [−∞, 1]", "-Infinity"),
        ("–", ""),
    ],
)
def test_cells_sort_by_their_number(text, key):
    assert sort_key(text) == key
