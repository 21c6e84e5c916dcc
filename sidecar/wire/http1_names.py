"""What a header line means to a proxy, and what a Connection field says.

These are look-ups in bounded tables that fill themselves. Most lines were seen before, on this connection or another:
`accept-encoding: gzip`, `content-length: 36`. Such a line costs one dict look-up and no check, being the very bytes
that were checked before. Only fields that are alike for many senders are kept, never credentials.
A name in another spelling ('_' or any other punctuation for '-') is the same name to an application behind CGI or WSGI
(RFC 3875, section 4.1.18), so a special field in such a spelling is dropped, and a framing field in one refused.
Must not know messages. Invariant: a table's memory is bounded, whatever a peer sends.
"""

import re
from typing import NamedTuple

from .http1_guard import (
    LENGTH_DIGITS_MAX,
    LINE_BYTES_MAX,
    ProtocolError,
    is_token,
    match_status_line,
    match_usual_field,
    refuse_status_line,
    split_field,
)

ORDINARY = 0
HOST, CONTENT_LENGTH, TRANSFER_ENCODING, CONNECTION, EXPECT, UPGRADE = range(1, 7)
TRACEPARENT, ATTEMPT, DEADLINE, RETRIED, REASON = range(7, 12)
FORWARDED, DROPPED, REFUSED, COOKIE = range(12, 16)

_ENTRIES_MAX = 2048
_KEY_BYTES_MAX = 64
_CONNECTION_BYTES_MAX = 4096

_KINDS = {
    b"host": HOST,
    b"content-length": CONTENT_LENGTH,
    b"transfer-encoding": TRANSFER_ENCODING,
    b"connection": CONNECTION,
    b"expect": EXPECT,
    b"upgrade": UPGRADE,
    b"traceparent": TRACEPARENT,
    b"x-pillion-attempt": ATTEMPT,
    b"x-request-deadline-ms": DEADLINE,
    b"x-pillion-retried": RETRIED,
    b"x-pillion-reason": REASON,
    b"forwarded": FORWARDED,
    b"x-real-ip": FORWARDED,
    b"x-pillion-mirror": FORWARDED,  # an application may pass it on to what it calls for a copy
    b"x-forwarded-client-cert": DROPPED,
    # Hop-by-hop whether nominated or not (RFC 9110, section 7.6.1).
    b"keep-alive": DROPPED,
    b"proxy-connection": DROPPED,
    b"te": DROPPED,
    b"http2-settings": DROPPED,
    # Meant for the next proxy, which is this one (RFC 9110, section 11.7).
    b"proxy-authenticate": DROPPED,
    b"proxy-authorization": DROPPED,
    b"proxy-authentication-info": DROPPED,
}

# RFC 9110, section 6.5.1: nothing that frames, routes, authenticates, modifies the request or describes the content.
_NEVER_TRAILERS = frozenset(
    b"accept accept-charset accept-encoding accept-language age allow authorization cache-control content-disposition "
    b"content-encoding content-language content-location content-range content-type cookie cookie2 date expires from "
    b"if-match if-modified-since if-none-match if-range if-unmodified-since location max-forwards origin pragma range "
    b"referer retry-after set-cookie set-cookie2 strict-transport-security tracestate trailer user-agent vary via "
    b"warning www-authenticate x-http-method-override x-method-override x-original-host x-original-url "
    b"x-rewrite-url".split()
)

_punctuation = re.compile(rb"[^a-z0-9]")


def kind_of(name: bytes) -> int:
    kind = _KINDS.get(name)
    if kind is not None:
        return kind
    plain = _punctuation.sub(b"-", name)
    kind = _KINDS.get(plain)
    if kind is not None:
        return REFUSED if kind in (CONTENT_LENGTH, TRANSFER_ENCODING) else DROPPED
    if plain.startswith(b"x-pillion-"):
        return DROPPED
    if plain.startswith(b"x-forwarded-"):
        return FORWARDED if plain == name else DROPPED
    return ORDINARY


# Fields whose whole lines are kept: they repeat, and hold no secret.
COMMON = frozenset(
    b"accept accept-charset accept-encoding accept-language accept-ranges access-control-allow-origin age allow "
    b"cache-control connection content-encoding content-language content-length content-type date dnt expect host "
    b"keep-alive pragma priority server te transfer-encoding upgrade-insecure-requests user-agent vary via "
    b"x-content-type-options x-forwarded-proto x-frame-options x-pillion-attempt x-powered-by "
    b"x-request-deadline-ms".split()
)
_COMMON_LINE_BYTES_MAX = 160


