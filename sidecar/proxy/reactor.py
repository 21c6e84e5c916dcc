"""One Trio task that owns an epoll set of every open connection.

A connection is registered once, level-triggered; when it is ready its `ready` runs there and then, synchronously. Tasks
enter the world of connections only through `call`. What callbacks append to `soon` (flushes, deferred losses) runs
once at the end of the batch, and sockets in `doomed` are closed after that.
After a batch it stays for up to a millisecond for the next events, instead of going back to Trio at once: a pass of
the scheduler costs more than the whole of a small request. It goes back at once while a task runs that connections wait
for (`errands`), and in any case once the slice is over.
Must not know TLS, HTTP or policy.
Invariants: a descriptor given up within a batch is really closed only after the batch, so its number cannot come back
inside it; an exception out of one connection's callback ends that connection and nothing else; the loop never runs
longer than `slice_s` plus one batch and one `LINGER_S` before the rest of Trio has had its turn.
"""

import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

import trio

from .timers import Timers

IN, OUT, RDHUP = select.EPOLLIN, select.EPOLLOUT, select.EPOLLRDHUP
ERR, HUP = select.EPOLLERR, select.EPOLLHUP
SOON_ROUNDS = 8  # rounds of `soon` in one go; what appends to it without end must not starve the sockets
SLOW_S = 0.1
LINGER_S = 0.001  # epoll counts whole milliseconds


class Polled(Protocol):
    """What the reactor drives."""

    def ready(self, events: int) -> None: ...
    def crashed(self, exc: Exception) -> None: ...


class Closable(Protocol):
    def close(self) -> None: ...


def _ignore(exc: Exception) -> None:
    del exc


