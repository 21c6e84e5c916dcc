"""What is over is freed at once, by its counts: a flood must not pile up work for the collector, which runs seldom."""

import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trio.testing
from support.http2_caller import Http2Caller
from support.memory_net import Net, Peer, memory_world

from sidecar.model.snapshot import EndpointSpec, Route, Service, Snapshot
from sidecar.wire.http2 import Http2Error

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
OURS = {"DownStream", "Http2Downstream", "Serving", "Exchange", "RequestReceived", "StreamClosed", "frame"}
POLICY = Snapshot(
    {
        "web": Service("web", routes=(Route("default"),)),
        "shop": Service("shop", endpoints=(EndpointSpec("10.0.0.1", 15006),), routes=(Route("default"),)),
    }
)


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def census() -> Counter[str]:
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each).__name__ in OURS)


class Run:
    """One connection's life after the other; the application's connection stays."""

    def __init__(self, net: Net, how: str) -> None:
        self.net, self.how = net, how
        self.server: Peer | None = None

    async def once(self) -> None:
        caller = Http2Caller(self.net)
        try:
            await getattr(self, self.how)(caller)
        except Http2Error:
            pass  # the caller's codec knows of the GOAWAY
        caller.peer.reset()
        await trio.sleep(30)

    async def settle(self, caller: Http2Caller) -> None:
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked()
            caller.settle()

    async def served(self, caller: Http2Caller) -> None:
        asked = caller.ask()
        self.server = self.server or await self.net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        self.server.send(OK)
        await self.settle(caller)
        assert asked.done

    async def refused(self, caller: Http2Caller) -> None:
        asked = caller.ask("/a" * 5000)
        await self.settle(caller)
        assert asked.status == 414

    async def malformed(self, caller: Http2Caller) -> None:
        asked = caller.ask(extra=[(b"x", b"a\nb")])
        await self.settle(caller)
        assert asked.error == 1

    async def cancelled(self, caller: Http2Caller) -> None:
        caller.ask().reset()
        await self.settle(caller)

    async def lost(self, caller: Http2Caller) -> None:
        caller.ask()

    async def flooded(self, caller: Http2Caller) -> None:
        for _ in range(200):
            caller.ask().reset()
            await self.settle(caller)
        raise AssertionError("it was never ended")

    async def broken(self, caller: Http2Caller) -> None:
        caller.ask()
        caller.peer.send(b"\0\0\x09\x06\0\0\0\0\0" + bytes(9))  # a PING of nine bytes
        await self.settle(caller)


@pytest.mark.parametrize("engine", ["ngh2", "h2"])
@pytest.mark.parametrize("how", ["served", "refused", "malformed", "cancelled", "lost", "flooded", "broken"])
async def test_nothing_is_left_to_the_collector(autojump_clock: Any, uncollected: None, engine: str, how: str) -> None:
    async with memory_world(POLICY, http2_engine=engine) as net:
        run = Run(net, how)
        await run.once()
        gc.collect()
        before = census()
        for _ in range(3):
            await run.once()
        assert not census() - before
