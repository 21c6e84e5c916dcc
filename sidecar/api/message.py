"""What hooks are given and may return: Request, Response, Connection, Reply.

Requests and responses are thin views: they decode on demand and write through to the message that the proxy forwards.
Must not know codecs: anything with the attributes of RequestMessage or ResponseMessage will do. Invariant: what a
filter writes through a view is well-formed, or raises.
"""

import json
from collections.abc import Iterable, Mapping
from re import compile as pattern
from typing import Any, Protocol

from .headers import Field, HeaderError, Headers, fields_of

REASONS = frozenset({"responded", "rate_limited", "denied", "fault_injected"})
_PATH = pattern(r"/[!-~]*")  # visible ASCII: no white space, no controls
_PATH_CHARS_MAX = 8192


class RequestMessage(Protocol):
    """A request's head as the wire codec has it. `path` is the request target, with its query."""

    method: bytes
    path: bytes

    @property
    def host(self) -> bytes | None: ...

    @property
    def headers(self) -> list[Field]: ...


class ResponseMessage(Protocol):
    """A response's head as the wire codec has it."""

    status: int

    @property
    def headers(self) -> list[Field]: ...


class Request:
    """One request on its way to an application, after routing and authorization.

    What a filter changes is what is forwarded; neither the route nor authorization is asked again. The facts about the
    request are plain attributes:

    - `caller`: the caller's SPIFFE ID from its certificate, "" where it has none; `caller_service`: its service name
    - `address`: the caller's IP address
    - `service`, `route`, `version`: where policy sends it; `version` is "" where none was chosen
    - `trace_id`, `request_id`: as in logs, traces and error bodies
    - `state`: yours: a dict that lives as long as the request, shared by all filters; prefix your keys
    """

    __slots__ = (
        "_headers",
        "_message",
        "_state",
        "address",
        "caller",
        "caller_service",
        "request_id",
        "route",
        "service",
        "trace_id",
        "version",
    )

    def __init__(
        self,
        message: RequestMessage,
        *,
        caller: str = "",
        caller_service: str = "",
        address: str = "",
        service: str = "",
        route: str = "",
        version: str = "",
        trace_id: str = "",
        request_id: str = "",
    ) -> None:
        self._message = message
        self._headers: Headers | None = None
        self._state: dict[str, Any] | None = None
        self.caller = caller
        self.caller_service = caller_service
        self.address = address
        self.service = service
        self.route = route
        self.version = version
        self.trace_id = trace_id
        self.request_id = request_id

    @property
    def method(self) -> str:
        """GET, POST, …; methods are case-sensitive."""
        return self._message.method.decode("latin-1")

    @property
    def host(self) -> str:
        """The authority that was asked for, with its port if one was stated."""
        return (self._message.host or b"").decode("latin-1")

    @property
    def path(self) -> str:
        """The path without its query, normalised and still percent-encoded. Setting it keeps the query."""
        return self._message.path.partition(b"?")[0].decode("latin-1")

    @path.setter
    def path(self, path: str) -> None:
        if not isinstance(path, str) or "?" in path or "#" in path:
            raise ValueError(f"a path must be str without ? and #, not {path!r}; encode them, or set `query`")
        self._target(path, self.query)

    @property
    def query(self) -> str:
        """What follows the question mark, still percent-encoded; "" where there is none."""
        return self._message.path.partition(b"?")[2].decode("latin-1")

    @query.setter
    def query(self, query: str) -> None:
        if not isinstance(query, str) or "#" in query:
            raise ValueError(f"a query must be str without #, not {query!r}; encode it")
        self._target(self.path, query)

    @property
    def headers(self) -> Headers:
        headers = self._headers
        if headers is None:
            headers = self._headers = Headers(self._message.headers)
        return headers

    @property
    def state(self) -> dict[str, Any]:
        state = self._state
        if state is None:
            state = self._state = {}
        return state

    @property
    def headers_changed(self) -> bool:
        """For the proxy: whether a filter wrote a field."""
        return self._headers is not None and self._headers.changed

    def _target(self, path: str, query: str) -> None:
        target = f"{path}?{query}" if query else path
        if len(target) > _PATH_CHARS_MAX or not _PATH.fullmatch(target):
            raise ValueError(
                f"{target[:100]!r} cannot be a request target: it must begin with / and hold at most "
                f"{_PATH_CHARS_MAX} visible ASCII characters; percent-encode the others"
            )
        self._message.path = target.encode("ascii")

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.path} from {self.caller_service or self.address or 'unknown'}>"


