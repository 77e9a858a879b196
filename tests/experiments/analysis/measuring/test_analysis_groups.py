"""Seeds of one config are one group; conflicting configs are told apart and named."""

from __future__ import annotations

import json

import pytest

from experiments.analysis.measuring.groups import group_runs
from experiments.analysis.measuring.runs import load_runs
from experiments.errors import UserError
from tests.experiments.analysis.run_factory import FakeRun, write_runs


def grouped(results_dir):
    return group_runs(load_runs(results_dir, "toy"))


def test_seeds_share_a_group_and_baselines_come_first(tmp_path):
    runs = [FakeRun(optimizer=name, seed=seed) for name in ("mlbfgs", "sgd") for seed in (0, 1)]
    (results,) = grouped(write_runs(tmp_path, *runs))
    assert [group.label for group in results.groups] == ["SGD", "mL-BFGS"]
    assert [[run.seed for run in group.runs] for group in results.groups] == [[0, 1], [0, 1]]
    assert results.problems == ()


def test_numbers_in_names_are_ordered_as_numbers(tmp_path):
    names = ["batch_1024", "batch_64", "lr0.5", "lr0.50", "lr0.05", "lr0.05_warmup", "sgd"]
    (results,) = grouped(write_runs(tmp_path, *(FakeRun(arm=name) for name in names)))
    ordered = ["sgd", "batch_64", "batch_1024", "lr0.05", "lr0.5", "lr0.50"]
    ordered.append("lr0.05_warmup")
    assert [group.contestant for group in results.groups] == ordered


def test_conflicting_configs_are_named_with_key_and_value(tmp_path):
    slow, fast = FakeRun(seed=0), FakeRun(seed=0, settings={"lr": 0.5})
    (results,) = grouped(write_runs(tmp_path, slow, fast, FakeRun(seed=1)))
    assert sorted(group.label for group in results.groups) == ["SGD [lr=0.1]", "SGD [lr=0.5]"]
    (line,) = results.problems
    for part in ("2 configs", "optimizer.lr=0.1", "optimizer.lr=0.5", slow.key, fast.key):
        assert part in line
    assert results.baseline() is None  # two configs of SGD: neither is the baseline


def test_large_and_small_settings_are_shown_short(tmp_path):
    runs = [FakeRun(settings={"lr": lr}) for lr in (1e30, 1e-4)]
    (results,) = grouped(write_runs(tmp_path, *runs))
    assert sorted(group.label for group in results.groups) == ["SGD [lr=0.0001]", "SGD [lr=1e+30]"]


def test_cosmetic_keys_and_the_seed_do_not_split_a_group(tmp_path):
    path = FakeRun(seed=0).write(tmp_path)
    FakeRun(seed=1).write(tmp_path)
    text = (path / "config.yaml").read_text().replace("threads: 1", "threads: 2")
    (path / "config.yaml").write_text(text + "dataset:\n  root: /elsewhere\n  seed: 0\n")
    (results,) = grouped(tmp_path)
    assert len(results.groups) == 1


def test_later_key_with_the_value_of_before_does_not_split_a_group(tmp_path):
    first, second = FakeRun(seed=0), FakeRun(seed=1)
    write_runs(tmp_path, first, second)
    path = next(tmp_path.glob("runs/toy/sgd/*-seed1-*/config.yaml"))
    plain = path.read_text()
    assert "  name: sgd\n" in plain
    for value, expected in (("paper", 1), ("released", 2)):
        path.write_text(plain.replace("  name: sgd\n", f"  name: sgd\n  variant: {value}\n"))
        (results,) = grouped(tmp_path)
        assert len(results.groups) == expected


def test_arms_of_one_optimizer_are_contestants_of_their_own(tmp_path):
    runs = [FakeRun(arm=arm, settings={"lr": lr}) for arm, lr in (("slow", 0.1), ("fast", 0.5))]
    (results,) = grouped(write_runs(tmp_path, *runs, FakeRun(), FakeRun(arm="fast", seed=1)))
    labels = [group.label for group in results.groups]
    assert labels == ["SGD", "fast [lr=0.5]", "fast [lr=0.1]", "slow"]
    assert {group.optimizer for group in results.groups} == {"sgd"}
    assert [len(results.of_contestant(name)) for name in ("sgd", "slow", "fast")] == [1, 1, 2]
    assert results.baseline() is results.groups[0]
    assert any(
        line.startswith("fast at reduced scale was run under 2") for line in results.problems
    )


