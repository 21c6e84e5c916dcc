"""Malformed HTTP/2 against live sidecars: the error that RFC 9113 demands, nothing forwarded, nobody else disturbed.

On both engines, at the plain listener (prior knowledge) and at the one for peers of the mesh (ALPN). Every case comes
after a correct beginning. The codecs alone are held to many more cases in test_http2_frames.py.
"""

import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from support.http2_frames import (
    ACK,
    DATA,
    ENABLE_CONNECT_PROTOCOL,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITIZED,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Fields,
    block,
    continuation,
    data,
    frame,
    goaway,
    headers,
    indexed,
    integer,
    literal,
    ping,
    priority,
    push_promise,
    rst_stream,
    settings,
    window_update,
)
from support.http2_frames import request as fields_of
from support.http2_live import Half, Http2Client
from support.mesh import Client, Conn, Mesh, Pair, Reader, dial, echo, until

NO, PROTOCOL, FLOW, CLOSED, SIZE, REFUSED, CANCEL, COMPRESSION, CALM = 0, 1, 3, 5, 6, 7, 8, 9, 11


class Case(NamedTuple):
    title: str
    wire: bytes
    codes: set[int]
    late: bool = False  # its head may have been forwarded before it broke


def request(method: bytes = b"GET", more: Any = (), path: bytes = b"/evil") -> Fields:
    return fields_of(method, path, b"reviews", more=more)


POST = headers(1, request(b"POST"))
GET = headers(1, request(), end=True)
OPEN = headers(1, request(), end_headers=False)
LENGTH = b"content-length"


def field(name: bytes, value: bytes) -> bytes:
    return headers(1, request(more=[(name, value)]), end=True)


def without(name: bytes) -> bytes:
    return headers(1, [each for each in request() if each[0] != name], end=True)


def of(fields: Fields) -> bytes:
    return headers(1, fields, end=True)


def only(title: str, wire: bytes, *codes: int, late: bool = False) -> Case:
    """A stream error."""
    return Case(title, wire, set(codes or {PROTOCOL}), late)


