"""gRPC calls through the real data path on memory channels, frame by frame, in virtual time."""

from typing import Any

import pytest
import trio
import trio.testing
from support import http2_frames as h2
from support.http2_caller import Asked, Http2Caller
from support.memory_net import Net, memory_world

from sidecar.model.snapshot import (
    EndpointSpec,
    Fallback,
    Port,
    Protocol,
    Respond,
    Retry,
    Route,
    Service,
    Snapshot,
    Timeouts,
    Tls,
)
from sidecar.wire.grpc import frame, read_timeout_ms

GRPC = (b"content-type", b"application/grpc")
UNAVAILABLE = Retry(max_retries=1, grpc=frozenset({14}), base_s=0.0, max_s=0.0)
PORTS = (Port("http", 80, Protocol.GRPC),)
MESSAGE = frame(b"hello")
TRACE = b"00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"


def network(*, tls: Tls = Tls.MESH, endpoints: int = 1, **route: Any) -> Any:
    specs = tuple(EndpointSpec(f"10.0.0.{n + 1}", 1, tls=tls) for n in range(endpoints))
    shop = Service("shop", ports=PORTS, endpoints=specs, routes=(Route("default", **route),))
    web = Service("web", ports=PORTS, routes=(Route("default"),))
    return memory_world(Snapshot({"web": web, "shop": shop}))


class Server:
    """The other end of the one HTTP/2 connection to an endpoint."""

    def __init__(self, peer: Any) -> None:
        self.peer = peer
        self.parser = h2.Parser(preface=True)
        peer.send(h2.settings({h2.MAX_CONCURRENT_STREAMS: 100}) + h2.settings(ack=True))

    async def take(self) -> list[h2.Frame]:
        await trio.testing.wait_all_tasks_blocked()
        return [each for each in self.parser.feed(self.peer.read()) if each.sid]

    async def call(self) -> tuple[int, dict[bytes, bytes]]:
        """The next call: its stream, its fields."""
        found = [each for each in await self.take() if each.kind == h2.HEADERS]
        assert len(found) == 1, found
        return found[0].sid, dict(found[0].fields)

    def head(self, sid: int, *fields: tuple[bytes, bytes], end: bool = False) -> None:
        self.peer.send(h2.headers(sid, h2.response(200, [GRPC, *fields]), end=end))

    def message(self, sid: int, data: bytes = MESSAGE) -> None:
        self.peer.send(h2.data(sid, data))

    def trailers(self, sid: int, status: int, *fields: tuple[bytes, bytes]) -> None:
        self.peer.send(h2.headers(sid, [(b"grpc-status", b"%d" % status), *fields], end=True))


async def serve(net: Net) -> Server:
    server = Server(await net.accepted())
    await trio.testing.wait_all_tasks_blocked()
    return server


def call(caller: Http2Caller, *fields: tuple[bytes, bytes], host: str = "shop", end: bool = True) -> Asked:
    extra = [GRPC, (b"te", b"trailers"), *fields]
    return caller.ask("/shop.Cart/Add", host, "POST", extra, MESSAGE, end)


async def settled(caller: Http2Caller) -> None:
    for _ in range(3):
        await trio.testing.wait_all_tasks_blocked()
        caller.settle()


def status(asked: Asked) -> int:
    found = dict(asked.trailers).get(b"grpc-status", asked.headers.get(b"grpc-status", b"-1"))
    return int(found)


# Deadlines


@pytest.mark.parametrize(
    ("timeouts", "told", "passed_ms"),
    [
        (Timeouts(), None, None),
        (Timeouts(), b"3S", 3000),
        (Timeouts(total_s=2.0), None, 2000),
        (Timeouts(total_s=2.0), b"3S", 2000),
        (Timeouts(total_s=2.0), b"500m", 500),
        (Timeouts(total_s=2.0), b"nonsense", 2000),
    ],
)
@pytest.mark.parametrize("tls", [Tls.MESH, Tls.PLAIN])
async def test_the_deadline_that_is_passed_on(
    autojump_clock: Any, tls: Tls, timeouts: Timeouts, told: bytes | None, passed_ms: int | None
) -> None:
    async with network(tls=tls, timeouts=timeouts) as net:
        caller = Http2Caller(net)
        asked = call(caller, *[(b"grpc-timeout", told)] if told else [])
        server = await serve(net)
        sid, fields = await server.call()
        value = fields.get(b"grpc-timeout")
        assert (read_timeout_ms(value) if value is not None else None) == passed_ms
        assert b"x-request-deadline-ms" not in fields and fields[b"te"] == b"trailers"
        server.head(sid)
        server.message(sid)
        server.trailers(sid, 0)
        await settled(caller)
        assert asked.body == MESSAGE and status(asked) == 0 and asked.done


