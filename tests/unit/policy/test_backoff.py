"""The exact bounds of the back-off."""

import math

import pytest

from sidecar.policy.backoff import backoff_s, server_delay_s

AT_MOST = math.nextafter(1.0, 0.0)  # the largest number in [0, 1)


def test_upper_bounds_double_up_to_the_maximum() -> None:
    bounds_ms = [round(backoff_s(retry, 0.025, 0.25, lambda: AT_MOST) * 1000, 6) for retry in range(1, 7)]
    assert bounds_ms == [25, 50, 100, 200, 250, 250]


def test_full_jitter_is_linear_in_chance_and_reaches_zero() -> None:
    assert backoff_s(3, 0.025, 0.25, lambda: 0.0) == 0.0
    assert backoff_s(3, 0.025, 0.25, lambda: 0.5) == pytest.approx(0.05)


def test_a_very_late_retry_does_not_overflow() -> None:
    assert backoff_s(10**6, 0.025, 0.25, lambda: 1.0) == 0.25
    assert backoff_s(10**6, 0.0, 0.25, lambda: 1.0) == 0.0


def test_a_server_delay_gets_up_to_half_as_much_again() -> None:
    assert server_delay_s(2.0, 5.0, lambda: 0.0) == 2.0
    assert server_delay_s(2.0, 5.0, lambda: 1.0) == 3.0
    assert server_delay_s(5.0, 5.0, lambda: 0.0) == 5.0


def test_a_server_delay_that_is_too_long_or_negative_forbids_the_retry() -> None:
    assert server_delay_s(5.001, 5.0, lambda: 0.0) is None
    assert server_delay_s(-1.0, 5.0, lambda: 0.0) is None
    assert server_delay_s(math.nan, 5.0, lambda: 0.0) is None
