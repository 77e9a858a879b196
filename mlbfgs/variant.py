"""What may differ from the papers' algorithm, each item a switch of its own.

The released block-wise optimizer (mL-BFGS) and the released full-model optimizer (SLIM-QN) are not
the printed algorithms. `PAPER` is the printed algorithm; `RELEASED_BLOCKWISE` and
`RELEASED_FULL` have all that the release changes, so that the effects can be measured one by one.
`GUARDED`, the default of the optimizers, is the printed algorithm with one switch of our own, the
last one below: as printed, the first steps after the warm-up diverge on many networks.

With g the gradient, wd the weight decay, A an average of x (θ, or the gradient that enters it):

    averaging              ema: A = β A + (1-β) x;  sum: A = β A + x, which starts at the first x
    averaged_gradient      decayed: g + wd θ;  scaled: (1 + wd) g;  plain: g
    reset_grad_average     every T steps, after pair and snapshot: A_g = the gradient that entered
    pair_momentum m        s = (1-m) s + m s_last,  y = (1-m) y + m ŷ_last, before damping
    pair_threshold         a pair is dropped where sᵀŷ is below it; None is our rounding rule
    ratio_epsilon ε        μ = sᵀy / (sᵀs + ε),  γ = sᵀŷ / (ŷᵀŷ + ε)
    recursion_epsilon ε    the recursion divides by sᵀŷ + ε
    same_step              a pair is used in the step that stored it, no step later
    normalize_direction    every d is divided by the root of Σ ‖d‖² over the blocks
    kl_clip κ              every d is multiplied by min(1, √(κ / Σ gᵀd)), here g without wd θ
    decay_outside_blocks   False: from the first pair on, parameters in no block have no wd θ
    drop_oldest_first      a full history drops its oldest pair before the new one is tested, so
                           that it has one pair less after a refusal; needs M of at least 2
    growth_limit q         every d is multiplied by min(1, q A / P), with P = Σ |gᵀd| over the blocks
                           and A a running average of P (`mlbfgs.growth`)

Scaling begins with the first pair. It leaves d as it is where Σ gᵀd <= 0 (the clip has nothing to
bound) and where all d are zero. Only one switch may set the length of the direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from mlbfgs.growth import DEFAULT_LIMIT
from mlbfgs.values import check_choice, flag, plain_number

Averaging = Literal["ema", "sum"]
AveragedGradient = Literal["decayed", "scaled", "plain"]
FLAGS = (
    "reset_grad_average",
    "normalize_direction",
    "same_step",
    "decay_outside_blocks",
    "drop_oldest_first",
)
#: The numeric switches, what they may be in words, and whether a number will do.
NUMBERS: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("pair_momentum", "in [0, 1)", lambda v: 0 <= v < 1),
    ("ratio_epsilon", "at least 0", lambda v: 0 <= v < math.inf),
    ("recursion_epsilon", "at least 0", lambda v: 0 <= v < math.inf),
    (
        "pair_threshold",
        "None, or a number below infinity; -inf drops no pair",
        lambda v: v < math.inf,
    ),
    ("kl_clip", "None, or a number above 0", lambda v: 0 < v < math.inf),
    ("growth_limit", "None, or a number of at least 1", lambda v: 1 <= v < math.inf),
)


@dataclass(frozen=True)
class Variant:
    """The switches; their defaults are the papers' algorithm. The module says what each does.

    Attributes:
        averaging: "ema" or "sum".
        reset_grad_average: whether the gradient average begins anew every T steps.
        pair_momentum: m in [0, 1).
        averaged_gradient: "decayed", "scaled" or "plain".
        pair_threshold: least sᵀŷ; minus infinity drops no pair; None drops rounding errors.
        ratio_epsilon: ε of μ and γ.
        recursion_epsilon: ε of the recursion's divisions.
        normalize_direction: whether the whole direction is normalised.
        kl_clip: κ, or None.
        same_step: whether a pair is used at once.
        decay_outside_blocks: whether parameters in no block keep their weight decay.
        drop_oldest_first: whether a pair that is refused costs a full history its oldest pair.
        growth_limit: q, at least 1, or None.

    Raises:
        ValueError: a value is out of its range, or two switches contradict each other.
    """

    averaging: Averaging = "ema"
    reset_grad_average: bool = False
    pair_momentum: float = 0.0
    averaged_gradient: AveragedGradient = "decayed"
    pair_threshold: float | None = None
    ratio_epsilon: float = 0.0
    recursion_epsilon: float = 0.0
    normalize_direction: bool = False
    kl_clip: float | None = None
    same_step: bool = False
    decay_outside_blocks: bool = True
    drop_oldest_first: bool = False
    growth_limit: float | None = None

    def __post_init__(self) -> None:
        check_choice("variant.averaging", self.averaging, get_args(Averaging))
        kinds = get_args(AveragedGradient)
        check_choice("variant.averaged_gradient", self.averaged_gradient, kinds)
        for key in FLAGS:
            object.__setattr__(self, key, flag(f"variant.{key}", getattr(self, key)))
        for key, wanted, holds in NUMBERS:
            value = getattr(self, key)
            if value is None and wanted.startswith("None"):
                continue
            number = plain_number(value)
            if number is None or not holds(number):
                raise ValueError(f"Invalid variant.{key}: {value!r} ({wanted})")
            object.__setattr__(self, key, number)
        lengths = ("growth_limit", "kl_clip", "normalize_direction")
        given = [key for key in lengths if getattr(self, key) not in (None, False)]
        if len(given) > 1:
            first, second = given[:2]
            off = "False" if second == "normalize_direction" else "None"
            raise ValueError(
                f"variant.{first}={getattr(self, first)} contradicts "
                f"variant.{second}={getattr(self, second)}: both set the length of the direction; "
                f"set {first} to None or {second} to {off}"
            )

    def switches(self) -> dict[str, Any]:
        """The fields by name, for parameter groups and checkpoints."""
        return asdict(self)


PAPER = Variant()
#: The default of the optimizers.
GUARDED = Variant(growth_limit=DEFAULT_LIMIT)
#: The release of mL-BFGS.
RELEASED_BLOCKWISE = Variant(
    averaging="sum",
    reset_grad_average=True,
    pair_momentum=0.9,
    averaged_gradient="scaled",
    pair_threshold=-math.inf,
    ratio_epsilon=1e-12,
    normalize_direction=True,
    same_step=True,
    decay_outside_blocks=False,
)
#: The release of SLIM-QN. Its κ is 0.005 in the class and 0.05 on the command line; the published
#: command, for the other optimizer, passes 1. 0.001 is the release's κ for KFAC, and what the
#: committed runs have.
RELEASED_FULL = Variant(
    averaged_gradient="plain",
    pair_threshold=1e-4,
    ratio_epsilon=1e-5,
    recursion_epsilon=1e-5,
    kl_clip=1e-3,
    same_step=True,
    drop_oldest_first=True,
)
NAMES = ("guarded", "paper", "released")


def as_variant(value: object, released: Variant) -> tuple[Variant, frozenset[str]]:
    """Read what a user may give.

    Args:
        value: "guarded", "paper", "released", a mapping of switches with an optional `base` (one
            of these names; default "paper"), or a `Variant`.
        released: what "released" stands for.

    Returns:
        The variant, and the switches that were asked for by their own name.

    Raises:
        ValueError: an unknown name, switch or value; the message has the nearest valid one.
    """
    if isinstance(value, Variant):
        return value, _departures(value, [field.name for field in fields(Variant)])
    if isinstance(value, Mapping):
        named = dict(value)
        base = _named(named.pop("base", "paper"), released, "variant.base")
        for key in named:
            check_choice("switch of variant", key, [field.name for field in fields(Variant)])
        variant = Variant(**{**base.switches(), **named})
        return variant, _departures(variant, named)
    return _named(value, released, "variant"), frozenset()


def _departures(variant: Variant, keys: Sequence[str] | Mapping[str, Any]) -> frozenset[str]:
    return frozenset(key for key in keys if getattr(variant, key) != getattr(PAPER, key))


def _named(name: object, released: Variant, key: str) -> Variant:
    check_choice(key, name, NAMES)
    return {"guarded": GUARDED, "paper": PAPER, "released": released}[str(name)]


def check_effects(
    variant: Variant,
    asked: frozenset[str],
    groups: Sequence[Mapping[str, Any]],
    *,
    with_outside: bool,
) -> None:
    """Refuse switches that were asked for by name and could not change anything.

    A whole variant, asked for as such, is not refused for a part that happens to have no effect.

    Args:
        variant: the switches.
        asked: from `as_variant`.
        groups: the optimizer's `param_groups`.
        with_outside: whether there are parameters in no block.

    Raises:
        ValueError: the message says what to change.
    """
    betas, direction = groups[0]["betas"], groups[0]["direction"]
    decays = any(group["weight_decay"] != 0 for group in groups)
    idle = {
        "averaging": (not any(betas), "betas=0 keeps no averages", "give betas above 0"),
        "reset_grad_average": (
            betas[1] == 0,
            "the gradient average (betas[1] = 0) begins anew in every step",
            "give betas[1] above 0",
        ),
        "averaged_gradient": (not decays, "there is no weight_decay", "give a weight_decay"),
        "decay_outside_blocks": (
            not (decays and with_outside),
            "no parameter outside the blocks has weight decay",
            "give outside_blocks and a weight_decay",
        ),
        "drop_oldest_first": (
            variant.pair_threshold == -math.inf,
            "pair_threshold=-inf refuses no pair",
            "give another pair_threshold",
        ),
        "recursion_epsilon": (
            direction == "gamma_gradient",
            "direction='gamma_gradient' has no recursion",
            "use another direction",
        ),
    }
    for key, (without_effect, reason, remedy) in idle.items():
        if key in asked and without_effect:
            raise ValueError(
                f"variant.{key}={getattr(variant, key)!r} has no effect: {reason}; {remedy} or "
                f"leave {key} at {getattr(PAPER, key)!r}"
            )
