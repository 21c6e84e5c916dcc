"""The reactor on pipes: batches, guards, fairness. No sockets, no real time but the scheduler's."""

import os
import select

import pytest
import trio
import trio.testing

from sidecar.proxy.reactor import IN, SLOW_S, SOON_ROUNDS, Reactor


class Pipe:
    """A connection that reads from a pipe."""

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor
        self.fd, self.far = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.got: list[bytes] = []
        self.crashes: list[Exception] = []
        self.then = lambda: None
        reactor.add(self.fd, self, IN)

    def feed(self, data: bytes) -> None:
        os.write(self.far, data)

    def ready(self, events: int) -> None:
        self.got.append(os.read(self.fd, 100))
        self.then()

    def crashed(self, exc: Exception) -> None:
        self.crashes.append(exc)
        self.give_up()

    def give_up(self) -> None:
        self.reactor.forget(self.fd)
        self.reactor.doomed.append(self)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            os.close(self.far)
            self.fd = -1


@pytest.fixture
async def reactor(nursery: trio.Nursery):
    reactor = Reactor()
    nursery.start_soon(reactor.run)
    yield reactor
    reactor.close()
    nursery.cancel_scope.cancel()


async def settle() -> None:
    for _ in range(5):
        await trio.testing.wait_all_tasks_blocked()


async def test_a_ready_connection_is_driven(reactor: Reactor):
    pipe = Pipe(reactor)
    pipe.feed(b"one")
    await until(lambda: pipe.got)
    assert pipe.got == [b"one"]


async def until(condition) -> None:
    for _ in range(10_000):
        if condition():
            return
        await trio.lowlevel.checkpoint()
    raise AssertionError("it did not happen")


async def test_an_exception_ends_that_connection_and_nothing_else(reactor: Reactor):
    seen: list[Exception] = []
    reactor.on_crash = seen.append
    bad, good = Pipe(reactor), Pipe(reactor)
    bad.then = lambda: 1 / 0
    bad.feed(b"x")
    good.feed(b"y")
    await until(lambda: good.got and bad.crashes)
    good.feed(b"z")
    await until(lambda: len(good.got) == 2)
    assert isinstance(bad.crashes[0], ZeroDivisionError)
    assert (reactor.crashes, len(seen)) == (1, 1)
    assert list(reactor.conns) == [good.fd]


async def test_a_crash_in_the_crash_handling_is_contained(reactor: Reactor):
    def complain(exc: Exception) -> None:
        raise RuntimeError("the log is broken")

    reactor.on_crash = complain
    bad = Pipe(reactor)
    bad.then = lambda: 1 / 0
    bad.crashed = lambda exc: 1 / 0  # type: ignore[method-assign]
    bad.feed(b"x")
    await until(lambda: reactor.crashes >= 2)
    good = Pipe(reactor)
    good.feed(b"y")
    await until(lambda: good.got)
    bad.crashed = lambda exc: None  # type: ignore[method-assign]
    bad.give_up()
    reactor.call(lambda: None)


async def test_a_descriptor_is_closed_only_after_the_batch(reactor: Reactor):
    """Its number must not come back while events of its former life are in hand."""
    first, second = Pipe(reactor), Pipe(reactor)
    open_within: list[bool] = []

    def end_both() -> None:
        for pipe in (first, second):
            if pipe.fd in reactor.conns:
                pipe.give_up()
                reactor.call(lambda: None)  # a nested call must not flush either
            open_within.append(pipe.fd >= 0)

    first.then = second.then = end_both
    first.feed(b"x")
    second.feed(b"x")
    await until(lambda: first.fd < 0 and second.fd < 0)
    assert len(first.got) + len(second.got) == 1  # whichever came first; the other's event is stale
    assert open_within == [True, True]


async def test_call_is_guarded_and_flushes(reactor: Reactor):
    ran: list[str] = []

    def work(name: str) -> None:
        ran.append(name)
        reactor.soon.append(lambda: ran.append("flush"))
        raise ValueError("a bug in a task's callback")

    reactor.call(work, "work")
    assert ran == ["work", "flush"]
    assert reactor.crashes == 1


