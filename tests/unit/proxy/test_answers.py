"""What a sidecar answers by itself, as bytes."""

import json

import pytest

from sidecar.policy.outcome import Outcome
from sidecar.proxy import answers
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


@pytest.mark.parametrize(
    ("to", "location"),
    [
        ("https://e.example", b"https://e.example/a?b"),
        ("https://e.example/x", b"https://e.example/x"),
        ("/x", b"/x"),
    ],
)
def test_where_redirects_lead(to, location):
    m = Message()
    m.path = b"/a?b"
    assert answers.location(to, m) == location
