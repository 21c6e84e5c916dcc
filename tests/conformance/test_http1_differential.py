"""The codec against two other parsers, h11 and llhttp, on the cases of the tables and on mutations of them.

Valid input: the same message. What h11 refuses is refused here, but for LAXER. What is forwarded is read by all of
them as exactly one request that means the same.
"""

from itertools import pairwise
from typing import Any

import h11
import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.http1_cases import REQUEST_DEFAULTS, REQUESTS, RESPONSES, Case, describe

from sidecar.wire.http1 import (
    HEAD_BYTES_MAX,
    Message,
    ProtocolError,
    Requests,
    Responses,
    chunk,
    encode_request,
    encode_response,
    last_chunk,
)

LAXER = {
    "one empty line first": "RFC 9112, section 2.2: a server should skip one",
}
"""What h11 refuses and this codec takes, and why."""

NOT_FOR_LLHTTP = {
    "method of 32": "llhttp knows a fixed list of methods",
    "unknown method": "llhttp knows a fixed list of methods",
    "outer white space": "llhttp leaves a trailing tab in the value",
    "chunked with outer space": "llhttp takes a trailing tab for part of the coding",
    "upgrade with body": "llhttp leaves the body of a request with Upgrade unread",
}
"""What llhttp reads in another way, and why; none of these differences survives being forwarded."""


class Seen:
    """What another parser made of the bytes."""

    def __init__(self) -> None:
        self.method = self.target = self.body = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.trailers: list[tuple[bytes, bytes]] = []
        self.status = 0
        self.done = False


def by_h11(raw: bytes, role: type[h11.CLIENT] | type[h11.SERVER], method: bytes = b"GET") -> list[Seen]:
    """Every message; raises h11.RemoteProtocolError."""
    conn = h11.Connection(role, max_incomplete_event_size=1 << 20)
    if role is h11.CLIENT:
        conn.send(h11.Request(method=method, target=b"/", headers=[("Host", "a")]))
        conn.send(h11.EndOfMessage())
    conn.receive_data(raw)
    found: list[Seen] = []
    while True:
        event = conn.next_event()
        if isinstance(event, h11.Request | h11.Response):
            seen = Seen()
            found.append(seen)
            seen.headers = list(event.headers)
            if isinstance(event, h11.Request):
                seen.method, seen.target = event.method, event.target
            else:
                seen.status = event.status_code
        elif isinstance(event, h11.Data):
            found[-1].body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            found[-1].trailers = list(event.headers)
            found[-1].done = True
            if role is h11.CLIENT:
                return found
            conn.send(h11.Response(status_code=404, headers=[("Content-Length", "0")]))
            conn.send(h11.EndOfMessage())
            try:
                conn.start_next_cycle()
            except h11.LocalProtocolError:  # the connection closes
                return found
        elif event is h11.NEED_DATA or event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
            return found
        else:
            assert isinstance(event, h11.InformationalResponse)


class Callbacks(Seen):
    """llhttp's callbacks; the first message counts."""

    def __init__(self) -> None:
        super().__init__()
        self.head = False
        self.messages = 0

    def on_message_begin(self) -> None:
        self.messages += 1

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        (self.trailers if self.head else self.headers).append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.head = True

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.done = True


def by_llhttp(raw: bytes) -> Callbacks:
    """The first request; raises httptools.HttpParserError."""
    seen = Callbacks()
    parser = httptools.HttpRequestParser(seen)
    try:
        parser.feed_data(raw)
    except httptools.HttpParserUpgrade:
        pass
    seen.method = parser.get_method()
    return seen


def refused_by_h11(raw: bytes, role: Any, method: bytes = b"GET") -> bool:
    try:
        by_h11(raw, role, method)
    except h11.RemoteProtocolError:
        return True
    return False


