"""CPU a request and throughput: two hops with HTTP/1.1 and with gRPC, one plain hop, a filter in Python.

Contenders run side by side and are measured in turn, round by round, each round beginning with another one, so that
what the machine does meanwhile hits all of them alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from . import load
from .backends import Backend
from .context import ENVOYS, EXT_PROC_NAME, HOP, Context, Starts, in_turn
from .table import Bar, Group, Row


@dataclass(frozen=True, slots=True)
class Point:
    """One amount of load."""

    connections: int
    streams: int = 1

    @property
    def key(self) -> str:
        return str(self.connections) if self.streams == 1 else f"{self.connections}x{self.streams}"

    @property
    def words(self) -> str:
        text = "1 connection" if self.connections == 1 else f"{self.connections} connections"
        return text if self.streams == 1 else f"{text} with {self.streams} streams{' each' * (self.connections > 1)}"


@dataclass(frozen=True, slots=True)
class Plan:
    """One section."""

    key: str
    title: str
    what: str  # of which CPU time is a part: a request, a call
    bars: tuple[Bar, ...]
    rivals: tuple[str, ...]
    points: tuple[Point, ...] = (Point(1), Point(32), Point(256))
    split: str = "32"  # the point at which CPU time is told apart
    note: str = ""


TWO = "Two hops with mutual TLS"
MESH_PLAN = Plan("mesh-cpu", TWO, "request", (Bar(0.8, ENVOYS),), ENVOYS)
GRPC_PLAN = Plan(
    "grpc-cpu",
    f"{TWO}: gRPC, unary calls",
    "call",
    (Bar(0.8, ENVOYS),),
    ENVOYS,
    (*MESH_PLAN.points, Point(1, 32), Point(8, 32)),
    note="35 bytes each way, HTTP/2 from the caller and to the application. Envoy as the column says between the two.",
)
HOP_PLAN = Plan("hop-cpu", "One plain hop", "request", (Bar(1.3, ("HAProxy",)),), ("HAProxy", "Envoy"))
FILTER_PLAN = Plan(
    "filter-cpu",
    "One plain hop with a filter in Python on every request",
    "request",
    (Bar(0.1, (EXT_PROC_NAME,)),),
    (EXT_PROC_NAME,),
    note="The filter reads one header field of the request and sets another. Envoy asks a `grpc.aio` server by "
    "`ext_proc`, for heads of requests only; its CPU time counts.",
)


def mesh_cpu(context: Context) -> list[Group]:
    return _measure(context, MESH_PLAN, context.pairs(context.backend.port), context.backend)


def grpc_cpu(context: Context) -> list[Group]:
    if not context.can_call():
        return []
    backend = context.grpc_backend
    return _measure(context, GRPC_PLAN, context.pairs(backend.port, grpc=True), backend)


def hop_cpu(context: Context) -> list[Group]:
    return _measure(context, HOP_PLAN, context.hops(HOP, context.backend.port), context.backend)


def filter_cpu(context: Context) -> list[Group]:
    return _measure(context, FILTER_PLAN, context.filtering(context.backend.port), context.backend)


def _measure(context: Context, plan: Plan, starts: Starts, backend: Backend) -> list[Group]:
    points = [point for point in plan.points if context.wants(f"{plan.key}.{point.key}")]
    if not points:
        return []
    cpu, rate = _rows(plan, points)
    single = [point for point in points if point.streams == 1 and point.connections > 1]
    most = max(single, key=lambda point: point.connections, default=None)
    fill = Row(f"{plan.key}.{most.key}.fill", f"until {most.words} are open, under load", "s") if most else None
    split = _Split(plan)
    with context.together(starts, [*cpu.values(), *rate.values()]) as targets:
        if most and fill:
            _fill(context, targets, most, fill)
        for number in range(context.pace.rounds):
            for point in points:
                for name in in_turn(list(targets), number):
                    try:
                        window = load.closed_loop(
                            *(context.stage, targets[name], backend, point.connections),
                            *(context.pace.warm_s, context.pace.window_s, point.streams),
                        )
                    except load.MISHAPS as error:
                        context.failed([cpu[point], rate[point]], name, error)
                        continue
                    cpu[point].add(name, window.cpu_us_per_request, window.errors)
                    rate[point].add(name, window.requests_per_second, window.errors)
                    if point.key == plan.split:
                        split.add(name, window)
                    context.say(
                        f"{plan.key}.{point.key} round {number + 1}: {name} {window.cpu_us_per_request:.1f} µs, "
                        f"{window.requests_per_second:.0f} {plan.what}s/s"
                        + (f", {window.errors} ERRORS" if window.errors else "")
                    )
    groups = [Group(plan.title, [*cpu.values(), *rate.values(), *([fill] if fill else [])], plan.note)]
    if split.rows:
        words = next(point.words for point in points if point.key == plan.split)
        groups.append(Group(f"{plan.title}: where the CPU time goes, {words}", split.rows))
    return groups


def _rows(plan: Plan, points: Sequence[Point]) -> tuple[dict[Point, Row], dict[Point, Row]]:
    cpu = {
        point: Row(
            f"{plan.key}.{point.key}", f"CPU a {plan.what}, {point.words}", "µs", bars=plan.bars, rivals=plan.rivals
        )
        for point in points
    }
    rate = {
        point: Row(
            f"{plan.key}.{point.key}.rate",
            f"throughput, {point.words}",
            f"{plan.what}s/s",
            digits=0,
            lower_is_better=False,
            rivals=plan.rivals,
        )
        for point in points
    }
    return cpu, rate


def _fill(context: Context, targets: dict[str, load.Target], point: Point, fill: Row) -> None:
    """So that no handshake falls into a window."""
    for name, target in targets.items():
        try:
            fill.add(name, load.fill(context.stage, target, point.connections))
            context.say(f"{fill.key}: {name} has opened its connections after {fill.series[name][-1]:.1f} s")
        except load.MISHAPS as error:
            context.failed([fill], name, error)


class _Split:
    """CPU a request by process and by user or system time, at one amount of load."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rows: list[Row] = []

    def add(self, name: str, window: load.Window) -> None:
        if self.plan.rivals == (EXT_PROC_NAME,):
            pairs = [tuple(map(sum, zip(*window.user_system_s, strict=True)))]  # its server with the proxy
        else:
            pairs = list(window.user_system_s)
        sides = ("caller's side", "callee's side") if len(pairs) == 2 else ("proxy",)
        if not self.rows:
            self.rows = [
                Row(f"{self.plan.key}.{self.plan.split}.split", f"{side}, {kind}", "µs")
                for side in sides
                for kind in ("user", "system")
            ]
        values = [value for pair in pairs for value in pair]
        for row, value in zip(self.rows, values, strict=True):
            row.add(name, 1e6 * value / window.requests)
