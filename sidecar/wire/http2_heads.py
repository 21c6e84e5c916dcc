"""From the fields of HTTP/2 to Messages and back: pseudo-fields, what may not be there, what is remade for each hop.

Pure, and the same for both engines. A received section becomes a Message, or raises `Malformed` (RFC 9113, section
8.1.1: a stream error, nothing of it goes on) or ProtocolError (it can be read but is not served: its status is the
answer). The tables fill themselves, as those of HTTP/1.1 do, with fields that repeat and hold no secret.
Must not know frames, streams or policy. Invariants: what a Message holds is what the codecs of HTTP/1.1 let through,
so that either can be sent as the other; whatever makes the length or the target of a message ambiguous is refused.
"""

import re
from collections.abc import Iterable, Sequence

from . import http1_names as names
from .grpc import is_grpc, read_status, read_timeout_ms
from .http1_guard import FIELDS_MAX, HEAD_BYTES_MAX, LINE_BYTES_MAX, SPARE_BYTES, SPARE_FIELDS, ProtocolError
from .http1_heads import is_traceparent, read_specials
from .http1_message import Message
from .http1_names import CONTENT_LENGTH, EXPECT, FORWARDED, HOST, LENGTHS, REFUSED, TRACEPARENT, kind_of, may_trail
from .target import ASTERISK, AUTHORITY, HOST_KEYS

Field = tuple[bytes, bytes]

CRUMBS_MAX = 256
"""Cookie fields in one section: they are joined (RFC 9113, section 8.2.3) and then count as one."""
PSEUDO, COOKIE, CONTENT_TYPE, TE, GRPC_TIMEOUT, GRPC_STATUS, FORBIDDEN = range(20, 27)

_ENTRIES_MAX = 2048
_COMMON_BYTES_MAX = 160
_BIG_BYTES = 600  # fewer in each of FIELDS_MAX fields, and the section is within its limit

_KINDS = {
    b"cookie": COOKIE,
    b"content-type": CONTENT_TYPE,
    b"te": TE,
    b"grpc-timeout": GRPC_TIMEOUT,
    b"grpc-status": GRPC_STATUS,
    # Connection-specific (RFC 9113, section 8.2.2).
    b"connection": FORBIDDEN,
    b"proxy-connection": FORBIDDEN,
    b"keep-alive": FORBIDDEN,
    b"transfer-encoding": FORBIDDEN,
    b"upgrade": FORBIDDEN,
}
_COMMON = names.COMMON | {b":method", b":scheme", b":authority", b":status"}

_is_name = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+").fullmatch
_is_value = re.compile(rb"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?").fullmatch
_is_method = re.compile(rb"[A-Z][A-Z0-9_-]{0,31}").fullmatch
_is_token = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch
_is_path = re.compile(rb"/[!-\"$-~]*").fullmatch
_fault_in_path = re.compile(rb"[\x00-\x20\x7f]").search
_is_authority = re.compile(rb"[!$%&'()*+,\-.0-9:;=A-Z\[\]_a-z~]+").fullmatch  # RFC 3986, section 3.2, no userinfo
_is_scheme = re.compile(rb"[A-Za-z][A-Za-z0-9+.-]*").fullmatch
_is_protocol = re.compile(rb"[a-z0-9!#$%&'*+.^_`|~-]+").fullmatch
_is_status = re.compile(rb"[1-5][0-9][0-9]").fullmatch

_PSEUDO = frozenset({b":method", b":scheme", b":path", b":authority", b":protocol", b":status"})
_SCHEMES_SERVED = frozenset({b"https", b"http"})
_WITH_CONTENT = frozenset({b"POST", b"PUT", b"PATCH"})


class Malformed(Exception):
    """RFC 9113, section 8.1.1. The text is for logs and never quotes the peer."""


