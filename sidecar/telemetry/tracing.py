"""Trace context (W3C, https://www.w3.org/TR/trace-context/) and request ids.

Makes and reads `traceparent`, passes it on with a new span id, makes request ids. Pure: chance comes as `getrandbits`
(random.getrandbits or a seeded one). Must not know messages; the caller hands in header values.
Invariant: what these functions return is always valid and never longer than its fixed form.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

GetRandBits = Callable[[int], int]

REQUEST_ID_BYTES_MAX = 128

_SAMPLED = 0x01
_RANDOM = 0x02  # level 2: the trace id was made at random

# Section 3.2: lower-case hexadecimal only; ids of zeros and version ff are invalid. Version 00 has exactly this
# length; higher versions may go on after another dash.
_IDS = rb"-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
_TRACEPARENT = re.compile(rb"00%b|(?!00|ff)[0-9a-f]{2}%b(?:-.*)?" % (_IDS, _IDS))
_FLAGS = tuple(b"%02x" % (flags & (_SAMPLED | _RANDOM)) for flags in range(256))
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,%d}" % REQUEST_ID_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class Trace:
    """A parsed traceparent: lower-case hexadecimal ids, and the flags that this version knows."""

    trace_id: bytes
    span_id: bytes
    flags: int

    @property
    def sampled(self) -> bool:
        return bool(self.flags & _SAMPLED)


def parse_traceparent(value: bytes) -> Trace | None:
    """None where the value is invalid; `tracestate` must then be dropped too (section 3.3)."""
    if _TRACEPARENT.fullmatch(value) is None:
        return None
    return Trace(value[3:35], value[36:52], int(value[53:55], 16) & (_SAMPLED | _RANDOM))


def make_traceparent(getrandbits: GetRandBits, *, sampled: bool = False) -> bytes:
    """A new trace. The trace id's 16 bytes are random, and the flags say so."""
    flags = _RANDOM | (_SAMPLED if sampled else 0)
    return b"00-%032x-%016x-%02x" % (getrandbits(128) or 1, getrandbits(64) or 1, flags)


def next_traceparent(value: bytes, getrandbits: GetRandBits) -> bytes | None:
    """The same trace with a new parent id, for the next hop. None where `value` is invalid: make a new one then.

    Always version 00, the version that is spoken here (section 3.2.4: parse as known, set unknown flags to 0)."""
    match = _TRACEPARENT.fullmatch(value)
    if match is None:
        return None
    return b"00-%b-%016x-%b" % (value[3:35], getrandbits(64) or 1, _FLAGS[int(value[53:55], 16)])


def trace_id_of(traceparent: bytes) -> bytes:
    """The trace id of a value that these functions made or accepted; a slice, for the hot path."""
    return traceparent[3:35]


def make_request_id(getrandbits: GetRandBits) -> bytes:
    """A UUID of version 4 (RFC 9562, section 5.4)."""
    bits = getrandbits(128) & ~(0xF << 76) & ~(0x3 << 62) | (0x4 << 76) | (0x2 << 62)
    text = b"%032x" % bits
    return b"-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def accept_request_id(value: bytes) -> bool:
    """Whether a request id from outside may be used as it is: short, and of characters harmless in any log."""
    return _REQUEST_ID.fullmatch(value) is not None
