"""The limit before an application on real sockets: what is shed, what comes back, and what is left at three times the
capacity."""

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from support.grpc_calls import GrpcServer, call_channel, failure, reason
from support.mesh import Backend, Client, Conn, Mesh, Response, Script, Sidecar, until

WORKERS, WORK_S = 4, 0.08
CAPACITY = WORKERS / WORK_S


@pytest.fixture
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Mesh(tmp_path_factory.mktemp("overload")) as mesh:
        yield mesh


def pair(mesh: Mesh, app: Backend, reviews: dict[str, Any]) -> tuple[Sidecar, Sidecar]:
    callee = mesh.sidecar("reviews", {"web": {}, "reviews": reviews}, app=app, outbound=False)
    web = mesh.sidecar("web", {"web": {}, "reviews": {**reviews, "address": [callee.inbound]}}, inbound=False)
    return callee, web


def get(web: Sidecar, path: str = "/", **headers: str) -> Response:
    with web.client() as client:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        return client.get(path, host="reviews", headers=fields)


def shown(callee: Sidecar) -> dict[str, Any]:
    rows: list[dict[str, Any]] = callee.admin("/overload")
    return rows[0]


def holding(go: threading.Event) -> Script:
    """An application that answers when it may."""

    def script(conn: Conn) -> None:
        while True:
            conn.take()
            assert go.wait(10)
            conn.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    return script


def test_one_at_a_time_one_waits_the_rest_is_shed_and_every_place_comes_back(mesh: Mesh) -> None:
    go = threading.Event()
    app = mesh.backend(holding(go))
    classes = [{"class": "default"}, {"class": "batch", "headers": {"x-priority": "batch"}}]
    limit = {"max": 1, "queue": 1, "queue_timeout": "10s", "priorities": classes}
    callee, web = pair(mesh, app, {"concurrency": limit, "retry": {"max_retries": 2, "when": [503]}})
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(get, web)
        until(lambda: shown(callee)["in_flight"] == 1)
        batch = pool.submit(get, web, x_priority="batch")
        until(lambda: shown(callee)["queued"] == 1)
        second = pool.submit(get, web)  # takes the place of the lower class
        answer = batch.result(10)
        assert answer.status == 503 and answer.header("x-pillion-reason") == b"overflow"
        assert answer.header("retry-after") == b"1"
        assert get(web).status == 503
        assert shown(callee)["shed_by_class"] == {"batch": 1, "default": 1}  # and neither was retried
        go.set()
        assert first.result(10).status == second.result(10).status == 200
        go.clear()
        third = pool.submit(get, web)
        until(lambda: shown(callee)["in_flight"] == 1)
        with web.client() as leaver:
            leaver.send(b"GET / HTTP/1.1\r\nhost: reviews\r\n\r\n")
            until(lambda: shown(callee)["queued"] == 1)
            leaver.reset()
        until(lambda: shown(callee)["queued"] == 0, limit_s=2)  # a caller that leaves the queue makes room
        go.set()
        assert third.result(10).status == 200
    until(lambda: shown(callee)["in_flight"] == 0)
    assert callee.metric("pillion_shed_total", **{"class": "batch"}) == 1
    assert any(each["kind"] == "overload" for each in callee.admin("/events"))
    assert callee.crashes == 0


def test_the_callers_fallback_serves_what_the_callee_sheds(mesh: Mesh) -> None:
    """A request of a safe method or not: the application has not seen it. Nothing is retried."""
    routes = [
        {"match": {"path": "/fixed"}, "fallback": {"status": 200, "body": "[]"}},
        {"match": {"path": "/other"}, "fallback": {"service": "spare"}},
    ]
    reviews = {"concurrency": {"max": 1, "queue": 0}, "routes": routes, "retry": {"max_retries": 2, "when": [503]}}
    go = threading.Event()
    callee = mesh.sidecar("reviews", {"web": {}, "reviews": reviews, "spare": {}}, app=mesh.backend(holding(go)),
                          outbound=False)  # fmt: skip
    spare = mesh.backend()
    other = mesh.sidecar("spare", {"web": {}, "spare": {}}, app=spare, outbound=False)
    services = {
        "web": {},
        "reviews": {**reviews, "address": [callee.inbound]},
        "spare": {"address": [other.inbound]},
    }
    web = mesh.sidecar("web", services, inbound=False)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(get, web)
        until(lambda: shown(callee)["in_flight"] == 1)
        with web.client() as client:
            fixed = client.get("/fixed", host="reviews")
            assert (fixed.status, fixed.body, fixed.header("x-pillion-reason")) == (200, b"[]", None)
            assert client.post("/other", b"x" * 1000, host="reviews").status == 200
            assert [(each.method, len(each.body)) for each in spare.requests] == [(b"POST", 1000)]
            plain = client.get("/", host="reviews")
            assert (plain.status, plain.reason) == (503, "overflow")
        assert shown(callee)["shed_by_class"] == {"default": 3}
        assert web.logged(path="/fixed")["reason"] == "overflow"
        go.set()
        assert first.result(10).status == 200
    assert callee.crashes == web.crashes == 0


