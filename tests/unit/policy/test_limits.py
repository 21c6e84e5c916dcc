"""The limiters of one sidecar: which is made, what a share does, and what demand is told."""

import pytest

from sidecar.policy.limits import Limits
from sidecar.policy.ratelimit import Keyed
from sidecar.policy.sliding_window import KeyedWindows


def test_the_algorithm_chooses() -> None:
    limits = Limits()
    assert isinstance(limits.limiter(1, 1.0, 1), Keyed)
    assert isinstance(limits.limiter(1, 1.0, 1, "sliding-window"), KeyedWindows)
    with pytest.raises(ValueError, match="not an algorithm"):
        limits.limiter(1, 1.0, 1, "leaky")
    assert not len(limits) and limits.take_demand(0.0) is None and limits.shown() is None


@pytest.mark.parametrize("algorithm", ["token-bucket", "sliding-window"])
def test_a_share_applies_to_every_key_now_and_later(algorithm: str) -> None:
    limits = Limits()
    first = limits.limiter(100, 1.0, 100, algorithm, "global")
    local = limits.limiter(100, 1.0, 100, algorithm)
    limits.tell(0.25)
    later = limits.limiter(100, 1.0, 100, algorithm, "global")
    for limiter, allowed in ((first, 25), (later, 25), (local, 100)):
        for key in ("a", "b"):
            assert sum(limiter.take(key, 0.0).allowed for _ in range(200)) == allowed


@pytest.mark.parametrize("algorithm", ["token-bucket", "sliding-window"])
def test_shares_together_admit_the_rate_and_not_more(algorithm: str) -> None:
    instances = [Limits() for _ in range(3)]
    limiters = [each.limiter(60, 1.0, 12, algorithm, "global") for each in instances]
    for each, share in zip(instances, (0.7, 0.2, 0.1), strict=True):
        each.tell(share)
    admitted = sum(each.take("", n / 200).allowed for n in range(2000) for each in limiters)
    burst = 12 + 3 if algorithm == "token-bucket" else 60
    assert 60 * 10 * 0.9 <= admitted <= 60 * 10 + burst


def test_a_guess_stands_until_somebody_tells() -> None:
    limits = Limits()
    limits.limiter(1, 1.0, 1, scope="global")
    limits.guess(4)
    assert limits.share == 0.25 and not limits.told
    limits.tell(0.5)
    limits.guess(4)
    assert limits.share == 0.5 and limits.told


def test_demand_is_what_was_asked_as_a_part_of_the_whole_limit() -> None:
    limits = Limits()
    limiter = limits.limiter(10, 1.0, 1, scope="global")
    slow = limits.limiter(1, 10.0, 1, scope="global")
    assert limits.take_demand(100.0) == -1.0  # nothing can be said yet
    for n in range(100):
        limiter.take("", 100.0 + n / 20)
    assert limits.take_demand(100.5) == -1.0  # too soon
    assert limits.take_demand(105.0) == pytest.approx(2.0)
    slow.take("", 105.0)
    assert limits.take_demand(110.0) == pytest.approx(2.0)  # of several limits the largest: once in 5 s against 10 s
    assert limits.take_demand(115.0) == 0.0
    shown = limits.shown()
    assert shown is not None and shown["limits"] == 2 and isinstance(shown["refused"], int) and shown["refused"] > 40


def test_a_limiter_that_is_gone_is_forgotten() -> None:
    limits = Limits()
    limiter = limits.limiter(10, 1.0, 1, scope="global")
    assert len(limits) == 1
    del limiter
    assert len(limits) == 0
