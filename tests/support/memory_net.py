"""A network in memory under the real data path: World, Pool, Serving, Downstream and codecs run unchanged; only the
channels are fakes and addresses lead to scripted peers.

    async with memory_world(snapshot) as net:
        app = net.caller()                      # a connection of the application to its sidecar
        app.send(b"GET / HTTP/1.1\\r\\nhost: shop\\r\\n\\r\\n")
        server = await net.accepted()           # what the pool dialled
        assert server.read() == b"GET / …"
        server.send(b"HTTP/1.1 200 OK\\r\\ncontent-length: 0\\r\\n\\r\\n")

Time is Trio's (use `autojump_clock`), chance is seeded. A MemoryChannel keeps the promises of the real Channel that its
owners rely on; `unit/proxy/test_serving_memory_channel.py` holds both to the same tests.
Invariants: bytes are delivered in order and whole; nothing is delivered into a paused channel; a peer that has closed
says nothing more.
"""

import hashlib
import math
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from sidecar.model.snapshot import Snapshot
from sidecar.policy.endpoint import Endpoint
from sidecar.policy.plan import PlanError, Surroundings, compile_plans
from sidecar.proxy import downstream as downstream_module
from sidecar.proxy import http2_down as http2_down_module
from sidecar.proxy import http2_up as http2_up_module
from sidecar.proxy import upstream as upstream_module
from sidecar.proxy.channel import HIGH_BYTES, LOW_BYTES, NOBODY
from sidecar.proxy.connect import DialError
from sidecar.proxy.downstream import Downstream
from sidecar.proxy.entries import Inbound, Outbound
from sidecar.proxy.world import World
from sidecar.telemetry.access_log import AccessLog
from sidecar.telemetry.metrics import Registry

from .balancers import balancer_of

TRUST_DOMAIN = "mesh.local"
END, RESET = "end", "reset"


def fingerprint_of(identity: str) -> str:
    """In this network each identity has one certificate."""
    return hashlib.sha256(identity.encode()).hexdigest() if identity else ""


class Peer:
    """The test's end of one connection. `window`: how many more bytes it takes from the sidecar now. `ended` says how
    the sidecar closed: "close", "reset", or None while it has not."""

    def __init__(self, net: "Net", endpoint: Endpoint | None = None, window: float = math.inf) -> None:
        self.net, self.endpoint = net, endpoint
        self.window = window
        self.channel: MemoryChannel | None = None
        self.got = bytearray()
        self.early: deque[Any] = deque()  # sent before there was a channel
        self.ended: str | None = None
        self.over = False  # this side has closed
        self.alpn = ""  # what the sidecar has offered
        self.arrived = trio.Event()

    def send(self, data: bytes) -> None:
        """To the sidecar, as one read."""
        self._tell(data)

    def close(self) -> None:
        """A clean end: nothing more is read either."""
        self._tell(END)

    def reset(self) -> None:
        self._tell(RESET)

    def accept(self, count: float = math.inf) -> None:
        """Take `count` more bytes from the sidecar."""
        self.window += count
        if self.channel is not None:
            self.net.call(self.channel.writable)

    def read(self) -> bytes:
        """What has arrived since the last call."""
        data = bytes(self.got)
        self.got.clear()
        return data

    async def until(self, mark: bytes = b"\r\n\r\n") -> bytes:
        """Wait until `mark` or an end has arrived; gives everything up to now."""
        while mark not in self.got and self.ended is None:
            self.arrived = trio.Event()
            await self.arrived.wait()
        return self.read()

    async def some(self) -> bytes:
        """Wait until something has arrived, or an end: then nothing."""
        while not self.got and self.ended is None:
            self.arrived = trio.Event()
            await self.arrived.wait()
        return self.read()

    def _tell(self, what: Any) -> None:
        if self.over:
            return
        if what is END or what is RESET:
            self.over = True
        if self.channel is None:
            self.early.append(what)
        else:
            self.net.call(self.channel.arrive, what)

    # -- from the channel

    def take(self, data: bytes) -> int:
        """As much as the window allows."""
        count = int(min(len(data), self.window))
        self.window -= count
        if not self.over:
            self.got += data[:count]
        if count:
            self.arrived.set()
        return count

    def gone(self, how: str) -> None:
        self.ended = how
        self.arrived.set()


