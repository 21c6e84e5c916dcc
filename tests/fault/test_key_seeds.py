"""Streams of keys at random: what is kept by key is bounded, whatever keys come, in whatever order, and whenever.

To replay one: `SEED=123 pytest tests/fault/test_key_seeds.py`.
"""

import os
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from sidecar.policy.correlation import Correlation
from sidecar.policy.ratelimit import Keyed
from sidecar.policy.sliding_window import KeyedWindows

SEEDS = [int(os.environ["SEED"])] if "SEED" in os.environ else list(range(6))
MANY = range(100, 300)
STEPS = 1_500


def keys(rnd: random.Random) -> Iterator[str]:
    """All new ones; a few; those that a table of that size has just forgotten; long ones; a mixture with favourites."""
    form = rnd.choice(["new", "few", "round", "long", "mixed"])
    size = rnd.choice([3, 65, 200, 1_100])
    for number in range(STEPS):
        if form == "new":
            yield str(number)
        elif form == "few":
            yield str(rnd.randrange(5))
        elif form == "round":
            yield str(number % size)
        elif form == "long":
            yield "x" * rnd.randrange(10_000) + str(rnd.randrange(size))
        else:
            yield str(min(int(rnd.paretovariate(0.5)), 10**9))


def limits(seed: int) -> None:
    rnd = random.Random(seed)
    keys_max = rnd.choice([1, 2, 64, 200, 1_000])
    requests, per_s = rnd.choice([1, 3, 100]), rnd.choice([0.01, 1.0, 60.0])
    burst = rnd.choice([1, requests])
    tables: list[Keyed | KeyedWindows] = [
        Keyed(requests, per_s, burst, keys_max),
        KeyedWindows(requests, per_s, keys_max),
    ]
    now = rnd.choice([0.0, 1e9])
    seen: set[str] = set()
    allowed: list[Counter[str]] = [Counter(), Counter()]
    began = now
    for key in keys(rnd):
        now += rnd.choice([0.0, 0.0, 1e-4, per_s / 3, per_s * 3 if rnd.random() < 0.01 else 0.0])
        seen.add(key)
        for table, counts in zip(tables, allowed, strict=True):
            verdict = table.take(key, now)
            counts[key] += verdict.allowed
            assert len(table) <= keys_max
            assert (
                verdict.remaining >= 0
                and verdict.retry_after_s >= 0.0
                and verdict.allowed == (not verdict.retry_after_s)
            )
    if len(seen) <= keys_max:  # nobody was forgotten: nobody got more than the limit
        windows = int(now / per_s) - int(began / per_s) + 1
        assert max(allowed[0].values()) <= burst + (now - began) * requests / per_s + 1e-3
        assert max(allowed[1].values()) <= requests * windows


def traces(seed: int) -> None:
    rnd = random.Random(seed)
    most = rnd.choice([1, 10, 300])
    memory = Correlation(most)
    held = []
    for key in keys(rnd):
        trace = key[-40:].encode()
        held.append(memory.enter(trace, rnd.random(), rnd.randrange(3)))
        for act in rnd.sample([memory.lookup, memory.mark_exhausted, memory.is_exhausted], rnd.randrange(3)):
            act(trace)
        if rnd.random() < 0.3:
            memory.head_gone(rnd.choice(held))
        while held and rnd.random() < 0.4:
            memory.leave(held.pop(rnd.randrange(len(held))))
        assert len(memory) <= most
    for token in held:
        memory.leave(token)
    assert len(memory) == 0, "somebody who has left is remembered"


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_kept_by_key_is_bounded(seed: int) -> None:
    limits(seed)
    traces(seed)


@pytest.mark.long
def test_many_more_streams_of_keys() -> None:
    for seed in MANY:
        try:
            limits(seed)
            traces(seed)
        except BaseException:
            print(f"\nreplay with SEED={seed}")
            raise