class _Fields(dict[Field, tuple[int, Field]]):
    """(name, value) -> (kind, the same). Raises Malformed. `big`: a large one was seen; whoever reads it clears it."""

    def __init__(self) -> None:
        super().__init__()
        self.big = False

    def __missing__(self, field: Field) -> tuple[int, Field]:
        name, value = field
        if name == b":path" and len(value) <= _BIG_BYTES:
            return PSEUDO, field  # judged by itself
        if name == b"traceparent" and is_traceparent(value):  # never seen before, in every request between sidecars
            return TRACEPARENT, field
        if name in _PSEUDO:
            kind = PSEUDO
            if _is_value(value) is None:
                raise Malformed("control character or outer white space in a pseudo-field")
        else:
            if _is_name(name) is None:
                raise Malformed("unknown pseudo-field, or invalid character in a field name")
            if _is_value(value) is None:
                raise Malformed("control character or outer white space in a field value")
            found = _KINDS.get(name)
            kind = kind_of(name) if found is None else found
            if kind == FORBIDDEN:
                raise Malformed("connection-specific field")
            if kind == TE and value.lower() != b"trailers":
                raise Malformed("te other than trailers")
        size = len(name) + len(value)
        if size > _BIG_BYTES:
            self.big = True
        entry = (kind, field)
        if size <= _COMMON_BYTES_MAX and name in _COMMON:
            if len(self) >= _ENTRIES_MAX:
                self.clear()
            self[field] = entry
        return entry


FIELDS = _Fields()


def request_message(fields: Sequence[Field], end: bool, between_sidecars: bool = False) -> Message:
    """The request that these fields are the head of; `end`: no content follows."""
    m = request_section(fields, between_sidecars)
    framed(m, end)
    return m


def request_section(fields: Sequence[Field], between_sidecars: bool = False) -> Message:
    """The same without what depends on whether content follows: that is `framed`."""
    m = Message()
    pseudo, found = _read(m, fields, between_sidecars)
    method = pseudo.get(b":method")
    if method is None or b":status" in pseudo:
        raise Malformed(":method is missing, or :status in a request")
    m.method = method
    authority = pseudo.get(b":authority")
    if HOST in found:
        host = found[HOST]
        if authority is None:
            authority = host
        elif authority.lower() != host.lower():
            raise Malformed(":authority and host differ")
    if method == b"CONNECT":
        _connect(m, pseudo, authority)
    else:
        if b":protocol" in pseudo:
            raise Malformed(":protocol in another method than CONNECT")
        _target(m, pseudo)
        if method not in _METHODS and _is_method(method) is None:
            if _is_token(method) is None:
                raise Malformed("invalid character in :method")
            raise ProtocolError(501, "method is not in capitals, or too long")
    if authority:
        m.host = authority
        try:
            m.host_key = HOST_KEYS[authority]
        except ProtocolError:
            if _is_authority(authority) is None:
                raise Malformed("invalid character in :authority or host") from None
            raise
    elif authority is not None:
        raise Malformed("empty :authority")
    else:
        raise Malformed("neither :authority nor host")
    if EXPECT in found:
        if found[EXPECT].lower() != b"100-continue":
            raise ProtocolError(417, "expectation other than 100-continue")
        m.expect_continue = True
    m.head = True
    return m


def framed(m: Message, end: bool) -> None:
    """What a request's head means for its content; `end`: none follows."""
    if m.extended:
        m.expect_continue = m.expect_continue and not end
        m.length = None
        m.done = True
    elif end:
        if m.length:
            raise Malformed("content-length without content")
        if m.length is None and m.method in _WITH_CONTENT:
            m.length = 0  # RFC 9110, section 8.6: a server of HTTP/1.1 wants to be told
        m.expect_continue = False
        m.done = True
    else:
        if m.method == b"TRACE":
            raise ProtocolError(400, "content in a request whose method has none")
        m.chunked = m.length is None


def refused_message(fields: Iterable[Field]) -> Message:
    """What an answer must know of a request for which `request_message` has raised ProtocolError: the method, since a
    HEAD gets no content, and whether it is gRPC."""
    m = Message()
    for name, value in fields:
        if name == b":method":
            m.method = value
        elif name == b"content-type":
            m.grpc = is_grpc(value)
    return m


