"""Fields of HTTP/2 to Messages and back."""

from typing import Any

import pytest

from sidecar.wire.http1_guard import ProtocolError
from sidecar.wire.http1_message import Message
from sidecar.wire.http2_heads import (
    CRUMBS_MAX,
    Field,
    Malformed,
    connect_fields,
    request_fields,
    request_message,
    response_fields,
    response_message,
    trailer_fields,
)
from sidecar.wire.target import ASTERISK, AUTHORITY

START = [(b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/a?b"), (b":authority", b"reviews:8000")]
TRACE = b"00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01"


def start(**changes: bytes | None) -> list[Field]:
    """The usual pseudo-fields with some changed, or (None) left out."""
    pseudo: dict[bytes, bytes | None] = dict(START) | {b":" + name.encode(): value for name, value in changes.items()}
    return [(name, value) for name, value in pseudo.items() if value is not None]


def request(*fields: Field, end: bool = True, between: bool = False, **changes: bytes | None) -> Message:
    return request_message([*start(**changes), *fields], end, between)


def malformed(*fields: Field, end: bool = True, **changes: bytes | None) -> None:
    with pytest.raises(Malformed):
        request(*fields, end=end, **changes)


def answered(status: int, *fields: Field, end: bool = True, **changes: bytes | None) -> None:
    with pytest.raises(ProtocolError) as caught:
        request(*fields, end=end, **changes)
    assert caught.value.status == status


class TestRequests:
    def test_a_usual_one(self) -> None:
        m = request((b"accept", b"*/*"), (b"user-agent", b"x"))
        assert (m.method, m.path, m.target, m.host, m.host_key) == (
            b"GET", b"/a?b", b"/a?b", b"reviews:8000", b"reviews",
        )  # fmt: skip
        assert m.headers == [(b"accept", b"*/*"), (b"user-agent", b"x")]
        assert m.head and m.done and m.keep_alive and not m.chunked and m.length is None

    def test_content_of_unknown_length_is_chunked_further_on(self) -> None:
        m = request(method=b"POST", end=False)
        assert m.chunked and not m.done and m.length is None

    def test_content_length(self) -> None:
        m = request((b"content-length", b"3"), method=b"POST", end=False)
        assert m.length == 3 and not m.chunked
        assert m.headers == []
        malformed((b"content-length", b"3"), method=b"POST")
        malformed((b"content-length", b"3"), (b"content-length", b"4"), method=b"POST", end=False)
        malformed((b"content-length", b"+3"), method=b"POST", end=False)

    @pytest.mark.parametrize(("method", "length"), [(b"POST", 0), (b"PUT", 0), (b"GET", None), (b"DELETE", None)])
    def test_no_content(self, method: bytes, length: int | None) -> None:
        assert request(method=method).length == length

    def test_host_in_place_of_authority(self) -> None:
        assert request((b"host", b"Reviews"), authority=None).host_key == b"reviews"
        assert request((b"host", b"REVIEWS:8000")).host == b"reviews:8000"
        malformed((b"host", b"other"))
        malformed((b"host", b"reviews:8000"), (b"host", b"reviews:8000"))
        malformed(authority=None)
        malformed(authority=b"")
        malformed(authority=b"user@reviews")
        answered(400, authority=b"reviews:0")

    @pytest.mark.parametrize("name", ["method", "scheme", "path"])
    def test_what_must_be_there(self, name: str) -> None:
        malformed(**{name: None})
        if name != "method":
            malformed(**{name: b""})

    @pytest.mark.parametrize(
        "fields",
        [
            [*START, (b":path", b"/")],
            [(b"accept", b"*/*"), *START],
            [START[0], (b"accept", b"*/*"), *START[1:]],
            [(b"x-forwarded-for", b"1.2.3.4"), *START],
            [(b"cookie", b"a=b"), *START],
            [(b"te", b"trailers"), *START],
            [*START, (b":status", b"200")],
            [*START, (b":other", b"x")],
            [*START, (b":protocol", b"websocket")],
        ],
    )
    def test_pseudo_fields_come_once_and_first(self, fields: list[Field]) -> None:
        with pytest.raises(Malformed):
            request_message(fields, True)

    @pytest.mark.parametrize(
        "field",
        [
            (b"Accept", b"x"), (b"a b", b"x"), (b"a:b", b"x"), (b"", b"x"), (b"a\0", b"x"), (b"a\xe4", b"x"),
            (b"a", b"x\r\ny: z"), (b"a", b"x\0"), (b"a", b" x"), (b"a", b"x "), (b"a", b"\tx"), (b"a", b"x\x7f"),
            (b"connection", b"close"), (b"keep-alive", b"5"), (b"proxy-connection", b"x"), (b"upgrade", b"x"),
            (b"transfer-encoding", b"chunked"), (b"te", b"gzip"), (b"te", b"trailers, deflate"),
            (b"transfer_encoding", b"chunked"), (b"content_length", b"3"),
        ],
    )  # fmt: skip
    def test_malformed_fields(self, field: Field) -> None:
        malformed(field)

    @pytest.mark.parametrize("value", [b"", b"x", b"a b\tc", b"\xe4", b"!"])
    def test_values_that_pass(self, value: bytes) -> None:
        assert request((b"a", value)).headers == [(b"a", value)]

    def test_methods(self) -> None:
        assert request(method=b"PROPFIND").method == b"PROPFIND"
        answered(501, method=b"get")
        malformed(method=b"G T")
        malformed(method=b"GET\r\n")
        answered(400, method=b"TRACE", end=False)

    def test_paths(self) -> None:
        answered(400, path=b"/a#b")
        malformed(path=b"/a b")
        answered(400, path=b"/\xff")
        malformed(path=b"/a\r\nhost: x")
        answered(414, path=b"/" + b"a" * 8192)
        malformed(path=b"a")
        malformed(path=b"*")
        m = request(method=b"OPTIONS", path=b"*")
        assert m.form is ASTERISK and m.path == b"*"
        assert request(scheme=b"HTTP").head
        answered(400, scheme=b"ftp")

    def test_connect(self) -> None:
        m = request(method=b"CONNECT", scheme=None, path=None, end=False)
        assert m.form is AUTHORITY and m.target == b"reviews:8000"
        malformed(method=b"CONNECT")
        malformed(method=b"CONNECT", scheme=None, path=None, authority=None)

    def test_extended_connect_is_read_as_the_get_that_it_stands_for(self) -> None:
        m = request(method=b"CONNECT", protocol=b"WebSocket", end=False)
        assert (m.method, m.upgrade, m.extended, m.done, m.path) == (b"GET", b"websocket", True, True, b"/a?b")
        assert not m.chunked
        malformed(method=b"CONNECT", protocol=b"web socket", end=False)
        malformed(method=b"CONNECT", protocol=b"websocket", path=None, end=False)

    def test_expect(self) -> None:
        assert request((b"expect", b"100-Continue"), method=b"POST", end=False).expect_continue
        assert not request((b"expect", b"100-continue"), method=b"POST").expect_continue
        answered(417, (b"expect", b"x"))

    def test_cookies_are_joined(self) -> None:
        m = request((b"cookie", b"a=b"), (b"accept", b"x"), (b"cookie", b"c=d"))
        assert m.headers == [(b"accept", b"x"), (b"cookie", b"a=b; c=d")]
        assert request(*[(b"cookie", b"a=b")] * CRUMBS_MAX).head
        answered(431, *[(b"cookie", b"a=b")] * (CRUMBS_MAX + 1))

    def test_limits(self) -> None:
        assert request(*[(b"a", b"b")] * 90).head
        answered(431, *[(b"a", b"b")] * 101)
        answered(431, *[(b"a%d" % n, b"b" * 1000) for n in range(80)])
        answered(431, (b"a", b"b" * 70_000))
        assert request((b"a", b"b" * 60_000)).head
        assert request((b"a", b"b")).head  # one over the limit leaves no trace

    def test_a_peer_may_add_some(self) -> None:
        fields = [*START, *[(b"a", b"b")] * 105]
        assert request_message(fields, True, True).head
        with pytest.raises(ProtocolError):
            request_message(fields, True, False)

    def test_grpc(self) -> None:
        m = request((b"content-type", b"application/grpc+proto"), (b"te", b"trailers"), (b"grpc-timeout", b"2S"))
        assert m.grpc and m.te_trailers and m.deadline_ms == 2000
        assert m.headers == [(b"content-type", b"application/grpc+proto")]
        assert not request((b"content-type", b"application/grpc-web")).grpc
        assert request((b"grpc-timeout", b"nonsense")).deadline_ms is None
        m = request((b"grpc-timeout", b"2S"), (b"x-request-deadline-ms", b"500"), between=True)
        assert m.deadline_ms == 500

    def test_fields_between_sidecars(self) -> None:
        m = request((b"traceparent", TRACE), (b"x-pillion-attempt", b"2"), (b"x-pillion-reason", b"timeout_try"))
        assert (m.traceparent, m.attempt, m.reason, m.headers) == (TRACE, 2, None, [])
        assert request((b"traceparent", b"nonsense")).traceparent is None

    def test_what_nobody_may_claim(self) -> None:
        m = request((b"x-forwarded-client-cert", b"x"), (b"x_forwarded_for", b"x"), (b"x-forwarded-for", b"y"))
        assert m.headers == [] and m.forwarded == [(b"x-forwarded-for", b"y")]


class TestResponses:
    def test_a_usual_one(self) -> None:
        m = response_message([(b":status", b"200"), (b"content-length", b"3"), (b"set-cookie", b"a")], False)
        assert (m.status, m.length, m.headers, m.done) == (200, 3, [(b"set-cookie", b"a")], False)
        assert response_message([(b":status", b"204")], True).done

    @pytest.mark.parametrize(
        "fields",
        [
            [], [(b":status", b"20")], [(b":status", b"600")], [(b":status", b"2 0")], [(b":status", b"101")],
            [(b":status", b"200"), (b":status", b"200")], [(b":status", b"200"), (b":path", b"/")],
            [(b"a", b"b"), (b":status", b"200")], [(b":status", b"200"), (b"connection", b"close")],
        ],
    )  # fmt: skip
    def test_malformed(self, fields: list[Field]) -> None:
        with pytest.raises(Malformed):
            response_message(fields, True)

    def test_grpc_status_and_what_a_sidecar_says(self) -> None:
        fields = [(b":status", b"200"), (b"content-type", b"application/grpc"), (b"grpc-status", b"14")]
        m = response_message([*fields, (b"x-pillion-reason", b"overflow"), (b"x-pillion-retried", b"exhausted")], True)
        assert (m.grpc, m.grpc_status, m.reason, m.exhausted) == (True, 14, b"overflow", True)
        assert (b"grpc-status", b"14") in m.headers


class TestTrailers:
    def test_what_passes(self) -> None:
        kept, status = trailer_fields([(b"grpc-status", b"5"), (b"grpc-message", b"x"), (b"x-checksum", b"1")])
        assert status == 5 and len(kept) == 3
        assert trailer_fields([(b"host", b"x"), (b"authorization", b"x"), (b"x-pillion-reason", b"x")]) == ([], None)

    @pytest.mark.parametrize(
        "field", [(b":status", b"200"), (b"content-length", b"1"), (b"connection", b"x"), (b"A", b"x"), (b"a", b"\n")]
    )
    def test_what_does_not(self, field: Field) -> None:
        with pytest.raises(Malformed):
            trailer_fields([field])

    def test_limits(self) -> None:
        for fields in ([(b"a", b"b")] * 101, [(b"a", b"b" * 70_000)]):
            with pytest.raises(Malformed):
                trailer_fields(fields)


def message(**attributes: Any) -> Message:
    m = Message()
    m.method, m.path = b"GET", b"/a"
    for name, value in attributes.items():
        setattr(m, name, value)
    return m


class TestSending:
    def test_requests(self) -> None:
        fields = request_fields(message(headers=[(b"a", b"b")], length=3, te_trailers=True), b"h", True, [(b"c", b"d")])
        assert fields == [
            (b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/a"), (b":authority", b"h"), (b"a", b"b"),
            (b"content-length", b"3"), (b"te", b"trailers"), (b"c", b"d"),
        ]  # fmt: skip
        assert request_fields(message(method=b"PATCH"), b"h", False)[:2] == [
            (b":method", b"PATCH"), (b":scheme", b"http"),
        ]  # fmt: skip

    def test_upgrades(self) -> None:
        fields = connect_fields(message(headers=[(b"a", b"b")]), b"websocket", b"h", False)
        m = request_message(fields, False)
        assert m.extended and m.upgrade == b"websocket" and m.headers == [(b"a", b"b")]

    @pytest.mark.parametrize(("status", "stated"), [(200, True), (304, True), (204, False), (103, False)])
    def test_responses(self, status: int, stated: bool) -> None:
        fields = response_fields(message(status=status, length=3), [(b"x", b"y")])
        assert fields[0] == (b":status", b"%d" % status)
        assert ((b"content-length", b"3") in fields) is stated
        assert fields[-1] == (b"x", b"y")

    def test_what_is_sent_can_be_read(self) -> None:
        m = request((b"accept", b"*/*"), (b"content-length", b"3"), method=b"POST", end=False)
        assert m.host is not None
        again = request_message(request_fields(m, m.host, True), False)
        assert (again.method, again.path, again.host, again.headers, again.length) == (
            m.method, m.path, m.host, m.headers, m.length,
        )  # fmt: skip
