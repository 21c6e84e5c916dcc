"""The two ways into a sidecar: from its own application outward, and from the mesh inward.

An entry says which route a request follows, what an Exchange begins with, and which header lines pass each way. One
object serves all connections of its kind that share a fixed destination. Must not move bytes.
Invariants: nothing that a caller writes can name its own identity, attempt or reason; what an entry looks up, it looks
up in the plans of the moment, so a swap is seen by the next request.
"""

from typing import TYPE_CHECKING, Any

from sidecar.model.snapshot import Mtls
from sidecar.policy.authz import Authorizer
from sidecar.policy.cluster import Aimed, RoutePlan, Subset
from sidecar.policy.correlation import NOTHING
from sidecar.policy.exchange import IDEMPOTENT, OFF, Exchange
from sidecar.policy.outcome import GRPC_FAILURES, Grpc, Outcome
from sidecar.policy.paths import BadPath, Readings, opaque
from sidecar.policy.plan import ServicePlan
from sidecar.wire.grpc import write_timeout
from sidecar.wire.http1 import Message

if TYPE_CHECKING:
    from .pool import Up
    from .serving import Serving
    from .world import World


Field = tuple[bytes, bytes]

ATTEMPT_MAX = 999  # what a peer reads; more would read as none
_ATTEMPTS = tuple((b"x-pillion-attempt", b"%d" % number) for number in range(ATTEMPT_MAX + 1))
_GRPC_NAMES = tuple(status.name for status in Grpc)
MIRROR_MARK = b"x-pillion-mirror"
_EXPECT = (b"expect", b"100-continue")
_EXHAUSTED = (b"x-pillion-retried", b"exhausted")


class Entry:
    """What both sides share."""

    side = ""
    any_host = False  # whether Host may name any service
    fingerprint = ""  # of the certificate that proves the caller, where there is one

    @property
    def caller_service(self) -> str:
        """The service that the requests come from, as far as its certificate says; "" where unknown."""
        return ""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.meters = world.meters.inbound if self.side == "in" else world.meters.outbound

    def admit(self, serving: "Serving", m: Message, now: float) -> RoutePlan | None:
        """The route that the request follows, or None: then the request has been answered."""
        raise NotImplementedError

    def exchange(self, serving: "Serving", plan: RoutePlan, subset: Subset | Aimed, m: Message, now: float) -> Exchange:
        raise NotImplementedError

    def request_fields(self, serving: "Serving", up: "Up") -> list[Field]:
        """Fields that this sidecar adds to the request."""
        raise NotImplementedError

    def response_fields(self, serving: "Serving", m: Message, ex: Exchange, reason: str | None) -> list[Field]:
        """Fields that this sidecar adds to an upstream's response."""
        raise NotImplementedError

    def spent(self, serving: "Serving") -> None:
        """The request's retries were spent and it failed."""

    def orphaned(self, serving: "Serving") -> bool:
        """Whether the inbound request that it was made for has ended meanwhile."""
        return False

    def still_allows(self, serving: "Serving") -> bool:
        """Whether the tunnel that a request became may go on under the plans of the moment."""
        return True

    def is_copy(self, m: Message) -> bool:
        """Whether to count it as a copy of a request, which is no success or failure of the service."""
        return False

    def over(self, serving: "Serving", status: int, reason: str) -> None:
        """The request has ended: record it."""
        world, m, plan, endpoint = self.world, serving.m, serving.plan, serving.endpoint
        duration_s = world.reactor.now - serving.started
        grpc_status = _GRPC_NAMES[serving.grpc_status] if serving.grpc_status is not None else ""
        if plan is not None:
            stats = plan.stats
            stats[""].active -= 1
            if m.forwarded and self.is_copy(m):
                world.service_meters("in", plan.service).mirrored.inc(copy_result(status, reason))
            else:
                slot = stats.get(endpoint.version if endpoint is not None else "")
                (stats[""] if slot is None else slot).record(m.method, status, reason, duration_s, grpc_status)
        else:
            world.unrouted[self.side].record(m.method, status, reason, duration_s, grpc_status)
        if world.access.enabled:
            self._log(serving, status, grpc_status, reason, duration_s)

    def _log(self, serving: "Serving", status: int, grpc_status: str, reason: str, duration_s: float) -> None:
        m, plan, endpoint, ex = serving.m, serving.plan, serving.endpoint, serving.ex
        trace = serving.trace
        trace_id = trace[3:35] if trace is not None else b""
        self.world.access.http(
            (
                self.side,
                plan.service if plan is not None else "",
                plan.name if plan is not None else "",
                endpoint.version if endpoint is not None else "",
                serving.caller_rule,
                serving.down.peer,
                serving.down.address,
                m.method,
                m.path or m.target,
                status,
                reason,
                _attempts(serving, ex) if ex is not None else 0,
                duration_s,
                serving.received_bytes,
                serving.sent_bytes,
                trace_id,
                trace_id,
                endpoint.key if endpoint is not None else "",
                next((value for name, value in m.headers if name == b"user-agent"), b""),
                grpc_status,
            )
        )

    def _no_route(self, serving: "Serving", service: ServicePlan) -> None:
        serving.refuse(Outcome.NO_ROUTE, f"no route of {service.name} takes this request")

    def _find_strictly(
        self, serving: "Serving", service: ServicePlan, m: Message, caller: str | None
    ) -> "Found | None":
        """Judge the path and look the route up in each of its readings; None: answered."""
        try:
            readings = service.read(m.path)
        except BadPath as exc:
            serving.refuse(Outcome.BAD_REQUEST, exc.reason)
            return None
        m.path = readings.forward
        plan = service.table.find(m.method, m.path, m.headers, caller)
        if plan is None:
            self._no_route(serving, service)
            return None
        other = None
        if readings.ambiguous:
            target = readings.merged + b"?" + readings.query if readings.query else readings.merged
            other = service.table.find(m.method, target, m.headers, caller)
        return Found(plan, readings, other if other is not plan else None)


