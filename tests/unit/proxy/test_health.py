"""Health that comes with the snapshot: who is picked, what goes on, which word is said. Virtual time."""

from collections import Counter
from typing import Any

import trio.testing
from support.memory_net import Net, Peer, memory_world

from sidecar.model.snapshot import EndpointSpec, Route, Service, Snapshot

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
GET = b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n"


def policy(*healthy: bool) -> Snapshot:
    """A service with one endpoint for each of these."""
    specs = tuple(EndpointSpec(f"10.0.0.{number}", 1, healthy=good) for number, good in enumerate(healthy))
    route = (Route("default"),)
    return Snapshot({"web": Service("web", routes=route), "shop": Service("shop", endpoints=specs, routes=route)})


async def quiet() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def asked(net: Net, app: Peer) -> Peer:
    app.send(GET)
    server = await net.accepted()
    await quiet()
    return server


async def shares(net: Net, count: int) -> Counter[str]:
    """How many of this many requests, all under way together, each endpoint got."""
    found: Counter[str] = Counter()
    apps = [net.caller() for _ in range(count)]
    for app in apps:
        app.send(GET)
    for _ in range(count):
        server = await net.accepted()
        assert server.endpoint is not None
        found[server.endpoint.host[-1]] += 1
    await quiet()
    for app in apps:
        app.reset()
    return found


async def test_who_is_not_healthy_gets_nothing_and_comes_back(autojump_clock: Any) -> None:
    async with memory_world(policy(True, True, False)) as net:
        assert await shares(net, 8) == {"0": 4, "1": 4}
        net.apply(policy(False, True, True))
        assert await shares(net, 8) == {"1": 4, "2": 4}


async def test_with_too_few_in_good_health_all_are_used(autojump_clock: Any) -> None:
    async with memory_world(policy(True, False, False)) as net:
        assert await shares(net, 9) == {"0": 3, "1": 3, "2": 3}
        net.apply(policy(False, False, False))
        assert await shares(net, 9) == {"0": 3, "1": 3, "2": 3}


async def test_connections_and_requests_outlive_a_change_of_health(autojump_clock: Any) -> None:
    async with memory_world(policy(True)) as net:
        app, other = net.caller(), net.caller()
        busy = await asked(net, app)
        idle = await asked(net, other)
        idle.send(OK)
        await quiet()
        endpoint = busy.endpoint
        net.apply(policy(False))
        await quiet()
        assert busy.ended is None and idle.ended is None
        busy.send(OK)
        await quiet()
        assert app.read() == OK and other.read() == OK
        assert endpoint is not None and not endpoint.healthy and len(endpoint.idle) == 2
        assert net.cluster("shop").endpoints["mesh+10.0.0.0:1"] is endpoint and endpoint.successes == 2


async def test_requests_outlive_their_endpoint(autojump_clock: Any) -> None:
    async with memory_world(policy(True, True)) as net:
        apps = [net.caller(), net.caller()]
        servers = [await asked(net, app) for app in apps]
        net.apply(policy())
        await quiet()
        for server in servers:
            assert server.ended is None
            server.send(OK)
        await quiet()
        assert [app.read() for app in apps] == [OK, OK]
        assert all(server.ended is not None for server in servers)
        apps[0].send(GET)
        assert b"x-pillion-reason: no_healthy_endpoint" in apps[0].read()


async def test_an_open_circuit_is_not_bad_health(autojump_clock: Any) -> None:
    async with memory_world(policy(False)) as net:
        (endpoint,) = net.cluster("shop").endpoints.values()
        for _ in range(7):
            endpoint.breaker.failure(endpoint.breaker.generation, net.world.clock(), lambda: 0.0)
        app = net.caller()
        app.send(GET)
        assert b"x-pillion-reason: circuit_open" in app.read()