def test_folder_must_be_that_of_the_arm(tmp_path):
    path = FakeRun(arm="slow").write(tmp_path)
    path.parent.rename(path.parent.with_name("sgd"))
    with pytest.raises(UserError, match=r"arm is 'slow', but the directory's name says 'sgd'"):
        grouped(tmp_path)


def test_versions_of_the_numerics_are_separate_and_the_first_needs_no_mention(tmp_path):
    versions = [(0, None), (1, 1), (2, 2)]
    write_runs(tmp_path, *(FakeRun(seed=seed, numerics_version=v) for seed, v in versions))
    (results,) = grouped(tmp_path)
    assert [[run.seed for run in group.runs] for group in results.groups] == [[0, 1], [2]]
    assert results.groups[1].label == "SGD [numerics_version=2]"


def test_runs_of_several_roundings_are_pooled_and_the_reader_is_told(tmp_path):
    found = [(0, None), (1, 1), (2, 2)]
    fakes = [FakeRun(seed=seed, numerics_version=1, numerics_rounding=r) for seed, r in found]
    fakes.append(FakeRun(seed=3, resumes=[{"step": 5, "numerics_rounding": 2}]))
    write_runs(tmp_path, *fakes)
    (results,) = grouped(tmp_path)
    (group,) = results.groups
    assert [run.seed for run in group.runs] == [0, 1, 2, 3] and group.label == "SGD"
    (said,) = [line for line in results.problems if "rounding" in line]
    assert said.startswith("several roundings of the numerics (1: 3, 2: 2 runs)")
    others = tmp_path / "others"
    write_runs(others, *(FakeRun(seed=s, numerics_rounding=2) for s in range(2)))
    (results,) = grouped(others)
    assert not any("rounding" in line for line in results.problems)


def test_one_config_and_seed_under_two_keys_is_an_error(tmp_path):
    path = FakeRun().write(tmp_path)
    other = path.with_name("reduced-seed0-0123456789")
    path_files = {file.name: file.read_text() for file in path.iterdir()}
    other.mkdir()
    for name, text in path_files.items():
        (other / name).write_text(text)
    meta = json.loads(path_files["meta.json"]) | {"key": "0123456789"}
    (other / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="one config and one seed but two run keys"):
        grouped(tmp_path)


@pytest.mark.parametrize("status", ["running", "refused", "crashed", "timeout", "diverged"])
def test_every_run_that_is_not_done_is_reported(tmp_path, status):
    write_runs(tmp_path, FakeRun(seed=0), FakeRun(seed=1, status=status, message="because"))
    (results,) = grouped(tmp_path)
    (group,) = results.groups
    state = "unfinished" if status == "running" else status
    assert group.status_counts == f"1 done, 1 {state}"
    assert [run.seed for run in group.unfinished] == ([1] if status == "running" else [])
    assert len(group.ended) == (1 if status in ("running", "refused") else 2)
    (line,) = results.problems
    assert line.startswith("sgd/reduced-seed1-") and "because" in line
    told = "unfinished at epoch 3 of 30 (because); not counted; its curve so far is drawn"
    assert (told if status == "running" else status) in line


def test_run_that_says_running_and_no_more_may_be_dead(tmp_path):
    write_runs(tmp_path, FakeRun(status="running", top1=(), loss=()))
    (results,) = grouped(tmp_path)
    (line,) = results.problems
    told = ": unfinished at epoch 0 of 30 (running, or killed without a trace); not counted"
    assert line.endswith(told)
    assert results.groups[0].unfinished == ()


def test_targets_that_differ_are_not_compared(tmp_path):
    easy = FakeRun(seed=1, target={"metric": "test_top1", "value": 10.0})
    (results,) = grouped(write_runs(tmp_path, FakeRun(seed=0), easy))
    assert results.target is None
    assert results.values(results.groups[0], "steps_to_target") == {}
    assert "test_top1 >= 90" in results.problems[0] and "test_top1 >= 10" in results.problems[0]