class Found:
    """A route, how its path reads, and the route of the second reading where that is another one."""

    __slots__ = ("other", "plan", "readings")

    def __init__(self, plan: RoutePlan, readings: Readings, other: RoutePlan | None) -> None:
        self.plan, self.readings, self.other = plan, readings, other


class Outbound(Entry):
    """From the application: by Host, by absolute target, or, where `fixed` is set, always to that service and port."""

    side = "out"

    @property
    def caller_service(self) -> str:
        return self.world.plans.own

    def __init__(self, world: "World", fixed: tuple[str, str] | None = None, *, keep_host: bool = False) -> None:
        """`keep_host`: what the application says in Host goes on as it is, and does not choose anything."""
        super().__init__(world)
        self.keep_host = keep_host
        self.fixed = fixed
        self.any_host = fixed is None
        self.fixed_host = fixed[0].encode() if fixed is not None else b""

    def admit(self, serving: "Serving", m: Message, now: float) -> RoutePlan | None:
        world = self.world
        plans = world.plans
        if m.method == b"CONNECT":
            serving.refuse(Outcome.NOT_IMPLEMENTED, "CONNECT is not served; leave https_proxy unset, or see no_proxy")
            return None
        if self.fixed is not None:
            service = plans.by_port.get(self.fixed)
            if not self.keep_host or not serving.host:
                serving.host = self.fixed_host
        else:
            service = plans.outbound.get(m.host_key)
        if service is None:
            return world.unknown_host(serving, m)
        if m.upgrade is not None:
            serving.asked = (m.path, list(m.headers))  # a rewrite or a filter may change them; see `still_allows`
        if service.read is opaque:
            plan = service.table.find(m.method, m.path, m.headers, plans.own)
            if plan is None:
                self._no_route(serving, service)
        else:
            found = self._find_strictly(serving, service, m, plans.own)
            plan = found.plan if found is not None else None
        if plan is None:
            return None
        rewrite = plan.rewrite
        if rewrite is not None:
            m.path = rewrite.target(m.path)
            if rewrite.host is not None:
                serving.host = rewrite.host
        return plan

    def exchange(self, serving: "Serving", plan: RoutePlan, subset: Subset | Aimed, m: Message, now: float) -> Exchange:
        trace = serving.trace
        cap, inherited = OFF, 0
        if trace is None:
            serving.trace = self.world.new_trace()
        else:
            found = self.world.memory.lookup(trace[3:35])
            serving.nested = found is not NOTHING
            cap, inherited = found
            if self.world.copies.traces:
                self.world.copies.inherit(m, trace[3:35])
        return Exchange(
            plan,
            subset,
            m.method,
            now,
            self.world.rnd,
            m.deadline_ms / 1000 if m.deadline_ms is not None else OFF,
            cap,
            inherited,
            m.method not in IDEMPOTENT and _has_idempotency_key(m),
            m.grpc,
        )

    def request_fields(self, serving: "Serving", up: "Up") -> list[Field]:
        m, ex = serving.m, serving.ex
        assert ex is not None and serving.trace is not None
        fields = [(b"traceparent", serving.trace)]
        if m.grpc:
            _tell_deadline(fields, ex.ends - self.world.reactor.now)
        if up.mesh:
            attempt = ex.inherited + ex.attempt
            if serving.race is not None:
                attempt += serving.race.sent
            fields.append(_ATTEMPTS[attempt] if attempt < ATTEMPT_MAX else _ATTEMPTS[ATTEMPT_MAX])
            left_s = ex.ends - self.world.reactor.now if ex.request_done else ex.total_s
            if left_s != OFF and not m.grpc:
                fields.append((b"x-request-deadline-ms", b"%d" % (left_s * 1000 if left_s > 0.0 else 0)))
        if m.forwarded:
            fields += m.forwarded
        if m.expect_continue and not serving.continued and not m.done:
            fields.append(_EXPECT)
        return fields

    def response_fields(self, serving: "Serving", m: Message, ex: Exchange, reason: str | None) -> list[Field]:
        if ex.exhausted or (m.exhausted and serving.up is not None and serving.up.mesh):
            self.spent(serving)
        return [(b"x-pillion-reason", reason.encode())] if reason else []

    def spent(self, serving: "Serving") -> None:
        if serving.trace is not None:
            self.world.memory.mark_exhausted(serving.trace[3:35])

    def still_allows(self, serving: "Serving") -> bool:
        """By the caller's half of the policy: a route that lets the upgrade through. A service that is no longer held
        forbids nothing."""
        plans, m = self.world.plans, serving.m
        path, headers = serving.asked
        service = plans.by_port.get(self.fixed) if self.fixed is not None else plans.outbound.get(m.host_key)
        if service is None or not path:
            return True
        try:
            path = service.read(path).forward
        except BadPath:
            return False
        plan = service.table.find(m.method, path, headers, plans.own)
        return plan is not None and m.upgrade in plan.upgrade and plan.respond is None and plan.redirect is None

    def orphaned(self, serving: "Serving") -> bool:
        return serving.nested and serving.trace is not None and serving.trace[3:35] not in self.world.memory


