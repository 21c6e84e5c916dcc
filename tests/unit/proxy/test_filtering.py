"""Filters in the data path: replies, failures, waiting, bodies, and callers that do not wait."""

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from support.memory_net import Net, memory_world

from sidecar.api import AsyncFilter, Filter, Reply
from sidecar.api import Request as ApiRequest
from sidecar.api import Response as ApiResponse
from sidecar.model.snapshot import EndpointSpec, Retry, Route, Service, Snapshot, Timeouts
from sidecar.proxy.filtering import Chain, Link
from sidecar.testing import make_context

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
GET = b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n"


def chain_of(*filters: Any, closed: bool = True) -> Callable[[Net], Chain]:
    def make(net: Net) -> Chain:
        context = make_context(clock=trio.current_time)
        links = []
        for filter_ in filters:
            filter_.context = context
            links.append(Link(filter_, type(filter_).__name__, closed, context))
        return Chain(links, net.world.meters.service("out", "shop"), net.world.note)

    return make


def network(*filters: Any, closed: bool = True, side: str = "out", **route: Any) -> Any:
    endpoints = tuple(EndpointSpec(f"10.0.0.{n}", 1) for n in (1, 2))
    shop = Service("shop", endpoints=endpoints, routes=(Route("default", **route),))
    snapshot = Snapshot({"web": Service("web", routes=(Route("default"),)), "shop": shop})
    service = "shop" if side == "out" else "web"
    return memory_world(snapshot, chains={(side, service): chain_of(*filters, closed=closed)})


async def ask(net: Net, request: bytes = GET, answer: bytes = OK) -> tuple[bytes, bytes]:
    """(what the server got, what the caller got)"""
    app = net.caller()
    app.send(request)
    server = await net.accepted()
    await trio.testing.wait_all_tasks_blocked()
    server.send(answer)
    await trio.testing.wait_all_tasks_blocked()
    return server.read(), app.read()


async def answered(net: Net, request: bytes = GET) -> bytes:
    """What the caller gets without any server."""
    app = net.caller()
    app.send(request)
    await trio.testing.wait_all_tasks_blocked()
    assert net.dials == 0
    return app.read()


class Header(Filter):
    side = "both"

    def on_request(self, request: ApiRequest) -> None:
        request.headers.set("x-tenant", request.caller_service or "nobody")

    def on_response(self, request: ApiRequest, response: ApiResponse) -> None:
        response.headers.set("x-route", request.route)


class Refuse(Filter):
    def on_request(self, request: ApiRequest) -> Reply:
        return Reply.refusal(request, 403, "denied", "no")


class RefuseResponse(Filter):
    def on_response(self, request: ApiRequest, response: ApiResponse) -> Reply:
        return Reply(502, "hidden")


class Broken(Filter):
    def on_request(self, request: ApiRequest) -> Reply | None:
        raise RuntimeError("a bug")


class BrokenResponse(Filter):
    def on_response(self, request: ApiRequest, response: ApiResponse) -> Reply | None:
        raise RuntimeError("a bug")


class Wait(AsyncFilter):
    timeout_s = 5.0

    def __init__(self, wait_s: float = 2.0, reply: Reply | None = None, fails: bool = False) -> None:
        super().__init__(None)
        self.wait_s, self.reply, self.fails = wait_s, reply, fails
        self.ended: list[str] = []

    async def on_request(self, request: ApiRequest) -> Reply | None:
        return await self.pass_time()

    async def pass_time(self) -> Reply | None:
        try:
            await trio.sleep(self.wait_s)
        except trio.Cancelled:
            self.ended.append("cancelled")
            raise
        self.ended.append("through")
        if self.fails:
            raise RuntimeError("a bug")
        return self.reply


class WaitResponse(Wait):
    async def on_request(self, request: ApiRequest) -> Reply | None:
        return None

    async def on_response(self, request: ApiRequest, response: ApiResponse) -> Reply | None:
        return await self.pass_time()


class Upper(Filter):
    def on_request_data(self, request: ApiRequest, data: bytes, end: bool) -> bytes:
        return data.upper() + (b"!" if end else b"")

    on_response_data = on_request_data


class BrokenData(Filter):
    def __init__(self, after: int = 0) -> None:
        super().__init__(None)
        self.left = after

    def on_response_data(self, request: ApiRequest, data: bytes, end: bool) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("a bug")
        return data


class BrokenRequestData(Filter):
    def on_request_data(self, request: ApiRequest, data: bytes, end: bool) -> bytes:
        raise RuntimeError("a bug")


# Synchronous


