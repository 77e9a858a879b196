"""Differences to the subject of an experiment, and shares of its gain: runs with known answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.analysis.measuring.contrasts import gain_is_certain, gain_lines, share_of_gain
from experiments.analysis.measuring.curvature import is_control, summarise_curvature
from experiments.analysis.measuring.groups import Results, group_runs
from experiments.analysis.measuring.runs import load_runs
from experiments.analysis.showing.csv_files import results_csv
from experiments.analysis.showing.tables import headline_table, result_tables
from tests.experiments.analysis.run_factory import FakeRun, curvature_record, write_runs

ROLES = {"baseline": "slow", "subject": "mlbfgs"}


def results_of(folder: Path, finals: dict[str, tuple[float, ...]], **roles: object) -> Results:
    runs = []
    for number, (arm, values) in enumerate(finals.items()):
        settings: dict[str, object] = {"lr": 0.1 + number}
        curvature = []
        if arm.startswith("mlbfgs"):
            settings["direction"] = arm.removeprefix("mlbfgs_") if "_" in arm else "hessian"
            curvature = [curvature_record(100, cos_hessian_gradient=0.98)]
        for seed, value in enumerate(values):
            run = FakeRun(
                "mlbfgs" if curvature else "sgd",
                arm=arm,
                seed=seed,
                top1=(1.0, value),
                loss=(2.0, value / 100),
                settings=settings,
                curvature=curvature,
                roles=roles,
            )
            runs.append(run)
    (results,) = group_runs(load_runs(write_runs(folder, *runs), "toy"))
    return results


FINALS = {
    "slow": (70.0, 71.0, 72.0),
    "mlbfgs": (74.0, 75.1, 75.9),
    "mlbfgs_gamma": (75.0, 76.0, 77.0),
    "warm": (72.0, 73.0, 74.0),
}


def test_shares_are_those_of_the_mean_gain(tmp_path: Path) -> None:
    results = results_of(tmp_path, FINALS, **ROLES)
    assert gain_is_certain(results)
    shares = {group.contestant: share_of_gain(results, group) for group in results.groups}
    assert shares == pytest.approx({"slow": 0.0, "mlbfgs": 1.0, "mlbfgs_gamma": 1.25, "warm": 0.5})
    lines = gain_lines(results)
    assert lines[0].startswith("final top-1 of mL-BFGS over slow: 4.00 [3.75, 4.25] points")
    assert [line.split(",")[0] for line in lines[1:]] == ["mlbfgs_gamma", "warm"]
    assert lines[1].endswith("5.00 [5.00, 5.00] points, 125 % of the gain")
    assert lines[2].endswith("2.00 [2.00, 2.00] points, 50 % of the gain")


def test_share_of_seeds_in_common_alone(tmp_path: Path) -> None:
    finals = {**FINALS, "warm": (72.0, 73.0)}
    results = results_of(tmp_path, finals, **ROLES)
    (warm,) = results.of_contestant("warm")
    assert share_of_gain(results, warm) == pytest.approx(4.0 / (4.0 + 4.1))


def test_gain_that_may_be_nothing_is_not_shared(tmp_path: Path) -> None:
    results = results_of(tmp_path, {**FINALS, "mlbfgs": (69.0, 75.0, 73.0)}, **ROLES)
    assert not gain_is_certain(results)
    assert all(share_of_gain(results, group) is None for group in results.groups)
    (line,) = gain_lines(results)
    assert "there is no gain to be shared" in line


def test_table_of_differences_is_paired_by_seed(tmp_path: Path) -> None:
    results = results_of(tmp_path, FINALS, **ROLES)
    table = result_tables(results)[-1]
    assert table.title.startswith("Difference to mL-BFGS (toy, reduced scale; paired by seed")
    rows = {row[0]: row[3:] for row in table.rows}
    assert rows["mL-BFGS"][0] == "0 (by definition)" and rows["mL-BFGS"][2] == "100 %"
    assert rows["slow"] == ("−4.00 [−4.25, −3.75]", "−0.0400 [−0.0425, −0.0375]", "0 %")
    assert rows["warm"][2] == "50 %"
    speed_ups = result_tables(results)[1]
    assert "speed-up over slow, steps" in speed_ups.columns
    assert max(len(line) for line in table.terminal().splitlines()) <= 100


def test_without_roles_there_is_nothing_to_contrast(tmp_path: Path) -> None:
    results = results_of(tmp_path, FINALS)
    assert results.subject() is None and gain_lines(results) == ()
    assert len(result_tables(results)) == 3


def test_roles_that_disagree_name_nobody(tmp_path: Path) -> None:
    runs = [FakeRun(arm=arm, roles={"subject": arm}, settings={"lr": ord(arm)}) for arm in "ab"]
    (results,) = group_runs(load_runs(write_runs(tmp_path, *runs), "toy"))
    assert results.subject() is None


def test_control_says_that_its_direction_is_the_gradients(tmp_path: Path) -> None:
    results = results_of(tmp_path, FINALS, **ROLES)
    found = {group.contestant: group for group in results.groups}
    kinds = {name: is_control(group) for name, group in found.items()}
    assert kinds == {"slow": True, "warm": True, "mlbfgs_gamma": True, "mlbfgs": False}
    summary = summarise_curvature(found["mlbfgs_gamma"])
    assert summary is not None
    words = "by direction=gamma; H g, not taken, has cos(H g, g) 0.98"
    assert summary.words().endswith(words)
    plain = summarise_curvature(found["mlbfgs"])
    assert plain is not None and plain.words().endswith("close to scaled momentum SGD")


@pytest.mark.parametrize(
    ("gammas", "words"),
    [
        ((2.0, 5.0, 17.0), "γ went from 2 at the first pair to 17 at the last"),
        ((1.0, 9.0, 0.5), "γ went from 1 at the first pair to 0.5 at the last"),
        ((2.0, 9.0, 2.9), ""),
    ],
)
def test_growth_of_the_step_length_is_told(
    tmp_path: Path, gammas: tuple[float, ...], words: str
) -> None:
    records = [curvature_record(100 * n, gamma=gamma) for n, gamma in enumerate(gammas, 1)]
    records.append(curvature_record(900, gamma=1e6, accepted=False))
    FakeRun("mlbfgs", curvature=records).write(tmp_path)
    (results,) = group_runs(load_runs(tmp_path, "toy"))
    summary = summarise_curvature(results.groups[0])
    assert summary is not None
    assert ("γ went" in summary.words()) == bool(words) and words in summary.words()


FAMILIES = {"first": ["slow", "warm"], "second": ["mlbfgs", "mlbfgs_gamma"]}


def test_each_family_is_compared_with_its_own(tmp_path: Path) -> None:
    """Of two optimizers' figures the second does not have the baseline: its first stands for it."""
    entry: dict[str, object] = {"baseline": "slow", "figures": FAMILIES}
    results = results_of(tmp_path, FINALS, **entry)
    first, second = results.families()
    assert [group.contestant for group in first.groups] == ["slow", "warm"]
    assert first.role("baseline") == "slow" and second.role("baseline") == "mlbfgs"
    assert first.subject() is None and second.subject() is None  # the configs name none
    assert result_tables(second)[0].title.startswith(
        "Accuracy and loss (toy, reduced scale, beside mL-BFGS;"
    )
    rows = {row[0]: row[3:] for row in headline_table(second).rows}
    assert rows["mL-BFGS"][2] == "0 (by definition)"
    assert rows["mlbfgs_gamma"][2] == "1.00 [0.75, 1.25]"  # s = 0.1: 4.303 s / √3
    lines = results_csv([results]).splitlines()
    baseline = lines[0].split(",").index("baseline")
    found = {line.split(",")[2]: line.split(",")[baseline] for line in lines[1:]}
    assert found == {"slow": "slow", "warm": "slow", "mlbfgs": "mlbfgs", "mlbfgs_gamma": "mlbfgs"}


