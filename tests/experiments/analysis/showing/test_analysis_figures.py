"""Figures: complete, deterministic, one look per optimizer; curvature in numbers and words."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import yaml
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from experiments.analysis.measuring.curvature import summarise_curvature, trace
from experiments.analysis.measuring.curves import curve, extent
from experiments.analysis.measuring.groups import group_runs
from experiments.analysis.measuring.runs import load_runs
from experiments.analysis.showing import figures, palette
from experiments.contestants import CONFIG_DIR, arms, options
from experiments.report.charts import training_panels
from experiments.report.record_charts import curvature_panels
from experiments.runs.owned_folder import OwnedFolder
from tests.experiments.analysis.run_factory import FakeRun, curvature_record, write_runs


def results_of(tmp_path, *runs):
    (results,) = group_runs(load_runs(write_runs(tmp_path, *runs), "toy"))
    return results


def quasi_newton(seed=0, **values):
    records = [curvature_record(step, **values) for step in range(100, 1100, 100)]
    return FakeRun("mlbfgs", seed=seed, curvature=records)


def test_files_are_complete_and_identical_when_drawn_twice(tmp_path):
    results = results_of(tmp_path, FakeRun(), FakeRun(seed=1), quasi_newton(), quasi_newton(1))
    digests = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        paths = figures.write_figures(results, tmp_path / name)
        assert sorted(path.name for path in paths) == [
            "curvature-reduced.png",
            "curvature-reduced.svg",
            "curves-reduced.png",
            "curves-reduced.svg",
        ]
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])
    assert digests[0] == digests[1]
    picture = imread(tmp_path / "first" / "curves-reduced.png")
    # Nothing touches the edge: a label cut off would leave ink there.
    edges = [picture[0], picture[-1], picture[:, 0], picture[:, -1]]
    assert all(np.all(edge[..., :3] == 1.0) for edge in edges)


def test_gradient_figure_shows_norm_loss_and_their_ratio(tmp_path):
    records = [
        {"epoch": epoch, "step": epoch, "loss": loss, "squared_norm": loss**2}
        for epoch, loss in enumerate((2.0, 1.0, 0.5))
    ]
    results = results_of(tmp_path, FakeRun(), FakeRun("mlbfgs", gradients=records))
    figure = figures.gradient_figure(results)
    drawn = [list(panel.lines[0].get_ydata()) for panel in figure.axes]
    assert drawn == [[2.0, 1.0, 0.5], [4.0, 1.0, 0.25], [2.0, 1.0, 0.5], [4.0, 1.0, 0.25]]
    assert list(figure.axes[3].lines[0].get_xdata()) == [2.0, 1.0, 0.5]
    assert [len(panel.lines) for panel in figure.axes] == [1] * 4  # SGD recorded none
    assert figures.gradient_figure(results_of(tmp_path / "none", FakeRun())) is None


def test_legend_says_of_how_many_seeds_a_line_is_not(tmp_path):
    ended_at_once = FakeRun(seed=1, status="diverged", top1=(), loss=())
    (legend,) = figures.training_figure(results_of(tmp_path, FakeRun(), ended_at_once)).legends
    assert [text.get_text() for text in legend.get_texts()] == ["SGD (n = 1 of 2)"]


def test_training_figure_shows_every_group_scale_and_unit(tmp_path):
    unseen = FakeRun("kfac", status="running", top1=(), loss=())
    runs = [FakeRun(), FakeRun("adam", status="diverged"), unseen]
    figure = figures.training_figure(results_of(tmp_path, *runs))
    panels = figure.axes
    assert [panel.get_xlabel() for panel in panels] == ["epoch", "training time (s)"] * 2
    assert panels[2].get_ylabel() == "test top-1 accuracy (%)"
    assert figure.get_suptitle() == "toy, reduced scale, n = 1 seed"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["SGD (n = 1)", "Adam (n = 1)"]
    assert "smallest to largest seed" in legend.get_title().get_text()
    crosses = [line for line in panels[0].lines if line.get_marker() == "x"]
    assert [line.get_color() for line in crosses] == [palette.look("adam").colour]


def test_unfinished_seeds_are_thin_lines_with_a_ring_and_counted_nowhere(tmp_path):
    begun = FakeRun("kfac", status="running", top1=(40.0, 60.0), loss=(2.0, 1.0))
    figure = figures.training_figure(results_of(tmp_path, FakeRun(), FakeRun("adam"), begun))
    assert figure.get_suptitle() == "toy, reduced scale, n = 0 to 1 seeds"
    (legend,) = figure.legends
    entries = [text.get_text() for text in legend.get_texts()]
    assert entries == ["SGD (n = 1)", "Adam (n = 1)", "KFAC (n = 0)"]
    assert "of a seed that has not ended" in legend.get_title().get_text()
    for panel, last in zip(figure.axes, (1.0, 1.0, 60.0, 60.0), strict=True):
        own = [line for line in panel.lines if line.get_color() == palette.look("kfac").colour]
        thin, ring = own
        assert thin.get_linewidth() < 1 and list(thin.get_ydata())[-1] == last
        assert ring.get_marker() == "o" and list(ring.get_ydata()) == [last]
        assert ring.get_markerfacecolor() == "none"
    finished = figures.training_figure(results_of(tmp_path / "none", FakeRun()))
    assert "not ended" not in finished.legends[0].get_title().get_text()


def test_loss_that_falls_far_is_drawn_on_a_log_scale(tmp_path):
    far = results_of(tmp_path / "far", FakeRun(loss=(2.0, 1.0, 0.01)))
    near = results_of(tmp_path / "near", FakeRun(loss=(2.0, 1.0, 0.9)))
    assert figures.training_figure(far).axes[0].get_yscale() == "log"
    assert figures.training_figure(near).axes[0].get_yscale() == "linear"


def test_log_axis_is_labelled_between_the_powers_where_it_spans_few(tmp_path):
    def labels(name, *loss):
        figure = figures.training_figure(results_of(tmp_path / name, FakeRun(loss=loss)))
        figure.canvas.draw()
        axis = figure.axes[0].yaxis
        low, high = axis.get_view_interval()
        ticks = (*axis.get_major_ticks(), *axis.get_minor_ticks())
        return {t.label1.get_text() for t in ticks if low <= t.get_loc() <= high} - {""}

    few = labels("few", 2.0, 1.0, 0.09)
    assert {"0.1", "1"} < few and len(few) >= 5
    assert all(f"{float(label):g}" == label for label in few)
    many = labels("many", 2.0, 1.0, 1e-4)
    assert len(many) == 5 and all("10^" in label for label in many)


def test_loss_has_one_scale_against_epochs_and_seconds(tmp_path):
    # The seed that falls far diverges: it is in the curve against epochs, not in that against time.
    lost = FakeRun(seed=1, status="diverged", loss=(2.0, 0.1), top1=(50.0, 80.0))
    results = results_of(tmp_path, FakeRun(loss=(2.0, 1.0, 0.9)), lost)
    against_time = curve(results.groups[0], "train_loss", "train_time_s")
    assert not extent([against_time]).logarithmic
    assert [p.get_yscale() for p in figures.training_figure(results).axes[:2]] == ["log", "log"]
    drawn = [panel.svg for panel in training_panels(results, "a") if panel.metric == "train_loss"]
    assert len(drawn) == 3 and all("training loss, log<" in text for text in drawn)


def test_loss_that_explodes_leaves_the_others_readable(tmp_path):
    lost = FakeRun("adam", status="diverged", loss=(2.0, 5.0, 1e25))
    panel = figures.training_figure(results_of(tmp_path, FakeRun(loss=(2.0, 1.0, 0.1)), lost)).axes[
        0
    ]
    assert panel.get_ylim() == pytest.approx((0.1 / 1.3, 20.0))
    (cross,) = [line for line in panel.lines if line.get_marker() == "x"]
    assert list(cross.get_ydata()) == [pytest.approx(20.0)]  # at the upper edge, still seen


def test_no_records_no_figure(tmp_path):
    results = results_of(tmp_path, FakeRun(status="crashed", top1=(), loss=()))
    assert figures.training_figure(results) is None
    assert figures.curvature_figure(results) is None


def test_no_colour_is_faint_on_white():
    """W3C's contrast ratio: their yellow has 1.3, their orange, the faintest that is kept, 2.25."""
    for each in {look.colour for look in (*palette.LOOKS.values(), *palette._OTHERS)}:
        rgb = np.array(to_rgb(each))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        assert 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) > 2, each


