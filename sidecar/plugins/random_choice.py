"""The balancer `random`: each endpoint by chance, with a share of its weight."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from sidecar.api import Balancer, Endpoint, Pick, Rnd, weighted


class RandomChoice(Balancer):
    def arrange(self, endpoints: Sequence[Endpoint]) -> Pick:
        return Shares(endpoints).pick


class Shares:
    """The sums of weights of one set of endpoints."""

    __slots__ = ("_bounds", "_endpoints", "_last")

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = endpoints
        self._bounds = list(accumulate(endpoint.weight for endpoint in endpoints))
        self._last = len(endpoints) - 1

    def pick(self, candidates: Sequence[Endpoint], key: int | None, now: float, rnd: Rnd) -> Endpoint:
        if candidates is not self._endpoints:
            return weighted(candidates, rnd)
        bounds = self._bounds
        return candidates[bisect_right(bounds, rnd() * bounds[-1], 0, self._last)]
