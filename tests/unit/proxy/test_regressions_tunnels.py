"""Tunnels that once outlived their permission, were cut by a drain, or took the process with them. Virtual time."""

from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from support.memory_net import DialError, MemoryChannel, Net, Peer, memory_world

from sidecar.model.snapshot import AuthzLevel, EndpointSpec, Level, Mtls, Port, Protocol, Route, Rule, Service, Snapshot
from sidecar.proxy import tcp
from sidecar.proxy.accept import Accepted
from sidecar.proxy.drain import drain

UPGRADE = b"GET /chat?room=1 HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"


class Socket(Peer):
    """What was accepted and not yet joined: nobody but its task closes it."""

    def close(self) -> None:
        self.gone("close")


class Doors:
    serves_application = False

    def __init__(self) -> None:
        self.closed: list[str] = []

    def close_inbound(self) -> None:
        self.closed.append("inbound")

    def close(self) -> None:
        self.closed.append("all")


@pytest.fixture(autouse=True)
def _memory_tunnels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "Channel", MemoryChannel)


async def quiet() -> None:
    await trio.testing.wait_all_tasks_blocked()


def web(*callers: str, mtls: Mtls = Mtls.STRICT) -> Snapshot:
    """A service that these callers may upgrade at and open TCP connections to; without callers the default decides."""
    authz = (AuthzLevel(Level.SERVICE, allow=(Rule("allow[0]", callers=callers),)),) if callers else ()
    route = Route("default", upgrade=frozenset({"websocket"}), authz=authz)
    ports = (Port("http", 80), Port("db", 5432, Protocol.TCP))
    db = Service("db", ports=(Port("db", 5432, Protocol.TCP),), endpoints=(EndpointSpec("10.0.0.1", 5432),))
    own = Service("web", ports=ports, routes=(route,), authz=authz, mtls=mtls)
    return Snapshot({"web": own, "db": db, **{name: Service(name) for name in ("shop", "other")}})


async def websocket(net: Net, caller: str = "shop") -> tuple[Peer, Peer]:
    """(caller, application), joined."""
    peer = net.mesh_caller(caller)
    peer.send(UPGRADE)
    server = await net.accepted()
    await quiet()
    assert b"upgrade: websocket" in server.read()
    server.send(SWITCHED)
    await quiet()
    assert peer.read().startswith(b"HTTP/1.1 101 ")
    assert carries(peer, server)
    return peer, server


def carries(a: Peer, b: Peer) -> bool:
    a.send(b"ping")
    b.send(b"pong")
    return b.read() == b"ping" and a.read() == b"pong"


def observed(net: Net) -> list[tuple[Any, ...]]:
    """Where the records of TCP connections will stand."""
    records: list[tuple[Any, ...]] = []
    net.world.access = SimpleNamespace(enabled=True, http=net._log, tcp=records.append)  # type: ignore[assignment]
    return records


async def tunnel(net: Net) -> tuple[Socket, Peer]:
    """A TCP connection of a plain peer to the application: (caller, application)."""
    near = Socket(net)
    plan = net.world.plans.inbound["db"].tcp
    assert plan is not None
    net.world.nursery.start_soon(tcp.serve_inbound, net.world, Accepted(near, ("10.1.1.1", 1)), plan)
    far = await net.accepted()
    await quiet()
    assert carries(near, far)
    return near, far


# Authorization that is taken away


async def test_an_upgraded_connection_ends_with_its_permission(autojump_clock: Any) -> None:
    async with memory_world(web("shop")) as net:
        peer, server = await websocket(net)
        net.apply(web("shop", "other"))
        assert carries(peer, server)
        net.apply(web("other"))
        await quiet()
        assert peer.ended is not None and server.ended is not None
        assert not net.world.tunnels and net.log == [(101, "tunnel_closed")]


async def test_a_plain_upgraded_connection_ends_when_mtls_becomes_strict(autojump_clock: Any) -> None:
    async with memory_world(web(mtls=Mtls.PERMISSIVE)) as net:
        plain, behind_plain = await websocket(net, "")
        peer, behind_peer = await websocket(net)
        net.apply(web(mtls=Mtls.STRICT))
        await quiet()
        assert plain.ended is not None and behind_plain.ended is not None
        assert carries(peer, behind_peer)
        peer.reset()


async def test_a_plain_tcp_connection_ends_when_mtls_becomes_strict(autojump_clock: Any) -> None:
    async with memory_world(web(mtls=Mtls.PERMISSIVE)) as net:
        records = observed(net)
        near, far = await tunnel(net)
        net.apply(web(mtls=Mtls.PERMISSIVE))
        assert carries(near, far)
        net.apply(web(mtls=Mtls.STRICT))
        await quiet()
        assert near.ended is not None and far.ended is not None
        assert [record[5] for record in records] == ["closed"]


# Draining


@pytest.mark.parametrize("kind", ["websocket", "tcp"])
async def test_a_drain_waits_for_a_tunnel_that_ends_in_time(autojump_clock: Any, kind: str) -> None:
    async with memory_world(web(mtls=Mtls.PERMISSIVE)) as net:
        observed(net)
        near, far = await (websocket(net) if kind == "websocket" else tunnel(net))
        began, doors = trio.current_time(), Doors()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain, net.world, doors, 20.0)
            for _ in range(10):
                await trio.sleep(1)
                assert carries(near, far) and doors.closed == ["inbound"]
            near.reset()
        assert 10 <= trio.current_time() - began < 11
        assert doors.closed == ["inbound", "all"]


async def test_a_drain_waits_for_no_tunnel_longer_than_its_grace(autojump_clock: Any) -> None:
    async with memory_world(web(mtls=Mtls.PERMISSIVE)) as net:
        observed(net)
        near, _ = await tunnel(net)
        began, doors = trio.current_time(), Doors()
        await drain(net.world, doors, 20.0)
        assert 20 <= trio.current_time() - began < 21
        assert doors.closed == ["inbound", "all"]
        near.reset()


# Bugs on the way


@pytest.mark.parametrize("side", ["in", "out"])
async def test_an_unexpected_error_of_a_dial_ends_one_tcp_connection_only(autojump_clock: Any, side: str) -> None:
    async with memory_world(web(mtls=Mtls.PERMISSIVE)) as net:
        records = observed(net)
        answers: list[Any] = [ValueError("a name that TLS cannot ask for")]
        net.on_dial = lambda endpoint: answers.pop() if answers else None
        near, world = Socket(net), net.world
        if side == "out":
            world.nursery.start_soon(tcp.serve_outbound, world, near, world.plans.outbound_tcp["db", "db"], "x")
        else:
            plan = world.plans.inbound["db"].tcp
            assert plan is not None
            world.nursery.start_soon(tcp.serve_inbound, world, Accepted(near, ("10.1.1.1", 1)), plan)
        await quiet()
        assert near.ended == "close" and [record[5] for record in records] == ["connect_failed"]
        again, _ = await tunnel(net)
        again.reset()
        assert not world.tunnels


async def test_tcp_connections_to_unknown_addresses_are_one_kind_of_note(autojump_clock: Any) -> None:
    async with memory_world(web()) as net:
        observed(net)
        net.on_dial = lambda endpoint: DialError("no")
        for number in range(50):
            target = (f"192.0.2.{number}", 5432)
            net.world.nursery.start_soon(tcp.serve_passthrough, net.world, Socket(net), target, "10.1.1.1")
        await quiet()
        kinds = {kind for kind, _ in net.notes}
        assert len(kinds) == 2, kinds  # the dial, and the connection that it was for
