"""Lazy deadlines, in virtual time."""

import gc
import weakref

import pytest
import trio
import trio.testing

from sidecar.proxy.timers import COMPACT_MIN, FIRES_PER_TURN, OFF, Timer, Timers


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def call(fn, *args):
    fn(*args)


def timers_at(clock: Clock) -> Timers:
    return Timers(clock, call)


def test_fires_at_its_time_and_once():
    clock, fired = Clock(), []
    timers = timers_at(clock)
    timer = Timer(timers, lambda: fired.append(clock.now))
    timer.set(105.0)
    clock.now = 104.999
    timers.fire_due()
    assert fired == []
    clock.now = 105.0
    timers.fire_due()
    clock.now = 200.0
    timers.fire_due()
    assert fired == [105.0]
    assert timer.due == OFF


def test_later_is_an_attribute_write_and_earlier_pushes():
    clock, fired = Clock(), []
    timers = timers_at(clock)
    timer = Timer(timers, lambda: fired.append(clock.now))
    timer.set(105.0)
    timer.due = 110.0
    assert len(timers.heap) == 1
    clock.now = 105.0
    timers.fire_due()
    assert fired == []
    timer.set(107.0)
    clock.now = 107.0
    timers.fire_due()
    assert fired == [107.0]
    clock.now = 120.0
    timers.fire_due()
    assert fired == [107.0]
    assert timers.heap == []


def test_a_superseded_entry_leaves_the_valid_one_alone():
    clock, fired = Clock(), []
    timers = timers_at(clock)
    timer = Timer(timers, lambda: fired.append(clock.now))
    timer.set(105.0)
    timer.set(103.0)
    clock.now = 103.0
    timers.fire_due()
    timer.set(110.0)
    clock.now = 105.0
    timers.fire_due()
    assert (len(timers.heap), timers.dead) == (1, 0)
    clock.now = 110.0
    timers.fire_due()
    assert fired == [103.0, 110.0]


def test_off_and_on_again_before_the_old_entry_comes():
    clock, fired = Clock(), []
    timers = timers_at(clock)
    timer = Timer(timers, lambda: fired.append(clock.now))
    timer.set(105.0)
    timer.off()
    timer.set(106.0)
    clock.now = 105.5
    timers.fire_due()
    assert fired == []
    clock.now = 106.0
    timers.fire_due()
    assert fired == [106.0]


def test_an_owner_may_set_its_timer_again_while_it_fires():
    clock, fired = Clock(), []
    timers = timers_at(clock)

    def fire() -> None:
        fired.append(clock.now)
        timer.set(clock.now + 1)

    timer = Timer(timers, fire)
    timer.set(101.0)
    for clock.now in (101.0, 102.0, 103.0):
        timers.fire_due()
    assert fired == [101.0, 102.0, 103.0]


def test_a_closed_timer_keeps_nothing_alive():
    class Owner:
        def due(self) -> None: ...

    timers = timers_at(Clock())
    owner = Owner()
    timer = Timer(timers, owner.due)
    timer.set(1e6)
    gone = weakref.ref(owner)
    timer.close()
    timer.close()
    del owner
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError):
        timer.set(1.0)


def test_dead_entries_are_at_most_half_of_the_heap():
    clock = Clock()
    timers = timers_at(clock)
    living = [Timer(timers, lambda: None) for _ in range(10)]
    for timer in living:
        timer.set(1000.0)
    for _ in range(10_000):
        timer = Timer(timers, lambda: None)
        timer.set(900.0)
        timer.close()
    assert len(timers.heap) <= COMPACT_MIN + 1
    for n in range(10_000):  # earlier and earlier: each supersedes its own entry
        living[0].set(999.0 - n / 100)
    assert len(timers.heap) <= 2 * COMPACT_MIN
    clock.now = 2000.0
    fired = 0
    for timer in living:

        def count() -> None:
            nonlocal fired
            fired += 1

        timer.fire = count
    while timers.fire_due():
        pass
    assert fired == 10
    assert (timers.heap, timers.dead) == ([], 0)


def test_many_at_once_leave_others_their_turn():
    clock, fired = Clock(), []
    timers = timers_at(clock)
    for n in range(FIRES_PER_TURN * 2):
        Timer(timers, lambda n=n: fired.append(n)).set(101.0)
    clock.now = 101.0
    assert timers.fire_due()
    assert len(fired) == FIRES_PER_TURN


async def test_the_task_sleeps_until_the_nearest_and_wakes_for_an_earlier_one(autojump_clock: trio.testing.MockClock):
    fired = []
    timers = Timers(trio.current_time, call)
    begin = trio.current_time()

    def timer(name: str) -> Timer:
        return Timer(timers, lambda: fired.append((name, round(trio.current_time() - begin, 6))))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(timers.run)
        await trio.testing.wait_all_tasks_blocked()
        slow, quick, moved = timer("slow"), timer("quick"), timer("moved")
        slow.set(begin + 50)
        moved.set(begin + 2)
        moved.due = begin + 30
        await trio.testing.wait_all_tasks_blocked()
        quick.set(begin + 5)
        await trio.sleep(100)
        nursery.cancel_scope.cancel()
    assert fired == [("quick", 5.0), ("moved", 30.0), ("slow", 50.0)]


async def test_a_dead_entry_at_the_top_does_not_put_off_the_next_deadline(autojump_clock: trio.testing.MockClock):
    """A timer that fired early leaves its old entry behind; setting it far ahead must not move the task's wake-up past
    another timer's time."""
    fired: list[tuple[str, float]] = []
    async with trio.open_nursery() as nursery:
        timers = Timers(trio.current_time, call)
        nursery.start_soon(timers.run)
        await trio.testing.wait_all_tasks_blocked()
        start = trio.current_time()
        first = Timer(timers, lambda: fired.append(("first", trio.current_time() - start)))
        second = Timer(timers, lambda: fired.append(("second", trio.current_time() - start)))
        first.set(start + 4.4)
        second.set(start + 4.5)
        first.set(start + 1.0)
        await trio.sleep(2.0)
        first.set(start + 300.0)
        await trio.sleep(10.0)
        nursery.cancel_scope.cancel()
    assert [name for name, _ in fired] == ["first", "second"]
    assert [round(at, 6) for _, at in fired] == [1.0, 4.5]
