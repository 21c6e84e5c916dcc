"""From the raw bytes of one complete head to a Message: fields sorted, framing decided, host and target checked.

Pure: a head goes in, a Message or a ProtocolError comes out. Must not know connections, or which response belongs to
which request: that is the codec's. Invariant: whatever makes the length of a message ambiguous is refused here
(RFC 9112, section 6.3; RFC 9110, section 8.6), so nothing behind it ever has to choose.
"""

import re

from .http1_guard import (
    FIELDS_MAX,
    LINE_BYTES_MAX,
    ProtocolError,
    first_fault,
    match_request_line,
    refuse_request_line,
    split_field,
)
from .http1_message import Message
from .http1_names import (
    ATTEMPT,
    CONNECTION,
    CONNECTIONS,
    CONTENT_LENGTH,
    COOKIE,
    DEADLINE,
    EXPECT,
    FORWARDED,
    HOST,
    LENGTHS,
    LINES,
    REASON,
    REFUSED,
    RETRIED,
    STATUSES,
    TRACEPARENT,
    TRANSFER_ENCODING,
    UPGRADE,
    kind_of,
    may_trail,
)
from .target import HOST_KEYS, split_target

is_traceparent = re.compile(
    rb"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
).fullmatch  # W3C Trace Context, section 3.2.2
_is_reason = re.compile(rb"[a-z_]{1,40}").fullmatch
_is_upgrade = re.compile(rb"[a-z0-9!#$%&'*+.^_`|~/-]+").fullmatch
ATTEMPT_DIGITS_MAX = 3
DEADLINE_DIGITS_MAX = 9


def request_head(head: bytes, fields_max: int) -> Message:
    """The request with this head, which ends with its last line's text: the CRLF CRLF is cut off."""
    lines = head.split(b"\r\n")
    if not lines[0]:  # one empty line is skipped (RFC 9112, section 2.2)
        del lines[0]
    first = lines[0] if lines else b""
    line = match_request_line(first)
    if line is None or len(first) > LINE_BYTES_MAX:
        raise refuse_request_line(first[: LINE_BYTES_MAX + 1])
    m = Message()
    m.method, m.target, minor = method, target, _ = line.groups()
    if minor == b"0":
        m.http10 = True
        m.keep_alive = False
    found = _read_fields(m, lines, fields_max)
    host = found.get(HOST)
    if host is not None:
        m.host = host
        m.host_key = HOST_KEYS[host]
    elif not m.http10:
        raise ProtocolError(400, "host is missing")
    if target[0] == 47 and method != b"CONNECT":  # "/"
        m.path = target
    else:
        m.form, m.path, authority = split_target(method, target)
        if authority is not None:  # it wins over Host (RFC 9112, section 3.2.2)
            m.host = authority
            m.host_key = HOST_KEYS[authority]
    if len(found) > 1 or host is None:
        _request_rules(m, found)
    m.head = True
    return m


def _request_rules(m: Message, found: dict[int, bytes]) -> None:
    """What the fields of a request may not say together."""
    method = m.method
    if (method == b"CONNECT" or method == b"TRACE") and (m.chunked or m.length):  # RFC 9110, sections 9.3.6 and 9.3.8
        raise ProtocolError(400, "content in a request whose method has none")
    if EXPECT in found:
        if found[EXPECT].lower() != b"100-continue":
            raise ProtocolError(417, "expectation other than 100-continue")
        m.expect_continue = not m.http10 and (m.chunked or bool(m.length))  # RFC 9110, section 10.1.1
    if method == b"CONNECT":
        m.upgrade = None
    m.reason = None


def response_head(head: bytes, fields_max: int) -> Message:
    """The response with this head; whether a body follows depends on the request."""
    lines = head.split(b"\r\n")
    m = Message()
    m.status, http10 = STATUSES[lines[0]]
    if http10:
        m.http10 = True
        m.keep_alive = False
    _read_fields(m, lines, fields_max)
    m.head = True
    return m


