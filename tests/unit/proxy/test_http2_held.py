"""What HTTP/2 streams hold for callers that do not read counts towards what is held for all; once that is much, streams
from upstream get a small window, and later their usual one again. Virtual time."""

from typing import Any

import pytest
import trio
import trio.testing
from support import http2_frames as h2
from support.http2_caller import Http2Caller
from support.memory_net import Net, memory_world

from sidecar.model.snapshot import EndpointSpec, Port, Protocol, Route, Service, Snapshot, Timeouts, Tls
from sidecar.proxy.channel import HELD_BYTES, TIGHT_BYTES
from sidecar.proxy.http2_down_stream import STREAM_HIGH_BYTES
from sidecar.proxy.http2_up import NARROW_BYTES, NARROW_S

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 10000000\r\n\r\n"


def network(protocol: Protocol, engine: str, at_rest: bool = True) -> Any:
    shop = Service(
        "shop",
        ports=(Port("http", 80, protocol),),
        endpoints=(EndpointSpec("10.0.0.1", 1, tls=Tls.PLAIN),),
        routes=(Route("default", timeouts=Timeouts(total_s=60.0)),),
    )
    policy = Snapshot({"web": Service("web", routes=(Route("default"),)), "shop": shop})
    return memory_world(policy, http2_engine=engine, at_rest=at_rest)


async def quiet() -> None:
    await trio.testing.wait_all_tasks_blocked()


class Server:
    def __init__(self, net: Net) -> None:
        self.net = net
        self.parser = h2.Parser(preface=True)
        self.told: list[int] = []  # windows, since the greeting

    async def begin(self) -> None:
        self.peer = await self.net.accepted()
        self.peer.send(h2.settings({h2.MAX_CONCURRENT_STREAMS: 100}) + h2.settings(ack=True))
        await quiet()
        self.parser.feed(self.peer.read())

    async def take(self) -> list[h2.Frame]:
        """What has come since the last time."""
        await quiet()
        frames = self.parser.feed(self.peer.read())
        for frame in frames:
            if frame.kind == h2.SETTINGS and not frame.ack:
                self.told.append(frame.settings[h2.INITIAL_WINDOW_SIZE])
                self.peer.send(h2.settings(ack=True))
        return frames


@pytest.mark.parametrize("engine", ["ngh2", "h2"])
async def test_what_waits_in_a_stream_that_is_paused_counts(autojump_clock: Any, engine: str) -> None:
    async with network(Protocol.HTTP2, engine) as net:
        reactor = net.world.reactor
        slow = net.caller(window=0)
        slow.send(b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n")
        server = Server(net)
        await server.begin()
        server.peer.send(h2.headers(1, h2.response(200)))
        window = 65536
        while not reactor.held_bytes:
            assert window > 1000
            server.peer.send(h2.data(1, bytes(1000)))
            window -= 1000
            for frame in await server.take():
                window += frame.increment if frame.kind == h2.WINDOW_UPDATE and frame.sid else 0
        assert reactor.held_bytes <= 2000 and not server.told
        reactor.held_bytes += (others := TIGHT_BYTES)
        server.peer.send(h2.data(1, bytes(1000)))
        await server.take()
        assert others < reactor.held_bytes <= others + 3000
        assert server.told == [NARROW_BYTES]
        reactor.held_bytes -= others
        await trio.sleep(NARROW_S * 2)
        slow.accept()
        await quiet()
        server.peer.send(h2.data(1, b"", end=True))
        await server.take()
        assert server.told == [NARROW_BYTES, 65536]
        assert reactor.held_bytes == 0
        slow.send(b"GET /again HTTP/1.1\r\nhost: shop\r\n\r\n")
        await quiet()
        server.peer.send(h2.headers(3, h2.response(204), True))
        await quiet()
        assert b" 204 " in slow.read()


@pytest.mark.parametrize("engine", ["ngh2", "h2"])
@pytest.mark.parametrize("end", ["reset", "lost", "read"])
async def test_what_waits_for_a_window_counts(autojump_clock: Any, engine: str, end: str) -> None:
    async with network(Protocol.HTTP, engine, at_rest=False) as net:
        reactor = net.world.reactor
        caller = Http2Caller(net)
        caller.reads = False
        asked = caller.ask()
        server = await net.accepted()
        await quiet()
        server.send(HEAD)
        for _ in range(200):
            server.send(bytes(1000))
            await quiet()
            caller.settle()
        assert STREAM_HIGH_BYTES <= reactor.held_bytes < STREAM_HIGH_BYTES + 2000
        if end == "reset":
            asked.reset()
        elif end == "lost":
            caller.peer.reset()
        else:
            caller.reads = True
            caller.settle()
            for _ in range(20):
                await quiet()
                caller.settle()
        await quiet()
        assert reactor.held_bytes == 0


@pytest.mark.parametrize("engine", ["ngh2", "h2"])
async def test_the_more_is_held_for_others_the_less_for_a_stream(autojump_clock: Any, engine: str) -> None:
    async with network(Protocol.HTTP, engine, at_rest=False) as net:
        reactor = net.world.reactor
        caller = Http2Caller(net)
        caller.reads = False
        caller.ask()
        server = await net.accepted()
        await quiet()
        server.send(HEAD)
        for _ in range(65):
            server.send(bytes(1000))  # as much as its window takes
            await quiet()
        reactor.held_bytes += HELD_BYTES
        for _ in range(65):
            server.send(bytes(1000))
            await quiet()
        assert reactor.held_bytes - HELD_BYTES < 6000
        reactor.held_bytes -= HELD_BYTES
