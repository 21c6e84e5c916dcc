"""What the engine on `h2` does itself: frames as bytes, header blocks to fields, and the body that waits on a stream.

Must not know connections or streams' states. Invariants: what a header block may cost is bounded before it is paid.
"""

from collections import deque
from struct import pack

from hpack import Decoder, HPACKError, NeverIndexedHeaderTuple, OversizedHeaderListError

from .http2 import ErrorCode, Fields, Http2Error
from .http2_guard import SECTION_BYTES_MAX, SECTION_FIELDS_MAX

_PADDED, _PRIORITIZED = 0x8, 0x20
_LAST_SID = 0x7FFFFFFF
_STRING_BYTES_MAX = 65536  # one decoded name or value, as in libnghttp2
_SIZE_UPDATES_MAX = 16  # at the start of a block, where two make sense (RFC 7541, section 4.2)
_SECRET = frozenset({b"authorization", b"proxy-authorization"})
_COOKIE_BYTES = 20  # shorter ones could be guessed; as in libnghttp2


class Flow:
    """What a stream has besides what everyone may see: the body that waits, and how much content is to come."""

    __slots__ = ("chunks", "end", "expected", "got", "queued", "sent_end", "trailers")

    def __init__(self) -> None:
        self.chunks: deque[bytes] = deque()
        self.queued = 0
        self.end = False
        self.trailers: Fields | None = None
        self.sent_end = False  # the last frame is with h2
        self.expected: int | None = None
        self.got = 0

    def take(self, size: int) -> bytes:
        chunks, parts = self.chunks, []
        self.queued -= size
        while size:
            chunk = chunks.popleft()
            if len(chunk) > size:
                chunks.appendleft(chunk[size:])
                chunk = chunk[:size]
            parts.append(chunk)
            size -= len(chunk)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Sections:
    """Header blocks of one connection -> fields, in the order in which they came."""

    def __init__(self) -> None:
        self._decoder = Decoder(SECTION_BYTES_MAX)

    def decode(self, block: bytes) -> Fields:
        """Raises Http2Error: the table is lost then, and the connection with it."""
        if block and block[0] & 0xE0 == 0x20:
            _check_size_updates(block)
        try:
            fields: Fields = list(self._decoder.decode(block, raw=True))
        except OversizedHeaderListError:
            raise _oversized() from None
        except HPACKError as exc:
            raise Http2Error(ErrorCode.COMPRESSION_ERROR, f"header block ({type(exc).__name__})") from None
        if len(fields) > SECTION_FIELDS_MAX:
            raise _oversized()
        if any(len(name) > _STRING_BYTES_MAX or len(value) > _STRING_BYTES_MAX for name, value in fields):
            raise Http2Error(ErrorCode.COMPRESSION_ERROR, "header block (a string too long)")
        return fields


def _oversized() -> Http2Error:
    return Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "header section far over the limits", "header_section")


def _check_size_updates(block: bytes) -> None:
    """Changes of the table's size cost the peer one byte each."""
    at = count = 0
    while at < len(block) and block[at] & 0xE0 == 0x20:
        count += 1
        if count > _SIZE_UPDATES_MAX:
            raise Http2Error(ErrorCode.COMPRESSION_ERROR, "changes of the table's size without end")
        at += 1
        if block[at - 1] & 0x1F == 0x1F:  # an integer of more bytes: RFC 7541, section 5.1
            while at < len(block) and block[at] & 0x80:
                at += 1
            at += 1


def frame_bytes(kind: int, flags: int, sid: int, payload: bytes) -> bytes:
    return pack(">IBI", len(payload) << 8 | kind, flags, sid) + payload


def split(wire: bytes) -> list[bytes]:
    """Whole frames."""
    frames, at = [], 0
    while at < len(wire):
        end = at + 9 + int.from_bytes(wire[at : at + 3], "big")
        frames.append(wire[at:end])
        at = end
    return frames


def unpadded(flags: int, payload: bytes, sid: int, headers: bool) -> bytes:
    """The payload of DATA or HEADERS without padding and priority (RFC 9113, sections 6.1 and 6.2). `sid`: of a
    stream that HEADERS opens."""
    at, end = 0, len(payload)
    if flags & _PADDED:
        if not payload:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "no room for the length of the padding")
        at, end = 1, end - payload[0]
    if headers and flags & _PRIORITIZED:
        if len(payload) < at + 5:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "HEADERS too short for its priority")
        if sid and int.from_bytes(payload[at : at + 4], "big") & _LAST_SID == sid:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "a stream that depends on itself")
        at += 5
    if end < at:
        raise Http2Error(ErrorCode.PROTOCOL_ERROR, "padding longer than the frame")
    return payload[at:end]


def guarded(fields: Fields) -> Fields:
    """Credentials stay out of the compression's tables (RFC 7541, section 7.1.3)."""
    return [
        NeverIndexedHeaderTuple(*field)
        if field[0] in _SECRET or (field[0] == b"cookie" and len(field[1]) < _COOKIE_BYTES)
        else field
        for field in fields
    ]
