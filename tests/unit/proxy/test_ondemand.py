"""Services that are fetched when a request asks for them. Virtual time."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.lowlevel
import trio.testing
from support.memory_net import Net, Peer, memory_world

from sidecar.model.snapshot import EndpointSpec, Route, Service, Snapshot
from sidecar.proxy import ondemand
from sidecar.proxy.ondemand import service_named_by

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
NAMES = frozenset({b"web", b"shop", b"other"})


def policy(*names: str) -> Snapshot:
    services = {
        name: Service(name, endpoints=(EndpointSpec(f"10.0.{len(name)}.1", 1),), routes=(Route("default"),))
        for name in names
    }
    return Snapshot({"web": Service("web", routes=(Route("default"),)), **services})


def get(host: bytes = b"shop", fields: bytes = b"", target: bytes = b"/") -> bytes:
    return b"GET %b HTTP/1.1\r\nhost: %b\r\n%b\r\n" % (target, host, fields)


def status(answer: bytes) -> bytes:
    return answer[9:12]


class Source:
    """Stands for the control plane: answers after `wait_s`, when `send` has run."""

    def __init__(self, net: Net, wait_s: float = 0.0, send: Callable[[str], Any] = lambda name: None) -> None:
        self.asked: list[str] = []
        self.wait_s, self.send = wait_s, send
        net.world.names = NAMES
        net.world.want = self.want

    async def want(self, name: str) -> None:
        self.asked.append(name)
        await trio.sleep(self.wait_s)
        self.send(name)


async def quiet() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def answered(net: Net, app: Peer) -> None:
    server = await net.accepted()
    await quiet()
    assert b"GET /" in server.read()
    server.send(OK)
    await quiet()
    assert app.read() == OK


@pytest.mark.parametrize(
    ("host", "name"),
    [
        (b"shop", b"shop"),
        (b"shop.mesh", b"shop"),
        (b"api.shop", b"shop"),
        (b"api.shop.mesh", b"shop"),
        (b"www.api.shop", b""),
        (b"a.b.shop.mesh", b""),
        (b".shop", b""),
        (b"mesh", b"mesh"),
        (b".mesh", b""),
        (b"", b""),
    ],
)
def test_what_a_host_names(host: bytes, name: bytes) -> None:
    assert service_named_by(host) == name


@pytest.mark.parametrize("host", [b"shop", b"SHOP.mesh", b"http.shop", b"http.shop.mesh:80", b"shop."])
async def test_a_request_waits_for_its_service(autojump_clock: Any, host: bytes) -> None:
    async with memory_world(policy()) as net:
        source = Source(net, 1.0, lambda name: net.apply(policy(name)))
        app = net.caller()
        app.send(get(host))
        await answered(net, app)
        assert source.asked == ["shop"] and trio.current_time() >= 1
        app.send(get(host))  # known by now
        await trio.sleep(2)
        assert source.asked == ["shop"]
        app.reset()


async def test_plans_that_come_before_or_after_the_answer(autojump_clock: Any) -> None:
    """A push may overtake the answer to the request for it, or follow it."""
    for wait_s in (3.0, 0.0):
        async with memory_world(policy()) as net:
            source = Source(net, wait_s)
            app = net.caller()
            app.send(get())
            await trio.sleep(0.5)
            assert source.asked == ["shop"] and app.read() == b""
            net.apply(policy("shop"))
            await answered(net, app)
            assert not net.world.ondemand.waits


async def test_many_requests_share_one_wait(autojump_clock: Any) -> None:
    async with memory_world(policy()) as net:
        source = Source(net, 1.0)
        apps = [net.caller() for _ in range(10)]
        for app in apps:
            app.send(get())
        apps[7].reset()
        await trio.sleep(0.5)
        assert source.asked == ["shop"] and net.world.ondemand.count == 10
        net.apply(policy("shop"))
        servers = [await net.accepted() for _ in range(9)]
        await quiet()
        for server in servers:
            server.send(OK)
        await quiet()
        assert [app.read() for app in apps] == [b"" if number == 7 else OK for number in range(10)]
        assert net.log.count((200, "ok")) == 9 and net.log.count((499, "caller_gone")) == 1
        assert net.world.ondemand.count == 0


async def test_a_body_waits_with_its_head(autojump_clock: Any) -> None:
    async with memory_world(policy()) as net:
        Source(net)
        app = net.caller()
        app.send(b"POST / HTTP/1.1\r\nhost: shop\r\ncontent-length: 9\r\n\r\nabc")
        app.send(b"def")
        await trio.sleep(1)
        app.send(b"ghi")
        assert app.channel is not None and not app.channel.reading
        net.apply(policy("shop"))
        server = await net.accepted()
        await quiet()
        assert server.read().endswith(b"abcdefghi")
        server.send(OK)
        await quiet()
        assert app.read() == OK


async def test_what_does_not_come_in_time_is_answered(autojump_clock: Any) -> None:
    async with memory_world(policy()) as net:
        source = Source(net, math.inf)
        app = net.caller()
        app.send(get())
        answer = await app.until()
        assert trio.current_time() == pytest.approx(ondemand.WAIT_S)
        assert status(answer) == b"503" and b"x-pillion-reason: no_healthy_endpoint" in answer
        assert ("want shop", 'no_healthy_endpoint: service "shop": it was not sent within 5 s') in net.notes
        app.send(get())  # asked for again
        await quiet()
        assert source.asked == ["shop", "shop"]
        net.apply(policy("shop"))
        await answered(net, app)


async def test_who_cannot_ask_says_so_at_once(autojump_clock: Any) -> None:
    async with memory_world(policy()) as net:

        def send(name: str) -> None:
            raise OSError("no control plane is connected")

        Source(net, send=send)
        app = net.caller()
        app.send(get())
        answer = await app.until()
        assert status(answer) == b"503" and trio.current_time() < 1
        assert net.notes == [("want shop", 'no_healthy_endpoint: service "shop": no control plane is connected')]


async def test_a_service_that_is_no_more_has_no_route(autojump_clock: Any) -> None:
    async with memory_world(policy()) as net:

        def send(name: str) -> None:
            net.world.names = frozenset({b"web"})
            raise KeyError(name)

        Source(net, send=send)
        app = net.caller()
        app.send(get())
        answer = await app.until()
        assert status(answer) == b"404" and b"x-pillion-reason: no_route" in answer


async def test_nobody_waits_for_what_is_no_service(autojump_clock: Any) -> None:
    async with memory_world(policy("other")) as net:
        source = Source(net, math.inf)
        app = net.caller()
        for host in (b"nobody", b"x.y.shop.mesh", b"raw.other"):  # the last one: known, but without such a port
            app.send(get(host))
            answer = app.read()
            assert status(answer) == b"404" and b"known: other, shop, web" in answer, host
        net.world.names = None
        app.send(get())
        assert status(app.read()) == b"404"
        assert source.asked == []


async def test_an_outside_host_that_ends_like_a_service_is_passed_through(autojump_clock: Any) -> None:
    async with memory_world(policy()) as net:
        Source(net, send=lambda name: net.apply(policy(name)))
        app = net.caller()
        app.send(get(b"www.shop", target=b"http://www.shop/"))
        server = await net.accepted()
        assert server.endpoint is not None and server.endpoint.key == "www.shop:80"
        server.send(OK)
        await quiet()
        assert app.read() == OK


async def test_what_waits_is_bounded(autojump_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ondemand, "PARKED_MAX", 2)
    async with memory_world(policy()) as net:
        Source(net, math.inf)
        apps = [net.caller() for _ in range(3)]
        for app, host in zip(apps, (b"shop", b"other", b"shop"), strict=True):
            app.send(get(host))
        assert b"x-pillion-reason: overflow" in apps[2].read()
        net.apply(policy("shop", "other"))
        for _ in range(2):
            (await net.accepted()).send(OK)
        await quiet()
        assert [app.read() for app in apps] == [OK, OK, b""]


async def test_hosts_of_services_that_are_not_held_are_foreign(autojump_clock: Any) -> None:
    async with memory_world(policy()) as net:
        net.world.names = NAMES
        for host in (b"shop", b"shop.mesh", b"api.shop.mesh"):
            peer = net.mesh_caller("front")
            peer.send(get(host))
            assert status(peer.read()) == b"421", host
        for host in (b"web", b"http.web.mesh", b"www.shop", b"10.0.0.1:80", b"elsewhere"):
            peer = net.mesh_caller("front")
            peer.send(get(host))
            if net.dials == 0:
                inside = await net.accepted()
            await quiet()
            inside.send(OK)
            await quiet()
            assert peer.read() == OK, host
