"""HTTP/2 on real sockets, by hand: a client and an application on raw frames, and their likes over HTTP/1.1.

`Http2Client` and `Http1Client` make Calls; `serve` is a script for a Backend that speaks either version and hands each
request to a handler as an Exchange. All four have the same methods whatever the version, so that a test can cross
them. Nothing is hidden: a client can send any bytes in between, and `frames` holds whatever came.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from support import http2_frames as f
from support.mesh import RESET, WAIT_S, Address, Client, Closed, Conn, Fields, Headers, Request, Response, Script, dial

Pairs = Iterable[tuple[bytes, bytes]]
FRAME_BYTES = 16384


class Cut(Exception):
    """The answer, or the request, did not come to its clean end. `code`: of the RST_STREAM, None for a connection."""

    def __init__(self, code: int | None, got: bytes = b"") -> None:
        super().__init__(code, got[:200])
        self.code, self.got = code, got


class Half:
    """What has come on one stream."""

    def __init__(self, window: int) -> None:
        self.sections: list[f.Fields] = []
        self.body = bytearray()
        self.pieces: list[tuple[float, bytes]] = []  # each DATA frame's content, and when it came
        self.ended = False
        self.reset: int | None = None
        self.window = window  # how much we may send


class Wire:
    """One connection. Without `threaded` it is read only while somebody waits."""

    def __init__(self, sock: socket.socket, server: bool, settings: dict[int, int] | None = None) -> None:
        sock.settimeout(WAIT_S)
        self.sock, self.server = sock, server
        self.parser = f.Parser(preface=server)
        self.frames: list[f.Frame] = []
        self.streams: dict[int, Half] = {}
        self.condition = threading.Condition(threading.RLock())
        self.reads = True  # windows are given back as bytes come
        self.keeps = True  # bodies are kept, not only counted
        self.received_bytes = 0
        self.ended: BaseException | None = None  # Closed for a clean end
        self.threaded = False
        self.window, self.initial_window = 65535, 65535
        self.peer_settings: dict[int, int] | None = None
        self.opened: Callable[[int, Half], None] | None = None
        self.send((b"" if server else f.PREFACE) + f.settings(settings or {}))

    # -- reading

    def run(self) -> None:
        """Read to the end, in this thread."""
        self.threaded = True
        while self.ended is None:
            self.pump(120)

    def pump(self, limit_s: float) -> None:
        """Read once."""
        self.sock.settimeout(max(0.001, limit_s))
        end: BaseException = Closed("by the peer")
        data = b""
        try:
            data = self.sock.recv(262144)
        except TimeoutError:
            return
        except OSError as exc:
            end = exc
        with self.condition:
            if not data:
                self.ended = end
            for frame in self.parser.feed(data):
                self._frame(frame)
            self.condition.notify_all()

    def wait(self, true: Callable[[], Any], limit_s: float = WAIT_S) -> bool:
        """Whether it comes true within the limit, while the connection lives."""
        deadline = time.monotonic() + limit_s
        with self.condition:
            while not true():
                left = deadline - time.monotonic()
                if self.ended is not None or left <= 0:
                    return bool(true())
                if self.threaded:
                    self.condition.wait(left)
                else:
                    self.pump(left)
            return True

    def _frame(self, frame: f.Frame) -> None:
        self.frames.append(frame)
        half = self.streams.get(frame.sid)
        if frame.kind == f.SETTINGS and not frame.ack:
            self._settings(frame.settings)
        elif frame.kind == f.PING and not frame.ack:
            self._answer(f.ping(frame.payload, ack=True))
        elif frame.kind == f.WINDOW_UPDATE:
            if not frame.sid:
                self.window += frame.increment
            elif half is not None:
                half.window += frame.increment
        elif frame.kind == f.DATA:
            self._data(frame, half)
        elif frame.kind == f.RST_STREAM and half is not None:
            half.reset = frame.code
        elif frame.fields:
            new = half is None
            if half is None:
                half = self.streams[frame.sid] = Half(self.initial_window)
            half.sections.append(frame.fields)
            half.ended = half.ended or self._ends(frame)
            if new and self.opened is not None:
                self.opened(frame.sid, half)

    def _ends(self, frame: f.Frame) -> bool:
        if frame.kind == f.CONTINUATION:  # END_STREAM is on the HEADERS that it continues
            frame = next(each for each in reversed(self.frames) if each.kind == f.HEADERS and each.sid == frame.sid)
        return frame.end_stream

    def _settings(self, values: dict[int, int]) -> None:
        self.peer_settings = values
        if f.INITIAL_WINDOW_SIZE in values:
            change = values[f.INITIAL_WINDOW_SIZE] - self.initial_window
            self.initial_window += change
            for half in self.streams.values():
                half.window += change
        self._answer(f.settings(ack=True))

    def _data(self, frame: f.Frame, half: Half | None) -> None:
        self.received_bytes += len(frame.data)
        if half is not None:
            if self.keeps:
                half.body += frame.data
                half.pieces.append((time.monotonic(), frame.data))
            half.ended = half.ended or frame.end_stream
        if frame.payload and self.reads:
            update = f.window_update(0, len(frame.payload))
            if not frame.end_stream:
                update += f.window_update(frame.sid, len(frame.payload))
            self._answer(update)
        if not self.keeps:
            self.frames.pop()

    def _answer(self, wire: bytes) -> None:
        try:
            self.send(wire)
        except OSError as exc:
            self.ended = self.ended or exc

    # -- writing

    def send(self, wire: bytes) -> None:
        with self.condition:
            self.sock.settimeout(WAIT_S)
            self.sock.sendall(wire)

    def section(self, sid: int, fields: Pairs, end: bool) -> None:
        """A whole header section, in as many frames as it needs."""
        block = f.block(fields)
        self.send(f.headers(sid, block, end, cuts=range(FRAME_BYTES, len(block), FRAME_BYTES)))

    def body(self, sid: int, data: bytes, end: bool) -> None:
        """As the windows allow."""
        half = self.streams[sid]
        at = 0
        while at < len(data):
            if not self.wait(lambda: half.reset is not None or min(self.window, half.window) > 0):
                raise Closed("no window")
            with self.condition:
                if half.reset is not None:
                    raise Cut(half.reset)
                size = min(self.window, half.window, FRAME_BYTES, len(data) - at)
                self.window -= size
                half.window -= size
                self.send(f.data(sid, data[at : at + size], end and at + size == len(data)))
            at += size
        if end and not data:
            self.send(f.data(sid, b"", True))

    # -- what a test asks

    def kind(self, kind: int, sid: int | None = None) -> list[f.Frame]:
        return [each for each in self.frames if each.kind == kind and (sid is None or each.sid == sid)]

    @property
    def goaway(self) -> f.Frame | None:
        """The last one."""
        frames = self.kind(f.GOAWAY)
        return frames[-1] if frames else None

    def close(self) -> None:
        self.sock.close()


# -- callers


def given(headers: Iterable[tuple[str, str] | tuple[bytes, bytes]]) -> f.Fields:
    return [
        (name.encode() if isinstance(name, str) else name, value.encode("latin-1") if isinstance(value, str) else value)
        for name, value in headers
    ]


class Call2:
    """A request over HTTP/2 and its answer."""

    def __init__(self, client: "Http2Client", sid: int, method: str) -> None:
        self.client, self.sid, self.method = client, sid, method
        self.half = client.wire.streams[sid]

    def send(self, data: bytes, end: bool = False) -> None:
        self.client.wire.body(self.sid, data, end)

    def end(self, trailers: Pairs = ()) -> None:
        trailers = list(trailers)
        if trailers:
            self.client.wire.send(f.headers(self.sid, trailers, True))
        else:
            self.client.wire.send(f.data(self.sid, b"", True))

    def cancel(self) -> None:
        self.client.wire.send(f.rst_stream(self.sid, 8))

    def _final(self) -> f.Fields | None:
        for section in self.half.sections:
            if section[0][0] == b":status" and int(section[0][1]) >= 200:
                return section
        return None

    def head(self, limit_s: float = WAIT_S) -> Response:
        """The final response's head, with the informational ones before it."""
        self.client.wire.wait(lambda: self._final() is not None or self.half.reset is not None, limit_s)
        final = self._final()
        if final is None:
            raise Cut(self.half.reset, bytes(self.half.body))
        response = _response(final)
        response.informational = [
            _response(each) for each in self.half.sections if each[0][0] == b":status" and each[0][1][:1] == b"1"
        ]
        return response

    def informed(self, count: int = 1, limit_s: float = WAIT_S) -> list[Response]:
        """That many informational responses, as they come."""
        sections = self.half.sections
        assert self.client.wire.wait(lambda: len(sections) >= count, limit_s), sections
        return [_response(each) for each in sections[:count]]

    def first(self, size: int, limit_s: float = WAIT_S) -> bytes:
        """That much of the body."""
        half = self.half
        self.client.wire.wait(lambda: len(half.body) >= size or half.reset is not None, limit_s)
        if len(half.body) < size:
            raise Cut(half.reset, bytes(half.body))
        return bytes(half.body[:size])

    def response(self, limit_s: float = WAIT_S) -> Response:
        """The whole answer. Raises Cut where it does not come to a clean end."""
        response = self.head(limit_s)
        half = self.half
        self.client.wire.wait(lambda: half.ended or half.reset is not None, limit_s)
        if not half.ended:
            raise Cut(half.reset, bytes(half.body))
        response.body = bytes(half.body)
        if half.sections[-1][0][0] != b":status":
            response.trailers = list(half.sections[-1])
        return response

    def reset_code(self, limit_s: float = WAIT_S) -> int | None:
        self.client.wire.wait(lambda: self.half.reset is not None, limit_s)
        return self.half.reset


