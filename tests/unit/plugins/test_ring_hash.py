"""Keys and the endpoints that they belong to."""

import random
from collections import Counter
from typing import Any

import pytest

from sidecar.api import ConfigError, stable_hash
from sidecar.plugins.ring_hash import Ring, RingHash, points_of
from sidecar.testing import check_balancer, make_endpoints

KEYS = [stable_hash(b"user-%d" % n) for n in range(4000)]


def low() -> float:
    return 0.0


def homes(endpoints: Any, percent: float = 0.0) -> dict[int, str]:
    everyone = tuple(endpoints)
    ring = Ring(everyone, percent)
    return {key: ring.pick(everyone, key, 0.0, low).key for key in KEYS}


def test_it_keeps_the_contract() -> None:
    check_balancer(RingHash, moved_max=0.0)
    check_balancer(RingHash, {"bounded_load_percent": 0}, moved_max=0.0)


def test_where_a_key_belongs_is_the_same_in_every_process() -> None:
    """Any other answer would move every key of every mesh at an update."""
    assert points_of("10.0.0.1:80", 2) == [8711543648422865236, 6811410951836384660]
    assert points_of("a", 20)[:9] == points_of("a", 9)  # a heavier endpoint keeps its points


def test_only_keys_of_the_one_that_leaves_move() -> None:
    endpoints = make_endpoints(10)
    before, after = homes(endpoints), homes(endpoints[:-1])
    moved = {key for key in KEYS if before[key] != after[key]}
    assert moved == {key for key in KEYS if before[key] == endpoints[-1].key}
    assert 0.06 < len(moved) / len(KEYS) < 0.15


def test_shares_go_by_weight() -> None:
    shares = Counter(homes(make_endpoints(4, (1, 1, 1, 3))).values())
    assert 0.42 < max(shares.values()) / len(KEYS) < 0.58


def test_without_a_key_it_goes_by_weight_and_chance() -> None:
    endpoints = tuple(make_endpoints(2, (1, 3)))
    ring = Ring(endpoints, 125.0)
    rnd = random.Random(1).random
    shares = Counter(ring.pick(endpoints, None, 0.0, rnd).key for _ in range(4000))
    assert abs(shares[endpoints[1].key] - 3000) < 150


def test_a_full_endpoint_hands_on_and_a_missing_one_too() -> None:
    endpoints = tuple(make_endpoints(4))
    ring = Ring(endpoints, 125.0)
    key = KEYS[0]
    home: Any = ring.pick(endpoints, key, 0.0, low)
    home.active = 1  # ceil(1.25 · 2 / 4) = 1: full
    second: Any = ring.pick(endpoints, key, 0.0, low)
    assert second is not home
    others = [each for each in endpoints if each is not home]
    assert ring.pick(others, key, 0.0, low) is second  # the same successor
    for each in others:
        each.active = 1  # ceil(1.25 · 5 / 4) = 2: room again
    assert ring.pick(endpoints, key, 0.0, low) is home


@pytest.mark.parametrize("count", [2, 5, 20])
def test_no_load_is_beyond_the_bound(count: int) -> None:
    """One key for everything, attempts that never end: still at most ceil(1.25 · m / n) each."""
    endpoints = tuple(make_endpoints(count))
    ring = Ring(endpoints, 125.0)
    for total in range(1, 200):
        endpoint: Any = ring.pick(endpoints, KEYS[0], 0.0, low)
        endpoint.active += 1
        assert endpoint.active <= -(-125 * total // (100 * count))


def test_a_ring_of_very_many_stays_bounded() -> None:
    ring = Ring(make_endpoints(1000), 0.0)
    assert len(ring._points) == 65_000


@pytest.mark.parametrize("percent", [-1, 100, 10_001])
def test_settings_have_limits(percent: float) -> None:
    with pytest.raises(ConfigError):
        RingHash.decode({"bounded_load_percent": percent})
