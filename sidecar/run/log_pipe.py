"""The sidecar's output on its way to stderr, line by line with a prefix.

Must not know who writes. Invariants: nothing here blocks, whatever stderr is; what is held is bounded, and beyond that
the rest stays in the pipe, where the sidecar's own logging drops rather than waits.
"""

import os
import select
import time
from collections import deque

LINE_BYTES_MAX = 8192
QUEUE_BYTES_MAX = 256 * 1024
ATOMIC_WRITE_BYTES = 4096  # PIPE_BUF: a writable pipe takes this much without blocking


class LogPipe:
    PREFIX = b"[sidecar] "

    def __init__(self) -> None:
        self._source = -1
        self._partial = b""
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._target: int | None = 2

    def open(self) -> int:
        """The end that the sidecar writes to."""
        self._source, writing = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._source, False)
        return writing

    def register(self, poll: "select.poll") -> None:
        if self._source >= 0 and self._queued_bytes < QUEUE_BYTES_MAX:
            poll.register(self._source, select.POLLIN)
        if self._queue and self._target is not None:
            poll.register(self._target, select.POLLOUT)

    def say(self, line: bytes) -> None:
        self._queue.append(line)
        self._queued_bytes += len(line)
        self._write()

    def move(self) -> None:
        self._read()
        self._write()

    def finish(self, within_s: float = 1.0) -> None:
        """Pass on what is there already; give up on a stderr that takes nothing."""
        deadline = time.monotonic() + within_s
        while True:
            self._read()
            self._write()
            if not self._queue or time.monotonic() >= deadline:
                return
            if self._target is not None:
                poll = select.poll()
                poll.register(self._target, select.POLLOUT)
                poll.poll(max(0.0, deadline - time.monotonic()) * 1000)

    def _read(self) -> None:
        while self._source >= 0 and self._queued_bytes < QUEUE_BYTES_MAX:
            try:
                data = os.read(self._source, 65536)
            except BlockingIOError:
                return
            if not data:
                os.close(self._source)
                self._source = -1
            lines = (self._partial + data).split(b"\n")
            self._partial = lines.pop()
            if self._partial and (self._source < 0 or len(self._partial) > LINE_BYTES_MAX):
                lines.append(self._partial)
                self._partial = b""
            for line in lines:
                self._queue.append(self.PREFIX + line + b"\n")
                self._queued_bytes += len(self.PREFIX) + len(line) + 1

    def _write(self) -> None:
        while self._queue:
            if self._target is None:
                self._queue.clear()
                self._queued_bytes = 0
                return
            poll = select.poll()
            poll.register(self._target, select.POLLOUT)
            events = poll.poll(0)
            if not events:
                return
            chunk = bytearray(self._queue.popleft())
            while self._queue and len(chunk) + len(self._queue[0]) <= ATOMIC_WRITE_BYTES:
                chunk += self._queue.popleft()
            try:
                written = os.write(self._target, chunk[:ATOMIC_WRITE_BYTES])
            except BlockingIOError:
                written = 0
            except OSError:  # nobody reads any more
                self._target = None
                written = len(chunk)
            self._queued_bytes -= written
            if written < len(chunk):
                self._queue.appendleft(bytes(chunk[written:]))
