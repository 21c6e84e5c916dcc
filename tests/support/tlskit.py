"""Connected loopback sockets, plain and TLS, and an owner that records what its channel tells it."""

import select
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from certs.files import IdentityFiles, load_identity
from sidecar.proxy.reactor import Reactor
from support.pki import Pki


def identity_files(pki: Pki, tmp_path: Path, service: str) -> IdentityFiles:
    return load_identity(pki.identity(tmp_path, service))


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """(client, server), both non-blocking."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    for sock in (client, server):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client, server


def tls_pair(client_context: ssl.SSLContext, server_context: ssl.SSLContext, sni: str | None = None) -> tuple[Any, Any]:
    """(client, server) after their handshake, both non-blocking."""
    a, b = tcp_pair()
    client = client_context.wrap_socket(
        a, do_handshake_on_connect=False, suppress_ragged_eofs=False, server_hostname=sni
    )
    server = server_context.wrap_socket(b, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False)
    todo = [client, server]
    while todo:
        for sock in list(todo):
            try:
                sock.do_handshake()
                todo.remove(sock)
            except ssl.SSLWantReadError:
                select.select([sock], [], [], 0.01)
    return client, server


class Recorder:
    """The owner of a channel in a test."""

    def __init__(self) -> None:
        self.channel: Any = None
        self.chunks: list[bytes] = []
        self.size = 0
        self.drains = 0
        self.ends = 0
        self.losses: list[Exception | None] = []
        self.on_received: Callable[[bytes], object] = lambda data: None

    @property
    def data(self) -> bytes:
        return b"".join(self.chunks)

    def received(self, data: bytes) -> None:
        assert not self.losses
        self.chunks.append(bytes(data))
        self.size += len(data)
        self.on_received(data)

    def drained(self) -> None:
        self.drains += 1

    def ended(self) -> None:
        self.ends += 1

    def lost(self, exc: Exception | None) -> None:
        self.losses.append(exc)


@asynccontextmanager
async def running_reactor(limit_s: float = 20) -> AsyncIterator[Reactor]:
    """A reactor that runs, fails the test where a callback crashed, and is gone at the end."""
    crashes: list[Exception] = []
    with trio.fail_after(limit_s):
        async with trio.open_nursery() as nursery:
            reactor = Reactor()
            reactor.on_crash = crashes.append
            nursery.start_soon(reactor.run)
            yield reactor
            nursery.cancel_scope.cancel()
    assert crashes == []


async def until(condition: Callable[[], object], limit_s: float = 10) -> None:
    """Wait for something that other tasks and the kernel bring about."""
    with trio.fail_after(limit_s):
        while not condition():  # noqa: ASYNC110 - the kernel sets no Event
            await trio.sleep(0.002)


async def read_all(sock: Any, limit: int = 1 << 62) -> bytes:
    """Everything up to the peer's clean end; raises what breaks the stream."""
    parts = []
    total = 0
    while total < limit:
        try:
            data = sock.recv(65536)
        except (BlockingIOError, ssl.SSLWantReadError):
            await trio.lowlevel.wait_readable(sock)
            continue
        if not data:
            break
        parts.append(data)
        total += len(data)
    return b"".join(parts)


async def send_all(sock: Any, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except (BlockingIOError, ssl.SSLWantWriteError):
            await trio.lowlevel.wait_writable(sock)
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(sock)
