"""Heads and chunks back to bytes."""

import pytest

from sidecar.wire.http1 import Message, Requests, chunk, encode_request, encode_response, is_field, last_chunk


def request(**attributes: object) -> Message:
    m = Message()
    m.method, m.path = b"GET", b"/a?b"
    m.headers = [(b"x", b"y"), (b"x", b"z")]
    for name, value in attributes.items():
        setattr(m, name, value)
    return m


def response(status: int = 200, **attributes: object) -> Message:
    m = Message()
    m.status = status
    m.headers = [(b"server", b"s")]
    for name, value in attributes.items():
        setattr(m, name, value)
    return m


class TestRequest:
    def test_without_body(self) -> None:
        assert encode_request(request(), b"h") == b"GET /a?b HTTP/1.1\r\nhost: h\r\nx: y\r\nx: z\r\n\r\n"

    def test_without_fields(self) -> None:
        assert encode_request(request(headers=[]), b"h") == b"GET /a?b HTTP/1.1\r\nhost: h\r\n\r\n"

    def test_extra_fields_and_an_upgrade(self) -> None:
        raw = encode_request(request(headers=[]), b"h", [(b"p", b"q"), (b"r", b"s")])
        assert raw == b"GET /a?b HTTP/1.1\r\nhost: h\r\np: q\r\nr: s\r\n\r\n"
        raw = encode_request(request(headers=[]), b"h", [(b"p", b"q")], b"websocket")
        assert raw.endswith(b"host: h\r\np: q\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")

    @pytest.mark.parametrize(
        ("attributes", "line"),
        [
            ({"length": 0}, b"content-length: 0\r\n"),
            ({"length": 12}, b"content-length: 12\r\n"),
            ({"chunked": True}, b"transfer-encoding: chunked\r\n"),
        ],
    )
    def test_framing(self, attributes: dict[str, object], line: bytes) -> None:
        assert encode_request(request(**attributes), b"h").endswith(b"x: z\r\n" + line + b"\r\n")

    def test_asterisk(self) -> None:
        assert encode_request(request(method=b"OPTIONS", path=b"*"), b"h").startswith(b"OPTIONS * HTTP/1.1\r\n")

    def test_authority(self) -> None:
        codec = Requests()
        codec.receive(b"CONNECT b:443 HTTP/1.1\r\nHost: b:443\r\n\r\n")
        raw = encode_request(codec.messages[0], b"b:443")
        assert raw == b"CONNECT b:443 HTTP/1.1\r\nhost: b:443\r\n\r\n"

    def test_http10_goes_on_as_http11(self) -> None:
        assert b" HTTP/1.1\r\n" in encode_request(request(http10=True, keep_alive=False), b"h")


class TestResponse:
    def test_length(self) -> None:
        raw = encode_response(response(length=3), chunked=False, close=False)
        assert raw == b"HTTP/1.1 200 OK\r\nserver: s\r\ncontent-length: 3\r\n\r\n"

    def test_chunked_wins(self) -> None:
        raw = encode_response(response(length=3), chunked=True, close=False)
        assert raw == b"HTTP/1.1 200 OK\r\nserver: s\r\ntransfer-encoding: chunked\r\n\r\n"

    def test_close_and_extra(self) -> None:
        raw = encode_response(response(length=3), chunked=False, close=True, extra=[(b"p", b"q")])
        assert raw.endswith(b"server: s\r\np: q\r\ncontent-length: 3\r\nconnection: close\r\n\r\n")

    def test_http10_keep_alive(self) -> None:
        raw = encode_response(response(length=3), chunked=False, close=False, http10_keep_alive=True)
        assert raw.endswith(b"connection: keep-alive\r\n\r\n")
        raw = encode_response(response(length=3), chunked=False, close=True, http10_keep_alive=True)
        assert raw.endswith(b"\r\nconnection: close\r\n\r\n")

    def test_304_keeps_its_length(self) -> None:
        assert b"content-length: 3" in encode_response(response(304, length=3), chunked=False, close=False)

    @pytest.mark.parametrize("status", [100, 103, 204])
    def test_no_framing_where_there_is_no_content(self, status: int) -> None:
        raw = encode_response(response(status, length=0), chunked=True, close=False)
        assert raw.endswith(b"server: s\r\n\r\n")

    def test_101_says_what_it_switched_to(self) -> None:
        raw = encode_response(response(101, headers=[], upgrade=b"websocket"), chunked=False, close=False)
        assert raw == b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"

    def test_upgrade_of_another_response_is_not_passed_on(self) -> None:
        assert b"upgrade" not in encode_response(response(426, upgrade=b"x"), chunked=False, close=False)

    @pytest.mark.parametrize(("status", "line"), [(404, b"404 Not Found"), (599, b"599 ")])
    def test_reason(self, status: int, line: bytes) -> None:
        assert encode_response(response(status), chunked=False, close=False).startswith(b"HTTP/1.1 " + line + b"\r\n")


def test_chunks() -> None:
    assert chunk(b"0123456789abcdef") == b"10\r\n0123456789abcdef\r\n"
    assert chunk(b"") == b""
    assert last_chunk([]) == b"0\r\n\r\n"
    assert last_chunk([(b"a", b"b"), (b"c", b"")]) == b"0\r\na: b\r\nc: \r\n\r\n"


@pytest.mark.parametrize(
    ("name", "value", "good"),
    [
        (b"x-a", b"b c", True),
        (b"x", b"", True),
        (b"x", b"\xe9\ty", True),
        (b"", b"y", False),
        (b"x y", b"y", False),
        (b"x:", b"y", False),
        (b"x\n", b"y", False),
        (b"x", b"y\r\nz: a", False),
        (b"x", b"y\n", False),
        (b"x", b"\x00", False),
        (b"x", b" y", False),
    ],
)
def test_fields_that_others_made(name: bytes, value: bytes, good: bool) -> None:
    assert is_field(name, value) is good
