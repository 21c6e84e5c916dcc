"""The balancer `maglev`: as ring-hash, by a table that spreads keys more evenly and is faster to ask.

The table has 65537 entries (a prime, and 100 for each of 655 endpoints). Endpoints fill it in turns, each going through
a permutation of its own (Eisenbud et al., Maglev, NSDI 2016, section 3.4); a heavier endpoint has more turns. When an
endpoint leaves, its keys move and hardly any other. Bounded load as in ring-hash: what is beyond goes to the entries
that follow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from sidecar.api import Balancer, BoundedLoad, Endpoint, Pick, Rnd, weighted

TABLE_SIZE = 65_537


@dataclass(frozen=True)
class Settings:
    """`bounded_load_percent` 0: unbounded."""

    bounded_load_percent: float = 125.0

    def __post_init__(self) -> None:
        BoundedLoad.check(self.bounded_load_percent)


class Maglev(Balancer):
    Config = Settings
    keyed = True
    config: Settings

    def __init__(self, config: Settings = Settings()) -> None:
        super().__init__(config)

    def arrange(self, endpoints: Sequence[Endpoint]) -> Pick:
        return Table(endpoints, self.config.bounded_load_percent).pick


class Table:
    """The entries of one set of endpoints."""

    __slots__ = ("_bound", "_endpoints", "_owners")

    def __init__(self, endpoints: Sequence[Endpoint], bounded_load_percent: float) -> None:
        self._endpoints = endpoints
        self._bound = BoundedLoad(bounded_load_percent)
        # Who takes the first turn must not depend on the order in which the endpoints were told.
        ordered = sorted(endpoints, key=lambda endpoint: endpoint.key)
        entries = fill([endpoint.key for endpoint in ordered], [endpoint.weight for endpoint in ordered])
        self._owners = [ordered[index] for index in entries]

    def pick(self, candidates: Sequence[Endpoint], key: int | None, now: float, rnd: Rnd) -> Endpoint:
        if key is None:
            return weighted(candidates, rnd)
        owners = self._owners
        at = key % TABLE_SIZE
        endpoint = owners[at]
        whole = candidates is self._endpoints
        if (whole or endpoint in candidates) and (not endpoint.active or self._bound.has_room(endpoint, candidates)):
            return endpoint
        return self._bound.next(owners, at, candidates)


def fill(keys: Sequence[str], weights: Sequence[float], size: int = TABLE_SIZE) -> list[int]:
    """Who owns each entry. `size` must be prime, so that every skip visits all entries."""
    if not keys:
        return []
    offsets, skips = [], []
    for key in keys:
        digest = blake2b(key.encode(), digest_size=16).digest()
        offsets.append(int.from_bytes(digest[:8], "little") % size)
        skips.append(int.from_bytes(digest[8:], "little") % (size - 1) + 1)
    owners = [-1] * size
    heaviest = max(weights)
    shares = [weight / heaviest for weight in weights]  # turns in each round
    due = [0.0] * len(keys)
    filled = 0
    while True:
        for index, share in enumerate(shares):
            due[index] += share
            if due[index] < 1.0 - 1e-9:
                continue
            due[index] -= 1.0
            at, skip = offsets[index], skips[index]
            while owners[at] >= 0:
                at += skip
                if at >= size:
                    at -= size
            owners[at] = index
            offsets[index] = at
            filled += 1
            if filled == size:
                return owners
