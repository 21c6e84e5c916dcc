"""The open-loop client for gRPC: unary calls leave at a fixed rate over a few HTTP/2 connections.

As `open_loop.py`, but that a call never waits for another: streams carry as many as are under way. The frames are made
by hand, because a codec would cost this client more than what it measures; received fields are not decoded. A call has
succeeded when its one message came whole and the stream then ended with trailers. Run as
`python -m tests.bench.open_loop_grpc PORT HOST RATE SECONDS CONNECTIONS`; prints one line of JSON.
"""

import select
import socket
import sys
import time

from .grpc_call import ANSWER, METHOD, REQUEST
from .open_loop import ANSWER_LIMIT_S, be_punctual, report
from .stage import HOST

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM = ACK = 1
END_HEADERS = 4
WINDOW = (1 << 31) - 1 - 65535  # added to the connection's: all answers together are far smaller


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def literal(name: bytes, value: bytes) -> bytes:
    """A field for HPACK that enters no table (RFC 7541, 6.2.2). `name`: an index, or a zero and the name."""
    assert len(value) < 127
    return name + bytes((len(value),)) + value


def request_block(host: str) -> bytes:
    return b"".join(
        (
            b"\x83\x86",  # POST, http
            literal(b"\x04", METHOD.encode()),
            literal(b"\x01", host.encode()),
            literal(b"\x0f\x10", b"application/grpc"),
            literal(b"\x00\x02te", b"trailers"),
        )
    )


class Connection:
    """One connection. `due` holds when each call under way was due."""

    def __init__(self, port: int, host: str) -> None:
        self.sock = socket.create_connection((HOST, port), timeout=5)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.sendall(PREFACE + frame(SETTINGS, 0, 0) + frame(WINDOW_UPDATE, 0, 0, WINDOW.to_bytes(4, "big")))
        self.block = request_block(host)
        self.next = 1
        self.due: dict[int, float] = {}
        self.got: dict[int, int] = {}  # bytes of message
        self.held = b""
        self.done: list[tuple[float, float]] = []
        self.errors = 0

    def call(self, due: float) -> None:
        stream = self.next
        self.next += 2
        self.due[stream], self.got[stream] = due, 0
        head = frame(HEADERS, END_HEADERS, stream, self.block)
        self.sock.sendall(head + frame(DATA, END_STREAM, stream, REQUEST))

    def receive(self) -> bool:
        """What has arrived; False when the connection is lost, and with it what was under way."""
        try:
            data = self.sock.recv(65536)
        except OSError:
            data = b""
        if not data:
            self.errors += len(self.due)
            self.due.clear()
            return False
        now = time.perf_counter()
        held, at = self.held + data, 0
        while len(held) - at >= 9:
            end = at + 9 + int.from_bytes(held[at : at + 3], "big")
            if len(held) < end:
                break
            stream = int.from_bytes(held[at + 5 : at + 9], "big")
            self.take(held[at + 3], held[at + 4], stream, held[at + 9 : end], now)
            at = end
        self.held = held[at:]
        return True

    def take(self, kind: int, flags: int, stream: int, payload: bytes, now: float) -> None:
        if kind == SETTINGS and not flags & ACK:
            self.sock.sendall(frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self.sock.sendall(frame(PING, ACK, 0, payload))
        elif stream in self.due:
            if kind == DATA:
                self.got[stream] += len(payload)
            if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
                due = self.due.pop(stream)
                whole = kind == HEADERS and self.got.pop(stream, 0) == len(ANSWER)
                self.errors += not whole
                if whole:
                    self.done.append((due, now - due))


def run(port: int, host: str, rate: int, seconds: float, count: int) -> tuple[list[tuple[float, float]], int]:
    """Latencies with when each call was due, and how many calls failed."""
    connections = {each.sock: each for each in (Connection(port, host) for _ in range(count))}
    everyone = list(connections.values())
    time.sleep(0.05)  # settings are exchanged
    start = time.perf_counter() + 0.05
    total, sent, lost = int(rate * seconds), 0, 0
    while sent < total or any(each.due for each in everyone):
        now = time.perf_counter()
        while sent < total and start + sent / rate <= now:
            live = list(connections.values())
            if live:
                live[sent % len(live)].call(start + sent / rate)
            else:
                lost += 1
            sent += 1
        if sent < total:
            pause = max(0.0, start + sent / rate - time.perf_counter())
        elif now > start + seconds + ANSWER_LIMIT_S:
            lost += sum(len(each.due) for each in everyone)
            break
        else:
            pause = 0.1
        for sock in select.select(list(connections), [], [], pause)[0]:  # microseconds; epoll has milliseconds
            if not connections[sock].receive():
                del connections[sock]
    return [item for each in everyone for item in each.done], lost + sum(each.errors for each in everyone)


def main(arguments: list[str]) -> None:
    port, host, rate, seconds, connections = arguments
    be_punctual()
    latencies, errors = run(int(port), host, int(rate), float(seconds), int(connections))
    print(report(latencies, errors, float(seconds)))


if __name__ == "__main__":
    main(sys.argv[1:])
