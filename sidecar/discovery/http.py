"""The client of the control plane's HTTP APIs: requests and streams of lines over a pinned TLS context, bounded.

The one module of the sidecar with an HTTP client library (httpcore, which is httpx without its conveniences); it is
imported only where there is a control plane. Must not know what is asked. Invariants: every wait has a limit, every
answer a greatest size; what goes wrong is an `Unreachable` (nobody answered as they should: try another address, or
later) or a `Refused` (an answer that says no, with its reason).
"""

import errno
import json
import logging
import math
import os
import socket
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpcore
import trio

from certs.client import WrongPeer

SO_MARK = getattr(socket, "SO_MARK", 36)
CONNECT_S = 3.0
ANSWER_S = 10.0
BODY_BYTES_MAX = 8 * 1024 * 1024
LINE_BYTES_MAX = 9 * 1024 * 1024  # one resource may have 8 MiB
READ_BYTES = 64 * 1024
CONNECTIONS_MAX = 8
IDLE_S = 30.0
WORDS_MAX = 500

Json = Any
_FAILED = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
)
_CLOSED = (httpcore.RemoteProtocolError, httpcore.ReadError, httpcore.WriteError)


class Unreachable(Exception):
    """No usable answer: the text says from where, and why."""


@dataclass(eq=False)
class Refused(Exception):
    """An answer that is an error. `code` is the API's own word for it, "" where none was given."""

    status: int
    code: str = ""
    message: str = ""
    help: str = ""
    retry_after_s: float | None = None
    details: Json = None

    def __str__(self) -> str:
        text = self.message or f"it answered with status {self.status}"
        return f"{text} ({self.help})" if self.help else text

    @property
    def passing(self) -> bool:
        """Whether the same request may well succeed later."""
        return self.status in (408, 429) or self.status >= 500


class Client:
    """Requests to any address that proves the context's identity. `mark`: SO_MARK of our own traffic."""

    def __init__(self, context: ssl.SSLContext, sni: str, *, mark: int | None = None) -> None:
        logging.getLogger("httpcore").setLevel(logging.WARNING)  # at debug it writes a line a step
        self._sni = sni
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=CONNECTIONS_MAX,
            max_keepalive_connections=CONNECTIONS_MAX,
            keepalive_expiry=IDLE_S,
            network_backend=_Network(mark),
        )

    async def aclose(self) -> None:
        with trio.CancelScope(shield=True):
            await self._pool.aclose()

    async def call(
        self,
        method: str,
        address: str,
        path: str,
        body: Json = None,
        *,
        timeout_s: float = ANSWER_S,
        bearer: str = "",
        repeat: bool = True,
    ) -> Json:
        """The answer's JSON. A request that met a connection which had just been closed is sent once more, unless
        `repeat` forbids it. Raises Unreachable or Refused."""
        for attempt in (0, 1):
            try:
                with trio.fail_after(timeout_s):
                    async with self._open(method, address, path, body, timeout_s, bearer) as response:
                        return await _answer(address, response)
            except trio.TooSlowError:
                raise Unreachable(f"{address} did not answer within {timeout_s:g} s") from None
            except _FAILED as error:
                if not (isinstance(error, _CLOSED) and repeat and attempt == 0):
                    raise Unreachable(f"{address}: {why(error)}") from error
        raise AssertionError("the second attempt returns or raises")

    @asynccontextmanager
    async def lines(self, address: str, path: str, body: Json, silence_s: float) -> AsyncIterator[AsyncIterator[Json]]:
        """The values of an endless answer of lines of JSON. From its iteration, too, come Unreachable (silence, too
        long a line, the end of the connection) and Refused; a clean end ends it."""
        opened = False
        try:
            async with self._open("POST", address, path, body, max(silence_s, ANSWER_S)) as response:
                if response.status != 200:
                    await _answer(address, response)
                opened = True
                yield _lines(address, response, silence_s)
        except _FAILED as error:
            raise Unreachable(f"{address}: {why(error)}") from error
        except trio.TooSlowError:
            raise Unreachable(f"{address}: {'silence' if opened else 'no answer'} for {silence_s:g} s") from None

    @asynccontextmanager
    async def _open(
        self, method: str, address: str, path: str, body: Json, timeout_s: float, bearer: str = ""
    ) -> AsyncIterator[httpcore.Response]:
        headers = [("host", self._sni), ("accept", "application/json")]
        if bearer:
            headers.append(("authorization", f"Bearer {bearer}"))
        content = None
        if body is not None:
            headers.append(("content-type", "application/json"))
            content = json.dumps(body, separators=(",", ":")).encode()
            headers.append(("content-length", str(len(content))))
        connect_s = min(timeout_s, CONNECT_S)
        timeout = {"connect": connect_s, "read": timeout_s, "write": timeout_s, "pool": timeout_s}
        host, port = split_address(address)
        url = httpcore.URL(scheme=b"https", host=host.encode(), port=port, target=path.encode())
        extensions = {"timeout": timeout, "sni_hostname": self._sni}
        async with self._pool.stream(method, url, headers=headers, content=content, extensions=extensions) as response:
            yield response


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of `host:port`, of which an IPv6 host stands in brackets. Raises Unreachable."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host.isascii() and host and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise Unreachable(f"{address[:100]!r} is not HOST:PORT")
    return host, int(port)


