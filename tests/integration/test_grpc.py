"""gRPC through two sidecars, with grpcio at both ends: statuses, deadlines, retries and streams as applications see
them."""

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import pytest
import trio
from grpc import StatusCode
from support.grpc_calls import GrpcServer, call_channel, failure, reason
from support.mesh import Mesh, Sidecar, dial, until

from sidecar.discovery.health import Checker, check
from sidecar.model.snapshot import Health

PORTS = {"api": {"port": 80, "protocol": "grpc"}}
QUICK = {"base": "1ms", "max": "2ms", "budget": {"percent": "100%", "min_per_second": 100}}


class Calls:
    """`web` calls `reviews`, whose application is a gRPC server."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.server = GrpcServer("one")
        self.other = GrpcServer("two")
        self.reviews = self.callee(self.server)
        self.second = self.callee(self.other)
        self.web = mesh.sidecar("web", {"web": {}, "reviews": self.at(self.reviews)}, inbound=False)

    def callee(self, server: GrpcServer, **policy: Any) -> Sidecar:
        services = {"web": {}, "reviews": {"ports": PORTS, **policy}}
        return self.mesh.sidecar("reviews", services, app=server.address, outbound=False)

    @staticmethod
    def at(*callees: Sidecar, **policy: Any) -> dict[str, Any]:
        return {"ports": PORTS, "address": [each.inbound for each in callees], **policy}

    def policy(self, **policy: Any) -> None:
        """What the caller's sidecar goes by."""
        self.web.apply({"reviews": self.at(self.reviews, **policy)})

    def callee_policy(self, **policy: Any) -> None:
        self.reviews.apply({"reviews": {"ports": PORTS, **policy}})


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    with Mesh(tmp_path_factory.mktemp("grpc")) as mesh:
        calls = Calls(mesh)
        yield calls
        for sidecar in (calls.web, calls.reviews):
            assert sidecar.crashes == 0
            until(lambda: sidecar.metric("pillion_requests_active") == 0)  # noqa: B023
        calls.server.stop()
        calls.other.stop()


@pytest.fixture
def server(calls: Calls) -> GrpcServer:
    server = calls.server
    server.seen, server.codes, server.trailers = [], iter(()), ()
    server.cancelled.clear()
    server.hanging.clear()
    return server


@pytest.fixture
def channel(calls: Calls, server: GrpcServer) -> Iterator[grpc.Channel]:
    with call_channel(calls.web.outbound, "reviews") as channel:
        yield channel


# Calls of every kind


def test_a_unary_call(calls: Calls, server: GrpcServer, channel: grpc.Channel) -> None:
    answer, call = channel.unary_unary("/test.Echo/Unary").with_call(
        b"hello", timeout=10, metadata=[("echo-a", "1"), ("echo-b-bin", b"\x00\xff\x01")]
    )
    assert answer == b"hello" and call.code() is StatusCode.OK
    assert dict(call.trailing_metadata()) == {"echo-a": "1", "echo-b-bin": b"\x00\xff\x01"}
    sent = server.seen[0][1]
    assert "x-forwarded-client-cert" in sent and "traceparent" in sent
    assert not [name for name in sent if name.startswith("x-pillion") or name == "x-request-deadline-ms"]
    for sidecar, side in ((calls.web, "out"), (calls.reviews, "in")):
        line = sidecar.logged(side=side, path="/test.Echo/Unary")
        assert (line["status"], line["grpc_status"], line["reason"]) == (200, "OK", "ok")
        count = (
            "http_server_request_duration_seconds_count"
            if side == "in"
            else "http_client_request_duration_seconds_count"
        )
        assert sidecar.metric(count, grpc_status="OK", service="reviews") >= 1


def test_streams(channel: grpc.Channel) -> None:
    assert list(channel.unary_stream("/test.Echo/Count")(b"500", timeout=10)) == [b"%d" % n for n in range(500)]
    pieces = [b"x" * 20_000] * 20
    assert channel.stream_unary("/test.Echo/Collect")(iter(pieces), timeout=10) == b"".join(pieces)
    assert list(channel.unary_stream("/test.Echo/Count")(b"0", timeout=10)) == []