def _response(section: f.Fields) -> Response:
    assert section[0][0] == b":status" and all(name[:1] != b":" for name, _ in section[1:]), section
    return Response(b"HTTP/2 " + section[0][1], list(section[1:]))


class Http2Client:
    """One connection, with prior knowledge or over TLS."""

    version = 2

    def __init__(self, sock: socket.socket, settings: dict[int, int] | None = None) -> None:
        self.wire = Wire(sock, False, settings)
        self.next_sid = 1

    def __enter__(self) -> "Http2Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.wire.close()

    def abort(self) -> None:
        self.wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.wire.close()

    def settled(self) -> "Http2Client":
        """Wait for the greeting."""
        assert self.wire.wait(lambda: any(each.kind == f.SETTINGS and each.ack for each in self.wire.frames))
        return self

    def stream(self) -> int:
        """The next stream's id."""
        sid = self.next_sid
        self.next_sid += 2
        self.wire.streams[sid] = Half(self.wire.initial_window)
        return sid

    def raw(self, fields: Pairs, end: bool = True, method: str = "GET") -> Call2:
        """A request of exactly these fields."""
        sid = self.stream()
        self.wire.section(sid, fields, end)
        return Call2(self, sid, method)

    def open(
        self,
        method: str = "GET",
        path: str = "/",
        host: str = "reviews",
        headers: Iterable[tuple[str, str]] = (),
        end: bool = True,
    ) -> Call2:
        """Begin a request; without `end` a body follows."""
        more = [(name.lower(), value) for name, value in given(headers)]
        fields = f.request(method.encode(), path.encode(), host.encode(), more=more)
        return self.raw(fields, end, method)

    def ask(
        self,
        method: str = "GET",
        path: str = "/",
        host: str = "reviews",
        headers: Iterable[tuple[str, str]] = (),
        body: bytes | None = None,
        trailers: Pairs = (),
    ) -> Call2:
        """A whole request."""
        trailers = list(trailers)
        call = self.open(method, path, host, headers, end=body is None and not trailers)
        if body is not None:
            call.send(body, end=not trailers)
        if trailers:
            call.end(trailers)
        return call

    def get(self, path: str = "/", host: str = "reviews", headers: Iterable[tuple[str, str]] = ()) -> Response:
        return self.ask("GET", path, host, headers).response()

    def ended(self, limit_s: float = 5.0) -> bool:
        """Whether the peer ends the connection within the limit."""
        return self.wire.wait(lambda: self.wire.ended is not None, limit_s)


