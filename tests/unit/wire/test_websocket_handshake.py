"""The parts of WebSocket's handshake that a proxy makes and checks."""

import pytest

from sidecar.wire.http1_message import Message
from sidecar.wire.websocket import (
    accept_of,
    accepted,
    complete_request,
    complete_response,
    new_key,
    without_handshake,
)

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def message(*headers: tuple[bytes, bytes]) -> Message:
    m = Message()
    m.headers = list(headers)
    return m


def test_the_accept_is_that_of_the_example_in_rfc_6455() -> None:
    assert accept_of(KEY) == ACCEPT


@pytest.mark.parametrize("bits", [0, 1, (1 << 128) - 1])
def test_a_key_is_sixteen_bytes_in_base64(bits: int) -> None:
    key = new_key(bits)
    assert len(key) == 24 and key.endswith(b"==")


def test_a_request_gets_one_key_of_ours_and_keeps_everything_else() -> None:
    m = message((b"a", b"1"), (b"sec-websocket-key", b"theirs"), (b"sec-websocket-version", b"13"))
    complete_request(m, 5)
    assert m.headers == [(b"a", b"1"), (b"sec-websocket-version", b"13"), (b"sec-websocket-key", new_key(5))]


def test_a_response_is_completed_for_the_key_of_its_request() -> None:
    m = message((b"sec-websocket-accept", b"invented"), (b"sec-websocket-protocol", b"chat"))
    complete_response(message((b"sec-websocket-key", KEY)), m)
    assert m.headers == [(b"sec-websocket-protocol", b"chat"), (b"sec-websocket-accept", ACCEPT)]


def test_a_request_without_a_key_leaves_nothing_to_answer() -> None:
    m = message((b"sec-websocket-accept", b"invented"))
    complete_response(message(), m)
    assert m.headers == []


@pytest.mark.parametrize(
    ("answered", "good"),
    [
        ([ACCEPT], True),
        ([ACCEPT.lower()], False),
        ([], False),
        ([ACCEPT, ACCEPT], False),
        ([b" " + ACCEPT], False),
    ],
)
def test_only_the_right_accept_will_do(answered: list[bytes], good: bool) -> None:
    response = message(*((b"sec-websocket-accept", value) for value in answered))
    assert accepted(message((b"sec-websocket-key", KEY)), response) is good


def test_without_a_key_nothing_is_accepted() -> None:
    assert not accepted(message(), message((b"sec-websocket-accept", ACCEPT)))


def test_over_http2_the_handshake_is_gone() -> None:
    fields = [(b"a", b"1"), (b"sec-websocket-key", KEY), (b"sec-websocket-accept", ACCEPT)]
    assert without_handshake(fields) == [(b"a", b"1")]