def test_both_ways_at_once_nothing_is_held_back(channel: grpc.Channel) -> None:
    pings: queue.Queue[bytes | None] = queue.Queue()
    pongs = channel.stream_stream("/test.Echo/PingPong")(iter(pings.get, None), timeout=10)
    for number in range(50):
        pings.put(b"%d" % number)
        assert next(pongs) == b"pong %d" % number
    pings.put(None)
    assert list(pongs) == []
    assert pongs.code() is StatusCode.OK


def test_a_server_that_has_heard_enough(channel: grpc.Channel) -> None:
    stop = threading.Event()

    def endless() -> Iterator[bytes]:
        while not stop.wait(0.01):
            yield b"x" * 1000

    try:
        assert channel.stream_unary("/test.Echo/First")(endless(), timeout=10) == b"x" * 1000
    finally:
        stop.set()


def test_each_call_of_a_channel_is_balanced(calls: Calls, channel: grpc.Channel) -> None:
    calls.web.apply({"reviews": calls.at(calls.reviews, calls.second, balance={"policy": "round-robin"})})
    name = channel.unary_unary("/test.Echo/Name")
    assert sorted(name(b"", timeout=10) for _ in range(10)) == [b"one"] * 5 + [b"two"] * 5
    calls.policy()


def test_big_messages_and_metadata(channel: grpc.Channel) -> None:
    message = b"m" * 3_000_000
    value = "v" * 6000
    answer, call = channel.unary_unary("/test.Echo/Unary").with_call(
        message, timeout=20, metadata=[("echo-big", value)]
    )
    assert answer == message and dict(call.trailing_metadata()) == {"echo-big": value}


def test_many_at_once(channel: grpc.Channel) -> None:
    unary = channel.unary_unary("/test.Echo/Unary")
    pending = [unary.future(b"%d" % number, timeout=20) for number in range(300)]
    assert [each.result() for each in pending] == [b"%d" % number for number in range(300)]


# Deadlines


def test_what_is_left_is_passed_on(calls: Calls, server: GrpcServer, channel: grpc.Channel) -> None:
    remaining = channel.unary_unary("/test.Echo/Remaining")
    calls.policy()
    assert 0 < float(remaining(b"", timeout=5)) <= 5.1  # gRPC's own clients round up
    server.seen.clear()
    assert float(remaining(b"")) > 1e9  # nobody has said anything, and the built-in total is not for calls
    calls.policy(timeout={"total": "2s"})
    assert 0 < float(remaining(b"", timeout=60)) <= 2
    assert 0 < float(remaining(b"", timeout=1)) <= 1.1
    assert 0 < float(remaining(b"")) <= 2


def test_the_policy_deadline(calls: Calls, server: GrpcServer, channel: grpc.Channel) -> None:
    calls.policy(timeout={"total": "300ms"})
    began = time.monotonic()
    error = failure(lambda: channel.unary_unary("/test.Echo/Hang")(b"", timeout=10))
    assert error.code() is StatusCode.DEADLINE_EXCEEDED and reason(error) == "timeout_total"
    assert "in time" in error.details()
    assert 0.25 < time.monotonic() - began < 3
    assert server.cancelled.wait(5)
    line = calls.web.logged(path="/test.Echo/Hang", reason="timeout_total")
    assert line["grpc_status"] == "DEADLINE_EXCEEDED"


def test_callers_that_give_up_together_end_no_channel(calls: Calls, server: GrpcServer, channel: grpc.Channel) -> None:
    """A hundred calls that are given up when their deadline has nearly come are no rapid reset."""
    calls.policy()
    pending = [channel.unary_unary("/test.Echo/Hang").future(b"", timeout=0.5) for _ in range(100)]
    time.sleep(0.45)
    for call in pending:
        call.cancel()
    assert channel.unary_unary("/test.Echo/Unary")(b"well", timeout=10) == b"well"
    for sidecar in (calls.web, calls.reviews):
        assert 'limit="rapid_reset' not in sidecar.admin("/metrics")


