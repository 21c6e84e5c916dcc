"""A choice among a few by weight: which version a request goes to.

Pure: the same `rnd` gives the same choice. Must not know what is chosen. Invariant: weight 0 is never chosen.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Weighted(Generic[T]):
    """Each item with a share of weight / sum of weights."""

    __slots__ = ("_bounds", "_sum", "items")

    def __init__(self, items: Iterable[tuple[T, int]]) -> None:
        chosen = [(item, weight) for item, weight in items if weight > 0]
        if not chosen:
            raise ValueError("at least one weight must be above 0")
        self.items = tuple(item for item, _ in chosen)
        self._bounds: list[int] = []
        total = 0
        for _, weight in chosen:
            total += weight
            self._bounds.append(total)
        self._sum = total

    def pick(self, rnd: Callable[[], float]) -> T:
        items = self.items
        if len(items) == 1:
            return items[0]
        return items[bisect_right(self._bounds, int(rnd() * self._sum))]
