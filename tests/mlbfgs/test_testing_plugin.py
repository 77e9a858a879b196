"""The checks themselves: each must fail on an optimizer with the fault that it is for."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mlbfgs import MLBFGS
from mlbfgs.testing import CheckFailedError, Outcome, Report, conformance_checks, subject_of
from mlbfgs.testing.checks import all_checks
from mlbfgs.testing.compare import first_difference
from mlbfgs.testing.host_reads import HostReads
from mlbfgs.testing.report import statuses_in
from tests.mlbfgs.faulty_optimizers import (
    FAULTS,
    SLOW_FAULTS,
    IgnoresImaginary,
    MumblesAboutSparse,
)

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parents[2]


def outcome_of(optimizer: type, name: str) -> Outcome:
    (bound,) = [b for b in conformance_checks(optimizer) if b.check.name == name]
    return bound.run()


def expect_told_apart(faulty: type, sound: type, name: str) -> None:
    assert outcome_of(sound, name) == Outcome("pass")
    found = outcome_of(faulty, name)
    assert found.status == "fail", found
    assert found.reason and "\n" not in found.reason


@pytest.mark.parametrize(("faulty", "sound", "name"), FAULTS)
def test_check_fails_on_its_fault(faulty, sound, name):
    expect_told_apart(faulty, sound, name)


@pytest.mark.slow
@pytest.mark.parametrize(("faulty", "sound", "name"), SLOW_FAULTS)
def test_slow_check_fails_on_its_fault(faulty, sound, name):
    expect_told_apart(faulty, sound, name)


def test_refusal_counts_as_unsupported_only_if_it_names_what_was_asked():
    named = outcome_of(MLBFGS, "sparse_gradients")
    assert named.status == "unsupported" and "sparse" in named.reason
    mumbled = outcome_of(MumblesAboutSparse, "sparse_gradients")
    assert mumbled.status == "fail" and "without naming sparse" in mumbled.reason


def test_complex_check_fails_where_imaginary_parts_are_lost():
    assert outcome_of(torch.optim.SGD, "complex_parameters").status == "pass"
    assert outcome_of(IgnoresImaginary, "complex_parameters").status == "fail"


READS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "equal": lambda x: torch.equal(x, x),
    "alpha": lambda x: torch.add(x, x, alpha=x[0]),
    "copy_": lambda x: torch.zeros(3).copy_(x),
    "isfinite": lambda x: bool(x.isfinite().all()),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_host_reads_counts_what_waits_for_the_device(read):
    with HostReads() as on_device:
        read(torch.ones(3, device="meta"))
    assert len(on_device.reads) == 1, on_device.reads
    with HostReads() as on_host:
        read(torch.ones(3))
    assert on_host.reads == []


@pytest.mark.parametrize("read", [lambda x: x.nonzero(), lambda x: x[x > 0], torch.unique])
def test_host_reads_counts_shapes_that_depend_on_numbers(read):
    with HostReads() as on_device, pytest.raises(NotImplementedError):
        read(torch.ones(3, device="meta"))
    assert len(on_device.reads) == 1


def test_host_reads_lets_arithmetic_pass():
    with HostReads() as on_device:
        x = torch.ones(3, device="meta")
        x.mul_(2).add_(x.sum()).to(torch.float64)
        x.copy_(torch.ones(3))
    assert on_device.reads == []


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(2), -torch.zeros(2), "values differ"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), "dtype"),
        (torch.zeros(2), torch.zeros(2, 1), "shape"),
        ({"a": 1}, {"a": 1.0}, "['a']: int became float"),
        ({"a": 1}, {"b": 1}, "keys"),
        ([1, 2], [1, 3], "[1]: 2 became 3"),
        ((1,), [1], "tuple became list"),
    ],
)
def test_first_difference_sees(a, b, message):
    assert message in (first_difference(a, b) or "")


def test_first_difference_takes_nan_for_itself():
    nan = {"x": torch.tensor([float("nan"), 1.0]), "y": [float("nan")]}
    assert first_difference(nan, {"x": nan["x"].clone(), "y": [float("nan")]}) is None


def test_markdown_tells_every_status_and_reason():
    checks = all_checks()[:3]
    report = Report()
    report.add(checks[0], "A", Outcome("pass"), settings="A(lr=1)")
    report.add(checks[1], "A", Outcome("fail", "a < b | c"))
    report.add(checks[2], "A", Outcome("unsupported", "no"))
    report.add(checks[0], "B", Outcome("not run", "x is not installed"))
    text = report.markdown()
    assert "A(lr=1)" in text and "a &lt; b \\| c" in text
    assert statuses_in(text) == {
        (checks[0].name, "A"): "pass",
        (checks[1].name, "A"): "fail",
        (checks[2].name, "A"): "unsupported",
        (checks[0].name, "B"): "not run",
        (checks[1].name, "B"): "-",
        (checks[2].name, "B"): "-",
    }
    for name in ("A: 1 pass, 1 fail, 1 unsupported", "B: 1 not run"):
        assert name in report.text()


def test_function_api_raises_with_the_reason():
    (bound,) = [
        b
        for b in conformance_checks("torch.optim.AdamW")
        if b.check.name == "state_exists_after_construction"
    ]
    with pytest.raises(CheckFailedError, match="exp_avg, exp_avg_sq, step exists only after"):
        bound()
    assert str(bound) == "AdamW-state_exists_after_construction"


def test_function_api_takes_factories():
    def factory(params, **settings):
        return torch.optim.SGD(params, **{"lr": 0.1, **settings})

    subject = subject_of(factory, {"momentum": 0.5}, name="mine")
    bound = conformance_checks(subject, slow=False)[3]
    assert bound().status in ("pass", "unsupported")
    assert subject.name == "mine" and not any(b.check.slow for b in [bound])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SGD", "full name"),
        ("torch.optim.Nope", "Nope"),
        ("no_such_module.X", "no_such_module"),
        ("torch.nn.Linear", "cannot construct"),
        ("builtins.list", "makes a list|cannot construct"),
    ],
)
def test_wrong_optimizer_names_are_told(name, message):
    with pytest.raises(ValueError, match=message):
        subject_of(name)


def run_plugin(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    plugin = ("-p", "mlbfgs.testing.plugin", "-p", "no:cacheprovider")
    return pytester.runpytest_inprocess("--pyargs", "mlbfgs.testing", *plugin, *arguments)


def test_plugin_prints_and_writes_the_table(pytester):
    done = run_plugin(
        pytester,
        *("--optimizer", "mlbfgs.MLBFGS", "--optimizer-kwargs", '{"lr": 0.05}'),
        *("--optimizer", "torch.optim.SGD", "--optimizer-kwargs", '{"momentum": 0.9}'),
        *("-k", "complex_parameters or state_exists_after_construction"),
        *("--conformance-report", "report.md"),
    )
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["*SGD, fail: momentum_buffer exists only after a step", "*written*"])
    done.stdout.fnmatch_lines(["*1 failed, 2 passed, * 1 unsupported*"])
    text = (pytester.path / "report.md").read_text()
    assert "`MLBFGS(lr=0.05, update_interval=4, history_size=3)`" in text
    assert statuses_in(text) == {
        ("state_exists_after_construction", "MLBFGS"): "pass",
        ("state_exists_after_construction", "SGD"): "fail",
        ("complex_parameters", "MLBFGS"): "unsupported",
        ("complex_parameters", "SGD"): "pass",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--optimizer", "torch.optim.Nope"), "torch.optim.Nope"),
        (("--optimizer", "no_such_module.X"), "No module named 'no_such_module'"),
        (("--optimizer", "torch.optim.SGD.x.y"), "no optimizer class 'torch.optim.SGD.x.y'"),
        (("--optimizer", "torch.__version__"), "is a TorchVersion, not a class or a function"),
        (("--optimizer", "lambda p: p"), "expected the full name of a class"),
        (("--optimizer", "torch.optim.SGD", "--optimizer-kwargs", "{lr}"), "is no JSON"),
        (("--optimizer", "torch.optim.SGD", "--optimizer-kwargs", "[1]"), "no JSON object"),
        (
            ("--optimizer", "torch.optim.SGD", *(("--optimizer-kwargs", "{}") * 2)),
            "given 2 times for 1",
        ),
    ],
)
def test_plugin_tells_mistakes_in_one_line(pytester, arguments, message):
    done = run_plugin(pytester, *arguments)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert message in done.stderr.str() and "Traceback" not in done.stderr.str()


ODD = """
import functools, sys
import torch