def test_the_policy_deadline_ends_a_stream_that_has_begun(calls: Calls, channel: grpc.Channel) -> None:
    calls.policy(timeout={"total": "400ms"})
    stream = channel.unary_stream("/test.Echo/Count")(b"3 hang", timeout=10)
    assert [next(stream) for _ in range(3)] == [b"0", b"1", b"2"]
    error = failure(lambda: stream)
    assert error.code() is StatusCode.DEADLINE_EXCEEDED
    calls.policy()
    stream = channel.unary_stream("/test.Echo/Count")(b"1 hang", timeout=0.5)
    assert next(stream) == b"0"
    assert failure(lambda: stream).code() is StatusCode.DEADLINE_EXCEEDED


# What the sidecars answer themselves


def test_no_service(calls: Calls) -> None:
    with call_channel(calls.web.outbound, "nowhere") as channel:
        error = failure(lambda: channel.unary_unary("/test.Echo/Unary")(b"", timeout=10))
    assert error.code() is StatusCode.UNIMPLEMENTED and reason(error) == "no_route"
    assert 'no service is called "nowhere"' in error.details()


def test_no_method(channel: grpc.Channel) -> None:
    error: Any = failure(lambda: channel.unary_unary("/test.Echo/Nothing")(b"", timeout=10))
    assert error.code() is StatusCode.UNIMPLEMENTED and reason(error) == ""
    assert "content-length" not in dict(error.trailing_metadata())


def test_denied(calls: Calls, server: GrpcServer, channel: grpc.Channel) -> None:
    calls.callee_policy(authz={"default": "deny", "allow": [{"from": ["web"], "paths": ["/test.Echo/Unary"]}]})
    try:
        assert channel.unary_unary("/test.Echo/Unary")(b"a", timeout=10) == b"a"
        error = failure(lambda: channel.unary_unary("/test.Echo/Name")(b"", timeout=10))
        assert error.code() is StatusCode.PERMISSION_DENIED and reason(error) == "denied"
        assert error.details() == "not allowed by policy"
        line = calls.reviews.logged(reason="denied")
        assert (line["status"], line["grpc_status"]) == (200, "PERMISSION_DENIED")
    finally:
        calls.callee_policy()


def test_rate_limited(calls: Calls, channel: grpc.Channel) -> None:
    calls.callee_policy(rate_limit={"requests": 1, "per": "1h", "burst": 2})
    try:
        unary = channel.unary_unary("/test.Echo/Unary")
        assert [unary(b"", timeout=10) for _ in range(2)] == [b"", b""]
        error = failure(lambda: unary(b"", timeout=10))
        assert error.code() is StatusCode.RESOURCE_EXHAUSTED and reason(error) == "rate_limited"
        assert "retry-after" in dict(error.trailing_metadata())
    finally:
        calls.callee_policy()


def test_nobody_serves(calls: Calls, channel: grpc.Channel) -> None:
    calls.web.apply({"reviews": {"ports": PORTS}})
    error = failure(lambda: channel.unary_unary("/test.Echo/Unary")(b"", timeout=10))
    assert error.code() is StatusCode.UNAVAILABLE and reason(error) == "no_healthy_endpoint"
    calls.web.apply({"reviews": {"ports": PORTS, "address": [calls.mesh.dead_address()]}})
    error = failure(lambda: channel.unary_unary("/test.Echo/Unary")(b"", timeout=10))
    assert error.code() is StatusCode.UNAVAILABLE and reason(error) == "connect_failed"
    calls.policy()


def test_faults_and_fixed_responses(calls: Calls, channel: grpc.Channel) -> None:
    calls.policy(
        routes=[
            {"match": {"grpc": {"service": "test.Echo", "method": "Name"}}, "fault": {"abort": {"status": 503}}},
            {"match": {"grpc": {"service": "test.Old"}}, "respond": {"status": 404, "body": "it has moved"}},
        ]
    )
    error = failure(lambda: channel.unary_unary("/test.Echo/Name")(b"", timeout=10))
    assert error.code() is StatusCode.UNAVAILABLE and reason(error) == "fault_injected"
    error = failure(lambda: channel.unary_unary("/test.Old/Name")(b"", timeout=10))
    assert (error.code(), error.details()) == (StatusCode.UNIMPLEMENTED, "it has moved")
    assert channel.unary_unary("/test.Echo/Unary")(b"a", timeout=10) == b"a"
    calls.policy()


