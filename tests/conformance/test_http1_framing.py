"""HTTP/1.1 framing on raw bytes: every case is refused with its status, or is exactly one message."""

import pytest
from support.http1_cases import REQUEST_DEFAULTS, REQUESTS, RESPONSE_DEFAULTS, RESPONSES, Case, describe

from sidecar.wire.http1 import ProtocolError, Requests, Responses


def ids(cases: list[Case]) -> list[str]:
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    return names


def test_the_tables_are_as_large_as_promised() -> None:
    assert len(REQUESTS) >= 150
    assert len(RESPONSES) >= 60


@pytest.mark.parametrize("case", REQUESTS, ids=ids(REQUESTS))
def test_request(case: Case) -> None:
    codec = Requests()
    if case.status:
        with pytest.raises(ProtocolError) as caught:
            codec.receive(case.raw)
        assert caught.value.status == case.status, caught.value
        assert all(not m.done for m in codec.messages)
        with pytest.raises(ProtocolError):  # and nothing more is read
            codec.receive(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert all(not m.done for m in codec.messages)
    else:
        codec.receive(case.raw)
        assert [describe(m, REQUEST_DEFAULTS) for m in codec.messages] == [REQUEST_DEFAULTS | case.want]


@pytest.mark.parametrize("case", RESPONSES, ids=ids(RESPONSES))
def test_response(case: Case) -> None:
    codec = Responses()
    codec.expect(case.method)
    if case.status:
        with pytest.raises(ProtocolError) as caught:
            codec.receive(case.raw)
        assert caught.value.status == case.status, caught.value
        assert not codec.eof()
        with pytest.raises(ProtocolError):
            codec.receive(b"x")
    else:
        codec.receive(case.raw)
        assert codec.m is not None
        assert describe(codec.m, RESPONSE_DEFAULTS) == RESPONSE_DEFAULTS | case.want
        if case.eof is not None:
            assert codec.eof() is case.eof
            assert codec.m.done is case.eof


@pytest.mark.parametrize("case", [c for c in REQUESTS + RESPONSES if c.status], ids=lambda c: c.name)
def test_details_never_quote_the_peer(case: Case) -> None:
    codec = Requests() if case in REQUESTS else Responses()
    if isinstance(codec, Responses):
        codec.expect(case.method)
    with pytest.raises(ProtocolError) as caught:
        codec.receive(case.raw)
    detail = caught.value.detail
    assert detail.isascii() and detail.isprintable() and len(detail) < 100