class MemoryChannel:
    """Like `proxy.channel.Channel`, as far as HTTP uses it."""

    def __init__(
        self, reactor: Any, sock: Peer, owner: Any, watch_hangup: bool, *, peer: str = "", fingerprint: str = ""
    ) -> None:
        self.reactor, self.sock, self.owner, self.watch_hangup = reactor, sock, owner, watch_hangup
        self.peer, self.fingerprint = peer, fingerprint
        self.tls = False
        self.open = self.reading = True
        self.inbox: deque[Any] = deque()
        self.out = bytearray()
        self.broken = False  # the peer has reset: what is written is lost
        self.lingering = self.closing = self.ending = False
        self.half_close = self.eof = self.notify_empty = False
        sock.channel = self
        sock.net.channels.add(self)
        for what in sock.early:
            self.inbox.append(what)
        if self.inbox:
            reactor.soon.append(self._deliver)

    @property
    def out_bytes(self) -> int:
        return len(self.out)

    # -- from the peer

    def arrive(self, what: Any) -> None:
        if not self.open:
            return
        if what is RESET:
            self.broken = True
            self.out.clear()
        self.inbox.append(what)
        if self.reading:
            self._deliver()
        elif what is RESET or (what is END and not self.half_close):
            if not self.watch_hangup:
                return
            self._lost(ConnectionResetError("the peer has gone away"))

    def writable(self) -> None:
        if not self.open:
            return
        before = len(self.out)
        del self.out[: self.sock.take(bytes(self.out))]
        if not self.out and self.ending:
            self.end()
        if not self.out and self.closing:
            self._dismiss("close")
        elif before > LOW_BYTES >= len(self.out) or (self.notify_empty and before and not self.out):
            self.owner.drained()

    # -- for the owner

    def write(self, data: bytes) -> bool:
        assert self.open or self.owner is NOBODY
        if not self.open or self.broken:
            return True
        if not self.out:
            data = data[self.sock.take(bytes(data)) :]
        self.out += data
        return len(self.out) < HIGH_BYTES

    def pause(self) -> None:
        self.reading = False

    def resume(self) -> None:
        if not self.reading and self.open and not self.eof:
            self.reading = True
            if self.inbox:
                self.reactor.soon.append(self._deliver)

    def end(self) -> None:
        """Half-close: the peer hears of it once it has everything."""
        self.ending = True
        if self.open and not self.out:
            self.sock.ended = "end"
            self.sock.arrived.set()

    def unread(self) -> bool:
        return not self.open or self.broken or bool(self.inbox)

    def ready(self, events: int) -> None:
        self._deliver()

    def close(self) -> None:
        if self.open:
            self._dismiss("reset" if self.out else "close")

    def abort(self) -> None:
        if self.open:
            self._dismiss("reset")

    cut = abort

    def linger_close(self, timeout_s: float = 1.0) -> None:
        """Flush, then close; the peer's further bytes are discarded."""
        if not self.open or self.lingering:
            return
        self.lingering = True
        self.inbox.clear()
        if self.out:
            self.closing = True
        else:
            self.reactor.soon.append(self._linger_over)

    def crashed(self, exc: Exception) -> None:
        if self.open:
            owner = self.owner
            self.abort()
            owner.lost(exc)

    # -- inside

    def _deliver(self) -> None:
        while self.open and self.reading and self.inbox:
            what = self.inbox.popleft()
            if self.lingering:
                if what in (END, RESET):
                    self._linger_over()
            elif what is RESET:
                self._lost(ConnectionResetError("reset"))
            elif what is END and self.half_close:
                self.eof, self.reading = True, False
                self.owner.ended()
            elif what is END:
                self._lost(None)
            else:
                self.owner.received(what)

    def _linger_over(self) -> None:
        if self.open:
            owner = self.owner
            self._dismiss("close")
            owner.lost(None)

    def _lost(self, exc: Exception | None) -> None:
        owner = self.owner
        self._dismiss("close" if exc is None else "reset")
        owner.lost(exc)

    def _dismiss(self, how: str) -> None:
        self.open = self.reading = False
        self.out.clear()
        self.inbox.clear()
        self.owner = NOBODY
        self.sock.net.channels.discard(self)
        self.sock.gone(how)


