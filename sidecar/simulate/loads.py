"""Where requests come from: when the next one of a load arrives, of which kind it is, and from which caller.

Must not know what becomes of it. Invariant: arrivals, kinds and callers depend on the seed and the load alone, never on
a policy, so that two policies meet the same requests.
"""

from collections.abc import Sequence

from .arrivals import Arrivals
from .chance import source
from .life import Ask
from .scenario import Load


class Source:
    """One load; `asks` are its kinds of requests, in the order of its shapes."""

    __slots__ = ("_arrivals", "_asks", "_bounds", "_draw", "_total", "caller")

    def __init__(self, load: Load, asks: Sequence[Ask], index: int, seed: int, ends_s: float) -> None:
        self.caller = load.caller
        self._arrivals = Arrivals(load.points, load.ramp, load.even, ends_s, source(seed, f"arrivals {index}"))
        self._draw = source(seed, f"requests {index}").random
        self._asks = asks
        self._bounds: list[int] = []
        self._total = 0
        for shape in load.shapes:
            self._total += shape.weight
            self._bounds.append(self._total)

    def next(self) -> float:
        """When; math.inf: no more."""
        return self._arrivals.next()

    def draw(self) -> tuple[Ask, float]:
        """What, and a number in [0, 1) by which the caller's endpoint is chosen."""
        drawn = self._draw() * self._total
        chosen = self._draw()
        for ask, bound in zip(self._asks, self._bounds, strict=True):
            if drawn < bound:
                return ask, chosen
        raise AssertionError("the last bound is the total")