async def test_heads_both_ways(autojump_clock):
    async with network(Header()) as net:
        got, answer = await ask(net)
        assert b"\r\nx-tenant: web\r\n" in got and b"\r\nx-route: default\r\n" in answer


async def test_order_is_reversed_for_responses(autojump_clock):
    class First(Filter):
        name = b"a"

        def on_request(self, request: ApiRequest) -> None:
            request.headers.add("x-order", self.name.decode())

        def on_response(self, request: ApiRequest, response: ApiResponse) -> None:
            response.headers.add("x-order", self.name.decode())

    class Second(First):
        name = b"b"

    async with network(First(), Second()) as net:
        got, answer = await ask(net)
        assert got.find(b"x-order: a") < got.find(b"x-order: b")
        assert answer.find(b"x-order: b") < answer.find(b"x-order: a")


async def test_a_reply_in_place_of_the_application(autojump_clock):
    async with network(Refuse(), Broken()) as net:  # the second is not asked any more
        answer = await answered(net)
        assert answer.startswith(b"HTTP/1.1 403 ") and b"x-pillion-reason: denied\r\n" in answer
        assert net.log == [(403, "denied")]


async def test_a_reply_in_place_of_the_response(autojump_clock):
    async with network(RefuseResponse()) as net:
        _, answer = await ask(net)
        assert answer.startswith(b"HTTP/1.1 502 ") and answer.endswith(b"hidden") and b"ok" not in answer
        assert net.log == [(502, "responded")]
        assert net.cluster("shop").cancelled == 0  # nobody went away


@pytest.mark.parametrize("which", [Broken, BrokenResponse])
async def test_a_filter_that_raises_fails_closed_with_its_traceback_in_the_log(autojump_clock, which):
    async with network(which()) as net:
        answer = await answered(net) if which is Broken else (await ask(net))[1]
        assert answer.startswith(b"HTTP/1.1 500 ") and b"x-pillion-reason: filter_error\r\n" in answer
        assert net.log == [(500, "filter_error")]
        assert any("RuntimeError: a bug" in text and "Traceback" in text for _, text in net.notes)


@pytest.mark.parametrize("which", [Broken, BrokenResponse])
async def test_or_open_where_it_says_so(autojump_clock, which):
    async with network(which(), Header(), closed=False) as net:
        got, answer = await ask(net)
        assert b"x-tenant: web" in got and answer.endswith(b"ok")


async def test_what_is_no_reply_is_a_failure(autojump_clock):
    class Odd(Filter):
        def on_request(self, request: ApiRequest) -> Any:
            return 403

    async with network(Odd()) as net:
        assert (await answered(net)).startswith(b"HTTP/1.1 500 ")


async def test_a_slow_hook_is_counted_and_named(autojump_clock):
    ticks = iter([0.0, 0.5, 0.5, 0.5])

    class Slow(Filter):
        def on_request(self, request: ApiRequest) -> None:
            pass

    slow = Slow()
    async with network(slow) as net:
        link = next(iter(net.world.plans.outbound[b"shop"].table.find(b"GET", b"/", [], "web").filters.links))
        object.__setattr__(link, "context", make_context(clock=lambda: next(ticks)))
        await ask(net)
        assert any("took 500.0 ms" in text for _, text in net.notes)


# Asynchronous


async def test_a_request_waits_for_its_filter_and_the_total_goes_on(autojump_clock):
    async with network(Wait(), Header(), timeouts=Timeouts(total_s=5.0)) as net:
        before = trio.current_time()
        got, answer = await ask(net)
        assert trio.current_time() - before == pytest.approx(2.0)
        assert b"x-tenant: web" in got and answer.endswith(b"ok")
        assert b"x-request-deadline-ms: 3000\r\n" in got


async def test_a_filter_that_used_up_the_total(autojump_clock):
    async with network(Wait(), timeouts=Timeouts(total_s=1.0)) as net:
        app = net.caller()
        app.send(GET)
        await trio.sleep(2.1)
        assert b"x-pillion-reason: timeout_total" in app.read() and net.dials == 0


@pytest.mark.parametrize("size", [5, 200_000])
async def test_a_body_waits_with_its_request(autojump_clock, size):
    async with network(Wait()) as net:
        app = net.caller()
        app.send(b"PUT / HTTP/1.1\r\nhost: shop\r\ncontent-length: %d\r\n\r\n" % size)
        app.send(b"x" * size)
        assert not app.channel.reading and not app.got
        server = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        assert server.read().endswith(b"\r\n\r\n" + b"x" * size)
        server.send(OK)
        assert app.read() == OK


