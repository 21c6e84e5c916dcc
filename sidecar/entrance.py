"""Every door of a sidecar: inbound, outbound, local ports, and what interception leads in.

Opens listeners, accepts, and hands each connection to a Downstream of HTTP/1.1 or HTTP/2 or to a TCP task, by what was
agreed (SNI, ALPN) or by where it came in; a plain one tells its version of HTTP by its first bytes. Must not know
requests. Invariants: a new set of local ports is bound before the old one is given up, so a port in use refuses a
policy instead of half applying it; every socket opened here is closed here.
"""

import logging
import socket
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import trio

from sidecar.api import Connection
from sidecar.model.snapshot import Mtls, Snapshot
from sidecar.policy.outcome import Outcome
from sidecar.policy.plan import PortPlan, ports
from sidecar.proxy import tcp
from sidecar.proxy.accept import Accepted, Gate, bind_listener, serve_listener
from sidecar.proxy.bind import BindError
from sidecar.proxy.downstream import Downstream
from sidecar.proxy.entries import Inbound, Outbound
from sidecar.proxy.http2_down import Http2Downstream
from sidecar.proxy.tls import HTTP1, HTTP2, TCP

if TYPE_CHECKING:  # what intercepts is loaded where it is asked for
    from sidecar.intercept.destinations import Decision, DestinationMap
    from sidecar.proxy.world import World

log = logging.getLogger(__name__)

Address = tuple[str, int]

KINDS = {
    "banned": "banned",
    "verify": "untrusted",
    "certificate": "certificate",
    "time": "timeout",
    "name": "name",
    "many": "crowded",
}
"""What a refused handshake is called in the metric, by a word of the reason."""


@dataclass(slots=True)
class LocalPorts:
    """The ports on loopback that a policy asks for; `fresh` are those just bound."""

    wanted: dict[int, tuple[str, str]] = field(default_factory=dict)
    fresh: dict[int, socket.socket] = field(default_factory=dict)
    destinations: "DestinationMap | None" = None

    def close(self) -> None:
        for sock in self.fresh.values():
            sock.close()


