"""Who is picked, and what is avoided."""

import random
from collections import Counter

import pytest
from support.balancers import LEAST_REQUEST, ROUND_ROBIN

from sidecar.model.snapshot import CircuitBreaker, EndpointSpec
from sidecar.policy.balancing import Aimed, Arrange, Subset
from sidecar.policy.endpoint import Endpoint

ONE_STRIKE = CircuitBreaker(consecutive_failures=1, open_for_s=1.0)


def low() -> float:
    return 0.0


def some(*weights: int) -> tuple[Endpoint, ...]:
    """Endpoints a, b, c … with these weights."""
    return tuple(Endpoint(EndpointSpec(chr(97 + n), 80, weight=w), ONE_STRIKE) for n, w in enumerate(weights))


def trip(endpoint: Endpoint, now: float = 0.0) -> None:
    endpoint.breaker.failure(endpoint.breaker.generation, now, low)


# -- subsets


def test_one_endpoint_is_returned_at_once_even_if_tried() -> None:
    endpoints = some(1)
    subset = Subset("all", endpoints, LEAST_REQUEST)
    assert subset.pick(0.0, (), low) is endpoints[0]
    assert subset.pick(0.0, endpoints, low) is endpoints[0]


def test_an_open_breaker_is_never_picked_and_its_probe_is() -> None:
    endpoints = some(1)
    subset = Subset("all", endpoints, LEAST_REQUEST)
    trip(endpoints[0])
    assert subset.pick(0.999, (), low) is None
    assert subset.why_none(0.999) == "circuit_open"
    assert subset.pick(1.0, (), low) is endpoints[0]
    assert endpoints[0].breaker.start_probe(1.0, 5.0)
    assert subset.pick(1.0, (), low) is None
    assert subset.why_none(1.0) == "circuit_open"


def test_no_endpoints_at_all() -> None:
    for subset in (Subset("all", (), LEAST_REQUEST), Subset("all", some(0, 0), LEAST_REQUEST)):
        assert subset.pick(0.0, (), low) is None
        assert subset.why_none(0.0) == "no_healthy_endpoint"


@pytest.mark.parametrize("balancer", [ROUND_ROBIN, LEAST_REQUEST])
@pytest.mark.parametrize("count", [2, 3, 4, 20])
def test_open_and_tried_endpoints_are_avoided(balancer: Arrange, count: int) -> None:
    endpoints = some(*[1] * count)
    subset = Subset("all", endpoints, balancer)
    rnd = random.Random(3).random
    for endpoint in endpoints[1:]:
        trip(endpoint)
    for _ in range(50):
        assert subset.pick(0.5, (), rnd) is endpoints[0]
    assert subset.pick(0.5, endpoints[:1], rnd) is endpoints[0]  # tried, but nothing else is left
    for _ in range(50):
        picked = subset.pick(1.0, endpoints[:-1], rnd)  # all half-open now, and all but one were tried
        assert picked is endpoints[-1]


@pytest.mark.parametrize("balancer", [ROUND_ROBIN, LEAST_REQUEST])
def test_a_lone_bad_one_among_many_only_shifts_its_share(balancer: Arrange) -> None:
    endpoints = some(*[1] * 10)
    subset = Subset("all", endpoints, balancer)
    trip(endpoints[4])
    rnd = random.Random(4).random
    shares: Counter[str] = Counter()
    for _ in range(4500):
        picked = subset.pick(0.5, (), rnd)
        assert picked is not None
        shares[picked.host] += 1
    assert "e" not in shares
    assert len(shares) == 9 and max(shares.values()) < 1200


def test_weight_zero_is_never_picked() -> None:
    subset = Subset("all", some(0, 1, 1), ROUND_ROBIN)
    assert {e.host for e in subset.endpoints} == {"b", "c"}


def test_bad_health_is_avoided_while_enough_are_well() -> None:
    endpoints = some(1, 1, 1, 1)
    subset = Subset("all", endpoints, LEAST_REQUEST)
    endpoints[0].healthy = endpoints[1].healthy = False  # 50 %: not under the threshold
    rnd = random.Random(5).random
    assert not subset.in_panic()
    hosts = {picked.host for _ in range(100) if (picked := subset.pick(0.0, (), rnd))}
    assert hosts == {"c", "d"}
    assert subset.panic_picks == 0


def test_panic_balances_over_all_but_open_breakers() -> None:
    endpoints = some(1, 1, 1, 1)
    subset = Subset("all", endpoints, LEAST_REQUEST)
    for endpoint in endpoints[:3]:
        endpoint.healthy = False
    trip(endpoints[0])
    rnd = random.Random(6).random
    assert subset.in_panic()
    hosts = {picked.host for _ in range(200) if (picked := subset.pick(0.5, (), rnd))}
    assert hosts == {"b", "c", "d"}
    assert subset.panic_picks > 0


