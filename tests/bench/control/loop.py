"""An event loop for many TLS connections of one process, at the least cost that Python allows.

One epoll set, non-blocking sockets, a heap of timers; no tasks, because a simulated sidecar must cost much less than
what it measures. Must not know HTTP. Invariants: a closed connection calls `closed` once and nothing after it; all
callbacks run in the loop's own thread.
"""

import heapq
import os
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from itertools import count

EVENTS_MAX = 256
RECEIVE_BYTES = 65536
HANDSHAKES_MAX = 32  # at a time: more would only time out waiting for each other
IN, OUT = select.EPOLLIN, select.EPOLLOUT
IP_BIND_ADDRESS_NO_PORT = 24


class Loop:
    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._readers: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._waiting: deque[Connection] = deque()
        self._shaking: set[Connection] = set()
        self.running = True

    def add(self, descriptor: int, events: int, ready: Callable[[int], None]) -> None:
        self._epoll.register(descriptor, events)
        self._readers[descriptor] = ready

    def change(self, descriptor: int, events: int) -> None:
        self._epoll.modify(descriptor, events)

    def remove(self, descriptor: int) -> None:
        if self._readers.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._numbers), call))

    def run(self) -> None:
        while self.running:
            now = time.monotonic()
            while self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()
            wait_s = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else 1.0
            for descriptor, event in self._epoll.poll(wait_s, EVENTS_MAX):
                ready = self._readers.get(descriptor)
                if ready is not None:
                    ready(event)

    # -- a bounded number of connections is being made at a time

    def queue(self, connection: "Connection") -> None:
        self._waiting.append(connection)
        self._next()

    def made(self, connection: "Connection") -> None:
        self._shaking.discard(connection)
        self._next()

    def _next(self) -> None:
        while self._waiting and len(self._shaking) < HANDSHAKES_MAX:
            connection = self._waiting.popleft()
            self._shaking.add(connection)
            if not connection.begin():
                self._shaking.discard(connection)


class Connection:
    """One TLS connection. Give it callbacks, `open()` it; `send` may be called before it is open."""

    def __init__(
        self,
        loop: Loop,
        address: tuple[str, int],
        context: ssl.SSLContext,
        name: str,
        source: str,
        received: Callable[[bytes], None],
        closed: Callable[[str], None],
    ) -> None:
        self._loop, self._address, self._context, self._name = loop, address, context, name
        self._source, self._received, self._closed = source, received, closed
        self._out = b""
        self._raw: socket.socket | None = None  # until it is connected
        self._sock: ssl.SSLSocket | None = None
        self._shaken = False
        self._over = False
        self._events = 0
        self._descriptor = -1

    def open(self) -> None:
        self._loop.queue(self)

    def send(self, data: bytes) -> None:
        self._out += data
        if self._shaken and len(self._out) == len(data):
            self._write()

    def close(self, reason: str = "") -> None:
        """Without ceremony, as a process that ends."""
        if self._over:
            return
        self._over = True
        sock = self._sock or self._raw
        if sock is not None:
            self._loop.remove(self._descriptor)
            sock.close()
        self._loop.made(self)
        self._closed(reason)

    # -- the loop's side

    def begin(self) -> bool:
        if self._over:
            return False
        raw = socket.socket()
        try:
            raw.setblocking(False)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            if self._source:
                raw.bind((self._source, 0))
            raw.connect(self._address)
        except BlockingIOError:
            pass
        except OSError as error:
            raw.close()
            # Not at once: whoever opens a connection may not be ready to hear that it has failed.
            reason = os.strerror(error.errno or 0)
            self._loop.after(0.0, lambda: self.close(reason))
            return False
        self._raw = raw
        self._descriptor = raw.fileno()
        self._events = OUT
        self._loop.add(self._descriptor, OUT, self._ready)
        return True

    def _ready(self, event: int) -> None:
        try:
            if not self._shaken:
                self._shake()
                return
            if event & OUT and self._out:
                self._write()
            if event & ~OUT and not self._over:
                self._read()
        except (ssl.SSLError, OSError) as error:
            self.close(f"{type(error).__name__}: {error}"[:200])

    def _want(self, events: int) -> None:
        if events != self._events:
            self._events = events
            self._loop.change(self._descriptor, events)

    def _shake(self) -> None:
        try:
            if self._sock is None:
                assert self._raw is not None
                failed = self._raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if failed:
                    self.close(os.strerror(failed))
                    return
                # The descriptor stays the same one, so it stays registered.
                self._sock = self._context.wrap_socket(
                    self._raw, do_handshake_on_connect=False, server_hostname=self._name
                )
                self._raw = None
            self._sock.do_handshake()
        except ssl.SSLWantReadError:
            self._want(IN)
            return
        except ssl.SSLWantWriteError:
            self._want(OUT)
            return
        self._shaken = True
        self._want(IN)
        self._loop.made(self)
        if self._out:
            self._write()

    def _write(self) -> None:
        assert self._sock is not None
        try:
            sent = self._sock.send(self._out)
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            sent = 0
        except OSError as error:
            reason = f"{type(error).__name__}: {error}"[:200]
            self._loop.after(0.0, lambda: self.close(reason))
            return
        self._out = self._out[sent:]
        self._want(IN | OUT if self._out else IN)

    def _read(self) -> None:
        assert self._sock is not None
        while not self._over:
            try:
                data = self._sock.recv(RECEIVE_BYTES)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            if not data:
                self.close("closed by the server")
                return
            self._received(data)
            if not self._sock.pending():
                return
