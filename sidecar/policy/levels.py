"""How traffic divides over priorities: Envoy's algorithm of spill-over, as plain arithmetic.

A level is healthy to min(100, 1.4 · usable %): up to 28 % of it may be lost before any traffic leaves it. What the
first level cannot carry goes to the second, and so on. Must not know endpoints. Invariant: loads are never negative and
sum to 100, unless there are no endpoints at all.
"""

from collections.abc import Sequence

OVERPROVISIONING = 1.4
_ALMOST = 1e-9

Count = tuple[int, int]
"""(endpoints that count, all endpoints) of a level."""


def health(usable: int, total: int) -> float:
    """What a level can carry, in percent."""
    return min(100.0, 100.0 * OVERPROVISIONING * usable / total) if total else 0.0


def loads(counts: Sequence[Count]) -> list[float]:
    """The share of traffic of each level, in percent. Where nothing is usable anywhere, by their numbers."""
    healths = [health(*count) for count in counts]
    total = min(100.0, sum(healths))
    if not total:
        healths = [float(count) for _, count in counts]
        total = sum(healths)
        return [each * 100.0 / total for each in healths] if total else [0.0] * len(counts)
    shares: list[float] = []
    left = 100.0
    for each in healths:
        share = min(left, each * 100.0 / total)
        left -= share
        shares.append(share)
    if left > 0.0:  # of rounding: to the first that can carry anything
        first = next(index for index, each in enumerate(healths) if each > 0.0)
        shares[first] += left
    return shares


def panics(counts: Sequence[Count], threshold: float) -> list[bool]:
    """Which levels are in panic, given who is well in each: fewer than `threshold` percent of it are, and all levels
    together cannot carry the load. A lone level answers for itself."""
    if len(counts) > 1 and sum(health(*count) for count in counts) >= 100.0 - _ALMOST:
        return [False] * len(counts)
    return [well * 100.0 < threshold * total for well, total in counts]