# Retries


@pytest.mark.parametrize("method", ["Fail", "Late"])
def test_a_named_status_is_retried(calls: Calls, server: GrpcServer, channel: grpc.Channel, method: str) -> None:
    """Also where the trailers come apart from the head."""
    calls.policy(retry={"max_retries": 2, "when": ["unavailable"], **QUICK})
    server.codes = iter([StatusCode.UNAVAILABLE] * 2)
    assert channel.unary_unary(f"/test.Echo/{method}")(b"x", timeout=10) == b"x"
    assert server.times(method) == 3
    server.codes = iter([StatusCode.UNAVAILABLE] * 3)
    assert (
        failure(lambda: channel.unary_unary(f"/test.Echo/{method}")(b"x", timeout=10)).code() is StatusCode.UNAVAILABLE
    )
    assert server.times(method) == 6


def test_what_is_not_named_is_not_retried(calls: Calls, server: GrpcServer, channel: grpc.Channel) -> None:
    calls.policy(retry={"max_retries": 2, "when": ["unavailable"], **QUICK})
    server.codes = iter([StatusCode.INTERNAL])
    error = failure(lambda: channel.unary_unary("/test.Echo/Fail")(b"x", timeout=10))
    assert (error.code(), error.details(), server.times("Fail")) == (StatusCode.INTERNAL, "because of x", 1)
    calls.policy(retry={"max_retries": 2, **QUICK})
    server.codes = iter([StatusCode.UNAVAILABLE])
    assert failure(lambda: channel.unary_unary("/test.Echo/Fail")(b"x", timeout=10)).code() is StatusCode.UNAVAILABLE
    assert server.times("Fail") == 2


def test_a_head_is_held_for_a_moment_and_a_message_never(calls: Calls, channel: grpc.Channel) -> None:
    calls.policy(retry={"max_retries": 2, "when": ["unavailable"], **QUICK})
    began = time.monotonic()
    stream = channel.unary_stream("/test.Echo/Count")(b"0 hang", timeout=10)
    assert ("early", "1") in [(key, value) for key, value in stream.initial_metadata()]
    assert 0.09 < time.monotonic() - began < 3
    stream.cancel()
    began = time.monotonic()
    stream = channel.unary_stream("/test.Echo/Count")(b"1 hang", timeout=10)
    assert next(stream) == b"0"
    assert time.monotonic() - began < 3
    stream.cancel()


def test_push_back(calls: Calls, server: GrpcServer, channel: grpc.Channel) -> None:
    calls.policy(retry={"max_retries": 2, "when": ["unavailable"], **QUICK})
    server.codes, server.trailers = iter([StatusCode.UNAVAILABLE]), (("grpc-retry-pushback-ms", "300"),)
    began = time.monotonic()
    assert channel.unary_unary("/test.Echo/Fail")(b"x", timeout=10) == b"x"
    assert 0.3 <= time.monotonic() - began < 3 and server.times("Fail") == 2
    for never in ("-1", "5001"):  # it says so, or asks for more than `max_server_delay`
        server.seen.clear()
        server.codes, server.trailers = iter([StatusCode.UNAVAILABLE]), (("grpc-retry-pushback-ms", never),)
        error = failure(lambda: channel.unary_unary("/test.Echo/Fail")(b"x", timeout=10))
        assert error.code() is StatusCode.UNAVAILABLE and server.times("Fail") == 1


# Routes


def test_routes_by_method(calls: Calls, channel: grpc.Channel) -> None:
    one, two = ({"at": each.inbound, "labels": {"v": v}} for each, v in ((calls.reviews, "1"), (calls.second, "2")))
    calls.web.apply(
        {
            "reviews": {
                "ports": PORTS,
                "address": [one, two],
                "versions": {"v1": {"labels": {"v": "1"}}, "v2": {"labels": {"v": "2"}}},
                "routes": [{"match": {"grpc": {"service": "test.Echo", "method": "Name"}}, "to": "v2"}, {"to": "v1"}],
            }
        }
    )
    assert {channel.unary_unary("/test.Echo/Name")(b"", timeout=10) for _ in range(5)} == {b"two"}
    before = calls.other.times("Unary")
    for _ in range(5):
        channel.unary_unary("/test.Echo/Unary")(b"", timeout=10)
    assert calls.other.times("Unary") == before
    calls.policy()


