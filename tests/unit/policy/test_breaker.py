"""The breaker in virtual time: exact openings, one probe at a time, generations."""

from collections.abc import Callable

import pytest

from sidecar.model.snapshot import CircuitBreaker
from sidecar.policy.breaker import Breaker

TWO = CircuitBreaker(consecutive_failures=2, open_for_s=1.0, max_open_s=60.0)


def low() -> float:
    return 0.0


def high() -> float:
    return 1.0


def fail(breaker: Breaker, now: float, times: int = 1, rnd: Callable[[], float] = low) -> None:
    for _ in range(times):
        breaker.failure(breaker.generation, now, rnd)


def is_open(breaker: Breaker) -> bool:
    """Read anew each time: the type checker takes an attribute that was tested for constant."""
    return breaker.tripped


def opened(config: CircuitBreaker = TWO, now: float = 0.0, rnd: Callable[[], float] = low) -> Breaker:
    breaker = Breaker(config)
    fail(breaker, now, config.consecutive_failures, rnd)
    assert breaker.tripped
    return breaker


def test_open_one_probe_open_twice_as_long_closed() -> None:
    said: list[str] = []
    breaker = Breaker(TWO, said.append)
    fail(breaker, 10.0)
    assert not is_open(breaker) and breaker.state(10.0) == "closed" and breaker.allows(10.0)
    fail(breaker, 10.0)
    assert is_open(breaker) and breaker.state(10.0) == "open" and not breaker.allows(10.999)
    assert breaker.state(11.0) == "half-open" and breaker.allows(11.0)
    assert breaker.start_probe(11.0, 5.0)
    assert not breaker.allows(11.0) and not breaker.start_probe(11.0, 5.0)
    fail(breaker, 11.5)
    assert breaker.state(13.499) == "open" and breaker.state(13.5) == "half-open"
    assert breaker.start_probe(13.5, 5.0)
    breaker.success(breaker.generation, 13.6)
    assert not is_open(breaker) and breaker.state(13.6) == "closed" and breaker.failures == 0
    assert said == [
        "open for 1.000 s: 2 consecutive failures",
        "half-open: one request probes",
        "open for 2.000 s: the probe failed",
        "half-open: one request probes",
        "closed: the probe succeeded",
    ]


def test_built_in_opens_at_the_seventh_consecutive_failure() -> None:
    breaker = Breaker(CircuitBreaker())
    fail(breaker, 0.0, 6)
    breaker.success(0, 0.0)
    fail(breaker, 0.0, 6)
    assert not is_open(breaker)
    fail(breaker, 0.0)
    assert is_open(breaker)


def test_openings_double_up_to_the_maximum_and_start_again_after_closing() -> None:
    config = CircuitBreaker(consecutive_failures=1, open_for_s=1.0, max_open_s=10.0)
    breaker, now = opened(config), 0.0
    for lasts_s in (1.0, 2.0, 4.0, 8.0, 10.0, 10.0):
        assert not breaker.allows(now + lasts_s - 0.001)
        now += lasts_s
        assert breaker.start_probe(now, 5.0)
        fail(breaker, now)
    now += 10.0
    assert breaker.start_probe(now, 5.0)
    breaker.success(breaker.generation, now)
    fail(breaker, now)
    assert not breaker.allows(now + 0.999) and breaker.allows(now + 1.0)


def test_jitter_adds_up_to_half_also_above_the_maximum() -> None:
    breaker = opened(rnd=high)
    assert not breaker.allows(1.499) and breaker.allows(1.5)
    capped = opened(CircuitBreaker(consecutive_failures=1, open_for_s=90.0, max_open_s=60.0), rnd=high)
    assert not capped.allows(89.999) and capped.allows(90.0)


@pytest.mark.parametrize(("try_s", "limit_s"), [(1.0, 1.0), (5.0, 5.0), (60.0, 5.0), (float("inf"), 5.0)])
def test_a_probe_past_its_limit_reopens_at_that_moment(try_s: float, limit_s: float) -> None:
    breaker = opened()
    assert breaker.start_probe(1.0, try_s)
    probe = breaker.generation
    assert not breaker.probe_due(1.0 + limit_s - 0.001)
    assert breaker.state(1.0 + limit_s - 0.001) == "half-open"
    # However late the question comes: open since the limit, for two seconds.
    assert not breaker.allows(1.0 + limit_s + 1.999)
    assert breaker.allows(1.0 + limit_s + 2.0)
    breaker.success(probe, 1.0 + limit_s + 2.0)  # its request went on, but it says nothing any more
    assert is_open(breaker)


def test_probe_due_says_so_once() -> None:
    breaker = opened()
    assert breaker.start_probe(1.0, 5.0)
    assert breaker.probe_due(6.0)
    assert not breaker.probe_due(6.0)
    assert breaker.state(6.0) == "open"


def test_a_success_at_the_limit_comes_too_late_and_just_before_it_counts() -> None:
    late = opened()
    assert late.start_probe(1.0, 5.0)
    late.success(late.generation, 6.0)
    assert late.state(6.0) == "open"
    timely = opened()
    assert timely.start_probe(1.0, 5.0)
    timely.success(timely.generation, 5.999)
    assert timely.state(5.999) == "closed"


