"""Header sections that were seen before: what `http2_heads` has judged once need not be judged again.

A caller sends nearly the same head with each request. Its leading part, up to the first field that is not alike for
many requests, is looked up as a whole; a copy of the Message that was made of it is then completed with the fields
behind, such as the trace and the deadline. Whatever is out of the ordinary goes to `http2_heads` as it came.
Pure; must not know frames, streams or policy. Invariants: the key of an entry is everything that its Message was judged
by, so that what comes out is what `http2_heads` gives; nothing is kept but the request line and fields that
`http2_heads` keeps anyway, and only from the second time on; the tables are bounded, whatever a peer sends.
"""

from .grpc import read_status, read_timeout_ms
from .http1_guard import ProtocolError
from .http1_heads import ATTEMPT_DIGITS_MAX, DEADLINE_DIGITS_MAX, is_traceparent
from .http1_message import Message
from .http1_names import ATTEMPT, CONTENT_LENGTH, DEADLINE, FORWARDED, HOST, ORDINARY
from .http2_heads import (
    CONTENT_TYPE,
    FIELDS,
    GRPC_STATUS,
    PSEUDO,
    TE,
    Field,
    Malformed,
    framed,
    request_section,
)
from .http2_heads import request_message as judged_request
from .http2_heads import response_message as judged_response
from .http2_heads import trailer_fields as judged_trailers

Section = tuple[Field, ...]

FIELDS_MAX = 40
"""Longer sections are judged each time. It is well below what is refused, so that no limit needs counting here."""
_KEY_FIELDS_MAX = 20
_PATH_BYTES_MAX = 128
_ENTRIES_MAX = 512
_SEEN_MAX = 4096
_LEADING = frozenset({ORDINARY, PSEUDO, CONTENT_TYPE, TE, CONTENT_LENGTH, HOST, FORWARDED})


class _Table:
    """`known`: leading part of a section -> the Message of it, which is never handed out itself."""

    __slots__ = ("known", "request", "seen", "split")

    def __init__(self, request: bool) -> None:
        self.request = request
        self.known: dict[Section, Message] = {}
        self.split = [0] * (FIELDS_MAX + 1)  # by a section's length: of the last one, how many fields lead
        self.seen: set[int] = set()  # hashes of what was met once

    def learn(self, fields: Section) -> None:
        """This section was not found, and is in order."""
        lead = 0
        for each in fields[:_KEY_FIELDS_MAX]:
            entry = FIELDS.get(each)
            if entry is None:
                name, value = each
                if name != b":path" or len(value) > _PATH_BYTES_MAX or b"?" in value:
                    break
            elif entry[0] not in _LEADING:
                break
            lead += 1
        if not lead or fields[lead - 1][0][:1] == b":":  # not even all pseudo-fields
            lead = 0
        self.split[len(fields)] = lead
        if not lead:
            return
        key = fields[:lead]
        mark = hash(key)
        if mark not in self.seen:
            if len(self.seen) >= _SEEN_MAX:
                self.seen.clear()
            self.seen.add(mark)
            return
        if len(self.known) >= _ENTRIES_MAX:
            self.known.clear()
        try:
            m = request_section(key) if self.request else judged_response(key, False)
        except (Malformed, ProtocolError):
            return  # alone it is none: the host stands behind it, say
        if m.method != b"CONNECT":  # whose target is another than its path
            self.known[key] = m


_REQUESTS, _RESPONSES = _Table(True), _Table(False)
_STATUSES = tuple((b"grpc-status", b"%d" % status) for status in range(17))
_USUAL: tuple[Section, ...] = (
    *((status,) for status in _STATUSES),
    *((status, (b"grpc-message", b"")) for status in _STATUSES),
)
_TRAILERS: dict[Section, tuple[list[Field], int | None]] = {fields: judged_trailers(fields) for fields in _USUAL}


def request_message(fields: Section, end: bool, between_sidecars: bool = False) -> Message:
    """As `http2_heads.request_message`."""
    size = len(fields)
    if size <= FIELDS_MAX:
        lead = _REQUESTS.split[size]
        known = _REQUESTS.known.get(fields[:lead])
        if known is None:
            m = judged_request(fields, end, between_sidecars)
            _REQUESTS.learn(fields)
            return m
        m = Message()
        m.head = True
        m.headers += known.headers
        m.method = known.method
        m.target = m.path = known.path
        m.form = known.form
        m.host = known.host
        m.host_key = known.host_key
        m.length = known.length
        m.grpc = known.grpc
        m.te_trailers = known.te_trailers
        if known.forwarded:
            m.forwarded += known.forwarded
        if lead == size or _complete(m, fields[lead:]):
            framed(m, end)
            return m
    return judged_request(fields, end, between_sidecars)


def _complete(m: Message, rest: Section) -> bool:
    """Add the fields that follow, as far as all of them are usual ones."""
    told_ms: float | None = None
    attempt = False
    add = m.headers.append
    for each in rest:
        name, value = each
        if name == b"traceparent":
            if m.traceparent is not None or is_traceparent(value) is None:
                return False
            m.traceparent = value
            continue
        if name == b"grpc-timeout":
            if told_ms is not None:
                return False
            told_ms = read_timeout_ms(value)
            if told_ms is None:
                return False
            continue
        kind, field = FIELDS[each]
        if not kind:
            add(field)
        elif kind == ATTEMPT:
            if attempt or len(value) > ATTEMPT_DIGITS_MAX or not value.isdigit():
                return False
            attempt = True
            m.attempt = int(value)
        elif kind == DEADLINE:
            if m.deadline_ms is not None or len(value) > DEADLINE_DIGITS_MAX or not value.isdigit():
                return False
            m.deadline_ms = float(value)
        elif kind == FORWARDED:
            m.forwarded.append(field)
        else:
            return False
    if FIELDS.big:
        return False
    if told_ms is not None and (m.deadline_ms is None or told_ms < m.deadline_ms):
        m.deadline_ms = told_ms
    return True


def response_message(fields: Section, end: bool, between_sidecars: bool = False) -> Message:
    """As `http2_heads.response_message`."""
    size = len(fields)
    if size <= FIELDS_MAX:
        lead = _RESPONSES.split[size]
        known = _RESPONSES.known.get(fields[:lead])
        if known is None:
            m = judged_response(fields, end, between_sidecars)
            _RESPONSES.learn(fields)
            return m
        m = Message()
        m.head = True
        m.done = end
        m.headers += known.headers
        m.status = known.status
        m.length = known.length
        m.grpc = known.grpc
        m.te_trailers = known.te_trailers
        if known.forwarded:
            m.forwarded += known.forwarded
        for each in fields[lead:]:
            kind, field = FIELDS[each]
            if not kind:
                m.headers.append(field)
            elif kind == GRPC_STATUS:
                m.grpc_status = read_status(field[1])
                m.headers.append(field)
            else:
                break
        else:
            if not FIELDS.big:
                return m
    return judged_response(fields, end, between_sidecars)


def trailer_fields(fields: Section) -> tuple[list[Field], int | None]:
    """As `http2_heads.trailer_fields`."""
    known = _TRAILERS.get(fields) if len(fields) <= 2 else None
    if known is None:
        return judged_trailers(fields)
    return known[0].copy(), known[1]