async def test_the_first_part_of_a_body_that_came_with_the_head_is_not_forgotten(autojump_clock):
    async with network(Wait()) as net:
        app = net.caller()
        app.send(b"PUT / HTTP/1.1\r\nhost: shop\r\ncontent-length: 4\r\n\r\nab")
        await trio.sleep(1.0)
        app.send(b"cd")
        server = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        assert server.read().endswith(b"\r\n\r\nabcd")
        server.send(OK)


async def test_an_asynchronous_reply(autojump_clock):
    async with network(Wait(reply=Reply(429, "slow down", reason="rate_limited"))) as net:
        app = net.caller()
        app.send(GET * 2)
        await trio.sleep(4.1)
        assert app.read().count(b"x-pillion-reason: rate_limited") == 2 and net.dials == 0


@pytest.mark.parametrize(("closed", "status"), [(True, b"500"), (False, b"200")])
@pytest.mark.parametrize("how", ["raises", "too slow"])
async def test_an_asynchronous_filter_that_fails(autojump_clock, closed, status, how):
    filter_ = Wait(wait_s=9.0) if how == "too slow" else Wait(fails=True)
    async with network(filter_, closed=closed) as net:
        app = net.caller()
        app.send(GET)
        await trio.sleep(5.1)
        if not closed:
            server = await net.accepted()
            server.send(OK)
        await trio.testing.wait_all_tasks_blocked()
        assert app.read().startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_caller_that_leaves_cancels_the_filter(autojump_clock, how):
    wait = Wait()
    async with network(wait) as net:
        app = net.caller()
        app.send(GET)
        await trio.sleep(1.0)
        getattr(app, how)()
        await trio.testing.wait_all_tasks_blocked()
        assert wait.ended == ["cancelled"] and net.log == [(499, "caller_gone")] and net.dials == 0


async def test_a_caller_that_leaves_before_the_filter_has_begun(autojump_clock):
    wait = Wait()
    async with network(wait) as net:
        app = net.caller()
        app.send(GET)
        app.reset()
        await trio.sleep(3.0)
        assert wait.ended in ([], ["cancelled"]) and net.log == [(499, "caller_gone")]


async def test_a_response_waits_for_its_filter_however_long_the_total_is(autojump_clock):
    """The total ends with the response head; what comes after it is the filter's own limit."""
    async with network(WaitResponse(), timeouts=Timeouts(total_s=1.0)) as net:
        app = net.caller()
        app.send(GET)
        server = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        server.send(OK)
        await trio.sleep(1.9)
        assert app.read() == b"" and app.ended is None
        await trio.sleep(0.2)
        assert app.read() == OK