class Raises(torch.optim.SGD):
    def __init__(self, params, lr=0.1):
        raise KeyError("no\\nway")

class Exits(torch.optim.SGD):
    def __init__(self, params, lr=0.1):
        sys.exit(3)

class ExitsInStep(torch.optim.SGD):
    def step(self, closure=None):
        sys.exit(0)

class Prints(torch.optim.SGD):
    def step(self, closure=None):
        print("stepping")
        print("and complaining", file=sys.stderr)
        return super().step(closure)

class NoDefaults(torch.optim.Optimizer):
    def __init__(self, params):
        pass

class Outer:
    class Inner(torch.optim.SGD):
        pass

anonymous = lambda params, **settings: torch.optim.SGD(params, **settings)
half = functools.partial(torch.optim.SGD, momentum=0.5)
also_half = functools.partial(torch.optim.SGD, momentum=0.5)
def factory(params, lr=0.1, **settings):
    return torch.optim.SGD(params, lr=lr, **settings)
"""


def test_an_optimizer_that_cannot_be_made_is_in_the_table_beside_the_others(pytester):
    pytester.makepyfile(odd=ODD, broken="raise RuntimeError('half installed')")
    pytester.makepyfile(exits="import sys; sys.exit(1)", needs="import not_there_at_all")
    broken = ["odd.Raises", "odd.Exits", "odd.NoDefaults", "broken.X", "exits.X", "needs.X"]
    broken += ["builtins.list", "torch.nn.Linear"]
    sound = ["odd.ExitsInStep", "odd.Prints", "odd.Outer.Inner", "odd.anonymous", "odd.half"]
    sound += ["odd.also_half", "odd.factory", "torch.optim.LBFGS", "torch.optim.SGD"]
    named = [
        word for name in (*broken, *sound, "torch.optim.SGD") for word in ("--optimizer", name)
    ]
    done = run_plugin(
        pytester,
        *named,
        *("--conformance-report", "new/folder/report.md"),
        *("-k", "construction or maximize_ascends"),
    )
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    assert "INTERNALERROR" not in done.stdout.str() + done.stderr.str()
    text = (pytester.path / "new/folder/report.md").read_text()
    found = statuses_in(text)
    names = [name.rpartition(".")[2] for name in broken]
    names[4:6] = ["X {}", "X {} #2"]
    assert {name: found["construction", name] for name in names} == dict.fromkeys(names, "fail")
    for reason in (
        "Raises, fail: cannot construct .*: KeyError: 'no",
        "Exits, fail: cannot construct .*: SystemExit: 3",
        "NoDefaults, fail: .* makes an optimizer without `defaults`",
        "X, fail: importing broken fails: RuntimeError: half installed",
        "fail: importing exits fails: SystemExit: 1",
        "fail: importing needs fails: ModuleNotFoundError: No module named 'not_there_at_all'",
        "list, fail: cannot construct .*takes no keyword|list, fail: .* makes a list",
        "Linear, fail: cannot construct",
    ):
        assert re.search(reason, text), (reason, text)
    works = {name.rpartition(".")[2]: "pass" for name in sound} | {"SGD {}": "pass"}
    works |= {"ExitsInStep": "fail", "LBFGS": "fail"}  # one exits, one asks for a closure
    assert {name: found["maximize_ascends", name] for name in works} == works
    assert re.search("ExitsInStep, fail: SystemExit: 0", text)
    assert re.search("LBFGS, fail: .*closure", text)
    # columns and rows in their own order
    header = next(line for line in text.splitlines() if line.startswith("| check | "))
    columns = [cell.strip() for cell in header.strip("|").split(" | ")][1:]
    assert columns == [*names, *(n.rpartition(".")[2] for n in sound), "SGD {}"]


CONFTESTS = {
    "empty": "",
    "demanding": """