CONNECTION = [
    Case("4.2 DATA over the size", POST + frame(DATA, 1, bytes(16385)), {SIZE}, late=True),
    Case("4.2 HEADERS over the size", frame(HEADERS, 1, bytes(16385), END_HEADERS), {SIZE}),
    Case("4.2 unknown type over the size", frame(0x77, 0, bytes(16385)), {SIZE}),
    Case("4.3 index that is not there", frame(HEADERS, 1, indexed(99), END_HEADERS), {COMPRESSION}),
    Case("4.3 block that breaks off", frame(HEADERS, 1, block(request())[:-2], END_HEADERS), {COMPRESSION}),
    Case("4.3 Huffman with EOS", frame(HEADERS, 1, b"\x00\x01a\x84\xff\xff\xff\xff", END_HEADERS), {COMPRESSION}),
    Case("4.3 table too large", frame(HEADERS, 1, integer(5000, 5, 0x20), END_HEADERS), {COMPRESSION}),
    Case("4.3 integer without end", frame(HEADERS, 1, integer(127, 7, 0x80, 50), END_HEADERS), {COMPRESSION}),
    Case("5.1 DATA, idle", data(1, b"/evil"), {PROTOCOL}),
    Case("5.1 RST_STREAM, idle", rst_stream(1), {PROTOCOL}),
    Case("5.1 WINDOW_UPDATE, idle", window_update(1, 5), {PROTOCOL}),
    Case("5.1 CONTINUATION, idle", continuation(1, b"", True), {PROTOCOL}),
    Case("5.1 DATA, half-closed", GET + data(1, b"/evil"), {CLOSED}, late=True),
    Case("5.1 HEADERS, half-closed", GET + headers(1, b"", True), {CLOSED}, late=True),
    Case("5.1 DATA, reset", POST + rst_stream(1) + data(1, b"/evil"), {CLOSED}, late=True),
    Case("5.1.1 even", headers(2, request(), end=True), {PROTOCOL}),
    Case("5.1.1 lower", headers(5, request(), True) + headers(3, request(), True), {PROTOCOL}, late=True),
    Case("5.5 unknown frame in a block", OPEN + frame(0x77), {PROTOCOL}),
    Case("6.1 DATA on stream 0", frame(DATA, 0, b"/evil"), {PROTOCOL}),
    Case("6.1 padding too long", POST + frame(DATA, 1, b"\x04abc", PADDED), {PROTOCOL}, late=True),
    Case("6.2 HEADERS on stream 0", frame(HEADERS, 0, block(request()), END_HEADERS), {PROTOCOL}),
    Case("6.2 padding too long", frame(HEADERS, 1, b"\x09abc", PADDED | END_HEADERS), {PROTOCOL}),
    Case("6.2 too short for its priority", frame(HEADERS, 1, b"abc", PRIORITIZED | END_HEADERS), {SIZE}),
    Case("6.3 PRIORITY on stream 0", priority(0), {PROTOCOL}),
    Case("6.4 RST_STREAM on stream 0", rst_stream(0), {PROTOCOL}),
    Case("6.4 RST_STREAM of three bytes", POST + frame(RST_STREAM, 1, bytes(3)), {SIZE}, late=True),
    Case("6.5 ACK with payload", frame(SETTINGS, 0, bytes(6), ACK), {SIZE}),
    Case("6.5 SETTINGS on a stream", frame(SETTINGS, 1), {PROTOCOL}),
    Case("6.5 SETTINGS of seven bytes", frame(SETTINGS, 0, bytes(7)), {SIZE}),
    Case("6.5.2 push neither on nor off", settings({ENABLE_PUSH: 2}), {PROTOCOL}),
    Case("6.5.2 window too large", settings({INITIAL_WINDOW_SIZE: 1 << 31}), {FLOW}),
    Case("6.5.2 frame size too small", settings({MAX_FRAME_SIZE: 16383}), {PROTOCOL}),
    Case("6.6 PUSH_PROMISE from a client", push_promise(1, 2, request()), {PROTOCOL}),
    Case("6.7 PING on a stream", frame(PING, 1, bytes(8)), {PROTOCOL}),
    Case("6.7 PING of nine bytes", frame(PING, 0, bytes(9)), {SIZE}),
    Case("6.8 GOAWAY on a stream", frame(GOAWAY, 1, bytes(8)), {PROTOCOL}),
    Case("6.9 WINDOW_UPDATE of five bytes", frame(WINDOW_UPDATE, 0, bytes(5)), {SIZE}),
    Case("6.9 WINDOW_UPDATE of nothing", window_update(0, 0), {PROTOCOL}),
    Case("6.9.1 window overflows", window_update(0, 0x7FFFFFFF), {FLOW}),
    # Of a stream it may be a stream error; section 5.4 lets us end the connection.
    Case("6.9 WINDOW_UPDATE of nothing, stream", POST + window_update(1, 0), {PROTOCOL}, late=True),
    Case("6.9.1 window overflows, stream", POST + window_update(1, 0x7FFFFFFF), {FLOW}, late=True),
    Case("6.10 block of two streams", OPEN + continuation(3, b"", True), {PROTOCOL}),
    Case("6.10 PING in a block", OPEN + ping(), {PROTOCOL}),
    Case("6.10 HEADERS in a block", OPEN + headers(3, request()), {PROTOCOL}),
    Case("6.10 after the end of a block", POST + continuation(1, b"", True), {PROTOCOL}, late=True),
    Case("10.5.1 block without end", OPEN + continuation(1, bytes(16384)) * 10, {CALM}),
    Case("10.5.1 continuations without end", OPEN + continuation(1) * 100, {CALM}),
]

