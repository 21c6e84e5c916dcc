"""What is measured: sections of rows. Each section starts the contenders it needs and measures them in turn, round by
round, each round beginning with another one, so that what the machine does meanwhile hits all of them alike.
"""

import ssl
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from . import contenders, envoy, load, policy
from .contenders import Backend, Identities, Target
from .exchange import answers
from .stage import Process, Stage, free_port, until
from .table import OURS, Bar, Group, Row

ENVOYS = ("Envoy HTTP/1.1", "Envoy HTTP/2")
CONNECTIONS = (1, 32, 256)
RATE = 1000
IDLE = 1000
MANY_SERVICES, ENDPOINTS_EACH = 1000, 10
MB, KB = 1e6, 1e3


@dataclass(frozen=True, slots=True)
class Pace:
    """How long and how often."""

    rounds: int
    warm_s: float
    window_s: float
    rate_s: float
    bulk_bytes: int
    few: int  # rounds of what needs fresh processes

    def with_rounds(self, rounds: int) -> "Pace":
        return Pace(rounds, self.warm_s, self.window_s, self.rate_s, self.bulk_bytes, rounds)


QUICK = Pace(rounds=2, warm_s=0.3, window_s=1.0, rate_s=1.5, bulk_bytes=1 << 28, few=1)
FULL = Pace(rounds=5, warm_s=0.6, window_s=2.5, rate_s=4.0, bulk_bytes=1 << 30, few=3)