class Inbound(Entry):
    """From the mesh to the application on one of the service's ports."""

    side = "in"

    def __init__(self, world: "World", port: str, peer: str, fingerprint: str = "") -> None:
        """`peer`: the caller's SPIFFE ID, "" for a plain peer, and `fingerprint` that of its certificate; the entry
        belongs to one connection."""
        super().__init__(world)
        self.port = port
        self.peer = peer
        self.fingerprint = fingerprint
        self.caller = world.service_of(peer)
        self.forwarded_for = (b"x-forwarded-client-cert", world.client_cert(peer, fingerprint) if peer else b"")

    @property
    def caller_service(self) -> str:
        return self.caller or ""

    def admit(self, serving: "Serving", m: Message, now: float) -> RoutePlan | None:
        world = self.world
        plans = world.plans
        port = plans.inbound.get(self.port)
        service = port.http if port is not None else None
        if not serving.host:
            serving.host = plans.own.encode()  # HTTP/1.0
        if m.method == b"CONNECT":
            serving.refuse(Outcome.NOT_IMPLEMENTED, "CONNECT is not served")
            return None
        if not self.peer and plans.mtls is Mtls.STRICT:  # it came in under another policy
            serving.down.last = True
            serving.refuse(Outcome.DENIED)
            return None
        if service is None or (m.host_key not in plans.own_hosts and world.is_foreign(m.host_key)):
            serving.refuse(Outcome.MISDIRECTED)
            return None
        if m.upgrade is not None:
            serving.asked = (m.path, list(m.headers))  # filters may change them; it is judged again by these
        if service.read is opaque:
            plan = service.table.find(m.method, m.path, m.headers, self.caller)
            if plan is None:
                self._no_route(serving, service)
            elif plan.authz is not None and not self._allowed(serving, plan, plan.authz, m, None):
                return None
            return plan
        found = self._find_strictly(serving, service, m, self.caller)
        if found is None:
            return None
        for plan in (found.plan, found.other):
            authz = plan.authz if plan is not None else None
            if plan is not None and authz is not None and not self._allowed(serving, plan, authz, m, found.readings):
                return None
        return found.plan

    def _allowed(
        self, serving: "Serving", plan: RoutePlan, authz: Authorizer, m: Message, readings: Readings | None
    ) -> bool:
        verdict = authz.judge(
            self.peer or None,
            m.method,
            readings if readings is not None or not authz.needs_path else opaque(m.path),
            m.headers,
            plain_allowed=self.world.plans.mtls is not Mtls.STRICT,
        )
        if verdict.audited:
            self.world.note_audited(plan.service, verdict)
        if verdict.allowed:
            return True
        serving.follow(plan)
        serving.caller_rule = f"{verdict.name} {verdict.source}"
        self.world.note_denied(plan.service, verdict)
        serving.refuse(Outcome.DENIED)
        return False

    def still_allows(self, serving: "Serving") -> bool:
        plans, m = self.world.plans, serving.m
        path, headers = serving.asked
        port = plans.inbound.get(self.port)
        service = port.http if port is not None else None
        plain = plans.mtls is not Mtls.STRICT
        if service is None or not (self.peer or plain):
            return False
        try:
            readings = service.read(path)
        except BadPath:
            return False
        targets = {readings.forward, readings.merged + b"?" + readings.query if readings.query else readings.merged}
        for target in targets:
            plan = service.table.find(m.method, target, headers, self.caller)
            if plan is None or (target == readings.forward and m.upgrade not in plan.upgrade):
                return False
            authz = plan.authz
            if authz is None:
                continue
            if not authz.judge(self.peer or None, m.method, readings, headers, plain_allowed=plain).allowed:
                return False
        return True

    def exchange(self, serving: "Serving", plan: RoutePlan, subset: Subset | Aimed, m: Message, now: float) -> Exchange:
        world = self.world
        trace = serving.trace
        if trace is None:
            serving.trace = trace = world.new_trace()
        ex = Exchange(
            plan,
            subset,
            m.method,
            now,
            world.rnd,
            m.deadline_ms / 1000 if m.deadline_ms is not None else OFF,
            idempotency_key=m.method not in IDEMPOTENT and _has_idempotency_key(m),
            grpc=m.grpc,
        )
        serving.remembered = world.memory.enter(trace[3:35], ex.ends, m.attempt if self.peer else 0)
        if m.forwarded and self.is_copy(m):
            world.copies.arrived(m, trace[3:35])
        return ex

    def request_fields(self, serving: "Serving", up: "Up") -> list[Field]:
        m, ex = serving.m, serving.ex
        assert ex is not None and serving.trace is not None
        fields = [(b"traceparent", serving.trace)]
        if m.grpc:
            _tell_deadline(fields, ex.ends - self.world.reactor.now)
        if self.peer:
            fields.append(self.forwarded_for)
            if m.forwarded:
                fields += m.forwarded
        if m.expect_continue and not serving.continued and not m.done:
            fields.append(_EXPECT)
        return fields

    def response_fields(self, serving: "Serving", m: Message, ex: Exchange, reason: str | None) -> list[Field]:
        token: Any = serving.remembered
        if token is not None:
            if not serving.m.grpc:  # the deadline of a call holds to its end
                self.world.memory.head_gone(token)
            if token.exhausted and (m.status >= 500 or m.grpc_status in GRPC_FAILURES):
                return [_EXHAUSTED]
        return []

    def is_copy(self, m: Message) -> bool:
        return bool(self.peer) and marked(m)

    def over(self, serving: "Serving", status: int, reason: str) -> None:
        if serving.remembered is not None:
            self.world.memory.leave(serving.remembered)
            if serving.m.forwarded and self.is_copy(serving.m) and serving.trace is not None:
                self.world.copies.ended(serving.trace[3:35])
        super().over(serving, status, reason)


def _attempts(serving: "Serving", ex: Exchange) -> int:
    return ex.attempt + 1 + (serving.race.sent if serving.race is not None else 0)


def marked(m: Message) -> bool:
    """Whether a request is a copy that a mirror has sent, or works for one."""
    return any(name == MIRROR_MARK for name, _ in m.forwarded)


def copy_result(status: int, reason: str) -> str:
    """How a copy is counted: by the class of its status, or by what went wrong."""
    return f"{status // 100}xx" if reason == "ok" else reason


def _tell_deadline(fields: list[Field], left_s: float) -> None:
    """What is left of a gRPC call, as its server understands it."""
    if left_s != OFF:
        fields.append((b"grpc-timeout", write_timeout(left_s)))


def _has_idempotency_key(m: Message) -> bool:
    for name, _ in m.headers:  # noqa: SIM110 (a generator costs three times as much)
        if name == b"idempotency-key":
            return True
    return False
