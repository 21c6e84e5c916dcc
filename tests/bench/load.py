"""Load, and what is read from the accounts while it lasts.

The window of a measurement begins when connections are open and warm, and ends before they close: requests are counted
at the backend and CPU time in the kernel's accounts, both at the window's edges.
"""

import json
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from .backends import Backend, Target
from .exchange import Client
from .grpc_call import METHOD, REQUEST
from .stage import HOST, BenchError, Process, Stage, free_port, until
from .stats import LoadReport, Unreadable, lost_or_repeated, parse_h2load, parse_wrk

LONGEST_S = 60
H2LOAD_SPARE_S = 0.5  # it cannot be stopped before its time, so it is given this much more than the window needs
FILL_POLL_S, FILL_STILL_S, FILL_LIMIT_S = 0.05, 2.5, 25.0
FIRST_LIMIT_S = 10.0
WARM_CONNECTIONS, WARM_CALLS = 32, 1600
REQUESTS_MIN = 10  # fewer in a window, and something does not work

# What a measurement may fail with, and the run goes on.
MISHAPS = (BenchError, Unreadable, OSError, subprocess.SubprocessError)


@dataclass(frozen=True, slots=True)
class Window:
    """What happened between the two edges."""

    requests: int
    seconds: float
    cpu_s: tuple[float, ...]  # of each proxy
    user_system_s: tuple[tuple[float, float], ...]  # the same, rounded to 10 ms
    errors: int

    @property
    def cpu_us_per_request(self) -> float:
        return 1e6 * sum(self.cpu_s) / self.requests

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.seconds


@dataclass(frozen=True, slots=True)
class Latencies:
    """At a fixed rate, from the moment at which each request was due. Milliseconds."""

    sent: int
    errors: int
    p50: float
    p99: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """One body through a path."""

    seconds: float
    cpu_s: float
    bytes: int
    peak_growth: tuple[int, ...] = field(default=())  # bytes of resident memory at its peak, over what was there before

    @property
    def megabytes_per_second(self) -> float:
        return self.bytes / 1e6 / self.seconds


@dataclass(frozen=True, slots=True)
class Idle:
    """Bytes of resident memory with connections that are kept open."""

    each: float
    total: int


def closed_loop(
    stage: Stage,
    target: Target,
    backend: Backend,
    connections: int,
    warm_s: float,
    window_s: float,
    streams: int = 1,
) -> Window:
    """This many connections (with as many streams each), each sending its next request when it has the last answer."""
    if not target.grpc:
        _expect_200(target, backend.body_bytes)
    before_all = backend.settled()
    process = _load(stage, target, connections, streams, warm_s + window_s + H2LOAD_SPARE_S)
    try:
        if not target.grpc:  # h2load counts its time already
            _everyone_answered(backend, before_all + connections)
        time.sleep(warm_s)
        first = _edge(target, backend)
        time.sleep(window_s)
        last = _edge(target, backend)
        report = _report(process, target)
    finally:
        stage.end([process])
    requests = last.served - first.served
    if requests < REQUESTS_MIN:
        raise BenchError(f"{target.name}: only {requests} requests reached the backend in {window_s:g} s")
    odd = lost_or_repeated(report, backend.settled() - before_all, connections * streams)
    if report.body_bytes is not None and report.body_bytes < report.requests * backend.body_bytes:
        odd = max(odd, 1)  # some answers came without their message
    return Window(
        requests,
        last.time - first.time,
        tuple(b - a for a, b in zip(first.cpu_s, last.cpu_s, strict=True)),
        tuple((b[0] - a[0], b[1] - a[1]) for a, b in zip(first.user_system_s, last.user_system_s, strict=True)),
        report.errors + odd,
    )


def _everyone_answered(backend: Backend, served: int) -> None:
    """Wait until the backend has served as many; a slow proxy may need longer than the warm-up for all connections."""
    deadline = time.monotonic() + FIRST_LIMIT_S
    while backend.served() < served and time.monotonic() < deadline:
        time.sleep(FILL_POLL_S)


def warm(stage: Stage, target: Target) -> None:
    """Open connections within the path, so that a fixed rate of calls does not begin with a handshake for each.

    The calls all end: a proxy closes an HTTP/1.1 connection whose call is given up. Callers with HTTP/1.1 need no such
    thing, because each of their connections waits for its answer.
    """
    if target.grpc:
        process = _h2load(stage, target, WARM_CONNECTIONS, 1, [f"-n{WARM_CALLS}"])
        try:
            process.popen.wait(LONGEST_S)
        finally:
            stage.end([process])


def fill(stage: Stage, target: Target, connections: int) -> float:
    """Load it until its proxies open no further connections; how many seconds that took from the first request."""
    process = _load(stage, target, connections, 1, LONGEST_S)
    try:
        begun = changed = time.perf_counter()
        last: list[int] = []
        while True:
            time.sleep(FILL_POLL_S)
            found = [proxy.descriptors() for proxy in target.proxies]
            now = time.perf_counter()
            if found != last:
                last, changed = found, now
            if now - changed > FILL_STILL_S or now - begun > FILL_LIMIT_S:
                return changed - begun
    finally:
        stage.end([process])


def _load(stage: Stage, target: Target, connections: int, streams: int, seconds: float) -> Process:
    if target.grpc:
        return _h2load(stage, target, connections, streams, [f"-D{1000 * seconds:.0f}ms"])
    return stage.start(
        "wrk",
        [
            *(stage.tools["wrk"], "-t1", f"-c{connections}", f"-d{LONGEST_S}s", "--timeout", "10s"),
            *("-H", f"Host: {target.host}", f"http://{HOST}:{target.port}{target.path}"),
        ],
    )