async def _answer(address: str, response: httpcore.Response) -> Json:
    data = await _bounded(address, response)
    good = 200 <= response.status < 300
    value: Json = None
    if data:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            if good:
                raise Unreachable(f"{address} answered with something that is not JSON") from None
    if good:
        return value
    error = value.get("error") if isinstance(value, dict) else None
    if not isinstance(error, dict):
        error = {}
    raise Refused(
        response.status,
        _word(error.get("code")),
        _word(error.get("message")),
        _word(error.get("help")),
        _seconds(next((value for name, value in response.headers if name.lower() == b"retry-after"), b"")),
        error.get("details"),
    )


async def _bounded(address: str, response: httpcore.Response) -> bytes:
    data = bytearray()
    async for piece in response.aiter_stream():
        data += piece
        if len(data) > BODY_BYTES_MAX:
            raise Unreachable(f"{address} answered with more than {BODY_BYTES_MAX} bytes")
    return bytes(data)


async def _lines(address: str, response: httpcore.Response, silence_s: float) -> AsyncIterator[Json]:
    held = bytearray()
    pieces = aiter(response.aiter_stream())
    while True:
        with trio.fail_after(silence_s):
            try:
                piece = await anext(pieces)
            except StopAsyncIteration:
                return
            except _FAILED as error:
                raise Unreachable(f"{address}: {why(error)}") from error
        begun = len(held)
        held += piece
        while (end := held.find(b"\n", begun)) >= 0:
            line = bytes(held[:end])
            del held[: end + 1]
            begun = 0
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                raise Unreachable(f"{address} sent a line that is not JSON") from None
        if len(held) > LINE_BYTES_MAX:
            raise Unreachable(f"{address} sent a line of more than {LINE_BYTES_MAX} bytes")


def _word(value: object) -> str:
    return value[:WORDS_MAX] if isinstance(value, str) else ""


def _seconds(text: bytes) -> float | None:
    return min(float(text[:9]), 3600.0) if text.isdigit() else None


def why(error: BaseException) -> str:
    """One line on why a request failed: of the chain of causes, the first that says it plainly."""
    seen: BaseException | None = error
    shown = ""
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            return _verification(seen.verify_message)
        if isinstance(seen, WrongPeer):
            return str(seen)
        if isinstance(seen, ssl.SSLEOFError) or (isinstance(seen, ssl.SSLError) and "EOF" in (seen.reason or "")):
            return "it has closed the connection within TLS"
        if isinstance(seen, ssl.SSLError):
            return f"TLS: {(seen.reason or str(seen)).replace('_', ' ').lower()}"
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        shown = str(seen) or shown
        seen = seen.__cause__ or seen.__context__
    return shown or type(error).__name__


def _verification(message: str) -> str:
    hint = ""
    if "not yet valid" in message or "expired" in message:
        hint = "; is the clock of this host, or of the control plane's, right?"
    return f"the control plane's certificate does not verify: {message}{hint}"


class _Network(httpcore.AsyncNetworkBackend):
    """Trio's network, with a mark on our own connections, so that interception does not lead them back to us."""

    def __init__(self, mark: int | None) -> None:
        self._mark = mark

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's interface, here and below
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        with trio.move_on_after(CONNECT_S if timeout is None else timeout):
            try:
                return _Stream(await self._connect(host, port))
            except OSError as error:
                raise httpcore.ConnectError(error.strerror or str(error)) from error
        raise httpcore.ConnectTimeout("no connection in time")

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)

    async def _connect(self, host: str, port: int) -> trio.SocketStream:
        try:
            found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            raise OSError(errno.EHOSTUNREACH, f"{host} cannot be resolved: {error}") from None
        failure = OSError(errno.EHOSTUNREACH, f"{host} has no address")
        for family, kind, protocol, _, where in found[:8]:
            sock = trio.socket.socket(family, kind, protocol)
            try:
                if self._mark is not None:
                    sock.setsockopt(socket.SOL_SOCKET, SO_MARK, self._mark)
                await sock.connect(where)
                if sock.getsockname() == sock.getpeername():  # nobody listens: the kernel met us with ourselves
                    raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
                return trio.SocketStream(sock)
            except OSError as error:
                sock.close()
                failure = OSError(error.errno, os.strerror(error.errno)) if error.errno else error
            except BaseException:
                sock.close()
                raise
        raise failure


class _Stream(httpcore.AsyncNetworkStream):
    """One connection, plain or TLS."""

    def __init__(self, stream: Any, sock: Any = None) -> None:
        self._stream = stream
        self._socket = stream.socket if sock is None else sock

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        with trio.move_on_after(math.inf if timeout is None else timeout):
            try:
                return bytes(await self._stream.receive_some(max_bytes))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise httpcore.ReadError(why(error)) from error
        raise httpcore.ReadTimeout("no answer in time")

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        if not buffer:
            return
        with trio.move_on_after(math.inf if timeout is None else timeout):
            try:
                await self._stream.send_all(buffer)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise httpcore.WriteError(why(error)) from error
            return
        raise httpcore.WriteTimeout("the request could not be sent in time")

    async def aclose(self) -> None:
        await trio.aclose_forcefully(self._stream)

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        stream = trio.SSLStream(self._stream, ssl_context, server_hostname=server_hostname, https_compatible=False)
        try:
            with trio.move_on_after(math.inf if timeout is None else timeout):
                await stream.do_handshake()
                return _Stream(stream, self._socket)
        except trio.BrokenResourceError as error:
            await self.aclose()
            raise httpcore.ConnectError(why(error)) from error
        except BaseException:
            await self.aclose()
            raise
        await self.aclose()
        raise httpcore.ConnectTimeout("no TLS handshake in time")

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            return self._socket.is_readable()
        return self._socket if info == "socket" else None
