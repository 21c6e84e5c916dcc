"""Hedges over HTTP/2: gRPC calls, whose heads say little, through the real data path on memory channels."""

from typing import Any

import trio
import trio.testing
from support import http2_frames as h2
from support.http2_caller import Asked, Http2Caller
from support.memory_net import Net, memory_world

from sidecar.model.snapshot import EndpointSpec, Port, Protocol, Retry, Route, Service, Snapshot
from sidecar.wire.grpc import frame

GRPC = (b"content-type", b"application/grpc")
PORTS = (Port("http", 80, Protocol.GRPC),)
MESSAGE = frame(b"hello")
ANY = Retry(max_retries=0, methods=frozenset({"any"}))
CANCEL, UNAVAILABLE, NOT_FOUND = 8, 14, 5


def network(retry: Retry = ANY, endpoints: int = 2) -> Any:
    specs = tuple(EndpointSpec(f"10.0.0.{n + 1}", 1) for n in range(endpoints))
    shop = Service("shop", ports=PORTS, endpoints=specs, routes=(Route("default", retry=retry, hedge_after_s=0.05),))
    web = Service("web", ports=PORTS, routes=(Route("default"),))
    return memory_world(Snapshot({"web": web, "shop": shop}))


class Server:
    """One stream of one server."""

    def __init__(self, peer: Any) -> None:
        self.peer = peer
        self.parser = h2.Parser(preface=True)
        peer.send(h2.settings({h2.MAX_CONCURRENT_STREAMS: 100}) + h2.settings(ack=True))
        self.sid = 0
        self.fields: dict[bytes, bytes] = {}

    def frames(self) -> list[h2.Frame]:
        return [each for each in self.parser.feed(self.peer.read()) if each.sid]

    async def call(self) -> bytes:
        """Its message."""
        await trio.testing.wait_all_tasks_blocked()
        frames = self.frames()
        head = next(each for each in frames if each.kind == h2.HEADERS)
        self.sid, self.fields = head.sid, dict(head.fields)
        return b"".join(each.data for each in frames if each.kind == h2.DATA)

    async def cancelled(self) -> bool:
        await trio.testing.wait_all_tasks_blocked()
        return any(each.kind == h2.RST_STREAM and each.code == CANCEL for each in self.frames())

    def head(self, *fields: tuple[bytes, bytes], end: bool = False) -> None:
        self.peer.send(h2.headers(self.sid, h2.response(200, [GRPC, *fields]), end=end))

    def message(self) -> None:
        self.peer.send(h2.data(self.sid, MESSAGE))

    def status(self, status: int) -> None:
        self.peer.send(h2.headers(self.sid, [(b"grpc-status", b"%d" % status)], end=True))


async def raced(net: Net) -> tuple[Http2Caller, Asked, Server, Server]:
    caller = Http2Caller(net)
    asked = caller.ask("/shop.Cart/Get", "shop", "POST", [GRPC, (b"te", b"trailers")], MESSAGE, True)
    first = Server(await net.accepted())
    assert await first.call() == MESSAGE
    hedge = Server(await net.accepted())
    assert await hedge.call() == MESSAGE
    assert (first.fields[b"x-pillion-attempt"], hedge.fields[b"x-pillion-attempt"]) == (b"0", b"1")
    return caller, asked, first, hedge


async def settled(caller: Http2Caller) -> None:
    for _ in range(3):
        await trio.testing.wait_all_tasks_blocked()
        caller.settle()


def result(net: Net, which: str) -> float:
    return net.world.service_meters("out", "shop").hedges.get(which)


async def test_a_call_is_won_by_the_first_message_and_the_other_stream_reset(autojump_clock):
    async with network() as net:
        caller, asked, first, hedge = await raced(net)
        first.head()  # says nothing
        hedge.head()
        await settled(caller)
        assert not asked.headers and not await first.cancelled()
        hedge.message()
        assert await first.cancelled()
        hedge.message()
        hedge.status(0)
        await settled(caller)
        assert dict(asked.trailers)[b"grpc-status"] == b"0" and bytes(asked.body) == MESSAGE * 2
        assert result(net, "won") == 1
        assert all(not e.active for e in net.cluster("shop").endpoints.values()) and not net.cluster("shop").active
        assert first.peer.ended is None  # the connection serves on


async def test_the_first_attempts_message_cancels_the_hedge(autojump_clock):
    async with network() as net:
        caller, asked, first, hedge = await raced(net)
        first.head()
        first.message()
        assert await hedge.cancelled()
        first.status(0)
        await settled(caller)
        assert dict(asked.trailers)[b"grpc-status"] == b"0" and result(net, "lost") == 1


async def test_an_early_head_is_passed_on_when_the_hedge_has_failed(autojump_clock):
    async with network() as net:
        caller, asked, first, hedge = await raced(net)
        first.head((b"x-early", b"1"))
        hedge.head((b"grpc-status", b"%d" % UNAVAILABLE), end=True)
        await settled(caller)
        assert asked.headers[b"x-early"] == b"1" and result(net, "failed") == 1
        first.message()
        first.status(0)
        await settled(caller)
        assert dict(asked.trailers)[b"grpc-status"] == b"0"


async def test_where_the_first_fails_in_its_trailers_the_hedges_early_head_counts(autojump_clock):
    async with network() as net:
        caller, asked, first, hedge = await raced(net)
        hedge.head((b"x-early", b"1"))
        first.head()
        first.status(UNAVAILABLE)
        await settled(caller)
        assert asked.headers[b"x-early"] == b"1" and result(net, "promoted") == 1
        hedge.message()
        hedge.status(0)
        await settled(caller)
        assert dict(asked.trailers)[b"grpc-status"] == b"0" and bytes(asked.body) == MESSAGE


async def test_a_status_of_the_application_is_an_answer(autojump_clock):
    async with network() as net:
        caller, asked, first, hedge = await raced(net)
        hedge.head((b"grpc-status", b"%d" % NOT_FOUND), end=True)
        assert await first.cancelled()
        await settled(caller)
        assert asked.headers[b"grpc-status"] == b"5" and result(net, "won") == 1


async def test_a_call_is_not_hedged_unless_its_method_may_be_repeated_or_while_it_is_sent(autojump_clock):
    for retry, end in ((Retry(grpc=frozenset({UNAVAILABLE})), True), (ANY, False)):
        async with network(retry) as net:
            caller = Http2Caller(net)
            caller.ask("/shop.Cart/Get", "shop", "POST", [GRPC, (b"te", b"trailers")], MESSAGE, end)
            first = Server(await net.accepted())
            await first.call()
            await trio.sleep(1.0)
            assert net.cluster("shop").attempts == 1
            first.head()
            first.message()
            first.status(0)
            await settled(caller)
