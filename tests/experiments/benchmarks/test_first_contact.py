"""The first contact: a small version of it, its bar, its page, and the committed numbers."""

import json
import math
from pathlib import Path

import pytest

from experiments.benchmarks import first_contact
from experiments.benchmarks.first_contact import OPTIMIZERS, parse, train
from experiments.benchmarks.first_contact_problems import problems
from experiments.benchmarks.first_contact_report import cifar10, judged, markdown
from experiments.errors import UserError

COMMITTED = Path(__file__).parents[3] / "results" / "benchmarks" / "first_contact.json"


@pytest.mark.parametrize("name", ["digits_mlp", "digits_cnn"])
def test_the_guarded_default_trains_where_the_printed_algorithm_diverges(name):
    problem = problems()[name]
    guarded = train(problem, OPTIMIZERS["MLBFGS guarded"][0], 0.1, seed=0, steps=300)
    printed = train(problem, OPTIMIZERS["MLBFGS as printed"][0], 0.1, seed=0, steps=300)
    assert printed["diverged"]
    assert not guarded["diverged"]
    assert guarded["train_loss"] < 0.01 and guarded["test"] > 94


def test_every_problem_and_optimizer_takes_steps():
    for problem in problems().values():
        for name, (make, rates) in OPTIMIZERS.items():
            run = train(problem, make, rates[0], seed=0, steps=2)
            assert math.isfinite(run["train_loss"]) and run["steps"] == 2, (problem.name, name)


def runs_of(subject, sgd):
    """Runs at two rates, three seeds, that all end alike; `subject` and `sgd` (loss, test)."""

    def runs(loss, test, diverged):
        return [
            {"lr": lr, "seed": seed, "train_loss": loss, "test": test, "diverged": diverged}
            | {"seconds": 1.0}
            for lr in (0.03, 0.1)
            for seed in range(3)
        ]

    return {"MLBFGS guarded": runs(*subject), "SGD": runs(*sgd)}


@pytest.mark.parametrize(
    ("subject", "met"),
    [
        ((0.1, 97.1, False), (True, True, True)),
        ((0.1, 96.9, False), (True, False, True)),
        ((0.3, 99.0, False), (True, True, False)),
        ((None, 10.0, True), (False, False, False)),
    ],
)
def test_the_bar_is_judged_as_it_is_written(subject, met):
    found = {
        name: {"metric": "top1", "steps": 5, "runs": runs_of(subject, (0.2, 98.0, False))}
        for name in ("one", "two")
    }
    found["other"] = {
        **{"metric": "loss", "steps": 5},
        "runs": runs_of((0.1, 1.04, False), (0.2, 1.0, False)),
    }
    bar = judged(found)
    assert tuple(bar[key]["met"] for key in ("divergences", "test", "train_loss")) == met
    result: dict = {"bar": bar, "problems": found, "batch": 64, "python": "3.11", "origin": {}}
    assert ("**no**" in markdown(result)) == (not all(met))


def test_the_command_writes_what_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(first_contact, "RATES", (0.1,))
    short = {name: (make, rates[:1]) for name, (make, rates) in OPTIMIZERS.items()}
    for name in ("SGD", "MLBFGS guarded"):
        short[name] = (short[name][0], (0.1,))
    monkeypatch.setattr(first_contact, "OPTIMIZERS", short)
    whole = train
    monkeypatch.setattr(
        first_contact, "train", lambda problem, make, lr, seed: whole(problem, make, lr, seed, 3)
    )
    first_contact.main(["--problems", "digits_halves", "--seeds", "1", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "first_contact.json").read_text("utf-8"))
    assert (tmp_path / "first_contact.md").read_text("utf-8") == markdown(written)
    assert written["bar"] == judged(written["problems"], written["cifar10"])
    assert "digits_halves" in capsys.readouterr().out
    other = json.loads(json.dumps(written))
    other["problems"] = {"digits_mlp": other["problems"]["digits_halves"]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    parts = [str(tmp_path / name) for name in ("first_contact.json", "other.json")]
    first_contact.main(["--out", str(tmp_path / "both"), "--join", *parts])
    both = json.loads((tmp_path / "both" / "first_contact.json").read_text("utf-8"))
    assert list(both["problems"]) == ["digits_mlp", "digits_halves"]
    other["text_sha256"] = "another"
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert first_contact.main(["--out", str(tmp_path), "--join", *parts]) == 2
    assert "another Python" in capsys.readouterr().err


@pytest.mark.parametrize(("ours", "met"), [(73.5, True), (72.9, False)])
def test_cifar10_is_read_from_finished_runs(tmp_path, ours, met):
    for arm, top1 in (("mlbfgs_guarded", ours), ("mlbfgs", 74.0)):
        for seed in range(3):
            run = tmp_path / "runs" / "controls" / arm / f"reduced-seed{seed}-abc"
            run.mkdir(parents=True)
            (run / "status.json").write_text('{"status": "done"}')
            records = [{"kind": "epoch", "test_top1": value} for value in (1.0, top1)]
            (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = {"one": {"metric": "top1", "steps": 5}}
    found["one"]["runs"] = runs_of((0.1, 98.0, False), (0.2, 98.0, False))
    bar = judged(found, cifar10(tmp_path))
    assert bar["cifar10"] == {"ours": pytest.approx(ours), "printed": 74.0, "met": met}
    (run / "status.json").write_text('{"status": "diverged"}')
    assert "cifar10" not in judged(found, cifar10(tmp_path))


@pytest.mark.skipif(not COMMITTED.is_file(), reason="not measured yet")
def test_the_committed_page_and_bar_follow_from_the_committed_runs():
    committed = json.loads(COMMITTED.read_text("utf-8"))
    assert committed["bar"] == judged(committed["problems"], committed["cifar10"])
    assert COMMITTED.with_suffix(".md").read_text("utf-8") == markdown(committed)
    assert set(committed["problems"]) == set(problems())
    for problem in committed["problems"].values():
        for name, (_, rates) in OPTIMIZERS.items():
            seen = [(run["lr"], run["seed"]) for run in problem["runs"][name]]
            assert seen == [(lr, seed) for lr in rates for seed in range(3)]


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--problems", "digits_ml"], "digits_mlp"), (["--seeds", "0"], "1")]
)
def test_mistakes_on_the_command_line_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(arguments)