async def test_a_response_body_waits_with_its_head(autojump_clock):
    async with network(WaitResponse()) as net:
        app = net.caller()
        app.send(GET)
        server = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        server.send(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nab")
        server.send(b"cd")
        await trio.sleep(3.0)
        server.send(b"ef")
        assert app.read().endswith(b"\r\n\r\nabcdef")


async def test_a_response_that_is_cut_while_its_filter_waits(autojump_clock):
    async with network(WaitResponse()) as net:
        app = net.caller()
        app.send(GET)
        server = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        server.send(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nab")
        server.reset()
        await trio.sleep(3.0)
        assert app.ended == "reset"
        assert net.log == [(0, "cut_short")]


@pytest.mark.parametrize("whole", [True, False])
async def test_a_caller_that_leaves_while_a_response_filter_waits(autojump_clock, whole):
    wait = WaitResponse()
    async with network(wait) as net:
        app = net.caller()
        app.send(GET)
        server = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        server.send(OK if whole else OK[:-1])
        await trio.sleep(1.0)
        app.reset()
        await trio.sleep(3.0)
        assert wait.ended == ["cancelled"] and net.log == [(499, "caller_gone")]
        assert net.timers() == 0


@pytest.mark.parametrize("fails", [True, False])
async def test_an_asynchronous_reply_in_place_of_a_response(autojump_clock, fails):
    async with network(WaitResponse(reply=Reply(418, "tea"), fails=fails)) as net:
        app = net.caller()
        app.send(GET)
        server = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        server.send(OK)
        await trio.sleep(3.0)
        assert app.read().startswith(b"HTTP/1.1 500 " if fails else b"HTTP/1.1 418 ")


# Bodies


async def test_bodies_are_changed_and_reframed(autojump_clock):
    async with network(Upper()) as net:
        put = b"PUT / HTTP/1.1\r\nhost: shop\r\ncontent-length: 3\r\n\r\nabc"
        got, answer = await ask(net, put)
        assert b"transfer-encoding: chunked" in got and got.endswith(b"\r\n\r\n4\r\nABC!\r\n0\r\n\r\n")
        assert b"content-length" not in got and b"content-length" not in answer
        assert answer.endswith(b"\r\n\r\n3\r\nOK!\r\n0\r\n\r\n")


async def test_a_retry_sends_again_what_the_filter_made(autojump_clock):
    retry = Retry(base_s=0.0, max_s=0.0)
    async with network(Upper(), retry=retry) as net:
        app = net.caller()
        app.send(b"PUT / HTTP/1.1\r\nhost: shop\r\ncontent-length: 3\r\n\r\nabc")
        first = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        one = first.read().partition(b"\r\n\r\n")[2]
        first.reset()
        second = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        assert second.read().partition(b"\r\n\r\n")[2] == one == b"4\r\nABC!\r\n0\r\n\r\n"
        second.send(OK)


@pytest.mark.parametrize("request_", [GET, GET.replace(b"GET", b"HEAD")])
async def test_without_a_body_nothing_is_reframed(autojump_clock, request_):
    async with network(Upper()) as net:
        got, answer = await ask(net, request_, b"HTTP/1.1 204 No Content\r\n\r\n")
        assert b"chunked" not in got and got.endswith(b"\r\n\r\n")
        assert answer == b"HTTP/1.1 204 No Content\r\n\r\n"


async def test_a_request_body_hook_that_raises(autojump_clock):
    async with network(BrokenRequestData()) as net:
        app = net.caller()
        app.send(b"PUT / HTTP/1.1\r\nhost: shop\r\ncontent-length: 3\r\n\r\nabc")
        await trio.testing.wait_all_tasks_blocked()
        assert app.read().startswith(b"HTTP/1.1 500 ") and net.dials == 0
        app = net.caller()
        app.send(b"PUT / HTTP/1.1\r\nhost: shop\r\ncontent-length: 3\r\n\r\n")
        server = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        app.send(b"abc")
        await trio.testing.wait_all_tasks_blocked()
        assert app.read().startswith(b"HTTP/1.1 500 ") and server.ended is not None


async def test_a_response_body_hook_that_raises_before_the_head_has_gone(autojump_clock):
    async with network(BrokenData()) as net:
        _, answer = await ask(net)
        assert answer.startswith(b"HTTP/1.1 500 ") and b"filter_error" in answer
        assert net.log == [(500, "filter_error")]


async def test_a_response_body_hook_that_raises_later_cuts(autojump_clock):
    async with network(BrokenData(after=1)) as net:
        app = net.caller()
        app.send(GET)
        server = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        server.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nab")
        server.send(b"cd")
        await trio.testing.wait_all_tasks_blocked()
        assert app.ended == "reset" and not app.read().endswith(b"cd")
        assert net.log == [(0, "filter_error")] and server.ended is not None


async def test_body_hooks_that_fail_open_pass_the_bytes(autojump_clock):
    async with network(BrokenData(), closed=False) as net:
        _, answer = await ask(net)
        assert answer.endswith(b"2\r\nok\r\n0\r\n\r\n")


async def test_chains_count_who_uses_them(autojump_clock):
    async with network(Header()) as net:
        (chain,) = net.world.plans.chains
        app = net.caller()
        app.send(GET)
        server = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        assert chain.active == 1
        server.send(OK)
        assert chain.active == 0
        app.send(GET)
        app.reset()
        assert chain.active == 0


async def test_inbound_filters_know_the_caller(autojump_clock):
    async with network(Header(), side="in") as net:
        peer = net.mesh_caller("front")
        peer.send(b"GET / HTTP/1.1\r\nhost: web\r\n\r\n")
        inside = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        assert b"x-tenant: front\r\n" in inside.read()
        inside.send(OK)
        await trio.testing.wait_all_tasks_blocked()
        assert b"x-route: default" in peer.read()


async def test_a_counted_body_that_is_sent_on_in_chunks_is_still_read_as_counted(autojump_clock):
    """However it comes, and whatever was read on that connection before."""
    async with network(Upper()) as net:
        app = net.caller()
        app.send(b"PUT / HTTP/1.1\r\nhost: shop\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n")
        server = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        server.send(OK)
        server.read()
        app.send(b"PUT / HTTP/1.1\r\nhost: shop\r\ncontent-length: 16\r\n\r\n")
        for part in (b"5\r\nGET", b" / \r\n0", b"\r\n\r\n"):
            app.send(part)
        await trio.testing.wait_all_tasks_blocked()
        head, _, body = server.read().partition(b"\r\n\r\n")
        assert head.startswith(b"PUT") and body == b"6\r\n5\r\nGET\r\n6\r\n / \r\n0\r\n5\r\n\r\n\r\n!\r\n0\r\n\r\n"
        server.send(OK)
