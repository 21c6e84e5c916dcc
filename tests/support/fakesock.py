"""Scripted sockets, and a reactor without epoll, for the real Channel: no descriptors, no waiting."""

from collections.abc import Callable
from typing import Any

from sidecar.proxy.timers import Timers


class FakeReactor:
    """What a channel uses of the reactor. `mask` is what epoll would watch; None while hushed."""

    closed = False
    held_bytes = 0

    def __init__(self, clock: Callable[[], float] = lambda: 0.0) -> None:
        self.clock = clock
        self.timers = Timers(clock, self.call)
        self.soon: list[Callable[[], Any]] = []
        self.doomed: list[Any] = []
        self.mask: int | None = None
        self.conn: Any = None

    def add(self, fd: int, conn: Any, mask: int) -> None:
        self.conn, self.mask = conn, mask

    def change(self, fd: int, mask: int) -> None:
        assert self.mask is not None and self.mask != mask
        self.mask = mask

    def hush(self, fd: int) -> None:
        assert self.mask is not None
        self.mask = None

    def unhush(self, fd: int, mask: int) -> None:
        assert self.mask is None
        self.mask = mask

    def forget(self, fd: int) -> None:
        self.conn = self.mask = None

    def call(self, fn: Callable[..., object], *args: Any) -> None:
        fn(*args)
        self.batch_end()

    def batch_end(self) -> None:
        while self.soon:
            todo, self.soon = self.soon, []
            for fn in todo:
                fn()


class PlainSocket:
    """`reads` and `sends` are scripts: bytes or an int to return, or an exception to raise."""

    def __init__(self) -> None:
        self.reads: list[Any] = []
        self.sends: list[Any] = []
        self.sent: list[bytes] = []
        self.calls: list[str] = []

    def fileno(self) -> int:
        return 7

    def recv(self, size: int) -> bytes:
        if not self.reads:
            raise BlockingIOError
        step = self.reads.pop(0)
        if isinstance(step, Exception):
            raise step
        assert len(step) <= size
        return step

    def send(self, data: Any) -> int:
        step = self.sends.pop(0) if self.sends else len(data)
        self.sent.append(bytes(data))
        if isinstance(step, Exception):
            raise step
        return min(step, len(data))

    def shutdown(self, how: int) -> None:
        self.calls.append("fin")

    def setsockopt(self, *args: Any) -> None:
        self.calls.append("reset")

    def close(self) -> None:
        self.calls.append("close")


class TlsSocket(PlainSocket):
    def __init__(self) -> None:
        super().__init__()
        self.inside = 0

    def pending(self) -> int:
        return self.inside

    def unwrap(self) -> None:
        self.calls.append("close_notify")
