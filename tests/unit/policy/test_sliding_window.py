"""The sliding window's exact numbers, and its bounds."""

import math
import random
from bisect import bisect_right

import pytest

from sidecar.policy.ratelimit import KEYS_MAX
from sidecar.policy.sliding_window import KeyedWindows, judge


def taken(windows: KeyedWindows, now: float, times: int, key: str = "k") -> int:
    return sum(windows.take(key, now).allowed for _ in range(times))


def test_the_last_window_counts_by_how_much_of_it_is_left() -> None:
    windows = KeyedWindows(requests=100, per_s=60.0)
    assert taken(windows, 65.0, 42) == 42
    assert taken(windows, 120.0, 1000) == 58  # 42 * 1 + 58
    windows = KeyedWindows(requests=100, per_s=60.0)
    assert taken(windows, 65.0, 42) == 42
    assert taken(windows, 135.0, 1000) == 68  # 42 * 0.75 = 31.5; 68 + 31.5 is under 100
    assert taken(windows, 179.0, 1000) == 31  # 42 / 60 = 0.7; 99 + 0.7 is under 100
    assert taken(windows, 300.0, 1000) == 100  # two windows later nothing is left


def test_a_verdict_says_what_is_left() -> None:
    windows = KeyedWindows(requests=3, per_s=10.0)
    assert [tuple(windows.take("k", 4.0)) for _ in range(3)] == [(True, 2, 0.0, 16.0), (True, 1, 0.0, 16.0),
                                                                (True, 0, 0.0, 16.0)]  # fmt: skip
    refused = windows.take("k", 4.0)
    # All of this window: in the next one 3 * (1 - x) + 1 <= 3 holds from x = 1/3 on.
    assert (refused.allowed, refused.remaining) == (False, 0)
    assert refused.retry_after_s == pytest.approx(6.0 + 10.0 / 3)
    assert refused.reset_s == pytest.approx(16.0)


@pytest.mark.parametrize("requests", [1, 2, 7, 100, 3.4])
@pytest.mark.parametrize("per_s", [0.1, 1.0, 60.0])
def test_who_waits_as_told_is_allowed_and_who_waits_less_is_not(requests: float, per_s: float) -> None:
    for before in range(math.floor(requests) + 1):
        for count in range(math.floor(requests) + 1):
            for part in (0.0, 0.3, 0.999):
                elapsed_s = part * per_s
                verdict = judge(requests, per_s, before, count, elapsed_s)
                assert verdict.allowed == (before * (1 - part) + count + 1 <= requests + 1e-6)
                if verdict.allowed:
                    continue
                for early, allowed in ((1e-6, False), (-1e-6, True)):
                    at_s = elapsed_s + verdict.retry_after_s - early * per_s
                    state = (before, count, at_s) if at_s < per_s else (count, 0, at_s - per_s)
                    assert judge(requests, per_s, *state).allowed is allowed


@pytest.mark.parametrize("seed", range(4))
def test_never_more_than_the_limit_in_a_window_nor_twice_in_any_stretch(seed: int) -> None:
    rnd = random.Random(seed)
    limit, per_s = rnd.choice([3, 10, 40]), 2.0
    windows = KeyedWindows(limit, per_s)
    now, times = 0.0, []
    for _ in range(5000):
        now += rnd.expovariate(1.0) * rnd.choice([0.001, 0.05, 0.2]) * per_s / limit
        if windows.take("k", now).allowed:
            times.append(now)
    for at, each in enumerate(times):
        assert bisect_right(times, each + per_s - 1e-9) - at < 2 * limit + 1
        assert sum(int(other // per_s) == int(each // per_s) for other in times[at : at + limit + 1]) <= limit


def test_a_share_is_a_part_of_the_limit_and_at_least_one() -> None:
    windows = KeyedWindows(requests=100, per_s=10.0)
    windows.scale(0.25)
    assert taken(windows, 0.0, 100) == 25
    windows.scale(0.5)
    assert taken(windows, 0.0, 100) == 25  # what was counted stays counted
    windows.scale(0.001)
    assert taken(windows, 50.0, 100) == 1
    windows.scale(1.0)
    assert taken(windows, 100.0, 200) == 100


def test_keys_are_bounded_and_the_least_recently_used_go_first() -> None:
    windows = KeyedWindows(requests=1, per_s=10.0, keys_max=3)
    for key in ("a", "b", "c"):
        assert windows.take(key, 0.0).allowed
    assert not windows.take("a", 1.0).allowed  # used just now: b is the oldest
    assert windows.take("d", 1.0).allowed and len(windows) == 3
    assert [windows.take(key, 1.0).allowed for key in ("a", "c", "d")] == [False, False, False]
    assert windows.take("b", 1.0).allowed  # forgotten
    windows = KeyedWindows(requests=1, per_s=10.0, keys_max=1000)
    for n in range(5000):
        windows.take(f"k{n}", n / 200)
        assert len(windows) <= 1000
    assert KEYS_MAX == 100_000


def test_what_is_two_windows_old_is_forgotten() -> None:
    windows = KeyedWindows(requests=1, per_s=1.0)
    for n in range(5000):
        windows.take(f"k{n}", 0.5)
    windows.take("x", 1.5)
    assert len(windows) == 5001
    windows.take("x", 2.5)
    assert len(windows) == 1


def test_impossible_limits_are_refused() -> None:
    for requests, per_s in ((0, 1.0), (1, 0.0), (2**24, 1.0)):
        with pytest.raises(ValueError, match="requests must be from 1"):
            KeyedWindows(requests, per_s)
