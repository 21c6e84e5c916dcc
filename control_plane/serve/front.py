"""Pillion's own listeners in front of the control plane's two applications.

The applications speak plain HTTP/1.1 on Unix sockets and are never exposed. What stands before them is the data path of
a sidecar: it ends TLS, bounds what strangers can do, and tells the application who calls in `x-forwarded-client-cert`.
- The mesh listener demands a certificate of the mesh, and leads to the port `api` of the control plane's service.
- The join listener serves those who have none yet, and leads to its port `join`. Where a certificate is presented all
  the same, it must be good.
Must not know what the applications do, apart from which of their paths never end. Invariants: a request reaches only
the application of the listener that it came in by; the header is what TLS has proven, or absent; whoever drains this
ends every connection.
"""

import logging
import socket
import ssl
import time
from collections.abc import Callable, Collection, Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from pathlib import Path

import trio

from certs.files import IdentityFiles
from sidecar.model.snapshot import NONE as NEVER
from sidecar.model.snapshot import (
    AuthzLevel,
    Level,
    Match,
    Mtls,
    PathHandling,
    Port,
    Retry,
    Route,
    Service,
    Snapshot,
    Timeouts,
)
from sidecar.policy.balancing import BY_CHANCE
from sidecar.policy.endpoint import UNIX
from sidecar.policy.plan import Surroundings, compile_plans
from sidecar.proxy.accept import Accepted, AcceptLimits, Gate, serve_listener
from sidecar.proxy.bind import BindError, bind_listener, raise_nofile, shown
from sidecar.proxy.downstream import Downstream
from sidecar.proxy.entries import Inbound
from sidecar.proxy.tls import HTTP1, Identity
from sidecar.proxy.world import World
from sidecar.telemetry.access_log import AccessLog
from sidecar.telemetry.metrics import Registry

log = logging.getLogger(__name__)

Address = tuple[str, int]

API, JOIN = "api", "join"
ENDLESS = ("/v1/stream",)
STREAM_IDLE_S = 120.0  # without a byte either way: many heartbeats were lost, or the other end reads nothing
IDLE_S, BODY_S = 60.0, 300.0  # of everything that does end
POLL_S = 0.05
# All sidecars of a mesh may come back at once, and from one address: a NAT, or a machine with many services.
MESH_LIMITS = AcceptLimits(handshakes_per_address=64, handshake_s=20.0, waiting=8192, waiting_per_address=8192)
JOIN_LIMITS = AcceptLimits(waiting=1024, waiting_per_address=256)
JOIN_CONNECTIONS, JOIN_CONNECTIONS_PER_ADDRESS = 1024, 128
FORGET_S = 5.0
PEER_CONNECTIONS = 256  # with one certificate: a sidecar needs two or three


class Crowded(Exception):
    """A listener has no room for one more connection."""


class _Door:
    """One listener: where it stands, whom it admits, and who is in."""

    def __init__(self, port: str, address: Address, app: Path, identity: Identity, limits: AcceptLimits) -> None:
        self.port, self.address, self.app, self.identity, self.limits = port, address, app, identity, limits
        self.sockets: list[socket.socket] = []
        self.open: dict[str, set[Downstream]] = {}
        self.peers: dict[str, set[Downstream]] = {}

    @property
    def shown(self) -> str:
        host, port = self.sockets[0].getsockname()[:2]
        return shown(host, port)

    def listen(self) -> None:
        """Raises BindError."""
        host, port = self.address
        self.sockets.append(bind_listener(host, port))
        if host == "0.0.0.0":  # noqa: S104
            try:
                self.sockets.append(bind_listener("::", self.sockets[0].getsockname()[1]))
            except BindError as error:
                log.info("IPv6 is left out: %s", error)

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()

    def hold_peer(self, down: Downstream, fingerprint: str, alive: AbstractSet[object]) -> None:
        """Count a connection of a peer with a certificate. Raises Crowded."""
        held = self.peers.setdefault(fingerprint, set())
        held &= alive
        if len(held) >= PEER_CONNECTIONS:
            raise Crowded(f"more than {PEER_CONNECTIONS} connections with one certificate")
        held.add(down)

    def hold(self, down: Downstream, alive: AbstractSet[object]) -> None:
        """Count a connection of somebody who need not prove anything. Raises Crowded."""
        held = self.open.setdefault(down.address, set())
        held &= alive
        if len(held) >= JOIN_CONNECTIONS_PER_ADDRESS:
            raise Crowded(f"more than {JOIN_CONNECTIONS_PER_ADDRESS} connections from {down.address}")
        if sum(map(len, self.open.values())) >= JOIN_CONNECTIONS:
            self.forget(alive)
            if sum(map(len, self.open.values())) >= JOIN_CONNECTIONS:
                raise Crowded(f"more than {JOIN_CONNECTIONS} connections")
        self.open.setdefault(down.address, held).add(down)

    def forget(self, alive: AbstractSet[object]) -> None:
        """Those that are gone: what is still held of one is as large as what a live one costs."""
        for held in (self.open, self.peers):
            for key in [key for key, connections in held.items() if not connections <= alive]:
                held[key] &= alive
                if not held[key]:
                    del held[key]


