"""The gate before an application, in virtual time."""

import random

import pytest

from sidecar.model.snapshot import Concurrency, Priority, ValueMatch
from sidecar.policy.overload import OVER, RUNS, SHED, WAITS, Gate, Ticket

OFF = float("inf")
CLASSES = (
    Priority("high", callers=frozenset({"checkout"})),
    Priority("default"),
    Priority("batch", headers=(("x-priority", ValueMatch("exact", "batch")),)),
)


class Door:
    """A gate, with what it has told whom."""

    def __init__(self, most: int = 1, queue: int = 2, queue_timeout_s: float = 0.1, **more: object) -> None:
        self.notes: list[str] = []
        self.tickets: list[Ticket] = []
        self.told: list[str] = []
        policy = Concurrency(most=most, queue=queue, queue_timeout_s=queue_timeout_s, **more)  # type: ignore[arg-type]
        self.gate = Gate(policy, 0.0, note=self.notes.append)

    def come(self, name: str = "", rank: int = 0, ends: float = OFF, now: float = 0.0) -> Ticket:
        ticket = self.gate.arrive(rank, ends, now, lambda: self.told.append(name))
        self.tickets.append(ticket)
        return ticket


def test_so_many_at_a_time_and_the_next_waits() -> None:
    door = Door(most=2)
    first, second, third = door.come(), door.come(), door.come("third")
    assert (first.at, second.at, third.at) == (RUNS, RUNS, WAITS)
    door.gate.leave(first, 0.01)
    assert third.at is RUNS and door.told == ["third"]


def test_a_class_keeps_its_order() -> None:
    door = Door(queue=3)
    tickets = [door.come(name) for name in "_abc"]
    for ticket in tickets:
        door.gate.leave(ticket, 0.0)
    assert door.told == ["a", "b", "c"]


def test_the_higher_class_starts_first() -> None:
    door = Door(priorities=CLASSES)
    running = door.come(rank=1)
    low, high = door.come("low", rank=2), door.come("high", rank=0)
    door.gate.leave(running, 0.0)
    assert (low.at, high.at) == (WAITS, RUNS)


def test_a_full_queue_gives_up_the_newest_of_the_lowest_class_for_a_higher_one() -> None:
    door = Door(queue=2, priorities=CLASSES)
    door.come(rank=1)
    old, new = door.come("old", rank=2), door.come("new", rank=2)
    high = door.come("high", rank=0)
    assert (old.at, new.at, new.why, high.at) == (WAITS, SHED, "evicted", WAITS)
    assert door.told == ["new"]
    assert door.gate.shed == {"batch": 1}


def test_a_full_queue_refuses_its_own_class_and_lower_ones() -> None:
    door = Door(queue=1, priorities=CLASSES)
    door.come(rank=1)
    door.come(rank=1)
    same, lower = door.come(rank=1), door.come(rank=2)
    assert (same.why, lower.why) == ("full", "full")


def test_nobody_waits_for_longer_than_the_queue_timeout() -> None:
    door = Door()
    running, waiting = door.come(), door.come("waiting")
    assert waiting.until == pytest.approx(0.1)
    door.gate.expire(waiting, 0.05)
    assert waiting.at is WAITS
    door.gate.leave(running, 0.11)
    assert (waiting.at, waiting.why) == (SHED, "late")
    assert door.gate.in_flight == 0


def test_nor_than_its_own_time_less_what_an_idle_application_needs() -> None:
    door = Door(most=1, adaptive=True, least=1)
    for number in range(50):
        ticket = door.come(now=number * 0.02)
        door.gate.answered(ticket, True, False, (number + 1) * 0.02)
        door.gate.leave(ticket, (number + 1) * 0.02)
    door.come(now=2.0)
    waiting = door.come(ends=2.05, now=2.0)
    assert waiting.at is WAITS and waiting.until == pytest.approx(2.03)
    late = door.come(ends=2.015, now=2.0)
    assert (late.at, late.why) == (SHED, "late")


def test_where_nothing_is_under_way_even_a_short_time_is_tried() -> None:
    door = Door(most=1)
    assert door.come(ends=0.001, now=0.0).at is RUNS


def test_who_leaves_while_waiting_is_not_told() -> None:
    door = Door()
    running, waiting = door.come(), door.come("waiting")
    door.gate.leave(waiting, 0.01)
    door.gate.leave(waiting, 0.01)
    door.gate.leave(running, 0.02)
    assert waiting.at is OVER and not door.told and door.gate.waiting == 0


def test_an_endless_answer_gives_its_place_back_at_its_head() -> None:
    door = Door()
    stream = door.come()
    door.gate.answered(stream, True, True, 0.01)
    assert door.gate.in_flight == 0
    door.gate.leave(stream, 100.0)
    assert door.gate.in_flight == 0


def test_classes_go_by_caller_and_header_and_the_first_counts() -> None:
    gate = Door(priorities=CLASSES).gate
    batch = [(b"x-priority", b"batch")]
    assert gate.class_of("checkout", batch) == 0
    assert gate.class_of("web", batch) == 2
    assert gate.class_of(None, []) == 1


def test_copies_are_below_all_classes() -> None:
    door = Door(queue=1, priorities=CLASSES)
    door.come()
    copy = door.come("copy", rank=door.gate.copies)
    batch = door.come("batch", rank=2)
    assert (copy.why, batch.at) == ("evicted", WAITS) and door.gate.shed == {"copies": 1}


