"""Plain TCP through the mesh: a local connection becomes a framed stream over mutual TLS, and back.

Connecting waits, so it is a Trio task per connection; from then on a Tunnel moves the bytes in the reactor. Nothing is
read before the far side is connected, so server-first protocols work at once and nothing is lost on a failure.
Must not interpret bytes. Invariants: `cluster.connections` counts each tunnel exactly once; authorization is asked
before the application is dialled; whoever is refused is closed without a word, and the log says why.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from sidecar.model.snapshot import Mtls
from sidecar.policy.backoff import backoff_s
from sidecar.policy.endpoint import Endpoint
from sidecar.policy.outcome import Outcome
from sidecar.policy.plan import TcpPlan

from .channel import NOBODY, Channel
from .connect import DialError, Dialled
from .tls import TCP
from .tunnel import End, Tunnel, TunnelResult

if TYPE_CHECKING:
    from .accept import Accepted
    from .world import World


@dataclass(slots=True)
class _Call:
    """One connection on its way; what the log will say of it."""

    side: str
    plan: TcpPlan
    peer: str
    fingerprint: str
    address: str
    started: float
    rule: str = ""
    upstream: str = ""


async def serve_outbound(world: "World", sock: Any, plan: TcpPlan, address: str) -> None:
    """Carry a connection of the application to one of a service's endpoints."""
    call = _Call("out", plan, "", "", address, world.clock())
    cluster = plan.cluster
    if cluster.connections >= cluster.limits.connections:
        cluster.overflows += 1
        _refuse(world, sock, call, Outcome.OVERFLOW, "the service's connection limit is reached")
        return
    cluster.connections += 1
    try:
        endpoint, dialled = await _reach(world, plan, call)
    except DialError as exc:
        cluster.connections -= 1
        _refuse(world, sock, call, Outcome.CONNECT_FAILED, str(exc))
        return
    except Exception as exc:  # a bug, or a name that TLS cannot ask for: this connection's end, not ours
        cluster.connections -= 1
        _refuse(world, sock, call, Outcome.CONNECT_FAILED, f"{type(exc).__name__}: {exc}")
        return
    except BaseException:
        cluster.connections -= 1
        sock.close()
        raise
    world.reactor.call(_join, world, call, sock, dialled, False, endpoint)


async def serve_inbound(world: "World", accepted: "Accepted", plan: TcpPlan) -> None:
    """Carry a mesh peer's framed stream (or a plain one, where mtls admits it) to the application."""
    sock, peer = accepted.sock, accepted.peer
    call = _Call("in", plan, peer, accepted.fingerprint, accepted.address[0], world.clock())
    authz = plan.authz
    if authz is not None:
        permissive = world.plans.mtls is not Mtls.STRICT
        verdict = authz.judge(peer or None, b"", None, [], tcp=True, plain_allowed=permissive)
        if verdict.audited:
            world.note_audited(plan.name, verdict)
        if not verdict.allowed:
            call.rule = f"{verdict.name} {verdict.source}"
            world.note_denied(plan.name, verdict)
            _refuse(world, sock, call, Outcome.DENIED, f"{peer or 'a plain peer'} is refused by {call.rule}")
            return
    endpoint = plan.subset.endpoints[0]
    call.upstream = endpoint.key
    try:
        dialled = await world.dial(endpoint, TCP, plan.timeouts.connect_s)
    except DialError as exc:
        _refuse(world, sock, call, Outcome.CONNECT_FAILED, f"the application at {endpoint.key}: {exc}")
        return
    except Exception as exc:
        _refuse(world, sock, call, Outcome.CONNECT_FAILED, f"{type(exc).__name__}: {exc}")
        return
    except BaseException:
        sock.close()
        raise
    if world.is_banned(peer, call.fingerprint):  # meanwhile
        dialled.sock.close()
        _refuse(world, sock, call, Outcome.DENIED, f"{peer} is banned")
        return
    plan.cluster.connections += 1
    world.reactor.call(_join, world, call, sock, dialled, bool(peer), endpoint)


async def serve_passthrough(world: "World", sock: Any, target: tuple[str, int], address: str) -> None:
    """Carry an intercepted connection to where it was going, untouched."""
    world.meters.outbound.passthrough.inc()
    plan = world.passthrough_tcp(*target)
    await serve_outbound(world, sock, plan, address)


