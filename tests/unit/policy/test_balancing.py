"""Who is picked: exact orders, shares, and what is avoided."""

import random
from collections import Counter
from collections.abc import Callable

import pytest

from sidecar.model.snapshot import CircuitBreaker, EndpointSpec
from sidecar.policy.balancing import BALANCERS, Balancer, LeastRequest, RoundRobin, Subset
from sidecar.policy.endpoint import Endpoint

ONE_STRIKE = CircuitBreaker(consecutive_failures=1, open_for_s=1.0)


def low() -> float:
    return 0.0


def some(*weights: int) -> tuple[Endpoint, ...]:
    """Endpoints a, b, c … with these weights."""
    return tuple(Endpoint(EndpointSpec(chr(97 + n), 80, weight=w), ONE_STRIKE) for n, w in enumerate(weights))


def trip(endpoint: Endpoint, now: float = 0.0) -> None:
    endpoint.breaker.failure(endpoint.breaker.generation, now, low)


def picks(balancer: Balancer, count: int, rnd: Callable[[], float] = low) -> str:
    return "".join(balancer.pick(rnd).host for _ in range(count))


def test_both_balancers_go_by_the_names_of_the_policy_file() -> None:
    assert dict(BALANCERS) == {"round-robin": RoundRobin, "least-request": LeastRequest}


# -- round robin


def test_round_robin_is_smooth() -> None:
    assert picks(RoundRobin(some(5, 1, 1)), 14) == "aabacaa" * 2


def test_round_robin_of_equals_takes_turns_from_a_random_start() -> None:
    assert picks(RoundRobin(some(1, 1, 1)), 6) == "abcabc"
    assert picks(RoundRobin(some(7, 7, 7)), 6, lambda: 0.5) == "bcabca"


def test_round_robin_with_a_common_divisor_has_the_short_round() -> None:
    assert picks(RoundRobin(some(20, 10)), 6) == picks(RoundRobin(some(2, 1)), 6) == "abaaba"


def test_round_robin_shares_are_exact_in_every_round() -> None:
    balancer = RoundRobin(some(90, 7, 3))
    for _ in range(3):
        assert Counter(picks(balancer, 100, lambda: 0.7)) == {"a": 90, "b": 7, "c": 3}


def test_a_round_too_long_to_remember_is_the_same_sequence() -> None:
    balancer = RoundRobin(some(100_001, 99_999))
    assert Counter(picks(balancer, 1000)) == {"a": 500, "b": 500}
    assert not balancer._cycle


# -- least request


def test_least_request_below_four_compares_all() -> None:
    endpoints = some(1, 1, 1)
    for endpoint, active in zip(endpoints, (2, 1, 3), strict=True):
        endpoint.active = active
    assert LeastRequest(endpoints).pick(low).host == "b"


def test_least_request_weighs_by_weight_over_active_plus_one() -> None:
    endpoints = some(1, 4)
    endpoints[1].active = 2  # 1/1 against 4/3
    assert LeastRequest(endpoints).pick(low).host == "b"
    endpoints[1].active = 4  # 1/1 against 4/5
    assert LeastRequest(endpoints).pick(low).host == "a"


@pytest.mark.parametrize("count", [2, 3, 4, 10])
def test_least_request_spreads_ties_evenly(count: int) -> None:
    rnd = random.Random(1).random
    shares = Counter(picks(LeastRequest(some(*[1] * count)), 3000, rnd))
    assert len(shares) == count
    assert all(abs(share - 3000 / count) < 200 for share in shares.values())


def test_least_request_from_four_up_takes_the_better_of_two_different_ones() -> None:
    endpoints = some(1, 1, 1, 1)
    endpoints[0].active = 5
    draws = iter([0.0, 0.0])  # the first, and the first of the others
    assert LeastRequest(endpoints).pick(lambda: next(draws)).host == "b"
    draws = iter([0.99, 0.99])  # the last, and the last of the others
    assert LeastRequest(endpoints).pick(lambda: next(draws)).host == "d"


def test_least_request_never_takes_the_worst_of_four() -> None:
    endpoints = some(1, 1, 1, 1)
    endpoints[2].active = 1
    assert "c" not in picks(LeastRequest(endpoints), 500, random.Random(2).random)


# -- subsets


def test_one_endpoint_is_returned_at_once_even_if_tried() -> None:
    endpoints = some(1)
    subset = Subset("all", endpoints)
    assert subset.pick(0.0, (), low) is endpoints[0]
    assert subset.pick(0.0, endpoints, low) is endpoints[0]


def test_an_open_breaker_is_never_picked_and_its_probe_is() -> None:
    endpoints = some(1)
    subset = Subset("all", endpoints)
    trip(endpoints[0])
    assert subset.pick(0.999, (), low) is None
    assert subset.why_none(0.999) == "circuit_open"
    assert subset.pick(1.0, (), low) is endpoints[0]
    assert endpoints[0].breaker.start_probe(1.0, 5.0)
    assert subset.pick(1.0, (), low) is None
    assert subset.why_none(1.0) == "circuit_open"


def test_no_endpoints_at_all() -> None:
    for subset in (Subset("all", ()), Subset("all", some(0, 0))):
        assert subset.pick(0.0, (), low) is None
        assert subset.why_none(0.0) == "no_healthy_endpoint"


@pytest.mark.parametrize("balancer", [RoundRobin, LeastRequest])
@pytest.mark.parametrize("count", [2, 3, 4, 20])
def test_open_and_tried_endpoints_are_avoided(balancer: type[Balancer], count: int) -> None:
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


@pytest.mark.parametrize("balancer", [RoundRobin, LeastRequest])
def test_a_lone_bad_one_among_many_only_shifts_its_share(balancer: type[Balancer]) -> None:
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
    subset = Subset("all", some(0, 1, 1), RoundRobin)
    assert {e.host for e in subset.endpoints} == {"b", "c"}


def test_bad_health_is_avoided_while_enough_are_well() -> None:
    endpoints = some(1, 1, 1, 1)
    subset = Subset("all", endpoints)
    endpoints[0].healthy = endpoints[1].healthy = False  # 50 %: not under the threshold
    rnd = random.Random(5).random
    assert not subset.in_panic()
    hosts = {picked.host for _ in range(100) if (picked := subset.pick(0.0, (), rnd))}
    assert hosts == {"c", "d"}
    assert subset.panic_picks == 0


def test_panic_balances_over_all_but_open_breakers() -> None:
    endpoints = some(1, 1, 1, 1)
    subset = Subset("all", endpoints)
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
    assert Subset("all", endpoints).pick(0.0, (), low) is endpoints[0]


def test_a_threshold_of_zero_turns_panic_off() -> None:
    endpoints = some(1, 1)
    for endpoint in endpoints:
        endpoint.healthy = False
    subset = Subset("all", endpoints, panic_threshold=0.0)
    assert subset.pick(0.0, (), low) is None
    assert subset.why_none(0.0) == "no_healthy_endpoint"


def test_why_none_is_circuit_open_where_a_usable_one_was_open() -> None:
    endpoints = some(1, 1)
    endpoints[0].healthy = False
    trip(endpoints[1])
    subset = Subset("all", endpoints)
    assert subset.pick(0.5, (), low) is None
    assert subset.why_none(0.5) == "circuit_open"


def test_state_survives_a_new_subset() -> None:
    endpoints = some(1, 1)
    trip(endpoints[0])
    endpoints[1].active = 7
    assert Subset("v1", endpoints).pick(0.5, (), low) is endpoints[1]
