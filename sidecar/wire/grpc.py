"""What gRPC writes into the fields and the content of HTTP/2 (gRPC over HTTP/2, PROTOCOL-HTTP2.md).

Content type, deadline, status, status message and the framing of messages. Pure. Must not know streams or policy.
Invariants: what does not parse counts as absent, since it is the application's; what is written fits into a field.
"""

import re
from collections.abc import Iterable
from urllib.parse import unquote_to_bytes

_is_grpc = re.compile(rb"application/grpc(?:[+;][!-~ ]*)?", re.IGNORECASE).fullmatch
_match_timeout = re.compile(rb"([0-9]{1,8})([HMSmun])").fullmatch
_NS_OF = {b"H": 3_600_000_000_000, b"M": 60_000_000_000, b"S": 1_000_000_000, b"m": 1_000_000, b"u": 1000, b"n": 1}
_UNITS = ((b"n", 1), (b"u", 1000), (b"m", 1_000_000), (b"S", 1_000_000_000), (b"M", 60_000_000_000))
_TIMEOUT_MAX = 99_999_999
_STATUS_MAX = 16
_MESSAGE_BYTES_MAX = 1024
_escape = re.compile(rb"[^ -$&-~]|^ | $").sub  # outer spaces no field can have (RFC 9113, section 8.2.1)

PREFIX_BYTES = 5
"""What stands before each message: whether it is compressed (1 byte), and its length (4 bytes)."""


def is_grpc(content_type: bytes) -> bool:
    """Whether a content-type is gRPC's own (gRPC-Web is another protocol)."""
    return content_type == b"application/grpc" or _is_grpc(content_type) is not None


def read_timeout_ms(value: bytes) -> float | None:
    """`grpc-timeout` in milliseconds, not rounded: neither cut to nothing nor made longer; None if it is malformed."""
    match = _match_timeout(value)
    if match is None:
        return None
    return int(match[1]) * _NS_OF[match[2]] / 1_000_000


def read_status(value: bytes) -> int | None:
    """`grpc-status`: None if it is no number; one that nobody has defined counts as UNKNOWN (2)."""
    if not value.isdigit() or len(value) > 3:
        return None
    status = int(value)
    return status if status <= _STATUS_MAX else 2


def read_pushback_ms(fields: Iterable[tuple[bytes, bytes]]) -> int | None:
    """`grpc-retry-pushback-ms` among these fields (gRFC A6): after how long the server wants to be asked again. None:
    it does not say. Negative, or not understood: it does not want to be asked again (-1)."""
    for name, value in fields:
        if name == b"grpc-retry-pushback-ms":
            return int(value) if value.isdigit() and len(value) <= 10 else -1
    return None


def write_timeout(left_s: float) -> bytes:
    """`grpc-timeout` for so many seconds, in the finest unit whose digits do; rounded down, never negative."""
    if 0.1 <= left_s < 99.0:
        return b"%du" % int(left_s * 1e6)
    left_ns = max(int(left_s * 1e9), 0)
    for unit, size_ns in _UNITS:
        amount = left_ns // size_ns
        if amount <= _TIMEOUT_MAX:
            return b"%d%b" % (amount, unit)
    return b"%dH" % min(left_ns // _NS_OF[b"H"], _TIMEOUT_MAX)


def write_message(text: str) -> bytes:
    """`grpc-message`: percent-encoded UTF-8, no more than a field can well hold; a cut never splits a character."""
    data = text.encode("utf-8", "replace")[:_MESSAGE_BYTES_MAX].decode("utf-8", "ignore").encode()
    return _escape(lambda found: b"%%%02X" % found[0][0], data)


def read_message(value: bytes) -> str:
    """The text of a `grpc-message`; what is not encoded correctly stays as it is."""
    return unquote_to_bytes(value).decode("utf-8", "replace")


def frame(message: bytes) -> bytes:
    """One uncompressed message, as it stands in the content."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def first_message(content: bytes) -> bytes | None:
    """The first message of a content; None while it is not complete. Raises ValueError if it is compressed, which
    nobody has asked for."""
    if len(content) < PREFIX_BYTES:
        return None
    if content[0]:
        raise ValueError("a compressed message")
    end = PREFIX_BYTES + int.from_bytes(content[1:PREFIX_BYTES], "big")
    return content[PREFIX_BYTES:end] if len(content) >= end else None
