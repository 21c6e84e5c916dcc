"""Turns by weight, exactly."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from sidecar.api import Endpoint
from sidecar.plugins.round_robin import RoundRobin, Turns, whole_weights
from sidecar.testing import check_balancer, make_endpoints

# mypy: disable-error-code="no-untyped-def"


def low() -> float:
    return 0.0


def turns(weights: Sequence[int], count: int, rnd: Any = low) -> str:
    endpoints: Any = tuple(make_endpoints(len(weights), weights))
    names = {endpoint.key: chr(97 + n) for n, endpoint in enumerate(endpoints)}
    pick = RoundRobin().arrange(endpoints)
    return "".join(names[taken(pick(endpoints, None, 0.0, rnd)).key] for _ in range(count))


def taken(endpoint: Endpoint | None) -> Endpoint:
    assert endpoint is not None
    return endpoint


def test_it_keeps_the_contract() -> None:
    check_balancer(RoundRobin, spread=0.01)


def test_it_is_smooth() -> None:
    assert turns((5, 1, 1), 14) == "aabacaa" * 2
    assert turns((20, 10), 6) == turns((2, 1), 6) == "abaaba"


def test_equals_take_turns_from_a_random_start() -> None:
    assert turns((1, 1, 1), 6) == "abcabc"
    assert turns((7, 7, 7), 6, lambda: 0.5) == "bcabca"
    assert turns([1] * 100, 3, lambda: 0.99)[0] == chr(97 + 99)


def test_shares_are_exact_in_every_round() -> None:
    for start in (0.0, 0.7):
        assert Counter(turns((90, 7, 3), 300, lambda start=start: start)) == {"a": 270, "b": 21, "c": 9}


def test_a_round_too_long_to_remember_is_the_same_sequence() -> None:
    assert Counter(turns((100_001, 99_999), 1000)) == {"a": 500, "b": 500}


def test_of_fewer_candidates_it_takes_the_next_whose_turn_it_is() -> None:
    endpoints = tuple(make_endpoints(4))
    pick = RoundRobin().arrange(endpoints)
    two = [endpoints[1], endpoints[3]]
    assert [endpoints.index(taken(pick(two, None, 0.0, low))) for _ in range(6)] == [1, 3] * 3  # type: ignore[arg-type]
    many = tuple(make_endpoints(100))
    lone = [many[99]]
    assert Turns(many).pick(lone, None, 0.0, low) is many[99]


@pytest.mark.parametrize(
    ("weights", "whole"), [((2, 4, 6), [1, 2, 3]), ((1, 0.1), [10, 1]), ((0.00001, 1), [1, 1000]), ((), [])]
)
def test_whole_weights(weights, whole) -> None:
    endpoints = make_endpoints(len(weights))
    for endpoint, weight in zip(endpoints, weights, strict=True):
        endpoint.weight = weight
    assert whole_weights(endpoints) == whole