def test_speedups_are_named_after_what_they_are_over(tmp_path: Path) -> None:
    """Where no baseline is named it is SGD, in a family without it the leader."""
    figures = {"mlbfgs": ["mlbfgs", "mlbfgs_gamma"], "sgd": ["sgd", "sgd_decay"]}
    finals = {name: FINALS["mlbfgs"] for names in figures.values() for name in names}
    families = results_of(tmp_path, finals, figures=figures, subject="mlbfgs").families()
    headers = [result_tables(family)[1].columns[5] for family in families]
    assert headers == ["speed-up over mL-BFGS, steps", "speed-up over SGD, steps"]
    for family in families:
        assert result_tables(family)[-1].columns[-1] == "final train loss"  # no gain to share


def test_figures_that_share_a_contestant_are_one_family(tmp_path: Path) -> None:
    shared = {"third": ["warm", "mlbfgs"]}
    joined = results_of(tmp_path / "a", FINALS, figures={**FAMILIES, **shared})
    assert joined.families() == (joined,)
    plain = results_of(tmp_path / "b", FINALS)
    assert plain.families() == (plain,)


def test_leader_without_runs_is_not_replaced(tmp_path: Path) -> None:
    """Compared with another one, a difference would be that of another question."""
    figures = {**FAMILIES, "second": ["absent", "mlbfgs"]}
    finals = {**FINALS, "outside": (1.0, 2.0, 3.0)}
    results = results_of(tmp_path, finals, subject="slow", figures=figures)
    first, second = results.families()
    names = {group.contestant for group in first.groups}
    assert names == {"slow", "warm", "mlbfgs_gamma", "outside"}
    assert second.role("subject") == "absent" and second.subject() is None
    assert len(result_tables(second)) == 3
