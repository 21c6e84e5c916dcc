"""The balancer `round-robin`: smooth weighted turns.

Each pick adds its weight to every endpoint, takes the one that has most, and takes the sum of weights from it, so that
weights 5, 1, 1 give a a b a c a a. All is zero again after sum/gcd picks; the round is therefore remembered and only
its first pass costs a scan. Begins at a random place, or all callers would begin with the same endpoint.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import cycle, islice

from sidecar.api import Balancer, Endpoint, Pick, Rnd, weighted

_ROUND_MAX = 65_536  # picks of a remembered round
_SKIP_MAX = 16
_FINE = 1000  # parts of a weight that is no whole number


class RoundRobin(Balancer):
    def arrange(self, endpoints: Sequence[Endpoint]) -> Pick:
        return Turns(endpoints).pick


class Turns:
    """The rounds of one set of endpoints."""

    __slots__ = ("_endpoints", "_turns", "_weights", "period")

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = endpoints
        self._weights = whole_weights(endpoints)
        self.period = sum(self._weights)
        self._turns: Iterator[Endpoint] | None = None  # not begun

    def pick(self, candidates: Sequence[Endpoint], key: int | None, now: float, rnd: Rnd) -> Endpoint:
        turns = self._turns
        if turns is None:
            turns = self._begin(rnd)
        if candidates is self._endpoints:
            return next(turns)
        for _ in range(min(self.period, _SKIP_MAX)):  # the next whose turn it is
            endpoint = next(turns)
            if endpoint in candidates:
                return endpoint
        return weighted(candidates, rnd)  # that would take long

    def _begin(self, rnd: Rnd) -> Iterator[Endpoint]:
        endpoints, period = self._endpoints, self.period
        if period == len(endpoints):
            at = int(rnd() * period)
            self._turns = cycle((*endpoints[at:], *endpoints[:at]))
            return self._turns
        turns = smooth(endpoints, self._weights)
        if period <= _ROUND_MAX:
            turns = cycle(islice(turns, period))  # works each turn out once
        for _ in range(int(rnd() * min(period, _SKIP_MAX))):
            next(turns)
        self._turns = turns
        return turns


def smooth(endpoints: Sequence[Endpoint], weights: Sequence[int]) -> Iterator[Endpoint]:
    """Whose turn it is, for ever."""
    current = [0] * len(weights)
    total = sum(weights)
    while True:
        best = 0
        for index, weight in enumerate(weights):
            current[index] += weight
            if current[index] > current[best]:
                best = index
        current[best] -= total
        yield endpoints[best]


def whole_weights(endpoints: Sequence[Endpoint]) -> list[int]:
    """Weights as small whole numbers in the same proportions, to a thousandth of a weight."""
    weights = [endpoint.weight for endpoint in endpoints]
    if all(weight == int(weight) for weight in weights):
        whole = [int(weight) for weight in weights]
    else:
        whole = [max(1, round(weight * _FINE)) for weight in weights]
    divisor = math.gcd(*whole) or 1
    return [weight // divisor for weight in whole]