def _target(m: Message, pseudo: dict[bytes, bytes]) -> None:
    scheme, path = pseudo.get(b":scheme"), pseudo.get(b":path")
    if not scheme or not path:
        raise Malformed(":scheme or :path is missing or empty")
    if scheme not in _SCHEMES_SERVED and scheme.lower() not in _SCHEMES_SERVED:
        if _is_scheme(scheme) is None:
            raise Malformed("malformed :scheme")
        raise ProtocolError(400, "scheme other than http and https")
    if path == b"*":
        if m.method != b"OPTIONS":
            raise Malformed("asterisk as :path of another method than OPTIONS")
        m.form = ASTERISK
    elif _is_path(path) is None:
        if path[:1] != b"/":
            raise Malformed(":path does not begin with a slash")
        if _fault_in_path(path):
            raise Malformed("control character or space in :path")
        raise ProtocolError(400, "fragment or non-ASCII byte in :path")
    if len(path) > LINE_BYTES_MAX:
        raise ProtocolError(414, ":path too long")
    m.target = m.path = path


def _connect(m: Message, pseudo: dict[bytes, bytes], authority: bytes | None) -> None:
    """RFC 9113, section 8.5; with :protocol, RFC 8441, section 4."""
    protocol = pseudo.get(b":protocol")
    if protocol is None:
        if b":scheme" in pseudo or b":path" in pseudo:
            raise Malformed(":scheme or :path in a CONNECT")
        if not authority:
            raise Malformed(":authority is missing in a CONNECT")
        m.form = AUTHORITY
        m.target = authority
        return
    _target(m, pseudo)
    token = protocol.lower()
    if _is_protocol(token) is None:
        raise Malformed("invalid character in :protocol")
    m.method = b"GET"
    m.upgrade = token
    m.extended = True


def response_message(fields: Sequence[Field], end: bool, between_sidecars: bool = False) -> Message:
    """The response, informational ones too. Whether content may follow depends on the request: that is the codec's."""
    m = Message()
    pseudo, _ = _read(m, fields, between_sidecars)
    status = pseudo.get(b":status", b"")
    if len(pseudo) != 1 or _is_status(status) is None:
        raise Malformed(":status is missing or malformed, or not alone")
    m.status = int(status)
    if m.status == 101:
        raise Malformed("status 101 over HTTP/2")
    m.head = True
    m.done = end
    return m


def _read(m: Message, fields: Sequence[Field], between_sidecars: bool) -> tuple[dict[bytes, bytes], dict[int, bytes]]:
    """Sort the fields, as http1_heads does; gives the pseudo-fields by name and the special ones by kind."""
    pseudo: dict[bytes, bytes] = {}
    found: dict[int, bytes] = {}
    crumbs: list[bytes] = []
    between = False
    headers = m.headers
    add = headers.append
    known = FIELDS
    for each in fields:
        kind, field = known[each]
        if not kind:
            add(field)
        elif kind == PSEUDO:
            name, value = field
            if name in pseudo or headers or found or crumbs or m.forwarded:
                raise Malformed("pseudo-field repeated, or behind other fields")
            pseudo[name] = value
        elif kind < FORWARDED:
            found[kind] = found[kind] + b"," + field[1] if kind in found else field[1]
            if kind >= TRACEPARENT:
                between = True
        elif kind == CONTENT_TYPE:
            m.grpc = is_grpc(field[1])
            add(field)
        elif kind == FORWARDED:
            m.forwarded.append(field)
        elif kind == COOKIE:
            crumbs.append(field[1])
        elif kind == GRPC_STATUS:
            m.grpc_status = read_status(field[1])
            add(field)
        elif kind == REFUSED:
            raise Malformed("framing field in an odd spelling")
        else:
            found[kind] = field[1]
    if crumbs:
        if len(crumbs) > CRUMBS_MAX:
            raise ProtocolError(431, "too many cookie fields")
        add((b"cookie", crumbs[0] if len(crumbs) == 1 else b"; ".join(crumbs)))
    if len(m.headers) + len(m.forwarded) + len(found) > FIELDS_MAX:
        spare = SPARE_FIELDS if between_sidecars else 0
        if len(fields) - len(crumbs) > FIELDS_MAX + spare:
            raise ProtocolError(431, "too many header fields")
    if known.big:
        known.big = False
        size = sum(len(name) + len(value) + 4 for name, value in fields)
        if size > HEAD_BYTES_MAX + (SPARE_BYTES if between_sidecars else 0):
            raise ProtocolError(431, "header section too large")
    if CONTENT_LENGTH in found:
        try:
            m.length = LENGTHS[found[CONTENT_LENGTH]]
        except ProtocolError as exc:
            raise Malformed(exc.detail) from None
    if between:
        read_specials(m, found)
        m.reason = m.reason if b":status" in pseudo else None
    if TE in found:
        m.te_trailers = True
    if GRPC_TIMEOUT in found:
        told_ms = read_timeout_ms(found[GRPC_TIMEOUT])
        if told_ms is not None and (m.deadline_ms is None or told_ms < m.deadline_ms):
            m.deadline_ms = told_ms
    return pseudo, found


