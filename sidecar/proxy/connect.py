"""Opens a connection to an endpoint, with TLS and the callee's identity settled before it is handed on.

Must not know pools, policy or channels. Invariants: a socket is either returned or closed, whatever happens, also on
cancellation; no application byte is sent to a callee whose SPIFFE ID and ALPN are not those asked for.
"""

import errno
import os
import socket
import ssl
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import trio

from sidecar.policy.endpoint import UNIX

from .handshake import Turn, handshake
from .tls import NOBODY, BanCheck, PeerRejected, nobody_banned, peer_identity, why

RESOLVED_FOR_S = 5.0
RESOLVED_MAX = 256
ADDRESSES_MAX = 8
UNIX_BUSY_S = 0.01
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 60, 10, 6
_NO_ALPN = "TLSV1_ALERT_NO_APPLICATION_PROTOCOL"
SO_MARK = getattr(socket, "SO_MARK", 36)

Address = tuple[str, int]
_Resolved = tuple[socket.AddressFamily, Any]


class DialError(Exception):
    """No connection came about; says why."""


class WrongPeer(DialError, PeerRejected):
    """Somebody answered, but not whom we asked for. Nothing was sent to them."""


class AlpnRefused(PeerRejected):
    """The peer has not chosen the protocol that was offered (RFC 7301)."""


class OtherProtocol(WrongPeer):
    """The right peer, but not one that speaks the protocol we asked for."""


@dataclass(frozen=True, slots=True)
class Dialled:
    """A connection that is ready for its first byte. `peer` is the proven SPIFFE ID and `fingerprint` that of the leaf
    which proves it, both "" without mutual TLS."""

    sock: Any  # socket.socket or ssl.SSLSocket, non-blocking
    peer: str
    alpn: str | None
    fingerprint: str = ""


class Resolver:
    """Numeric addresses and `unix:/path` as they are; names through the system's resolver, kept for RESOLVED_FOR_S
    (trio's clock)."""

    def __init__(self) -> None:
        self.cache: OrderedDict[Address, tuple[float, list[_Resolved]]] = OrderedDict()

    async def resolve(self, address: Address) -> list[_Resolved]:
        host, port = address
        if host.startswith(UNIX):
            return [(socket.AF_UNIX, host.removeprefix(UNIX))]
        numeric = numeric_address(host, port)
        if numeric is not None:
            return [numeric]
        now = trio.current_time()
        held = self.cache.get(address)
        if held is not None and held[0] > now:
            return held[1]
        try:
            found: Any = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as exc:
            raise OSError(errno.EHOSTUNREACH, f"{host} cannot be resolved: {exc.strerror}") from None
        except UnicodeError:
            raise OSError(errno.EINVAL, f"{host!r} is not a host name") from None
        resolved: list[_Resolved] = [(family, where) for family, _t, _p, _n, where in found][:ADDRESSES_MAX]
        if not resolved:
            raise OSError(errno.EHOSTUNREACH, f"{host} has no address")
        self.cache[address] = (trio.current_time() + RESOLVED_FOR_S, resolved)
        self.cache.move_to_end(address)
        while len(self.cache) > RESOLVED_MAX:
            self.cache.popitem(last=False)
        return resolved


def numeric_address(host: str, port: int) -> _Resolved | None:
    """The family and socket address of an IPv4 or IPv6 literal (with a zone, too); None for a name."""
    if ":" not in host:
        try:
            socket.inet_pton(socket.AF_INET, host)
        except (OSError, ValueError):
            return None
        return socket.AF_INET, (host, port)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except OSError:
        return None
    return found[0][0], found[0][4]


