"""Both engines, the same bytes: they must accept the same messages and refuse the same ones, however reads are cut.

Made from a seed: frames in and out of order, good and bad fields, then in half of the cases some bytes mutated. What
may differ is listed in `alike`, with the reason; nothing else may.
"""

import random
from itertools import pairwise
from typing import Any

import pytest
from hpack import Encoder
from support.http2_frames import (
    CONTINUATION,
    ENABLE_CONNECT_PROTOCOL,
    END_HEADERS,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    PREFACE,
    WINDOW_UPDATE,
    block,
    compressed,
    connect,
    continuation,
    data,
    frame,
    goaway,
    headers,
    indexed,
    ping,
    priority,
    push_promise,
    request,
    response,
    rst_stream,
    settings,
    window_update,
)

from sidecar.wire.http1_message import Message
from sidecar.wire.http2 import STRANGERS, ErrorCode, Stream, open_codec

ENGINES = ["h2", "ngh2"]
FIELDS = [name for name in dir(Message()) if name[0] != "_" and not callable(getattr(Message(), name))]
NAMES = [
    b"accept", b"x-name", b"cookie", b"content-length", b"te", b"host", b"expect", b"connection", b"X-Up", b"x a", b"",
    b"transfer-encoding", b"content-type", b"grpc-timeout", b"grpc-status", b":path", b":status", b":protocol", b":x",
    b"content_length", b"traceparent", b"x-pillion-attempt", b"x-forwarded-for", b"authorization", b"priority",
]  # fmt: skip
VALUES = [
    b"", b"v", b"trailers", b"3", b"0", b"5", b"app.test", b"other.test", b"a\r\nb", b" a", b"a ", b"\xe9", b"\0", b"/",
    b"100-continue", b"application/grpc", b"10S", b"x" * 300, b"websocket", b"-1", b"a, b", b"u=1", b"close",
]  # fmt: skip
PATHS = [b"/", b"/a?b=c", b"*", b"", b"a", b"/a b", b"/a#b", b"/\xe9", b"//x", b"/%2e", b"/\r\n"]
METHODS = [b"GET", b"POST", b"HEAD", b"OPTIONS", b"CONNECT", b"get", b"", b"G T", b"TRACE", b"PATCH"]
AUTHORITIES = [b"app.test", b"app.test:80", b"u@app.test", b"[::1]:80", b"", b"a b", b"a:99999", b"APP.test.", b"a,b"]
SIDS = [1, 1, 1, 3, 3, 5, 7]


