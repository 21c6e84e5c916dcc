"""When requests arrive: exact where evenly spaced, statistical where random."""

import math
import random
from itertools import pairwise

import pytest

from sidecar.simulate.arrivals import Arrivals, pieces


def times(points: list[tuple[float, float]], *, ramp: bool = False, even: bool = False, ends: float, seed: int = 1):
    arrivals = Arrivals(points, ramp, even, ends, random.Random(seed))
    found = []
    while (at := arrivals.next()) < math.inf:
        found.append(at)
    assert arrivals.next() == math.inf
    return found


def test_even_arrivals_begin_half_a_step_in() -> None:
    assert times([(0.0, 10.0)], even=True, ends=0.5) == pytest.approx([0.05, 0.15, 0.25, 0.35, 0.45])


def test_a_step_holds_until_the_next_and_nothing_comes_before_the_first() -> None:
    found = times([(1.0, 10.0), (2.0, 0.0), (3.0, 100.0)], even=True, ends=4.0)
    assert found[0] == pytest.approx(1.05)
    assert len([at for at in found if 1.0 <= at < 2.0]) == 10
    assert not [at for at in found if 2.0 <= at < 3.0]
    assert len([at for at in found if at >= 3.0]) == 100


def test_a_ramp_follows_the_integral_of_its_rate() -> None:
    found = times([(0.0, 0.0), (10.0, 100.0)], ramp=True, even=True, ends=10.0)
    assert len(found) == 500
    for count in (10, 100, 400):  # by t there are 5·t² arrivals
        assert found[count] == pytest.approx(math.sqrt((count + 0.5) / 5.0), abs=1e-9)


def test_the_last_rate_of_a_ramp_holds_and_the_end_cuts_it() -> None:
    assert pieces([(0.0, 0.0), (10.0, 100.0)], True, 5.0) == [(0.0, 5.0, 0.0, 50.0)]
    assert pieces([(0.0, 0.0), (10.0, 100.0)], True, 20.0)[-1] == (10.0, 20.0, 100.0, 100.0)
    assert pieces([(30.0, 5.0)], False, 20.0) == []


def test_poisson_arrivals_have_exponential_gaps() -> None:
    found = times([(0.0, 1000.0)], ends=100.0)
    gaps = [b - a for a, b in pairwise(found)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert len(found) == pytest.approx(100_000, rel=0.02)
    assert mean == pytest.approx(0.001, rel=0.02)
    assert deviation == pytest.approx(mean, rel=0.03)
    assert found == sorted(found)


def test_poisson_arrivals_follow_a_changing_rate() -> None:
    found = times([(0.0, 0.0), (100.0, 1000.0)], ramp=True, ends=100.0)
    assert len(found) == pytest.approx(50_000, rel=0.02)
    assert len([at for at in found if at < 50.0]) == pytest.approx(12_500, rel=0.04)


def test_no_rate_no_arrivals() -> None:
    assert times([(0.0, 0.0)], ends=10.0) == []
