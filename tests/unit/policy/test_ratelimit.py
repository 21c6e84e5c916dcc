"""The token bucket's exact numbers, and its bounds."""

import pytest

from sidecar.policy.ratelimit import Keyed, TokenBucket, Verdict


def test_it_starts_full_and_gives_exactly_the_burst() -> None:
    bucket = TokenBucket(requests=100, per_s=1.0, burst=50)
    verdicts = [bucket.take(5.0) for _ in range(51)]
    assert [v.allowed for v in verdicts] == [True] * 50 + [False]
    assert [v.remaining for v in verdicts[:50]] == list(range(49, -1, -1))
    refused = verdicts[-1]
    assert refused.remaining == 0
    assert refused.retry_after_s == pytest.approx(0.01)
    assert refused.reset_s == pytest.approx(0.5)


def test_it_refills_at_its_rate_and_never_above_the_burst() -> None:
    bucket = TokenBucket(requests=2, per_s=1.0, burst=2)
    assert bucket.take(0.0).allowed and bucket.take(0.0).allowed
    assert not bucket.take(0.499).allowed
    assert bucket.take(0.5).allowed
    assert not bucket.take(0.5).allowed
    assert [bucket.take(100.0).allowed for _ in range(3)] == [True, True, False]


def test_a_refusal_costs_nothing() -> None:
    bucket = TokenBucket(requests=1, per_s=10.0, burst=1)
    assert bucket.take(0.0) == Verdict(True, 0, 0.0, 10.0)
    assert bucket.take(4.0) == Verdict(False, 0, 6.0, 6.0)
    assert bucket.take(9.0) == Verdict(False, 0, 1.0, 1.0)
    assert bucket.take(10.0).allowed


@pytest.mark.parametrize("requests", [1, 3, 7, 30, 99, 1000])
@pytest.mark.parametrize("per_s", [0.1, 1.0, 3.0, 60.0])
def test_the_sustained_rate_is_exact(requests: int, per_s: float) -> None:
    bucket = TokenBucket(requests, per_s, burst=requests)
    start = 86_400.0
    assert sum(bucket.take(start).allowed for _ in range(requests + 5)) == requests
    for period in range(1, 4):
        assert sum(bucket.take(start + period * per_s).allowed for _ in range(requests + 5)) == requests


def test_impossible_limits_are_refused() -> None:
    for requests, per_s, burst in ((0, 1.0, 1), (1, 0.0, 1), (1, 1.0, 0)):
        with pytest.raises(ValueError, match="above 0"):
            TokenBucket(requests, per_s, burst)


def test_each_key_has_its_own_bucket() -> None:
    keyed = Keyed(requests=1, per_s=1.0, burst=1)
    assert keyed.take("web", 0.0).allowed
    assert not keyed.take("web", 0.0).allowed
    assert keyed.take("admin", 0.0).allowed


def test_the_least_recently_used_key_goes_first() -> None:
    keyed = Keyed(requests=1, per_s=100.0, burst=1, keys_max=3)
    for key in ("a", "b", "c"):
        assert keyed.take(key, 0.0).allowed
    assert not keyed.take("a", 0.0).allowed  # used just now: b is the oldest
    assert keyed.take("d", 0.0).allowed
    assert len(keyed) == 3
    assert [keyed.take(key, 0.0).allowed for key in ("a", "c", "d")] == [False, False, False]
    assert keyed.take("b", 0.0).allowed  # forgotten, so full again


def test_the_number_of_keys_is_bounded() -> None:
    keyed = Keyed(requests=1, per_s=100.0, burst=1, keys_max=1000)
    for n in range(5000):
        keyed.take(f"k{n}", 0.0)
        assert len(keyed) <= 1000
    assert not keyed.take("k4999", 0.0).allowed


def test_long_keys_take_no_more_room() -> None:
    keyed = Keyed(requests=1, per_s=1.0, burst=1)
    assert keyed.take("x" * 8000, 0.0).allowed
    assert not keyed.take("x" * 8000, 0.0).allowed
    assert keyed.take("x" * 7999, 0.0).allowed
    assert all(key.bit_length() <= 64 for key in keyed._full_at)


def test_full_buckets_are_forgotten_without_loss() -> None:
    keyed = Keyed(requests=10, per_s=1.0, burst=10)  # an attacker with ever new keys: each is full again after 0.1 s
    assert [keyed.take("mine", 0.0).allowed for _ in range(11)][-1] is False
    for n in range(20_000):
        keyed.take(f"k{n}", n / 10_000)
    assert len(keyed) < 5_000
    assert keyed.take("mine", 2.0).remaining == 9