class Front:
    """Both listeners. `listen`, then `nursery.start(front.serve)`; `drain` ends them, cancelling does too."""

    def __init__(
        self,
        identity: IdentityFiles,
        *,
        mesh: Address,
        join: Address,
        mesh_app: Path,
        join_app: Path,
        endless: Collection[str] = ENDLESS,
        stream_idle_s: float = STREAM_IDLE_S,
        registry: Registry | None = None,
        access: AccessLog | None = None,
        note: Callable[[str, str], None] | None = None,
    ) -> None:
        """`identity` names the service; `mesh_app` and `join_app` are Unix sockets; `endless` are the paths whose
        responses never end, given up after `stream_idle_s` without a byte. `note(kind, text)` writes to the log, each
        kind at a bounded rate."""
        name = identity.spiffe_id.service
        if name is None:
            raise ValueError(f"{identity.spiffe_id} is not the identity of a service")
        self.name = name
        self.endless, self.stream_idle_s = tuple(endless), stream_idle_s
        self.registry = registry if registry is not None else Registry(time.monotonic)
        self.access = access if access is not None else AccessLog(None, time.time)
        self.note = note if note is not None else _log_note
        api, joining = f"{API}.{name}.mesh", ("", f"{JOIN}.{name}.mesh")
        self.mesh = _Door(
            API, mesh, mesh_app, Identity(identity, sni=lambda asked: asked == api, alpn=(HTTP1,)), MESH_LIMITS
        )
        self.join = _Door(
            JOIN,
            join,
            join_app,
            Identity(identity, sni=lambda asked: asked in joining, alpn=(HTTP1,), client_auth=ssl.CERT_OPTIONAL),
            JOIN_LIMITS,
        )
        self.doors = (self.mesh, self.join)
        self.world: World
        self.accepting = trio.CancelScope()
        self.drained = trio.Event()

    # -- opening

    def listen(self) -> None:
        """Open both listeners; nobody is served yet. Raises BindError, with none left open."""
        raise_nofile()  # three descriptors for each stream
        try:
            for door in self.doors:
                door.listen()
        except BindError:
            self.close()
            raise

    @property
    def addresses(self) -> Mapping[str, str]:
        """Where both listen: `mesh` and `join`."""
        return {"mesh": self.mesh.shown, "join": self.join.shown}

    def close(self) -> None:
        for door in self.doors:
            door.close()

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until drained or cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                world = self.world = World(nursery, self.registry, self.mesh.identity, self.access, self.note)
                world.reactor.on_crash = self._crashed
                world.reactor.on_slow = lambda text: self.note("slow", f"the reactor was held up: {text}")
                self._lay_out(world)
                world.observe()
                nursery.start_soon(world.reactor.run)
                nursery.start_soon(world.sweep)
                nursery.start_soon(self._forget, world)
                nursery.start_soon(self._accept, world)
                task_status.started()
                await self.drained.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.close()

    def _lay_out(self, world: World) -> None:
        around = Surroundings(
            own=self.name,
            trust_domain=world.identity.current.trust_domain,
            apps={door.port: (f"{UNIX}{door.app}", 0) for door in self.doors},
            sticky_key=b"",
            chain=lambda side, service, route: None,
            balancer=lambda service: BY_CHANCE,  # each door leads to one application
            stats=lambda side, service, route, version: self.registry.requests(
                side=side, service=service, route=route, version=version
            ),
        )
        plans, _ = compile_plans(
            policy(self.name, self.endless, self.stream_idle_s), around, world.state, world.clock()
        )
        world.swap(plans, [])

    # -- accepting

    async def _accept(self, world: World) -> None:
        with self.accepting:
            async with trio.open_nursery() as nursery:
                for door in self.doors:
                    gate = Gate(door.limits, turn=world.dialler.turn, under_way=world.reactor.errand)
                    for sock in door.sockets:
                        nursery.start_soon(
                            partial(
                                serve_listener,
                                sock,
                                partial(self._arrived, door),
                                call=world.reactor.call,
                                tls=door.identity,
                                gate=gate,
                                banned=world.is_banned,
                                on_refused=self._refused,
                                report=log.warning,
                            )
                        )

    def _arrived(self, door: _Door, accepted: Accepted) -> None:
        world, address = self.world, accepted.address
        world.meters.inbound.handshakes_ok.inc()
        entry = Inbound(world, door.port, accepted.peer, accepted.fingerprint)
        down = Downstream(world, entry, accepted.peer, address[0])
        try:
            if accepted.peer:
                door.hold_peer(down, accepted.fingerprint, world.downstreams)
            else:
                door.hold(down, world.downstreams)
        except Crowded as error:
            accepted.sock.close()
            self._refused(address, str(error))
            return
        down.begin(accepted.sock)

    async def _forget(self, world: World) -> None:
        while True:
            await trio.sleep(FORGET_S)
            for door in self.doors:
                door.forget(world.downstreams)

    def _refused(self, address: Address, reason: str) -> None:
        self.world.meters.inbound.handshakes_failed.inc("refused")
        self.note("handshake", f"a connection from {address[0]} was refused: {reason}")

    def _crashed(self, exc: Exception) -> None:
        self.world.meters.crashes.inc("connection")
        log.error("a connection was ended by an unexpected error", exc_info=exc)

    # -- while it runs

    def replace(self, identity: IdentityFiles) -> None:
        """Show this certificate, and trust its bundle, from the next handshake on. Connections stay, unless a root has
        left the bundle: then they end within 5 s, since they may have relied on it."""
        lost = self.mesh.identity.current.identity.bundle.diff(identity.bundle).lost
        for door in self.doors:
            door.identity.replace(identity)
        if lost:
            log.warning("%d roots left the bundle: connections that may rely on them end within 5 s", len(lost))
            self.world.reactor.call(self.world.distrust)

    async def drain(self, grace_s: float) -> None:
        """Accept nothing more; what is under way may end within `grace_s`, and is then cut. `serve` returns."""
        world = self.world
        world.draining = True
        self.accepting.cancel()
        self.close()
        with trio.move_on_after(grace_s):
            while world.downstreams:
                world.reactor.call(self._tell)
                await trio.sleep(POLL_S)  # rare, short and bounded: not worth an event on the data path
        world.reactor.call(self._end)
        self.drained.set()

    def _tell(self) -> None:
        for down in list(self.world.downstreams):
            down.drain()

    def _end(self) -> None:
        for down in list(self.world.downstreams):
            down.end()


def policy(name: str, endless: Collection[str], stream_idle_s: float) -> Snapshot:
    """What the control plane's own service looks like to its listeners. Who may do what is the applications' matter;
    that a caller must have a certificate, or need not, is the listeners'."""
    anybody = (AuthzLevel(Level.SERVICE, default="allow"),)
    once = Retry(max_retries=0)
    never_ends = Timeouts(total_s=NEVER, idle_s=stream_idle_s, body_s=NEVER)
    streams = tuple(
        Route(f"endless-{number}", Match(path=path), timeouts=never_ends, retry=once, authz=anybody)
        for number, path in enumerate(endless)
    )
    usual = Route("default", timeouts=Timeouts(total_s=NEVER, idle_s=IDLE_S, body_s=BODY_S), retry=once, authz=anybody)
    ports = tuple(Port(port, 0, path_handling=PathHandling.OPAQUE) for port in (API, JOIN))
    return Snapshot({name: Service(name, ports=ports, routes=(*streams, usual), mtls=Mtls.PERMISSIVE)}, "front")


def _log_note(kind: str, text: str) -> None:
    log.warning("%s", text)