class Maker:
    """Frames from a seed."""

    def __init__(self, seed: int, server: bool) -> None:
        self.random = random.Random(seed)
        self.server = server
        self.encoder = Encoder()

    def pick(self, values: list[Any]) -> Any:
        return self.random.choice(values)

    def odds(self, one_in: int) -> bool:
        return self.random.randrange(one_in) == 0

    def head(self) -> list[tuple[bytes, bytes]]:
        if self.server:
            if self.odds(8):
                fields = connect(self.pick([b"websocket", b"web socket", b""]))
            elif self.odds(2):
                fields = request(self.pick([b"GET", b"POST", b"HEAD"]))
            else:
                fields = request(self.pick(METHODS), self.pick(PATHS), self.pick(AUTHORITIES))
        else:
            fields = response(self.pick([200, 200, 200, 204, 304, 103, 100, 101, 404]))
        if self.odds(6):
            del fields[self.random.randrange(len(fields))]
        return fields

    def fields(self) -> list[tuple[bytes, bytes]]:
        ordinary = self.odds(2)
        fields = [] if self.odds(3) else self.head()
        for _ in range(self.random.randrange(4)):
            one = (b"x-name", b"v") if ordinary else (self.pick(NAMES), self.pick(VALUES))
            fields.insert(len(fields) if self.odds(2) or ordinary else self.random.randrange(len(fields) + 1), one)
        return fields

    def block(self, fields: list[tuple[bytes, bytes]]) -> bytes:
        made = compressed(fields, self.encoder) if self.odds(2) else block(fields)
        if self.odds(12):
            made = self.pick([indexed(70), b"\x20", b"\x80", b"\x3f\xe1\x1f"]) + made
        if self.odds(30):
            made = made[:-1]
        return made

    def section(self, sid: int) -> bytes:
        made = self.block(self.fields())
        cuts = sorted(self.random.randrange(len(made) + 1) for _ in range(self.pick([0, 0, 0, 1, 3])))
        pad = self.pick([None, None, None, 0, 9])
        order = (self.pick([0, 3, sid]), 16) if self.odds(8) else None
        return headers(sid, made, self.odds(2), end_headers=not self.odds(25), cuts=cuts, pad=pad, priority=order)

    def content(self, sid: int) -> bytes:
        size = self.pick([0, 1, 2, 3, 5, 100, 16000])
        return data(sid, bytes(97 + n % 26 for n in range(size)), self.odds(3), self.pick([None, None, None, 0, 5]))

    def control(self) -> bytes:
        sid = self.pick(SIDS)
        made: list[bytes] = [
            ping(),
            settings(),
            settings(ack=True),
            settings({INITIAL_WINDOW_SIZE: self.pick([0, 100, 70000, 1 << 31])}),
            settings({MAX_CONCURRENT_STREAMS: 5, HEADER_TABLE_SIZE: self.pick([0, 100, 4096, 1 << 20])}),
            settings({MAX_FRAME_SIZE: self.pick([16384, 20000, 100])}),
            settings({ENABLE_CONNECT_PROTOCOL: self.pick([0, 1, 2])}),
            priority(sid, self.pick(SIDS)),
            window_update(self.pick([0, sid]), self.pick([1, 1000, 0, 0x7FFFFFFF])),
            rst_stream(sid, self.pick([0, 7, 8, 99])),
            goaway(self.pick([0, 1, 2, 0x7FFFFFFF]), self.pick([0, 2])),
            frame(self.pick([0xA, 0x10, 0x77]), self.pick([0, sid]), b"\0\0\0\x01u=1"),
            continuation(sid, b"", True),
            push_promise(sid, 2, request()),
            frame(self.random.randrange(10), sid, b"\0" * self.random.randrange(12), self.random.randrange(256)),
        ]
        return self.pick(made)

    def wire(self) -> list[bytes]:
        frames = []
        if self.server:
            for sid in (1, 3, 5, 7)[: self.random.randrange(5)]:
                frames.append(headers(sid, self.block(self.head()), self.odds(3)))
        for _ in range(self.random.randrange(8)):
            sid = self.pick(SIDS)
            frames.append(
                self.pick([self.section, self.content, self.content])(sid) if self.odds(2) else self.control()
            )
            if self.odds(2):
                frames.append(self.content(sid))
        return frames

    def mutated(self, frames: list[bytes]) -> list[bytes]:
        frames = list(frames)
        for _ in range(self.random.randrange(1, 4)):
            if not frames:
                break
            at = self.random.randrange(len(frames))
            one = bytearray(frames[at]) or bytearray(9)
            kind = self.random.randrange(6)
            if kind == 0:
                one[self.random.randrange(len(one))] ^= 1 << self.random.randrange(8)
            elif kind == 1:
                one[self.random.randrange(min(9, len(one)))] = self.random.randrange(256)
            elif kind == 2:
                del one[self.random.randrange(len(one)) :]
            elif kind == 3:
                frames.insert(at, bytes(one))
            elif kind == 4:
                frames.insert(self.random.randrange(len(frames)), bytes(one))
            elif one:
                one[self.random.randrange(len(one)) :] = self.random.randbytes(3)
            frames[at] = bytes(one)
        return frames


def comparable(wire: bytes) -> bytes:
    """As far as what comes of it is the same at any time. Not what follows a GOAWAY: with no stream left the connection
    is over as soon as we have written, so whether it is read depends on the cuts. Nor what is no complete frame at the
    end, nor an open header block: libnghttp2 looks at what is there."""
    at = block_at = 0
    in_block = False
    while len(wire) - at >= 9:
        length = int.from_bytes(wire[at : at + 3], "big")
        if length > 16384:
            return wire
        if at + 9 + length > len(wire):
            break
        kind, flags = wire[at + 3], wire[at + 4]
        if kind == HEADERS and not in_block:
            block_at = at
        if kind in (HEADERS, CONTINUATION):
            in_block = not flags & END_HEADERS
        at += 9 + length
        if kind == GOAWAY:
            break
    return wire[:block_at] if in_block else wire[:at]


def has_wrong_window_update(frames: bytes) -> bool:
    """Of a stream. On one that is just being reset it may end the connection or be ignored."""
    at = 0
    while len(frames) - at >= 13:
        kind, sid, increment = frames[at + 3], frames[at + 5 : at + 9], int.from_bytes(frames[at + 9 : at + 13], "big")
        if kind == WINDOW_UPDATE and any(sid) and not 0 < increment & 0x7FFFFFFF < 1 << 30:
            return True
        at += 9 + int.from_bytes(frames[at : at + 3], "big")
    return False