async def test_nothing_left_means_no_call(autojump_clock: Any) -> None:
    async with network() as net:
        caller = Http2Caller(net)
        asked = call(caller, (b"grpc-timeout", b"0n"))
        await settled(caller)
        assert (asked.status, status(asked), asked.reason) == (200, 4, b"timeout_total") and net.dials == 0
        assert net.records[-1][-1] == "DEADLINE_EXCEEDED"


async def test_a_deadline_behind_the_head_ends_the_response_with_trailers(autojump_clock: Any) -> None:
    async with network(timeouts=Timeouts(total_s=1.0)) as net:
        caller = Http2Caller(net)
        asked = call(caller, end=False)
        server = await serve(net)
        sid, _ = await server.call()
        server.head(sid)
        server.message(sid)
        await trio.sleep(0.9)
        await settled(caller)
        assert asked.body == MESSAGE and not asked.done
        await trio.sleep(0.2)
        await settled(caller)
        assert status(asked) == 4 and asked.done
        resets = [each for each in await server.take() if each.name == "RST_STREAM"]
        assert len(resets) == 1
        assert net.log == [(200, "timeout_total")]


async def test_what_a_call_makes_inherits_its_deadline_to_its_end(autojump_clock: Any) -> None:
    """That of other requests ends with the head of their response."""
    async with network() as net:
        peer = Http2Caller(net, "other")
        inbound = call(peer, (b"grpc-timeout", b"5S"), (b"traceparent", TRACE), host="web")
        app = await serve(net)
        sid, fields = await app.call()
        assert read_timeout_ms(fields[b"grpc-timeout"]) == 5000
        app.head(sid)
        app.message(sid)
        await settled(peer)
        assert inbound.body == MESSAGE
        outbound = Http2Caller(net)
        asked = call(outbound, (b"traceparent", TRACE))
        shop = await serve(net)
        below, fields = await shop.call()
        assert 4000 < (read_timeout_ms(fields[b"grpc-timeout"]) or 0) <= 5000
        shop.head(below, (b"grpc-status", b"0"), end=True)
        app.trailers(sid, 0)
        await settled(outbound)
        await settled(peer)
        assert asked.done and inbound.done
        late = call(outbound, (b"traceparent", TRACE))
        below, fields = await shop.call()
        assert b"grpc-timeout" not in fields
        shop.head(below, (b"grpc-status", b"0"), end=True)
        await settled(outbound)
        assert late.done


# Retries


async def retried(server: Server, sid: int) -> int:
    """The call that follows; its message is the same."""
    frames = await server.take()
    head = next(each for each in frames if each.kind == h2.HEADERS)
    assert head.sid != sid
    assert b"".join(each.data for each in frames if each.kind == h2.DATA) == MESSAGE
    return head.sid


@pytest.mark.parametrize("apart_s", [None, 0.0, 0.09])
async def test_a_named_status_is_retried(autojump_clock: Any, apart_s: float | None) -> None:
    async with network(retry=UNAVAILABLE) as net:
        caller = Http2Caller(net)
        asked = call(caller)
        server = await serve(net)
        sid, _ = await server.call()
        if apart_s is None:
            server.head(sid, (b"grpc-status", b"14"), end=True)
        else:
            server.head(sid)
            await trio.sleep(apart_s)
            await settled(caller)
            assert asked.status == 0
            server.trailers(sid, 14)
        sid = await retried(server, sid)
        server.head(sid, (b"grpc-status", b"14"), end=True)
        await settled(caller)
        assert status(asked) == 14 and asked.done
        assert net.records[-1][-1] == "UNAVAILABLE" and net.records[-1][11] == 2


async def test_a_head_is_held_no_longer_than_a_moment(autojump_clock: Any) -> None:
    async with network(retry=UNAVAILABLE) as net:
        caller = Http2Caller(net)
        asked = call(caller)
        server = await serve(net)
        sid, _ = await server.call()
        server.head(sid)
        await trio.sleep(0.11)
        await settled(caller)
        assert asked.status == 200 and not asked.done
        server.trailers(sid, 14)
        await settled(caller)
        assert status(asked) == 14 and asked.done