STREAM = [
    only("8.1 trailers that do not end", POST + headers(1, [(b"a", b"b")]), late=True),
    only("8.1 pseudo-field in trailers", POST + headers(1, [(b":path", b"/evil")], True), late=True),
    only("8.1 framing in trailers", POST + headers(1, [(b"transfer-encoding", b"chunked")], True), late=True),
    only("8.1.1 more than content-length", headers(1, request(b"POST", [(LENGTH, b"2")])) + data(1, b"abc"), late=True),
    only(
        "8.1.1 less than content-length",
        headers(1, request(b"POST", [(LENGTH, b"4")])) + data(1, b"abc", True),
        late=True,
    ),
    only("8.1.1 content-length without content", headers(1, request(b"POST", [(LENGTH, b"4")]), end=True)),
    only("8.1.1 two content-lengths", headers(1, request(b"POST", [(LENGTH, b"3"), (LENGTH, b"4")]))),
    only("8.1.1 content-length with sign", headers(1, request(b"POST", [(LENGTH, b"+3")]))),
    only("8.2 upper case", field(b"X-Evil", b"b")),
    only("8.2.1 NUL in a value", field(b"x", b"a\0b")),
    only("8.2.1 LF in a value (CVE-2025-57804)", field(b"x", b"a\nevil: b")),
    only("8.2.1 CR LF in a value", field(b"x", b"a\r\nevil: b")),
    only("8.2.1 leading space", field(b"x", b" a")),
    only("8.2.1 trailing tab", field(b"x", b"a\t")),
    only("8.2.1 CR LF in a name", field(b"x: a\r\nevil", b"b")),
    only("8.2.1 colon in a name", field(b"x:y", b"b")),
    only("8.2.1 space in a name", field(b"x ", b"b")),
    only("8.2.1 empty name", field(b"", b"b")),
    only("8.2.2 connection", field(b"connection", b"close")),
    only("8.2.2 transfer-encoding", headers(1, request(b"POST", [(b"transfer-encoding", b"chunked")]))),
    only("8.2.2 transfer_encoding", headers(1, request(b"POST", [(b"transfer_encoding", b"chunked")]))),
    only("8.2.2 upgrade", field(b"upgrade", b"websocket")),
    only("8.2.2 te", field(b"te", b"gzip")),
    only("8.3 unknown pseudo-field", field(b":evil", b"b")),
    only("8.3 pseudo-field behind others", of([(b"x", b"y"), *request()])),
    only("8.3 pseudo-field of a response", of([*request(), (b":status", b"200")])),
    only("8.3.1 no method", without(b":method")),
    only("8.3.1 no path", without(b":path")),
    only("8.3.1 no scheme", without(b":scheme")),
    only("8.3.1 path twice", of([(b":path", b"/evil"), *request()])),
    only("8.3.1 empty path", of(request(path=b""))),
    only("8.3.1 path without slash", of(request(path=b"evil"))),
    only("8.3.1 LF in the path", of(request(path=b"/evil\nx"))),
    only("8.3.1 space in the path (CVE-2023-27491)", of(request(path=b"/evil HTTP/1.1"))),
    only("8.3.1 CR LF in the authority", of([*request()[:3], (b":authority", b"reviews\r\nevil: b")])),
    only("8.3.1 userinfo in the authority", of([*request()[:3], (b":authority", b"a@reviews")])),
    only("8.3.1 authority against host", field(b"host", b"evil")),
    only("8.3.1 neither authority nor host", without(b":authority")),
    only("8.3.1 asterisk", of(request(path=b"*"))),
    only("8.5 CONNECT with path", of(request(b"CONNECT"))),
    only("8.3.1 method with space", of(request(b"GET /evil"))),
    only("RFC 8441 protocol without CONNECT", of([(b":protocol", b"websocket"), *request()])),
]


def answered(title: str, fields: Fields, status: int, reason: str) -> Any:
    return pytest.param(fields, status, reason, id=title)


ANSWERED = [
    answered("path too long", request(path=b"/evil" + b"x" * 8200), 414, "uri_too_long"),
    answered("101 fields", request(more=[(b"x", b"y")] * 140), 431, "headers_too_large"),
    answered("section of 64 KB", request(more=[(b"x", b"y" * 40000)] * 2), 431, "headers_too_large"),
    answered("cookie crumbs", request(more=[(b"cookie", b"a=b")] * 300), 431, "headers_too_large"),
    answered("expect something else", request(more=[(b"expect", b"200-ok")]), 417, ""),
    answered("method in small letters", request(b"get"), 501, ""),
    answered("scheme ftp", [(b":scheme", b"ftp") if each[0] == b":scheme" else each for each in request()], 400, ""),
    answered("fragment", request(path=b"/evil#x"), 400, ""),
    answered("path not ASCII", request(path=b"/evil\xc3\xa9"), 400, ""),
    answered("port of the authority", [*request()[:3], (b":authority", b"reviews:99999")], 400, ""),
    answered("CONNECT", [(b":method", b"CONNECT"), (b":authority", b"reviews:80")], 501, ""),
]