class MemoryWorld(World):
    """A World whose connections go to a Net."""

    net: "Net"

    async def dial(self, endpoint: Endpoint, alpn: str, timeout_s: float) -> Any:
        return await self.net.dial(endpoint, alpn)


Answer = Callable[[Endpoint], Any]


class Net:
    """One sidecar and everything around it. `on_dial` decides each dial: None accepts, a float is the delay before, an
    Exception refuses; or it is a coroutine function."""

    def __init__(self, nursery: trio.Nursery, own: str, seed: int) -> None:
        identity: Any = SimpleNamespace(
            current=SimpleNamespace(trust_domain=TRUST_DOMAIN, spiffe_id=f"spiffe://{TRUST_DOMAIN}/service/{own}")
        )
        self.own = own
        self.notes: list[tuple[str, str]] = []
        self.crashes: list[Exception] = []
        self.chance = random.Random(seed)
        self.world = MemoryWorld(
            nursery,
            Registry(trio.current_time),
            identity,
            AccessLog(None, lambda: 0.0),
            lambda kind, text: self.notes.append((kind, text)),
            clock=trio.current_time,
            epoch=lambda: 1_000_000.0 + trio.current_time(),
            rnd=self.chance,
        )
        self.world.net = self
        self.world.pool.multiplex_from = math.inf  # as if all peers were of HTTP/1.1; a test may lower it
        self.world.reactor.on_crash = self.crashes.append
        self.world.access = SimpleNamespace(enabled=True, http=self._log)  # type: ignore[assignment]
        self.log: list[tuple[int, str]] = []  # (status, reason) of each request, in order
        self.records: list[tuple[Any, ...]] = []
        self.channels: set[MemoryChannel] = set()
        self.explicit = Outbound(self.world)
        self.dials = 0
        self.on_dial: Callable[[Endpoint], Any] = lambda endpoint: None
        self._send, self._receive = trio.open_memory_channel[Peer](math.inf)
        self.chains: Mapping[tuple[str, str], Callable[[Net], Any]] = {}
        self.zone = ""  # where this sidecar is

    def call(self, fn: Callable[..., object], *args: Any) -> None:
        """Into the reactor, as any task does."""
        self.world.reactor.call(fn, *args)
        if self.crashes:
            raise self.crashes[0]

    def _log(self, record: tuple[Any, ...]) -> None:
        self.records.append(record)
        self.log.append((record[9], record[10]))

    # -- policy

    def apply(self, snapshot: Snapshot) -> None:
        """Serve by this snapshot, as the composition root does."""
        world = self.world

        def chain(side: str, service: Any, route: Any) -> Any:
            make = self.chains.get((side, service.name))
            return make(self) if make is not None else None

        around = Surroundings(
            own=self.own,
            trust_domain=TRUST_DOMAIN,
            apps={"": ("127.0.0.1", 8000)},
            sticky_key=b"k" * 32,
            chain=chain,
            balancer=balancer_of,
            zone=self.zone,
            stats=lambda side, service, route, version: world.registry.requests(
                side=side, service=service, route=route, version=version
            ),
        )
        plans, stale = compile_plans(snapshot, around, world.state, world.clock())
        self.call(world.swap, plans, stale)

    def cluster(self, service: str, side: str = "out", port: str = "http") -> Any:
        return self.world.state.clusters[side, service, port]

    # -- connections

    async def dial(self, endpoint: Endpoint, alpn: str) -> Any:
        self.dials += 1
        answer = self.on_dial(endpoint)
        if hasattr(answer, "__await__"):
            answer = await answer
        if isinstance(answer, (int, float)):
            await trio.sleep(answer)
            answer = None
        if isinstance(answer, Exception):
            raise answer
        peer = Peer(self, endpoint)
        peer.alpn = alpn
        if isinstance(answer, Mapping):
            peer.window = answer["window"]
        self._send.send_nowait(peer)
        identity = endpoint.identity or ""
        return SimpleNamespace(sock=peer, peer=identity, alpn=alpn, fingerprint=fingerprint_of(identity))

    async def accepted(self) -> Peer:
        """The next connection that the pool has made."""
        with trio.fail_after(3600):
            return await self._receive.receive()

    def pending(self) -> int:
        """How many connections the pool has made that the test has not yet looked at."""
        return self._receive.statistics().current_buffer_used

    def caller(self, window: float = math.inf) -> Peer:
        """A connection of the application."""
        return self._connected(self.explicit, "", window)

    def mesh_caller(self, service: str = "web", port: str = "http", window: float = math.inf) -> Peer:
        """A connection of a peer of the mesh to the inbound side."""
        identity = f"spiffe://{TRUST_DOMAIN}/service/{service}" if service else ""
        return self._connected(Inbound(self.world, port, identity, fingerprint_of(identity)), identity, window)

    def _connected(self, entry: Any, identity: str, window: float) -> Peer:
        peer = Peer(self, window=window)
        self.call(Downstream(self.world, entry, identity, "10.1.1.1").begin, peer)
        return peer

    # -- when everything is over

    def leftovers(self) -> list[str]:
        """What should not be there once nothing is under way."""
        world = self.world
        found = []
        for (side, service, port), cluster in world.state.clusters.items():
            name = f"{side} {service} {port}"
            ups = sum(
                1
                for channel in self.channels
                if isinstance(channel.owner, upstream_module.Upstream | http2_up_module.Http2Upstream)
                and channel.owner.cluster is cluster
            )
            if cluster.active:
                found.append(f"{name}: {cluster.active} active")
            if cluster.connections != ups:
                found.append(f"{name}: counts {cluster.connections} connections, {ups} are open")
            if cluster.waiters:
                found.append(f"{name}: {len(cluster.waiters)} wait")
            for endpoint in cluster.endpoints.values():
                if endpoint.active:
                    found.append(f"{name} {endpoint.key}: {endpoint.active} active")
                if endpoint.dials is not None:
                    found.append(f"{name} {endpoint.key}: dials are left")
                if len(endpoint.idle) > ups or any(not up.ch.open or up.serving for up in endpoint.idle):
                    found.append(f"{name} {endpoint.key}: idle connections that are not")
        if world.replay.bytes_held:
            found.append(f"{world.replay.bytes_held} bytes of replay")
        if len(world.memory):
            found.append(f"{len(world.memory)} remembered")
        if world.heads.bytes_held:
            found.append(f"{world.heads.bytes_held} bytes of heads")
        return found

    def timers(self) -> int:
        """Timers that are still to fire."""
        return sum(1 for at, _, timer in self.world.timers.heap if at == timer.listed and timer.due != math.inf)