def test_default_is_the_last_where_it_is_not_listed() -> None:
    assert Door(priorities=CLASSES[:1]).gate.class_of("web", []) == 1


def test_shedding_begins_and_ends_with_the_evidence() -> None:
    door = Door(queue=0)
    running = door.come()
    door.come()
    door.come()
    assert door.notes == ["shedding began: class default, the queue was full; limit 1, 1 in flight, 0 waiting"]
    door.gate.leave(running, 4.0)
    door.gate.leave(door.come(now=5.0), 5.0)
    assert door.notes[1:] == ["shedding ended: default 2 in 0.0 s"]


def test_a_new_policy_keeps_who_waits_and_what_is_learnt() -> None:
    door = Door(adaptive=True, least=1, most=50)
    gradient = door.gate.gradient
    door.come()
    waiting = door.come("waiting")
    door.gate.configure(Concurrency(adaptive=True, least=2, most=60), 0.01)
    assert door.gate.gradient is gradient
    assert waiting.at is RUNS and door.told == ["waiting"]
    third = door.come("third", now=0.02)
    assert third.at is WAITS
    door.gate.open(0.03)
    assert third.at is RUNS


def test_a_new_policy_keeps_classes_by_their_names_and_the_order_of_arrival() -> None:
    door = Door(queue=10, priorities=CLASSES)
    running = door.come(rank=1)
    door.come("batch 1", rank=2, now=0.01)
    door.come("high", rank=0, now=0.02)
    door.come("batch 2", rank=2, now=0.03)
    door.come("default", rank=1, now=0.04)
    turned = (Priority("batch", callers=frozenset({"web"})), Priority("other", callers=frozenset({"shop"})))
    door.gate.configure(Concurrency(most=1, queue=10, priorities=turned), 0.05)
    for _ in range(4):
        door.gate.leave(running, 0.05)
        running = next((t for t in door.tickets if t.at is RUNS), running)
    assert door.told == ["batch 1", "batch 2", "high", "default"]  # who has no class any more is of the default one


def test_a_shorter_queue_lets_nobody_in_but_sends_nobody_away() -> None:
    door = Door(queue=3, priorities=CLASSES)
    door.come(rank=1)
    waiting = [door.come(rank=2) for _ in range(3)]
    door.gate.configure(Concurrency(most=1, queue=1, priorities=CLASSES), 0.0)
    assert [each.at for each in waiting] == [WAITS] * 3
    assert door.come(rank=2).why == "full"
    assert door.come(rank=0).at is WAITS and door.gate.waiting == 3


def test_whoever_has_to_wait_makes_it_worth_measuring_again() -> None:
    door = Door(adaptive=True, least=1, most=50)
    gradient = door.gate.gradient
    assert gradient is not None
    door.come()
    assert not gradient.contended
    door.come()
    assert gradient.contended


def test_a_stream_whose_caller_still_sends_is_measured_by_its_response_head() -> None:
    door = Door(adaptive=True, least=1, most=50)
    gradient = door.gate.gradient
    assert gradient is not None
    for number in range(50):
        ticket = door.gate.arrive(0, OFF, number * 1.0, lambda: None, sampled=False)
        door.gate.answered(ticket, True, True, number + 0.02)
    door.gate.leave(door.come(now=60.0), 60.0)
    assert gradient.min_rtt_s == pytest.approx(0.02)


def test_a_limit_that_swings_is_told_of_every_ten_seconds_at_most() -> None:
    door = Door(adaptive=True, least=1, most=1000)
    gradient = door.gate.gradient
    assert gradient is not None
    for _ in range(50):
        gradient.sample(0.02, 0.0, 0.0)
    now = 0.0
    for turn in range(300):
        now += 0.1
        for _ in range(10):
            gradient.sample(0.02 if turn % 2 else 0.2, now, now)
        gradient.learnt = 10.0 if turn % 2 else 200.0
        door.gate.leave(door.come(now=now), now)
    assert 1 <= len(door.notes) <= 3


@pytest.mark.parametrize("seed", range(40))
def test_random_lives_give_every_place_back(seed: int) -> None:
    rnd = random.Random(seed)
    door = Door(most=rnd.randint(1, 6), queue=rnd.randint(0, 5), adaptive=rnd.random() < 0.5, least=1,
                priorities=CLASSES)  # fmt: skip
    gate, held, now = door.gate, [], 0.0
    for _ in range(600):
        now += rnd.expovariate(100.0)
        chance = rnd.random()
        if chance < 0.5 or not held:
            ends = now + rnd.choice([0.01, 0.3, OFF])
            held.append(door.come(rank=rnd.randrange(len(gate._queues)), ends=ends, now=now))
        elif chance < 0.6:
            gate.answered(rnd.choice(held), rnd.random() < 0.9, rnd.random() < 0.2, now)
        elif chance < 0.7:
            gate.expire(rnd.choice(held), now)
        elif chance < 0.71:
            gate.configure(Concurrency(adaptive=rnd.random() < 0.5, least=1, most=rnd.randint(1, 6), queue=5), now)
        else:
            ticket = held.pop(rnd.randrange(len(held)))
            gate.leave(ticket, now)
        assert gate.in_flight == sum(each.at is RUNS for each in held)
        assert gate.waiting == sum(each.at is WAITS for each in held) == sum(map(len, gate._queues))
        assert not gate.waiting or gate.in_flight >= gate.limit
    for ticket in held:
        gate.leave(ticket, now)
    assert gate.in_flight == gate.waiting == 0
