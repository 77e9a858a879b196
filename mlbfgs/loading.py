"""What a given state is made of before it is loaded: whose it is, which entry belongs to whom.

Parameters are matched by name where both sides have names, in whatever order they are, and by their
place otherwise. Wrappers put words into names ("module." of DistributedDataParallel, "_orig_mod."
of torch.compile, ...), which count for nothing here.

A state of another optimizer has nothing of the curvature, and its settings mean other things: a β
of Adam's is no β of ours. Of torch's SGD the momentum buffers and the settings of the same meaning
are taken over, of any other optimizer nothing; one warning says so.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mlbfgs.groups import Groups
from mlbfgs.growth import AVERAGE
from mlbfgs.values import plain_number

logger = logging.getLogger(__name__)

StateDict = dict[str, Any]

#: Settings that every state of ours has and no other optimizer's.
OWN_SETTINGS = ("history_size", "update_interval", "damping")
OWN_ENTRIES = ("s_history", "y_history", "param_snapshot", "grad_average")
#: What means the same in torch's SGD; `initial_lr` is a scheduler's.
SGD_SETTINGS = ("lr", "momentum", "weight_decay", "maximize", "initial_lr")
#: The words of wrappers, anywhere in a name; "module" at its beginning only.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
TENSORS = (
    *("param_average", "param_progress", "param_snapshot", "grad_average", "grad_snapshot"),
    *("momentum_buffer", "s_history", "y_history"),
)
#: The least value of each counter, and the largest of all: what a float holds exactly.
MOST = 2**53
COUNTERS = {"step": 0, "seeded": 0, "pairs": 0, "skipped": 0, "damped": 0, "block": -1}


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers add."""
    words = [word for word in name.split(".") if word not in WRAPPERS]
    while len(words) > 1 and words[0] == "module":
        words = words[1:]
    return ".".join(words)


def by_name(loaded: StateDict, groups: Groups) -> StateDict:
    """Bring the groups of a state, and the parameters in them, into the order of ours.

    Args:
        loaded: a state dict.
        groups: the optimizer's `param_groups`.

    Returns:
        The same with our order and our names; as it is where one side has no names, or where the
        numbers of groups or parameters differ, which torch refuses.

    Raises:
        ValueError: a name is on one side only, or the groups divide the parameters in other ways.
    """
    saved = loaded["param_groups"]
    named = all("param_names" in group for group in (*saved, *groups))
    if not named or _sizes(saved) != _sizes(groups):
        return loaded
    ours, theirs = _plain_names(groups), _plain_names(saved)
    known, given = set(chain.from_iterable(ours)), set(chain.from_iterable(theirs))
    if known.isdisjoint(given):
        if known:
            logger.warning(
                "no parameter has a name of the loaded state (%s there, %s here): they are matched "
                "by their order",
                *(theirs[0][0] if theirs[0] else "none", ours[0][0] if ours[0] else "none"),
            )
        return {**loaded, "param_groups": _renamed(saved, groups)}
    if known != given:
        raise ValueError(_one_sided(sorted(given - known), sorted(known - given)))
    ordered = []
    left = list(range(len(saved)))
    for i, names in enumerate(ours):
        fitting = [k for k in left if set(theirs[k]) == set(names)]
        if not fitting:
            raise ValueError(
                f"the groups of the state divide the parameters in another way: no group there has "
                f"the parameters of group {i} here ({', '.join(names[:3])}, ...)"
            )
        left.remove(fitting[0])
        ids = dict(zip(theirs[fitting[0]], saved[fitting[0]]["params"], strict=True))
        ordered.append({**saved[fitting[0]], "params": [ids[name] for name in names]})
    return {**loaded, "param_groups": _renamed(ordered, groups)}


def _sizes(groups: Groups) -> list[int]:
    """Numbers of parameters, of groups in whatever order."""
    return sorted(len(group["params"]) for group in groups)


def _plain_names(groups: Groups) -> list[list[str]]:
    """The names in every group; as they are where two would become one."""
    names = [list(group["param_names"]) for group in groups]
    plain = [[plain_name(name) for name in inner] for inner in names]
    every = list(chain.from_iterable(plain))
    return plain if len(set(every)) == len(every) else names


def _renamed(saved: Groups, groups: Groups) -> list[dict[str, Any]]:
    pairs = zip(saved, groups, strict=False)
    return [{**group, "param_names": list(own["param_names"])} for group, own in pairs]


def _one_sided(given: Sequence[str], known: Sequence[str]) -> str:
    told = [
        f"{', '.join(map(repr, names[:3]))}{', ...' if len(names) > 3 else ''} {where}"
        for names, where in ((given, "of the state is no parameter"), (known, "has no state"))
        if names
    ]
    return (
        f"names do not match: {'; '.join(told)}. Rename them in the state's 'param_names', or "
        "remove 'param_names' from its groups to match by order"
    )