async def _reach(world: "World", plan: TcpPlan, call: _Call) -> tuple[Endpoint, Any]:
    """Dial endpoints until one answers: a connection that was never made may always be tried again."""
    tried: tuple[Endpoint, ...] = ()
    retry = plan.retry
    cluster = plan.cluster
    key = plan.key_of((), world.plans.own, call.address) if plan.key_of is not None else None
    for attempt in range(retry.max_retries + 1):
        now = world.clock()
        endpoint = plan.subset.pick(now, tried, world.rnd, key)
        if endpoint is None:
            raise DialError(f"{plan.name} has no endpoint that can serve ({plan.subset.why_none(now)})")
        call.upstream = endpoint.key
        breaker = endpoint.breaker
        if breaker.tripped:
            breaker.start_probe(now, plan.timeouts.connect_s)
        generation = breaker.generation
        cluster.attempts += 1
        endpoint.active += 1
        try:
            dialled = await world.dial(endpoint, TCP, plan.timeouts.connect_s)
        except DialError as exc:
            endpoint.active -= 1
            now = world.clock()
            endpoint.failures += 1
            breaker.failure(generation, now, world.rnd, "connect-error")
            failure = DialError(f"{plan.name} at {endpoint.key}: {exc}")
            kind = plan.name if plan.name == "passthrough" else endpoint.key
            world.note(f"connect {kind}", f"connect_failed: {failure}")
            if attempt == retry.max_retries or not cluster.budget.withdraw(now):
                raise failure from exc
            cluster.retries += 1
            tried += (endpoint,)
            await trio.sleep(backoff_s(attempt + 1, retry.base_s, retry.max_s, world.rnd))
        except BaseException:
            endpoint.active -= 1
            breaker.neutral(generation, world.clock())
            raise
        else:
            if attempt == 0:
                cluster.budget.deposit(now)
            endpoint.successes += 1
            breaker.success(generation, world.clock())
            return endpoint, dialled
    raise AssertionError("the last attempt returns or raises")


def _join(world: "World", call: _Call, near: Any, far: Dialled, framed_near: bool, endpoint: Endpoint) -> None:
    cluster, side = call.plan.cluster, world.meters.inbound if call.side == "in" else world.meters.outbound
    a = Channel(world.reactor, near, NOBODY, watch_hangup=False, peer=call.peer, fingerprint=call.fingerprint)
    b = Channel(world.reactor, far.sock, NOBODY, watch_hangup=False, peer=far.peer, fingerprint=far.fingerprint)
    a.pause()
    b.pause()
    side.tcp_tunnels_total.inc()
    side.tcp_tunnels.value += 1

    def over(result: TunnelResult) -> None:
        cluster.connections -= 1
        if call.side == "out":
            endpoint.active -= 1
        side.tcp_tunnels.value -= 1
        world.tunnels.pop(tunnel, None)
        _log(world, call, "ok" if result.end is End.CLEAN else result.end.value, result)

    tunnel = Tunnel(
        a,
        b,
        timers=world.timers,
        idle_s=call.plan.timeouts.idle_tcp_s,
        on_done=over,
        framed_a=framed_near,
        framed_b=endpoint.mesh,
    )
    if tunnel.on_done is not None:
        world.tunnels[tunnel] = partial(_still_allowed, world, call) if call.side == "in" else None


def _still_allowed(world: "World", call: _Call) -> bool:
    """Whether a tunnel may go on under the plans of the moment."""
    port = world.plans.inbound.get(call.plan.port)
    if port is None or port.tcp is None:
        return False
    if not call.peer and world.plans.mtls is Mtls.STRICT:
        return False
    authz = port.tcp.authz
    permissive = world.plans.mtls is not Mtls.STRICT
    return authz is None or authz.judge(call.peer or None, b"", None, [], tcp=True, plain_allowed=permissive).allowed


def _refuse(world: "World", sock: Any, call: _Call, outcome: Outcome, detail: str) -> None:
    sock.close()
    world.note(f"tcp {call.plan.name} {outcome.reason}", f"{outcome.reason}: tcp {call.plan.name}: {detail}")
    _log(world, call, outcome.reason, None)


def _log(world: "World", call: _Call, reason: str, result: TunnelResult | None) -> None:
    if world.access.enabled:
        world.access.tcp(
            (
                call.side,
                call.plan.name,
                call.rule,
                call.peer,
                call.address,
                reason,
                world.clock() - call.started,
                result.bytes_from_a if result is not None else 0,
                result.bytes_from_b if result is not None else 0,
                call.upstream,
            )
        )