async def test_a_deferred_method_that_raises_ends_its_own_connection(reactor: Reactor):
    class Fragile(Pipe):
        def later(self) -> None:
            raise KeyError("late")

    fragile = Fragile(reactor)
    reactor.call(lambda: reactor.soon.append(fragile.later))
    assert isinstance(fragile.crashes[0], KeyError)
    assert fragile.fd == -1


async def test_one_that_always_has_more_to_do_does_not_starve_the_others(reactor: Reactor):
    rounds = 0

    def again() -> None:
        nonlocal rounds
        rounds += 1
        reactor.soon.append(again)

    reactor.call(again)
    assert rounds <= SOON_ROUNDS + 1
    pipe = Pipe(reactor)
    pipe.feed(b"x")
    await until(lambda: pipe.got)
    before = rounds
    await until(lambda: rounds > before)  # and it goes on without any event
    reactor.soon.clear()


async def test_the_rest_of_trio_has_its_turn_while_events_never_end():
    """With a clock that jumps a slice with each look, every batch is followed by a checkpoint."""
    ticks = 0.0

    def clock() -> float:
        nonlocal ticks
        ticks += 0.01
        return ticks

    async with trio.open_nursery() as nursery:
        reactor = Reactor(clock=clock)
        reactor.timers.clock = lambda: 0.0
        pipe = Pipe(reactor)
        pipe.then = lambda: pipe.feed(b"x")
        pipe.feed(b"x")
        nursery.start_soon(reactor.run)
        passes = 0
        while len(pipe.got) < 50:
            passes += 1
            await trio.lowlevel.checkpoint()
        assert passes >= 20
        nursery.cancel_scope.cancel()


async def test_a_batch_is_bounded():
    async with trio.open_nursery() as nursery:
        reactor = Reactor(batch=4)
        flushes: list[int] = []
        pipes = [Pipe(reactor) for _ in range(10)]
        done = 0

        def flush() -> None:
            flushes.append(done)

        def then() -> None:
            nonlocal done
            done += 1
            if flush not in reactor.soon:
                reactor.soon.append(flush)

        for pipe in pipes:
            pipe.then = then
            pipe.feed(b"x")
        nursery.start_soon(reactor.run)
        await until(lambda: done == 10)
        assert flushes == [4, 8, 10]
        nursery.cancel_scope.cancel()


async def test_lag_is_measured_and_read_once():
    now = 0.0
    async with trio.open_nursery() as nursery:
        reactor = Reactor(clock=lambda: now)
        pipe = Pipe(reactor)

        def work() -> None:
            nonlocal now
            now += 0.03

        pipe.then = work
        nursery.start_soon(reactor.run)
        pipe.feed(b"x")
        await until(lambda: reactor.lag_max_s)
        assert reactor.now == pytest.approx(0.03)
        assert reactor.take_lag_max_s() == pytest.approx(0.03)
        assert reactor.take_lag_max_s() == 0.0
        nursery.cancel_scope.cancel()


async def test_a_slow_slice_is_reported():
    now = 0.0
    async with trio.open_nursery() as nursery:
        reactor = Reactor(clock=lambda: now)
        reports: list[str] = []
        reactor.on_slow = reports.append
        pipe = Pipe(reactor)

        def work() -> None:
            nonlocal now
            now += SLOW_S * 2

        pipe.then = work
        nursery.start_soon(reactor.run)
        pipe.feed(b"x")
        await until(lambda: reports)
        assert "0.200 s" in reports[0]
        nursery.cancel_scope.cancel()


async def test_stopping_tells_every_connection_and_closes_it():
    reactor = Reactor()
    pipe = Pipe(reactor)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reactor.run)
        await settle()
        nursery.cancel_scope.cancel()
    assert isinstance(pipe.crashes[0], ConnectionAbortedError)
    assert pipe.fd == -1
    assert reactor.closed
    reactor.close()


async def test_hush_masks_even_a_hangup(reactor: Reactor):
    pipe = Pipe(reactor)
    reactor.hush(pipe.fd)
    pipe.feed(b"x")
    await settle()
    assert pipe.got == []
    reactor.unhush(pipe.fd, select.EPOLLIN)
    await until(lambda: pipe.got)
