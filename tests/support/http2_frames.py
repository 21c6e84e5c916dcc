"""HTTP/2 frames by hand: any frame, well-formed or not, and a parser of what a peer sends back.

Nothing here goes through an HTTP/2 library, but for HPACK's tables (package hpack). `frame` makes whatever is asked of
it; the functions named after the types make correct frames unless told otherwise. A stream of frames is `bytes`: add
them up.

    wire = PREFACE + settings() + headers(1, request(path=b"/x"), end=True)
    for f in Parser().feed(answer): ...
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from struct import pack, unpack

from hpack import Decoder, Encoder

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
NAMES = (
    "DATA", "HEADERS", "PRIORITY", "RST_STREAM", "SETTINGS", "PUSH_PROMISE", "PING", "GOAWAY", "WINDOW_UPDATE",
    "CONTINUATION",
)  # fmt: skip

END_STREAM, ACK, END_HEADERS, PADDED, PRIORITIZED = 0x1, 0x1, 0x4, 0x8, 0x20

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = (
    range(1, 7)
)
ENABLE_CONNECT_PROTOCOL = 8

Fields = list[tuple[bytes, bytes]]


# -- making frames


def frame(kind: int, sid: int = 0, payload: bytes = b"", flags: int = 0, length: int | None = None) -> bytes:
    """Any frame. `length`: what the header says, if not the truth. `sid` may have the reserved bit set."""
    told = len(payload) if length is None else length
    return pack(">I", told)[1:] + pack(">BBI", kind, flags, sid) + payload


def data(sid: int, payload: bytes = b"", end: bool = False, pad: int | None = None) -> bytes:
    """`pad`: bytes of padding; None leaves the PADDED flag off."""
    flags = END_STREAM if end else 0
    if pad is not None:
        payload = bytes([pad]) + payload + bytes(pad)
        flags |= PADDED
    return frame(DATA, sid, payload, flags)


def block(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """An HPACK block that depends on no state and leaves none: literals, never indexed or Huffman-coded."""
    return b"".join(literal(name, value) for name, value in fields)


def literal(name: bytes, value: bytes, first: int = 0x10) -> bytes:
    """One literal field with a literal name. `first`: 0x40 puts it into the dynamic table, 0x00 leaves it out, 0x10
    forbids that it ever gets in (RFC 7541, section 6.2)."""
    return bytes([first]) + integer(len(name), 7) + name + integer(len(value), 7) + value


def integer(value: int, prefix: int, first: int = 0, zeros: int = 0) -> bytes:
    """RFC 7541, section 5.1. `first`: the bits above the prefix; `zeros`: superfluous bytes that add nothing."""
    top = (1 << prefix) - 1
    if value < top:
        return bytes([first | value])
    out = bytearray([first | top])
    value -= top
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    if zeros:
        out.append(value | 128)
        out += b"\x80" * (zeros - 1) + b"\x00"
    else:
        out.append(value)
    return bytes(out)


def indexed(index: int) -> bytes:
    """A field from the tables (RFC 7541, section 6.1)."""
    return integer(index, 7, 0x80)


def compressed(fields: Iterable[tuple[bytes, bytes]], encoder: Encoder | None = None) -> bytes:
    """An HPACK block as libraries make it, with the dynamic table and Huffman coding."""
    return (encoder or Encoder()).encode(list(fields))


def request(
    method: bytes = b"GET",
    path: bytes = b"/",
    authority: bytes = b"app.test",
    scheme: bytes = b"http",
    more: Iterable[tuple[bytes, bytes]] = (),
) -> Fields:
    return [(b":method", method), (b":scheme", scheme), (b":path", path), (b":authority", authority), *more]


def connect(protocol: bytes = b"websocket", path: bytes = b"/", authority: bytes = b"app.test") -> Fields:
    """An extended CONNECT (RFC 8441, section 4)."""
    return [
        (b":method", b"CONNECT"),
        (b":protocol", protocol),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", authority),
    ]


def response(status: int = 200, more: Iterable[tuple[bytes, bytes]] = ()) -> Fields:
    return [(b":status", b"%d" % status), *more]


def headers(
    sid: int,
    fields: Iterable[tuple[bytes, bytes]] | bytes,
    end: bool = False,
    *,
    end_headers: bool = True,
    pad: int | None = None,
    priority: tuple[int, int] | None = None,
    cuts: Iterable[int] = (),
) -> bytes:
    """HEADERS, and CONTINUATIONs where the block is cut. `fields`: a block is taken as it is. `priority`: (stream it
    depends on, weight). `end_headers`: False leaves the header block open."""
    whole = fields if isinstance(fields, bytes) else block(fields)
    edges = [0, *cuts, len(whole)]
    parts = [whole[a:b] for a, b in pairwise(edges)]
    flags = END_STREAM if end else 0
    first = parts[0]
    if priority is not None:
        first = pack(">IB", *priority) + first
        flags |= PRIORITIZED
    if pad is not None:
        first = bytes([pad]) + first + bytes(pad)
        flags |= PADDED
    if end_headers and len(parts) == 1:
        flags |= END_HEADERS
    out = frame(HEADERS, sid, first, flags)
    for number, part in enumerate(parts[1:], 2):
        out += continuation(sid, part, end_headers and number == len(parts))
    return out


def continuation(sid: int, fragment: bytes = b"", end_headers: bool = False) -> bytes:
    return frame(CONTINUATION, sid, fragment, END_HEADERS if end_headers else 0)


def priority(sid: int, depends_on: int = 0, weight: int = 15) -> bytes:
    return frame(PRIORITY, sid, pack(">IB", depends_on, weight))


def rst_stream(sid: int, code: int = 8) -> bytes:
    return frame(RST_STREAM, sid, pack(">I", code))


def settings(values: dict[int, int] | list[tuple[int, int]] | None = None, ack: bool = False) -> bytes:
    pairs = values.items() if isinstance(values, dict) else values or ()
    return frame(SETTINGS, 0, b"".join(pack(">HI", key, value) for key, value in pairs), ACK if ack else 0)


def push_promise(sid: int, promised: int, fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    return frame(PUSH_PROMISE, sid, pack(">I", promised) + block(fields), END_HEADERS)


def ping(opaque: bytes = bytes(8), ack: bool = False) -> bytes:
    return frame(PING, 0, opaque, ACK if ack else 0)


def goaway(last: int = 0, code: int = 0, debug: bytes = b"") -> bytes:
    return frame(GOAWAY, 0, pack(">II", last, code) + debug)


def window_update(sid: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, sid, pack(">I", increment))


# -- reading frames


@dataclass(frozen=True)
class Frame:
    """One frame as it came. `fields`: of a header section, with the frame that ends it."""

    kind: int
    flags: int
    sid: int
    payload: bytes
    fields: Fields = field(default_factory=list)

    @property
    def name(self) -> str:
        return NAMES[self.kind] if self.kind < len(NAMES) else f"type {self.kind:#x}"

    @property
    def end_stream(self) -> bool:
        return self.kind in (DATA, HEADERS) and bool(self.flags & END_STREAM)

    @property
    def ack(self) -> bool:
        return self.kind in (SETTINGS, PING) and bool(self.flags & ACK)

    @property
    def data(self) -> bytes:
        """A DATA frame's content without padding."""
        return self.payload[1 : len(self.payload) - self.payload[0]] if self.flags & PADDED else self.payload

    @property
    def code(self) -> int:
        """Of RST_STREAM and GOAWAY."""
        return int.from_bytes(self.payload[:4] if self.kind == RST_STREAM else self.payload[4:8], "big")

    @property
    def last(self) -> int:
        """The last stream that a GOAWAY names."""
        return int.from_bytes(self.payload[:4], "big") & 0x7FFFFFFF

    @property
    def increment(self) -> int:
        return int.from_bytes(self.payload[:4], "big") & 0x7FFFFFFF

    @property
    def settings(self) -> dict[int, int]:
        return dict(unpack(">HI", self.payload[i : i + 6]) for i in range(0, len(self.payload), 6))

    def __str__(self) -> str:
        return f"{self.name} flags={self.flags:#x} stream={self.sid} {self.payload[:40]!r}"


