"""An open-loop HTTP client: requests leave at a fixed rate, and each latency counts from when the request was due.

A client that waits for an answer before it sends the next request asks less of a slow server just when it is slow
("coordinated omission"), and hides the delay. Here a request that finds every connection busy waits, and its wait is
part of its latency. Run as `python -m tests.bench.open_loop PORT HOST RATE SECONDS CONNECTIONS`; prints one line of
JSON. The first fifth of the time is warm-up and not counted.
"""

import ctypes
import gc
import json
import select
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass

from .stage import HOST
from .stats import percentile

WARM_SHARE = 0.2
ANSWER_LIMIT_S = 10.0
PR_SET_TIMERSLACK = 29


@dataclass(slots=True)
class Connection:
    sock: socket.socket
    due: float = 0.0
    held: bytes = b""


def is_whole(data: bytes) -> bool:
    head, mark, body = data.partition(b"\r\n\r\n")
    if not mark:
        return False
    _, found, rest = head.lower().partition(b"\r\ncontent-length:")
    return bool(found) and len(body) >= int(rest.partition(b"\r\n")[0])


class Loop:
    """The whole run."""

    def __init__(self, port: int, host: str, connections: int) -> None:
        self.port = port
        self.request = f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        self.idle = deque(self._connect() for _ in range(connections))
        self.busy: dict[socket.socket, Connection] = {}
        self.waiting: deque[float] = deque()
        self.latencies: list[tuple[float, float]] = []  # (due, seconds)
        self.errors = 0

    def _connect(self) -> Connection:
        sock = socket.create_connection((HOST, self.port), timeout=5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        return Connection(sock)

    def run(self, rate: int, seconds: float) -> None:
        start = time.perf_counter() + 0.05
        total = int(rate * seconds)
        sent = 0
        while sent < total or self.busy or self.waiting:
            now = time.perf_counter()
            while sent < total and start + sent / rate <= now:
                self.waiting.append(start + sent / rate)
                sent += 1
            while self.waiting and self.idle:
                self._send(self.idle.popleft(), self.waiting.popleft())
            if sent < total:
                pause = max(0.0, start + sent / rate - time.perf_counter())
            elif now > start + seconds + ANSWER_LIMIT_S:
                self.errors += len(self.busy) + len(self.waiting)
                return
            else:
                pause = 0.1
            for sock in select.select(list(self.busy), [], [], pause)[0]:  # microseconds; epoll has milliseconds
                self._receive(self.busy[sock])

    def _send(self, connection: Connection, due: float) -> None:
        connection.due, connection.held = due, b""
        try:
            connection.sock.send(self.request)
        except OSError:
            self._lost(connection)
        else:
            self.busy[connection.sock] = connection

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost(connection)
            return
        connection.held += data
        if is_whole(connection.held):
            now = time.perf_counter()
            self.errors += not connection.held.startswith(b"HTTP/1.1 200 ")
            self.latencies.append((connection.due, now - connection.due))
            del self.busy[connection.sock]
            self.idle.append(connection)

    def _lost(self, connection: Connection) -> None:
        self.errors += 1
        self.busy.pop(connection.sock, None)
        connection.sock.close()
        self.idle.append(self._connect())


def main(arguments: list[str]) -> None:
    port, host, rate, seconds, connections = arguments
    be_punctual()
    loop = Loop(int(port), host, int(connections))
    loop.run(int(rate), float(seconds))
    print(report(loop.latencies, loop.errors, float(seconds)))


def be_punctual() -> None:
    """Sleep to the microsecond: the kernel may otherwise round a wake-up by 50. Collect no garbage meanwhile."""
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)
    gc.disable()


def report(latencies: list[tuple[float, float]], errors: int, seconds: float) -> str:
    """One line of JSON. `latencies` holds when each request was due, and how long its answer took from then."""
    if not latencies:
        sys.exit("no request was answered")
    first = min(due for due, _ in latencies)
    counted = [1000 * taken for due, taken in latencies if due - first >= WARM_SHARE * seconds]
    if not counted:
        sys.exit("no request was answered after the warm-up")
    return json.dumps(
        {"sent": len(counted), "errors": errors, "p50": percentile(counted, 50), "p99": percentile(counted, 99)}
    )


if __name__ == "__main__":
    main(sys.argv[1:])
