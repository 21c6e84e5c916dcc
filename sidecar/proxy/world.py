"""What every connection of a sidecar shares: reactor, clock, chance, plans, pools, memory of what is in flight.

The plans are replaced as a whole; a request keeps the one it was matched with. Must not know where plans, identities or
sockets come from. Invariant: everything here is bounded: connections by descriptors and limits, heads by 4 MB, the
passthrough's endpoints by number.
"""

import random
import ssl
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any

import trio

from sidecar.model.snapshot import CircuitBreaker, EndpointSpec, Limits, Retry, Timeouts, Tls
from sidecar.policy.authz import Verdict, service_of
from sidecar.policy.cluster import Cluster, Destination, RoutePlan, Subset
from sidecar.policy.correlation import Correlation
from sidecar.policy.endpoint import Endpoint
from sidecar.policy.exchange import Exchange
from sidecar.policy.outcome import Outcome
from sidecar.policy.plan import ClusterState, Plans, PortPlan, TcpPlan
from sidecar.policy.replay import ReplayPool
from sidecar.telemetry.access_log import AccessLog
from sidecar.telemetry.catalogue import CLUSTER_COUNTS, ENDPOINT_RESULTS, GATE_LEVELS, GATE_SHED, Meters, ServiceMeters
from sidecar.telemetry.metrics import Registry
from sidecar.wire.http1 import Message, ProtocolError

from .connect import Dialled, Dialler
from .hedge import Hedges
from .mirror import Copies
from .ondemand import MESH, OnDemand, service_named_by
from .pool import Pool
from .reactor import Reactor
from .timers import Timers
from .tls import HTTP2, Identity, originate_context
from .tunnel import AnyChannel, Tunnel
from .upgrade import begin_tunnel
from .watch import Watch

if TYPE_CHECKING:
    from .downstream import Downstream
    from .http2_down import Http2Downstream
    from .pool import Up
    from .serving import Serving

DISTRUST_S = 4.0
HEADS_BYTES_MAX = 4 * 1024 * 1024
PASSTHROUGH_MAX = 256
WORDS_MAX = 40


class Heads:
    """Unfinished request heads of all connections; beyond 4 MB the oldest is given up."""

    def __init__(self, bytes_max: int = HEADS_BYTES_MAX) -> None:
        self.bytes_max = bytes_max
        self.bytes_held = 0
        self.held: OrderedDict[Downstream | Http2Downstream, int] = OrderedDict()

    def hold(self, down: "Downstream | Http2Downstream", size_bytes: int) -> None:
        self.bytes_held += size_bytes - self.held.get(down, 0)
        self.held[down] = size_bytes
        while self.bytes_held > self.bytes_max:
            oldest = next(iter(self.held))
            oldest.give_up_head()
            self.leave(oldest)

    def leave(self, down: "Downstream | Http2Downstream") -> None:
        size = self.held.pop(down, None)
        if size is not None:
            self.bytes_held -= size