class Response:
    """One response on its way to the caller: its head. Statuses below 200 never reach a filter."""

    __slots__ = ("_headers", "_message")

    def __init__(self, message: ResponseMessage) -> None:
        self._message = message
        self._headers: Headers | None = None

    @property
    def status(self) -> int:
        return self._message.status

    @status.setter
    def status(self, status: int) -> None:
        old = self._message.status
        if _bodiless(status) != _bodiless(old):
            raise ValueError(f"{old} cannot become {status}: one of them has a body and the other has none")
        self._message.status = _final_status(status)

    @property
    def headers(self) -> Headers:
        headers = self._headers
        if headers is None:
            headers = self._headers = Headers(self._message.headers)
        return headers

    @property
    def headers_changed(self) -> bool:
        """For the proxy: whether a filter wrote a field."""
        return self._headers is not None and self._headers.changed

    def __repr__(self) -> str:
        return f"<Response {self.status}>"


class Connection:
    """One connection that was just accepted, after its handshake and before any of its bytes.

    `caller`, `caller_service`, `address` as in Request; `service` and `port` name what it reaches; `protocol` is "http"
    or "tcp".
    """

    __slots__ = ("address", "caller", "caller_service", "port", "protocol", "service")

    def __init__(
        self,
        *,
        caller: str = "",
        caller_service: str = "",
        address: str = "",
        service: str = "",
        port: str = "",
        protocol: str = "http",
    ) -> None:
        self.caller = caller
        self.caller_service = caller_service
        self.address = address
        self.service = service
        self.port = port
        self.protocol = protocol

    def __repr__(self) -> str:
        return f"<Connection to {self.service}:{self.port} from {self.caller_service or self.address or 'unknown'}>"


class Reply:
    """The sidecar's own answer in place of the application's.

    `body` may be str (sent as UTF-8, with `content-type: text/plain; charset=utf-8` unless stated) or bytes; the proxy
    adds the length. `reason` is the word in logs and metrics: responded, rate_limited, denied or fault_injected.
    """

    __slots__ = ("body", "headers", "reason", "status")

    def __init__(
        self,
        status: int,
        body: bytes | str = b"",
        headers: Mapping[str, str] | Iterable[tuple[str | bytes, str | bytes]] = (),
        reason: str = "responded",
    ) -> None:
        self.status = _final_status(status)
        self.headers = fields_of(headers)
        if isinstance(body, str):
            body = body.encode()
            if body and not any(name == b"content-type" for name, _ in self.headers):
                self.headers += ((b"content-type", b"text/plain; charset=utf-8"),)
        elif not isinstance(body, bytes):
            raise ValueError(f"the body must be bytes or str, not {type(body).__name__}")
        if body and _bodiless(status):
            raise ValueError(f"a {status} has no body")
        self.body = body
        if reason not in REASONS:
            raise ValueError(f"{reason!r} is not a reason; use one of {', '.join(sorted(REASONS))}")
        self.reason = reason

    @classmethod
    def refusal(
        cls,
        request: Request,
        status: int,
        reason: str,
        message: str,
        headers: Mapping[str, str] | Iterable[tuple[str | bytes, str | bytes]] = (),
    ) -> "Reply":
        """An answer in the form of the sidecar's own: one JSON object with reason, message and request_id."""
        fields = {"reason": reason, "message": message, "request_id": request.request_id}
        body = b"" if _bodiless(status) else json.dumps(fields).encode() + b"\n"
        reply = cls(status, body, headers, reason)
        if body:
            reply.headers += ((b"content-type", b"application/json"),)
        return reply

    def __repr__(self) -> str:
        return f"<Reply {self.status} {self.reason}>"


def _final_status(status: int) -> int:
    if not isinstance(status, int) or isinstance(status, bool) or not 200 <= status <= 599:
        raise ValueError(f"{status!r} is not a final HTTP status (200 to 599)")
    return status


def _bodiless(status: int) -> bool:
    return status in (204, 304)


__all__ = ["REASONS", "Connection", "HeaderError", "Reply", "Request", "RequestMessage", "Response", "ResponseMessage"]
