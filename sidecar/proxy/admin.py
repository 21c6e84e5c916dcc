"""The admin interface: a small, strict HTTP/1.1 server for the people and scrapers of this host.

Serves what its sources give: metrics, health, configuration, endpoints; changes one thing, the log level. Runs in
ordinary Trio tasks on h11, off the data path. Must not know the proxy: everything comes through AdminSources.
Invariants: only for names of loopback (a browser that was lured here by a rebound DNS name, or by a page of another
origin, gets 403); changes by POST only; at most CONNECTIONS_MAX connections, every wait has a deadline, every input a
limit; an exception ends its connection and nothing else; long answers are made in slices, with a pause after each.
"""

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import parse_qs, urlsplit

import h11
import trio

from sidecar.build_info import build
from sidecar.telemetry.metrics import OPENMETRICS_TYPE, TEXT_TYPE

from .admin_door import CONNECTIONS_MAX, AdminSources
from .admin_pages import SLICE_CHARS, Row, json_slices, quality, row_slices, table_slices

log = logging.getLogger(__name__)

HEAD_BYTES_MAX = 8192
BODY_BYTES_MAX = 1024
REQUEST_S = 5.0  # from the first moment, or the last answer, to the end of the request
SEND_S = 5.0  # for one slice
ANSWER_S = 30.0  # for all of them

JSON_TYPE = "application/json"
PLAIN_TYPE = "text/plain; charset=utf-8"

_FULL = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_HOST = re.compile(rb"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    content_type: str
    body: Iterable[bytes]
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class _Call:
    """One accepted request."""

    path: str
    query: Mapping[str, list[str]]
    accept: str


class _Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, *headers: tuple[str, str], head_only: bool = False) -> None:
        super().__init__(message)
        self.head_only = head_only
        self.answer = _plain(status, message, *headers)


def _plain(status: int, text: str, *headers: tuple[str, str]) -> _Answer:
    return _Answer(status, PLAIN_TYPE, (text.encode() + b"\n",), headers)


