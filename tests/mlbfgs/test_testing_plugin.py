"""The checks themselves: each must fail on an optimizer with the fault that it is for."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from mlbfgs import MLBFGS
from mlbfgs.testing import CheckFailedError, Outcome, Report, conformance_checks, subject_of
from mlbfgs.testing.checks import all_checks
from mlbfgs.testing.compare import first_difference
from mlbfgs.testing.host_reads import HostReads
from mlbfgs.testing.report import statuses_in

pytest_plugins = ["pytester"]


class HeavyBall(Optimizer):
    """Without the faults below: state in float32 from construction on, no host reads."""

    state_dtype = torch.float32

    def __init__(self, params, lr=0.01, momentum=0.9, weight_decay=0.0, maximize=False):
        for key, value in {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}.items():
            if value < 0:
                word = "learning rate:" if key == "lr" else f"{key} value:"
                raise ValueError(f"Invalid {word} {value}")
        names = ("lr", "momentum", "weight_decay", "maximize")
        super().__init__(
            params, dict(zip(names, (lr, momentum, weight_decay, maximize), strict=True))
        )

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            kind = torch.promote_types(p.dtype, self.state_dtype)
            self.state[p]["buffer"] = torch.zeros_like(p, dtype=kind)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, group)
        return loss

    def update(self, p, g, group):
        g = -g if group["maximize"] else g
        buffer = self.buffer(p)
        wide = g.to(buffer.dtype).add(p.to(buffer.dtype), alpha=group["weight_decay"])
        buffer.mul_(group["momentum"]).add_(wide)
        p.sub_(buffer * self.rate(group))

    def buffer(self, p):
        return self.state[p]["buffer"]

    def rate(self, group):
        return group["lr"]


class LazyState(HeavyBall):
    def add_param_group(self, param_group):
        Optimizer.add_param_group(self, param_group)

    def buffer(self, p):
        return self.state[p].setdefault("buffer", torch.zeros_like(p))


class LazyAfterGroup(HeavyBall):
    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        if len(self.param_groups) > 1:
            self.state.pop(param_group["params"][0])

    def buffer(self, p):
        return self.state[p].setdefault("buffer", torch.zeros_like(p))


class KeepsOutside(HeavyBall):
    def buffer(self, p):
        self.__dict__.setdefault("outside", {})
        return self.outside.setdefault(p, torch.zeros_like(p))


class KeepsText(HeavyBall):
    def update(self, p, g, group):
        self.state[p]["name"] = "weight"
        super().update(p, g, group)


class CastsLoadedState(MLBFGS):
    def load_state_dict(self, state_dict):
        params = [p for group in self.param_groups for p in group["params"]]
        state = {
            i: {k: v.to(p.dtype) if torch.is_tensor(v) else v for k, v in values.items()}
            for (i, values), p in zip(state_dict["state"].items(), params, strict=True)
        }
        super().load_state_dict({**state_dict, "state": state})


class ForgetsCounters(MLBFGS):
    def load_state_dict(self, state_dict):
        state = {
            i: {k: v for k, v in values.items() if k not in ("step", "pairs")}
            for i, values in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": state})


class ForgetsUnderBlocks(MLBFGS):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if self._blocks is not None:
            for values in self.state.values():
                values["s_history"].zero_()


class ExtraVector(MLBFGS):
    def _rebuild(self, values):
        super()._rebuild(values)
        for p, state in self.state.items():
            state["extra"] = torch.zeros_like(p)


class MovesWithoutGradient(HeavyBall):
    def step(self, closure=None):
        absent = [p for group in self.param_groups for p in group["params"] if p.grad is None]
        for p in absent:
            p.grad = torch.zeros_like(p)
        super().step(closure)


class CountsIdleSteps(HeavyBall):
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["step"] = self.state[p].get("step", 0) + 1
        return super().step(closure)


class CallsClosureTwice(HeavyBall):
    def step(self, closure=None):
        if closure is not None:
            closure()
        return super().step(closure)


class ClosureWithoutGradients(HeavyBall):
    @torch.no_grad()
    def step(self, closure=None):
        loss = closure() if closure is not None else None
        super().step()
        return loss


class WritesIntoGradients(HeavyBall):
    def update(self, p, g, group):
        super().update(p, g.add_(p, alpha=group["weight_decay"]), group)


class OneRateForAll(HeavyBall):
    def rate(self, group):
        return self.param_groups[0]["lr"]


class FirstRateForever(HeavyBall):
    def rate(self, group):
        return self.defaults["lr"]


class RateToNumber(HeavyBall):
    def __init__(self, params, lr=0.01, **settings):
        super().__init__(params, float(lr), **settings)


class OneMomentumForAll(HeavyBall):
    def update(self, p, g, group):
        super().update(p, g, {**group, "momentum": self.param_groups[0]["momentum"]})


class OneDecayForAll(HeavyBall):
    def update(self, p, g, group):
        super().update(p, g, {**group, "weight_decay": self.param_groups[0]["weight_decay"]})


class NeverAscends(HeavyBall):
    def update(self, p, g, group):
        super().update(p, g, {**group, "maximize": False})


class CopiesGroups(HeavyBall):
    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.param_groups = [dict(group) for group in self.param_groups]


class OwnMessages(HeavyBall):
    def __init__(self, params, lr=0.01, **settings):
        if lr < 0:
            raise TypeError("no such lr")
        super().__init__(list(params) or [Parameter(torch.zeros(1))], lr, **settings)


class KeepsRefusedGroup(HeavyBall):
    def add_param_group(self, param_group):
        self.param_groups.append({**self.defaults, **param_group})
        self.param_groups.pop() if not self.state else None
        super().add_param_group(param_group)


class MakesContiguous(HeavyBall):
    def update(self, p, g, group):
        p.data = p.data.contiguous()
        super().update(p, g, group)


class NormalisesGradient(HeavyBall):
    def update(self, p, g, group):
        super().update(p, g / g.norm(), group)


class MumblesAboutSparse(HeavyBall):
    def update(self, p, g, group):
        if g.is_sparse:
            raise RuntimeError("cannot")
        super().update(p, g, group)


class IgnoresImaginary(HeavyBall):
    def update(self, p, g, group):
        super().update(p, g.real if g.is_complex() else g, group)


class CoarseState(HeavyBall):
    state_dtype = torch.bfloat16


class StepsOnOverflow(HeavyBall):
    _step_supports_amp_scaling = True


class SkipsHooks(HeavyBall):
    def state_dict(self):
        with_hooks = self._optimizer_state_dict_post_hooks
        self._optimizer_state_dict_post_hooks = {}
        try:
            return super().state_dict()
        finally:
            self._optimizer_state_dict_post_hooks = with_hooks


class StepsTwice(HeavyBall):
    def step(self, closure=None):
        for hook in self._optimizer_step_post_hooks.values():
            hook(self, (), {})
        return super().step(closure)


class SharesWithCopies(HeavyBall):
    def __deepcopy__(self, memo):
        return self


class PicklesNoState(HeavyBall):
    def __getstate__(self):
        return {**super().__getstate__(), "state": {}}

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            for p in group["params"]:
                self.state.setdefault(p, {"buffer": torch.zeros_like(p)})


class SaysLittle(HeavyBall):
    def __repr__(self):
        return "HeavyBall()"


class Leaks(HeavyBall):
    def update(self, p, g, group):
        self.__dict__.setdefault("seen", []).append(g.clone())
        super().update(p, g, group)


class KeyInStep(HeavyBall):
    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self.state[p]["second"] = torch.zeros(1)

    def update(self, p, g, group):
        self.state[p]["second"].add_(1)
        super().update(p, g, group)


class NeedsSwitch(HeavyBall):
    def update(self, p, g, group):
        group["maximize"]
        super().update(p, g, group)


class LosesStateOnFailedLoad(HeavyBall):
    def load_state_dict(self, state_dict):
        for values in self.state.values():
            values["buffer"].zero_()
        super().load_state_dict(state_dict)


class ReadsNorm(HeavyBall):
    def update(self, p, g, group):
        if g.norm() > 1e6:
            return
        super().update(p, g, group)


class ReadsRate(HeavyBall):
    def rate(self, group):
        return float(group["lr"])


class BranchesOnTheStep(HeavyBall):
    def update(self, p, g, group):
        group["count"] = group.get("count", 0) + 1
        if group["count"] > 8 * len(group["params"]):
            p.data.add_(0.0)
        super().update(p, g, group)


class LooksLikeAdam(HeavyBall):
    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.defaults["betas"] = self.param_groups[0]["betas"] = (0.9, 0.9)


class Noisy(HeavyBall):
    def update(self, p, g, group):
        super().update(p, g + 1e-3 * torch.rand_like(g), group)


class Asleep(HeavyBall):
    def rate(self, group):
        return 0.0 * group["lr"]


#: A class with a fault, one without it, and the checks that tell them apart.
FAULTS: list[tuple[type, type, str]] = [
    (LazyState, HeavyBall, "state_exists_after_construction"),
    (LazyAfterGroup, HeavyBall, "state_exists_after_add_param_group"),
    (torch.optim.AdamW, MLBFGS, "checkpoint_before_the_first_step_leaves_no_trace"),
    (ForgetsCounters, MLBFGS, "distributed_checkpoint_round_trip"),
    (CastsLoadedState, MLBFGS, "low_precision_load[bfloat16]"),
    (CastsLoadedState, MLBFGS, "low_precision_load[float16]"),
    (KeepsText, HeavyBall, "state_holds_tensors_and_numbers"),
    (KeepsOutside, HeavyBall, "nothing_lives_outside_state_and_groups"),
    (OwnMessages, HeavyBall, "refuses[an_empty_list]"),
    (OwnMessages, HeavyBall, "refuses_negative[lr]"),
    (KeepsRefusedGroup, HeavyBall, "refused_group_leaves_no_trace"),
    (CopiesGroups, HeavyBall, "groups_are_never_rebuilt"),
    (OneRateForAll, HeavyBall, "lr_of_each_group"),
    (OneDecayForAll, HeavyBall, "weight_decay_of_each_group"),
    (OneMomentumForAll, HeavyBall, "momentum_of_each_group"),
    (CallsClosureTwice, HeavyBall, "closure_is_called_once"),
    (ClosureWithoutGradients, HeavyBall, "closure_is_called_once"),
    (WritesIntoGradients, HeavyBall, "gradients_are_never_changed"),
    (MovesWithoutGradient, HeavyBall, "no_gradient_no_move"),
    (CountsIdleSteps, HeavyBall, "without_any_gradient_nothing_happens"),
    (NeverAscends, HeavyBall, "maximize_ascends"),
    (MakesContiguous, HeavyBall, "layout[strided_parameters]"),
    (NormalisesGradient, HeavyBall, "gradient_of_zeros"),
    (CoarseState, HeavyBall, "precision_of_state[bfloat16]"),
    (FirstRateForever, HeavyBall, "scheduler[StepLR]"),
    (KeepsOutside, HeavyBall, "scheduler_resumes"),
    (LooksLikeAdam, HeavyBall, "momentum_cycle[OneCycleLR]"),
    (RateToNumber, HeavyBall, "lr_as_tensor"),
    (StepsOnOverflow, HeavyBall, "scaler_skips_cleanly"),
    (StepsTwice, HeavyBall, "step_hooks_fire_in_order"),
    (SkipsHooks, HeavyBall, "state_dict_hooks_fire_in_order"),
    (SharesWithCopies, HeavyBall, "deepcopy_in_every_phase"),
    (PicklesNoState, HeavyBall, "pickle_in_every_phase"),
    (SaysLittle, HeavyBall, "repr_names_every_setting"),
    (ForgetsCounters, MLBFGS, "resume[in_warm-up]"),
    (ForgetsCounters, MLBFGS, "resume[with_a_full_history]"),
    (ForgetsCounters, MLBFGS, "resume_with_groups_and_missing_gradients"),
    (torch.optim.AdamW, MLBFGS, "load_copies"),
    (LosesStateOnFailedLoad, HeavyBall, "failed_load_leaves_no_trace"),
    (KeyInStep, MLBFGS, "load_from_older_state"),
    (ForgetsUnderBlocks, MLBFGS, "load_into_another_block_plan"),
    (ExtraVector, MLBFGS, "memory_is_as_documented"),
    (Leaks, HeavyBall, "memory_does_not_grow"),
    (Asleep, HeavyBall, "ill_conditioned_quadratic"),
    (ReadsNorm, HeavyBall, "no_host_reads"),
    (ReadsRate, HeavyBall, "no_host_reads_with_lr_on_device"),
    (Noisy, HeavyBall, "plain_loop"),
]

SLOW_FAULTS = [
    (BranchesOnTheStep, HeavyBall, "compiled_step"),
    (BranchesOnTheStep, HeavyBall, "compiled_step_with_lr_tensor"),
]


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