@pytest.mark.parametrize("experiment", ["controls", "deviations", "released"])
def test_every_arm_of_an_experiment_has_its_own_look(experiment):
    names = {*palette.LOOKS, *arms(experiment)}
    looks = {palette.look(name, experiment) for name in names}
    assert len(looks) == len(names) > len(palette.LOOKS)
    assert palette.look("mlbfgs", experiment) == palette.look("mlbfgs")


@pytest.mark.parametrize("experiment", options("experiment"))
def test_no_two_contestants_of_a_figure_share_a_colour_or_a_marker(experiment):
    all_arms = list(arms(experiment))
    alone = [all_arms] if len(all_arms) <= len(palette._ARM_MARKERS) else []  # else: not enough
    for names in [*palette.figures(experiment).values()] or alone:
        looks = [palette.look(name, experiment) for name in names]
        assert len({look.colour for look in looks}) == len(names)
        assert len({look.marker for look in looks}) == len(names)


def test_figures_show_the_contestants_that_the_configs_name(tmp_path):
    entry = {"figures": {"slow": ["a", "b"], "none": ["z"]}}
    lrs = {"a": 0.1, "b": 0.2, "c": 0.3}
    runs = [FakeRun(arm=arm, settings={"lr": lr}, roles=entry) for arm, lr in lrs.items()]
    results = results_of(tmp_path, *runs)
    folder = tmp_path / "out"
    earlier = ("curves-reduced.png", "curves-none-reduced.svg", "gradient-reduced.svg")
    kept = ("curves-full.png", "curves-of-mine.png", "curves-reduced.txt")
    OwnedFolder(folder).replace(dict.fromkeys((*earlier, *kept), "of an earlier summary"))
    mine = "curves-mine-reduced.png"  # no summary wrote it
    (folder / mine).write_text("mine")
    paths = figures.write_figures(results, folder)
    others = {*kept, mine, ".written"}
    assert {path.name for path in paths} == {"curves-slow-reduced.svg", "curves-slow-reduced.png"}
    assert {path.name for path in folder.iterdir()} == {path.name for path in paths} | others
    text = (folder / "curves-slow-reduced.svg").read_text()
    assert "a (n = 1)" in text and "b (n = 1)" in text and "c (n = 1)" not in text


