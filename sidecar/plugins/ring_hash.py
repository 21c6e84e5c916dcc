"""The balancer `ring-hash`: a request's key chooses the endpoint, and goes on choosing it while endpoints come and go.

Consistent hashing (Karger et al. 1997): each endpoint stands at many points of a ring, a key belongs to the next point.
When an endpoint leaves, only its keys move. With bounded load (Mirrokni et al. 2016) no endpoint has more than
`bounded_load_percent` of the mean load by weight: what is beyond goes on to the next endpoint of the ring. A request
without the key goes anywhere, by weight.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from sidecar.api import Balancer, BoundedLoad, Endpoint, Pick, Rnd, weighted

_POINTS = 160  # of an endpoint of mean weight
_POINTS_A_DIGEST = 8
_RING_MAX = 65_536
_LAST = (1 << 64) - 1


@dataclass(frozen=True)
class Settings:
    """`bounded_load_percent` 0: unbounded."""

    bounded_load_percent: float = 125.0

    def __post_init__(self) -> None:
        BoundedLoad.check(self.bounded_load_percent)


class RingHash(Balancer):
    Config = Settings
    keyed = True
    config: Settings

    def __init__(self, config: Settings = Settings()) -> None:
        super().__init__(config)

    def arrange(self, endpoints: Sequence[Endpoint]) -> Pick:
        return Ring(endpoints, self.config.bounded_load_percent).pick


class Ring:
    """The points of one set of endpoints, in order."""

    __slots__ = ("_bound", "_endpoints", "_owners", "_points")

    def __init__(self, endpoints: Sequence[Endpoint], bounded_load_percent: float) -> None:
        self._endpoints = endpoints
        self._bound = BoundedLoad(bounded_load_percent)
        count = max(1, len(endpoints))
        each = min(_POINTS, max(1, _RING_MAX // count))
        mean = sum(endpoint.weight for endpoint in endpoints) / count
        placed = [
            (point, endpoint)
            for endpoint in endpoints
            for point in points_of(endpoint.key, max(1, round(each * endpoint.weight / mean)))
        ]
        placed.sort(key=lambda pair: (pair[0], pair[1].key))
        self._points = [point for point, _ in placed]
        self._owners = [endpoint for _, endpoint in placed]

    def pick(self, candidates: Sequence[Endpoint], key: int | None, now: float, rnd: Rnd) -> Endpoint:
        if key is None:
            return weighted(candidates, rnd)
        owners = self._owners
        at = bisect_left(self._points, key & _LAST)
        endpoint = owners[at] if at < len(owners) else owners[0]
        whole = candidates is self._endpoints
        if (whole or endpoint in candidates) and (not endpoint.active or self._bound.has_room(endpoint, candidates)):
            return endpoint
        return self._bound.next(owners, at, candidates)


def points_of(key: str, count: int) -> list[int]:
    """The first so many points of an endpoint: a heavier one keeps those it had."""
    points: list[int] = []
    for number in range(-(-count // _POINTS_A_DIGEST)):
        digest = blake2b(b"%b\0%d" % (key.encode(), number)).digest()
        points += (int.from_bytes(digest[at : at + 8], "little") for at in range(0, 64, 8))
    return points[:count]
