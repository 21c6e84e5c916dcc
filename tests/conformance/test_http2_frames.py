"""What RFC 9113 demands of whoever receives malformed frames, on both engines: section by section, with the codes.

Each case says what the peer sends after a correct beginning, and every outcome that the RFC permits. Both engines must
give the same one. `connection(…)`: GOAWAY with this code and the end; `stream(…)`: RST_STREAM, and nothing of the
message is handed on as complete; an endpoint may make the first of the second (section 5.4), as is said where we do.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
from support.http2_frames import (
    ACK,
    CONTINUATION,
    DATA,
    ENABLE_CONNECT_PROTOCOL,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITIZED,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Frame,
    Parser,
    block,
    connect,
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
    request,
    response,
    rst_stream,
    settings,
    window_update,
)

from sidecar.wire.http2 import STRANGERS, ErrorCode, Http2, Stream, open_codec

ENGINES = ["h2", "ngh2"]
PROTOCOL, FLOW, CLOSED, SIZE, REFUSED, COMPRESSION, CALM = (
    ErrorCode.PROTOCOL_ERROR,
    ErrorCode.FLOW_CONTROL_ERROR,
    ErrorCode.STREAM_CLOSED,
    ErrorCode.FRAME_SIZE_ERROR,
    ErrorCode.REFUSED_STREAM,
    ErrorCode.COMPRESSION_ERROR,
    ErrorCode.ENHANCE_YOUR_CALM,
)


class Outcome(NamedTuple):
    kind: str
    code: int = 0


def connection(*codes: int) -> set[Outcome]:
    return {Outcome("connection", code) for code in codes}


def stream(*codes: int) -> set[Outcome]:
    return {Outcome("stream", code) for code in codes}


def answered(*statuses: int) -> set[Outcome]:
    return {Outcome("answered", status) for status in statuses}


ACCEPTED = {Outcome("accepted")}


class Seen:
    """A codec after a beginning, and everything that it has sent and told."""

    def __init__(self, engine: str, server: bool, *, acknowledged: bool = True, at_once: bytes = b"") -> None:
        """`at_once` comes in one read with the beginning."""
        self.codec: Http2 = open_codec(server, STRANGERS, engine=engine)
        self.parser = Parser(preface=not server)
        self.sent: list[Frame] = []
        self.streams: dict[int, Stream] = {}
        self.asked: list[Stream] = []
        beginning = (PREFACE if server else b"") + settings() + (settings(ack=True) if acknowledged else b"")
        if not at_once:
            self.feed(beginning)
        if not server:
            for _ in range(2):
                asked = Stream(method=b"GET")
                self.codec.request(asked, request(), True)
                self.asked.append(asked)
        self.feed(b"")
        self.sent.clear()
        if at_once:
            self.feed(beginning + at_once)

    def feed(self, wire: bytes, now: float = 0.0) -> None:
        self.codec.receive(wire, now)
        for _ in range(2):
            self.streams.update((stream.sid, stream) for stream in self.codec.take_news())
            self.sent += self.parser.feed(self.codec.to_send())

    def frames(self, kind: int) -> list[Frame]:
        return [each for each in self.sent if each.kind == kind]

    def outcome(self, sid: int = 1) -> Outcome:
        ends = self.frames(GOAWAY)
        if self.codec.error is not None:
            assert ends and ends[-1].code == self.codec.error.code, "GOAWAY says what the error is"
            assert self.sent[-1].kind == GOAWAY, "and it is the last frame"
            return Outcome("connection", self.codec.error.code)
        assert not ends
        resets = [each for each in self.frames(RST_STREAM) if each.sid == sid]
        if resets:
            assert len(resets) == 1, "RFC 9113, section 5.4.2: one RST_STREAM is enough"
            told = self.streams.get(sid)
            assert told is None or (told.error == resets[0].code and not (told.m is not None and told.m.done))
            return Outcome("stream", resets[0].code)
        told = self.streams.get(sid)
        if told is not None and told.status:
            return Outcome("answered", told.status)
        return Outcome("accepted")


class Case(NamedTuple):
    title: str
    wire: bytes
    permitted: set[Outcome]
    server: bool = True
    sid: int = 1


POST = headers(1, request(b"POST"))
GET = headers(1, request(), end=True)
LENGTH = b"content-length"


def with_length(value: bytes, end: bool = False, method: bytes = b"POST") -> bytes:
    return headers(1, request(method, more=[(LENGTH, value)]), end=end)


def field(name: bytes, value: bytes) -> bytes:
    return headers(1, request(more=[(name, value)]), end=True)


def without(name: bytes, fields: list[tuple[bytes, bytes]] | None = None) -> bytes:
    return headers(1, [each for each in fields or request() if each[0] != name], end=True)


FRAMES = [
    # 4.1: unknown types are ignored, undefined flags and the reserved bit too
    Case("4.1 unknown type", frame(0x77, 1, b"abc", 0xFF) + GET, ACCEPTED),
    Case("4.1 undefined flags", frame(HEADERS, 1, block(request()), END_HEADERS | END_STREAM | 0xC2), ACCEPTED),
    Case("4.1 reserved bit", frame(HEADERS, 1 | 1 << 31, block(request()), END_HEADERS | END_STREAM), ACCEPTED),
    # 4.2
    Case("4.2 DATA over the size", POST + frame(DATA, 1, bytes(16385)), connection(SIZE)),  # or a stream error
    Case("4.2 DATA of the size", POST + frame(DATA, 1, bytes(16384)), ACCEPTED),
    Case("4.2 HEADERS over the size", frame(HEADERS, 1, bytes(16385), END_HEADERS), connection(SIZE)),
    Case("4.2 SETTINGS over the size", frame(SETTINGS, 0, bytes(16386)), connection(SIZE)),
    Case("4.2 unknown over the size", frame(0x77, 0, bytes(16385)), connection(SIZE)),
    Case("4.2 length alone is enough", frame(DATA, 1, b"", length=1 << 23), connection(SIZE)),
    # 4.3
    Case("4.3 index that is not there", frame(HEADERS, 1, indexed(70), END_HEADERS), connection(COMPRESSION)),
    Case("4.3 index 0", frame(HEADERS, 1, b"\x80", END_HEADERS), connection(COMPRESSION)),
    Case("4.3 block that breaks off", frame(HEADERS, 1, block(request())[:-2], END_HEADERS), connection(COMPRESSION)),
    Case("4.3 Huffman with EOS", frame(HEADERS, 1, b"\x00\x01a\x84\xff\xff\xff\xff", 4), connection(COMPRESSION)),
    Case("4.3 Huffman padding", frame(HEADERS, 1, b"\x00\x01a\x81\x00", END_HEADERS), connection(COMPRESSION)),
    Case("4.3 table too large", frame(HEADERS, 1, integer(5000, 5, 0x20), END_HEADERS), connection(COMPRESSION)),
    Case("4.3 table size late", headers(1, block(request()) + b"\x20", True), connection(COMPRESSION)),
    Case("4.3 table size first", headers(1, b"\x20\x3f\xe1\x1f" + block(request()), True), ACCEPTED),
    Case("4.3 block of a refused stream is read", field(b"A", b"b") + headers(3, request(), True), ACCEPTED, sid=3),
    # 5.1: idle
    Case("5.1 idle DATA", data(1, b"x"), connection(PROTOCOL)),
    Case("5.1 idle RST_STREAM", rst_stream(1), connection(PROTOCOL)),
    Case("5.1 idle WINDOW_UPDATE", window_update(1, 5), connection(PROTOCOL)),
    Case("5.1 idle CONTINUATION", continuation(1, b"", True), connection(PROTOCOL)),
    Case("5.1 idle PRIORITY", priority(1) + GET, ACCEPTED),
    # half-closed (remote): a stream error; we end the connection, as section 5.4 permits
    Case("5.1 half-closed DATA", GET + data(1, b"x"), connection(CLOSED) | stream(CLOSED)),
    Case("5.1 half-closed HEADERS", GET + headers(1, b"", True), connection(CLOSED) | stream(CLOSED)),
    Case("5.1 half-closed CONTINUATION", GET + continuation(1, b"", True), connection(PROTOCOL, CLOSED)),
    Case("5.1 half-closed WINDOW_UPDATE", GET + window_update(1, 1), ACCEPTED),
    Case("5.1 half-closed PRIORITY", GET + priority(1), ACCEPTED),
    # closed, by the peer's RST_STREAM
    Case("5.1 reset DATA", POST + rst_stream(1) + data(1, b"x"), connection(CLOSED) | stream(CLOSED)),
    Case("5.1 reset HEADERS", POST + rst_stream(1) + headers(1, b"", True), connection(CLOSED) | stream(CLOSED)),
    Case("5.1 reset PRIORITY", POST + rst_stream(1) + priority(1), ACCEPTED),
    Case("5.1 reset WINDOW_UPDATE", POST + rst_stream(1) + window_update(1, 1), ACCEPTED),
    Case("5.1 reset twice", POST + rst_stream(1) * 2, ACCEPTED),
    # closed, by ours: what was under way is ignored
    Case("5.1 under way", field(b"A", b"b") + window_update(1, 1), stream(PROTOCOL)),
    Case(
        "5.1 DATA under way",
        headers(1, request(b"POST", more=[(b"A", b"b")])) + data(1, b"x" * 99) * 3 + data(1, b"", True),
        stream(PROTOCOL),
    ),
    # 5.1.1
    Case("5.1.1 even", headers(2, request(), end=True), connection(PROTOCOL)),
    Case("5.1.1 lower", headers(5, request(), True) + headers(3, request(), True), connection(PROTOCOL)),
    Case("5.1.1 gap", headers(7, request(), True), ACCEPTED, sid=7),
    # 5.1.2 (after our limit is acknowledged): a stream error of either code, we end the connection
    Case(
        "5.1.2 too many",
        b"".join(headers(sid, request()) for sid in range(1, 203, 2)),
        connection(PROTOCOL) | stream(PROTOCOL, REFUSED),
        sid=201,
    ),
    # 5.3: deprecated, but its frames are still checked
    Case("5.3.2 in HEADERS", headers(1, request(), True, priority=(3, 200)), ACCEPTED),
    Case("5.3.2 exclusive", headers(1, request(), True, priority=(3 | 1 << 31, 0)), ACCEPTED),
    # 5.4.1: after a connection error nothing counts
    Case("5.4.1 what follows is not read", ping(bytes(7) + b"") + GET, connection(SIZE)),
    # 5.5
    Case(
        "5.5 unknown frame in a header block",
        headers(1, request(), end_headers=False) + frame(0x77),
        connection(PROTOCOL),
    ),
    Case("5.5 unknown setting", settings({0x7777: 5}) + GET, ACCEPTED),
    # 6.1
    Case("6.1 stream 0", frame(DATA, 0, b"x"), connection(PROTOCOL)),
    Case("6.1 padding", POST + data(1, b"abc", True, pad=10), ACCEPTED),
    Case("6.1 padding of the whole length", POST + frame(DATA, 1, b"\x03abc", PADDED), ACCEPTED),
    Case("6.1 padding too long", POST + frame(DATA, 1, b"\x04abc", PADDED), connection(PROTOCOL)),
    Case("6.1 no room for the padding's length", POST + frame(DATA, 1, b"", PADDED), connection(PROTOCOL, SIZE)),
    # 6.2
    Case("6.2 stream 0", frame(HEADERS, 0, block(request()), END_HEADERS), connection(PROTOCOL)),
    Case("6.2 padding", headers(1, request(), True, pad=7, priority=(0, 3)), ACCEPTED),
    Case("6.2 padding too long", frame(HEADERS, 1, b"\x09abc", PADDED | END_HEADERS), connection(PROTOCOL)),
    Case("6.2 too short", frame(HEADERS, 1, b"abc", PRIORITIZED | END_HEADERS), connection(SIZE)),
    # 6.3
    Case("6.3 stream 0", priority(0), connection(PROTOCOL)),
    Case("6.3 length", frame(PRIORITY, 1, bytes(4)), connection(SIZE) | stream(SIZE)),
    # 6.4
    Case("6.4 stream 0", rst_stream(0), connection(PROTOCOL)),
    Case("6.4 length", POST + frame(RST_STREAM, 1, bytes(3)), connection(SIZE)),
    Case("6.4 unknown code", POST + rst_stream(1, 0x7777), ACCEPTED),
    # 6.5
    Case("6.5 ACK with payload", frame(SETTINGS, 0, bytes(6), ACK), connection(SIZE)),
    Case("6.5 stream", frame(SETTINGS, 1), connection(PROTOCOL)),
    Case("6.5 length", frame(SETTINGS, 0, bytes(7)), connection(SIZE)),
    Case("6.5.2 push", settings({ENABLE_PUSH: 2}), connection(PROTOCOL)),
    Case("6.5.2 window", settings({INITIAL_WINDOW_SIZE: 1 << 31}), connection(FLOW)),
    Case("6.5.2 frame size, low", settings({MAX_FRAME_SIZE: 16383}), connection(PROTOCOL)),
    Case("6.5.2 frame size, high", settings({MAX_FRAME_SIZE: 1 << 24}), connection(PROTOCOL)),
    Case(
        "6.5.2 extremes",
        settings({HEADER_TABLE_SIZE: 0, MAX_HEADER_LIST_SIZE: 0, MAX_FRAME_SIZE: (1 << 24) - 1}),
        ACCEPTED,
    ),
    Case("6.5.3 in order", settings([(INITIAL_WINDOW_SIZE, 1), (INITIAL_WINDOW_SIZE, 100)]), ACCEPTED),
    # 6.6
    Case("6.6 from a client", GET + push_promise(1, 2, request()), connection(PROTOCOL)),
    Case("6.6 not allowed", push_promise(1, 2, request()), connection(PROTOCOL), server=False),
    # 6.7
    Case("6.7 stream", frame(PING, 1, bytes(8)), connection(PROTOCOL)),
    Case("6.7 length", frame(PING, 0, bytes(9)), connection(SIZE)),
    # 6.8
    Case("6.8 stream", frame(GOAWAY, 1, bytes(8)), connection(PROTOCOL)),
    Case("6.8 higher than before", goaway(1) + goaway(3), connection(PROTOCOL), server=False, sid=3),
    # 6.9
    Case("6.9 length", frame(WINDOW_UPDATE, 0, bytes(5)), connection(SIZE)),
    Case("6.9 nothing, connection", window_update(0, 0), connection(PROTOCOL)),
    Case("6.9 nothing, stream", POST + window_update(1, 0), connection(PROTOCOL) | stream(PROTOCOL)),
    Case("6.9.1 overflow, connection", window_update(0, 0x7FFFFFFF), connection(FLOW)),
    Case("6.9.1 overflow, stream", POST + window_update(1, 0x7FFFFFFF), connection(FLOW) | stream(FLOW)),
    Case(
        "6.9.1 more than the window", POST + data(1, bytes(16384)) * 4 + data(1, b"x"), connection(FLOW) | stream(FLOW)
    ),
    Case("6.9.1 padding counts", POST + data(1, bytes(16000), pad=255) * 5, connection(FLOW) | stream(FLOW)),
    Case(
        "6.9.2 overflow by SETTINGS",
        POST + window_update(1, 0x7FFFFFFF - 65535) + settings({INITIAL_WINDOW_SIZE: 65536}),
        connection(FLOW),
    ),
    # 6.10
    Case("6.10 continued", headers(1, request(), True, cuts=[0, 4, 4]), ACCEPTED),
    Case(
        "6.10 other stream", headers(1, request(), end_headers=False) + continuation(3, b"", True), connection(PROTOCOL)
    ),
    Case("6.10 other frame", headers(1, request(), end_headers=False) + ping(), connection(PROTOCOL)),
    Case("6.10 other HEADERS", headers(1, request(), end_headers=False) + headers(3, request()), connection(PROTOCOL)),
    Case("6.10 after the end", POST + continuation(1, b"", True), connection(PROTOCOL)),
    Case("6.10 stream 0", headers(1, request(), end_headers=False) + frame(CONTINUATION, 0), connection(PROTOCOL)),
]

MESSAGES = [
    # 8.1
    Case("8.1 trailers", POST + data(1, b"x") + headers(1, [(b"a", b"b")], True), ACCEPTED),
    Case("8.1 trailers that do not end", POST + headers(1, [(b"a", b"b")]), stream(PROTOCOL)),
    Case("8.1 pseudo-field in trailers", POST + headers(1, [(b":path", b"/")], True), stream(PROTOCOL)),
    Case("8.1 connection-specific in trailers", POST + headers(1, [(b"connection", b"a")], True), stream(PROTOCOL)),
    Case("8.1 framing in trailers", POST + headers(1, [(b"transfer-encoding", b"chunked")], True), stream(PROTOCOL)),
    Case("8.1 length in trailers", POST + headers(1, [(LENGTH, b"0")], True), stream(PROTOCOL)),
    Case("8.1 DATA before the head", data(1, b"x"), connection(PROTOCOL) | stream(PROTOCOL), server=False),
    Case("8.1 head, twice", headers(1, response()) + headers(1, response()), stream(PROTOCOL), server=False),
    # 8.1.1
    Case("8.1.1 more than content-length", with_length(b"2") + data(1, b"abc"), stream(PROTOCOL)),
    Case("8.1.1 less than content-length", with_length(b"4") + data(1, b"abc", True), stream(PROTOCOL)),
    Case("8.1.1 less, by trailers", with_length(b"4") + data(1, b"a") + headers(1, b"", True), stream(PROTOCOL)),
    Case("8.1.1 nothing of content-length", with_length(b"4", True), stream(PROTOCOL)),
    Case("8.1.1 content-length, rightly", with_length(b"3") + data(1, b"ab") + data(1, b"c", True, pad=2), ACCEPTED),
    Case("8.1.1 content-length 0", with_length(b"0", True), ACCEPTED),
    *(
        Case(f"8.1.1 content-length {value!r}", with_length(value), stream(PROTOCOL))
        for value in (b"+3", b"-1", b"3,3", b"0x3", b"", b"3 3", b"9" * 30, b"\xb2")
    ),
    Case("8.1.1 content-length, twice", headers(1, request(b"POST", more=[(LENGTH, b"3")] * 2)), stream(PROTOCOL)),
    Case("8.1.1 response, more", headers(1, response(200, [(LENGTH, b"1")])) + data(1, b"ab"), stream(PROTOCOL), False),
    Case(
        "8.1.1 response, less",
        headers(1, response(200, [(LENGTH, b"3")])) + data(1, b"ab", True),
        stream(PROTOCOL),
        False,
    ),
    Case("8.1.1 response, nothing", headers(1, response(200, [(LENGTH, b"3")]), True), stream(PROTOCOL), False),
    Case("8.1.1 304 with a length", headers(1, response(304, [(LENGTH, b"3")]), True), ACCEPTED, False),
    Case("8.1.1 304 with content", headers(1, response(304)) + data(1, b"ab", True), stream(PROTOCOL), False),
    Case("8.1.1 204 with content", headers(1, response(204)) + data(1, b"ab", True), stream(PROTOCOL), False),
    # 8.2, 8.2.1
    *(
        Case(f"8.2.1 name {name!r}", field(name, b"v"), stream(PROTOCOL))
        for name in (
            b"",
            b"Upper",
            b"a b",
            b"a:b",
            b"a\r",
            b"a\n",
            b"a\0",
            b"a\x7f",
            b"\xe9",
            b" a",
            b"a ",
            b"a\tb",
            b"(a)",
        )
    ),
    *(
        Case(f"8.2.1 value {value!r}", field(b"x-a", value), stream(PROTOCOL))
        for value in (b"a\r\nb", b"a\n", b"\r", b"a\0b", b" a", b"a ", b"\ta", b"a\t", b"\x7f", b"\x01", b"\x1b[0m")
    ),
    Case("8.2.1 empty value", field(b"x-a", b""), ACCEPTED),
    Case("8.2.1 obs-text", field(b"x-a", b"caf\xe9"), ACCEPTED),
    # 8.2.2
    *(
        Case(f"8.2.2 {name.decode()}", field(name, value), stream(PROTOCOL))
        for name, value in (
            (b"connection", b"close"),
            (b"proxy-connection", b"keep-alive"),
            (b"keep-alive", b"timeout=5"),
            (b"transfer-encoding", b"chunked"),
            (b"transfer-encoding", b"identity"),
            (b"upgrade", b"h2c"),
            (b"te", b"gzip"),
            (b"te", b"trailers, gzip"),
        )
    ),
    Case("8.2.2 te: trailers", field(b"te", b"trailers"), ACCEPTED),
    Case("8.2.2 response", headers(1, response(200, [(b"connection", b"close")])), stream(PROTOCOL), False),
    # 8.2.3
    Case("8.2.3 crumbs", headers(1, request(more=[(b"cookie", b"a=b")] * 20), True), ACCEPTED),
    # 8.3
    Case("8.3 unknown pseudo-field", headers(1, [(b":foo", b"x"), *request()], True), stream(PROTOCOL)),
    Case("8.3 behind a field", headers(1, [*request()[:3], (b"a", b"b"), request()[3]], True), stream(PROTOCOL)),
    Case(
        "8.3 response pseudo-field in a request", headers(1, [*request(), (b":status", b"200")], True), stream(PROTOCOL)
    ),
    Case(
        "8.3 request pseudo-field in a response", headers(1, [*response(), (b":path", b"/")]), stream(PROTOCOL), False
    ),
    *(
        Case(f"8.3.1 {each[0].decode()} twice", headers(1, [*request(), each], True), stream(PROTOCOL))
        for each in request()
    ),
    *(
        Case(f"8.3.1 {name.decode()} missing", without(name), stream(PROTOCOL))
        for name in (b":method", b":scheme", b":path", b":authority")
    ),
    Case("8.3.1 path empty", headers(1, request(path=b""), True), stream(PROTOCOL)),
    Case("8.3.1 path without slash", headers(1, request(path=b"a"), True), stream(PROTOCOL)),
    Case("8.3.1 path in absolute form", headers(1, request(path=b"http://a/"), True), stream(PROTOCOL)),
    Case("8.3.1 path with a line break", headers(1, request(path=b"/ HTTP/1.1\r\nx: y"), True), stream(PROTOCOL)),
    Case("8.3.1 path with a fragment", headers(1, request(path=b"/a#b"), True), answered(400)),
    Case("8.3.1 asterisk", headers(1, request(b"OPTIONS", b"*"), True), ACCEPTED),
    Case("8.3.1 asterisk of GET", headers(1, request(path=b"*"), True), stream(PROTOCOL)),
    Case("8.3.1 authority with userinfo", headers(1, request(authority=b"u@app.test"), True), stream(PROTOCOL)),
    Case("8.3.1 authority empty", headers(1, request(authority=b""), True), stream(PROTOCOL)),
    Case("8.3.1 authority with a line break", headers(1, request(authority=b"a\r\nb"), True), stream(PROTOCOL)),
    Case("8.3.1 authority malformed", headers(1, request(authority=b"a:99999"), True), answered(400)),
    Case("8.3.1 method with a line break", headers(1, request(b"GET / HTTP/1.1\r\n"), True), stream(PROTOCOL)),
    Case("8.3.1 method in small letters", headers(1, request(b"get"), True), answered(501)),
    Case("8.3.1 scheme malformed", headers(1, request(scheme=b"ht tp"), True), stream(PROTOCOL)),
    Case("8.3.1 scheme that is not served", headers(1, request(scheme=b"ftp"), True), answered(400)),
    Case("8.3.1 host alone", headers(1, [*request()[:3], (b"host", b"app.test")], True), ACCEPTED),
    Case("8.3.1 host that agrees", field(b"host", b"APP.test"), ACCEPTED),
    Case("8.3.1 host that differs", field(b"host", b"other.test"), stream(PROTOCOL)),
    Case("8.3.1 host twice", headers(1, request(more=[(b"host", b"app.test")] * 2), True), stream(PROTOCOL)),
    # 8.3.2
    Case("8.3.2 no status", headers(1, [(b"a", b"b")]), stream(PROTOCOL), False),
    *(
        Case(f"8.3.2 status {value!r}", headers(1, [(b":status", value)]), stream(PROTOCOL), False)
        for value in (b"", b"20", b"2000", b"abc", b"+20", b"200 ", b"099", b"600")
    ),
    Case("8.3.2 status twice", headers(1, [*response(), *response()]), stream(PROTOCOL), False),
    # 8.4 is 6.6; 8.5
    Case("8.5 CONNECT", headers(1, [(b":method", b"CONNECT"), (b":authority", b"a:1")]), ACCEPTED),
    Case("8.5 with a path", headers(1, request(b"CONNECT")), stream(PROTOCOL)),
    Case("8.5 without authority", headers(1, [(b":method", b"CONNECT")]), stream(PROTOCOL)),
    # 8.6 and 8.1: informational responses
    Case("8.6 101", headers(1, response(101)), stream(PROTOCOL), False),
    Case("8.1 informational with the end", headers(1, response(103), True), stream(PROTOCOL), False),
    Case(
        "8.1 informational after the final", headers(1, response()) + headers(1, response(103)), stream(PROTOCOL), False
    ),
    # RFC 8441
    Case("RFC 8441 4 extended CONNECT", headers(1, connect()), ACCEPTED),
    Case("RFC 8441 4 protocol of GET", headers(1, [*request(), (b":protocol", b"websocket")], True), stream(PROTOCOL)),
    Case("RFC 8441 4 protocol malformed", headers(1, connect(b"web socket")), stream(PROTOCOL)),
    Case("RFC 8441 4 no scheme", without(b":scheme", connect()), stream(PROTOCOL)),
    Case("RFC 8441 4 no path", without(b":path", connect()), stream(PROTOCOL)),
    Case("RFC 8441 4 no authority", without(b":authority", connect()), stream(PROTOCOL)),
    Case("RFC 8441 3 setting", settings({ENABLE_CONNECT_PROTOCOL: 2}), connection(PROTOCOL)),
    Case(
        "RFC 8441 3 taken back",
        settings({ENABLE_CONNECT_PROTOCOL: 1}) + settings({ENABLE_CONNECT_PROTOCOL: 0}),
        connection(PROTOCOL),
        server=False,
    ),
    # Names in other spellings frame too, to an application behind CGI or WSGI
    Case("framing in an odd spelling", field(b"content_length", b"0"), stream(PROTOCOL)),
]


@pytest.mark.parametrize("case", FRAMES + MESSAGES, ids=lambda case: case.title)
def test_requirements(case: Case) -> None:
    outcomes = {}
    for engine in ENGINES:
        for step in (len(case.wire), 1):
            seen = Seen(engine, case.server)
            for at in range(0, len(case.wire), step):
                seen.feed(case.wire[at : at + step])
            outcomes[engine, step] = seen.outcome(case.sid)
        outcomes[engine, 0] = Seen(engine, case.server, at_once=case.wire).outcome(case.sid)
    assert set(outcomes.values()) <= case.permitted, outcomes
    assert len(set(outcomes.values())) == 1, outcomes


@pytest.mark.parametrize("engine", ENGINES)
class TestBeginnings:
    """RFC 9113, section 3.4."""

    @pytest.mark.parametrize(
        "wire",
        [
            b"GET / HTTP/1.1\r\nhost: a\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"x",
            PREFACE + ping(),
            PREFACE + GET,
            PREFACE + settings(ack=True),
            PREFACE[:-1] + b"\0" + settings(),
        ],
    )
    def test_of_a_client_that_are_wrong(self, engine: str, wire: bytes) -> None:
        codec = open_codec(True, STRANGERS, engine=engine)
        codec.receive(wire, 0.0)
        frames = Parser().feed(codec.to_send())
        assert codec.error is not None and codec.error.code == PROTOCOL
        assert frames[-1].kind == GOAWAY and frames[-1].code == PROTOCOL

    @pytest.mark.parametrize("wire", [b"HTTP/1.1 400 Bad Request\r\n\r\n", ping(), settings(ack=True), GET])
    def test_of_a_server_that_are_wrong(self, engine: str, wire: bytes) -> None:
        codec = open_codec(False, STRANGERS, engine=engine)
        parser = Parser(preface=True)
        parser.feed(codec.to_send())
        codec.receive(wire, 0.0)
        frames = parser.feed(codec.to_send())
        assert codec.error is not None and codec.error.code in (PROTOCOL, SIZE)
        assert frames[-1].kind == GOAWAY

    def test_our_own(self, engine: str) -> None:
        (server, *_) = Parser().feed(open_codec(True, STRANGERS, engine=engine).to_send())
        wire = open_codec(False, STRANGERS, engine=engine).to_send()
        (client, *_) = Parser(preface=True).feed(wire)
        assert server.kind == client.kind == SETTINGS and not server.ack and not client.ack
        assert client.settings[ENABLE_PUSH] == 0 and ENABLE_PUSH not in server.settings
        assert server.settings[ENABLE_CONNECT_PROTOCOL] == 1

    def test_settings_are_acknowledged(self, engine: str) -> None:
        """Section 6.5.3: each, and at once."""
        seen = Seen(engine, True)
        seen.feed(settings({MAX_CONCURRENT_STREAMS: 7}) + settings())
        assert [each.ack for each in seen.frames(SETTINGS)] == [True, True]
        assert seen.codec.peer_streams_max == 7

    def test_pings_are_answered(self, engine: str) -> None:
        """Section 6.7."""
        seen = Seen(engine, True)
        seen.feed(ping(b"12345678") + ping(b"abcdefgh", ack=True))
        assert [(each.payload, each.ack) for each in seen.frames(PING)] == [(b"12345678", True)]

    def test_our_frames_keep_to_the_peers_size(self, engine: str) -> None:
        """Section 4.2."""
        seen = Seen(engine, True)
        seen.feed(window_update(0, 1 << 20) + settings({INITIAL_WINDOW_SIZE: 1 << 20}) + GET)
        stream = seen.streams[1]
        more = [(b"x-%d" % i, b"v" * 1000) for i in range(40)]
        seen.codec.respond(stream, response(200, more), False)
        seen.codec.send(stream, bytes(100000), True)
        seen.feed(b"")
        assert max(len(each.payload) for each in seen.sent) <= 16384
        assert sum(len(each.data) for each in seen.frames(DATA)) == 100000
        assert [len(each.fields) for each in seen.sent if each.fields] == [41]

    def test_our_table_keeps_to_the_peers_size(self, engine: str) -> None:
        """Section 4.3.1."""
        seen = Seen(engine, True)
        seen.feed(settings({HEADER_TABLE_SIZE: 0}) + GET + headers(3, request(), end=True))
        for stream in seen.streams.values():
            seen.codec.respond(stream, response(200, [(b"x-name", b"value")]), True)
        seen.feed(b"")
        heads = seen.frames(HEADERS)
        assert len(heads) == 2 and len(heads[1].payload) >= len(heads[0].payload) - 3
        assert heads[1].fields == response(200, [(b"x-name", b"value")])


def _steady(seen: Seen, wire: Callable[[int], bytes], most: int = 20000) -> tuple[int, str]:
    """Send one after the other until the connection ends: how many got through, and the limit's name."""
    for count in range(most):
        seen.feed(wire(count))
        if seen.codec.error is not None:
            assert seen.codec.error.code == CALM, seen.codec.error
            assert seen.sent[-1].kind == GOAWAY and seen.sent[-1].code == CALM
            return count, seen.codec.error.limit
    return most, ""