class _Names(dict[bytes, tuple[bytes, int, bool]]):
    """Name as received, a token -> (lower-case name, kind, whether whole lines are kept)."""

    def __missing__(self, raw: bytes) -> tuple[bytes, int, bool]:
        if not is_token(raw):
            raise ProtocolError(400, "invalid character in a header name")
        name = raw.lower()
        entry = (name, COOKIE if name == b"cookie" else kind_of(name), name in COMMON)
        if len(raw) <= _KEY_BYTES_MAX:
            if len(self) >= _ENTRIES_MAX:
                self.clear()
            self[raw] = entry
        return entry


_NAMES = _Names()


def may_trail(name: bytes) -> bool:
    """Whether a field of this lower-case name may pass in a trailer section."""
    return kind_of(name) == ORDINARY and _punctuation.sub(b"-", name) not in _NEVER_TRAILERS


match_own_traceparent = re.compile(rb"traceparent: 00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}").fullmatch


class _Lines(dict[bytes, tuple[int, tuple[bytes, bytes]]]):
    """Header line -> (kind, (lower-case name, value)). Raises ProtocolError for a malformed one."""

    def __missing__(self, line: bytes) -> tuple[int, tuple[bytes, bytes]]:
        if match_own_traceparent(line):  # never seen before, in every request between sidecars
            return TRACEPARENT, (b"traceparent", line[13:])
        match = match_usual_field(line)
        raw, value = match.groups() if match is not None else split_field(line)
        name, kind, common = _NAMES[raw]
        entry = (kind, (name, value))
        if common and len(line) <= _COMMON_LINE_BYTES_MAX:
            if len(self) >= _ENTRIES_MAX:
                self.clear()
            self[line] = entry
        return entry


LINES = _Lines()


class Connection(NamedTuple):
    close: bool
    keep_alive: bool
    upgrade: bool
    nominated: frozenset[bytes]  # further names that go no further (RFC 9110, section 7.6.1)


class _Connections(dict[bytes, Connection]):
    """Value of all Connection fields, joined -> what it says."""

    def __missing__(self, value: bytes) -> Connection:
        if len(value) > _CONNECTION_BYTES_MAX:
            raise ProtocolError(400, "connection field too long")
        tokens = {token.strip(b" \t") for token in value.lower().split(b",")}
        entry = Connection(
            b"close" in tokens,
            b"keep-alive" in tokens,
            b"upgrade" in tokens,
            frozenset(tokens - {b"", b"close", b"keep-alive", b"upgrade", b"te", b"http2-settings"}),
        )
        if len(value) <= _KEY_BYTES_MAX:
            if len(self) >= _ENTRIES_MAX:
                self.clear()
            self[value] = entry
        return entry


CONNECTIONS = _Connections()


class _Lengths(dict[bytes, int]):
    """Value of a Content-Length field -> number. Raises ProtocolError for anything that is not plain digits."""

    def __missing__(self, value: bytes) -> int:
        if b"," in value:
            raise ProtocolError(400, "content-length repeated, or a list of lengths")
        if not value.isdigit() or len(value) > LENGTH_DIGITS_MAX:
            raise ProtocolError(400, "content-length is not a plain decimal number of reasonable length")
        if len(self) >= _ENTRIES_MAX:
            self.clear()
        self[value] = number = int(value)
        return number


LENGTHS = _Lengths()


class _Statuses(dict[bytes, tuple[int, bool]]):
    """Status line -> (status, whether it is HTTP/1.0). Raises ProtocolError for a malformed one."""

    def __missing__(self, line: bytes) -> tuple[int, bool]:
        match = match_status_line(line)
        if match is None or len(line) > LINE_BYTES_MAX:
            raise refuse_status_line(line[: LINE_BYTES_MAX + 1])
        entry = (int(match[2]), match[1] == b"0")
        if len(line) <= _KEY_BYTES_MAX:
            if len(self) >= _ENTRIES_MAX:
                self.clear()
            self[line] = entry
        return entry


STATUSES = _Statuses()