def same(m: Message, seen: Seen) -> None:
    """The same request, as far as the other parser tells: it does not judge hop-by-hop and special fields."""
    assert (m.method, m.target, b"".join(m.body), m.done) == (seen.method, seen.target, seen.body, seen.done)
    rest = iter([(name.lower(), value) for name, value in seen.headers])
    assert all(field in rest for field in m.headers)  # in this order
    rest = iter([(name.lower(), value) for name, value in seen.trailers])
    assert all(field in rest for field in m.trailers)


@pytest.mark.parametrize("case", REQUESTS, ids=lambda case: case.name)
def test_requests_that_h11_refuses_are_refused(case: Case) -> None:
    if refused_by_h11(case.raw, h11.SERVER):
        assert case.status or case.name in LAXER
    else:
        assert case.name not in LAXER


@pytest.mark.parametrize("case", RESPONSES, ids=lambda case: case.name)
def test_responses_that_h11_refuses_are_refused(case: Case) -> None:
    if refused_by_h11(case.raw, h11.CLIENT, case.method):
        assert case.status


ACCEPTED = [case for case in REQUESTS if not case.status]
FORWARDED = [case for case in ACCEPTED if case.want.get("done", True) and case.want.get("form") != "authority"]


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.name)
def test_accepted_requests_are_the_same_for_others(case: Case) -> None:
    m = receive(case.raw)
    if case.name not in LAXER:
        (seen,) = by_h11(case.raw, h11.SERVER)
        same(m, seen)
    if case.name not in NOT_FOR_LLHTTP:
        same(m, by_llhttp(case.raw))


def receive(raw: bytes) -> Message:
    codec = Requests(between_sidecars=True)
    codec.receive(raw)
    (m,) = codec.messages
    return m


def forward(m: Message) -> bytes:
    """As the driver does it."""
    body = b"".join(m.body)
    raw = encode_request(m, m.host or b"a", [(b"x-pillion-attempt", b"1")])
    return raw + (chunk(body) + last_chunk(m.trailers) if m.chunked else body)


@pytest.mark.parametrize("case", FORWARDED, ids=lambda case: case.name)
def test_what_is_forwarded_is_one_request_for_everyone(case: Case) -> None:
    m = receive(case.raw)
    raw = forward(m)
    again = receive(raw)
    like = {"method", "path", "headers", "trailers", "body", "done", "length", "chunked", "host_key"}
    wanted = {key: value for key, value in describe(m, REQUEST_DEFAULTS).items() if key in like}
    if m.host is None:
        wanted["host_key"] = b"a"
    assert {key: value for key, value in describe(again, REQUEST_DEFAULTS).items() if key in like} == wanted
    assert again.attempt == 1 and again.keep_alive
    (seen,) = by_h11(raw, h11.SERVER)
    same(again, seen)
    if case.name not in NOT_FOR_LLHTTP:
        llhttp = by_llhttp(raw)
        assert llhttp.messages == 1
        same(again, llhttp)


@pytest.mark.parametrize("case", [c for c in RESPONSES if not c.status], ids=lambda case: case.name)
@pytest.mark.parametrize("http10", [False, True])
def test_responses_that_are_relayed_mean_the_same(case: Case, http10: bool) -> None:
    codec = Responses()
    codec.expect(case.method)
    codec.receive(case.raw)
    m = codec.m
    assert m is not None
    if not codec.eof() or case.method == b"CONNECT":
        return
    bodiless = case.method == b"HEAD" or m.status in (204, 304)
    chunked = m.length is None and not bodiless and not http10
    raw = encode_response(m, chunked=chunked, close=http10)
    body = b"".join(m.body)
    if not bodiless:
        raw += chunk(body) + last_chunk(m.trailers) if chunked else body
    conn = h11.Connection(h11.CLIENT)
    conn.send(h11.Request(method=case.method, target=b"/", headers=[("Host", "a")]))
    conn.send(h11.EndOfMessage())
    conn.receive_data(raw)
    if http10:
        conn.receive_data(b"")
    head = conn.next_event()
    assert isinstance(head, h11.Response)
    assert head.status_code == m.status
    data = b""
    while isinstance(event := conn.next_event(), h11.Data):
        data += event.data
    assert isinstance(event, h11.EndOfMessage)
    assert data == body
    assert list(event.headers) == ([] if http10 else m.trailers)
    assert (b"transfer-encoding", b"chunked") not in head.headers or chunked
    rest = iter(head.headers)
    assert all(field in rest for field in m.headers)