def _at_once(engine: str, wire: bytes, server: bool = True) -> str:
    """All in one read, with the beginning and without: the limit that ends it."""
    found = set()
    for seen in (Seen(engine, server, at_once=wire), Seen(engine, server)):
        seen.feed(b"" if seen.codec.error is not None else wire)
        assert seen.codec.error is not None and seen.codec.error.code == CALM, seen.codec.error
        found.add(seen.codec.error.limit)
    assert len(found) == 1, found
    return found.pop()


@pytest.mark.parametrize("engine", ENGINES)
class TestAttacks:
    """Each ends with ENHANCE_YOUR_CALM and names its limit, one at a time or all in one read."""

    def test_rapid_reset(self, engine: str) -> None:
        """CVE-2023-44487, CVE-2021-32778."""
        seen = Seen(engine, True)
        served = 0
        for sid in range(1, 2001, 2):
            seen.feed(headers(sid, request(), end=True))
            served += sid in seen.streams
            seen.feed(rst_stream(sid))
            if seen.codec.error is not None:
                break
        assert seen.codec.error is not None
        assert (seen.codec.error.code, seen.codec.error.limit) == (CALM, "rapid_reset")
        assert served < 100
        pairs = b"".join(headers(sid, request(), end=True) + rst_stream(sid) for sid in range(1, 2001, 2))
        assert _at_once(engine, pairs) == "rapid_reset"

    @pytest.mark.parametrize("code", [ErrorCode.NO_ERROR, ErrorCode.CANCEL, ErrorCode.REFUSED_STREAM, 0x7777])
    def test_rapid_reset_with_any_code(self, engine: str, code: int) -> None:
        seen = Seen(engine, True)
        wire = [headers(sid, request(), end=True) + rst_stream(sid, code) for sid in range(1, 1001, 2)]
        count, limit = _steady(seen, wire.__getitem__, 500)
        assert limit == "rapid_reset" and count < 100
        assert all(stream.error is not None for stream in seen.streams.values())

    def test_a_client_that_cancels_some_calls_goes_on(self, engine: str) -> None:
        seen = Seen(engine, True)
        for sid in range(1, 3001, 2):
            seen.feed(headers(sid, request(), end=True))
            if sid % 3:
                seen.codec.respond(seen.streams[sid], response(), True)
                seen.feed(b"")
            else:
                seen.feed(rst_stream(sid))
        assert seen.codec.error is None

    def test_a_client_that_resets_what_is_answered_goes_on(self, engine: str) -> None:
        """gRPC clients end a call so whose request was not over when its answer was."""
        seen = Seen(engine, True)
        for sid in range(1, 3001, 2):
            seen.feed(headers(sid, request(b"POST")))
            seen.codec.respond(seen.streams[sid], response(), True)
            seen.feed(rst_stream(sid, ErrorCode.CANCEL))
        assert seen.codec.error is None and not seen.codec.streams

    @pytest.mark.parametrize(
        "fault",
        [
            lambda sid: headers(sid, request(more=[(b"A", b"b")]), end=True),
            lambda sid: headers(sid, request(b"POST", more=[(LENGTH, b"1")])) + data(sid, b"abc", end=True),
            lambda sid: headers(sid, request(b"POST")) + headers(sid, [(b":a", b"b")], end=True),
            lambda sid: headers(sid, request(b"POST")) + headers(sid, [(b"a", b"b")]),
        ],
        ids=["field", "content-length", "trailers", "trailers without end"],
    )
    def test_resets_that_the_client_provokes(self, engine: str, fault: Callable[[int], bytes]) -> None:
        """CVE-2025-8671."""
        count, limit = _steady(Seen(engine, True), lambda number: fault(2 * number + 1), 1000)
        assert limit == "rapid_reset" and count < 100
        seen = Seen(engine, True)
        seen.feed(b"".join(fault(sid) for sid in range(1, 1001, 2)))
        # All at once they may also be too many streams: a client knows none of them to be over.
        assert seen.codec.error is not None and seen.codec.error.code in (CALM, PROTOCOL)

    def test_frames_after_reset(self, engine: str) -> None:
        """CVE-2026-26311: they end the connection at once."""
        for after in (data(1, b"x"), headers(1, request(), end=True), data(1, b"", end=True)):
            seen = Seen(engine, True)
            seen.feed(POST + rst_stream(1) + after)
            assert seen.outcome() == Outcome("connection", CLOSED)

    def test_frames_after_our_reset_cost_the_peer_its_window_and_us_nothing(self, engine: str) -> None:
        seen = Seen(engine, True)
        seen.feed(POST)
        seen.codec.reset(seen.streams[1], ErrorCode.CANCEL)
        for _ in range(500):
            seen.feed(data(1, b"x" * 1000))
        assert seen.codec.error is None and len(seen.frames(RST_STREAM)) == 1
        assert len(seen.sent) < 20

    def test_continuations(self, engine: str) -> None:
        """CVE-2024-27919, CVE-2024-28182, CVE-2024-30255."""
        start = headers(1, request(), end_headers=False)
        assert _at_once(engine, start + continuation(1) * 1000) == "continuation_frames"
        assert _at_once(engine, start + continuation(1, literal(b"a", b"b" * 60)) * 1000) == "continuation_frames"
        assert _at_once(engine, start + continuation(1, bytes(16384)) * 10) == "header_block"
        count, limit = _steady(Seen(engine, True), lambda number: continuation(1, b"\0") if number else start)
        assert limit == "continuation_frames" and count < 20

    @pytest.mark.parametrize(
        ("one", "limit"),
        [
            (settings({INITIAL_WINDOW_SIZE: 1000}), "settings_frames"),
            (ping(), "ping_frames"),
            (priority(1, 3), "priority_frames"),
            (window_update(1, 1), "window_update_frames"),
            (data(1), "empty_data_frames"),
            (data(1, b"", pad=5), "tiny_data_frames"),
            (data(1, b"x"), "tiny_data_frames"),
            (frame(0x77, 1), "unknown_frames"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_frames_of_one_kind(self, engine: str, one: bytes, limit: str) -> None:
        """CVE-2019-9511 to 9518, CVE-2020-12603."""
        assert _at_once(engine, POST + one * 3000) == limit
        seen = Seen(engine, True)
        seen.feed(POST)
        _, name = _steady(seen, lambda _: one, 3000)
        assert name == limit

    def test_settings_with_many_entries(self, engine: str) -> None:
        assert _at_once(engine, settings([(MAX_CONCURRENT_STREAMS, 5)] * 2000)) == "settings_entries"

    def test_hpack_bomb(self, engine: str) -> None:
        """CVE-2016-6581: one large entry of the table, referred to again and again."""
        bomb = literal(b"x", b"v" * 4000, 0x40) + indexed(62) * 15000
        assert _at_once(engine, headers(1, block(request()) + bomb, end=True, cuts=[16000])) == "header_section"

    def test_empty_fields(self, engine: str) -> None:
        """As many fields as a block can hold."""
        many = block(request()) + indexed(16) * 90000
        wire = headers(1, many, end=True, cuts=range(16000, len(many), 16000))
        assert _at_once(engine, wire) == "header_section"

    def test_cookie_crumbs(self, engine: str) -> None:
        """CVE-2026-47774: crumbs count before they are joined."""
        seen = Seen(engine, True)
        seen.feed(headers(1, request(more=[(b"cookie", b"")] * 400), end=True))
        assert seen.outcome() == Outcome("answered", 431)
        assert _at_once(engine, headers(1, request(more=[(b"cookie", b"a")] * 1000), end=True)) == "header_section"

    @pytest.mark.parametrize("zeros", [5, 50, 5000])
    def test_padded_integers(self, engine: str, zeros: int) -> None:
        """CVE-2023-33953: an integer of HPACK that does not end."""
        for padded in (
            integer(127, 7, 0x80, zeros),
            b"\x00\x01a" + integer(127, 7, 0, zeros),
            integer(31, 5, 0x20, zeros),
        ):
            seen = Seen(engine, True)
            seen.feed(headers(1, padded + block(request()), end=True))
            assert seen.outcome() == Outcome("connection", COMPRESSION)

    def test_sizes_of_the_table_without_end(self, engine: str) -> None:
        """Each costs the peer one byte."""
        wire = headers(1, b"\x20" * 90000 + block(request()), end=True, cuts=range(16000, 90000, 16000))
        seen = Seen(engine, True)
        seen.feed(wire)
        if seen.codec.error is not None:
            assert seen.codec.error.code == COMPRESSION

    def test_oversized_strings(self, engine: str) -> None:
        seen = Seen(engine, True)
        seen.feed(headers(1, b"\x00\x01a" + integer(1 << 30, 7), end=True))
        assert seen.outcome() == Outcome("connection", COMPRESSION)
        long = request(more=[(b"a", b"x" * 60000)])
        seen = Seen(engine, True)
        seen.feed(headers(1, long, end=True, cuts=range(16000, 60000, 16000)))
        assert seen.outcome() == Outcome("accepted")
        long = request(path=b"/" + b"x" * 9000)
        seen = Seen(engine, True)
        seen.feed(headers(1, long, end=True))
        assert seen.outcome() == Outcome("answered", 414)

    def test_zero_window(self, engine: str) -> None:
        """CVE-2019-9517: what we are given to send waits here, and is counted."""
        seen = Seen(engine, True)
        seen.feed(settings({INITIAL_WINDOW_SIZE: 0}) + GET)
        stream = seen.streams[1]
        seen.codec.respond(stream, response(), False)
        for _ in range(10):
            seen.codec.send(stream, bytes(1000))
            seen.feed(window_update(1, 1))
        assert seen.codec.queued_bytes(stream) == 9990
        assert sum(len(each.data) for each in seen.frames(DATA)) == 10
        seen.feed(rst_stream(1))
        assert seen.codec.queued_bytes(stream) == 0

    def test_a_peer_that_never_reads_is_not_answered_without_end(self, engine: str) -> None:
        codec = open_codec(True, STRANGERS, engine=engine)
        codec.receive(PREFACE + settings() + settings(ack=True), 0.0)
        now = 0.0
        while codec.error is None and now < 1000:
            now += 0.1
            codec.receive(ping(), now)
        assert codec.error is not None and codec.error.limit == "unread_answers"
        assert len(codec.to_send()) < 50000

    def test_window_of_the_connection_bounds_what_is_held(self, engine: str) -> None:
        """Nothing is given back that was not consumed."""
        seen = Seen(engine, True)
        for sid in range(1, 201, 2):
            seen.feed(headers(sid, request(b"POST")))
            for _ in range(4):
                seen.feed(data(sid, bytes(16384)))
        assert seen.codec.error is None
        assert not seen.frames(WINDOW_UPDATE)
        seen.feed(data(1, b"x"))
        assert seen.codec.error is not None and seen.codec.error.code == FLOW

    def test_before_our_settings_are_acknowledged(self, engine: str) -> None:
        """Until then a client may go by the windows of RFC 9113; that of the connection bounds what is held."""
        seen = Seen(engine, True, acknowledged=False)
        for sid in range(1, 9, 2):
            seen.feed(headers(sid, request(b"POST")))
            seen.feed(data(sid, bytes(16383)))
        assert seen.codec.error is None
        seen.feed(headers(9, request(b"POST")) + data(9, bytes(4)))
        assert seen.outcome(9) == Outcome("connection", FLOW)

    def test_interim_responses_without_end(self, engine: str) -> None:
        count, limit = _steady(Seen(engine, False), lambda _: headers(1, response(103)), 1000)
        assert limit == "more_header_sections" and count < 150

    def test_pushes(self, engine: str) -> None:
        seen = Seen(engine, False)
        seen.feed(frame(PUSH_PROMISE, 1, b"\0\0\0\x02" + block(request()), END_HEADERS))
        assert seen.outcome() == Outcome("connection", PROTOCOL)
