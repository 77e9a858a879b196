"""The order of parameters in their model, where an optimizer has them in several groups.

Groups (with and without weight decay, say) are in the order of the model each, but not one after
the other. Between two modules that both groups know, the order of each is kept and they are read
side by side, so that a convolution of one group stands beside its normalisation in the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def model_order(groups: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> list[str]:
    """The layers of all groups in the order of the model, as far as the groups tell it.

    Args:
        groups: for each parameter group the names of its layers (`layer1.0.conv1`), in its order.
        sizes: numbers in each layer, by name.

    Returns:
        Every name once; one group's as they are. Where the groups have no module in common, they
        follow one another.
    """
    if len(groups) == 1:
        return list(dict.fromkeys(groups[0]))
    return _ordered(groups, "", sizes, related=False)


def _ordered(
    groups: Sequence[Sequence[str]], parent: str, sizes: Mapping[str, int], *, related: bool
) -> list[str]:
    """The names below one module; the parts between dots are put in order one by one."""
    depth = len(parent)
    inside = [[name for name in names if name.startswith(parent)] for names in groups]
    heads = [list(dict.fromkeys(n[depth:].partition(".")[0] for n in names)) for names in inside]
    below = {head: f"{parent}{head}" for names in heads for head in names}
    weight = {
        head: sum(sizes[n] for n in set().union(*inside) if _is_of(n, full))
        for head, full in below.items()
    }
    if all(head.isdecimal() for head in below):  # of a Sequential or a ModuleList
        merged = sorted(below, key=int)
    else:
        merged = []
        for names in heads:
            merged = _merge(merged, names, weight, related=related)
    ordered: list[str] = []
    for head in merged:
        full = below[head]
        if any(full in names for names in inside):
            ordered.append(full)
        deeper = [[n for n in names if n.startswith(f"{full}.")] for names in inside]
        if any(deeper):
            ordered += _ordered(deeper, f"{full}.", sizes, related=True)
    return ordered


def _is_of(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _merge(a: list[str], b: list[str], weight: Mapping[str, int], *, related: bool) -> list[str]:
    """Both lists in one: in common names they meet, between these they are read side by side."""
    place = {name: i for i, name in enumerate(b)}
    known = set(a)
    if not related and known.isdisjoint(b):
        return [*a, *b]
    merged: list[str] = []
    run: list[str] = []
    start = 0
    for name in [*a, None]:
        if name is not None and place.get(name, -1) < start:
            run.append(name)
            continue
        stop = len(b) if name is None else place[name]
        merged += _side_by_side(run, [n for n in b[start:stop] if n not in known], weight)
        if name is not None:
            merged.append(name)
        run, start = [], stop + 1
    return merged


def _side_by_side(a: list[str], b: list[str], weight: Mapping[str, int]) -> list[str]:
    """By relative position, of two at the same the larger first: a weight before its norm."""
    where = [
        ((i + 0.5) / len(names), -weight[n], n) for names in (a, b) for i, n in enumerate(names)
    ]
    return [name for *_, name in sorted(where)]