def test_curvature_is_drawn_by_the_same_figures_of_those_that_have_it(tmp_path):
    roles = {"figures": {"on": ["a", "b"], "off": ["a", "c", "d"], "rest": ["b"]}}
    records = [curvature_record(step) for step in (100, 200)]
    has = {"a": records, "b": [], "c": records, "d": []}
    runs = [
        FakeRun(arm=arm, settings={"lr": lr}, roles=roles, curvature=has[arm])
        for lr, arm in enumerate(has, start=1)
    ]
    paths = figures.write_figures(results_of(tmp_path, *runs), tmp_path)
    drawn = {path.stem for path in paths}
    assert drawn == {"curves-on-reduced", "curves-off-reduced", "curvature-off-reduced"}
    text = (tmp_path / "curvature-off-reduced.svg").read_text()
    assert "a (n = 1)" in text and "c (n = 1)" in text and "d (n = 1)" not in text


def test_figure_that_adds_nobody_is_left_out(tmp_path):
    named = {"on": ["a", "b", "c"], "off": ["a", "b", "d"], "twin": ["b", "a", "c"], "few": ["e"]}
    runs = [
        FakeRun(arm=arm, settings={"lr": lr}, roles={"figures": named})
        for lr, arm in enumerate("abc", start=1)
    ]
    assert results_of(tmp_path / "3", *runs).figures() == {"on": ["a", "b", "c"]}
    runs.append(FakeRun(arm="d", settings={"lr": 9}, roles={"figures": named}))
    found = results_of(tmp_path / "4", *runs).figures()
    assert found == {"on": ["a", "b", "c"], "off": ["a", "b", "d"]}
    assert results_of(tmp_path / "0", FakeRun(roles={"figures": {"on": ["a"]}})).figures() == {}


@pytest.mark.parametrize("experiment", ["controls", "released"])
def test_figures_name_arms_and_leave_none_out(experiment):
    path = CONFIG_DIR / f"experiment/{experiment}.yaml"
    entry = yaml.safe_load(path.read_text())["experiment"]
    shown = [name for names in entry["figures"].values() for name in names]
    assert set(shown) == set(arms(experiment))
    assert max(map(len, entry["figures"].values())) <= 8
    assert {entry["baseline"], entry["subject"]} <= set(shown)


