"""A thread that writes lines, so that nothing else ever waits for a log.

`put` appends to a bounded queue and returns; a thread of its own renders the items and writes them to a descriptor or
a file. Must not know what the items are: `render` turns one into a line.
Invariants: `put` never blocks and never raises; what does not fit or cannot be written is counted, never waited for;
a descriptor that nobody reads costs memory up to the queue's bound and delays the end by `close`'s timeout at most.

Why it polls: a write to a full pipe would block the thread for good, and then the flush at the end could not be
bounded. A pipe that poll(2) calls writable takes PIPE_BUF bytes at once, so writes to pipes are no longer than that
where lines permit; then lines of two processes on one pipe do not mix either. The descriptor is not made non-blocking:
that would make it so for every process which shares it.

Why it sleeps between slices: while this thread renders, the reactor waits for the interpreter lock, up to the switch
interval (5 ms) at a time. A short sleep gives the lock away after some tens of microseconds of work.
"""

import os
import select
import stat
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

QUEUE_MAX = 10_000
SLICE_ITEMS = 16
SLICE_PAUSE_S = 50e-6
POLL_MS = 100
FILE_WRITE_BYTES_MAX = 65_536
FILE_MODE = 0o640


class SinkError(Exception):
    """The place that lines should go to cannot be opened."""


class Sink:
    """A descriptor, or a file by its path, that can be reopened. Only the writer's thread uses it once it runs."""

    def __init__(self, target: int | str) -> None:
        """`target`: a descriptor, which stays open at the end, or a path, which is appended to."""
        self._path = target if isinstance(target, str) else None
        self.fd = target if isinstance(target, int) else self._open()
        self.write_bytes_max = self._write_bytes_max()

    def reopen(self) -> None:
        """Open the path anew (after a rotation). Where that fails the old file stays. A descriptor: nothing."""
        if self._path is None:
            return
        fd = self._open()
        os.close(self.fd)
        self.fd = fd
        self.write_bytes_max = self._write_bytes_max()

    def close(self) -> None:
        if self._path is not None:
            os.close(self.fd)

    def _open(self) -> int:
        assert self._path is not None
        try:  # O_NONBLOCK: opening a FIFO that nobody reads must fail, not wait
            return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY, FILE_MODE)
        except OSError as error:
            raise SinkError(f"cannot open {self._path} for writing: {error.strerror}") from error

    def _write_bytes_max(self) -> int:
        try:
            regular = stat.S_ISREG(os.fstat(self.fd).st_mode)
        except OSError:
            regular = False
        return FILE_WRITE_BYTES_MAX if regular else select.PIPE_BUF


class LineWriter(Generic[T]):
    """The queue and its thread. `dropped` counts items that did not fit, `lost` those whose write failed or never
    came. `note(n)` may give a line that tells of n new drops, written when writing works again."""

    def __init__(
        self,
        sink: Sink,
        render: Callable[[T], bytes],
        *,
        name: str,
        queue_max: int = QUEUE_MAX,
        linger_s: float = 0.0,
        note: Callable[[int], bytes] | None = None,
    ) -> None:
        """`linger_s`: how long to gather items after a wake-up, so that a busy hot path seldom wakes the thread."""
        self.dropped = 0
        self.lost = 0
        self.queue: deque[T] = deque()
        self._sink = sink
        self._render = render
        self._queue_max = queue_max
        self._linger_s = linger_s
        self._note = note
        self._noted = 0
        self._open = True
        self._idle = False
        self._torn = False
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._reopen_asked = False
        self._give_up_s = float("inf")
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        if len(self.queue) < self._queue_max and self._open:
            self.queue.append(item)
        else:
            self.dropped += 1
        # The thread sets `_idle` before it looks at the queue a last time, so no item is left without a wake-up.
        if self._idle:
            self._idle = False
            self._wake.set()

    def reopen(self) -> None:
        """Reopen the file before the next line. From any thread, but not from
        within a signal handler (events are not reentrant)."""
        self._reopen_asked = True
        self._wake.set()

    def close(self, timeout_s: float = 1.0) -> bool:
        """Write what is queued, for `timeout_s` at most. False: something was lost or is stuck."""
        self._give_up_s = time.monotonic() + timeout_s
        self._open = False
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s + 0.25)
        return not self._thread.is_alive() and not self.lost

    def _run(self) -> None:
        while True:
            if self._reopen_asked:
                self._reopen()
            if self.queue:
                self._drain()
            elif self._closing.is_set():
                break
            else:
                self._wait()
        self._sink.close()

    def _wait(self) -> None:
        self._wake.clear()
        self._idle = True
        if not (self.queue or self._reopen_asked or self._closing.is_set()):
            self._wake.wait()
            if self._linger_s:
                self._closing.wait(self._linger_s)
        self._idle = False

    def _reopen(self) -> None:
        self._reopen_asked = False
        try:
            self._sink.reopen()
        except SinkError:
            self.lost += 1  # the old file stays in use

    def _drain(self) -> None:
        """Render and write: whole lines, as many as one write should take. Until the queue is empty, or the file is
        to be reopened."""
        lines = self._notes()
        size = sum(map(len, lines))
        rendered = 0
        while self.queue:
            try:
                line = self._render(self.queue.popleft())
            except Exception:  # one item that cannot be rendered is one line less
                self.lost += 1
                continue
            full = size + len(line) > self._sink.write_bytes_max
            if full and lines:
                self._write(lines)
                lines = self._notes()
                size = sum(map(len, lines))
            lines.append(line)
            size += len(line)
            if full and self._reopen_asked:
                break
            rendered += 1
            if rendered % SLICE_ITEMS == 0 and not self._closing.is_set():
                time.sleep(SLICE_PAUSE_S)
        if lines:
            self._write(lines)

    def _notes(self) -> list[bytes]:
        if self._note is None or self.dropped == self._noted:
            return []
        dropped = self.dropped
        fresh, self._noted = dropped - self._noted, dropped
        return [self._note(fresh)]

    def _write(self, lines: list[bytes]) -> None:
        data = b"".join(lines)
        whole = len(data)
        try:
            if self._torn:  # the last write ended within a line
                data = b"\n" + data
            while data:
                if not self._writable():
                    break
                try:
                    data = data[os.write(self._sink.fd, data[: self._sink.write_bytes_max]) :]
                except BlockingIOError:
                    continue  # somebody who shares the descriptor made it non-blocking, and wrote first
        except OSError:
            pass
        if len(data) < whole or not data:
            self._torn = bool(data)
        self.lost += data[-whole:].count(b"\n")  # without the line end that mends a torn line

    def _writable(self) -> bool:
        """Wait until a write will not block. False: the end has come, and what is left is given up."""
        poll = select.poll()
        poll.register(self._sink.fd, select.POLLOUT)
        while time.monotonic() < self._give_up_s:
            if poll.poll(POLL_MS):
                return True
        self.lost += len(self.queue)
        self.queue.clear()
        return False