def test_probes_that_lapse_again_and_again_keep_doubling_with_jitter() -> None:
    breaker = opened(rnd=high)  # open until 1.5
    assert breaker.start_probe(1.5, 1.0)  # lapses at 2.5, open for 3
    assert not breaker.allows(5.499)
    assert breaker.start_probe(5.5, 1.0)  # lapses at 6.5, open for 6
    assert not breaker.allows(12.499) and breaker.allows(12.5)


def test_an_abandoned_probe_makes_room_for_another_without_doubling() -> None:
    breaker = opened()
    assert breaker.start_probe(1.0, 5.0)
    breaker.neutral(breaker.generation, 2.0)
    assert breaker.state(2.0) == "half-open" and breaker.allows(2.0)
    assert breaker.start_probe(2.0, 5.0)
    fail(breaker, 2.0)
    assert not breaker.allows(3.999) and breaker.allows(4.0)


def test_answers_to_requests_sent_before_it_opened_are_ignored() -> None:
    breaker = Breaker(TWO)
    before = breaker.generation
    fail(breaker, 0.0, 2)
    breaker.success(before, 0.5)
    breaker.failure(before, 0.5, low)
    assert breaker.state(0.5) == "open"
    assert breaker.start_probe(1.0, 5.0)
    breaker.success(before, 1.1)
    breaker.neutral(before, 1.1)
    breaker.throttled(before, 1.1, low)
    assert breaker.state(1.1) == "half-open" and not breaker.allows(1.1)
    breaker.success(breaker.generation, 1.2)
    breaker.failure(before, 1.3, low)
    assert breaker.failures == 0


def test_neutral_says_nothing_while_closed_or_open() -> None:
    breaker = Breaker(TWO)
    fail(breaker, 0.0)
    breaker.neutral(breaker.generation, 0.0)
    assert breaker.failures == 1
    fail(breaker, 0.0)
    breaker.neutral(breaker.generation, 0.5)
    assert breaker.state(0.5) == "open"


def test_throttled_neither_counts_nor_resets_but_fails_a_probe() -> None:
    breaker = Breaker(TWO)
    fail(breaker, 0.0)
    for _ in range(100):
        breaker.throttled(breaker.generation, 0.0, low)
    assert breaker.failures == 1 and not is_open(breaker)
    fail(breaker, 0.0)
    assert breaker.start_probe(1.0, 5.0)
    breaker.throttled(breaker.generation, 1.0, low)
    assert not breaker.allows(2.999) and breaker.allows(3.0)


def test_success_rate_needs_five_requests_and_is_off_by_default() -> None:
    config = CircuitBreaker(consecutive_failures=100, success_rate=50.0)
    breaker = Breaker(config)
    fail(breaker, 0.0, 4)
    assert not is_open(breaker)
    fail(breaker, 0.0)
    assert is_open(breaker)
    unset = Breaker(CircuitBreaker(consecutive_failures=100))
    fail(unset, 0.0, 99)
    assert not unset.tripped


def test_success_rate_trips_below_its_floor_not_at_it() -> None:
    breaker = Breaker(CircuitBreaker(consecutive_failures=100, success_rate=60.0))
    for _ in range(3):
        breaker.success(0, 0.0)
    fail(breaker, 0.0, 2)  # 3 of 5 is 60 %
    assert not is_open(breaker)
    fail(breaker, 0.0)
    assert is_open(breaker)


def test_the_fifth_request_may_be_a_success_and_still_trip() -> None:
    breaker = Breaker(CircuitBreaker(consecutive_failures=100, success_rate=50.0))
    fail(breaker, 0.0, 4)
    breaker.success(0, 0.0)
    assert is_open(breaker)


def test_throttled_counts_against_the_success_rate() -> None:
    breaker = Breaker(CircuitBreaker(success_rate=90.0))
    for _ in range(5):
        breaker.throttled(breaker.generation, 0.0, low)
    assert is_open(breaker)


def test_success_rate_forgets_after_ten_seconds() -> None:
    breaker = Breaker(CircuitBreaker(consecutive_failures=100, success_rate=50.0))
    fail(breaker, 0.0, 4)
    fail(breaker, 10.0)
    assert not is_open(breaker)
    fail(breaker, 19.9, 3)
    assert not is_open(breaker)
    fail(breaker, 19.9)
    assert is_open(breaker)


def test_success_rate_starts_afresh_after_a_probe_succeeded() -> None:
    breaker = Breaker(CircuitBreaker(consecutive_failures=100, success_rate=50.0))
    fail(breaker, 0.0, 5)
    assert breaker.start_probe(1.0, 5.0)
    breaker.success(breaker.generation, 1.0)
    fail(breaker, 1.0, 4)
    assert not is_open(breaker)


def test_configure_keeps_state_and_counters() -> None:
    breaker = Breaker(CircuitBreaker(consecutive_failures=10))
    fail(breaker, 0.0, 5)
    breaker.configure(CircuitBreaker(consecutive_failures=6, open_for_s=2.0, success_rate=10.0))
    fail(breaker, 0.0)
    assert is_open(breaker)
    breaker.configure(CircuitBreaker(open_for_s=2.0, max_open_s=3.0))
    assert not breaker.allows(1.999)
    assert breaker.start_probe(2.0, 5.0)
    fail(breaker, 2.0)
    assert not breaker.allows(4.999) and breaker.allows(5.0)


def test_start_probe_is_no_probe_while_closed_or_open() -> None:
    assert not Breaker(TWO).start_probe(0.0, 5.0)
    assert not opened().start_probe(0.5, 5.0)