class Admin:
    """The interface over given listeners: `await Admin(sources).serve(listeners)`."""

    def __init__(self, sources: AdminSources) -> None:
        self._sources = sources
        self._connections = 0
        self._pages: dict[str, tuple[Callable[[_Call], _Answer], str]] = {
            "/": (self._index, "this page"),
            "/livez": (self._livez, "200 while the process works"),
            "/readyz": (self._readyz, "200 when ready for traffic; 503 names what is missing"),
            "/metrics": (self._metrics, "Prometheus or OpenMetrics, by Accept"),
            "/config": (self._config, "the configuration in force, JSON"),
            "/events": (self._events, "what breakers, outliers, panic and overload did last; JSON, or ?format=text"),
            "/overload": (self._overload, "what the application may work on at a time; JSON, or ?format=text"),
            "/clusters": (self._clusters, "services and endpoints; JSON, or a table with ?format=text"),
        }
        self._changes: dict[str, tuple[Callable[[_Call], _Answer], str]] = {
            "/log-level": (self._log_level, "POST ?level=debug|info|warning|error"),
        }

    async def serve(
        self,
        listeners: Sequence[trio.SocketListener],
        *,
        task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled."""
        await trio.serve_listeners(self.handle, list(listeners), task_status=task_status)

    async def handle(self, stream: trio.abc.Stream) -> None:
        """Serve one connection to its end. Raises nothing but Cancelled."""
        self._connections += 1
        try:
            if self._connections > CONNECTIONS_MAX:
                if self._connections <= 2 * CONNECTIONS_MAX:
                    with trio.move_on_after(SEND_S):
                        await stream.send_all(_FULL)
                        await _linger(stream)
            else:
                await self._serve_connection(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass
        except Exception:
            log.exception("the admin interface failed at a request")
        finally:
            self._connections -= 1
            with trio.move_on_after(1) as scope:
                scope.shield = True
                await trio.aclose_forcefully(stream)

    async def _serve_connection(self, stream: trio.abc.Stream) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES_MAX)
        while True:
            with trio.move_on_after(REQUEST_S) as scope:
                try:
                    request = await _read_request(connection, stream)
                except _Refused as refused:
                    await _refuse(connection, stream, refused)
                    return
            if scope.cancelled_caught or request is None:
                return
            answer = self._answer(request)
            await _send(connection, stream, answer, head_only=request.method == b"HEAD")
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                await _linger(stream)
                return
            connection.start_next_cycle()

    def _answer(self, request: h11.Request) -> _Answer:
        try:
            call = _check(request)
            return self._route(request.method, call)
        except _Refused as refused:
            return refused.answer
        except Exception:  # a source that raises
            log.exception("the admin interface could not answer %s", request.target[:200])
            return _plain(500, "internal error; the log has the traceback")

    def _route(self, method: bytes, call: _Call) -> _Answer:
        page = self._pages.get(call.path)
        if page is not None:
            if method not in (b"GET", b"HEAD"):
                raise _Refused(405, f"{call.path} takes GET and HEAD", ("allow", "GET, HEAD"))
            return page[0](call)
        change = self._changes.get(call.path)
        if change is not None:
            if method != b"POST":
                raise _Refused(405, f"{call.path} changes something: use POST", ("allow", "POST"))
            return change[0](call)
        raise _Refused(404, f"there is no {call.path[:200]!r} here; there are\n{self._listing()}")

    def _listing(self) -> str:
        return "\n".join(f"{path:<12}{about}" for path, (_, about) in {**self._pages, **self._changes}.items())

    def _index(self, _call: _Call) -> _Answer:
        return _plain(200, f"pillion sidecar, {build()}\n\n{self._listing()}")

    def _livez(self, _call: _Call) -> _Answer:
        return _health(self._sources.livez(), "alive", "not alive")

    def _readyz(self, _call: _Call) -> _Answer:
        return _health(self._sources.readyz(), "ready", "not ready")

    def _metrics(self, call: _Call) -> _Answer:
        # Strictly: who accepts anything gets the plain format.
        openmetrics = quality(call.accept, "application", "openmetrics-text") > quality(call.accept, "text", "plain")
        return _Answer(200, OPENMETRICS_TYPE if openmetrics else TEXT_TYPE, self._sources.metrics(openmetrics))

    def _config(self, _call: _Call) -> _Answer:
        return _Answer(200, JSON_TYPE, json_slices(self._sources.config()))

    def _clusters(self, call: _Call) -> _Answer:
        return self._rows(call, self._sources.clusters(), "no endpoints")

    def _overload(self, call: _Call) -> _Answer:
        return self._rows(call, self._sources.overload(), "no limit: see concurrency in the policy")

    def _events(self, call: _Call) -> _Answer:
        return self._rows(call, self._sources.events(), "nothing yet")

    def _rows(self, call: _Call, rows: Iterable[Row], empty: str) -> _Answer:
        wanted = call.query.get("format", [""])[-1]
        if wanted not in ("", "text", "json"):
            raise _Refused(400, f"unknown format {wanted[:40]!r}: give text or json")
        plain = quality(call.accept, "text", "plain") > quality(call.accept, "application", "json")
        if wanted == "text" or (not wanted and plain):
            return _Answer(200, PLAIN_TYPE, table_slices(rows, empty))
        return _Answer(200, JSON_TYPE, row_slices(rows))

    def _log_level(self, call: _Call) -> _Answer:
        levels = call.query.get("level", [])
        if len(levels) != 1:
            raise _Refused(400, "say which level: POST /log-level?level=debug")
        try:
            self._sources.set_log_level(levels[0])
        except ValueError as error:
            raise _Refused(400, str(error)) from None
        log.info("log level set to %s through the admin interface", levels[0])
        return _plain(200, f"log level is {levels[0]}")


def _health(problems: Sequence[str], good: str, bad: str) -> _Answer:
    if problems:
        return _plain(503, "\n".join((f"{bad}:", *(f"- {problem}" for problem in problems))))
    return _plain(200, good)


def _check(request: h11.Request) -> _Call:
    """Refuse what a person or a scraper on this host would not send."""
    fields: dict[bytes, list[bytes]] = {}
    for name, value in request.headers:
        fields.setdefault(name, []).append(value)
    hosts = fields.get(b"host", [])
    if len(hosts) != 1 or _HOST.fullmatch(hosts[0]) is None:
        raise _Refused(403, "this interface answers to the host names localhost, 127.0.0.1 and [::1] only")
    for origin in fields.get(b"origin", []):
        if origin.lower() != b"http://" + hosts[0].lower():
            raise _Refused(403, "requests from pages of another origin are refused")
    for site in fields.get(b"sec-fetch-site", []):  # sent by browsers, also where they send no Origin
        if site.lower() not in (b"same-origin", b"none"):
            raise _Refused(403, "requests from pages of another site are refused")
    if not request.target.startswith(b"/"):
        raise _Refused(400, "the request target must be a path")
    # A leading // would be taken for a host name by urlsplit.
    target = urlsplit("http://localhost" + request.target.decode("ascii", "replace"))
    accept = b",".join(fields.get(b"accept", [])).decode("ascii", "replace")
    try:
        query = parse_qs(target.query, keep_blank_values=True, max_num_fields=16)
    except ValueError:
        raise _Refused(400, "too many fields in the query") from None
    return _Call(target.path, query, accept)


async def _read_request(connection: h11.Connection, stream: trio.abc.Stream) -> h11.Request | None:
    """The next request, its body read and thrown away; None where the peer has gone."""
    request: h11.Request | None = None
    body_bytes = 0
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            raise _Refused(error.error_status_hint, str(error), head_only=_is_head(request)) from None
        if event is h11.NEED_DATA:
            if connection.they_are_waiting_for_100_continue:
                await stream.send_all(
                    connection.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")) or b""
                )
            connection.receive_data(bytes(await stream.receive_some(4096)))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body_bytes += len(event.data)
            if body_bytes > BODY_BYTES_MAX:
                raise _Refused(413, f"the body exceeds {BODY_BYTES_MAX} bytes", head_only=_is_head(request))
        elif isinstance(event, h11.EndOfMessage):
            return request
        else:  # ConnectionClosed
            return None


def _is_head(request: h11.Request | None) -> bool:
    return request is not None and request.method == b"HEAD"


async def _refuse(connection: h11.Connection, stream: trio.abc.Stream, refused: _Refused) -> None:
    """Answer what could not be read to its end, and close."""
    if connection.our_state in (h11.IDLE, h11.SEND_RESPONSE):
        answer = _plain(refused.answer.status, str(refused), ("connection", "close"))
        await _send(connection, stream, answer, head_only=refused.head_only)
        await _linger(stream)


async def _linger(stream: trio.abc.Stream) -> None:
    """End our side and read a little of what is still under way: an early reset would destroy the answer."""
    with trio.move_on_after(0.5):
        if isinstance(stream, trio.abc.HalfCloseableStream):
            await stream.send_eof()
        left = 65_536
        while left > 0 and (data := await stream.receive_some(4096)):
            left -= len(data)


async def _send(connection: h11.Connection, stream: trio.abc.Stream, answer: _Answer, *, head_only: bool) -> None:
    """Send an answer slice by slice; other tasks run between them. A slice that fails or stalls cuts the answer."""
    headers = [
        ("content-type", answer.content_type),
        ("cache-control", "no-store"),
        ("x-content-type-options", "nosniff"),
        *answer.headers,
    ]
    if isinstance(answer.body, tuple):
        headers.append(("content-length", str(sum(map(len, answer.body)))))
    head = h11.Response(
        status_code=answer.status, headers=headers, reason=HTTPStatus(answer.status).phrase.encode("ascii")
    )
    with trio.fail_after(ANSWER_S):
        data = connection.send(head) or b""
        if not head_only:
            for piece in answer.body:
                data += connection.send(h11.Data(data=piece)) or b"" if piece else b""
                if len(data) >= SLICE_CHARS:
                    with trio.fail_after(SEND_S):
                        await stream.send_all(data)
                    data = b""
                await trio.lowlevel.checkpoint()
        data += connection.send(h11.EndOfMessage()) or b""
        with trio.fail_after(SEND_S):
            await stream.send_all(data)