class World:
    """One sidecar's data path."""

    def __init__(
        self,
        nursery: trio.Nursery,
        registry: Registry,
        identity: Identity,
        access: AccessLog,
        note: Callable[[str, str], None],
        *,
        strict: bool = False,
        mark: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        epoch: Callable[[], float] = time.time,
        rnd: random.Random | None = None,
        http2_engine: str = "auto",
    ) -> None:
        """`note(kind, text)` writes to the sidecar's own log, each kind at a bounded rate. `strict`: hosts and
        addresses outside the mesh are refused instead of passed through."""
        chance = rnd or random.Random()
        self.nursery, self.identity, self.access, self.note = nursery, identity, access, note
        self.clock, self.epoch, self.rnd = clock, epoch, chance.random
        self.getrandbits = chance.getrandbits
        self.strict = strict
        self.reactor = Reactor(clock=clock)
        self.timers: Timers = self.reactor.timers
        self.plans = Plans()
        self.state = ClusterState()
        self._service_meters: dict[tuple[str, str], ServiceMeters] = {}
        self.memory = Correlation()
        self.replay = ReplayPool()
        self.heads = Heads()
        self.http2_engine = http2_engine  # auto, ngh2 or h2
        self.pool = Pool(self)
        self.registry = registry
        self.meters = Meters(registry)
        self.unrouted = {side: registry.requests(side=side, service="", route="") for side in ("in", "out")}
        self.downstreams: set[Downstream | Http2Downstream] = set()
        self.draining = False
        self.passthrough: OrderedDict[tuple[str, int], RoutePlan] = OrderedDict()
        self.tunnels: dict[Tunnel, Callable[[], bool] | None] = {}  # and whether authorization still allows it
        self.bans: frozenset[str] = frozenset()  # SPIFFE IDs, and SHA-256 of leaves in hex
        self.dialler = Dialler(mark=mark, banned=self.is_banned)
        self.originate: dict[str, ssl.SSLContext] = {}  # by ALPN
        self.names: frozenset[bytes] | None = None  # of all services of the mesh; None: the plans hold all of them
        self.want: Callable[[str], Awaitable[None]] | None = None  # asks for a service that the plans do not hold
        self.ondemand = OnDemand(self)
        self.watch = Watch()
        self.copies = Copies(self)  # of requests, on their way to where routes mirror them
        self.hedges = Hedges(self)

    # -- identities and traces

    def service_of(self, peer: str) -> str | None:
        return service_of(peer, self.identity.current.trust_domain) if peer else None

    def client_cert(self, peer: str, fingerprint: str) -> bytes:
        """X-Forwarded-Client-Cert, by which the application knows its caller; nobody else can set it."""
        by = self.identity.current.spiffe_id
        return f"By={by};Hash={fingerprint};URI={peer}".encode()

    def is_banned(self, peer: str, fingerprint: str) -> bool:
        return peer in self.bans or fingerprint in self.bans

    def new_trace(self) -> bytes:
        ids = b"%048x" % self.getrandbits(192)  # zeros are invalid, and come once in 2^64
        return b"00-%b-%b-02" % (ids[:32], ids[32:])

    # -- connections

    def errand(self, task: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Start a task that a connection waits for."""
        self.reactor.errands += 1
        self.nursery.start_soon(self._errand, task, arguments)

    async def _errand(self, task: Callable[..., Awaitable[None]], arguments: tuple[Any, ...]) -> None:
        try:
            await task(*arguments)
        finally:
            self.reactor.errands -= 1

    async def dial(self, endpoint: Endpoint, alpn: str, timeout_s: float) -> Dialled:
        """A connected socket whose peer is who it must be. Raises DialError."""
        if endpoint.mesh:
            return await self.dialler.dial(
                endpoint.address,
                tls_context=self.identity.current.client(alpn),
                server_hostname=endpoint.sni,
                expect_identity=endpoint.identity,
                alpn=alpn,
                timeout_s=timeout_s,
            )
        if endpoint.tls is Tls.ORIGINATE:
            context = self.originate.get(alpn)
            if context is None:
                context = self.originate[alpn] = originate_context((alpn,))
            return await self.dialler.dial(
                endpoint.address,
                tls_context=context,
                server_hostname=endpoint.host,
                alpn=alpn if alpn == HTTP2 else None,  # many servers of HTTP/1.1 choose none
                timeout_s=timeout_s,
            )
        return await self.dialler.dial(endpoint.address, timeout_s=timeout_s)

    def swap(self, plans: Plans, stale: list[Endpoint]) -> None:
        """New plans take effect with the next request; connections made under other terms are closed."""
        self.plans = plans
        self._service_meters.clear()
        self.pool.retire(stale)
        self.watch.rouse()
        if self.ondemand.waits:
            self.ondemand.swapped()
        for tunnel, allowed in list(self.tunnels.items()):
            if allowed is not None and not allowed():
                tunnel.close()

    def woken(self) -> None:
        """Whoever a new policy has called up goes on: what stands in the reactor's `soon` runs after this."""

    def distrust(self) -> None:
        """A root has left the bundle: connections end, idle ones now, busy ones with their answer, all within 5 s."""
        self.pool.retire(e for cluster in self.state for e in cluster.endpoints.values() if e.mesh)
        busy = [up for up in self.pool.busy() if up.mesh]
        before = [down for down in self.downstreams if down.peer]
        tunnels = list(self.tunnels)
        for down in before:
            down.drain()
        self.nursery.start_soon(self._end_later, before, busy, tunnels, "its root is not trusted any more")

    def ban(self, identities: Iterable[str], certificates: Iterable[str] = ()) -> None:
        """These SPIFFE IDs, these certificates (SHA-256 of the leaf in hex) and nobody else are refused from now on, on
        either side. Connections of who is newly among them end: tunnels and idle ones now, busy ones with their answer,
        all within 5 s."""
        bans = frozenset(identities).union(certificates)
        fresh, self.bans = bans - self.bans, bans
        if fresh:
            self.reactor.call(self._end_banned, fresh)

    def _end_banned(self, fresh: frozenset[str]) -> None:
        def banned(ch: AnyChannel) -> bool:
            return ch.peer in fresh or ch.fingerprint in fresh

        for tunnel in [tunnel for tunnel in self.tunnels if banned(tunnel.a.channel) or banned(tunnel.b.channel)]:
            tunnel.close()
        busy = self.pool.end_banned(banned)
        downs = [down for down in self.downstreams if banned(down.ch)]
        for down in downs:
            if not down.servings():
                down.end()
            else:
                down.drain()
        self.nursery.start_soon(self._end_later, downs, busy, [], "its peer is banned")

    async def _end_later(
        self, downs: "list[Downstream | Http2Downstream]", ups: "list[Up]", tunnels: list[Tunnel], reason: str
    ) -> None:
        await trio.sleep(DISTRUST_S)
        for up in ups:
            self.reactor.call(up.end, reason)
        for down in downs:
            if down in self.downstreams:
                self.reactor.call(down.end)
        for tunnel in tunnels:
            if tunnel in self.tunnels:
                self.reactor.call(tunnel.close)

    def serves_sni(self, name: str) -> bool:
        """Whether a ClientHello asks for a port that this sidecar serves; no name means the only one."""
        return self.port_of_sni(name) is not None

    def port_of_sni(self, name: str) -> PortPlan | None:
        inbound = self.plans.inbound
        if not name:
            return next(iter(inbound.values())) if len(inbound) == 1 else None
        port, _, rest = name.partition(".")
        return inbound.get(port) if rest == f"{self.plans.own}.mesh" else None

    async def sweep(self) -> None:
        """Close idle connections that have aged, for ever."""
        while True:
            await trio.sleep(1.0)
            outside = [plan.cluster for plan in self.passthrough.values()]
            self.reactor.call(self.pool.sweep, [*self.state, *outside], self.clock())

    # -- hosts that are in no plan

    def is_foreign(self, host: bytes) -> bool:
        """Whether this host names another service of the mesh, held or not."""
        if host in self.plans.foreign_hosts:
            return True
        names = self.names
        if names is None or (b"." in host and not host.endswith(MESH)):
            return False  # of a service that is not held the ports are not known: only .mesh is surely a name
        name = service_named_by(host)
        return name in names and name != self.plans.own.encode()

    def unknown_host(self, serving: "Serving", m: Message) -> RoutePlan | None:
        """A service of the mesh that is not held yet is waited for; an ordinary proxy request to somewhere else is
        passed through; anything else is answered 404."""
        if serving.entry.any_host and self.ondemand.park(serving, m.host_key):
            return None
        name = m.host_key.decode("ascii", "replace")
        outside = b"." in m.host_key and not m.host_key.endswith(b".mesh")
        if m.form.value != "absolute" or self.strict or not outside or m.host is None:
            known = ", ".join(self._known_names()[:WORDS_MAX])
            serving.refuse(Outcome.NO_ROUTE, f'no service is called "{name}"; known: {known}')
            return None
        if m.target[:6].lower() == b"https:":
            serving.refuse(
                Outcome.NOT_IMPLEMENTED, "https is not passed through; leave https_proxy unset, or see no_proxy"
            )
            return None
        _, colon, port = m.host.rpartition(b":")
        number = int(port) if colon and port.isdigit() else 80
        self.meters.outbound.passthrough.inc()
        return self.passthrough_plan(name, number)

    def _known_names(self) -> list[str]:
        names = self.names
        return self.plans.service_names() if names is None else sorted(name.decode() for name in names)

    def passthrough_plan(self, host: str, port: int) -> RoutePlan:
        """A plan that leads to an address outside the mesh, in clear text, as if no sidecar were there."""
        key = (host, port)
        plan = self.passthrough.get(key)
        if plan is None:
            retry = Retry(max_retries=0)
            cluster = Cluster("passthrough", "out", Limits(), retry, self.clock())
            breaker = CircuitBreaker(consecutive_failures=1 << 60)
            cluster.update([EndpointSpec(host, port, tls=Tls.PLAIN)], breaker, {}, "", "")
            plan = RoutePlan("passthrough", "passthrough")
            subset = Subset("", tuple(cluster.endpoints.values()))
            plan.bind(cluster, Timeouts(), retry, [(Destination(None, subset), 100)])
            plan.upgrade = frozenset({b"websocket"})
            plan.stats = {"": self.registry.requests(side="out", service="passthrough", route="passthrough")}
            self.passthrough[key] = plan
            if len(self.passthrough) > PASSTHROUGH_MAX:
                _, old = self.passthrough.popitem(last=False)
                gone = list(old.cluster.endpoints.values())
                old.cluster.endpoints = {}  # what is still being made for it is not kept
                self.pool.retire(gone)
        else:
            self.passthrough.move_to_end(key)
        return plan

    def passthrough_tcp(self, host: str, port: int) -> TcpPlan:
        """The same for opaque connections."""
        plan = self.passthrough_plan(host, port)
        assert plan.subset is not None
        return TcpPlan("passthrough", str(port), plan.cluster, plan.subset, plan.timeouts, plan.retry, None)

    # -- upgrades

    def upgrade(self, serving: "Serving", m: Message, ex: Exchange, up: "Up", now: float) -> None:
        """The upstream said 101: from here on the two connections are one tunnel."""
        begin_tunnel(self, serving, m, ex, up, now)

    # -- metrics

    def observe(self) -> None:
        """Show what clusters and the reactor count."""
        registry = self.registry

        def per_cluster(attribute: str) -> Callable[[], list[tuple[dict[str, str], float]]]:
            return lambda: [
                ({"side": side, "service": service, "port": port}, float(getattr(cluster, attribute)))
                for (side, service, port), cluster in self.state.clusters.items()
            ]

        def per_gate(attribute: str) -> Callable[[], list[tuple[dict[str, str], float]]]:
            return lambda: [
                ({"service": service}, float(getattr(gate, attribute))) for service, gate in self.state.gates.items()
            ]

        def shed() -> list[tuple[dict[str, str], float]]:
            return [
                ({"service": service, "class": name}, float(count))
                for service, gate in self.state.gates.items()
                for name, count in gate.shed.items()
            ]

        def results() -> list[tuple[dict[str, str], float]]:
            return [
                (
                    {
                        "side": side,
                        "service": service,
                        "port": port,
                        "endpoint": endpoint.key,
                        "version": endpoint.version,
                        "result": result,
                    },
                    float(count),
                )
                for (side, service, port), cluster in self.state.clusters.items()
                for endpoint in cluster.endpoints.values()
                for result, count in (("success", endpoint.successes), ("failure", endpoint.failures))
                if not endpoint.placeholder
            ]

        registry.reading_counter(ENDPOINT_RESULTS, "Attempts by endpoint and result, as its breaker saw them.", results)
        for attribute, name, text in CLUSTER_COUNTS:
            registry.reading_counter(name, text, per_cluster(attribute))
        registry.gauge("pillion_requests_active", "Requests in flight by service.", per_cluster("active"))
        registry.gauge("pillion_panic", "Whether health is not asked: too few are healthy.", per_cluster("panic"))
        registry.gauge("pillion_outlier_ejected", "Endpoints left out as outliers now.", per_cluster("ejected"))
        for attribute, name, text in GATE_LEVELS:
            registry.gauge(name, text, per_gate(attribute))
        registry.reading_counter(*GATE_SHED, shed)
        registry.gauge("pillion_upstream_connections", "Open upstream connections.", per_cluster("connections"))
        reactor = self.reactor
        registry.gauge(
            "pillion_held_bytes",
            "Bytes of bodies that wait for somebody to take them.",
            lambda: float(reactor.held_bytes),
        )
        self.reactor.on_lag = self.meters.reactor_lag.observe

    def service_meters(self, side: str, service: str) -> ServiceMeters:
        """The counters of one side of a service, asked for once in each policy."""
        meters = self._service_meters.get((side, service))
        if meters is None:
            meters = self._service_meters[side, service] = self.meters.service(side, service)
        return meters

    # -- notes for people

    def note_connect_failure(self, serving: "Serving", detail: str) -> None:
        endpoint = serving.endpoint
        where = endpoint.key if endpoint is not None else "?"
        service = serving.plan.service if serving.plan is not None else "?"
        kind = service if service == "passthrough" else where
        self.note(f"connect {kind}", f"connect_failed: {service} at {where}: {detail}")

    def note_bad_response(self, serving: "Serving", exc: ProtocolError) -> None:
        endpoint = serving.endpoint
        where = endpoint.key if endpoint is not None else "?"
        plan = serving.plan
        kind = plan.service if plan is not None and plan.service == "passthrough" else where
        self.note(f"response {kind}", f"bad_response: from {where}: {exc.detail}")

    def note_malformed(
        self, down: "Downstream | Http2Downstream", outcome: Outcome, detail: str, limit: str = ""
    ) -> None:
        """`limit`: which one was hit, where it was one; each has its own turn in the log."""
        self.unrouted[down.entry.side].record(b"", outcome.status, outcome.reason, 0.0)
        self.note(
            f"malformed {limit}" if limit else "malformed",
            f"{outcome.reason}: from {down.peer or down.address}: {detail}",
        )

    def note_denied(self, service: str, verdict: Verdict) -> None:
        self.service_meters("in", service).denied.inc(verdict.name)

    def note_audited(self, service: str, verdict: Verdict) -> None:
        would_deny = self.service_meters("in", service).would_deny
        for audited in verdict.audited:
            would_deny.inc(audited.rule.name if audited.rule is not None else audited.would)