def _read_fields(m: Message, lines: list[bytes], fields_max: int) -> dict[int, bytes]:
    """Sort the fields: ordinary ones to `headers`, forwarding ones to `forwarded`; then do what the others say.

    Repeated ones are joined by a comma (RFC 9110, section 5.3), which no field that must be single survives.
    """
    if len(lines) > fields_max + 1:
        raise first_fault(lines, ProtocolError(431, "too many header fields"))
    found: dict[int, bytes] = {}
    between = False  # fields between sidecars
    add = m.headers.append
    rest = iter(lines)
    next(rest)
    try:
        for line in rest:
            kind, field = LINES[line]
            if not kind:
                add(field)
            elif kind < FORWARDED:
                found[kind] = found[kind] + b"," + field[1] if kind in found else field[1]
                if kind >= TRACEPARENT:
                    between = True
            elif kind == FORWARDED:
                m.forwarded.append(field)
            elif kind == COOKIE:
                add_cookie(m.headers, field)
            elif kind == REFUSED:
                raise ProtocolError(400, "framing field in an odd spelling")
    except ProtocolError as exc:
        raise first_fault(lines, exc) from None
    if CONNECTION in found:
        _connection(m, found)
    if TRANSFER_ENCODING in found:
        _transfer_coding(m, found)
    elif CONTENT_LENGTH in found:
        m.length = LENGTHS[found[CONTENT_LENGTH]]
    if between:
        read_specials(m, found)
    return found


def add_cookie(headers: list[tuple[bytes, bytes]], field: tuple[bytes, bytes]) -> None:
    """One field, as over HTTP/2 (RFC 9113, section 8.2.3): some applications join several by a comma, or take one."""
    for at, (name, value) in enumerate(headers):
        if name == b"cookie":
            headers[at] = (name, value + b"; " + field[1])
            return
    headers.append(field)


def _transfer_coding(m: Message, found: dict[int, bytes]) -> None:
    if CONTENT_LENGTH in found:
        raise ProtocolError(400, "content-length and transfer-encoding in one message")
    if m.http10:
        raise ProtocolError(400, "transfer-encoding in HTTP/1.0")
    if found[TRANSFER_ENCODING].lower() != b"chunked":
        raise ProtocolError(400, "transfer-encoding is not exactly chunked")
    m.chunked = True


def _connection(m: Message, found: dict[int, bytes]) -> None:
    close, keep_alive, upgrade, nominated = CONNECTIONS[found[CONNECTION]]
    if close:
        m.keep_alive = False
    elif m.http10:
        m.keep_alive = keep_alive
    if upgrade and not m.http10 and UPGRADE in found:
        m.upgrade = _upgrade(found[UPGRADE])
    if nominated:
        _strip(m, found, nominated)


def _upgrade(value: bytes) -> bytes | None:
    """Lower-case tokens; h2c is never passed on (the upgrade to it is obsolete: RFC 9113, section 3.1)."""
    tokens = [token.strip(b" \t") for token in value.lower().split(b",")]
    return b", ".join(token for token in tokens if token != b"h2c" and _is_upgrade(token)) or None


def _strip(m: Message, found: dict[int, bytes], nominated: frozenset[bytes]) -> None:
    """What Connection nominates goes no further. Host and framing cannot be nominated away: they are remade here."""
    m.headers[:] = [field for field in m.headers if field[0] not in nominated]
    m.forwarded[:] = [field for field in m.forwarded if field[0] not in nominated]
    for name in nominated:
        kind = kind_of(name)
        if TRACEPARENT <= kind < FORWARDED:
            found.pop(kind, None)


def read_specials(m: Message, found: dict[int, bytes]) -> None:
    """Fields between sidecars. Nonsense counts as absent."""
    value = found.get(TRACEPARENT)
    if value is not None:
        if is_traceparent(value):
            m.traceparent = value
        else:  # the state belongs to the parent that is gone
            m.headers[:] = [field for field in m.headers if field[0] != b"tracestate"]
    value = found.get(ATTEMPT)
    if value is not None and value.isdigit() and len(value) <= ATTEMPT_DIGITS_MAX:
        m.attempt = int(value)
    value = found.get(DEADLINE)
    if value is not None and value.isdigit() and len(value) <= DEADLINE_DIGITS_MAX:
        m.deadline_ms = float(value)
    m.exhausted = found.get(RETRIED) == b"exhausted"
    value = found.get(REASON)
    if value is not None and _is_reason(value):
        m.reason = value


def trailer_fields(section: bytes) -> list[tuple[bytes, bytes]]:
    """The fields of a trailer section that may pass; the others are dropped silently (RFC 9110, section 6.5.1).

    One that frames is refused: somebody on the way might merge it into the head.
    """
    lines = section.split(b"\r\n")
    if len(lines) > FIELDS_MAX:
        raise first_fault(lines, ProtocolError(431, "too many trailer fields"))
    try:
        fields = [(raw.lower(), value) for raw, value in map(split_field, lines)]
    except ProtocolError as exc:
        raise first_fault(lines, exc) from None
    for name, _ in fields:
        if kind_of(name) in (CONTENT_LENGTH, TRANSFER_ENCODING, REFUSED):
            raise ProtocolError(400, "framing field among the trailers")
    return [field for field in fields if may_trail(field[0])]
