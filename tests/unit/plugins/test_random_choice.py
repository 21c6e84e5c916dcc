"""By chance, with shares by weight."""

import math
import random
from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sidecar.api import weighted
from sidecar.plugins.random_choice import RandomChoice
from sidecar.testing import check_balancer, make_endpoints


def test_it_keeps_the_contract() -> None:
    check_balancer(RandomChoice, spread=0.15)


def test_each_has_its_part_of_the_line() -> None:
    endpoints = tuple(make_endpoints(3, (1, 2, 1)))
    pick: Any = RandomChoice().arrange(endpoints)
    at = {0.0: 0, 0.2499: 0, 0.25: 1, 0.7499: 1, 0.75: 2, math.nextafter(1.0, 0.0): 2}
    for draw, index in at.items():
        assert pick(endpoints, None, 0.0, lambda draw=draw: draw) is endpoints[index]
        assert weighted(endpoints, lambda draw=draw: draw) is endpoints[index]  # type: ignore[misc]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(0, 1 << 32))
def test_shares_converge_to_weights(weights: list[int], seed: int) -> None:
    """Within five standard deviations of a binomial share."""
    endpoints = tuple(make_endpoints(len(weights), weights))
    pick: Any = RandomChoice().arrange(endpoints)
    rnd = random.Random(seed).random
    count = 2000
    shares = Counter(pick(endpoints, None, 0.0, rnd).key for _ in range(count))
    for endpoint, weight in zip(endpoints, weights, strict=True):
        part = weight / sum(weights)
        assert abs(shares[endpoint.key] - count * part) <= 5 * math.sqrt(count * part * (1 - part)) + 1