# -- mutations

INSERTS = [
    *(bytes([c]) for c in b"\r\n \t\x00:;,#@/\\\"'%_-+0aG\x0b\x7f\x80"),
    b"\r\n",
    b"\r\n\r\n",
    b"\r\n ",
    b"Transfer-Encoding: chunked\r\n",
    b"Content-Length: 3\r\n",
    b"0\r\n\r\n",
    b"HTTP/1.1",
    b"GET / HTTP/1.1\r\nHost: b\r\n\r\n",
]
SEEDS = [case.raw for case in REQUESTS if len(case.raw) < 500]
RESPONSE_SEEDS = [case.raw for case in RESPONSES if len(case.raw) < 500]


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    raw = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            raw[at:at] = draw(st.sampled_from(INSERTS))
        elif kind == 1:
            del raw[at : at + draw(st.integers(1, 5))]
        elif kind == 2:
            raw[at : at + 1] = draw(st.binary(min_size=1, max_size=2))
        elif kind == 3:
            other = draw(st.sampled_from(seeds))
            raw[at:] = other[draw(st.integers(0, len(other))) :]
        else:
            raw[at:at] = raw[at : at + draw(st.integers(1, 40))]
    return bytes(raw)


@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(mutated(SEEDS), st.lists(st.integers(0, 600), max_size=4))
def test_mutated_requests_are_refused_or_mean_the_same_to_h11(raw: bytes, at: list[int]) -> None:
    codec = Requests()
    edges = [0, *sorted(min(i, len(raw)) for i in at), len(raw)]
    error = None
    try:
        for a, b in pairwise(edges):
            codec.receive(raw[a:b])
            assert codec.head_buffered_bytes <= HEAD_BYTES_MAX
    except ProtocolError as exc:
        error = exc
    assert error is None or error.status in (400, 414, 417, 431, 501, 505)
    whole = [m for m in codec.messages if m.done]
    if not whole or raw.startswith(b"\r\n"):
        return
    # What was read whole, h11 reads too, one after the other, for as long as it goes on.
    first = whole[0]
    end = raw_end(raw, error is None and len(codec.messages) == 1)
    try:
        seen = by_h11(raw[:end], h11.SERVER)
    except h11.RemoteProtocolError:
        assert error is not None or len(whole) > 1 or not all(m.done for m in codec.messages) or codec.started
        return
    assert seen
    same(first, seen[0])


def raw_end(raw: bytes, whole: bool) -> int:
    """All of it, or up to what this codec read as the end of the first message."""
    if whole:
        return len(raw)
    for end in range(1, len(raw) + 1):
        codec = Requests()
        try:
            codec.receive(raw[:end])
        except ProtocolError:
            break
        if codec.messages and codec.messages[0].done:
            return end
    return len(raw)


@settings(max_examples=800, deadline=None, derandomize=True, database=None)
@given(mutated(RESPONSE_SEEDS), st.sampled_from([b"GET", b"HEAD", b"CONNECT"]), st.booleans())
def test_mutated_responses_are_refused_or_mean_the_same_to_h11(raw: bytes, method: bytes, upgrade: bool) -> None:
    codec = Responses()
    codec.expect(method, upgrade)
    try:
        codec.receive(raw)
    except ProtocolError:
        return
    m = codec.m
    if m is None or not m.done or method == b"CONNECT" or m.status == 101:
        return
    (seen,) = by_h11(raw, h11.CLIENT, method)
    assert (m.status, b"".join(m.body), True) == (seen.status, seen.body, seen.done)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=300))
def test_noise_ends_in_a_protocol_error_or_waits(raw: bytes) -> None:
    for prefix in (
        b"",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n",
    ):
        codec = Requests()
        try:
            codec.receive(prefix + raw)
        except ProtocolError:
            pass