def test_a_new_policy_keeps_or_calls_up_whoever_waits(mesh: Mesh) -> None:
    go = threading.Event()
    limit = {"max": 1, "queue_timeout": "20s"}
    callee, web = pair(mesh, mesh.backend(holding(go)), {"concurrency": limit})
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(get, web) for _ in range(3)]
        until(lambda: shown(callee)["queued"] == 2)
        callee.apply({"web": {}, "reviews": {"concurrency": {"max": 2, "queue_timeout": "20s"}}})
        until(lambda: (shown(callee)["in_flight"], shown(callee)["queued"]) == (2, 1))
        callee.apply({"web": {}, "reviews": {}})
        assert callee.admin("/overload") == []
        go.set()
        assert [each.result(10).status for each in answers] == [200] * 3
    assert callee.crashes == 0


def test_whoever_waits_when_a_sidecar_is_stopped_is_still_served(mesh: Mesh) -> None:
    go = threading.Event()
    limit = {"max": 1, "queue_timeout": "20s"}
    callee, web = pair(mesh, mesh.backend(holding(go)), {"concurrency": limit})
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(get, web) for _ in range(3)]
        until(lambda: shown(callee)["queued"] == 2)
        callee.process.send_signal(signal.SIGTERM)
        until(lambda: "draining" in callee.log, limit_s=10)
        go.set()
        assert [each.result(10).status for each in answers] == [200] * 3
    assert callee.stop() == 0


def test_calls_of_grpc_are_shed_as_unavailable_and_streams_keep_no_place(mesh: Mesh) -> None:
    server = GrpcServer()
    ports = {"api": {"port": 80, "protocol": "grpc"}}
    reviews = {"ports": ports, "concurrency": {"max": 1, "queue": 1, "queue_timeout": "20s"}}
    callee = mesh.sidecar("reviews", {"web": {}, "reviews": reviews}, app=server.address, outbound=False)
    web = mesh.sidecar("web", {"web": {}, "reviews": {**reviews, "address": [callee.inbound]}}, inbound=False)
    over = threading.Event()

    def talk() -> Iterator[bytes]:
        yield b"x"
        over.wait(10)

    with call_channel(web.outbound, "reviews") as channel:
        streams = [channel.stream_stream("/test.Echo/PingPong")(talk()) for _ in range(2)]
        assert [next(iter(stream)) for stream in streams] == [b"pong x"] * 2  # both at once
        until(lambda: shown(callee)["in_flight"] == 0)
        unary = channel.unary_unary
        first = unary("/test.Echo/Hang").future(b"")
        until(lambda: shown(callee)["in_flight"] == 1)
        leaves = unary("/test.Echo/Unary").future(b"a")
        until(lambda: shown(callee)["queued"] == 1)
        error = failure(lambda: unary("/test.Echo/Unary")(b"b"))
        assert error.code() is grpc.StatusCode.UNAVAILABLE and reason(error) == "overflow"
        leaves.cancel()  # a reset of its stream
        until(lambda: shown(callee)["queued"] == 0)
        waits = unary("/test.Echo/Unary").future(b"c")
        until(lambda: shown(callee)["queued"] == 1)
        first.cancel()
        assert waits.result(10) == b"c"
        until(lambda: shown(callee)["in_flight"] == 0)
        over.set()
    assert server.times("Unary") == 1 and callee.crashes == 0
    server.stop()


class Workers:
    """An application with so many workers, that does not notice when its caller leaves."""

    def __init__(self) -> None:
        self.free = threading.Semaphore(WORKERS)

    def __call__(self, conn: Conn) -> None:
        while True:
            conn.take()
            with self.free:
                time.sleep(WORK_S)
            conn.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")


def goodput(web: Sidecar, rate: float, for_s: float, skip_s: float) -> float:
    """Answers in time, a second, under an open load."""
    threads = 120
    begun = time.monotonic() + 0.1
    good: list[float] = []

    def caller(number: int) -> None:
        turn = 0
        client: Client | None = None
        while (at := (number + turn * threads) / rate) < for_s:
            turn += 1
            time.sleep(max(0.0, begun + at - time.monotonic()))
            client = client or web.client()
            try:
                status = client.get("/", host="reviews").status
            except (OSError, AssertionError, EOFError):
                client.close()
                client = None
                continue
            if status == 200 and at >= skip_s:
                good.append(at)
        if client is not None:
            client.close()

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(caller, range(threads)))
    return len(good) / (for_s - skip_s)


@pytest.mark.long
@pytest.mark.alone
def test_at_three_times_the_capacity_goodput_stays_and_collapses_without_a_limit(mesh: Mesh) -> None:
    policy: dict[str, Any] = {"timeout": {"total": "800ms"}, "retry": {"max_retries": 0},
                              "circuit_breaker": {"consecutive_failures": 1_000_000}}  # fmt: skip
    without: Any = mesh.backend(Workers())
    _, web = pair(mesh, without, policy)
    peak = max(goodput(web, CAPACITY * share, 6.0, 1.0) for share in (0.9, 1.0))
    collapsed = goodput(web, CAPACITY * 3, 8.0, 3.0)
    callee, web = pair(mesh, mesh.backend(Workers()), {**policy, "concurrency": {"adaptive": True}})
    kept = goodput(web, CAPACITY * 3, 8.0, 3.0)
    print(f"peak {peak:.0f}/s, at three times the capacity {kept:.0f}/s, without a limit {collapsed:.0f}/s")
    print(shown(callee))
    assert kept >= 0.9 * peak
    assert collapsed <= 0.5 * peak