def _h2load(stage: Stage, target: Target, connections: int, streams: int, limit: Sequence[str]) -> Process:
    """Unary calls: one message each, in its frame. The answer's trailers are not shown by h2load; `Backend` counts."""
    message = stage.folder("message") / "message"
    message.write_bytes(REQUEST)
    return stage.start(
        "h2load",
        [
            *(stage.tools["h2load"], "-t1", f"-c{connections}", f"-m{streams}", *limit),
            *("-d", str(message), "-H", f":authority: {target.host}"),
            *("-H", "content-type: application/grpc", "-H", "te: trailers", "-H", "user-agent: grpc-bench/1"),
            f"http://{HOST}:{target.port}{METHOD}",
        ],
    )


def _report(process: Process, target: Target) -> LoadReport:
    """What the load has counted, now that its time is over."""
    if target.grpc:
        process.popen.wait(LONGEST_S)
        return parse_h2load(process.said())
    process.popen.send_signal(signal.SIGINT)  # it stops, and reports
    process.popen.wait(10)
    return parse_wrk(process.said())


@dataclass(frozen=True, slots=True)
class _Edge:
    """The accounts at one edge of a window."""

    time: float
    served: int
    cpu_s: tuple[float, ...]
    user_system_s: tuple[tuple[float, float], ...]


def _edge(target: Target, backend: Backend) -> _Edge:
    served = backend.served()
    cpu_s = tuple(proxy.cpu_s() for proxy in target.proxies)
    return _Edge(time.perf_counter(), served, cpu_s, tuple(proxy.user_system_s() for proxy in target.proxies))


def _expect_200(target: Target, body_bytes: int) -> None:
    with Client(target.port) as client:
        status, length = client.get(target.host, target.path)
    if (status, length) != (200, body_bytes):
        raise BenchError(f"{target.name} answered {status} with {length} bytes instead of 200 with {body_bytes}")


def open_loop(stage: Stage, target: Target, rate: int, seconds: float, connections: int = 16) -> Latencies:
    """Requests at their appointed times, whether or not earlier ones are answered."""
    process = stage.start(
        "open loop",
        [
            *(sys.executable, "-m", "tests.bench.open_loop_grpc" if target.grpc else "tests.bench.open_loop"),
            *(str(target.port), target.host, str(rate), str(seconds), str(connections)),
        ],
    )
    try:
        code = process.popen.wait(seconds + 15)
    finally:
        stage.end([process])
    if code:
        raise BenchError(f"{target.name}: the open-loop client failed:\n{process.said()}")
    return Latencies(**json.loads(process.said().splitlines()[-1]))


# -- bodies


def bulk_backend(stage: Stage) -> int:
    """The port of an application that sends and swallows long bodies."""
    port = free_port()
    process = stage.start("bulk backend", [sys.executable, "-m", "tests.bench.bulk", str(port)])

    def listens() -> bool:
        with socket.socket() as sock:
            return sock.connect_ex((HOST, port)) == 0

    until(listens, process, "its port")
    return port


def transfer(target: Target, size: int, *, upload: bool) -> Transfer:
    """One body of `size` bytes. Raises BenchError where it does not arrive whole."""
    with Client(target.port) as client:
        client.get(target.host, "/0")  # connections are open on the whole path
        before = [proxy.memory().resident for proxy in target.proxies]
        for proxy in target.proxies:
            proxy.reset_peak()
        cpu = sum(proxy.cpu_s() for proxy in target.proxies)
        start = time.perf_counter()
        if upload:
            client.send_head("PUT", "/0", target.host, {"Content-Length": str(size)})
            _send(client.sock, size)
            status, length, body = client.read_head()
        else:
            client.send_head("GET", f"/{size}", target.host)
            status, length, body = client.read_head()
            if length != size:
                raise BenchError(f"{target.name}: asked for {size} bytes, promised {length}")
        client.skip(length - len(body))
        seconds = time.perf_counter() - start
    if status != 200:
        raise BenchError(f"{target.name} answered {status} to a body of {size} bytes")
    cpu = sum(proxy.cpu_s() for proxy in target.proxies) - cpu
    peaks = [proxy.memory().peak for proxy in target.proxies]
    return Transfer(seconds, cpu, size, tuple(max(0, b - a) for a, b in zip(before, peaks, strict=True)))


def _send(sock: socket.socket, size: int) -> None:
    block = memoryview(bytes(1 << 20))
    while size > 0:
        size -= sock.send(block[: min(size, len(block))])


# -- idle connections


def memory_of_idle(
    process: Process, port: int, host: str, connections: int, context: ssl.SSLContext | None = None
) -> Idle:
    """Connections that have had one request each and are kept open."""
    for _ in range(3):  # what is allocated once only
        with Client(port, context) as client:
            _one_request(client, host)
    time.sleep(0.2)
    before = process.memory().resident
    clients: list[Client] = []
    try:
        for _ in range(connections):
            clients.append(Client(port, context))
            _one_request(clients[-1], host)
        time.sleep(0.2)
        process.check()
        after = process.memory().resident
        return Idle((after - before) / connections, after)
    finally:
        for client in clients:
            client.close()


def _one_request(client: Client, host: str) -> None:
    status, _ = client.get(host)
    if status != 200:
        raise BenchError(f"an idle connection was answered {status}")


def mean_resident(proxies: Sequence[Process]) -> float:
    """The mean of the processes: the memory of one sidecar."""
    return sum(proxy.memory().resident for proxy in proxies) / len(proxies)
