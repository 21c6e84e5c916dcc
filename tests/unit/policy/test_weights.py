"""Shares converge to the weights, and 0 is never chosen."""

import math
import random
from collections import Counter

import pytest

from sidecar.policy.weights import Weighted


def test_bounds_are_exact() -> None:
    choice = Weighted([("v1", 90), ("v2", 10)])
    assert choice.pick(lambda: 0.0) == "v1"
    assert choice.pick(lambda: 0.8999) == "v1"
    assert choice.pick(lambda: 0.9) == "v2"
    assert choice.pick(lambda: math.nextafter(1.0, 0.0)) == "v2"


def test_an_even_grid_gives_exactly_the_weights() -> None:
    choice = Weighted([("v1", 90), ("v2", 0), ("v3", 10)])
    assert Counter(choice.pick(lambda n=n: n / 1000) for n in range(1000)) == {"v1": 900, "v3": 100}  # type: ignore[misc]


def test_shares_converge() -> None:
    choice = Weighted([("v1", 70), ("v2", 20), ("v3", 10)])
    rnd = random.Random(7).random
    shares = Counter(choice.pick(rnd) for _ in range(20_000))
    assert [round(shares[v] / 20_000, 2) for v in ("v1", "v2", "v3")] == [0.7, 0.2, 0.1]


def test_zero_is_never_chosen_wherever_it_stands() -> None:
    choice = Weighted([("a", 0), ("b", 1), ("c", 0)])
    assert {choice.pick(lambda n=n: n / 100) for n in range(100)} == {"b"}  # type: ignore[misc]


def test_nothing_to_choose_is_an_error() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Weighted([("a", 0)])
