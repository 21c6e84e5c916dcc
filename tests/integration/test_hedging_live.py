"""Hedges through real sidecars: the caller's, and those of two instances, one of which is slow. HTTP/1.1, multiplexed
between the sidecars, and unary gRPC."""

import select
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from support.grpc_calls import GrpcServer, call_channel
from support.mesh import Conn, Mesh, Sidecar, echo, until

SLOW_S, AFTER_MS = 1.0, 60
PORTS = {"http": {"port": 80}, "grpc": {"port": 81, "protocol": "grpc"}}
PLENTY = {"budget": {"percent": "100%", "min_per_second": 1000}, "max_retries": 0}
STEADY = {"consecutive_failures": 1_000_000}


class Dawdler(GrpcServer):
    """A server whose calls take long, unless they are cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.left_s: list[float] = []

    def unary(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._enter("Unary", context)
        ended, began = threading.Event(), time.monotonic()
        context.add_callback(ended.set)
        if ended.wait(SLOW_S):
            self.left_s.append(time.monotonic() - began)
        return request


class Rig:
    """`left_s`: how long after its request each connection of the slow application has ended."""

    def __init__(self, mesh: Mesh) -> None:
        self.left_s: list[float] = []
        self.grpc = GrpcServer(), Dawdler()
        self.apps = mesh.backend(echo), mesh.backend(self.dawdle)
        self.reviews = [
            mesh.sidecar(
                "reviews",
                {"web": {}, "reviews": {"ports": PORTS}},
                app={"http": app, "grpc": calls.address},
                outbound=False,
            )
            for app, calls in zip(self.apps, self.grpc, strict=True)
        ]
        self.web: Sidecar = mesh.sidecar("web", {"web": {}}, inbound=False)
        self.apply()

    def dawdle(self, conn: Conn) -> None:
        while True:
            conn.take()
            began = time.monotonic()
            if select.select([conn.sock], [], [], SLOW_S)[0]:
                self.left_s.append(time.monotonic() - began)
                return
            conn.reply(200, b"slow")

    def apply(self, after: str = f"{AFTER_MS}ms", retry: Any = None, **service: Any) -> None:
        """Policy of the caller; `after`: none switches hedging off."""
        service = {"circuit_breaker": STEADY, "balance": {"policy": "random"}, **service}
        addresses = [each.inbound for each in self.reviews]
        self.web.apply(
            {
                "web": {},
                "reviews": {
                    "ports": PORTS, "address": addresses, "hedge": {"after": after},
                    "retry": retry or PLENTY, "timeout": {"total": "5s"}, **service,
                },
            }
        )  # fmt: skip
        for app in self.apps:
            app.clear()
        self.left_s.clear()

    def hedges(self, result: str) -> float:
        return self.web.metric("pillion_hedges_total", service="reviews", result=result)

    def attempts(self) -> int:
        return sum(len(app.requests) for app in self.apps)

    def gets(self, count: int, at_a_time: int = 1, method: str = "GET") -> list[float]:
        """How long each of so many requests took."""

        def one(client: Any) -> float:
            began = time.monotonic()
            found = client.get("/", host="reviews") if method == "GET" else client.post("/", b"x", host="reviews")
            assert found.status == 200
            return time.monotonic() - began

        def some(number: int) -> list[float]:
            with self.web.client() as client:
                return [one(client) for _ in range(number)]

        with ThreadPoolExecutor(at_a_time) as pool:
            return [took for each in pool.map(some, [count // at_a_time] * at_a_time) for took in each]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with Mesh(tmp_path_factory.mktemp("hedging")) as mesh:
        rig = Rig(mesh)
        yield rig
        until(lambda: rig.web.metric("pillion_requests_active") == 0, "the end of all requests")
        for sidecar in (rig.web, *rig.reviews):
            assert sidecar.crashes == 0
        for server in rig.grpc:
            server.stop()


def test_a_slow_instance_is_not_waited_for_and_hears_at_once_that_it_is_too_late(rig: Rig) -> None:
    rig.apply()
    won = rig.hedges("won")
    took = rig.gets(20)
    assert max(took) < SLOW_S / 2
    slow = len(rig.apps[1].requests)
    assert slow == rig.attempts() - 20 and 0 < rig.hedges("won") - won <= slow
    until(lambda: len(rig.left_s) == slow, "the cancelling of what has lost")
    assert sorted(rig.left_s)[slow // 2] < AFTER_MS / 1000 + 0.1, "too late by far"
    numbers = {request.header("x-pillion-attempt") for request in rig.apps[0].requests}
    assert numbers == {None}  # between sidecars only
    line = rig.web.logged(route="default", attempts=2)
    assert line["status"] == 200 and line["upstream"] == rig.reviews[0].inbound


def test_a_post_is_never_doubled_unless_the_policy_says_that_it_may_be(rig: Rig) -> None:
    rig.apply()
    before = sum(rig.hedges(each) for each in ("won", "lost", "failed"))
    took = rig.gets(4, 4, "POST")
    assert rig.attempts() == 4 and sum(rig.hedges(each) for each in ("won", "lost", "failed")) == before
    slow = len(rig.apps[1].requests)
    assert sum(each >= SLOW_S for each in took) == slow
    rig.apply(retry={**PLENTY, "methods": ["any"]})
    assert max(rig.gets(8, 4, "POST")) < SLOW_S / 2


@pytest.mark.long
@pytest.mark.alone
def test_the_tail_with_and_without(rig: Rig) -> None:
    tails = {}
    for after in ("none", f"{AFTER_MS}ms"):
        rig.apply(after)
        tails[after] = sorted(rig.gets(100, 10))[-2]
        extra = rig.attempts() - 100
        assert extra == 0 if after == "none" else extra == len(rig.apps[1].requests)
    assert tails["none"] >= SLOW_S and tails[f"{AFTER_MS}ms"] < SLOW_S / 3


@pytest.mark.long
@pytest.mark.alone
def test_many_at_a_time_share_connections_which_stay(rig: Rig) -> None:
    rig.apply()
    took = rig.gets(400, 20)
    assert sorted(took)[-5] < SLOW_S / 2
    slow = len(rig.apps[1].requests)
    assert slow > 100
    until(lambda: len(rig.left_s) == slow, "the cancelling of what has lost")
    until(lambda: rig.web.metric("pillion_requests_active", service="reviews") == 0, "the end of all attempts")
    assert rig.web.metric("pillion_upstream_connections", service="reviews", port="http") < 60


@pytest.mark.long
def test_a_service_that_is_slow_everywhere_gets_no_more_than_half_of_the_budget(rig: Rig) -> None:
    rig.apps[0].script = rig.dawdle
    rig.apps[0].end_connections()
    try:
        rig.apply(retry={"budget": {"percent": "20%", "min_per_second": 0}, "max_retries": 0})
        refused = rig.hedges("no_budget")
        time.sleep(10.1)  # until what earlier tests have spent is forgotten
        assert len(rig.gets(100, 50)) == 100
        assert rig.attempts() <= 110 and rig.hedges("no_budget") - refused >= 80
    finally:
        rig.apps[0].script = echo
        rig.apps[0].end_connections()


@pytest.mark.long
def test_a_breaker_opens_where_hedges_hide_that_an_instance_hangs(rig: Rig) -> None:
    rig.apply(circuit_breaker={"consecutive_failures": 5, "open_for": "30s"})
    rig.gets(60)
    ends = [each for each in rig.web.admin("/clusters") if each["service"] == "reviews" and each["port"] == "http"]
    assert sorted(each["breaker"] for each in ends) == ["closed", "open"]
    assert 7 <= len(rig.apps[1].requests) <= 14 and all(
        each["failures"] == 0 for each in ends if each["breaker"] == "closed"
    )
    rig.apply(circuit_breaker={**STEADY, "open_for": "1ms"})


def test_unary_calls(rig: Rig) -> None:
    rig.apply(retry={**PLENTY, "methods": ["any"]})
    fast, slow = rig.grpc
    with call_channel(rig.web.outbound, "grpc.reviews") as channel:
        call = channel.unary_unary("/test.Echo/Unary")
        assert call(b"warm", timeout=10) == b"warm"
        began, before = time.monotonic(), fast.times("Unary") + slow.times("Unary")
        slow_before = slow.times("Unary")
        for number in range(10):
            assert call(b"%d" % number, timeout=10) == b"%d" % number
        asked_slow = slow.times("Unary") - slow_before
        assert time.monotonic() - began < SLOW_S * max(1, asked_slow) / 2 + 1.0
        assert fast.times("Unary") + slow.times("Unary") - before == 10 + asked_slow
    until(lambda: len(slow.left_s) >= asked_slow, "the cancelling of what has lost")
    assert all(each < 0.5 for each in slow.left_s)
