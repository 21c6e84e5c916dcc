"""The adaptive limit, in virtual time."""

import math

import pytest

from sidecar.policy.gradient import Gradient


def made(least: int = 3, most: int = 1000, rnd: float = 0.0) -> Gradient:
    return Gradient(least, most, 0.0, lambda: rnd)


def fed(gradient: Gradient, count: int, took_s: float, now: float, peak: int | None = None) -> float:
    """So many answers, and the end of the window; the time then."""
    for _ in range(count):
        gradient.sample(took_s, now, now)
    gradient.peak = gradient.limit if peak is None else peak
    now += 0.1
    gradient.step(now)
    return now


def measured(took_s: float = 0.02, **bounds: int) -> Gradient:
    gradient = made(**bounds)
    for _ in range(50):
        gradient.sample(took_s, 0.0, 0.0)
    assert gradient.step(0.0)
    return gradient


def test_first_the_least_time_is_measured_among_the_least_requests_by_fifty_of_them() -> None:
    gradient = made()
    assert gradient.limit == 3 and gradient.measuring
    for number in range(49):
        gradient.sample(0.02 + number / 1000, 0.0, 0.1)
    assert not gradient.step(0.5)
    gradient.sample(1.0, 0.0, 0.1)
    assert gradient.step(0.5)
    assert not gradient.measuring
    assert gradient.min_rtt_s == pytest.approx(0.044)  # the median


def test_measuring_ends_after_a_second_with_five() -> None:
    gradient = made()
    for _ in range(4):
        gradient.sample(0.5, 0.0, 0.6)
    assert not gradient.step(2.0)
    gradient.sample(0.5, 0.0, 2.0)
    assert gradient.step(2.0)
    assert gradient.min_rtt_s == 0.5


def test_what_began_before_measuring_is_not_measured() -> None:
    gradient = measured()
    gradient.contended = True
    now = fed(gradient, 10, 0.02, 60.0)
    assert gradient.measuring
    for _ in range(60):
        gradient.sample(0.9, now - 1.0, now)
    assert not gradient.step(now + 5.0)
    assert gradient.step(now + 10.0)  # given up: what was known stays
    assert gradient.min_rtt_s == 0.02 and not gradient.measuring


def test_the_limit_grows_by_the_gradient_and_a_square_root_while_it_is_used() -> None:
    gradient = measured()
    fed(gradient, 10, 0.02, 0.0)
    scaled = 3 * 1.25
    assert gradient.learnt == pytest.approx(scaled + math.sqrt(scaled))


def test_it_does_not_grow_while_less_than_half_is_used() -> None:
    gradient = measured(least=10)
    fed(gradient, 10, 0.02, 0.0, peak=4)
    assert gradient.limit == 10
    fed(gradient, 10, 0.02, 0.1, peak=5)
    assert gradient.limit > 10


def test_it_falls_by_half_at_most_and_never_below_the_least() -> None:
    gradient = measured(least=10)
    gradient.learnt = 400.0
    now = fed(gradient, 10, 10.0, 0.0)
    assert gradient.learnt == pytest.approx(200 + math.sqrt(200))
    for _ in range(12):
        now = fed(gradient, 10, 10.0, now)
    assert gradient.limit == 10


def test_a_window_needs_ten_samples_or_goes_on() -> None:
    gradient = measured()
    now = fed(gradient, 9, 0.02, 0.0)
    assert gradient.limit == 3
    fed(gradient, 1, 0.02, now)
    assert gradient.limit == 5


def test_it_is_measured_again_each_minute_with_jitter_if_somebody_has_waited() -> None:
    gradient = made(rnd=1.0)
    for _ in range(50):
        gradient.sample(0.02, 0.0, 0.0)
    gradient.step(0.0)
    gradient.contended = True
    fed(gradient, 10, 0.02, 68.8)
    assert not gradient.measuring
    learnt = gradient.learnt
    gradient.step(69.1)
    assert gradient.measuring and gradient.limit == 3
    assert gradient.learnt == learnt  # it comes back


def test_nothing_is_measured_again_as_long_as_nobody_has_to_wait() -> None:
    gradient = made()
    gradient.contended = True  # while it is measured: for that reason
    for _ in range(50):
        gradient.sample(0.02, 0.0, 0.0)
    now = 0.0
    gradient.step(now)
    for _ in range(30):
        now = fed(gradient, 10, 0.02, now + 10.0)
        assert not gradient.measuring
    gradient.contended = True
    fed(gradient, 10, 0.02, now)
    assert gradient.measuring


def test_an_application_that_has_become_slower_is_measured_anew_after_five_windows_at_the_least() -> None:
    gradient = measured()
    now = 0.0
    for _ in range(4):
        now = fed(gradient, 10, 0.2, now)
    assert not gradient.measuring
    fed(gradient, 10, 0.2, now)
    assert gradient.measuring


def test_a_lost_answer_counts_where_it_was_slow_already() -> None:
    gradient = measured()
    for _ in range(10):
        gradient.lost(0.025)
    gradient.step(0.2)
    assert gradient.median_s == 0.02
    gradient.learnt = 100.0
    for _ in range(10):
        gradient.lost(0.5)
    gradient.step(0.4)
    assert gradient.median_s == 0.5 and gradient.learnt < 60


def test_it_settles_near_what_the_application_can_do() -> None:
    gradient, threads, now = measured(), 8, 0.0
    for _ in range(100):
        now = fed(gradient, 50, 0.02 * max(1.0, gradient.limit / threads), now)
    assert threads <= gradient.limit <= 2 * threads
