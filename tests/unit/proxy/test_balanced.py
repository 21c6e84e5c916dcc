"""Balancing through the real data path on memory channels: keys, cookies, and what is shown of it."""

import re
from collections.abc import Iterable
from typing import Any

import trio.testing
from support.memory_net import Net, memory_world

from sidecar.model.snapshot import (
    Balancing,
    Destination,
    EndpointSpec,
    Fallback,
    Route,
    Service,
    Snapshot,
    Sticky,
    Tls,
)

# mypy: disable-error-code="no-untyped-def"

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
LABELS = ({"version": "1"}, {"version": "2"})
COOKIE = re.compile(rb"set-cookie: ([^;]*);")


def policy(*hosts: int, healthy: Iterable[int] = range(9), **options: Any) -> Snapshot:
    specs = tuple(
        EndpointSpec(f"10.0.0.{n}", 1, LABELS[n % 2], tls=Tls.PLAIN, healthy=n in set(healthy)) for n in hosts
    )
    options.setdefault("routes", (Route("default"),))
    versions = {"v1": LABELS[0], "v2": LABELS[1]}
    shop = Service("shop", endpoints=specs, versions=versions, **options)
    return Snapshot({"web": Service("web", routes=(Route("default"),)), "shop": shop})


async def served(net: Net, *fields: bytes) -> tuple[str, bytes]:
    """Who serves one request on a connection of its own, and the answer."""
    app = net.caller()
    app.send(
        b"".join((b"GET / HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n", *(f + b"\r\n" for f in fields), b"\r\n"))
    )
    server = await net.accepted()
    await trio.testing.wait_all_tasks_blocked()
    server.send(OK.replace(b"OK\r\n", b"OK\r\nconnection: close\r\n"))
    await trio.testing.wait_all_tasks_blocked()
    assert server.endpoint is not None
    return server.endpoint.host[-1], app.read()


async def test_a_header_chooses_the_endpoint_as_long_as_it_is_there(autojump_clock):
    options = {"balance": "maglev", "balancing": Balancing(by="header:x-user")}
    async with memory_world(policy(1, 2, 3, 4, **options)) as net:
        homes = {user: (await served(net, b"x-user: %d" % user))[0] for user in range(12)}
        assert len(set(homes.values())) == 4
        for user, home in homes.items():
            assert (await served(net, b"x-user: %d" % user))[0] == home
        net.apply(policy(1, 2, 3, 4, healthy=(2, 3, 4), **options))
        for user, home in homes.items():
            found = (await served(net, b"x-user: %d" % user))[0]
            assert found == home if home != "1" else found != "1"
        assert len({(await served(net))[0] for _ in range(20)}) > 1  # without the header anybody


async def test_a_cookie_and_the_callers_address_choose_too(autojump_clock):
    options = {"balance": "ring-hash", "balancing": Balancing(by="cookie:session")}
    async with memory_world(policy(1, 2, 3, 4, **options)) as net:
        homes = [(await served(net, b"cookie: a=b; session=%d" % n))[0] for n in range(8)]
        assert [(await served(net, b"cookie: session=%d" % n))[0] for n in range(8)] == homes
        net.apply(policy(1, 2, 3, 4, balance="ring-hash", balancing=Balancing(by="address")))
        assert len({(await served(net))[0] for _ in range(8)}) == 1
        net.apply(policy(1, 2, 3, 4, balance="ring-hash", balancing=Balancing(by="caller")))
        assert len({(await served(net))[0] for _ in range(8)}) == 1


async def test_the_key_goes_along_to_a_fallback(autojump_clock):
    routes = (Route("default", destinations=(Destination("v2"),), fallback=Fallback(version="v1")),)
    options: Any = {"balance": "maglev", "balancing": Balancing(by="header:x-user"), "routes": routes}
    async with memory_world(policy(2, 4, 6, 8, **options)) as net:
        homes = {user: (await served(net, b"x-user: %d" % user))[0] for user in range(8)}
        assert len(set(homes.values())) > 1
        for user, home in homes.items():
            assert (await served(net, b"x-user: %d" % user))[0] == home


async def test_a_client_stays_with_its_endpoint_until_that_is_lost(autojump_clock):
    routes = (Route("default", sticky=Sticky("stay", 60.0, "endpoint")),)
    async with memory_world(policy(1, 2, 3, 4, routes=routes)) as net:
        home, answer = await served(net)
        (cookie,) = COOKIE.findall(answer)
        assert cookie.startswith(b"stay=") and b"; HttpOnly" in answer
        for _ in range(8):
            found, answer = await served(net, b"cookie: " + cookie)
            assert found == home and b"set-cookie" not in answer
        well = [n for n in (1, 2, 3, 4) if str(n) != home]
        net.apply(policy(1, 2, 3, 4, healthy=well, routes=routes))
        other, answer = await served(net, b"cookie: " + cookie)
        (fresh,) = COOKIE.findall(answer)
        assert other != home and fresh != cookie
        net.apply(policy(*(n for n in (1, 2, 3, 4) if str(n) != other), routes=routes))
        found, answer = await served(net, b"cookie: " + fresh)
        assert found != other and COOKIE.findall(answer)
        for junk in (cookie[:-2], b"stay=1", b"stay="):
            assert COOKIE.findall((await served(net, b"cookie: " + junk))[1])


async def test_an_endpoint_keeps_its_version(autojump_clock):
    destinations = (Destination("v1", 50), Destination("v2", 50))
    routes = (Route("default", destinations=destinations, sticky=Sticky("stay", 60.0, "endpoint")),)
    async with memory_world(policy(1, 2, 3, 4, routes=routes)) as net:
        for _ in range(6):
            home, answer = await served(net)
            (cookie,) = COOKIE.findall(answer)
            for _ in range(3):
                assert (await served(net, b"cookie: " + cookie))[0] == home


async def test_peak_ewma_learns_from_what_is_served(autojump_clock):
    async with memory_world(policy(1, 2, balance="peak-ewma")) as net:
        cluster = net.cluster("shop")
        for _ in range(4):
            await served(net)
        assert all(
            cluster.balancer.describe(endpoint, net.world.clock())["ewma_ms"] <= 30.0
            for endpoint in cluster.endpoints.values()
        )
        assert sum(endpoint.memo is not None for endpoint in cluster.endpoints.values()) == 2
