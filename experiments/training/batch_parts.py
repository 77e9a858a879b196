"""How a rank's part of a batch is cut into passes of `train.micro_batch` images at most."""

from __future__ import annotations

from experiments.data import Part


def number_of_passes(whole_batch: int, micro_batch: int | None, world_size: int) -> int:
    """Passes that a batch takes: the same on all ranks, and none of them empty.

    Args:
        whole_batch: images over all ranks.
        micro_batch: images of a pass, or None for no limit; one more where it leaves a rank with
            fewer images than passes.
        world_size: ranks that share the batch.
    """
    if micro_batch is None:
        return 1
    smallest, rest = divmod(whole_batch, world_size)
    return min(smallest, -(-(smallest + (rest > 0)) // micro_batch))


def pass_sizes(whole_batch: int, micro_batch: int | None, part: Part) -> list[int]:
    """Images of each pass that a rank makes over a batch.

    Args:
        whole_batch: images over all ranks.
        micro_batch: images of a pass at most, or None.
        part: what of the batch is the rank's.
    """
    places = part.of(0, whole_batch)
    passes = number_of_passes(whole_batch, micro_batch, part.count)
    parts = [Part(i, passes).of(0, places.stop - places.start) for i in range(passes)]
    return [one.stop - one.start for one in parts]
