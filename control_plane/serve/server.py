"""An HTTP/1.1 server for the application of the sidecars, on a Unix socket that nobody but our own listener reaches.

Each sidecar asks something every few seconds and keeps one stream, so what a request and a connection cost is what a
replica carries; a general server costs three times as much. It can be small because of who calls: our listener sends
one request after the other, each well-formed, with one framing field, and has bounded it in size and time. Must not
know what is asked, only that an application reads what it wants of a body before it answers. Invariants: whatever is
not of the form that our listener writes ends the connection; a connection goes on only after a request that was read
whole and an answer that was sent whole; an application's error costs its own connection alone.
"""

import errno
import logging
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import trio

from sidecar.wire.http1 import STATUS_LINES, Message, ProtocolError, chunk, last_chunk
from sidecar.wire.http1_chunks import Chunks

log = logging.getLogger(__name__)

RECEIVE_BYTES = 64 * 1024
HEAD_BYTES_MAX = 128 * 1024  # our listener's own limit is lower
BACKLOG = 4096
ACCEPTS_AT_ONCE = 64
CROWDED_S = 0.1
CROWDED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))

Event = Mapping[str, Any]
App = Callable[[Any, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]

_split_line = re.compile(rb"([A-Z][A-Z0-9_-]*) ([!-~]+) HTTP/1\.1").fullmatch
_split_field = re.compile(rb"([!#$%&'*+\-.^_`|~0-9a-z]+): ?([^\x00\r\n]*)").fullmatch

_DISCONNECT: Event = {"type": "http.disconnect"}
_ASGI = {"version": "3.0", "spec_version": "2.3"}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def listen(path: Path) -> socket.socket:
    """A socket that is this user's alone. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        sock.bind(str(path))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(mask)
    return sock


async def serve_app(app: App, sock: socket.socket) -> None:
    """Until cancelled."""
    with sock:
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(sock)
                for _ in range(ACCEPTS_AT_ONCE):
                    try:
                        accepted = sock.accept()[0]
                    except BlockingIOError:
                        break
                    except OSError as error:
                        if error.errno not in CROWDED:
                            continue  # that one has gone again
                        log.error("a connection of our own listener has to wait: %s", error.strerror)
                        await trio.sleep(CROWDED_S)
                        break
                    accepted.setblocking(False)
                    nursery.start_soon(_Connection(app, accepted).serve)


class _Connection:
    """One of our listener's. `receive` and `send` are what the application is given."""

    __slots__ = (
        "_app",
        "_chunked",
        "_chunks",
        "_data",
        "_expected",
        "_given",
        "_left",
        "_lost",
        "_method",
        "_over",
        "_part",
        "_sock",
        "_start",
        "_started",
    )

    def __init__(self, app: App, sock: socket.socket) -> None:
        self._app, self._sock = app, sock
        self._data = b""  # read, and not yet taken
        self._lost = False
        self._left = 0  # of a counted body
        self._chunks: Chunks | None = None  # of one in chunks that has not come whole
        self._part: Message | None = None  # where its data goes
        self._expected = False  # the caller waits for a 100 before it sends its body
        self._given = False  # the application has all of the body
        self._method = ""
        self._start: Event | None = None  # the answer's, not yet sent
        self._started = self._over = False  # sent: the answer's head, and its end
        self._chunked = False

    async def serve(self) -> None:
        try:
            while await self._one():
                pass
        except ProtocolError as error:
            log.error("our own listener does not speak as expected: %s", error)
        except Exception:
            log.exception("an unexpected error on a connection of our own listener")
        finally:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()

    async def _one(self) -> bool:
        """One request; whether another may follow. Raises ProtocolError."""
        scope = await self._head()
        if scope is None:
            return False
        try:
            await self._app(scope, self.receive, self.send)
        except Exception:
            log.exception("an unexpected error of the application, asked for %.100s", scope["path"])
        if not self._over and not self._started:
            await self.send({"type": "http.response.start", "status": 500, "headers": []})
            await self.send({"type": "http.response.body"})
        return self._over and not self._lost and self._whole

    # -- reading

    async def _recv(self) -> bytes:
        """More; nothing: the listener has hung up."""
        try:
            await trio.lowlevel.wait_readable(self._sock)
            data = self._sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return await self._recv()
        except OSError:
            data = b""
        if not data:
            self._lost = True
        return data

    async def _head(self) -> dict[str, Any] | None:
        """The next request, as ASGI has it; None: there is none. Raises ProtocolError."""
        data = self._data
        while (end := data.find(b"\r\n\r\n")) < 0:
            if len(data) > HEAD_BYTES_MAX:
                raise ProtocolError(431, "a head without end")
            more = await self._recv()
            if not more:
                return None
            data = data + more if data else more
        self._data = data[end + 4 :]
        first, *lines = data[:end].split(b"\r\n")
        line = _split_line(first)
        if line is None:
            raise ProtocolError(400, "malformed request line")
        method, target = line.groups()
        headers = []
        for each in lines:
            field = _split_field(each)
            if field is None:
                raise ProtocolError(400, "malformed field")
            headers.append(field.groups())
        self._frame(headers)
        self._method = method.decode()
        self._start, self._started, self._over, self._chunked = None, False, False, False
        path, _, query = target.partition(b"?")
        return {
            "type": "http",
            "asgi": _ASGI,
            "http_version": "1.1",
            "method": self._method,
            "scheme": "http",
            "path": unquote(path.decode("ascii")),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": headers,
            "client": None,
            "server": None,
        }

    def _frame(self, headers: list[Any]) -> None:
        """How long the body is. Raises ProtocolError."""
        self._given, self._left, self._chunks, self._part, self._expected = False, 0, None, None, False
        framed = False
        for name, value in headers:
            if name == b"content-length":
                if framed or not value.isdigit() or len(value) > 18:
                    raise ProtocolError(400, "content-length, and another framing field or no number")
                self._left, framed = int(value), True
            elif name == b"transfer-encoding":
                if framed or value != b"chunked":
                    raise ProtocolError(400, "transfer-encoding, and another framing field or not chunked")
                self._chunks, self._part, framed = Chunks(), Message(), True
            elif name == b"expect":
                self._expected = True

    @property
    def _whole(self) -> bool:
        """Whether all of the request has come; what is here of it and nobody wants is thrown away."""
        self._take()
        return not self._left and self._chunks is None

    def _take(self) -> bytes:
        """What there is of the body. Raises ProtocolError."""
        data = self._data
        if self._chunks is not None:
            assert self._part is not None
            if data:
                rest, at = self._chunks.feed(self._part, data, 0)
                self._data = rest[at:]
            if self._part.done:
                self._chunks = None
            return self._part.take()
        left = self._left
        if not left or not data:
            return b""
        self._data = data[left:]
        self._left = left - len(data) if len(data) < left else 0
        return data if len(data) <= left else data[:left]

    async def receive(self) -> Event:
        if self._given:
            while not self._lost and not self._over:
                if await self._recv():
                    self._lost = True  # it sends nothing before it is answered
            return _DISCONNECT
        body = self._take()
        while not body and (self._left or self._chunks is not None):
            if self._expected:
                self._expected = False
                await self._write(_CONTINUE)
            more = await self._recv()
            if not more:
                return _DISCONNECT
            self._data += more
            body = self._take()
        self._given = not self._left and self._chunks is None
        return {"type": "http.request", "body": body, "more_body": not self._given}

    # -- answering

    async def send(self, message: Event) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if message["type"] != "http.response.body" or self._over:
            raise RuntimeError(f"{message['type']}, after the end of an answer or out of place")
        body: bytes = message.get("body", b"")
        more = bool(message.get("more_body", False))
        data = b""
        if not self._started:
            if self._start is None:
                raise RuntimeError("a body before its head")
            data = self._encode_head(self._start, None if more else len(body))
            self._start, self._started = None, True
        if self._method != "HEAD":
            if self._chunked:
                data += chunk(body)
                if not more:
                    data += last_chunk([])
            else:
                data += body
        self._over = not more
        if data:
            await self._write(data)

    def _encode_head(self, start: Event, length: int | None) -> bytes:
        """`length` None: not known yet."""
        lines = [STATUS_LINES[start["status"]]]
        known = False
        for name, value in start.get("headers", ()):
            lines.append(b"%b: %b\r\n" % (name, value))
            known |= name == b"content-length"
        lines.append(_date())
        if not known:
            self._chunked = length is None
            lines.append(b"transfer-encoding: chunked\r\n" if length is None else b"content-length: %d\r\n" % length)
        lines.append(b"\r\n" if self._whole else b"connection: close\r\n\r\n")
        return b"".join(lines)

    async def _write(self, data: bytes) -> None:
        """What the listener does not take any more is dropped: `receive` says that it has gone."""
        left: bytes | memoryview = data
        try:
            while left and not self._lost:
                try:
                    sent = self._sock.send(left)
                except BlockingIOError:
                    sent = 0
                if sent == len(left):
                    return
                left = memoryview(left)[sent:]
                await trio.lowlevel.wait_writable(self._sock)
        except OSError:
            self._lost = True
        except BaseException:
            self._lost = True  # cut in the middle
            raise


_said: tuple[int, bytes] = (0, b"")


def _date() -> bytes:
    """The field, made once a second: clients compare their clocks with it."""
    global _said
    now = int(time.time())
    if _said[0] != now:
        _said = now, f"date: {formatdate(now, usegmt=True)}\r\n".encode()
    return _said[1]