# Cancellation, and calls that are broken


def test_a_cancelled_call_is_cancelled_at_the_server(server: GrpcServer, channel: grpc.Channel) -> None:
    call = channel.unary_unary("/test.Echo/Hang").future(b"", timeout=10)
    assert server.hanging.wait(5)
    call.cancel()
    assert server.cancelled.wait(5)


def test_metadata_that_cannot_be_decoded_breaks_its_own_call_alone(calls: Calls, channel: grpc.Channel) -> None:
    pings: queue.Queue[bytes | None] = queue.Queue()
    pongs = channel.stream_stream("/test.Echo/PingPong")(iter(pings.get, None), timeout=20)
    pings.put(b"1")
    assert next(pongs) == b"pong 1"
    with dial(calls.web.outbound) as sock:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
        connection.initiate_connection()
        head = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", b"/test.Echo/Unary"),
            (b":authority", b"reviews"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"echo-bad-bin", b"!!! this is not base64 !!!"),
        ]
        connection.send_headers(1, head)
        connection.send_data(1, b"\0\0\0\0\0", end_stream=True)
        sock.sendall(connection.data_to_send())
        events: list[Any] = []
        while not any(isinstance(event, h2.events.StreamEnded | h2.events.StreamReset) for event in events):
            data = sock.recv(65536)
            assert data, events
            events += connection.receive_data(data)
    pings.put(b"2")
    assert next(pongs) == b"pong 2"  # over the same connections
    pings.put(None)
    assert list(pongs) == []


# Health


async def test_the_health_protocol() -> None:
    server = GrpcServer()

    async def connect() -> trio.abc.Stream:
        return await trio.open_tcp_stream("127.0.0.1", server.port)

    async def ask(service: str = "") -> str | None:
        return await check(connect, Health(grpc=service, timeout_s=5.0), "reviews")

    try:
        assert await ask() is None and await ask("shop.v1.Cart") is None
        assert server.asked == [b"", b"\n\x8c\x00shop.v1.Cart"]
        server.health = b"\x08\x02"
        assert await ask() == "the health service says NOT_SERVING"
        server.health = b""
        assert await ask() == "the health service says UNKNOWN"
        server.health = StatusCode.NOT_FOUND
        assert await ask("x") == "the health service answered NOT_FOUND: no"
        told: list[tuple[bool, str]] = []
        health = Health(grpc="", interval_s=0.05, healthy=1, unhealthy=2)
        checker = Checker(
            lambda: health,
            lambda _: connect(),
            "reviews",
            lambda verdict: told.append((verdict.healthy, verdict.reason)),
        )
        server.health = b"\x08\x01"
        assert await checker.once() is None
        server.health = b"\x08\x02"
        await checker.once()
        await checker.once()
        assert told == [(False, "the health service says NOT_SERVING")]
    finally:
        server.stop()
    assert "cannot be connected to" in (await ask() or "")


# The end of a sidecar


def test_streams_that_are_under_way_finish_while_a_sidecar_drains(calls: Calls, server: GrpcServer) -> None:
    callee = calls.callee(server)
    web = calls.mesh.sidecar("web", {"web": {}, "reviews": calls.at(callee)}, inbound=False)
    with call_channel(web.outbound, "reviews") as channel:
        queues: list[queue.Queue[bytes | None]] = [queue.Queue() for _ in range(10)]
        streams = [channel.stream_stream("/test.Echo/PingPong")(iter(each.get, None), timeout=30) for each in queues]
        for each, stream in zip(queues, streams, strict=True):
            each.put(b"a")
            assert next(stream) == b"pong a"
        stopped: list[int] = []
        thread = threading.Thread(target=lambda: stopped.append(callee.stop()))
        thread.start()
        time.sleep(1.0)
        for each, stream in zip(queues, streams, strict=True):
            each.put(b"b")
            assert next(stream) == b"pong b"
            each.put(None)
            assert list(stream) == [] and stream.code() is StatusCode.OK
        thread.join(30)
        assert stopped == [0]
