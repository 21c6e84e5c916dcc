"""Costs to the digit, in virtual time."""

import math
import random
from collections import Counter
from typing import Any

import pytest

from sidecar.api import ConfigError
from sidecar.plugins.peak_ewma import PeakEwma, Settings
from sidecar.testing import check_balancer, make_endpoints


def cost(balancer: PeakEwma, endpoint: Any, now: float) -> float:
    return round(balancer.cost_s(endpoint, now), 9)


def test_it_keeps_the_contract() -> None:
    check_balancer(PeakEwma, spread=0.25)
    check_balancer(PeakEwma, {"decay_s": 1, "seed_s": 0.5, "throttled_s": 1}, spread=0.25)


def test_nobody_has_been_heard_of_yet() -> None:
    balancer, (a,) = PeakEwma(), make_endpoints(1)
    assert cost(balancer, a, 100.0) == 0.03
    assert cost(balancer, a, 110.0) == round(0.03 / math.e, 9)  # it fades, too
    assert balancer.describe(a, 100.0) == {"ewma_ms": 30.0}


def test_a_peak_counts_at_once_and_decays_by_e_in_ten_seconds() -> None:
    balancer, (a,) = PeakEwma(), make_endpoints(1)
    balancer.ended(a, "success", 0.2, 0.0)
    assert cost(balancer, a, 0.0) == 0.2
    assert cost(balancer, a, 10.0) == round(0.2 / math.e, 9)
    balancer.ended(a, "success", 0.01, 10.0)
    assert cost(balancer, a, 10.0) == round(0.2 / math.e + 0.01 * (1 - 1 / math.e), 9)
    balancer.ended(a, "success", 0.4, 10.0)
    assert cost(balancer, a, 10.0) == 0.4


def test_a_constant_latency_is_its_own_average() -> None:
    balancer, (a,) = PeakEwma(), make_endpoints(1)
    for n in range(1, 3000):
        balancer.ended(a, "success", 0.05, n / 7)
    assert cost(balancer, a, 2999 / 7) == 0.05


def test_throttling_costs_five_seconds_a_failure_is_never_cheap_and_neutral_says_nothing() -> None:
    balancer, (a, b, c) = PeakEwma(), make_endpoints(3)
    balancer.ended(a, "throttled", 0.001, 0.0)
    assert cost(balancer, a, 0.0) == 5.0
    balancer.ended(b, "failure", 0.0001, 0.0)
    assert cost(balancer, b, 0.0) == 0.03
    balancer.ended(b, "failure", 2.0, 0.0)
    assert cost(balancer, b, 0.0) == 2.0
    balancer.ended(c, "neutral", 9.0, 0.0)
    assert cost(balancer, c, 0.0) == 0.03


def test_load_is_cost_times_pending_plus_one_over_weight() -> None:
    balancer, (a, b) = PeakEwma(), make_endpoints(2, (1, 3))
    balancer.ended(a, "success", 0.125, 0.0)
    balancer.ended(b, "success", 0.125, 0.0)
    b.active = 2  # 0.125 · 1 / 1 against 0.125 · 3 / 3: a tie
    assert balancer.pick((a, b), None, 0.0, lambda: 0.4) is b
    assert balancer.pick((a, b), None, 0.0, lambda: 0.6) is a
    b.active = 1
    assert balancer.pick((a, b), None, 0.0, lambda: 0.6) is b


def test_a_slow_one_among_ten_gets_little_and_gets_more_when_it_recovers() -> None:
    balancer, endpoints = PeakEwma(), tuple(make_endpoints(10))
    pick: Any = balancer.arrange(endpoints)
    rnd = random.Random(7).random

    def shares(since: float, slow_s: float) -> Counter[str]:
        counts: Counter[str] = Counter()
        for n in range(10_000):
            now = since + n / 100.0
            endpoint = pick(endpoints, None, now, rnd)
            counts[endpoint.key] += 1
            balancer.ended(endpoint, "success", slow_s if endpoint is endpoints[0] else 0.01, now)
        return counts

    assert shares(0.0, 1.0)[endpoints[0].key] < 100  # 1000 were fair; asked again now and then, as its cost fades
    assert shares(100.0, 0.01)[endpoints[0].key] > 500


@pytest.mark.parametrize("config", [{"decay_s": 0}, {"seed_s": 0}, {"seed_s": 61}, {"throttled_s": -1}, {"x": 1}])
def test_settings_have_limits(config: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        PeakEwma.decode(config)
    assert PeakEwma.decode({}) == Settings(10.0, 0.03, 5.0)
