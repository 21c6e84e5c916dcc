"""Requests that once went wrong: a hang, a leak, a lost byte, an answer that no standard allows. In virtual
time, without sockets."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from support.memory_net import DialError, Net, Peer, memory_world

from sidecar.api import AsyncFilter, Filter, Reply
from sidecar.api import Request as ApiRequest
from sidecar.api import Response as ApiResponse
from sidecar.model.snapshot import EndpointSpec, Mtls, Retry, Rewrite, Route, Service, Snapshot, Timeouts, Tls
from sidecar.proxy.entries import Outbound
from sidecar.proxy.filtering import Chain, Link
from sidecar.testing import make_context

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
GET = b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n"
INBOUND = b"GET / HTTP/1.1\r\nhost: web\r\n\r\n"
CHUNKED_PART = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n"


def policy(*services: Service, **own: Any) -> Snapshot:
    own.setdefault("routes", (Route("default"),))
    return Snapshot({s.name: s for s in (Service("web", **own), *services)})


def shop(**route: Any) -> Service:
    return Service("shop", endpoints=(EndpointSpec("10.0.0.1", 15006),), routes=(Route("default", **route),))


def chain_of(filter_: Any) -> Callable[[Net], Chain]:
    def make(net: Net) -> Chain:
        context = make_context(clock=trio.current_time)
        filter_.context = context
        link = Link(filter_, type(filter_).__name__, True, context)
        return Chain([link], net.world.meters.service("out", "shop"), net.world.note)

    return make


def network(filter_: Any = None, **route: Any) -> Any:
    chains = {("out", "shop"): chain_of(filter_)} if filter_ is not None else None
    return memory_world(policy(shop(**route)), chains=chains)


async def quiet() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def asked(net: Net, app: Peer, request: bytes = GET) -> Peer:
    app.send(request)
    server = await net.accepted()
    await quiet()
    return server


async def exchange(app: Peer, server: Peer, request: bytes) -> bytes:
    """What the server gets on a connection that is already open."""
    app.send(request)
    await quiet()
    got = server.read()
    server.send(OK)
    await quiet()
    return got


class Upper(Filter):
    side = "out"

    def on_request_data(self, request: ApiRequest, data: bytes, end: bool) -> bytes:
        return data.upper()


class Boom(Filter):
    side = "out"

    def on_request_data(self, request: ApiRequest, data: bytes, end: bool) -> bytes:
        raise RuntimeError("a bug of the filter")


class NotModified(Filter):
    side = "out"

    def on_request(self, request: ApiRequest) -> Reply:
        return Reply(304)


class SlowRequest(AsyncFilter):
    side = "out"

    async def on_request(self, request: ApiRequest) -> None:
        await trio.sleep(0.5)


class SlowResponse(AsyncFilter):
    side = "out"

    async def on_response(self, request: ApiRequest, response: ApiResponse) -> None:
        await trio.sleep(0.5)


# Bodies that a filter changes


async def test_a_counted_body_in_two_reads_is_reframed_whole(autojump_clock: Any) -> None:
    async with network(Upper(None)) as net:
        app = net.caller()
        server = await asked(net, app, b"POST / HTTP/1.1\r\nhost: shop\r\ncontent-length: 6\r\n\r\nabc")
        app.send(b"def")
        await quiet()
        got = server.read()
        head, _, body = got.partition(b"\r\n\r\n")
        assert b"content-length" not in head and b"transfer-encoding: chunked" in head
        assert body == b"3\r\nABC\r\n3\r\nDEF\r\n0\r\n\r\n"
        server.send(OK)
        assert app.read() == OK


async def test_a_reframed_body_is_never_read_as_a_request(autojump_clock: Any) -> None:
    async with network(Upper(None)) as net:
        app = net.caller()
        chunked = b"POST /a HTTP/1.1\r\nhost: shop\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
        server = await asked(net, app, chunked)
        server.send(OK)
        await quiet()
        server.read()
        smuggled = b"\r\nGET /admin HTTP/1.1\r\nhost: shop\r\n\r\n"
        app.send(b"POST /b HTTP/1.1\r\nhost: shop\r\ncontent-length: %d\r\n\r\n" % len(smuggled))
        await quiet()
        app.send(smuggled)
        await quiet()
        server.send(OK)
        await quiet()
        got = server.read()
        assert smuggled.upper() in got and b"GET /admin" not in got
        assert app.read().count(b"HTTP/1.1 200") == 2 and len(net.log) == 2


async def test_a_body_hook_that_raises_at_once_gives_its_slot_back_once(autojump_clock: Any) -> None:
    async with network(Boom(None)) as net:
        app = net.caller()
        app.send(b"POST / HTTP/1.1\r\nhost: shop\r\ncontent-length: 3\r\n\r\nabc")
        await quiet()
        assert net.cluster("shop").active == 0
        assert [status for status, _ in net.log] == [500]


# Filters that take their time


async def test_no_timer_of_the_try_fires_while_a_response_filter_thinks(autojump_clock: Any) -> None:
    async with network(SlowResponse(None), timeouts=Timeouts(try_s=1.0)) as net:
        app = net.caller()
        server = await asked(net, app)
        await trio.sleep(0.8)
        server.send(OK)
        await trio.sleep(1.0)
        assert app.read() == OK and app.ended is None
        assert net.log == [(200, "ok")]


async def test_a_caller_that_leaves_after_a_request_filter_is_noticed(autojump_clock: Any) -> None:
    async with network(SlowRequest(None)) as net:
        app = net.caller()
        server = await asked(net, app)
        await trio.sleep(1)
        app.close()
        await quiet()
        assert server.ended is not None and len(net.log) == 1


async def test_room_for_the_previous_answer_does_not_wake_an_upstream_that_a_filter_holds(autojump_clock: Any) -> None:
    big = b"x" * 400_000
    async with network(SlowResponse(None)) as net:
        app = net.caller(window=1000)
        server = await asked(net, app, GET + GET)
        server.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(big) + big)
        await trio.sleep(0.6)
        assert server.read().count(b"GET") == 2
        server.send(CHUNKED_PART)
        await trio.sleep(0.1)
        app.accept()  # the previous answer leaves
        await quiet()
        assert server.channel is not None and not server.channel.reading
        server.send(b"0\r\n\r\n")
        await trio.sleep(1)
        assert app.read().endswith(b"\r\n\r\n2\r\nok\r\n0\r\n\r\n")
        assert net.log == [(200, "ok")] * 2 and net.leftovers() == []
        app.send(GET)
        await quiet()
        server.send(OK)
        await trio.sleep(1)
        assert app.read() == OK and net.dials == 1


async def test_an_upload_goes_on_while_a_response_filter_thinks(autojump_clock: Any) -> None:
    async with network(SlowResponse(None)) as net:
        net.on_dial = lambda endpoint: {"window": 10_000}
        app = net.caller()
        server = await asked(net, app, b"PUT / HTTP/1.1\r\nhost: shop\r\ncontent-length: 600000\r\n\r\n")
        app.send(b"x" * 300_000)
        app.send(b"x" * 300_000)  # waits: the server takes no more
        await quiet()
        server.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n")
        await quiet()
        server.accept()
        await trio.sleep(2)
        assert len(server.read().partition(b"\r\n\r\n")[2]) == 600_000
        server.send(b"ok")
        await quiet()
        assert app.read() == OK and net.log == [(200, "ok")]


# Callers


async def test_ending_a_busy_connection_ends_its_request(autojump_clock: Any) -> None:
    async with network() as net:
        server = await asked(net, net.caller())
        (down,) = net.world.downstreams
        net.call(down.end)
        await quiet()
        assert server.ended is not None and len(net.log) == 1
        assert net.cluster("shop").active == 0


@pytest.mark.parametrize("parts", [(100_000,), (70_000, 30_000)])
async def test_a_caller_that_leaves_is_noticed_though_its_body_was_large(
    autojump_clock: Any, parts: tuple[int, ...]
) -> None:
    async with network() as net:
        net.on_dial = lambda endpoint: 1.0
        app = net.caller()
        app.send(b"PUT / HTTP/1.1\r\nhost: shop\r\ncontent-length: 100000\r\n\r\n")
        for size in parts:
            app.send(b"x" * size)
        server = await net.accepted()
        await trio.sleep(1)
        assert server.read().endswith(b"x" * 100_000)
        app.close()
        await quiet()
        assert server.ended is not None and len(net.log) == 1


async def test_a_body_that_ends_in_one_read_with_broken_bytes_is_served(autojump_clock: Any) -> None:
    async with network() as net:
        app = net.caller()
        server = await asked(net, app, b"PUT / HTTP/1.1\r\nhost: shop\r\ncontent-length: 6\r\n\r\nabc")
        app.send(b"defGARBAGE\x00\r\n\r\n")
        await quiet()
        assert server.read().endswith(b"\r\n\r\nabcdef")
        server.send(OK)
        await quiet()
        answer = app.read()
        assert answer.startswith(b"HTTP/1.1 200 ") and b"\r\nconnection: close\r\n" in answer
        assert net.log == [(200, "ok")] and trio.current_time() < 1


async def test_a_steady_reader_gets_the_whole_last_answer(autojump_clock: Any) -> None:
    size = 250_000
    async with network() as net:
        app = net.caller(window=1000)
        server = await asked(net, app, b"GET / HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n")
        server.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size)
        while app.ended is None:
            await trio.sleep(0.5)
            app.accept(10_000)
        assert trio.current_time() > 10  # longer than one period
        assert app.ended == "close" and app.read().count(b"x") == size


async def test_a_reader_that_stands_still_is_cut(autojump_clock: Any) -> None:
    async with network() as net:
        app = net.caller(window=1000)
        server = await asked(net, app, b"GET / HTTP/1.1\r\nhost: shop\r\nconnection: close\r\n\r\n")
        server.send(b"HTTP/1.1 200 OK\r\ncontent-length: 250000\r\n\r\n" + b"x" * 250_000)
        await trio.sleep(5)
        app.accept(10_000)
        await trio.sleep(30)
        assert app.ended == "reset"


# What is said, and to whom


async def test_https_is_never_passed_through_in_clear_text(autojump_clock: Any) -> None:
    async with network() as net:
        for scheme in (b"https", b"HTTPS"):
            app = net.caller()
            app.send(
                b"GET %b://bank.example/x HTTP/1.1\r\nhost: bank.example\r\nauthorization: Bearer x\r\n\r\n" % scheme
            )
            await trio.sleep(1)
            assert app.read().startswith(b"HTTP/1.1 501 ")
        assert net.dials == 0


ORIGINATED_HOSTS = [
    ("api.example", 8443, None, b"api.example:8443"),
    ("api.example", 443, None, b"api.example"),
    ("fd00::1", 443, None, b"[fd00::1]"),
    ("fd00::1", 8443, None, b"[fd00::1]:8443"),
    ("api.example", 8443, "other.example", b"other.example"),
]


@pytest.mark.parametrize(("host", "port", "rewrite", "said"), ORIGINATED_HOSTS)
async def test_the_host_that_an_ordinary_tls_server_is_asked_for(
    autojump_clock: Any, host: str, port: int, rewrite: str | None, said: bytes
) -> None:
    route = Route("default", rewrite=Rewrite(None, rewrite) if rewrite else None)
    outside = Service("outside", endpoints=(EndpointSpec(host, port, tls=Tls.ORIGINATE),), routes=(route,))
    async with memory_world(policy(outside)) as net:
        server = await asked(net, net.caller(), GET.replace(b"shop", b"outside"))
        assert b"\r\nhost: %b\r\n" % said in server.read()
        server.send(OK)


async def test_http_1_0_without_a_host_is_given_one(autojump_clock: Any) -> None:
    async with network() as net:
        captured = Outbound(net.world, ("shop", "http"), keep_host=True)
        app = net._connected(captured, "", math.inf)
        server = await asked(net, app, b"GET / HTTP/1.0\r\n\r\n")
        assert b"\r\nhost: shop\r\n" in server.read()
        server.send(OK)


async def test_http_1_0_without_a_host_is_given_one_inbound(autojump_clock: Any) -> None:
    async with memory_world(policy(mtls=Mtls.PERMISSIVE)) as net:
        server = await asked(net, net.mesh_caller(""), b"GET / HTTP/1.0\r\n\r\n")
        assert b"\r\nhost: web\r\n" in server.read()
        server.send(OK)


async def test_an_own_304_states_no_length(autojump_clock: Any) -> None:
    async with network(NotModified(None)) as net:
        app = net.caller()
        app.send(GET)
        await quiet()
        answer = app.read()
        assert answer.startswith(b"HTTP/1.1 304 ") and b"content-length" not in answer
        assert answer.endswith(b"\r\n\r\n")


# A policy that changes


async def test_a_plain_connection_is_refused_once_mtls_is_strict(autojump_clock: Any) -> None:
    async with memory_world(policy(mtls=Mtls.PERMISSIVE)) as net:
        plain, peer = net.mesh_caller(""), net.mesh_caller("shop")
        server = await asked(net, plain, INBOUND)
        server.send(OK)
        assert plain.read() == OK
        net.apply(policy(mtls=Mtls.STRICT))
        plain.send(INBOUND)
        await trio.sleep(1)
        assert server.read().count(b"GET") == 1  # the first only
        assert plain.read().startswith(b"HTTP/1.1 403 ") and plain.ended == "close"
        assert await exchange(peer, server, INBOUND) and peer.read() == OK


async def test_a_connection_of_a_service_that_has_left_is_not_kept(autojump_clock: Any) -> None:
    retry = Retry(max_retries=1, base_s=10, max_s=10)
    async with memory_world(policy(shop(retry=retry)), seed=1) as net:
        net.world.nursery.start_soon(net.world.sweep)
        failures: list[Any] = [DialError("no")]
        net.on_dial = lambda endpoint: failures.pop() if failures else None
        app = net.caller()
        app.send(GET)
        await trio.sleep(0.01)
        assert not failures and net.pending() == 0  # it waits to be sent again
        net.apply(policy())
        server = await net.accepted()
        await quiet()
        server.send(OK)
        await quiet()
        assert app.read() == OK
        await trio.sleep(5)
        assert server.ended is not None


# Hosts outside the mesh


def outside(host: bytes) -> bytes:
    return b"GET http://%b/ HTTP/1.1\r\nhost: %b\r\n\r\n" % (host, host)


async def test_idle_connections_to_other_hosts_age(autojump_clock: Any) -> None:
    async with network() as net:
        net.world.nursery.start_soon(net.world.sweep)
        app = net.caller()
        servers = []
        for number in range(3):
            servers.append(await asked(net, app, outside(b"h%d.example" % number)))
            servers[-1].send(OK)
            await quiet()
        assert all(server.ended is None for server in servers)
        await trio.sleep(290)
        assert all(server.ended is not None for server in servers)


@pytest.mark.parametrize("dial_s", [0.0, 1.0])
async def test_a_connection_to_a_host_that_was_forgotten_meanwhile_is_not_kept(
    autojump_clock: Any, dial_s: float
) -> None:
    async with network() as net:
        net.world.nursery.start_soon(net.world.sweep)
        net.on_dial = lambda endpoint: dial_s or None
        app = net.caller()
        app.send(outside(b"h.example"))
        await trio.sleep(dial_s / 2)
        for number in range(300):
            net.world.passthrough_plan(f"x{number}.example", 80)
        server = await net.accepted()
        await quiet()
        server.send(OK)
        await trio.sleep(5)
        assert app.read() == OK and server.ended is not None


async def test_unknown_hosts_are_one_kind_of_note(autojump_clock: Any) -> None:
    async with network() as net:
        net.on_dial = lambda endpoint: DialError("no")
        app = net.caller()
        for number in range(300):
            app.send(outside(b"h%d.example" % number))
            await quiet()
        assert len(net.notes) == 300
        assert len({kind for kind, _ in net.notes}) == 1


async def test_malformed_answers_of_unknown_hosts_are_one_kind_of_note(autojump_clock: Any) -> None:
    async with network() as net:
        app = net.caller()
        for number in range(20):
            server = await asked(net, app, outside(b"h%d.example" % number))
            server.send(b"nonsense\r\n\r\n")
            await quiet()
        assert len(net.notes) == 20
        assert len({kind for kind, _ in net.notes}) == 1