import pytest

@pytest.fixture(autouse=True)
def database():
    raise RuntimeError("no database here")

def pytest_itemcollected(item):
    assert item.name

def pytest_collection_modifyitems(items):
    items.reverse()
""",
}
INI = {
    "empty": "[pytest]",
    "demanding": """
[pytest]
addopts = --strict-markers --strict-config -ra --doctest-modules --import-mode=importlib
python_files = check_*.py
python_functions = should_*
python_classes = Should*
testpaths = nowhere
usefixtures = database
filterwarnings = error
xfail_strict = true
norecursedirs = testing mlbfgs
markers = mine: one of this project
""",
}


@pytest.mark.parametrize("conftest", CONFTESTS)
@pytest.mark.parametrize("ini", INI)
def test_plugin_needs_no_folder_without_conftest_and_settings(pytester, conftest, ini):
    pytester.makeconftest(CONFTESTS[conftest])
    pytester.makeini(INI[ini])
    done = run_plugin(
        pytester,
        *("--rootdir", str(pytester.path), "-c", str(pytester.path / "tox.ini")),
        *("--optimizer", "torch.optim.SGD", "-k", "complex_parameters or takes"),
        *("-m", "not slow"),
    )
    assert "INTERNALERROR" not in done.stdout.str() + done.stderr.str()
    assert done.ret == pytest.ExitCode.OK, done.stdout.str()
    done.assert_outcomes(passed=5, deselected=_number_of_checks() - 5)
    done.stdout.fnmatch_lines(["*SGD: 5 pass*"])


def _number_of_checks() -> int:
    return len(all_checks())


@pytest.mark.parametrize("workers", [0, 2])
def test_plugin_works_as_a_command_of_its_own_in_a_project(pytester, workers):
    if workers:
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    pytester.makeconftest("")
    pytester.mkdir("tests").joinpath("conftest.py").write_text("")
    pytester.makepyfile(mine=ODD)
    pytester.makepyfile(test_mine="def test_mine():\n    pass\n")
    command = [sys.executable, "-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"]
    plugin = ["--pyargs", "mlbfgs.testing", "-p", "mlbfgs.testing.plugin", "-k", "complex_param"]
    plugin += ["-n", str(workers), "--optimizer", "torch.optim.SGD"] if workers else []
    done = subprocess.run(
        [*command, *plugin, "--optimizer", "mine.half", "test_mine.py"],
        cwd=pytester.path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "half: 1 pass" in done.stdout and ("SGD: 1 pass" in done.stdout) == bool(workers)


def test_a_report_that_cannot_be_written_is_told_at_once(pytester):
    done = run_plugin(pytester, "--optimizer", "torch.optim.SGD", "--conformance-report", ".")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert "--conformance-report . is a folder: name a file" in done.stderr.str()


def test_neither_the_optimizer_nor_the_checks_need_pytest(tmp_path):
    code = (
        "import sys, mlbfgs\n"
        "assert 'mlbfgs.testing' not in sys.modules\n"
        "import mlbfgs.testing, mlbfgs.testing.checks\n"
        "print([m for m in ('pytest', '_pytest', 'numpy.testing') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
