"""Optimizers with one fault each, and the check that must find it."""

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from mlbfgs import MLBFGS


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


class OneStorage(HeavyBall):
    """Its state are views into one tensor."""

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        flat = torch.zeros(sum(p.numel() for p in params))
        for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
            self.state[p]["buffer"] = part.view(p.shape)


class KeepsParameters(HeavyBall):
    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self.state[p]["buffer"] = Parameter(self.state[p]["buffer"], requires_grad=False)


class LoadsIntoItsOwn(HeavyBall):
    """A state handed out before changes with every load."""

    def load_state_dict(self, state_dict):
        own = {p: values["buffer"] for p, values in self.state.items()}
        super().load_state_dict(state_dict)
        for p, buffer in own.items():
            self.state[p]["buffer"] = buffer.copy_(self.state[p]["buffer"])


class WorksOnACopy(HeavyBall):
    """Its state is a copy of what it works with, and a load of its own tensors is none."""

    def buffer(self, p):
        kept = self.__dict__.setdefault("kept", {})
        if p not in kept:
            kept[p] = self.state[p]["buffer"].clone()
        return kept[p]

    def step(self, closure=None):
        loss = super().step(closure)
        for p, kept in self.kept.items():
            self.state[p]["buffer"].copy_(kept)
        return loss

    def load_state_dict(self, state_dict):
        own = [values["buffer"] for values in self.state.values()]
        given = [values["buffer"] for values in state_dict["state"].values()]
        super().load_state_dict(state_dict)
        if not all(a is b for a, b in zip(own, given, strict=True)):
            self.kept = {}


class ReplacesState(HeavyBall):
    def update(self, p, g, group):
        self.state[p]["buffer"] = self.state[p]["buffer"].clone()
        super().update(p, g, group)


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


class TensorsPass(HeavyBall):
    def __init__(self, params, lr=0.01, **settings):
        super().__init__(params, 0.01 if torch.is_tensor(lr) else lr, **settings)


class RealOnly(HeavyBall):
    def add_param_group(self, param_group):
        for p in param_group["params"]:
            if not p.is_floating_point() or p.is_meta:
                raise ValueError("parameters must be real and present")
        super().add_param_group(param_group)


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
    (TensorsPass, HeavyBall, "refuses_negative_lr_in_a_tensor"),
    (HeavyBall, torch.optim.SGD, "made_in_inference_mode"),
    (RealOnly, HeavyBall, "frozen[an_integer]"),
    (RealOnly, HeavyBall, "frozen[a_complex]"),
    (RealOnly, HeavyBall, "frozen[an_absent]"),
    (HeavyBall, torch.optim.SGD, "infinite_number_that_never_moves"),
    (HeavyBall, torch.optim.SGD, "reshaped_before_the_first_step"),
    (HeavyBall, MLBFGS, "names_of_a_wrapper[module.]"),
    (torch.optim.AdamW, MLBFGS, "names_of_a_wrapper[_orig_mod.]"),
    (HeavyBall, MLBFGS, "state_of_another_optimizer"),
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
    (OneStorage, HeavyBall, "part[saved]"),
    (OneStorage, HeavyBall, "part[pickled]"),
    (OneStorage, HeavyBall, "part[copied]"),
    (KeepsParameters, HeavyBall, "parts_are_plain_tensors"),
    (LoadsIntoItsOwn, HeavyBall, "swapped_states"),
    (WorksOnACopy, HeavyBall, "filled_in_place"),
    (ReplacesState, HeavyBall, "shared_memory"),
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
