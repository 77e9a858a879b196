"""The part of a batch, or of the test images, that one rank of a run works on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One of `count` contiguous parts, whose sizes differ by at most one; the first are larger.

    Attributes:
        index: which one, from 0.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    def of(self, start: int, stop: int) -> slice:
        """The part of the numbers from `start` to `stop`, without `stop`."""
        size, rest = divmod(stop - start, self.count)
        first = start + self.index * size + min(self.index, rest)
        return slice(first, first + size + (1 if self.index < rest else 0))


WHOLE = Part()
