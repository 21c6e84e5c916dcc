"""What a sidecar answers by itself: heads, bodies, and the words that help whoever reads them.

Pure formatting. Must not reveal to a caller which rule refused it: that is for log and metrics.
"""

import json
from collections.abc import Iterable
from http import HTTPStatus

from sidecar.policy.outcome import Outcome
from sidecar.wire.http1 import Message

OF_STATUS = {
    400: Outcome.BAD_REQUEST,
    408: Outcome.REQUEST_TIMEOUT,
    413: Outcome.PAYLOAD_TOO_LARGE,
    414: Outcome.URI_TOO_LONG,
    417: Outcome.EXPECTATION_FAILED,
    431: Outcome.HEADERS_TOO_LARGE,
    501: Outcome.NOT_IMPLEMENTED,
    505: Outcome.VERSION_NOT_SUPPORTED,
}
"""Which outcome a malformed request's status stands for; anything else is a bad request."""

NOTHING_SERVES = frozenset({Outcome.NO_HEALTHY_ENDPOINT, Outcome.CIRCUIT_OPEN})
"""What a route's `fallback` with a fixed response stands in for."""

MESSAGES = {
    Outcome.CONNECT_FAILED: "no connection to the service could be made",
    Outcome.DRAINING: "this instance is shutting down",
    Outcome.UPSTREAM_RESET: "the connection to the service was lost before it answered",
    Outcome.BAD_RESPONSE: "the service's response was malformed",
    Outcome.TIMEOUT_TRY: "the service did not answer within the time of one attempt",
    Outcome.TIMEOUT_TOTAL: "the service did not answer in time",
    Outcome.OVERFLOW: "too many requests are under way to this service",
    Outcome.CIRCUIT_OPEN: "the service is failing and is being left alone for a moment",
    Outcome.NO_HEALTHY_ENDPOINT: "the service has no endpoint that can serve this request",
    Outcome.NO_ROUTE: "no route leads there",
    Outcome.RATE_LIMITED: "too many requests; try again later",
    Outcome.DENIED: "not allowed by policy",
    Outcome.MISDIRECTED: "this sidecar does not serve that host",
    Outcome.BAD_REQUEST: "the request is malformed",
    Outcome.REQUEST_TIMEOUT: "the request did not arrive in time",
    Outcome.EXPECTATION_FAILED: "only Expect: 100-continue is understood",
    Outcome.NOT_IMPLEMENTED: "the method is not known here",
    Outcome.VERSION_NOT_SUPPORTED: "only HTTP/1.0 and HTTP/1.1 are spoken here",
    Outcome.URI_TOO_LONG: "the request line is too long",
    Outcome.HEADERS_TOO_LARGE: "the header section is too large",
    Outcome.PAYLOAD_TOO_LARGE: "the request body is too large",
    Outcome.FILTER_ERROR: "a filter failed",
}

_LINES = {status: b"HTTP/1.1 %d " % status for status in range(100, 600)}
for _status in HTTPStatus:
    _LINES[_status.value] += _status.phrase.encode()

JSON = ((b"content-type", b"application/json"),)


def body_of(outcome: Outcome, message: str, request_id: str) -> tuple[bytes, Iterable[tuple[bytes, bytes]]]:
    """(body, headers) of an own answer: one JSON object with reason, message and request_id, on one line."""
    text = message or MESSAGES.get(outcome, "")
    fields = {"reason": outcome.reason, "message": text, "request_id": request_id}
    return json.dumps(fields).encode() + b"\n", JSON


def encode(
    status: int,
    headers: Iterable[tuple[bytes, bytes]],
    body: bytes,
    reason: bytes | None,
    *,
    close: bool,
    head: bool,
    extra: bytes = b"",
) -> bytes:
    """A whole response as HTTP/1.1 bytes; `head`: it answers a HEAD."""
    out = [_LINES[status], b"\r\n"]
    for name, value in headers:
        out += (name, b": ", value, b"\r\n")
    if status >= 200 and status not in (204, 304):  # RFC 9110, section 8.6
        out.append(b"content-length: %d\r\n" % len(body))
    if reason is not None:
        out += (b"x-pillion-reason: ", reason, b"\r\n")
    if extra:
        out.append(extra)
    if close:
        out.append(b"connection: close\r\n")
    out.append(b"\r\n")
    if not head and status not in (204, 304):
        out.append(body)
    return b"".join(out)


def location(to: str, m: Message) -> bytes:
    """The Location of a redirect: `to` as it is, or with the request's path where it names only an origin."""
    if to.startswith(("http://", "https://")) and to.count("/") == 2:
        return to.encode() + m.path
    return to.encode()
