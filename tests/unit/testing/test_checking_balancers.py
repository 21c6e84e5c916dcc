"""check_balancer finds each way of breaking the contract, and says so."""

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from sidecar.api import Balancer, stable_hash, weighted
from sidecar.testing import check_balancer, make_endpoints

# mypy: disable-error-code="override,no-untyped-def"


class Weighs(Balancer):
    def pick(self, candidates, key, now, rnd):
        return weighted(candidates, rnd)


class First(Balancer):
    def pick(self, candidates, key, now, rnd):
        return candidates[0]


class Forgetful(Balancer):
    """Picks among those that were arranged, not among the candidates."""

    def arrange(self, endpoints):
        return lambda candidates, key, now, rnd: weighted(endpoints, rnd)


class Raises(Balancer):
    def pick(self, candidates, key, now, rnd):
        return candidates[1]


class RaisesWhenArranged(Balancer):
    def arrange(self, endpoints):
        raise KeyError(endpoints[0].key)


class Nobody(Balancer):
    def pick(self, candidates, key, now, rnd):
        return None


class OwnChance(Balancer):
    def pick(self, candidates, key, now, rnd):
        return random.choice(candidates)


class OwnClock(Balancer):
    def pick(self, candidates, key, now, rnd):
        return candidates[time.perf_counter_ns() // 100 % len(candidates)]


class Waits(Balancer):
    async def pick(self, candidates, key, now, rnd):
        return candidates[0]


class Reads(Balancer):
    def pick(self, candidates, key, now, rnd):
        with open("/proc/self/stat"):
            return weighted(candidates, rnd)


class Remainder(Balancer):
    keyed = True

    def pick(self, candidates, key, now, rnd):
        return sorted(candidates, key=lambda e: e.key)[(key or 0) % len(candidates)]


class Rendezvous(Balancer):
    """Highest random weight: a hashing balancer in two lines."""

    keyed = True

    def pick(self, candidates, key, now, rnd):
        return max(candidates, key=lambda e: stable_hash(b"%d %b" % (key or 0, e.key.encode())))


class ByOrder(Rendezvous):
    def pick(self, candidates, key, now, rnd):
        return max(enumerate(candidates), key=lambda pair: stable_hash(b"%d %d" % (key or 0, pair[0])))[1]


class IgnoresWeight(Balancer):
    def pick(self, candidates, key, now, rnd):
        return candidates[int(rnd() * len(candidates))]


class Hoards(Balancer):
    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.seen: dict[str, list[float]] = {}

    def pick(self, candidates, key, now, rnd):
        endpoint = weighted(candidates, rnd)
        self.seen.setdefault(endpoint.key, []).append(now)
        return endpoint


class HoardsInItsClass(Weighs):
    seen: list[str] = []

    def ended(self, endpoint, result, latency_s, now):
        self.seen.append(f"{endpoint.key} {now}")


class Counts(Balancer):
    def pick(self, candidates, key, now, rnd):
        endpoint = weighted(candidates, rnd)
        endpoint.active += 1
        return endpoint


class Hashes(Balancer):
    keyed = True

    def pick(self, candidates, key, now, rnd):
        return max(candidates, key=lambda e: hash((key, e.key)))


class Trips(Weighs):
    def ended(self, endpoint, result, latency_s, now):
        assert result != "throttled"


class Describes(Weighs):
    def describe(self, endpoint, now) -> Mapping[str, Any]:
        return {"memo": endpoint.memo}


class Careless(Weighs):
    @classmethod
    def decode(cls, config):
        return None


@dataclass(frozen=True)
class Settings:
    percent: int


class Settled(Weighs):
    Config = Settings


def test_proper_balancers_pass() -> None:
    check_balancer(Weighs)
    check_balancer(Settled, {"percent": 3})
    check_balancer(Rendezvous, moved_max=0.0, spread=None)
    check_balancer(First, spread=None)


@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (First, "sends 6000 of 6000 attempts to one of 2 equal endpoints"),
        (Forgetful, "it is none of them"),
        (Raises, "Raises.pick raised IndexError"),
        (RaisesWhenArranged, "arrange raised IndexError"),
        (Nobody, "pick gave None"),
        (OwnChance, "picks otherwise when all is the same"),
        (OwnClock, "picks otherwise when all is the same"),
        (Waits, "must be a plain function"),
        (Reads, "does no I/O"),
        (Remainder, "of the keys of other endpoints when one of ten leaves"),
        (ByOrder, "told in another order"),
        (IgnoresWeight, "heed `weight`"),
        (Hoards, "objects more"),
        (HoardsInItsClass, "objects more"),
        (Counts, "pick writes to endpoints"),
        (Hashes, "uses hash(), which differs between processes"),
        (Trips, "for throttled after 0.0 s"),
        (Describes, "must give a map of numbers and texts"),
        (Careless, "ignores unknown keys"),
        (Settled, "refuses the settings given to check_balancer: percent: required, but missing"),
        (int, "must be a class that derives from sidecar.api.Balancer"),
    ],
)
def test_each_mistake_is_named(cls: Any, says: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_balancer(cls)
    assert says in str(caught.value)


def test_made_endpoints() -> None:
    a, b, c = make_endpoints(3, (2, 5), zone="x")
    assert [each.weight for each in (a, b, c)] == [2, 5, 1]
    assert (a.key, b.key, a.zone, a.active, a.memo) == ("10.0.0.0:80", "10.0.0.1:80", "x", 0, None)
    assert len({each.key for each in make_endpoints(3_000)}) == 3_000