ACCEPTED = {
    "4.1 unknown type": frame(0x77, 1, b"abc", 0xFF) + GET,
    "4.1 undefined flags": frame(HEADERS, 1, block(request()), END_HEADERS | END_STREAM | 0xC2),
    "4.1 reserved bit": frame(HEADERS, 1 | 1 << 31, block(request()), END_HEADERS | END_STREAM),
    "5.1 PRIORITY, idle": priority(1) + GET,
    "5.5 unknown setting": settings({0x7777: 5}) + GET,
    "6.1 padding": POST + data(1, b"", True, pad=200),
    "6.2 padding and priority": headers(1, request(), True, pad=7, priority=(0, 3)),
    "6.10 continued in pieces": headers(1, request(), True, cuts=[0, 4, 4]),
    "6.5.3 two settings": settings([(INITIAL_WINDOW_SIZE, 1), (INITIAL_WINDOW_SIZE, 60000)]) + GET,
    "8.1 trailers": POST + data(1, b"x") + headers(1, [(b"a", b"b")], True),
    "8.3.1 host in place of authority": of([*request()[:3], (b"host", b"reviews")]),
    "8.3.1 host like authority": field(b"host", b"REVIEWS"),
    "8.2.2 te: trailers": field(b"te", b"trailers"),
    "HPACK: dynamic table": headers(1, block(request()) + literal(b"x-a", b"b", 0x40) + indexed(62), True),
}


class Recording(Reader):
    """Keeps every byte."""

    def __init__(self, conn: Conn, record: bytearray) -> None:
        super().__init__(conn.sock)
        self.record = record

    def fill(self) -> bool:
        held = len(self.held)
        more = super().fill()
        self.record += self.held[held:]
        return more


class Live:
    """Two sidecars on one engine, an application that records every byte, and neighbours on both sides."""

    def __init__(self, mesh: Mesh, engine: str) -> None:
        self.record = bytearray()
        self.pair = Pair(mesh, script=self.script, options=[f"--http2-engine={engine}"])
        self.app = self.pair.app
        self.neighbours = {side: (self.client(side), self.client1(side)) for side in SIDES}

    def script(self, conn: Conn) -> None:
        conn.reader = Recording(conn, self.record)
        echo(conn)

    def connect(self, side: str) -> Any:
        return dial(self.pair.web.outbound) if side == "outbound" else self.pair.reviews.mesh_socket(alpn="h2")

    def client(self, side: str) -> Http2Client:
        return Http2Client(self.connect(side)).settled()

    def client1(self, side: str) -> Client:
        return self.pair.client() if side == "outbound" else self.pair.reviews.mesh_client()

    def sidecar(self, side: str) -> Any:
        return self.pair.web if side == "outbound" else self.pair.reviews

    def clear(self) -> None:
        self.app.clear()
        self.record.clear()

    def settle(self) -> None:
        """What a case that is found late has sent on may still be on its way: it does not belong to the next one."""
        seen = -1
        while seen != len(self.record):
            seen = len(self.record)
            time.sleep(0.1)

    def check(self, side: str) -> None:
        """The neighbours are served as ever, on the connections that they had all the time."""
        client, client1 = self.neighbours[side]
        assert client.get("/neighbour").status == 200
        assert client.wire.goaway is None
        assert client1.get("/neighbour").status == 200


SIDES = ("outbound", "inbound")


@pytest.fixture(scope="module", params=["ngh2", pytest.param("h2", marks=pytest.mark.long)])
def live(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Live]:
    with Mesh(tmp_path_factory.mktemp(f"http2-{request.param}")) as mesh:
        live = Live(mesh, request.param)
        yield live
        for side in SIDES:
            live.check(side)
            for client in live.neighbours[side]:
                client.close()
            sidecar = live.sidecar(side)
            assert sidecar.crashes == 0
            until(lambda: sidecar.metric("pillion_requests_active") == 0)  # noqa: B023