def of_this_kind(loaded: StateDict, groups: Groups, name: str) -> tuple[StateDict, bool]:
    """Take from another optimizer's state only what means the same here.

    Args:
        loaded: a state dict.
        groups: the optimizer's `param_groups`.
        name: of the optimizer, for the warning.

    Returns:
        The state dict, and whether it is this optimizer's own kind.
    """
    saved, entries = loaded["param_groups"], loaded["state"].values()
    keys = sorted({str(key) for entry in entries if isinstance(entry, Mapping) for key in entry})
    own = all(key in group for group in saved for key in OWN_SETTINGS)
    if own or any(key in OWN_ENTRIES for key in keys) or not (keys or saved):
        return loaded, True
    settings = sorted({key for group in saved for key in group} - {"params", "param_names"})
    if not keys and not settings:
        return loaded, True
    from_sgd = all("dampening" in group and "nesterov" in group for group in saved)
    kept = SGD_SETTINGS if from_sgd else ()
    taken = ("momentum_buffer",) if from_sgd else ()
    dropped = [key for key in keys if key not in taken]
    dropped += [key for key in settings if key not in kept and _says_something(saved, key)]
    logger.warning(
        "the loaded state is not of %s: %s%s; averages and pairs start anew",
        name,
        "momentum buffers, lr, momentum, weight_decay and maximize are taken over"
        if from_sgd
        else "the settings stay as they are",
        f"; dropped are {', '.join(dropped)}" if dropped else "",
    )
    merged = []
    for group, ours in zip(saved, groups, strict=False):
        here = {key: value for key, value in ours.items() if key not in ("params", "param_names")}
        place = {key: group[key] for key in ("params", "param_names") if key in group}
        merged.append({**here, **{k: group[k] for k in kept if k in group}, **place})
    merged += saved[len(merged) :]  # for torch to refuse
    state = {
        key: {k: v for k, v in entry.items() if k in taken}
        for key, entry in loaded["state"].items()
        if isinstance(entry, Mapping)
    }
    return {**loaded, "state": state, "param_groups": merged}, False


def _says_something(saved: Groups, key: str) -> bool:
    return any(group.get(key) not in (None, False, 0) for group in saved)


def entries_of(loaded: StateDict, groups: Groups) -> dict[Tensor, Mapping[str, Any]]:
    """Each parameter's entry of a state whose groups are in our order.

    Raises:
        ValueError: the state has entries, and none of a parameter.
    """
    ids = [i for group in loaded["param_groups"] for i in group["params"]]
    params = [p for group in groups for p in group["params"]]
    state = loaded["state"]
    strangers = [key for key in state if key not in set(ids)]
    if strangers:
        told = ", ".join(map(repr, strangers[:3]))
        if len(strangers) == len(state):
            raise ValueError(
                f"the state has entries {told}, and its groups' 'params' name none of them, but "
                f"{', '.join(map(repr, ids[:3]))}: both must be the same numbers or names"
            )
        logger.warning("entries %s of the loaded state belong to no parameter: dropped", told)
    return {p: state.get(i, {}) for i, p in zip(ids, params, strict=True)}


def checked_entry(entry: Any, param: Tensor, name: str) -> dict[str, Any]:
    """One parameter's entry with plain counters, and without what is None.

    Args:
        entry: as it was given.
        param: the parameter.
        name: its name, for messages.

    Raises:
        ValueError: a counter is no whole number or too small, or a tensor is of no real
            floating-point dtype, sparse, without numbers, or no tensor at all.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"loaded state of {name} is a {type(entry).__name__}, expected a dict")
    found = {key: value for key, value in entry.items() if value is not None}
    for key, least in COUNTERS.items():
        if key in found:
            if key == "seeded" and isinstance(found[key], bool):
                found[key] = int(found[key])
            found[key] = _counter(found[key], least, f"loaded state {key!r} of {name}")
    average = found.get(AVERAGE, 0.0)
    if not (isinstance(average, Tensor) and average.numel() == 1) and plain_number(average) is None:
        raise ValueError(f"loaded state {AVERAGE!r} of {name} is {average!r}, expected a number")
    for key in TENSORS:
        value = found.get(key)
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(
                f"loaded state {key!r} of {name} is a {type(value).__name__}, expected a tensor"
            )
        if not value.is_floating_point() or value.layout != torch.strided:
            raise ValueError(
                f"loaded state {key!r} of {name} has {value.dtype} and {value.layout}, expected "
                "a dense tensor of real floating-point numbers"
            )
        if value.is_meta and not param.is_meta:
            raise ValueError(f"loaded state {key!r} of {name} is on meta: it has no numbers")
    return found


def _counter(value: object, least: int, label: str) -> int:
    number = plain_number(value)
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if not isinstance(number, int) or not least <= number <= MOST:
        raise ValueError(
            f"{label} is {value!r}, expected a whole number from {least} to {MOST} (2^53)"
        )
    return number
