"""What a sidecar answers by itself, as bytes."""

import json

import pytest

from sidecar.policy.outcome import Grpc, Outcome
from sidecar.proxy import answers
from sidecar.wire.grpc import read_message
from sidecar.wire.http1 import Message, Responses

OWN = [outcome for outcome in Outcome if outcome.status]


@pytest.mark.parametrize("outcome", OWN)
def test_every_own_answer_is_a_well_formed_response_with_its_reason(outcome):
    body, headers = answers.body_of(outcome, "", "abc")
    data = answers.encode(outcome.status, headers, body, outcome.reason.encode(), close=False, head=False)
    codec = Responses()
    codec.expect(b"GET")
    codec.receive(data)
    m = codec.m
    assert m is not None and m.done and m.status == outcome.status and m.reason == outcome.reason.encode()
    fields = json.loads(m.take())
    assert set(fields) == {"reason", "message", "request_id"}
    assert fields["reason"] == outcome.reason and fields["message"], "a person should know what to make of it"


def test_a_stated_message_wins():
    body, _ = answers.body_of(Outcome.NO_ROUTE, 'no service is called "x"', "abc")
    assert json.loads(body) == {"reason": "no_route", "message": 'no service is called "x"', "request_id": "abc"}


def test_an_answer_to_head_has_the_length_and_no_body():
    data = answers.encode(503, answers.JSON, b"12345", b"overflow", close=True, head=True)
    assert data.endswith(b"\r\n\r\n") and b"content-length: 5\r\n" in data and b"connection: close\r\n" in data


@pytest.mark.parametrize("status", [204, 304])
def test_statuses_without_a_body(status):
    data = answers.encode(status, (), b"", None, close=False, head=False)
    assert data.endswith(b"\r\n\r\n") and b"content-length" not in data


@pytest.mark.parametrize("status", [299, 418, 599])
def test_any_status_has_a_line(status):
    assert answers.encode(status, (), b"", None, close=False, head=False).startswith(b"HTTP/1.1 %d " % status)


def test_malformed_requests_keep_their_status():
    for status, outcome in answers.OF_STATUS.items():
        assert outcome.status == status


# Over HTTP/2


def call() -> Message:
    m = Message()
    m.method, m.grpc = b"POST", True
    return m


def get(method: bytes = b"GET") -> Message:
    m = Message()
    m.method = method
    return m


@pytest.mark.parametrize("outcome", OWN)
def test_to_a_grpc_caller_an_own_answer_is_the_status_of_the_table(outcome):
    body, headers = answers.body_of(outcome, "", "abc")
    fields, content = answers.fields(call(), outcome.status, headers, body, outcome.reason.encode())
    assert fields[0] == (b":status", b"200") and content == b""
    found = dict(fields)
    assert found[b"content-type"] == b"application/grpc" and b"content-length" not in found
    assert found[b"grpc-status"] == b"%d" % outcome.grpc and found[b"x-pillion-reason"] == outcome.reason.encode()
    assert len(found) == len(fields)


@pytest.mark.parametrize(
    ("status", "reason", "grpc"),
    [
        (503, b"fault_injected", Grpc.UNAVAILABLE),
        (400, b"fault_injected", Grpc.INTERNAL),
        (401, None, Grpc.UNAUTHENTICATED),
        (403, None, Grpc.PERMISSION_DENIED),
        (404, None, Grpc.UNIMPLEMENTED),
        (429, None, Grpc.UNAVAILABLE),
        (429, b"rate_limited", Grpc.RESOURCE_EXHAUSTED),
        (418, b"quota", Grpc.UNKNOWN),
        (200, None, Grpc.UNKNOWN),
    ],
)
def test_what_was_meant_for_http_is_mapped(status, reason, grpc):
    fields, _ = answers.fields(call(), status, [(b"Retry-After", b"1"), (b"content-type", b"text/plain")], b"", reason)
    found = dict(fields)
    assert found[b"grpc-status"] == b"%d" % grpc and found[b"retry-after"] == b"1"
    assert found[b"content-type"] == b"application/grpc"


def test_a_body_becomes_the_message_on_one_line():
    fields = answers.grpc_answer(403, (), "gesperrt:\n  fünf\n".encode(), None)
    assert read_message(dict(fields)[b"grpc-message"]) == "gesperrt: fünf"
    assert dict(answers.grpc_answer(403, (), b"", None))[b"grpc-message"] == b"403 Forbidden"
    assert dict(answers.grpc_answer(599, (), b"", None))[b"grpc-message"] == b"599"


def test_a_filters_own_grpc_answer_stays():
    own = [(b"content-type", b"application/grpc+proto"), (b"grpc-status", b"9"), (b"grpc-message", b"x")]
    fields, content = answers.fields(call(), 200, own, b"", None)
    assert fields == [(b":status", b"200"), *own] and content == b""


def test_an_http_answer_over_http2():
    fields, content = answers.fields(get(), 503, answers.JSON, b"{}", b"overflow")
    assert fields == [
        (b":status", b"503"),
        (b"content-type", b"application/json"),
        (b"content-length", b"2"),
        (b"x-pillion-reason", b"overflow"),
    ]
    assert content == b"{}"
    fields, content = answers.fields(get(b"HEAD"), 503, answers.JSON, b"{}", None)
    assert (b"content-length", b"2") in fields and content == b""
    fields, content = answers.fields(None, 204, [(b"X-A", b"1")], b"", None)
    assert fields == [(b":status", b"204"), (b"x-a", b"1")]


def test_trailers_that_end_a_call():
    m = answers.grpc_trailers(Outcome.TIMEOUT_TOTAL)
    assert m.done and m.grpc_status == Grpc.DEADLINE_EXCEEDED
    assert dict(m.trailers)[b"grpc-status"] == b"4" and b"content-type" not in dict(m.trailers)
