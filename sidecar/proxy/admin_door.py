"""The admin interface's door: its listening socket, and what it will show.

What answers (`admin`, on h11) is loaded with the first connection, since a start need not wait for it. Must not know
the proxy: everything comes through AdminSources.
"""

import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from .bind import bind_listener

if TYPE_CHECKING:
    from .admin import Admin
    from .admin_pages import Row

CONNECTIONS_MAX = 32


@dataclass(frozen=True, slots=True)
class AdminSources:
    """What the interface shows. Called in the task of the request, so they must be quick and may not block."""

    metrics: Callable[[bool], Iterable[bytes]]  # True: OpenMetrics; in steps of under a millisecond
    livez: Callable[[], Sequence[str]]  # what is wrong; empty: alive
    readyz: Callable[[], Sequence[str]]  # what is missing; empty: ready. While draining, say so here
    config: Callable[[], object]  # JSON data, without secrets
    clusters: Callable[[], Iterable["Row"]]  # a row for each endpoint; read in slices, so must tolerate changes
    set_log_level: Callable[[str], None]  # ValueError where there is no such level
    events: Callable[[], Iterable["Row"]] = tuple  # what has happened to endpoints, the latest first
    overload: Callable[[], Iterable["Row"]] = tuple  # the limit before the own application, where there is one


async def serve_admin(sources: AdminSources, sock: socket.socket) -> None:
    """Serve until cancelled."""
    made: list[Admin] = []

    async def handle(stream: trio.abc.Stream) -> None:
        if not made:
            from .admin import Admin

            made.append(Admin(sources))
        await made[0].handle(stream)

    await trio.serve_listeners(handle, [trio.SocketListener(trio.socket.from_stdlib_socket(sock))])


def bind_admin(address: str) -> socket.socket:
    """A listening socket for `HOST:PORT` on loopback, or `unix:PATH` (mode 0600). BindError, OSError and
    ValueError say what is wrong."""
    if address.startswith("unix:"):
        return _bind_unix(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    name = "127.0.0.1" if host == "localhost" else host.removeprefix("[").removesuffix("]")
    try:
        ip = ipaddress.ip_address(name)
        number = int(port)
    except ValueError:
        raise ValueError(f"admin address {address!r}: give HOST:PORT or unix:PATH") from None
    if not ip.is_loopback or not 0 <= number <= 65535:
        raise ValueError(f"admin address {address!r}: the admin interface is for loopback only (127.0.0.1 or [::1])")
    return bind_listener(name, number, backlog=CONNECTIONS_MAX)


def _bind_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        _remove_stale(path)
        umask = os.umask(0o177)  # the mode must hold from the first moment: chmod would come too late
        try:
            sock.bind(path)
        finally:
            os.umask(umask)
        sock.listen(CONNECTIONS_MAX)
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot listen on unix:{path}: {error.strerror}") from error
    return sock


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens on (left by a kill -9); anything else stays, and bind fails."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        if probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)