class Dialler:
    """What all connections of a process share. `mark` (SO_MARK) excludes our own traffic from interception; who is
    `banned` is not spoken to."""

    def __init__(self, *, mark: int | None = None, turn: Turn | None = None, banned: BanCheck = nobody_banned) -> None:
        self.mark = mark
        self.banned = banned
        self.turn = turn if turn is not None else Turn()
        self.resolver = Resolver()

    async def dial(
        self,
        address: Address,
        *,
        timeout_s: float,
        tls_context: ssl.SSLContext | None = None,
        server_hostname: str | None = None,
        expect_identity: str | None = None,
        trust_domain: str = "",
        alpn: str | None = None,
    ) -> Dialled:
        """Raises DialError, or WrongPeer, which is both a DialError and a PeerRejected. `timeout_s` covers resolution,
        TCP and TLS together. With `expect_identity` the callee must prove exactly that SPIFFE ID; `trust_domain` is by
        default the one in it."""
        sock: Any = None
        try:
            with trio.fail_after(timeout_s):
                sock = await self._connect(address)
                if tls_context is None:
                    return Dialled(sock, "", None)
                sock = tls_context.wrap_socket(
                    sock, do_handshake_on_connect=False, suppress_ragged_eofs=False, server_hostname=server_hostname
                )
                await handshake(sock, self.turn)
                return _checked(sock, expect_identity, trust_domain, alpn, self.banned)
        except BaseException as exc:
            if sock is not None:
                sock.close()
            where = address[0] if address[0].startswith(UNIX) else f"{address[0]} port {address[1]}"
            if isinstance(exc, trio.TooSlowError):
                raise DialError(f"{where}: no connection within {timeout_s:g} s") from None
            if isinstance(exc, AlpnRefused) or getattr(exc, "reason", None) == _NO_ALPN:
                raise OtherProtocol(f"{where}: {why(exc)}") from exc
            if isinstance(exc, ssl.SSLCertVerificationError | PeerRejected):
                raise WrongPeer(f"{where}: {why(exc)}") from exc
            if isinstance(exc, OSError):
                raise DialError(f"{where}: {why(exc)}") from exc
            raise

    async def _connect(self, address: Address) -> socket.socket:
        failure: OSError | None = None
        for family, where in await self.resolver.resolve(address):
            sock = self._socket(family)
            try:
                await _connect_one(sock, where)
                return sock
            except OSError as exc:
                sock.close()
                failure = failure or exc
            except BaseException:
                sock.close()
                raise
        assert failure is not None
        raise failure

    def _socket(self, family: socket.AddressFamily) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            tune(sock)
            if self.mark is not None and family != socket.AF_UNIX:
                try:
                    sock.setsockopt(socket.SOL_SOCKET, SO_MARK, self.mark)
                except PermissionError:
                    raise PermissionError(
                        errno.EPERM, "SO_MARK is not permitted: marking our own traffic needs CAP_NET_ADMIN"
                    ) from None
        except BaseException:
            sock.close()
            raise
        return sock


async def _connect_one(sock: socket.socket, where: Any) -> None:
    if sock.family == socket.AF_UNIX:
        await _connect_unix(sock, where)
        return
    try:
        sock.connect(where)
    except BlockingIOError:
        await trio.lowlevel.wait_writable(sock)
        if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error)) from None
    if sock.getsockname() == sock.getpeername():
        # Simultaneous open with ourselves: nobody listens there, and the kernel gave us that very port.
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


async def _connect_unix(sock: socket.socket, path: str) -> None:
    while True:
        try:
            sock.connect(path)
            return
        except BlockingIOError:  # the listener's queue is full; of its getting shorter nobody tells
            await trio.sleep(UNIX_BUSY_S)


def _checked(
    sock: ssl.SSLSocket, expect_identity: str | None, trust_domain: str, alpn: str | None, banned: BanCheck
) -> Dialled:
    proof = NOBODY
    if expect_identity is not None:
        proof = peer_identity(sock, trust_domain or _trust_domain_of(expect_identity), banned)
        if proof.identity != expect_identity:
            raise PeerRejected(f"expected {expect_identity}, but {proof.identity} answered")
    chosen = sock.selected_alpn_protocol()
    if alpn is not None and chosen != alpn:
        raise AlpnRefused(f"expected ALPN {alpn}, but the peer chose {chosen or 'none'}")
    return Dialled(sock, proof.identity, chosen, proof.fingerprint)


def _trust_domain_of(identity: str) -> str:
    return identity.removeprefix("spiffe://").partition("/")[0]


def tune(sock: socket.socket) -> None:
    """What every connection of ours has: non-blocking; over TCP no Nagle, and keep-alive."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