@pytest.mark.parametrize("retry", [Retry(), Retry(max_retries=0, grpc=frozenset({14}))])
async def test_a_head_that_could_not_be_retried_is_not_held(autojump_clock: Any, retry: Retry) -> None:
    async with network(retry=retry) as net:
        caller = Http2Caller(net)
        asked = call(caller)
        server = await serve(net)
        sid, _ = await server.call()
        server.head(sid)
        await settled(caller)
        assert asked.status == 200
        server.trailers(sid, 0)
        await settled(caller)
        assert asked.done


async def test_nor_is_one_while_the_request_goes_on_or_a_message(autojump_clock: Any) -> None:
    async with network(retry=UNAVAILABLE) as net:
        caller = Http2Caller(net)
        going, whole = call(caller, end=False), call(caller)
        server = await serve(net)
        first, second = [each.sid for each in await server.take() if each.kind == h2.HEADERS]
        server.head(first)
        server.head(second)
        server.message(second)
        await settled(caller)
        assert going.status == 200 and whole.body == MESSAGE
        going.send(end=True)
        for sid in (first, second):
            server.trailers(sid, 0)
        await settled(caller)
        assert going.done and whole.done


@pytest.mark.parametrize(("pushback", "again_after_s"), [(b"400", 0.39), (b"-1", None), (b"60000", None)])
async def test_push_back(autojump_clock: Any, pushback: bytes, again_after_s: float | None) -> None:
    async with network(retry=UNAVAILABLE) as net:
        caller = Http2Caller(net)
        asked = call(caller)
        server = await serve(net)
        sid, _ = await server.call()
        server.head(sid, (b"grpc-status", b"14"), (b"grpc-retry-pushback-ms", pushback), end=True)
        if again_after_s is not None:
            await trio.sleep(again_after_s)
            assert await server.take() == []
            await trio.sleep(0.3)
            sid = await retried(server, sid)
            server.head(sid, (b"grpc-status", b"0"), end=True)
        await settled(caller)
        assert asked.done and status(asked) == (14 if again_after_s is None else 0)


async def test_a_peers_own_answer_is_retried_by_its_reason(autojump_clock: Any) -> None:
    async with network(retry=Retry(max_retries=1, base_s=0.0, max_s=0.0)) as net:
        caller = Http2Caller(net)
        asked = call(caller)
        server = await serve(net)
        sid, _ = await server.call()
        server.head(sid, (b"grpc-status", b"14"), (b"x-pillion-reason", b"connect_failed"), end=True)
        sid = await retried(server, sid)
        server.head(sid, (b"grpc-status", b"7"), (b"x-pillion-reason", b"denied"), end=True)
        await settled(caller)
        assert (status(asked), asked.reason) == (7, b"denied") and net.log == [(200, "denied")]


# Own answers


async def test_a_fixed_fallback_is_a_status(autojump_clock: Any) -> None:
    fallback = Fallback(respond=Respond(503, "come back later"))
    async with network(endpoints=0, fallback=fallback) as net:
        caller = Http2Caller(net)
        asked = call(caller)
        await settled(caller)
        assert status(asked) == 14 and asked.headers[b"grpc-message"] == b"come back later"
        assert asked.status == 200 and asked.body == b"" and asked.done
        assert net.log == [(200, "no_healthy_endpoint")] and net.records[-1][-1] == "UNAVAILABLE"


async def test_a_call_that_its_caller_leaves_is_logged_as_cancelled(autojump_clock: Any) -> None:
    async with network() as net:
        caller = Http2Caller(net)
        asked = call(caller)
        server = await serve(net)
        await server.call()
        asked.reset()
        frames = await server.take()
        assert [each.name for each in frames] == ["RST_STREAM"]
        assert net.log == [(499, "caller_gone")] and net.records[-1][-1] == "CANCELLED"


async def test_a_response_that_breaks_off_is_reset(autojump_clock: Any) -> None:
    async with network() as net:
        caller = Http2Caller(net)
        asked = call(caller)
        server = await serve(net)
        sid, _ = await server.call()
        server.head(sid)
        server.message(sid)
        server.peer.send(h2.rst_stream(sid, 2))
        await settled(caller)
        assert asked.error is not None and asked.trailers == []
        assert net.records[-1][-1] == "UNAVAILABLE"
