"""Latency at a fixed rate: what a path adds to the latency that there is without a proxy, in the same round."""

from . import load
from .backends import Target, direct
from .context import ENVOYS, HOP, Context, Starts, in_turn
from .table import Bar, Group, Row

RATE = 1000
BARE = "no proxy"
SLOW = ("mitmproxy",)  # does not reach the rate


def mesh_latency(context: Context) -> list[Group]:
    starts = context.pairs(context.backend.port)
    title = "Two hops with mutual TLS"
    return _latency(context, "mesh-latency", starts, direct(context.backend), True, ENVOYS, title)


def grpc_latency(context: Context) -> list[Group]:
    if not context.can_call():
        return []
    backend = context.grpc_backend
    starts = context.pairs(backend.port, grpc=True)
    title = "Two hops with mutual TLS: gRPC, unary calls"
    return _latency(context, "grpc-latency", starts, direct(backend, grpc=True), True, ENVOYS, title)


def hop_latency(context: Context) -> list[Group]:
    starts = context.hops([name for name in HOP if name not in SLOW], context.backend.port)
    return _latency(
        context, "hop-latency", starts, direct(context.backend), False, ("HAProxy", "Envoy"), "One plain hop"
    )


def _latency(
    context: Context, section: str, starts: Starts, bare_target: Target, bar: bool, rivals: tuple[str, ...], title: str
) -> list[Group]:
    bars = (Bar(1.0, rivals),) if bar else ()
    p50 = Row(f"{section}.p50", "added p50", "µs", digits=0, bars=bars, rivals=rivals)
    p99 = Row(f"{section}.p99", "added p99", "µs", digits=0, bars=bars, rivals=rivals)
    bare = {"p50": Row(f"{section}.bare.p50", "p50 in all", "µs", digits=0)}
    bare["p99"] = Row(f"{section}.bare.p99", "p99 in all", "µs", digits=0)
    with context.together(starts, [p50, p99, *bare.values()]) as targets:
        for target in targets.values():
            load.warm(context.stage, target)
        targets = {BARE: bare_target, **targets}
        for number in range(context.pace.rounds):
            found: dict[str, load.Latencies] = {}
            for name in in_turn(list(targets), number):
                try:
                    found[name] = load.open_loop(context.stage, targets[name], RATE, context.pace.rate_s)
                except load.MISHAPS as error:
                    context.failed([p50, p99, *bare.values()], name, error)
            base = found.get(BARE)
            for name, seen in found.items():
                context.say(f"{section} round {number + 1}: {name} p50 {seen.p50:.3f} ms, p99 {seen.p99:.3f} ms")
                bare["p50"].add(name, 1000 * seen.p50, seen.errors)
                bare["p99"].add(name, 1000 * seen.p99, seen.errors)
                if base is not None and name != BARE:
                    p50.add(name, 1000 * (seen.p50 - base.p50), seen.errors)
                    p99.add(name, 1000 * (seen.p99 - base.p99), seen.errors)
    note = f"{RATE} requests a second at their appointed times, over 16 connections."
    return [Group(f"{title}: latency at a fixed rate", [p50, p99, *bare.values()], note)]
