"""Bans: connections of banned peers end within 5 s, those of others go on. Virtual time."""

from typing import Any

import pytest
import trio
import trio.testing
from support.memory_net import Net, Peer, fingerprint_of, memory_world

from sidecar.model.snapshot import EndpointSpec, Route, Service, Snapshot

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
SHOP, FRONT = "spiffe://mesh.local/service/shop", "spiffe://mesh.local/service/front"
UPGRADE = b"GET /chat HTTP/1.1\r\nhost: web\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"


def network() -> Any:
    route = Route("default", upgrade=frozenset({"websocket"}))
    others = [
        Service(name, endpoints=(EndpointSpec(f"10.0.{len(name)}.1", 1),), routes=(route,)) for name in ("shop", "else")
    ]
    return memory_world(Snapshot({s.name: s for s in (Service("web", routes=(route,)), *others)}))


async def quiet() -> None:
    await trio.testing.wait_all_tasks_blocked()


def ban(net: Net, identity: str, by: str) -> None:
    if by == "identity":
        net.world.ban([identity])
    else:
        net.world.ban([], [fingerprint_of(identity)])


async def led(net: Net, peer: Peer, host: bytes) -> Peer:
    peer.send(b"GET / HTTP/1.1\r\nhost: %b\r\n\r\n" % host)
    server = await net.accepted()
    await quiet()
    assert server.read()
    return server


@pytest.mark.parametrize("by", ["identity", "certificate"])
async def test_callers(autojump_clock: Any, by: str) -> None:
    async with network() as net:
        idle, answered, stuck, other = (net.mesh_caller(name) for name in ("front", "front", "front", "back"))
        inside = await led(net, idle, b"web")
        inside.send(OK)
        await quiet()
        assert idle.read() == OK
        answered.send(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")  # on the application's idle connection
        await quiet()
        behind_stuck = await led(net, stuck, b"web")
        behind_other = await led(net, other, b"web")
        ban(net, FRONT, by)
        await quiet()
        assert idle.ended is not None and answered.ended is None and stuck.ended is None
        inside.send(OK)
        await quiet()
        assert b"connection: close" in answered.read() and answered.ended is not None
        await trio.sleep(5)
        assert stuck.ended is not None and behind_stuck.ended is not None
        behind_other.send(OK)
        await quiet()
        assert other.read() == OK and other.ended is None


@pytest.mark.parametrize("by", ["identity", "certificate"])
async def test_callees(autojump_clock: Any, by: str) -> None:
    async with network() as net:
        one, two, three = net.caller(), net.caller(), net.caller()
        idle, busy, other = [await led(net, peer, b"shop") for peer in (one, two)] + [await led(net, three, b"else")]
        idle.send(OK)
        await quiet()
        ban(net, SHOP, by)
        await quiet()
        assert idle.ended is not None and busy.ended is None
        await trio.sleep(5)
        assert busy.ended is not None
        assert b"x-pillion-reason: upstream_reset" in two.read() or net.pending()
        other.send(OK)
        await quiet()
        assert three.read() == OK and other.ended is None
        assert not net.cluster("shop").endpoints["mesh+10.0.4.1:1"].idle
        for peer in (one, two, three):
            peer.reset()


async def test_tunnels(autojump_clock: Any) -> None:
    async with network() as net:
        tunnels = []
        for caller in ("front", "back"):
            peer = net.mesh_caller(caller)
            peer.send(UPGRADE)
            inside = await net.accepted()
            await quiet()
            inside.send(SWITCHED)
            await quiet()
            tunnels.append((peer, inside))
        net.world.ban([FRONT])
        await quiet()
        (front, _), (back, behind) = tunnels
        assert front.ended is not None and back.ended is None
        behind.send(b"on")
        await quiet()
        assert back.read().endswith(b"on")
        back.reset()


async def test_the_same_bans_again_end_nothing_and_a_ban_can_be_lifted(autojump_clock: Any) -> None:
    async with network() as net:
        net.world.ban([FRONT])
        assert net.world.is_banned(FRONT, "") and not net.world.is_banned(SHOP, "")
        late = net.mesh_caller("front")  # as if it had been let in
        net.world.ban([FRONT], [])
        await trio.sleep(6)
        assert late.ended is None
        net.world.ban([])
        assert not net.world.is_banned(FRONT, "")