def test_a_lone_endpoint_in_bad_health_serves_in_panic() -> None:
    endpoints = some(1)
    endpoints[0].healthy = False
    assert Subset("all", endpoints, LEAST_REQUEST).pick(0.0, (), low) is endpoints[0]


def test_a_threshold_of_zero_turns_panic_off() -> None:
    endpoints = some(1, 1)
    for endpoint in endpoints:
        endpoint.healthy = False
    subset = Subset("all", endpoints, LEAST_REQUEST, panic_threshold=0.0)
    assert subset.pick(0.0, (), low) is None
    assert subset.why_none(0.0) == "no_healthy_endpoint"


def test_why_none_is_circuit_open_where_a_usable_one_was_open() -> None:
    endpoints = some(1, 1)
    endpoints[0].healthy = False
    trip(endpoints[1])
    subset = Subset("all", endpoints, LEAST_REQUEST)
    assert subset.pick(0.5, (), low) is None
    assert subset.why_none(0.5) == "circuit_open"


def test_state_survives_a_new_subset() -> None:
    endpoints = some(1, 1)
    trip(endpoints[0])
    endpoints[1].active = 7
    assert Subset("v1", endpoints, LEAST_REQUEST).pick(0.5, (), low) is endpoints[1]


# -- priorities and zones


def placed(*places: tuple[str, int], **options: object) -> Subset:
    """Endpoints a, b, c … at these (zone, priority); the caller is in zone x."""
    specs = [EndpointSpec(chr(97 + n), 80, zone=zone, priority=priority) for n, (zone, priority) in enumerate(places)]
    endpoints = tuple(Endpoint(spec, ONE_STRIKE) for spec in specs)
    return Subset("all", endpoints, LEAST_REQUEST, zone="x", **options)  # type: ignore[arg-type]


def change(subset: Subset, healthy: str = "", unhealthy: str = "", tripped: str = "") -> None:
    for endpoint in subset.endpoints:
        if endpoint.host in healthy:
            endpoint.healthy = True
        if endpoint.host in unhealthy:
            endpoint.healthy = False
        if endpoint.host in tripped:
            trip(endpoint)
    subset.counts.turn += 1


def shares(subset: Subset, count: int = 4000, now: float = 0.5, tried: str = "") -> dict[str, int]:
    """Picks by host, in percent."""
    rnd = random.Random(8).random
    before = tuple(endpoint for endpoint in subset.endpoints if endpoint.host in tried)
    found = Counter(picked.host for _ in range(count) if (picked := subset.pick(now, before, rnd)))
    return {host: round(100 * number / count) for host, number in sorted(found.items())}


def test_the_first_priority_serves_alone_while_it_can() -> None:
    subset = placed(("", 0), ("", 0), ("", 0), ("", 0), ("", 7), ("", 7))
    assert set(shares(subset)) == {"a", "b", "c", "d"}
    assert subset.counts.spilled_picks == 0


def test_what_it_cannot_carry_spills_over() -> None:
    subset = placed(("", 0), ("", 0), ("", 1), ("", 1))
    change(subset, unhealthy="a")  # 1.4 · 50 % = 70 %
    found = shares(subset)
    assert abs(found["b"] - 70) <= 2 and abs(found["c"] - 15) <= 2 and abs(found["d"] - 15) <= 2
    assert 1100 < subset.counts.spilled_picks < 1300
    change(subset, unhealthy="b")
    assert set(shares(subset)) == {"c", "d"}
    change(subset, healthy="ab")
    assert set(shares(subset)) == {"a", "b"}


def test_a_key_chooses_its_level_by_itself() -> None:
    subset = placed(("", 0), ("", 0), ("", 1), ("", 1))
    change(subset, unhealthy="a")
    rnd = random.Random(9)
    first = 0
    for _ in range(2000):
        key = rnd.getrandbits(64)
        hosts = {subset.pick(0.0, (), rnd.random, key).host == "b" for _ in range(5)}  # type: ignore[union-attr]
        assert len(hosts) == 1
        first += hosts == {True}
    assert abs(first - 1400) < 80


def test_open_breakers_spill_too_and_their_probes_come_back() -> None:
    subset = placed(("", 0), ("", 1), ("", 1))
    change(subset, tripped="a")
    assert set(shares(subset)) == {"b", "c"}
    a = subset.endpoints[0]
    assert subset.pick(1.0, (), low) is a  # half-open: though the level has no load
    assert subset.pick(1.0, (a,), low) is not a
    assert a.breaker.start_probe(1.0, 5.0)
    assert subset.pick(1.0, (), low) is not a
    a.breaker.success(a.breaker.generation, 1.1)
    subset.counts.turn += 1
    assert set(shares(subset, now=1.2)) == {"a"}


