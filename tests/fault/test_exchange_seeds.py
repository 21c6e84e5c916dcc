"""Random lives of a sidecar's data path, each replayed exactly by its seed.

Callers, servers, clocks and the policy misbehave at random over a network in memory: refused and slow connections,
resets, stalls, small windows, partial writes, lost and malformed responses, callers that leave, filters that dawdle,
policies that change meanwhile, a wall clock that is set and a machine that sleeps. What must hold in every run is
checked while it runs and when all is quiet (`support.lives`).

To replay one: `SEED=123 pytest tests/fault/test_exchange_seeds.py`.
"""

import gc
import os
from dataclasses import replace

import pytest
from support.lives import Life, live
from support.lives_http2 import Http2Life

from sidecar.model.snapshot import Budget as BudgetPolicy
from sidecar.model.snapshot import CircuitBreaker, Limits, Snapshot
from sidecar.policy import balancing
from sidecar.policy.balancing import Group
from sidecar.policy.breaker import Breaker
from sidecar.policy.budget import Budget
from sidecar.policy.exchange import Exchange

CORE, LONG = 200, 2_000
HTTP2_CORE, HTTP2_LONG = 50, 800
SEEDS = [int(os.environ["SEED"])] if "SEED" in os.environ else list(range(CORE))
BLOCK = 10  # seeds a test: fewer lines


@pytest.fixture(scope="module", autouse=True)
def _nothing_of_others() -> None:
    """What earlier tests have left open is complained of by whoever collects it: that must be no life."""
    gc.collect()


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


@pytest.mark.parametrize("kind", [Life, Http2Life])
def test_requests_that_may_not_be_repeated_occur(kind):
    assert sum(live(seed, kind).once.found for seed in range(20)) > 20


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


class HedgedLife(Life):
    """Nearly every request is hedged that may be."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.hedge_after_s = [0.001, 0.02]
        self.budgets = {name: BudgetPolicy(100.0, 100.0) for name in self.budgets}

    def policy(self) -> Snapshot:
        found, limits = super().policy(), Limits(self.slow.choice([2, 5, 1024]), 1024, 1024)
        self.most = max(self.most, limits.connections)
        return Snapshot({
            name: each if name == "web" else replace(
                each,
                limits=limits,
                circuit_breaker=CircuitBreaker(7, 0.1, 0.2),
                routes=tuple(replace(route, sticky=None) for route in each.routes),
                endpoints=tuple(replace(one, healthy=True) for one in each.endpoints),
            )
            for name, each in found.services.items()
        })  # fmt: skip


class HedgedHttp2Life(HedgedLife, Http2Life):
    pass


@pytest.mark.parametrize("kind", [HedgedLife, HedgedHttp2Life])
def test_seeds_with_hedges(kind):
    assert sum(len(live(seed, kind).hedges) for seed in SEEDS[:20]) >= (0 if "SEED" in os.environ else 10)


@pytest.mark.long
@pytest.mark.parametrize("first", range(CORE, CORE + 500, 100))
@pytest.mark.parametrize("kind", [HedgedLife, HedgedHttp2Life])
def test_many_more_seeds_with_hedges(first, kind):
    for block in range(first, first + 100, BLOCK):
        run_block(list(range(block, block + BLOCK)), kind)


def leak(self: Exchange) -> None:
    """Nine of ten endpoints are given back."""
    endpoint, self.endpoint = self.endpoint, None
    if endpoint is not None and self.rnd() < 0.9:
        endpoint.active -= 1


@pytest.mark.parametrize(
    ("where", "name", "planted", "says"),
    [
        (Group, "in_panic", lambda self: True, "bad health or ejected"),
        (balancing, "panics", lambda counts, threshold: [True] * len(counts), "bad health or ejected"),
        (Breaker, "allows", lambda self, now: True, "probed before its time"),
        (Budget, "withdraw", lambda self, now: True, "are paid for"),
        (Exchange, "_leave", leak, ""),
        (Exchange, "_repeatable", lambda self, safe: self.replayable, "reached an application twice"),
    ],
)
def test_planted_mistakes_are_found(where, name, planted, says, monkeypatch):
    monkeypatch.setattr(where, name, planted)
    with pytest.raises(BaseException) as caught:
        list(map(live, range(100)))
    found: BaseException = caught.value
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, AssertionError) and says in str(found)


@pytest.mark.parametrize("kind", [Life, Http2Life])
def test_a_seed_replays_exactly(kind):
    one, two = live(11, kind), live(11, kind)
    assert one.net.log == two.net.log and [s.sends for s in one.servings] == [s.sends for s in two.servings]
    assert one.net.dials == two.net.dials
