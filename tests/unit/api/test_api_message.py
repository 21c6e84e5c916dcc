"""Views write through, and only what is well-formed."""

import json

import pytest

from sidecar.api import Reply, Request, Response
from sidecar.testing import make_request, make_response
from sidecar.wire.http1_encode import encode_request, encode_response
from sidecar.wire.http1_message import Message


def test_a_request_reads_through() -> None:
    request = make_request("POST", "/a%20b?c=d&e", {"X-A": "1"}, host="reviews:80", caller_service="web")
    assert (request.method, request.path, request.query, request.host) == ("POST", "/a%20b", "c=d&e", "reviews:80")
    assert request.headers.get("x-a") == "1" and not request.headers_changed
    assert repr(request) == "<Request POST /a%20b from web>"


def test_setting_the_path_keeps_the_query_and_the_other_way_round() -> None:
    request = make_request("GET", "/old?q=1")
    request.path = "/new/%C3%A4"
    assert request._message.path == b"/new/%C3%A4?q=1"
    request.query = "r=2"
    assert request._message.path == b"/new/%C3%A4?r=2"
    request.query = ""
    assert request._message.path == b"/new/%C3%A4"


@pytest.mark.parametrize(
    "path", ["", "new", "/a b", "/a\r\nHost: x", "/ä", "/a\x00", "/a?b", "/a#b", "//" + "x" * 8191, "*", 1]
)
def test_a_path_that_cannot_be_a_target_is_refused(path: object) -> None:
    request = make_request("GET", "/old?q=1")
    with pytest.raises(ValueError, match=r"path|target"):
        request.path = path  # type: ignore[assignment]
    assert request._message.path == b"/old?q=1"


def test_a_query_with_a_fragment_or_space_is_refused() -> None:
    request = make_request()
    for query in ("a b", "a#b", "a\nb"):
        with pytest.raises(ValueError, match=r"query|target"):
            request.query = query


def test_headers_and_state_are_made_once() -> None:
    request = make_request()
    assert request.headers is request.headers
    request.state["mine"] = 1
    assert request.state == {"mine": 1}
    request.headers.set("x-a", "1")
    assert request.headers_changed


def test_a_response_status_is_settable_within_reason() -> None:
    response = make_response(503, {"x-a": "1"})
    response.status = 200
    assert response.status == 200 and repr(response) == "<Response 200>"
    for status in (100, 199, 600, True, "200"):
        with pytest.raises(ValueError, match="not a final HTTP status"):
            response.status = status  # type: ignore[assignment]
    with pytest.raises(ValueError, match="no"):
        response.status = 204
    bodiless = make_response(204)
    with pytest.raises(ValueError, match="no"):
        bodiless.status = 200
    bodiless.status = 304


def test_replies_are_complete_and_checked() -> None:
    reply = Reply(403, "n\xf6", {"X-A": "1"}, reason="denied")
    assert (reply.status, reply.body, reply.reason) == (403, "n\xf6".encode(), "denied")
    assert reply.headers == ((b"x-a", b"1"), (b"content-type", b"text/plain; charset=utf-8"))
    assert Reply(200, "x", [("content-type", "text/html")]).headers == ((b"content-type", b"text/html"),)
    assert Reply(200, b"x").headers == () and Reply(204).body == b""
    with pytest.raises(ValueError, match="not a reason"):
        Reply(403, reason="because")
    with pytest.raises(ValueError, match="not a final"):
        Reply(101)
    with pytest.raises(ValueError, match="no body"):
        Reply(304, b"x")
    with pytest.raises(ValueError, match="bytes or str"):
        Reply(200, {"a": 1})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a filter cannot"):
        Reply(200, b"", {"content-length": "1"})


def test_a_refusal_has_the_form_of_the_sidecar_s_own() -> None:
    reply = Reply.refusal(make_request(request_id="abc"), 429, "rate_limited", "slow down", {"retry-after": "1"})
    assert json.loads(reply.body) == {"reason": "rate_limited", "message": "slow down", "request_id": "abc"}
    assert reply.headers == ((b"retry-after", b"1"), (b"content-type", b"application/json"))
    assert Reply.refusal(make_request(), 204, "fault_injected", "x").body == b""


def test_what_a_filter_writes_is_what_the_codec_sends() -> None:
    m = Message()
    m.method, m.path, m.host, m.headers = b"GET", b"/old?q=1", b"reviews", [(b"accept", b"*/*")]
    request = Request(m, caller_service="web")
    request.path = "/new"
    request.headers.set("X-Tenant", request.caller_service)
    assert encode_request(m, b"reviews") == (
        b"GET /new?q=1 HTTP/1.1\r\nhost: reviews\r\naccept: */*\r\nx-tenant: web\r\n\r\n"
    )
    back = Message()
    back.status, back.length, back.headers = 503, 0, [(b"server", b"x")]
    response = Response(back)
    response.status = 500
    response.headers.remove("server")
    assert encode_response(back, chunked=False, close=False).split(b"\r\n") == [
        *(b"HTTP/1.1 500 Internal Server Error", b"content-length: 0", b"", b"")
    ]
