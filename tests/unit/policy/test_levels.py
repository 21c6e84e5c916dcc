"""Spill-over by Envoy's numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.policy.levels import health, loads, panics

# mypy: disable-error-code="no-untyped-def"


@pytest.mark.parametrize(
    ("first", "second", "shares"),
    [  # the table of Envoy's documentation (priority levels), two levels of 100
        (100, 100, (100, 0)),
        (72, 72, (100, 0)),
        (71, 71, (99, 1)),
        (50, 50, (70, 30)),
        (25, 100, (35, 65)),
        (0, 100, (0, 100)),
    ],
)
def test_two_levels(first, second, shares) -> None:
    assert tuple(round(share) for share in loads([(first, 100), (second, 100)])) == shares


@pytest.mark.parametrize(
    ("usable", "shares"),
    [  # three levels of 100, where not all can be carried
        ((25, 25, 0), (50, 50, 0)),
        ((25, 25, 20), (36, 36, 29)),  # sums to 98 %: normalised
        ((100, 0, 100), (100, 0, 0)),
        ((0, 0, 0), (33, 33, 33)),
        ((0, 20, 80), (0, 28, 72)),
    ],
)
def test_three_levels(usable, shares) -> None:
    assert tuple(round(share) for share in loads([(count, 100) for count in usable])) == shares


def test_health_and_the_odd_cases() -> None:
    assert health(5, 7) == 100.0 and round(health(4, 7), 3) == 80.0 and health(0, 0) == 0.0
    assert loads([]) == [] and loads([(0, 0)]) == [0.0] and loads([(0, 1), (0, 3)]) == [25.0, 75.0]


def test_panic_of_a_lone_level_goes_by_the_threshold_alone() -> None:
    assert panics([(1, 2)], 50.0) == [False]
    assert panics([(49, 100)], 50.0) == [True]
    assert panics([(75, 100)], 80.0) == [True]
    assert panics([(0, 10)], 0.0) == [False]


def test_panic_of_several_needs_that_all_together_cannot_carry_the_load() -> None:
    assert panics([(0, 10), (10, 10)], 50.0) == [False, False]
    assert panics([(1, 10), (4, 10)], 50.0) == [True, True]  # 14 + 56 < 100
    assert panics([(1, 10), (6, 10)], 50.0) == [True, False]  # 14 + 84 < 100
    assert panics([(2, 10), (6, 10)], 50.0) == [False, False]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda pair: (min(pair), max(pair))), max_size=5))
def test_loads_sum_to_a_hundred(counts) -> None:
    shares = loads(counts)
    assert all(share >= 0.0 for share in shares)
    total = sum(shares)
    assert abs(total - 100.0) < 1e-6 if any(count for _, count in counts) else total == 0.0
    if any(usable for usable, _ in counts):
        assert all(share < 1e-9 for share, (usable, _) in zip(shares, counts, strict=True) if not usable)
