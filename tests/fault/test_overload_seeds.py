"""Random lives behind the gate before the application, each from one seed: too many requests of several classes over
HTTP/1.1, HTTP/2 and gRPC, callers that leave and streams that are reset while they wait, applications that stall and
fail, policies that change the limit, the queue and the classes, or take them away.

What must hold is checked at each step of the gate and when all is quiet (`support.lives_overload`): a place never
leaks, the queue is bounded, a lower class never gets in while a higher one waits, each request ends once.
To replay one: `SEED=123 pytest tests/fault/test_overload_seeds.py`.
"""

import gc
import os

import pytest
from support.lives import live
from support.lives_overload import OverloadLife

from sidecar.policy.overload import WAITS, Gate, Ticket
from sidecar.proxy import overload

CORE, LONG = 40, 600
SEEDS = [int(os.environ["SEED"])] if "SEED" in os.environ else list(range(CORE))
BLOCK = 10  # seeds a test: fewer lines


@pytest.fixture(scope="module", autouse=True)
def _nothing_of_others() -> None:
    """What earlier tests have left open is complained of by whoever collects it: that must be no life."""
    gc.collect()


def run_block(seeds):
    lives = [live(seed, OverloadLife) for seed in seeds]
    if len(seeds) == BLOCK:
        seen = set().union(*(each.seen for each in lives))
        assert seen >= {"RUNS", "WAITS", "full", "late"}, "too little has happened"
        assert sum(gate.started for each in lives for gate in each.gates) > 20


@pytest.mark.parametrize("first", SEEDS[::BLOCK])
def test_seeds(first):
    run_block([seed for seed in SEEDS if first <= seed < first + BLOCK])


@pytest.mark.long
@pytest.mark.parametrize("first", range(CORE, CORE + LONG, 100))
def test_many_more_seeds(first):
    for block in range(first, first + 100, BLOCK):
        run_block(list(range(block, block + BLOCK)))


def forgets(self: Gate, ticket: Ticket, now: float) -> None:
    """Now and then a request that waits leaves, and is not struck off."""
    if ticket.at is not WAITS:
        LEAVE(self, ticket, now)


def lowest_first(self: Gate, now: float) -> None:
    while self.waiting and self.in_flight < self.limit:
        ticket = next(queue for queue in reversed(self._queues) if queue)[0]
        if now >= ticket.until:
            self._drop(ticket, "late", now)
            continue
        self._queues[ticket.rank].popleft()
        self.waiting -= 1
        self._start(ticket, now)
        ticket.tell()


def takes_anybody(self: Gate, rank: int, now: float) -> bool:
    return True


def gives_up_the_highest(self: Gate, rank: int, now: float) -> bool:
    for queue in self._queues:
        if queue:
            self._drop(queue[-1], "evicted", now)
            return True
    return False


LEAVE = Gate.leave


@pytest.mark.parametrize(
    ("where", "name", "planted", "says"),
    [
        (overload, "left", lambda serving: None, "a place has leaked"),
        (Gate, "leave", forgets, ""),
        (Gate, "_wake", lowest_first, "a lower class was let in"),
        (Gate, "_wake", lambda self, now: None, "somebody waits although there is room"),
        (Gate, "_evict_below", takes_anybody, "the queue has no bound"),
        (Gate, "_evict_below", gives_up_the_highest, "not the lowest was given up"),
    ],
)
def test_planted_mistakes_are_found(where, name, planted, says, monkeypatch):
    monkeypatch.setattr(where, name, planted)
    with pytest.raises(BaseException) as caught:
        [live(seed, OverloadLife) for seed in range(60)]
    found: BaseException = caught.value
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, AssertionError) and says in str(found)


def test_a_seed_replays_exactly():
    one, two = live(7, OverloadLife), live(7, OverloadLife)
    assert one.net.log == two.net.log and one.seen == two.seen
    assert [gate.shed for gate in one.gates] == [gate.shed for gate in two.gates]