def run(engine: str, server: bool, wire: bytes, cuts: list[int]) -> dict[str, Any]:
    codec = open_codec(server, STRANGERS, engine=engine)
    codec.receive((PREFACE if server else b"") + settings() + settings(ack=True), 0.0)
    codec.to_send()
    if not server:
        for method in (b"GET", b"HEAD", b"POST", b"GET"):
            codec.request(Stream(method=method), request(method), True)
        codec.to_send()
    asked = dict(codec.streams)
    seen: dict[Stream, None] = dict.fromkeys(asked.values()) if not server else {}
    for start, end in pairwise([0, *cuts, len(wire)]):
        codec.receive(wire[start:end], 0.0)
        seen.update(dict.fromkeys(codec.take_news()))
        codec.to_send()
        seen.update(dict.fromkeys(codec.take_news()))
    error = codec.error
    return {
        "error": None if error is None else (error.code, error.limit),
        "streams": {stream.sid: told(stream) for stream in seen},
        "facts": (codec.peer_streams_max, codec.extended_connect, codec.closing, codec.pongs),
        "open": sorted(codec.streams),
    }


def told(stream: Stream) -> Any:
    """All that is handed on of a stream. Nothing is of one that was reset for its faults."""
    if stream.error is not None:
        return "error", int(stream.error), stream.by_peer, stream.refused
    if stream.status:
        return "answered", stream.status
    m = stream.m
    ends = (stream.ended, stream.closed, stream.by_peer)
    interim = [(one.status, one.headers) for one in stream.informational]
    if m is None:
        return "nothing", ends, interim
    message = {name: getattr(m, name) for name in FIELDS if name != "body"}
    return "accepted", ends, interim, message, b"".join(m.body)


def alike(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two runs agree, but for what the RFC leaves open."""
    ours, theirs = left["streams"], right["streams"]
    if any(one[0] == "answered" for one in ours.values()) != any(one[0] == "answered" for one in theirs.values()):
        # As below; what is still open then differs, and with it what later frames and a GOAWAY do.
        return complete(ours) == complete(theirs)
    if left["error"] is None and right["error"] is None:
        # A request that is malformed as well as not to be served may be reset or answered. Of two resets that cross
        # (ours for an error, the peer's or its GOAWAY) either may be told.
        both = {
            sid: (ours.get(sid, ("reset",)), theirs.get(sid, ("reset",)))
            for sid in {*ours, *theirs}
            if ours.get(sid) != theirs.get(sid)
        }
        for one, other in both.values():
            crossed = one[0] == other[0] == "error" and (any(one[2:]) or any(other[2:]))
            if "reset" in (one[0], other[0]):
                crossed = {one[0], other[0]} <= {"reset", "answered", "error"}
            if not crossed:
                return False
        return left["facts"] == right["facts"] and set(left["open"]) ^ set(right["open"]) <= set(both)
    if left["error"] is None or right["error"] is None:
        return False
    if left["error"] != right["error"] and not {left["error"][0], right["error"][0]} <= PERMITTED_CODES:
        return False
    # With the connection all streams end; only what was complete before has to be the same.
    return complete(ours) == complete(theirs)


def complete(streams: dict[int, Any]) -> dict[int, Any]:
    return {sid: one for sid, one in streams.items() if one[0] == "accepted" and one[1][0]}


# Of several faults in one frame either may be told; libnghttp2 decompresses a header block before all of it is here.
PERMITTED_CODES = {
    ErrorCode.PROTOCOL_ERROR,
    ErrorCode.FRAME_SIZE_ERROR,
    ErrorCode.FLOW_CONTROL_ERROR,
    ErrorCode.COMPRESSION_ERROR,
}


def check(seed: int) -> None:
    server = seed % 3 != 0
    maker = Maker(seed, server)
    frames = maker.wire()
    if seed % 2:
        frames = maker.mutated(frames)
    wire = comparable(b"".join(frames))
    cuts = sorted(maker.random.randrange(len(wire) + 1) for _ in range(maker.random.randrange(20)))
    if has_wrong_window_update(wire):
        return
    outcomes = {}
    for engine in ENGINES:
        whole = run(engine, server, wire, [])
        assert alike(run(engine, server, wire, cuts), whole), (seed, engine, cuts, wire, whole)
        if len(wire) < 400:
            bytewise = run(engine, server, wire, list(range(1, len(wire))))
            assert alike(bytewise, whole), (seed, engine, "bytewise", wire, whole)
        outcomes[engine] = whole
    assert alike(*outcomes.values()), (seed, wire, *outcomes.values())


@pytest.mark.parametrize("batch", range(10))
def test_engines_agree(batch: int) -> None:
    for seed in range(batch * 60, batch * 60 + 60):
        check(seed)


@pytest.mark.long
@pytest.mark.parametrize("batch", range(40))
def test_engines_agree_at_length(batch: int) -> None:
    for seed in range(1000 + batch * 1000, 2000 + batch * 1000):
        check(seed)