class Entrance:
    """The listeners of one sidecar."""

    def __init__(self, world: "World", own: str, *, intercept: bool, gate: Gate) -> None:
        self.world, self.own, self.intercept, self.gate = world, own, intercept, gate
        self.sockets: list[socket.socket] = []
        self.inbound: list[socket.socket] = []
        self.outbound: list[socket.socket] = []
        self.local: dict[int, tuple[socket.socket, trio.CancelScope]] = {}
        self.local_targets: dict[int, tuple[str, str]] = {}
        self.destinations: DestinationMap | None = None
        self.nursery: trio.Nursery | None = None
        self.inbound_scope = trio.CancelScope()
        self.entries: dict[tuple[str, str], Outbound] = {}
        self.captured: dict[tuple[str, str], Outbound] = {}
        self.explicit = Outbound(world)

    # -- opening

    def open(self, inbound: Address | None, outbound: Address | None) -> None:
        """Bind the two main doors. Raises BindError."""
        if inbound is not None:
            self.inbound = self._bind(inbound, everywhere=inbound[0] == "0.0.0.0")  # noqa: S104
        if outbound is not None:
            self.outbound = self._bind(outbound, everywhere=self.intercept)

    def _bind(self, address: Address, everywhere: bool) -> list[socket.socket]:
        host, port = address
        first = bind_listener(host, port)
        found = [first]
        self.sockets.append(first)
        twin = {"0.0.0.0": "::", "127.0.0.1": "::1"}.get(host)  # noqa: S104
        if everywhere and twin is not None:
            try:
                found.append(bind_listener(twin, first.getsockname()[1]))
            except BindError as error:
                log.info("IPv6 is left out: %s", error)
            else:
                self.sockets.append(found[-1])
        return found

    def addresses(self) -> dict[str, str]:
        """Where this sidecar listens, for people and for whoever started it."""
        found = {}
        for name, sockets in (("inbound", self.inbound), ("outbound", self.outbound)):
            if sockets:
                host, port = sockets[0].getsockname()[:2]
                found[name] = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return found

    @property
    def serves_application(self) -> bool:
        """Whether the application has a way out through this sidecar."""
        return bool(self.outbound or self.local)

    def prepare(self, snapshot: Snapshot) -> LocalPorts:
        """Bind what a policy asks for and is not yet bound. Raises BindError with nothing changed."""
        result = LocalPorts()
        own = snapshot.services.get(self.own)
        calls = own.calls.values() if own is not None else ()
        for call in calls:
            service = snapshot.services.get(call.service)
            if call.local_port is None or service is None:
                continue
            port = next((p.name for p in ports(service) if call.port in (None, p.name)), "")
            result.wanted[call.local_port] = (call.service, port)
        try:
            for number in result.wanted:
                if number not in self.local:
                    result.fresh[number] = bind_listener("127.0.0.1", number)
        except BindError:
            result.close()
            raise
        if self.intercept:
            from sidecar.intercept.destinations import DestinationMap

            result.destinations = DestinationMap(snapshot, self.own)
            for conflict in result.destinations.conflicts:
                log.warning("interception: %s: such connections are refused", conflict)
        return result

    def adopt(self, new: LocalPorts) -> None:
        """The policy is in force: serve its local ports, close those that it no longer names."""
        self.destinations = new.destinations
        self.local_targets = new.wanted
        for number in [number for number in self.local if number not in new.wanted]:
            sock, scope = self.local.pop(number)
            scope.cancel()
            sock.close()
        for number, sock in new.fresh.items():
            self.local[number] = (sock, trio.CancelScope())
            if self.nursery is not None:
                self.nursery.start_soon(self._serve_local, number)

    def serve(self, nursery: trio.Nursery) -> None:
        """Begin to accept."""
        self.nursery = nursery
        nursery.start_soon(self._serve_inbound)
        for sock in self.outbound:
            nursery.start_soon(self._serve_outbound, sock)
        for number in self.local:
            nursery.start_soon(self._serve_local, number)

    def close_inbound(self) -> None:
        """Accept nothing more from the mesh."""
        self.inbound_scope.cancel()
        for sock in self.inbound:
            sock.close()

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        for sock, scope in self.local.values():
            scope.cancel()
            sock.close()

    # -- accepting

    async def _serve_inbound(self) -> None:
        with self.inbound_scope:
            async with trio.open_nursery() as nursery:
                for sock in self.inbound:
                    nursery.start_soon(self._serve_mesh, sock)

    async def _serve_mesh(self, sock: socket.socket) -> None:
        world = self.world
        await serve_listener(
            sock,
            self._from_mesh,
            call=world.reactor.call,
            tls=world.identity,
            permissive=lambda: world.plans.mtls is not Mtls.STRICT,
            gate=self.gate,
            banned=world.is_banned,
            on_refused=self._refused,
            report=log.warning,
        )

    async def _serve_outbound(self, sock: socket.socket) -> None:
        accepted = self._captured if self.intercept else self._from_application
        await serve_listener(sock, accepted, call=self.world.reactor.call, gate=self.gate, report=log.warning)

    async def _serve_local(self, number: int) -> None:
        sock, scope = self.local[number]
        with scope:
            await serve_listener(
                sock, partial(self._at_local, number), call=self.world.reactor.call, gate=self.gate, report=log.warning
            )

    def _refused(self, address: Address, reason: str) -> None:
        self.world.meters.inbound.handshakes_failed.inc(_kind(reason))
        self.world.note("handshake", f"a connection from {address[0]} was refused: {reason}")

    # -- inbound

    def _from_mesh(self, accepted: Accepted) -> None:
        world = self.world
        if accepted.peer:
            world.meters.inbound.handshakes_ok.inc()
            port = world.port_of_sni(accepted.sni)
        else:
            port = self._plain_port(accepted)
        problem = _contradiction(port, accepted)
        if port is None or problem is not None:
            accepted.sock.close()
            world.note(
                "inbound", f"{Outcome.MISDIRECTED.reason}: from {accepted.peer or accepted.address[0]}: {problem}"
            )
            return
        if self._filtered(port, accepted):
            return
        if port.tcp is not None:
            world.errand(tcp.serve_inbound, world, accepted, port.tcp)
            return
        entry = Inbound(world, port.name, accepted.peer, accepted.fingerprint)
        kind = Http2Downstream if accepted.alpn == HTTP2 else Downstream
        kind(world, entry, accepted.peer, accepted.address[0]).begin(accepted.sock)

    def _plain_port(self, accepted: Accepted) -> PortPlan | None:
        """A plain peer says no name: the port that it was led in from, else the first."""
        inbound = self.world.plans.inbound
        if self.intercept and self.destinations is not None:
            from sidecar.intercept.destinations import Way
            from sidecar.intercept.original_dst import local_address, original_destination

            decision = self.destinations.inbound(original_destination(accepted.sock), local_address(accepted.sock))
            if decision.target is not None:
                return inbound.get(decision.target.port.name)
            if decision.way is Way.REFUSED:
                return None
        return next(iter(inbound.values()), None)

    def _filtered(self, port: PortPlan, accepted: Accepted) -> bool:
        """Ask the filters that look at connections; True: closed."""
        world = self.world
        hooks = world.plans.connection_hooks
        if not hooks:
            return False
        connection = Connection(
            caller=accepted.peer,
            caller_service=world.service_of(accepted.peer) or "",
            address=accepted.address[0],
            service=world.plans.own,
            port=port.name,
            protocol="tcp" if port.tcp is not None else "http",
        )
        for chain in hooks:
            refusal = chain.connection(connection)
            if refusal is not None:
                accepted.sock.close()
                world.note(
                    "connection", f"{Outcome.DENIED.reason}: from {accepted.peer or accepted.address[0]}: {refusal}"
                )
                return True
        return False

    # -- outbound

    def _from_application(self, accepted: Accepted) -> None:
        Downstream(self.world, self.explicit, "", accepted.address[0]).begin(accepted.sock)

    def _at_local(self, number: int, accepted: Accepted) -> None:
        key = self.local_targets.get(number)
        if key is None:
            accepted.sock.close()
            return
        self._to(key, accepted, self.entries, keep_host=False)

    def _to(
        self, key: tuple[str, str], accepted: Accepted, entries: dict[tuple[str, str], Outbound], keep_host: bool
    ) -> None:
        world = self.world
        plan = world.plans.outbound_tcp.get(key)
        if plan is not None:
            world.errand(tcp.serve_outbound, world, accepted.sock, plan, accepted.address[0])
            return
        entry = entries.get(key)
        if entry is None:
            entry = entries[key] = Outbound(world, key, keep_host=keep_host)
        Downstream(world, entry, "", accepted.address[0]).begin(accepted.sock)

    def _captured(self, accepted: Accepted) -> None:
        """A connection that interception may have led here; one made to this very port is an ordinary one."""
        from sidecar.intercept.destinations import Way
        from sidecar.intercept.original_dst import local_address, original_destination

        world = self.world
        assert self.destinations is not None
        arrived = local_address(accepted.sock)
        decision = self.destinations.outbound(original_destination(accepted.sock), arrived, world.strict)
        if decision.way is Way.LOOP:
            self._from_application(accepted)
            return
        world.meters.intercepted.inc()
        if decision.target is not None:
            key = (decision.target.service, decision.target.port.name)
            self._to(key, accepted, self.captured, keep_host=True)
        elif decision.way is Way.PASSTHROUGH and not self._is_own(decision, arrived):
            assert decision.original is not None
            world.errand(tcp.serve_passthrough, world, accepted.sock, decision.original, accepted.address[0])
        else:
            accepted.sock.close()
            reason = decision.reason or "the original destination is the sidecar itself"
            world.note("intercept", f"an intercepted connection was refused: {reason}")

    def _is_own(self, decision: "Decision", arrived: Address) -> bool:
        """Whether passing through would come back to this very sidecar."""
        if decision.original is None:
            return True
        own = {sock.getsockname()[1] for sock in (*self.outbound, *self.inbound)}
        return decision.original[1] in own and decision.original[0] in (arrived[0], "127.0.0.1", "::1")


def _contradiction(port: PortPlan | None, accepted: Accepted) -> str | None:
    """Why a connection cannot be served, or None. Its ALPN must fit the protocol that the port declares."""
    if port is None:
        return f'no port of this service is meant by "{accepted.sni}"'
    if not accepted.peer:
        return None
    if port.tcp is not None and accepted.alpn != TCP:
        return f"port {port.name} is TCP, but the peer speaks {accepted.alpn or 'no ALPN'}"
    if port.http is not None and accepted.alpn not in (HTTP1, HTTP2, None):
        return f"port {port.name} is HTTP, but the peer speaks {accepted.alpn}"
    return None


def _kind(reason: str) -> str:
    """A bounded set of words for the metric."""
    for word, kind in KINDS.items():
        if word in reason:
            return kind
    return "protocol"
