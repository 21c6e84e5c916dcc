"""Parsing never depends on where reads were cut: every case gives the same verdict however it arrives."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.http1_cases import REQUEST_DEFAULTS, REQUESTS, RESPONSE_DEFAULTS, RESPONSES, Case, describe

from sidecar.wire.http1 import ProtocolError, Requests, Responses

SMALL = [case for case in REQUESTS + RESPONSES if len(case.raw) <= 700]
PIPELINE = [case.raw for case in REQUESTS if not case.status and case.want.get("done", True) and len(case.raw) < 400]
REQUEST_CASES = frozenset(case.raw for case in REQUESTS)


def read_requests(pieces: list[bytes]) -> tuple[list[dict[str, Any]], tuple[int, str] | None]:
    codec = Requests()
    error = None
    try:
        for piece in pieces:
            codec.receive(piece)
    except ProtocolError as exc:
        error = (exc.status, exc.detail)
    messages = []
    while codec.messages:
        messages.append(codec.messages.popleft())
    return [describe(m, REQUEST_DEFAULTS) for m in messages], error


def read_response(pieces: list[bytes], method: bytes, upgrade: bool = False) -> tuple[Any, ...]:
    codec = Responses()
    codec.expect(method, upgrade)
    error = None
    try:
        for piece in pieces:
            codec.receive(piece)
    except ProtocolError as exc:
        error = (exc.status, exc.detail)
    m = codec.m
    ended = codec.eof()
    return (m and describe(m, RESPONSE_DEFAULTS), [i.status for i in codec.informational], error, ended)


def read(case: Case, pieces: list[bytes]) -> tuple[Any, ...]:
    return read_requests(pieces) if case.raw in REQUEST_CASES else read_response(pieces, case.method)


def cut(raw: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted(at), len(raw)]
    return [raw[a:b] for a, b in pairwise(edges)]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cut_at_every_byte(case: Case) -> None:
    raw = case.raw
    whole = read(case, [raw])
    for at in range(1, len(raw)):
        assert read(case, [raw[:at], raw[at:]]) == whole, at
    assert read(case, [raw[i : i + 1] for i in range(len(raw))]) == whole


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(REQUESTS + RESPONSES), st.data())
def test_cut_anywhere(case: Case, data: st.DataObject) -> None:
    at = data.draw(st.lists(st.integers(0, len(case.raw)), max_size=12))
    assert read(case, cut(case.raw, at)) == read(case, [case.raw])


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(PIPELINE), min_size=2, max_size=40), st.data())
def test_pipelines_cut_anywhere(raws: list[bytes], data: st.DataObject) -> None:
    raw = b"".join(raws)
    at = data.draw(st.lists(st.integers(0, len(raw)), max_size=12))
    messages, error = read_requests([raw])
    assert error is None
    assert messages == [m for one in raws for m in read_requests([one])[0]]
    assert read_requests(cut(raw, at)) == (messages, None)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 200_000), st.lists(st.integers(0, 200_300), max_size=8), st.booleans())
def test_long_bodies_cut_anywhere(size: int, at: list[int], chunked: bool) -> None:
    body = b"0123456789abcdef"[: size % 16] + b"\r\n0\r\n\r\nGET / HTTP/1.1\r\n" * (size // 23)
    if chunked:
        raw = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw += (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n"
    else:
        raw = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    raw += b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n"
    messages, error = read_requests(cut(raw, [min(i, len(raw)) for i in at]))
    assert error is None
    assert [m["body"] for m in messages] == [body, b""]
    assert messages[1]["path"] == b"/next"