class Call1:
    """A request over HTTP/1.1 and its answer."""

    def __init__(self, client: "Http1Client", method: str, chunked: bool) -> None:
        self.client, self.method, self.chunked = client, method, chunked
        self._head: Response | None = None
        self._early: list[Response] = []
        self._held = b""

    def send(self, data: bytes, end: bool = False) -> None:
        if self.chunked:
            wire = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
            self.client.client.send(wire + (b"0\r\n\r\n" if end else b""))
        else:
            self.client.client.send(data)

    def end(self, trailers: Pairs = ()) -> None:
        if self.chunked:
            lines = b"".join(b"%b: %b\r\n" % field for field in trailers)
            self.client.client.send(b"0\r\n" + lines + b"\r\n")

    def cancel(self) -> None:
        self.client.client.reset()

    def informed(self, count: int = 1, limit_s: float = WAIT_S) -> list[Response]:
        self.client.client.sock.settimeout(limit_s)
        while len(self._early) < count:
            self._early.append(Response(*self.client.client.reader.head()))
        return self._early[:count]

    def head(self, limit_s: float = WAIT_S) -> Response:
        if self._head is None:
            self.client.client.sock.settimeout(limit_s)
            try:
                self._head = self.client.client.response(self.method, body=False)
            except (Closed, OSError) as exc:
                raise Cut(None) from exc
            self._head.informational = self._early + self._head.informational
        return self._head

    def first(self, size: int, limit_s: float = WAIT_S) -> bytes:
        """The next so many bytes of the body."""
        reader = self.client.client.reader
        self.client.client.sock.settimeout(limit_s)
        head = self.head(limit_s)
        try:
            if head.header("transfer-encoding") is None:
                return reader.exactly(size)
            while len(self._held) < size:
                self._held += reader.exactly(int(reader.until(b"\r\n")[:-2], 16))
                reader.exactly(2)
        except (Closed, OSError) as exc:
            raise Cut(None) from exc
        data, self._held = self._held[:size], self._held[size:]
        return data

    def response(self, limit_s: float = WAIT_S) -> Response:
        response = self.head(limit_s)
        try:
            self.client.client._read_body(response, self.method)
        except (Closed, OSError) as exc:
            raise Cut(None) from exc
        return response