class Reactor:
    """`clock` is monotonic seconds. `now` is that clock as of the running batch: good enough for deadlines, free."""

    def __init__(self, slice_s: float = 0.001, batch: int = 64, clock: Callable[[], float] = time.monotonic) -> None:
        self.epoll = select.epoll()
        self.slice_s = slice_s
        self.batch = batch
        self.clock = clock
        self.now = clock()
        self.timers = Timers(clock, self.call)  # its task runs inside `run`
        self.conns: dict[int, Polled] = {}
        self.soon: list[Callable[[], object]] = []
        self.doomed: list[Closable] = []
        self.held_bytes = 0  # what waits to be written, on all connections; theirs to count
        self.wide_bytes = 0  # receive windows of HTTP/2 requests beyond their first ones; likewise
        self.errands = 0  # tasks under way that connections wait for: dialling, handshakes, asynchronous filters
        self.crashes = 0
        self.on_crash: Callable[[Exception], object] = _ignore
        self.on_slow: Callable[[str], object] | None = None  # set it before `run`
        self.on_lag: Callable[[float], object] | None = None  # told of every slice
        self.lag_s = 0.0  # how long the last slice kept the rest of Trio waiting
        self.lag_max_s = 0.0  # the longest since `take_lag_max_s`
        self.busy_since = 0.0  # 0: not in a slice
        self.closed = False
        self._in_batch = False
        self._stall = ""
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.epoll.register(self._wake_fd, IN)

    # -- for connections
    def add(self, fd: int, conn: Polled, mask: int) -> None:
        self.epoll.register(fd, mask)
        self.conns[fd] = conn

    def change(self, fd: int, mask: int) -> None:
        self.epoll.modify(fd, mask)

    def hush(self, fd: int) -> None:
        """No more events of a connection that stays: the only way to mask HUP and ERR."""
        self.epoll.unregister(fd)

    def unhush(self, fd: int, mask: int) -> None:
        self.epoll.register(fd, mask)

    def forget(self, fd: int) -> None:
        if self.conns.pop(fd, None) is not None:
            try:
                self.epoll.unregister(fd)
            except (FileNotFoundError, ValueError):
                pass  # hushed, or the reactor has been closed

    def report(self, exc: Exception) -> None:
        """A bug whose damage its finder has bounded."""
        self._crash(None, exc)

    # -- for tasks
    def errand(self, change: int) -> None:
        """A task that connections wait for begins (1) or ends (-1)."""
        self.errands += change

    def call(self, fn: Callable[..., object], *args: Any) -> None:
        """How a Trio task hands a result to connections: guarded, and flushed afterwards. Inside a batch the batch's
        own flush does, so that no descriptor is closed while its events may still be in hand."""
        if self._in_batch:
            self._guarded(fn, args)
            return
        self.now = self.clock()
        self._in_batch = True
        try:
            self._guarded(fn, args)
            if self.soon or self.doomed:
                self._after_batch()
        finally:
            self._in_batch = False
        if self.soon and not self.closed:
            os.eventfd_write(self._wake_fd, 1)  # left over: the loop goes on with it

    def take_lag_max_s(self) -> float:
        """The longest slice since the last reading."""
        lag, self.lag_max_s = self.lag_max_s, 0.0
        return lag

    async def run(self) -> None:
        """Until cancelled. Then every connection hears `crashed` and is closed, without awaiting anything."""
        watch = _StallWatch(self) if self.on_slow is not None else None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.timers.run)
                if watch is not None:
                    watch.start()
                await self._loop()
        finally:
            if watch is not None:
                watch.stopping.set()
            self.close()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = self._in_batch = True
        for conn in list(self.conns.values()):
            self._crashed(conn, ConnectionAbortedError("the reactor has stopped"))
        for _ in range(SOON_ROUNDS):
            self._after_batch()
        self.soon.clear()
        self._in_batch = False
        self.epoll.close()
        os.close(self._wake_fd)

    # -- inside
    async def _loop(self) -> None:
        poll, get, clock, batch = self.epoll.poll, self.conns.get, self.clock, self.batch
        fd, wake_fd = self.epoll.fileno(), self._wake_fd
        more = bool(self.soon)
        while True:
            if more:
                await trio.lowlevel.checkpoint()
            else:
                await trio.lowlevel.wait_readable(fd)
            begin = self.now = self.busy_since = clock()
            end = begin + self.slice_s
            more = True
            while more:
                events = poll(0 if self.errands or self.soon else LINGER_S, batch)
                if not events and not self.soon:
                    more = False
                    break
                self._in_batch = True
                for number, mask in events:
                    conn = get(number)
                    if conn is not None:
                        try:
                            conn.ready(mask)
                        except Exception as exc:  # a bug, or a broken peer that a codec let through
                            self._crash(conn, exc)
                    elif number == wake_fd:
                        os.eventfd_read(wake_fd)
                if self.soon or self.doomed:
                    self._after_batch()
                self._in_batch = False
                self.now = now = clock()
                if now > end:
                    break
            self._end_of_slice(self.now - begin)

    def _end_of_slice(self, lag_s: float) -> None:
        self.busy_since = 0.0
        self.lag_s = lag_s
        if self.on_lag is not None:
            self.on_lag(lag_s)
        if lag_s > self.lag_max_s:
            self.lag_max_s = lag_s
        if lag_s > SLOW_S and self.on_slow is not None:
            text, self._stall = self._stall, ""
            try:
                self.on_slow(text or f"the reactor was busy for {lag_s:.3f} s; no stack was caught\n")
            except Exception as exc:
                self._crash(None, exc)

    def _after_batch(self) -> None:
        for _ in range(SOON_ROUNDS):
            if not self.soon:
                break
            todo, self.soon = self.soon, []
            for fn in todo:
                self._guarded(fn, ())
        if self.doomed:
            doomed, self.doomed = self.doomed, []
            for sock in doomed:
                try:
                    sock.close()
                except OSError:
                    pass  # close(2) may report a reset; the descriptor is gone either way

    def _guarded(self, fn: Callable[..., object], args: tuple[Any, ...]) -> None:
        try:
            fn(*args)
        except Exception as exc:
            # A bound method of a connection (a deferred read, say) ends that connection, not only the call.
            owner = getattr(fn, "__self__", None)
            self._crash(owner if self._is_conn(owner) else None, exc)

    def _is_conn(self, owner: Any) -> bool:
        fd = getattr(owner, "fd", None)
        return isinstance(fd, int) and self.conns.get(fd) is owner

    def _crash(self, conn: Polled | None, exc: Exception) -> None:
        self.crashes += 1
        try:
            self.on_crash(exc)
        except Exception:
            self.crashes += 1  # a reporter that fails has nobody left to report to
        if conn is not None:
            self._crashed(conn, exc)

    def _crashed(self, conn: Polled, exc: Exception) -> None:
        try:
            conn.crashed(exc)
        except Exception as second:
            self._crash(None, second)


class _StallWatch(threading.Thread):
    """Catches the stack of a slice that lasts over SLOW_S while it lasts; afterwards nobody can tell what it did.
    Costs the hot path two attribute writes a slice. It only looks: the report is made by the reactor's own task."""

    def __init__(self, reactor: Reactor) -> None:
        super().__init__(name="pillion-stall-watch", daemon=True)
        self.reactor = reactor
        self.watched = threading.get_ident()
        self.stopping = threading.Event()

    def run(self) -> None:
        reactor, reported = self.reactor, 0.0
        while not self.stopping.wait(SLOW_S / 2):
            since = reactor.busy_since
            if since and since != reported and reactor.clock() - since > SLOW_S:
                frame = sys._current_frames().get(self.watched)
                if frame is not None and reactor.busy_since == since:
                    reported = since
                    reactor._stall = "".join(traceback.format_stack(frame))
