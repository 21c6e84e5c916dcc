"""Accepts connections, and settles TLS and the caller's identity before anybody else sees them.

A plain connection costs no task. One that must prove itself waits in a bounded room until its first byte is there (no
TLS state yet), then for one of the handshake slots. Who gives way when it gets tight: of one address the oldest that
has never spoken; and whoever keeps a slot waiting while others want it. So a client that never speaks, or stops in the
middle, cannot lock out others.
Must not know HTTP, policy or channels. Invariants: every accepted socket is handed on or closed; a connection that is
handed on has proven its identity wherever that is asked for; running out of descriptors stops accepting for a moment
and is said once in a while, nothing else.
"""

import errno
import os
import socket
import ssl
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from .bind import BindError, bind_listener, raise_nofile
from .connect import Address, tune
from .handshake import Turn
from .tls import BanCheck, Identity, MeshSocket, PeerRejected, nobody_banned, peer_identity, why

__all__ = ["AcceptLimits", "Accepted", "BindError", "Gate", "bind_listener", "raise_nofile", "serve_listener"]

ACCEPTS_PER_TURN = 64
EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
EXHAUSTED_PAUSE_S = 0.1
REPORT_EVERY_S = 60.0
TLS_HANDSHAKE = 0x16  # the first byte of a ClientHello's record


@dataclass(frozen=True, slots=True)
class AcceptLimits:
    handshakes: int = 64  # at a time
    handshakes_per_address: int = 32
    handshake_s: float = 5.0  # from accept to the end of the handshake
    stall_s: float = 1.0  # how long a slot may wait for its peer while others want it
    waiting: int = 2048  # connections that have not proven themselves
    waiting_per_address: int = 1024


@dataclass(frozen=True, slots=True)
class Accepted:
    """A connection, ready to be read. `peer` is the proven SPIFFE ID ("" for plain) and `fingerprint` that of the leaf
    which proves it (SHA-256 in hex); `sni` and `alpn` as agreed."""

    sock: Any  # socket.socket or ssl.SSLSocket, non-blocking
    address: Address
    peer: str = ""
    sni: str = ""
    alpn: str | None = None
    fingerprint: str = ""


class _Newcomer:
    """A connection that has not proven itself."""

    __slots__ = ("address", "scope", "sock")

    def __init__(self, sock: Any, address: Address, scope: trio.CancelScope) -> None:
        self.sock = sock
        self.address = address
        self.scope = scope


class _Host:
    """What one address has in the waiting room."""

    __slots__ = ("count", "silent", "slots")

    def __init__(self, handshakes: int) -> None:
        self.count = 0
        self.silent: OrderedDict[_Newcomer, None] = OrderedDict()
        self.slots = trio.CapacityLimiter(handshakes)