def test_seconds_of_several_machines_are_not_compared_in_silence(tmp_path):
    slow, fast = ({"cpu": cpu, "threads": 1} for cpu in ("old", "new"))
    runs = [FakeRun("sgd", seed, hardware=slow) for seed in range(2)]
    (same,) = grouped(write_runs(tmp_path / "same", *runs))
    assert same.problems == ()
    (mixed,) = grouped(write_runs(tmp_path / "mixed", *runs, FakeRun("adam", hardware=fast)))
    (line,) = mixed.problems
    assert "(1 thread of new: 1 of 3 runs; 1 thread of old: 2 of 3 runs)" in line
    assert "seconds" in line


def test_a_machine_is_all_that_a_run_was_trained_on(tmp_path):
    gpu, cpu = {"gpu": "fast card"}, {"cpu": "old", "threads": 2}
    runs = [
        FakeRun("sgd", 0, hardware=gpu),
        FakeRun("sgd", 1, hardware=gpu, ranks=8),
        FakeRun("sgd", 2, hardware=cpu, resumes=[{"hardware": cpu}, {"hardware": gpu}]),
    ]
    (results,) = grouped(write_runs(tmp_path, *runs))
    assert [run.machine for run in results.groups[0].runs] == [
        *("fast card", "8 x fast card", "2 threads of old, then fast card"),
    ]


def test_ranks_that_differ_are_told_where_batchnorm_may_see_them(tmp_path):
    gpu = {"hardware": {"gpu": "card"}}
    one, eight = FakeRun("sgd", 0, **gpu), FakeRun("sgd", 1, ranks=8, **gpu)
    (results,) = grouped(write_runs(tmp_path / "split", one, eight))
    (line,) = [line for line in results.problems if "BatchNorm" in line]
    assert line.startswith("several numbers of ranks (1: 1, 8: 1 runs)")
    resumed = FakeRun("sgd", 0, resumes=[{**gpu, "ranks": 2}], **gpu)
    (results,) = grouped(write_runs(tmp_path / "resumed", resumed))
    assert any("(1: 1, 2: 1 runs)" in line for line in results.problems)
    synchronised = {"extra_config": {"train": {"sync_batchnorm": True}}}
    runs = [FakeRun("sgd", seed, ranks=1 + seed, **gpu, **synchronised) for seed in range(2)]
    (results,) = grouped(write_runs(tmp_path / "whole", *runs))
    assert not any("BatchNorm" in line for line in results.problems)


def test_seconds_of_a_busy_machine_are_called_rough(tmp_path):
    """Seeds of a config do equal work; a machine's seconds are compared with its own alone."""
    quick = {"cpu": "quick", "threads": 1}
    steady = [FakeRun("sgd", seed, seconds_per_epoch=10.0 + seed) for seed in range(3)]
    other = FakeRun("sgd", 3, seconds_per_epoch=1.0, hardware=quick)
    (results,) = grouped(write_runs(tmp_path / "steady", *steady, other))
    assert not any("rough" in line for line in results.problems)
    shaken = [FakeRun("adam", seed, seconds_per_epoch=10.0 + 3 * seed) for seed in range(3)]
    (results,) = grouped(write_runs(tmp_path / "shaken", *steady, *shaken))
    (line,) = results.problems
    assert "up to 1.6 times as long as others (adam; more than 1.25 times in 1 of 2" in line


def test_seconds_of_unequal_work_are_not_compared(tmp_path):
    """A run that diverged, and a contestant of one seed, tell nothing of the machine."""
    gone = FakeRun("sgd", 1, status="diverged", seconds_per_epoch=99.0)
    shaken = [FakeRun("adam", seed, seconds_per_epoch=10.0 + 3 * seed) for seed in range(3)]
    (results,) = grouped(write_runs(tmp_path, FakeRun("sgd"), gone, *shaken))
    (line,) = [line for line in results.problems if "rough" in line]
    assert "(adam; more than 1.25 times in 1 of 1 contestants with several)" in line


def test_scales_are_kept_apart(tmp_path):
    write_runs(tmp_path, FakeRun(scale="smoke"), FakeRun(scale="full"))
    assert [results.scale for results in grouped(tmp_path)] == ["full", "smoke"]