def trailer_fields(fields: Sequence[Field]) -> tuple[list[Field], int | None]:
    """What may pass of a trailer section (as over HTTP/1.1), and the gRPC status that it states. Raises Malformed,
    also for a section over the limits: there is no head left to answer."""
    if len(fields) > FIELDS_MAX:
        raise Malformed("too many trailer fields")
    kept: list[Field] = []
    status: int | None = None
    for each in fields:
        kind, field = FIELDS[each]
        if kind == PSEUDO:
            raise Malformed("pseudo-field among the trailers")
        if kind in (CONTENT_LENGTH, REFUSED):
            raise Malformed("framing field among the trailers")
        if kind == GRPC_STATUS:
            status = read_status(field[1])
            kept.append(field)
        elif not kind and may_trail(field[0]):
            kept.append(field)
    if FIELDS.big:
        FIELDS.big = False
        if sum(len(name) + len(value) + 4 for name, value in fields) > HEAD_BYTES_MAX:
            raise Malformed("trailer section too large")
    return kept, status


def announces_trailers(m: Message) -> bool:
    """Whether HTTP/1.1 needs chunks for this message although its length is known, since only they have trailers.
    (`te: trailers` says nothing of a request's own: Firefox sends it always.)"""
    return any(name == b"trailer" for name, _ in m.headers)


# -- the other way

_STATUS = tuple((b":status", b"%d" % status) for status in range(600))
_TE = (b"te", b"trailers")
_METHODS = {method: (b":method", method) for method in (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"OPTIONS")}
_SCHEMES = {False: (b":scheme", b"http"), True: (b":scheme", b"https")}


def request_fields(m: Message, host: bytes, secure: bool, extra: Iterable[Field] = ()) -> list[Field]:
    """The section to send upstream. `secure`: over TLS. An upgrade is asked for by an extended CONNECT, whoever calls
    has made sure that the peer takes one and leaves the fields that only HTTP/1.1 has behind."""
    method = m.method
    fields = [
        _METHODS.get(method, (b":method", method)),
        _SCHEMES[secure],
        (b":path", m.path or b"/"),
        (b":authority", host),
        *m.headers,
    ]
    if m.length is not None:
        fields.append((b"content-length", b"%d" % m.length))
    if m.te_trailers:
        fields.append(_TE)
    fields += extra
    return fields


def connect_fields(m: Message, protocol: bytes, host: bytes, secure: bool, extra: Iterable[Field] = ()) -> list[Field]:
    """The same for an upgrade, as an extended CONNECT (RFC 8441, section 4)."""
    return [
        (b":method", b"CONNECT"),
        (b":protocol", protocol),
        _SCHEMES[secure],
        (b":path", m.path or b"/"),
        (b":authority", host),
        *m.headers,
        *extra,
    ]


def response_fields(m: Message, extra: Iterable[Field] = ()) -> list[Field]:
    """The section to send downstream. Content-length as in HTTP/1.1: kept for HEAD and 304, never for 1xx and 204."""
    status = m.status
    fields = [_STATUS[status], *m.headers]
    if m.length is not None and status >= 200 and status != 204:
        fields.append((b"content-length", b"%d" % m.length))
    fields += extra
    return fields