class Gate:
    """The waiting room and the handshake slots: one for all listeners of a process. `under_way(+1 or -1)` is told how
    many handshakes are under way."""

    def __init__(
        self,
        limits: AcceptLimits = AcceptLimits(),
        turn: Turn | None = None,
        under_way: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.limits = limits
        self.turn = turn if turn is not None else Turn()
        self.slots = trio.CapacityLimiter(limits.handshakes)
        self.under_way = under_way
        self.hosts: dict[str, _Host] = {}
        self.count = 0

    def enter(self, newcomer: _Newcomer) -> bool:
        """False: the room is full of connections that have spoken."""
        limits, name = self.limits, newcomer.address[0]
        host = self.hosts.get(name)
        if host is not None and host.count >= limits.waiting_per_address:
            if not host.silent:
                return False
            self._dismiss_oldest(host)
        elif self.count >= limits.waiting:
            fullest = max(self.hosts.values(), key=lambda each: len(each.silent))
            if not fullest.silent:
                return False
            self._dismiss_oldest(fullest)
        if host is None:
            host = self.hosts[name] = _Host(limits.handshakes_per_address)
        self.count += 1
        host.count += 1
        host.silent[newcomer] = None
        return True

    def _dismiss_oldest(self, host: _Host) -> None:
        newcomer, _ = host.silent.popitem(last=False)
        newcomer.scope.cancel()

    def leave(self, newcomer: _Newcomer) -> None:
        name = newcomer.address[0]
        host = self.hosts[name]
        host.silent.pop(newcomer, None)
        host.count -= 1
        self.count -= 1
        if not host.count:
            del self.hosts[name]

    async def handshake(self, newcomer: _Newcomer, sock: ssl.SSLSocket) -> None:
        """In a slot of its address and one of the process. Raises OSError where the handshake fails."""
        host = self.hosts[newcomer.address[0]]
        async with host.slots, self.slots:
            self.under_way(1)
            try:
                await self._handshake(host, sock)
            finally:
                self.under_way(-1)

    async def _handshake(self, host: _Host, sock: ssl.SSLSocket) -> None:
        while True:
            try:
                await self.turn.step(sock)
                return
            except ssl.SSLWantReadError:
                await self._patiently(host, trio.lowlevel.wait_readable, sock)
            except ssl.SSLWantWriteError:
                await self._patiently(host, trio.lowlevel.wait_writable, sock)

    async def _patiently(self, host: _Host, wait: Callable[[Any], Any], sock: ssl.SSLSocket) -> None:
        while True:
            with trio.move_on_after(self.limits.stall_s):
                await wait(sock)
                return
            if self.slots.statistics().tasks_waiting or host.slots.statistics().tasks_waiting:
                raise TimeoutError(errno.ETIMEDOUT, "stopped in the middle of the handshake while others waited")


def _ignore(*_args: object) -> None:
    pass


async def serve_listener(
    listener: socket.socket,
    on_connection: Callable[[Accepted], object],
    *,
    call: Callable[..., object],
    tls: Identity | None = None,
    permissive: Callable[[], bool] = lambda: False,
    gate: Gate | None = None,
    banned: BanCheck = nobody_banned,
    on_refused: Callable[[Address, str], object] = _ignore,
    report: Callable[[str], object] = _ignore,
) -> None:
    """Accept until cancelled, or until the listener is closed. `call(on_connection, accepted)` hands on each connection
    (Reactor.call). With `tls` the caller must prove an identity of our trust domain that is not `banned` (with
    CERT_OPTIONAL, if it states any); `permissive` says whether plain callers are let in beside.
    `on_refused` hears of each connection that did not get in and why; `report` gets lines for the log. The listener
    stays the caller's.
    """
    async with trio.open_nursery() as nursery:
        front = _Front(listener, on_connection, call, tls, permissive, gate or Gate(), banned, on_refused, report)
        front.nursery = nursery
        try:
            await front.accept()
        finally:
            front.reserve.close()


class _Reserve:
    """One descriptor held back: with none left, a connection could not even be refused."""

    def __init__(self) -> None:
        self.fd = -1
        self.hold()

    def hold(self) -> None:
        if self.fd < 0:
            try:
                self.fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                pass  # the next time

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _Front:
    """One listener's accept loop."""

    def __init__(
        self,
        listener: socket.socket,
        on_connection: Callable[[Accepted], object],
        call: Callable[..., object],
        tls: Identity | None,
        permissive: Callable[[], bool],
        gate: Gate,
        banned: BanCheck,
        on_refused: Callable[[Address, str], object],
        report: Callable[[str], object],
    ) -> None:
        self.listener = listener
        self.on_connection = on_connection
        self.call = call
        self.tls = tls
        self.permissive = permissive
        self.gate = gate
        self.banned = banned
        self.on_refused = on_refused
        self.report = report
        self.reserve = _Reserve()
        self.nursery: trio.Nursery
        self.exhausted = 0
        self.reported_at = -REPORT_EVERY_S

    async def accept(self) -> None:
        listener = self.listener
        # Its owner may cancel us and close it in the very pass in which it became readable: we run once more.
        while listener.fileno() >= 0:
            await trio.lowlevel.wait_readable(listener)
            for _ in range(ACCEPTS_PER_TURN):
                if listener.fileno() < 0:
                    return
                try:
                    sock, where = listener.accept()
                except BlockingIOError:
                    break
                except OSError as exc:
                    if exc.errno in EXHAUSTED:
                        await self._out_of_descriptors(exc)
                        break
                    if exc.errno in (errno.EBADF, errno.EINVAL, errno.ENOTSOCK):
                        raise  # not a listening socket any more
                    continue  # this one connection is gone already (accept(2), Error handling)
                self._arrived(sock, (where[0], where[1]))

    async def _out_of_descriptors(self, exc: OSError) -> None:
        self.exhausted += 1
        self.reserve.close()
        try:
            self.listener.accept()[0].close()  # a closed connection tells the caller more than a silent one
            self.exhausted += 1
        except OSError:
            pass
        self.reserve.hold()
        now = trio.current_time()
        if now - self.reported_at >= REPORT_EVERY_S:
            self.reported_at = now
            name = self.listener.getsockname()
            self.report(
                f"listener {name[0]} port {name[1]}: {exc.strerror}; accepting pauses "
                f"(so far {self.exhausted} times; raise the limit on open files, e.g. LimitNOFILE= or ulimit -n)"
            )
        await trio.sleep(EXHAUSTED_PAUSE_S)

    def _arrived(self, sock: socket.socket, address: Address) -> None:
        try:
            tune(sock)
        except OSError:  # reset before we came to it
            sock.close()
            return
        if self.tls is None:
            self.call(self._hand_on, Accepted(sock, address))
            return
        newcomer = _Newcomer(sock, address, trio.CancelScope())
        if self.gate.enter(newcomer):
            newcomer.scope.deadline = trio.current_time() + self.gate.limits.handshake_s
            self.nursery.start_soon(self._admit, newcomer)
        else:
            sock.close()
            self.on_refused(address, "too many connections that have not proven themselves")

    def _hand_on(self, accepted: Accepted) -> None:
        try:
            self.on_connection(accepted)
        except BaseException:
            accepted.sock.close()
            raise

    async def _admit(self, newcomer: _Newcomer) -> None:
        accepted: Accepted | None = None
        reason = "no complete handshake in time"
        try:
            with newcomer.scope:
                try:
                    accepted = await self._prove(newcomer)
                except (OSError, PeerRejected) as exc:
                    reason = why(exc)
        finally:
            self.gate.leave(newcomer)
            if accepted is None:
                newcomer.sock.close()
        if accepted is None:
            self.on_refused(newcomer.address, reason)
        else:
            self.call(self._hand_on, accepted)

    async def _prove(self, newcomer: _Newcomer) -> Accepted:
        await trio.lowlevel.wait_readable(newcomer.sock)
        self.gate.hosts[newcomer.address[0]].silent.pop(newcomer, None)
        if self.permissive():
            first = newcomer.sock.recv(1, socket.MSG_PEEK)
            if first and first[0] != TLS_HANDSHAKE:
                return Accepted(newcomer.sock, newcomer.address)
        assert self.tls is not None
        contexts = self.tls.current
        sock = newcomer.sock = contexts.server.wrap_socket(
            newcomer.sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        await self.gate.handshake(newcomer, sock)
        proof = peer_identity(sock, contexts.trust_domain, self.banned)
        sni = sock.sni if isinstance(sock, MeshSocket) else ""
        return Accepted(sock, newcomer.address, proof.identity, sni, sock.selected_alpn_protocol(), proof.fingerprint)
