"""Random lives of a sidecar's data path, each replayed exactly by its seed.

Callers, servers, clocks and the policy misbehave at random over a network in memory: refused and slow connections,
resets, stalls, small windows, partial writes, lost and malformed responses, callers that leave, filters that dawdle,
policies that change meanwhile, a wall clock that is set and a machine that sleeps. What must hold in every run is
checked while it runs and when all is quiet (`support.lives`).

To replay one: `SEED=123 pytest tests/fault/test_exchange_seeds.py`.
"""

import os

import pytest
from support.lives import Life, live
from support.lives_http2 import Http2Life

CORE, LONG = 200, 2_000
HTTP2_CORE, HTTP2_LONG = 50, 800
SEEDS = [int(os.environ["SEED"])] if "SEED" in os.environ else list(range(CORE))
BLOCK = 10  # seeds a test: fewer lines


def run_block(seeds: list[int], kind: type[Life] = Life) -> None:
    lives = [live(seed, kind) for seed in seeds]
    if len(seeds) == BLOCK:
        assert sum(life.answers for life in lives) > BLOCK, "nothing happened"


@pytest.mark.parametrize("first", SEEDS[::BLOCK])
def test_seeds(first):
    run_block([seed for seed in SEEDS if first <= seed < first + BLOCK])


@pytest.mark.long
@pytest.mark.parametrize("first", range(CORE, CORE + LONG, 100))
def test_many_more_seeds(first):
    for block in range(first, first + 100, BLOCK):
        run_block(list(range(block, block + BLOCK)))


def test_endpoints_are_ejected_in_some_lives():
    assert any(live(seed).ejections for seed in range(3, 60, 3))


@pytest.mark.parametrize("first", [seed for seed in SEEDS[::BLOCK] if "SEED" in os.environ or seed < HTTP2_CORE])
def test_seeds_over_http2_and_of_grpc(first):
    run_block([seed for seed in SEEDS if first <= seed < first + BLOCK], Http2Life)


@pytest.mark.long
@pytest.mark.parametrize("first", range(HTTP2_CORE, HTTP2_CORE + HTTP2_LONG, 50))
def test_many_more_seeds_over_http2_and_of_grpc(first):
    for block in range(first, first + 50, BLOCK):
        run_block(list(range(block, block + BLOCK)), Http2Life)


@pytest.mark.parametrize("kind", [Life, Http2Life])
def test_a_seed_replays_exactly(kind):
    one, two = live(11, kind), live(11, kind)
    assert one.net.log == two.net.log and [s.sends for s in one.servings] == [s.sends for s in two.servings]
    assert one.net.dials == two.net.dials
