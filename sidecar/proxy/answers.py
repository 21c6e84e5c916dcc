"""What a sidecar answers by itself: heads, bodies, and the words that help whoever reads them.

To an HTTP caller a status with a body, to a gRPC caller a status of gRPC's own in a response without a message.
Pure formatting. Must not reveal to a caller which rule refused it: that is for log and metrics.
"""

import json
from collections.abc import Iterable
from http import HTTPStatus

from sidecar.policy.outcome import BY_REASON, GRPC_OF_HTTP, Grpc, Outcome
from sidecar.wire.grpc import write_message
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

NOTHING_SERVES = frozenset({Outcome.NO_HEALTHY_ENDPOINT, Outcome.CIRCUIT_OPEN, Outcome.OVERFLOW})
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
PLAIN_TEXT = (b"content-type", b"text/plain; charset=utf-8")

Field = tuple[bytes, bytes]

_AS_STATED = frozenset({Outcome.OK, Outcome.RESPONDED, Outcome.FAULT_INJECTED})
"""What does not say which status the answer has."""

_GRPC = (b"content-type", b"application/grpc")
_STATUS = tuple((b":status", b"%d" % status) for status in range(600))
_REMADE = frozenset({b"content-type", b"content-length", b"grpc-status", b"grpc-message"})


def body_of(outcome: Outcome, message: str, request_id: str) -> tuple[bytes, Iterable[tuple[bytes, bytes]]]:
    """(body, headers) of an own answer: one JSON object with reason, message and request_id, on one line."""
    text = message or MESSAGES.get(outcome, "")
    fields = {"reason": outcome.reason, "message": text, "request_id": request_id}
    return json.dumps(fields).encode() + b"\n", JSON


def grpc_status(status: int, reason: bytes | str | None) -> Grpc:
    """What an own answer with this HTTP status and reason is to a gRPC caller: what the table of outcomes says, and
    where the answer's status is not the table's (a fault, a route's or a filter's own) what the HTTP status means."""
    word = reason.decode("ascii", "replace") if isinstance(reason, bytes) else reason
    outcome = BY_REASON.get(word or "")
    if outcome is not None and outcome not in _AS_STATED:
        return outcome.grpc
    return GRPC_OF_HTTP.get(status, Grpc.UNKNOWN)


def grpc_fields(status: Grpc, message: str, headers: Iterable[Field] = ()) -> list[Field]:
    """What makes a response one of gRPC's without a message, pseudo-field and reason apart."""
    fields = [_GRPC, (b"grpc-status", b"%d" % status)]
    if message:
        fields.append((b"grpc-message", write_message(message)))
    fields += (field for field in headers if field[0].lower() not in _REMADE)
    return fields


def grpc_answer(status: int, headers: Iterable[Field], body: bytes, reason: bytes | str | None) -> list[Field]:
    """An answer that was meant for HTTP (a route's, a filter's) as fields for a gRPC caller; headers that hold a
    `grpc-status` stay as they are."""
    fields = [(name.lower(), value) for name, value in headers]
    if any(name == b"grpc-status" for name, _ in fields):
        return fields
    return grpc_fields(grpc_status(status, reason), _text(status, body), fields)


def grpc_trailers(outcome: Outcome) -> Message:
    """The end of a gRPC response whose head has gone already."""
    m = Message()
    m.done = True
    m.grpc_status = outcome.grpc
    m.trailers = grpc_fields(outcome.grpc, MESSAGES.get(outcome, ""))[1:]
    return m


def fields(
    request: Message | None, status: int, headers: Iterable[Field], body: bytes, reason: bytes | None
) -> tuple[list[Field], bytes]:
    """An own answer over HTTP/2: (the head's fields, pseudo-field first; the content, b"" for none: then the head ends
    the stream). Takes what a Serving gives to `down.answer`; `request` is None where no head could be read.

    To a gRPC request it is 200 with a gRPC status in the head and no content (trailers-only), whatever `status` says;
    headers that hold a `grpc-status` go as they are."""
    if request is not None and request.grpc:
        out = [_STATUS[200], *grpc_answer(status, headers, body, reason)]
        body = b""
    else:
        out = [_STATUS[status], *((name.lower(), value) for name, value in headers)]
        bodiless = status in (204, 304)
        if status >= 200 and not bodiless:  # RFC 9110, section 8.6
            out.append((b"content-length", b"%d" % len(body)))
        if bodiless or (request is not None and request.method == b"HEAD"):
            body = b""
    if reason is not None:
        out.append((b"x-pillion-reason", reason))
    return out, body


def _text(status: int, body: bytes) -> str:
    """What a body has to say, on one line; else what the status is called."""
    text = " ".join(body.decode("utf-8", "replace").split())
    if text.startswith('{"reason": '):  # as `body_of` has it
        try:
            text = str(json.loads(text).get("message", text))
        except ValueError:
            pass
    return text or _LINES[status].removeprefix(b"HTTP/1.1 ").decode("ascii").strip()


def encode(
    status: int,
    headers: Iterable[tuple[bytes, bytes]],
    body: bytes,
    reason: bytes | None,
    *,
    close: bool,
    head: bool,
) -> bytes:
    """A whole response as HTTP/1.1 bytes; `head`: it answers a HEAD."""
    out = [_LINES[status], b"\r\n"]
    for name, value in headers:
        out += (name, b": ", value, b"\r\n")
    if status >= 200 and status not in (204, 304):  # RFC 9110, section 8.6
        out.append(b"content-length: %d\r\n" % len(body))
    if reason is not None:
        out += (b"x-pillion-reason: ", reason, b"\r\n")
    if close:
        out.append(b"connection: close\r\n")
    out.append(b"\r\n")
    if not head and status not in (204, 304):
        out.append(body)
    return b"".join(out)