@asynccontextmanager
async def memory_world(
    snapshot: Snapshot,
    *,
    own: str = "web",
    seed: int = 0,
    chains: Mapping[tuple[str, str], Callable[[Net], Any]] | None = None,
    at_rest: bool = True,
    http2_engine: str = "auto",
    zone: str = "",
) -> AsyncIterator[Net]:
    """A Net under a policy. At the end nothing may have crashed, and with `at_rest` nothing may be left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream_module, "Channel", MemoryChannel)
        patch.setattr(http2_up_module, "Channel", MemoryChannel)
        patch.setattr(downstream_module, "Channel", MemoryChannel)
        patch.setattr(http2_down_module, "Channel", MemoryChannel)
        async with trio.open_nursery() as nursery:
            net = Net(nursery, own, seed)
            net.chains, net.zone = chains or {}, zone
            net.world.http2_engine = http2_engine
            try:
                net.apply(snapshot)
                nursery.start_soon(net.world.reactor.run)
                yield net
                await trio.testing.wait_all_tasks_blocked()
                assert not net.crashes, net.crashes
                if at_rest:
                    assert net.leftovers() == []
            finally:
                nursery.cancel_scope.cancel()
                net.world.reactor.close()


__all__ = ["DialError", "MemoryChannel", "Net", "Peer", "PlanError", "memory_world"]