def test_looks_are_distinct_and_stable():
    looks = list(palette.LOOKS.values())
    assert (
        len({look.colour for look in looks}) == len({look.marker for look in looks}) == len(looks)
    )
    assert palette.look("some_new_optimizer") == palette.look("some_new_optimizer")


@pytest.mark.parametrize(
    ("cosine", "words"),
    [
        (0.99, "close to scaled momentum SGD"),
        (0.7, "a direction of its own, near the gradient"),
        (0.2, "a direction far from the gradient"),
    ],
)
def test_curvature_in_words(tmp_path, cosine, words):
    results = results_of(tmp_path, quasi_newton(cos_direction_gradient=cosine))
    text = summarise_curvature(results.groups[0]).words()
    assert text.startswith("damping took μ from 0.8 to 0.8 (medians), its thresholds acted on 0 %")
    assert "; |d|/|g| 2.2 (median)" in text
    assert text.endswith(f"cos(d, g) {cosine:.2f} (median): {words}")


def test_curvature_counts_damping_refusals_and_uphill_directions(tmp_path):
    records = [
        curvature_record(100, damped=True),
        curvature_record(200, accepted=False, cos_direction_gradient=-0.5),
        curvature_record(300, block=1, mu=None),
        curvature_record(400, cos_direction_gradient=None, direction_over_gradient=None),
    ]
    results = results_of(tmp_path, FakeRun("slimqn", curvature=records))
    summary = summarise_curvature(results.groups[0])
    assert (summary.records, summary.blocks) == (4, 2)
    assert (summary.damped_percent, summary.accepted_percent) == (25.0, 75.0)
    assert summary.uphill_percent == pytest.approx(100 / 3)
    assert summary.mu == 0.8
    assert "25 % of pairs were refused" in summary.words()
    assert "33 % of directions point uphill" in summary.words()


def first_pair(step):
    """The record of a step that was taken before the first pair: its direction is the gradient."""
    same = dict.fromkeys(("cos_direction_gradient", "cos_hessian_gradient"), 1.0)
    same |= dict.fromkeys(("direction_over_gradient", "hessian_over_gradient"), 1.0)
    return curvature_record(step, pairs=1, mu=0.2, **same)


def test_the_step_before_the_first_pair_tells_nothing_of_the_direction(tmp_path):
    later = curvature_record(200, cos_direction_gradient=0.2, hessian_over_gradient=2.2)
    run = FakeRun("slimqn", curvature=[first_pair(100), later])
    group = results_of(tmp_path, run).groups[0]
    summary = summarise_curvature(group)
    assert (summary.cosine, summary.length_ratio, summary.mu) == (0.2, 2.2, pytest.approx(0.5))
    assert trace(group.ended, "cos_direction_gradient")[0].tolist() == [200.0]
    assert trace(group.ended, "mu")[0].tolist() == [100.0, 200.0]


def test_a_run_that_ends_with_its_first_pair_has_no_direction(tmp_path):
    results = results_of(tmp_path, FakeRun("slimqn", curvature=[first_pair(100)]))
    assert summarise_curvature(results.groups[0]).words().endswith("; no direction was recorded")
    assert [panel.metric for panel in curvature_panels(results, "toy")] == ["mu", "gamma"]
    drawn = figures.curvature_figure(results)
    told = [text.get_text() for panel in drawn.axes for text in panel.texts]
    assert told == ["cos(d, g): not recorded", "‖d‖ / ‖g‖: not recorded"]


def test_optimizer_without_curvature_has_no_summary(tmp_path):
    assert summarise_curvature(results_of(tmp_path, FakeRun()).groups[0]) is None


def test_trace_is_the_median_over_blocks_and_seeds(tmp_path):
    runs = [
        FakeRun(
            "slimqn",
            seed=seed,
            curvature=[curvature_record(100, block=block, mu=mu) for block, mu in enumerate(mus)],
        )
        for seed, mus in enumerate([(1.0, 2.0), (9.0, None)])
    ]
    group = results_of(tmp_path, *runs).groups[0]
    drawn = trace(group.ended, "mu")
    assert [array.tolist() for array in drawn] == [[100.0], [2.0], [1.0], [9.0]]