class Parser:
    """What a peer sends -> Frames; carries the dynamic table, so give it all of a connection, in order. `preface`:
    the peer is a client."""

    def __init__(self, preface: bool = False) -> None:
        self._rest = b""
        self._preface = preface
        self._decoder = Decoder()
        self._decoder.max_header_list_size = 1 << 24
        self._section = b""

    @property
    def rest(self) -> bytes:
        """What is no whole frame yet."""
        return self._rest

    def feed(self, received: bytes) -> list[Frame]:
        wire = self._rest + received
        if self._preface:
            if len(wire) < len(PREFACE):
                self._rest = wire
                return []
            assert wire.startswith(PREFACE), wire[:40]
            wire = wire[len(PREFACE) :]
            self._preface = False
        frames, at = [], 0
        while len(wire) - at >= 9:
            end = at + 9 + int.from_bytes(wire[at : at + 3], "big")
            if end > len(wire):
                break
            kind, flags, sid = unpack(">BBI", wire[at + 3 : at + 9])
            frames.append(self._frame(kind, flags, sid & 0x7FFFFFFF, wire[at + 9 : end]))
            at = end
        self._rest = wire[at:]
        return frames

    def _frame(self, kind: int, flags: int, sid: int, payload: bytes) -> Frame:
        if kind not in (HEADERS, CONTINUATION):
            return Frame(kind, flags, sid, payload)
        part = payload
        if kind == HEADERS:
            if flags & PADDED:
                part = part[1 : len(part) - part[0]]
            if flags & PRIORITIZED:
                part = part[5:]
        self._section += part
        if not flags & END_HEADERS:
            return Frame(kind, flags, sid, payload)
        section, self._section = self._section, b""
        fields = [(bytes(name), bytes(value)) for name, value in self._decoder.decode(section, raw=True)]
        return Frame(kind, flags, sid, payload, fields)


def parse(wire: bytes, preface: bool = False) -> list[Frame]:
    """All frames of a connection's bytes; nothing may be left over."""
    parser = Parser(preface)
    frames = parser.feed(wire)
    assert not parser.rest, parser.rest[:40]
    return frames