@pytest.fixture(params=SIDES)
def side(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("case", CONNECTION, ids=lambda case: case.title)
def test_connection_errors(live: Live, side: str, case: Case) -> None:
    live.clear()
    with live.client(side) as client:
        client.wire.streams[1] = Half(65535)
        client.wire.send(case.wire)
        assert client.ended(), client.wire.frames
        end = client.wire.goaway
        assert end is not None and client.wire.frames[-1] is end
        assert end.code in case.codes, end.code
    live.check(side)
    assert b"evil" not in live.record or case.late
    assert [request.target for request in live.app.complete if request.target != b"/neighbour"] in ([], [b"/evil"])
    if case.late:
        live.settle()


def test_connection_errors_are_counted_and_told(live: Live, side: str) -> None:
    sidecar = live.sidecar(side)
    where = {"side": "out" if side == "outbound" else "in"}
    before = sidecar.metric("pillion_http2_limits_total", limit="protocol", **where)
    with live.client(side) as client:
        client.wire.send(frame(PING, 0, bytes(9)))
        assert client.ended()
    until(lambda: sidecar.metric("pillion_http2_limits_total", limit="protocol", **where) == before + 1)
    until(lambda: "HTTP/2: FRAME_SIZE_ERROR" in sidecar.log, sidecar.log[-500:])


@pytest.mark.parametrize("case", STREAM, ids=lambda case: case.title)
def test_stream_errors(live: Live, side: str, case: Case) -> None:
    """Other requests on the same connection go on, those before and those behind."""
    live.clear()
    with live.client(side) as client:
        before = client.open("POST", "/neighbour", end=False)
        sid = client.stream()
        half = client.wire.streams[sid]
        client.wire.send(renumber(case.wire, 1, sid))
        client.wire.wait(lambda: half.reset is not None, 5)
        assert half.reset in case.codes, (half.reset, client.wire.frames)
        assert half.sections == [] or case.late
        before.send(b"still here", end=True)
        assert before.response().json["body"] == "still here"
        assert client.get("/neighbour").status == 200
        assert client.wire.goaway is None and client.wire.ended is None
    live.check(side)
    if not case.late:
        assert b"evil" not in live.record
    assert all(request.target == b"/neighbour" for request in live.app.complete)
    if case.late:
        live.settle()


def renumber(wire: bytes, old: int, new: int) -> bytes:
    """The same frames on another stream."""
    out, at = b"", 0
    while at < len(wire):
        end = at + 9 + int.from_bytes(wire[at : at + 3], "big")
        sid = int.from_bytes(wire[at + 5 : at + 9], "big")
        out += wire[at : at + 5] + (new if sid == old else sid).to_bytes(4, "big") + wire[at + 9 : end]
        at = end
    return out


@pytest.mark.parametrize("case", [case for case in STREAM if case.late], ids=lambda case: case.title)
def test_stream_errors_that_come_late_complete_nothing(live: Live, case: Case) -> None:
    """The head is with the application before the request breaks."""
    live.clear()
    first = 9 + int.from_bytes(case.wire[:3], "big")
    with live.client("outbound") as client:
        half = client.wire.streams[1] = Half(65535)
        client.next_sid = 3
        client.wire.send(case.wire[:first])
        until(lambda: live.app.requests)
        client.wire.send(case.wire[first:])
        client.wire.wait(lambda: half.reset is not None, 5)
        assert half.reset in case.codes
        assert client.get("/neighbour").status == 200
    assert all(request.target == b"/neighbour" for request in live.app.complete)


@pytest.mark.parametrize(("fields", "status", "reason"), ANSWERED)
def test_what_can_be_read_but_not_served_is_answered(
    live: Live, side: str, fields: Fields, status: int, reason: str
) -> None:
    live.clear()
    with live.client(side) as client:
        response = client.raw(fields).response()
        assert response.status == status
        assert response.reason == reason or (not reason and response.reason)
        assert client.get("/neighbour").status == 200
        assert client.wire.goaway is None
    assert b"evil" not in live.record


@pytest.mark.parametrize("wire", ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_odd_but_allowed_is_served(live: Live, side: str, wire: bytes) -> None:
    live.clear()
    with live.client(side) as client:
        half = client.wire.streams[1] = Half(65535)
        client.next_sid = 3
        client.wire.send(wire)
        assert client.wire.wait(lambda: half.ended), client.wire.frames
        assert half.sections[0][0] == (b":status", b"200")
    assert [request.target for request in live.app.complete] == [b"/evil"]


@pytest.mark.parametrize("wire", [case.wire for case in CONNECTION[:12]] + [ACCEPTED["6.10 continued in pieces"]])
def test_byte_by_byte_the_outcome_is_the_same(live: Live, wire: bytes) -> None:
    if len(wire) > 500:
        return
    live.clear()
    with live.client("outbound") as client:
        half = client.wire.streams[1] = Half(65535)
        for at in range(len(wire)):
            try:
                client.wire.send(wire[at : at + 1])
            except OSError:
                break
            client.wire.pump(0.001)
        client.wire.wait(lambda: half.ended or client.wire.goaway)
        if wire in ACCEPTED.values():
            assert half.ended
        else:
            assert client.ended() and client.wire.goaway is not None
    live.check("outbound")


# -- beginnings and ends


PREFACES = {
    "cut": PREFACE[:-1],
    "last byte": PREFACE[:-1] + b"\0" + settings(),
    "without settings": PREFACE + ping(),
    "acknowledgement first": PREFACE + settings(ack=True),
    "HTTP/2.1": PREFACE.replace(b"2.0", b"2.1") + settings(),
    "second half": PREFACE.replace(b"SM", b"SX") + settings(),
}


@pytest.mark.parametrize("wire", PREFACES.values(), ids=PREFACES)
def test_prefaces_that_are_wrong(live: Live, side: str, wire: bytes) -> None:
    """Such a connection ends; where it looked like HTTP/2 so far, with GOAWAY."""
    live.clear()
    with live.connect(side) as sock:
        sock.settimeout(5)
        sock.sendall(wire)
        if wire == PREFACE[:-1]:
            sock.settimeout(0.1)
            got = sock.recv(65536)  # our greeting at most; test_live_http2_attacks.py measures the patience
            assert got[3:4] == bytes([SETTINGS]) and GOAWAY not in got[3::1000]
            return
        got = b""
        try:
            while piece := sock.recv(65536):
                got += piece
        except OSError:
            pass
    assert (got[-17:-8] == b"\0\0\x08\x07\0\0\0\0\0" and got[-1] == PROTOCOL) or got.startswith(b"HTTP/1.1 505")
    live.check(side)
    assert b"evil" not in live.record


def test_a_peer_that_speaks_http1_after_agreeing_on_http2(live: Live) -> None:
    live.clear()
    with live.connect("inbound") as sock:
        sock.sendall(b"GET /evil HTTP/1.1\r\nHost: reviews\r\n\r\n")
        got = b""
        try:
            while piece := sock.recv(65536):
                got += piece
        except OSError:
            pass
    assert b"HTTP/1.1" not in got and got[-1:] == bytes([PROTOCOL])
    assert b"evil" not in live.record


def test_the_settings_that_we_tell(live: Live, side: str) -> None:
    with live.client(side) as client:
        told = client.wire.peer_settings
        assert told is not None
        assert told[ENABLE_CONNECT_PROTOCOL] == 1
        assert told.get(ENABLE_PUSH, 0) == 0
        assert told.get(MAX_FRAME_SIZE, 16384) == 16384
        assert 1 < told[3] <= 256  # SETTINGS_MAX_CONCURRENT_STREAMS
        assert 32768 <= told[6] <= 131072  # SETTINGS_MAX_HEADER_LIST_SIZE


def test_pings_are_answered_at_once_also_under_load(live: Live, side: str) -> None:
    with live.client(side) as client:
        for number in range(20):
            client.wire.send(ping(b"%08d" % number))
        assert client.wire.wait(lambda: len(client.wire.kind(PING)) == 20)
        assert [each.payload for each in client.wire.kind(PING)] == [b"%08d" % number for number in range(20)]
        assert all(each.ack for each in client.wire.kind(PING))


def test_a_client_that_says_goodbye_is_served_to_the_end(live: Live, side: str) -> None:
    live.clear()
    with live.client(side) as client:
        call = client.open("POST", "/neighbour", end=False)
        client.wire.send(goaway(0))
        call.send(b"last words", end=True)
        assert call.response().json["body"] == "last words"
        assert client.ended()


def test_more_streams_than_were_allowed_are_refused_and_the_others_served(live: Live) -> None:
    """RFC 9113, section 5.1.2: REFUSED_STREAM, or PROTOCOL_ERROR, which may end the connection."""
    live.clear()
    with live.client("outbound") as client:
        calls = [client.open("POST", "/neighbour", end=False) for _ in range(101)]
        client.wire.wait(lambda: calls[-1].half.reset is not None or client.wire.goaway, 5)
        if client.wire.goaway is not None:
            assert client.wire.goaway.code == PROTOCOL
        else:
            assert calls[-1].half.reset in (PROTOCOL, REFUSED)
    live.check("outbound")
    assert all(request.target == b"/neighbour" for request in live.app.complete)


def test_a_hundred_streams_at_once_are_all_served(live: Live) -> None:
    with live.client("outbound") as client:
        calls = [client.open("POST", f"/neighbour/{n}", end=False) for n in range(100)]
        for n, call in enumerate(reversed(calls)):
            call.send(b"%d" % n, end=True)
        for n, call in enumerate(reversed(calls)):
            seen = call.response().json
            assert (seen["body"], seen["target"]) == (str(n), f"/neighbour/{99 - n}")


def test_flow_control_of_one_stream_does_not_hold_another(live: Live) -> None:
    """The answer to the first may not be sent; the second is served, and the first once its window opens."""
    with live.client("outbound") as client:
        client.wire.send(settings({INITIAL_WINDOW_SIZE: 0}))
        held = client.open("GET", "/neighbour/held")
        assert held.head().status == 200
        client.wire.send(settings({INITIAL_WINDOW_SIZE: 65535}))
        free = client.get("/neighbour/free")
        assert free.json["target"] == "/neighbour/free"
        client.wire.send(window_update(held.sid, 1000))
        assert held.response().json["target"] == "/neighbour/held"


def test_a_window_of_one_byte_at_a_time(live: Live, side: str) -> None:
    with live.client(side) as client:
        client.wire.reads = False
        client.wire.send(settings({INITIAL_WINDOW_SIZE: 0}))
        call = client.open("GET", "/neighbour")
        assert call.head().status == 200
        for size in range(1, 30):
            client.wire.send(window_update(call.sid, 1))
            assert client.wire.wait(lambda size=size: len(call.half.body) == size)  # type: ignore[misc]
        assert not call.half.ended
        client.wire.send(window_update(call.sid, 60000))
        assert call.response().json["target"] == "/neighbour"


def test_a_sidecar_that_ends_says_goodbye_and_loses_nothing(tmp_path: Any) -> None:
    """Two GOAWAYs; what is under way is served to its end, and the process ends in order."""
    go = threading.Event()

    def slow(conn: Conn) -> None:
        while True:
            conn.take()
            go.wait(10)
            conn.reply(200, b"done")

    with Mesh(tmp_path) as mesh:
        pair = Pair(mesh, script=slow)
        with Http2Client(pair.reviews.mesh_socket(alpn="h2")).settled() as client:
            call = client.open("GET", "/slow")
            until(lambda: pair.app.requests)
            pair.reviews.process.terminate()
            assert client.wire.wait(lambda: client.wire.goaway is not None)
            first = client.wire.kind(GOAWAY)[0]
            assert (first.code, first.last) == (NO, 0x7FFFFFFF)
            time.sleep(0.7)
            go.set()
            assert call.response().body == b"done"
            assert client.ended()
            last = client.wire.goaway
            assert last is not None and (last.code, last.last) == (NO, 1)
        assert pair.reviews.process.wait(15) == 0