def test_a_retry_goes_to_another_level_rather_than_to_the_same_endpoint() -> None:
    subset = placed(("", 0), ("", 1))
    assert shares(subset, 50) == {"a": 100}
    assert shares(subset, 50, tried="a") == {"b": 100}
    assert shares(subset, 50, tried="ab") == {"a": 100}


def test_panic_of_a_level_needs_that_nobody_else_can_carry_the_load() -> None:
    subset = placed(("", 0), ("", 0), ("", 1), ("", 1))
    change(subset, unhealthy="ab")
    assert not subset.in_panic() and subset.why_none(0.0) == "circuit_open"
    change(subset, unhealthy="cd")
    assert subset.in_panic()
    assert {host: abs(share - 25) <= 3 for host, share in shares(subset).items()} == dict.fromkeys("abcd", True)
    assert subset.counts.panic_picks == 4000
    change(subset, tripped="abcd")
    assert shares(subset) == {} and subset.why_none(0.5) == "circuit_open"
    off = placed(("", 0), ("", 1), panic_threshold=0.0)
    change(off, unhealthy="ab")
    assert shares(off) == {} and off.why_none(0.5) == "no_healthy_endpoint"


def test_the_own_zone_is_preferred_while_two_of_it_are_usable() -> None:
    subset = placed(("x", 0), ("y", 0), ("x", 0), ("y", 0), ("x", 0))
    assert set(shares(subset)) == {"a", "c", "e"}
    assert subset.counts.zone_picks == 4000
    change(subset, tripped="a")
    assert set(shares(subset)) == {"c", "e"}
    change(subset, unhealthy="c")
    assert set(shares(subset)) == {"b", "d", "e"}
    change(subset, healthy="c")
    assert set(shares(subset)) == {"c", "e"}


def test_a_zone_in_panic_is_not_preferred() -> None:
    subset = placed(("x", 0), ("x", 0), ("y", 0), ("y", 0), ("y", 0))
    change(subset, unhealthy="cde")
    assert subset.in_panic() and set(shares(subset)) == set("abcde")


def test_a_retry_leaves_the_zone_when_it_has_tried_all_of_it() -> None:
    subset = placed(("x", 0), ("x", 0), ("y", 0))
    assert shares(subset, 50, tried="ab") == {"c": 100}


@pytest.mark.parametrize("zones", ["yyy", "xyy", "xxx", "x"])
def test_without_a_choice_zones_cost_nothing(zones: str) -> None:
    subset = placed(*((zone, 0) for zone in zones))
    assert not subset._levels and set(shares(subset)) == set("abc"[: len(zones)])


def test_zones_within_priorities() -> None:
    subset = placed(("y", 0), ("y", 0), ("x", 1), ("x", 1), ("y", 1))
    assert set(shares(subset)) == {"a", "b"}
    change(subset, unhealthy="ab")
    assert set(shares(subset)) == {"c", "d"}


def test_aimed_at_an_endpoint_and_else_at_anybody() -> None:
    endpoints = some(1, 1, 1)
    subset = Subset("all", endpoints, LEAST_REQUEST)
    aimed = Aimed(subset, endpoint=endpoints[1])
    assert aimed.pick(0.0, (), low) is endpoints[1]
    assert aimed.pick(0.0, endpoints[1:2], low) is not endpoints[1]
    trip(endpoints[1])
    assert aimed.pick(0.5, (), low) is not endpoints[1]
    assert aimed.pick(1.0, (), low) is endpoints[1]  # half-open: it may as well be the probe
    endpoints[2].healthy = False
    assert Aimed(subset, endpoint=endpoints[2]).pick(0.5, (), low) is endpoints[0]
    assert Aimed(subset, endpoint=some(1)[0]).pick(0.5, (), low) is endpoints[0]  # it has left
    assert aimed.instead(subset) is None and subset.instead(subset) is None
    other = Subset("other", endpoints, LEAST_REQUEST)
    elsewhere = Aimed(subset, 7, endpoints[0]).instead(other)
    assert isinstance(elsewhere, Aimed) and (elsewhere.key, elsewhere.endpoint) == (7, None)
    assert subset.instead(other) is other


def test_a_balancer_that_wants_nobody_is_obeyed() -> None:
    subset = Subset("all", some(1, 1), lambda endpoints: lambda candidates, key, now, rnd: None)
    assert subset.pick(0.0, (), low) is None