class Http1Client:
    """The same over HTTP/1.1: one request after the other."""

    version = 1

    def __init__(self, sock: socket.socket) -> None:
        self.client = Client(sock)

    def __enter__(self) -> "Http1Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.client.close()

    def abort(self) -> None:
        self.client.reset()

    def open(
        self,
        method: str = "GET",
        path: str = "/",
        host: str = "reviews",
        headers: Iterable[tuple[str, str]] = (),
        end: bool = True,
    ) -> Call1:
        """Begin a request; without `end` and without a content-length among its fields it is chunked."""
        fields = [("host", host), *headers]
        chunked = not end and all(name.lower() != "content-length" for name, _ in fields)
        if chunked:
            fields.append(("transfer-encoding", "chunked"))
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields)
        self.client.send(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1"))
        return Call1(self, method, chunked)

    def ask(
        self,
        method: str = "GET",
        path: str = "/",
        host: str = "reviews",
        headers: Iterable[tuple[str, str]] = (),
        body: bytes | None = None,
        trailers: Pairs = (),
    ) -> Call1:
        trailers = list(trailers)
        call = self.open(method, path, host, headers, end=body is None and not trailers)
        if body:
            call.send(body)
        if body is not None or trailers:
            call.end(trailers)
        return call

    def get(self, path: str = "/", host: str = "reviews", headers: Iterable[tuple[str, str]] = ()) -> Response:
        return self.ask("GET", path, host, headers).response()


def caller(version: int, address: str | Address) -> "Http1Client | Http2Client":
    """On a plain connection of its own."""
    return Http2Client(dial(address)) if version == 2 else Http1Client(dial(address))


# -- applications


class Exchange(Fields):
    """One request as the application sees it. Fields that belong to the connection are left out of `headers`."""

    version = 0
    method: str
    path: str
    host: bytes
    headers: Headers

    def __init__(self) -> None:
        self.body = b""
        self.trailers: Headers = []

    def read(self) -> bytes:
        """The whole body, with its trailers. Raises Cut where it is not completed."""
        raise NotImplementedError

    def first(self, size: int) -> bytes:
        """That much of the body."""
        raise NotImplementedError

    def inform(self, status: int, headers: Pairs = ()) -> None:
        raise NotImplementedError

    def begin(self, status: int = 200, headers: Pairs = ()) -> None:
        """The head of an answer whose length it does not tell."""
        raise NotImplementedError

    def piece(self, data: bytes) -> None:
        raise NotImplementedError

    def end(self, trailers: Pairs = ()) -> None:
        raise NotImplementedError

    def reply(self, status: int = 200, body: bytes = b"", headers: Pairs = ()) -> None:
        """A whole answer, of a stated length."""
        raise NotImplementedError

    def bare(self, status: int, headers: Pairs = ()) -> None:
        """A whole answer without content, and nothing said of its length."""
        raise NotImplementedError

    def cut(self) -> None:
        """Break off."""
        raise NotImplementedError

    def gone(self, limit_s: float = 10.0) -> bool:
        """Whether the caller gives the request up within the limit."""
        raise NotImplementedError


Handler = Callable[[Exchange], None]
OF_CONNECTION = {b"host", b"connection", b"transfer-encoding", b"te", b"keep-alive"}


class Exchange1(Exchange):
    version = 1

    def __init__(self, conn: Conn, request: Request) -> None:
        super().__init__()
        self.conn, self.request = conn, request
        self.method, self.path = request.method.decode(), request.target.decode()
        self.host = request.header("host") or b""
        self.headers = [field for field in request.headers if field[0] not in OF_CONNECTION]
        self.whole = False

    def read(self) -> bytes:
        try:
            if self.request.header("transfer-encoding") is not None:
                self.body, self.trailers = self.conn.reader.chunked()
            else:
                self.body = self.conn.reader.exactly(int(self.request.header("content-length") or 0))
        except (Closed, OSError) as exc:
            raise Cut(None) from exc
        self.whole = True
        self.conn.backend.complete.append(self.request)
        return self.body

    def first(self, size: int) -> bytes:
        if self.request.header("transfer-encoding") is None:
            return self.conn.reader.exactly(size)
        data = b""
        while len(data) < size:
            data += self.conn.reader.exactly(int(self.conn.reader.until(b"\r\n")[:-2], 16))
            self.conn.reader.exactly(2)
        return data

    def inform(self, status: int, headers: Pairs = ()) -> None:
        self._head(status, headers)

    def _head(self, status: int, headers: Pairs) -> None:
        lines = b"".join(b"%b: %b\r\n" % field for field in headers)
        self.conn.send(b"HTTP/1.1 %d X\r\n%b\r\n" % (status, lines))

    def begin(self, status: int = 200, headers: Pairs = ()) -> None:
        self._head(status, [*headers, (b"transfer-encoding", b"chunked")])

    def piece(self, data: bytes) -> None:
        self.conn.send(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self, trailers: Pairs = ()) -> None:
        self.conn.send(b"0\r\n" + b"".join(b"%b: %b\r\n" % field for field in trailers) + b"\r\n")

    def reply(self, status: int = 200, body: bytes = b"", headers: Pairs = ()) -> None:
        self._head(status, [*headers, (b"content-length", b"%d" % len(body))])
        if body and self.method != "HEAD":
            self.conn.send(body)

    def bare(self, status: int, headers: Pairs = ()) -> None:
        self._head(status, headers)

    def cut(self) -> None:
        self.conn.reset()

    def gone(self, limit_s: float = 10.0) -> bool:
        return self.conn.closed(limit_s)


class Exchange2(Exchange):
    version = 2

    def __init__(self, wire: Wire, sid: int, half: Half, request: Request, conn: Conn) -> None:
        super().__init__()
        self.wire, self.sid, self.half, self.request, self.conn = wire, sid, half, request, conn
        pseudo = {name: value for name, value in half.sections[0] if name[:1] == b":"}
        self.pseudo = pseudo
        self.method, self.path = request.method.decode(), request.target.decode()
        self.host = pseudo.get(b":authority", b"")
        self.headers = [field for field in half.sections[0] if field[0][:1] != b":" and field[0] not in OF_CONNECTION]

    def read(self) -> bytes:
        half = self.half
        self.wire.wait(lambda: half.ended or half.reset is not None)
        if not half.ended:
            raise Cut(half.reset, bytes(half.body))
        self.body = bytes(half.body)
        if len(half.sections) > 1:
            self.trailers = list(half.sections[-1])
        self.conn.backend.complete.append(self.request)
        return self.body

    def first(self, size: int) -> bytes:
        half = self.half
        self.wire.wait(lambda: len(half.body) >= size or half.reset is not None)
        if len(half.body) < size:
            raise Cut(half.reset, bytes(half.body))
        return bytes(half.body[:size])

    def inform(self, status: int, headers: Pairs = ()) -> None:
        self.wire.section(self.sid, f.response(status, headers), False)

    def begin(self, status: int = 200, headers: Pairs = ()) -> None:
        self.wire.section(self.sid, f.response(status, headers), False)

    def piece(self, data: bytes) -> None:
        self.wire.body(self.sid, data, False)

    def end(self, trailers: Pairs = ()) -> None:
        trailers = list(trailers)
        self.wire.send(f.headers(self.sid, trailers, True) if trailers else f.data(self.sid, b"", True))

    def reply(self, status: int = 200, body: bytes = b"", headers: Pairs = ()) -> None:
        fields = f.response(status, [*headers, (b"content-length", b"%d" % len(body))])
        body = b"" if self.method == "HEAD" else body
        self.wire.section(self.sid, fields, not body)
        if body:
            self.wire.body(self.sid, body, True)

    def bare(self, status: int, headers: Pairs = ()) -> None:
        self.wire.section(self.sid, f.response(status, headers), True)

    def cut(self) -> None:
        self.wire.send(f.rst_stream(self.sid, 2))

    def gone(self, limit_s: float = 10.0) -> bool:
        half = self.half
        self.wire.wait(lambda: half.reset is not None or self.wire.ended, limit_s)
        return half.reset is not None or self.wire.ended is not None


def serve1(handle: Handler) -> Script:
    """An application over HTTP/1.1."""

    def script(conn: Conn) -> None:
        while True:
            exchange = Exchange1(conn, conn.head_of_request())
            try:
                handle(exchange)
            except Cut:
                return
            if not exchange.whole and exchange.request.header("content-length") not in (None, b"0"):
                return  # the rest of the request would be taken for another one

    return script


def serve2(handle: Handler, settings: dict[int, int] | None = None) -> Script:
    """An application over HTTP/2 with prior knowledge; each request has a thread."""

    def script(conn: Conn) -> None:
        threads: list[threading.Thread] = []
        wire = Wire(conn.sock, True, settings)

        def opened(sid: int, half: Half) -> None:
            pseudo = {name: value for name, value in half.sections[0] if name[:1] == b":"}
            line = b"%b %b HTTP/2" % (pseudo[b":method"], pseudo.get(b":path", b"-"))
            request = Request(line, [field for field in half.sections[0] if field[0][:1] != b":"], conn.number)
            conn.backend.requests.append(request)
            exchange = Exchange2(wire, sid, half, request, conn)
            thread = threading.Thread(target=run, args=(exchange,), daemon=True)
            threads.append(thread)
            thread.start()

        def run(exchange: Exchange2) -> None:
            try:
                handle(exchange)
            except (Cut, Closed, OSError):
                pass
            except BaseException as exc:
                conn.backend.failures.append(exc)

        wire.opened = opened
        wire.run()

    return script


def serve(version: int, handle: Handler) -> Script:
    return serve2(handle) if version == 2 else serve1(handle)


def names(fields: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
    return [name for name, _ in fields]
