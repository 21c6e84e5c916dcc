"""The better of two, by weight and by what is in flight."""

import random
from collections import Counter
from typing import Any

import pytest

from sidecar.plugins.least_request import LeastRequest
from sidecar.testing import check_balancer, make_endpoints


def low() -> float:
    return 0.0


def picked(endpoints: Any, rnd: Any = low, candidates: Any = None) -> int:
    everyone = tuple(endpoints)
    pick = LeastRequest().arrange(everyone)
    return everyone.index(pick(everyone if candidates is None else candidates, None, 0.0, rnd))


def test_it_keeps_the_contract() -> None:
    check_balancer(LeastRequest, spread=0.25)


@pytest.mark.parametrize("active", [(2, 1, 3), (2, 1)])
def test_below_four_it_compares_all(active: tuple[int, ...]) -> None:
    endpoints = make_endpoints(len(active))
    for endpoint, count in zip(endpoints, active, strict=True):
        endpoint.active = count
    assert picked(endpoints) == 1
    many = make_endpoints(5)
    assert picked(many, candidates=many[2:4]) in (2, 3)


def test_it_weighs_by_weight_over_active_plus_one() -> None:
    endpoints = make_endpoints(2, (1, 4))
    endpoints[1].active = 2  # 1/1 against 4/3
    assert picked(endpoints) == 1
    endpoints[1].active = 4  # 1/1 against 4/5
    assert picked(endpoints) == 0


@pytest.mark.parametrize("count", [2, 3, 4, 10])
def test_it_spreads_ties_evenly(count: int) -> None:
    rnd = random.Random(1).random
    endpoints = tuple(make_endpoints(count))
    pick = LeastRequest().arrange(endpoints)
    shares = Counter(pick(endpoints, None, 0.0, rnd) for _ in range(3000))
    assert len(shares) == count
    assert all(abs(share - 3000 / count) < 200 for share in shares.values())


def test_from_four_up_it_takes_the_better_of_two_different_ones() -> None:
    endpoints = make_endpoints(4)
    endpoints[0].active = 5
    draws = iter([0.0, 0.0])  # the first, and the first of the others
    assert picked(endpoints, lambda: next(draws)) == 1
    draws = iter([0.99, 0.99])  # the last, and the last of the others
    assert picked(endpoints, lambda: next(draws)) == 3
    draws = iter([0.99, 0.99])
    assert picked(endpoints, lambda: next(draws), candidates=list(endpoints)) == 3


def test_it_never_takes_the_worst_of_four() -> None:
    endpoints = make_endpoints(4)
    endpoints[2].active = 1
    rnd = random.Random(2).random
    assert all(picked(endpoints, rnd) != 2 for _ in range(500))