@dataclass(slots=True)
class Context:
    """What every section is given."""

    stage: Stage
    backend: Backend
    identities: Identities
    pace: Pace
    only: tuple[str, ...] = ()
    trouble: list[str] = field(default_factory=list)

    def wants(self, key: str) -> bool:
        """Whether a row, or anything under a section, is asked for."""
        return not self.only or any(
            key == asked or key.startswith(f"{asked}.") or asked.startswith(f"{key}.") for asked in self.only
        )

    def say(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    def failed(self, rows: Sequence[Row], contender: str, error: Exception) -> None:
        self.trouble.append(f"{rows[0].key}: {contender}: {error}")
        self.say(f"{contender} failed: {str(error)[:2000]}")
        for row in rows:
            row.add(contender, None, 1)

    @contextmanager
    def fresh(self, start: Callable[[], Target]) -> Iterator[Target]:
        """A target that ends with the block."""
        known = len(self.stage.processes)
        try:
            yield start()
        finally:
            self.stage.end(self.stage.processes[known:])

    def starts(self, names: Sequence[str], app_port: int, bodies: bool = False) -> dict[str, Callable[[], Target]]:
        stage, ids = self.stage, self.identities
        known: dict[str, Callable[[], Target]] = {
            "pillion": lambda: contenders.pillion_pair(stage, app_port, ids),
            ENVOYS[0]: lambda: contenders.envoy_pair(stage, app_port, ids, http2=False, bodies=bodies),
            ENVOYS[1]: lambda: contenders.envoy_pair(stage, app_port, ids, http2=True, bodies=bodies),
            "pillion, one hop": lambda: contenders.pillion_plain(stage, app_port, ids),
            "HAProxy": lambda: contenders.haproxy_plain(stage, app_port),
            "nginx": lambda: contenders.nginx_plain(stage, app_port),
            "Envoy": lambda: contenders.envoy_plain(stage, app_port, ids),
        }
        return {name.partition(",")[0]: known[name] for name in names}


Section = Callable[[Context], list[Group]]
MESH = ("pillion", *ENVOYS)
HOP = ("pillion, one hop", "HAProxy", "nginx", "Envoy")
HOP_RIVALS = ("HAProxy", "Envoy")


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """The names, beginning with another one each time."""
    at = number % len(names)
    return [*names[at:], *names[:at]]


def _unfinished(name: str, number: int, *rows: Row) -> list[Row]:
    """The rows that have no value of this round yet."""
    return [row for row in rows if len(row.series.get(name, ())) <= number]


# -- CPU and throughput


def mesh_cpu(context: Context) -> list[Group]:
    bars = (Bar(0.9, ENVOYS[:1]), Bar(0.8, ENVOYS))
    return _cpu(context, "mesh-cpu", MESH, bars, ENVOYS, "Two hops with mutual TLS")


def hop_cpu(context: Context) -> list[Group]:
    return _cpu(context, "hop-cpu", HOP, (Bar(1.3, ("HAProxy",)),), HOP_RIVALS, "One plain hop")


def _cpu(
    context: Context, section: str, names: Sequence[str], bars: tuple[Bar, ...], rivals: tuple[str, ...], title: str
) -> list[Group]:
    pace = context.pace
    counts = [count for count in CONNECTIONS if context.wants(f"{section}.{count}")]
    if not counts:
        return []
    cpu = {
        count: Row(f"{section}.{count}", f"CPU a request, {_connections(count)}", "µs", bars=bars, rivals=rivals)
        for count in counts
    }
    rate = {
        count: Row(
            f"{section}.{count}.rate",
            f"throughput, {_connections(count)}",
            "requests/s",
            digits=0,
            lower_is_better=False,
            rivals=rivals,
        )
        for count in counts
    }
    fill = Row(f"{section}.{max(counts)}.fill", f"until {_connections(max(counts))} are open, under load", "s")
    split = _Split(section, 32)
    with _together(context, context.starts(names, context.backend.port)) as targets:
        for name, target in targets.items():  # so that no handshake falls into a window
            try:
                fill.add(name, load.fill(context.stage, target, max(counts)))
                context.say(f"{section}: {name} has opened its connections after {fill.series[name][-1]:.1f} s")
            except load.MISHAPS as error:
                context.failed([fill], name, error)
        for number in range(pace.rounds):
            for connections in counts:
                rows = [cpu[connections], rate[connections]]
                for name in in_turn(list(targets), number):
                    try:
                        window = load.closed_loop(
                            context.stage, targets[name], context.backend, connections, pace.warm_s, pace.window_s
                        )
                    except load.MISHAPS as error:
                        context.failed(rows, name, error)
                        continue
                    cpu[connections].add(name, window.cpu_us_per_request, window.errors)
                    rate[connections].add(name, window.requests_per_second, window.errors)
                    if connections == split.connections:
                        split.add(name, window)
                    context.say(
                        f"{section}.{connections} round {number + 1}: {name} {window.cpu_us_per_request:.1f} µs, "
                        f"{window.requests_per_second:.0f} requests/s"
                        + (f", {window.errors} ERRORS" if window.errors else "")
                    )
    groups = [Group(title, [*cpu.values(), *rate.values(), fill])]
    if split.rows:
        groups.append(Group(f"{title}: where the CPU time goes, {_connections(split.connections)}", split.rows))
    return groups


class _Split:
    """CPU a request by process and by user or system time, at one number of connections."""

    def __init__(self, section: str, connections: int) -> None:
        self.section, self.connections = section, connections
        self.rows: list[Row] = []

    def add(self, name: str, window: load.Window) -> None:
        sides = ("caller's side", "callee's side") if len(window.user_system_s) == 2 else ("proxy",)
        if not self.rows:
            self.rows = [
                Row(f"{self.section}.{self.connections}.split", f"{side}, {kind}", "µs")
                for side in sides
                for kind in ("user", "system")
            ]
        values = [value for pair in window.user_system_s for value in pair]
        for row, value in zip(self.rows, values, strict=True):
            row.add(name, 1e6 * value / window.requests)


def _connections(count: int) -> str:
    return "1 connection" if count == 1 else f"{count} connections"


@contextmanager
def _together(context: Context, starts: dict[str, Callable[[], Target]]) -> Iterator[dict[str, Target]]:
    """All of these, up at once."""
    known = len(context.stage.processes)
    try:
        yield {name: start() for name, start in starts.items()}
    finally:
        context.stage.end(context.stage.processes[known:])


# -- latency at a fixed rate


def mesh_latency(context: Context) -> list[Group]:
    return _latency(context, "mesh-latency", MESH, (Bar(1.0, ENVOYS),), ENVOYS, "Two hops with mutual TLS")


def hop_latency(context: Context) -> list[Group]:
    return _latency(context, "hop-latency", HOP, (), HOP_RIVALS, "One plain hop")


def _latency(
    context: Context, section: str, names: Sequence[str], bars: tuple[Bar, ...], rivals: tuple[str, ...], title: str
) -> list[Group]:
    p50 = Row(f"{section}.p50", "added p50", "µs", digits=0, bars=bars, rivals=rivals)
    p99 = Row(f"{section}.p99", "added p99", "µs", digits=0, bars=bars, rivals=rivals)
    bare = {"p50": Row(f"{section}.bare.p50", "p50 in all", "µs", digits=0)}
    bare["p99"] = Row(f"{section}.bare.p99", "p99 in all", "µs", digits=0)
    with _together(context, context.starts(names, context.backend.port)) as targets:
        targets = {"no proxy": contenders.direct(context.backend), **targets}
        for number in range(context.pace.rounds):
            found: dict[str, load.Latencies] = {}
            for name in in_turn(list(targets), number):
                try:
                    found[name] = load.open_loop(context.stage, targets[name], RATE, context.pace.rate_s)
                except load.MISHAPS as error:
                    context.failed([p50, p99, *bare.values()], name, error)
            base = found.get("no proxy")
            for name, seen in found.items():
                context.say(f"{section} round {number + 1}: {name} p50 {seen.p50:.3f} ms, p99 {seen.p99:.3f} ms")
                bare["p50"].add(name, 1000 * seen.p50, seen.errors)
                bare["p99"].add(name, 1000 * seen.p99, seen.errors)
                if base is not None and name != "no proxy":
                    p50.add(name, 1000 * (seen.p50 - base.p50), seen.errors)
                    p99.add(name, 1000 * (seen.p99 - base.p99), seen.errors)
    note = f"{RATE} requests a second at their appointed times, over 16 connections."
    return [Group(f"{title}: latency at a fixed rate", [p50, p99, *bare.values()], note)]


# -- memory


def mesh_memory(context: Context) -> list[Group]:
    idle = Row("mesh-memory.idle", "when ready", "MB", rivals=ENVOYS)
    loaded = Row("mesh-memory.loaded", "after 256 busy connections", "MB", rivals=ENVOYS)
    starts = context.starts(MESH, context.backend.port)
    for number in range(context.pace.few):
        for name in in_turn(list(starts), number):
            try:
                with context.fresh(starts[name]) as target:
                    time.sleep(0.3)
                    idle.add(name, load.mean_resident(target.proxies) / MB)
                    window = load.closed_loop(context.stage, target, context.backend, 256, 1.0, context.pace.window_s)
                    loaded.add(name, load.mean_resident(target.proxies) / MB, window.errors)
                    context.say(f"mesh-memory round {number + 1}: {name} {loaded.series[name][-1]:.1f} MB")
            except load.MISHAPS as error:
                context.failed(_unfinished(name, number, idle, loaded), name, error)
    return [Group("Resident memory of one sidecar", [idle, loaded])]


def idle_connections(context: Context) -> list[Group]:
    plain = Row("idle.plain", "plain, at the caller's side", "KB", bars=(Bar(4.0),))
    mtls = Row("idle.mtls", "mutual TLS, at the callee's side", "KB", bars=(Bar(24.0),))
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(context.identities.caller / "bundle.pem")
    client.load_cert_chain(context.identities.caller / "cert.pem", context.identities.caller / "key.pem")
    client.set_alpn_protocols(["http/1.1"])
    starts = context.starts(MESH[:2], context.backend.port)
    for number in range(context.pace.few):
        for name in in_turn(list(starts), number):
            try:
                with context.fresh(starts[name]) as target:
                    outbound, inbound = target.proxies
                    each = load.memory_of_idle(outbound, target.port, target.host, IDLE)
                    plain.add(name, each / KB)
                    each = load.memory_of_idle(inbound, target.mesh_port, target.host, IDLE, client)
                    mtls.add(name, each / KB)
                    context.say(f"idle round {number + 1}: {name} {plain.series[name][-1]:.1f}, {each / KB:.1f} KB")
            except load.MISHAPS as error:
                context.failed(_unfinished(name, number, plain, mtls), name, error)
    note = f"{IDLE} connections, each with one request behind it; resident memory of the process, so sockets' buffers \
in the kernel are not in it."
    return [Group("Memory of an idle connection", [plain, mtls], note)]


# -- long bodies


def bulk(context: Context) -> list[Group]:
    rows: dict[str, list[Row]] = {}
    for way in ("download", "upload"):
        rows[way] = [
            Row(
                f"bulk.{way}.rate",
                f"{way}, throughput",
                "MB/s",
                0,
                lower_is_better=False,
                bars=(Bar(0.9, ENVOYS),),
                rivals=ENVOYS,
            ),
            Row(f"bulk.{way}.cpu", f"{way}, CPU of both proxies", "s/GB", 2, rivals=ENVOYS),
            Row(f"bulk.{way}.memory", f"{way}, growth of memory at its peak", "MB", 1, bars=(Bar(16.0),)),
        ]
    app_port = load.bulk_backend(context.stage)
    with _together(context, context.starts(MESH, app_port, bodies=True)) as targets:
        for number in range(max(context.pace.few, min(context.pace.rounds, 2))):
            for way, (rate, cpu, memory) in rows.items():
                if not context.wants(f"bulk.{way}"):
                    continue
                for name in in_turn(list(targets), number):
                    try:
                        done = load.transfer(targets[name], context.pace.bulk_bytes, upload=way == "upload")
                    except load.MISHAPS as error:
                        context.failed([rate, cpu, memory], name, error)
                        continue
                    rate.add(name, done.megabytes_per_second)
                    cpu.add(name, done.cpu_s / done.bytes * 1e9)
                    memory.add(name, max(done.peak_growth) / MB)
                    context.say(f"bulk.{way} round {number + 1}: {name} {done.megabytes_per_second:.0f} MB/s")
    size = context.pace.bulk_bytes / (1 << 30)
    note = f"One body of {size:g} GiB through two hops with mutual TLS."
    return [Group("Long bodies", [row for each in rows.values() for row in each if row.series], note)]


# -- start


def start(context: Context) -> list[Group]:
    groups = []
    for services in (1, MANY_SERVICES):
        if context.wants(f"start.{services}"):
            groups.append(_start(context, services))
    return groups


def _start(context: Context, services: int) -> Group:
    many = services > 1
    words = f"{services:,} services with {ENDPOINTS_EACH} endpoints each".replace(",", "\N{NO-BREAK SPACE}")
    rivals = ("Envoy",)
    soon = Bar(800.0 if many else 300.0)
    small = (Bar(0.5, rivals),) if many else ()
    ready = Row(f"start.{services}.ready", "from exec to the first answer", "ms", 0, bars=(soon,), rivals=rivals)
    memory = Row(f"start.{services}.memory", "resident memory then", "MB", bars=small, rivals=rivals)
    reachable = contenders.plain_service(context.backend.port)
    all_services = policy.many_services(reachable, services, ENDPOINTS_EACH)
    commands = {
        OURS: _pillion_command(context, all_services),
        "Envoy": _envoy_command(context, all_services),
    }
    for number in range(-1, context.pace.rounds):  # one before the first, for the file cache
        for name in in_turn(list(commands), number):
            port, command = commands[name]
            begun = time.perf_counter()
            process = context.stage.start(f"{name} start", command)
            try:
                _wait(port, reachable.name, process)
                if number < 0:
                    continue
                ready.add(name, 1000 * (time.perf_counter() - begun))
                time.sleep(0.3)
                memory.add(name, process.memory().resident / MB)
                context.say(f"start.{services} round {number + 1}: {name} {ready.series[name][-1]:.0f} ms")
            except load.MISHAPS as error:
                if number >= 0:
                    context.failed(_unfinished(name, number, ready, memory), name, error)
            finally:
                context.stage.end([process])
    return Group(f"Start of one sidecar with {'one service' if not many else words}", [ready, memory])


def _wait(port: int, host: str, process: Process) -> None:
    until(lambda: answers(port, host), process, "an answer with 200", 60.0)


def _pillion_command(context: Context, services: Sequence[policy.Service]) -> tuple[int, list[str]]:
    port = free_port()
    command = contenders.pillion_command(context.stage, services)
    own = ["--service", policy.CALLER, "--identity", str(context.identities.caller)]
    return port, [*command, *own, "--inbound", "off", "--outbound", f"127.0.0.1:{port}", "--admin", "127.0.0.1:0"]


def _envoy_command(context: Context, services: Sequence[policy.Service]) -> tuple[int, list[str]]:
    port = free_port()
    config = envoy.outbound(port, services, context.identities.caller, policy.CALLER)
    return port, contenders.envoy_command(context.stage, config)


SECTIONS: dict[str, Section] = {
    "mesh-cpu": mesh_cpu,
    "mesh-latency": mesh_latency,
    "mesh-memory": mesh_memory,
    "idle": idle_connections,
    "bulk": bulk,
    "hop-cpu": hop_cpu,
    "hop-latency": hop_latency,
    "start": start,
}
