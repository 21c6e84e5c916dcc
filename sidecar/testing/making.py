"""Requests, responses and a context for the tests of a filter, made from plain values."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import trio

from sidecar.api import FilterContext, Request, Response
from sidecar.api.headers import Field
from sidecar.policy.limits import Limits

Fields = Mapping[str, str] | Iterable[tuple[str | bytes, str | bytes]]


@dataclass(slots=True)
class HeadOfRequest:
    """What the wire codec would give; `made` requests keep theirs as `message`."""

    method: bytes
    path: bytes
    host: bytes | None
    headers: list[Field] = field(default_factory=list)


@dataclass(slots=True)
class HeadOfResponse:
    status: int
    headers: list[Field] = field(default_factory=list)


def make_request(
    method: str = "GET",
    target: str = "/",
    headers: Fields = (),
    *,
    host: str | None = "reviews",
    caller: str = "spiffe://mesh.local/service/web",
    caller_service: str = "web",
    address: str = "127.0.0.1",
    service: str = "reviews",
    route: str = "default",
    version: str = "",
    trace_id: str = "0af7651916cd43dd8448eb211c80319c",
    request_id: str = "0af7651916cd43dd8448eb211c80319c",
) -> Request:
    """A request as a filter sees it. `target` may have a query. Header names and values go in unchecked, as a peer
    could send them."""
    authority = host.encode("latin-1") if host is not None else None
    message = HeadOfRequest(method.encode("latin-1"), target.encode("latin-1"), authority, _fields(headers))
    return Request(
        message,
        caller=caller,
        caller_service=caller_service,
        address=address,
        service=service,
        route=route,
        version=version,
        trace_id=trace_id,
        request_id=request_id,
    )


def make_response(status: int = 200, headers: Fields = ()) -> Response:
    return Response(HeadOfResponse(status, _fields(headers)))


@dataclass
class CountedUp:
    """A counter that tests can read."""

    value: int = 0

    def inc(self, n: int = 1) -> None:
        self.value += n


@dataclass
class Surroundings:
    """What a filter did with its context: `logged` (level, text) and `counters` by name."""

    logged: list[tuple[str, str]] = field(default_factory=list)
    counters: dict[str, CountedUp] = field(default_factory=dict)

    def log(self, level: str, text: str) -> None:
        self.logged.append((level, text))

    def counter(self, name: str, help_text: str) -> CountedUp:
        return self.counters.setdefault(name, CountedUp())


def make_context(
    surroundings: Surroundings | None = None,
    *,
    service: str = "reviews",
    side: str = "in",
    clock: Callable[[], float] = lambda: 0.0,
    random: Callable[[], float] = lambda: 0.5,
) -> FilterContext:
    """A context in which time and chance stand still, unless the test moves them. `sleep` is Trio's."""
    around = surroundings if surroundings is not None else Surroundings()
    return FilterContext(service, side, clock, random, around.log, around.counter, Limits().limiter, trio.sleep)


def _fields(headers: Fields) -> list[Field]:
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    return [(_raw(name).lower(), _raw(value)) for name, value in pairs]


def _raw(text: str | bytes) -> bytes:
    return text.encode("latin-1") if isinstance(text, str) else text
