"""Each model draws what it says."""

import random

import pytest

from sidecar.simulate.chance import Failing, sampler, source
from sidecar.simulate.record import percentile
from sidecar.simulate.scenario import Errors, Latency

DRAWS = 50_000


def draws(latency: Latency) -> list[float]:
    sample = sampler(latency, random.Random(1))
    return sorted(sample() for _ in range(DRAWS))


def test_fixed_is_always_the_same() -> None:
    assert set(draws(Latency("fixed", 0.02))) == {0.02}


def test_uniform_lies_between_its_ends() -> None:
    found = draws(Latency("uniform", 0.01, 0.03))
    assert 0.01 <= found[0] < 0.0101 and 0.0299 < found[-1] <= 0.03
    assert sum(found) / DRAWS == pytest.approx(0.02, rel=0.01)
    assert percentile(found, 0.25) == pytest.approx(0.015, rel=0.02)


def test_lognormal_has_the_stated_percentiles() -> None:
    found = draws(Latency("lognormal", 0.020, 0.080))
    assert percentile(found, 0.50) == pytest.approx(0.020, rel=0.02)
    assert percentile(found, 0.99) == pytest.approx(0.080, rel=0.05)


def test_lognormal_with_equal_percentiles_is_fixed() -> None:
    found = draws(Latency("lognormal", 0.020, 0.020))
    assert found[0] == pytest.approx(found[-1]) == pytest.approx(0.020)


def test_statuses_are_equally_likely() -> None:
    failing = Failing(Errors(0.5, (500, 503, 504), Latency("fixed", 0.001)), random.Random(1))
    draw = random.Random(2).random
    found = [failing.status(draw) for _ in range(DRAWS)]
    for status in (500, 503, 504):
        assert found.count(status) / DRAWS == pytest.approx(1 / 3, rel=0.03)
    assert failing.sample is not None and failing.sample() == 0.001


def test_sources_are_independent_and_repeatable() -> None:
    first = source(7, "arrivals 0")
    assert first.random() == source(7, "arrivals 0").random()
    assert len({source(seed, name).random() for seed in range(10) for name in ("arrivals 0", "models", "policy")}) == 30
