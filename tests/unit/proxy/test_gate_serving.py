"""Requests at the gate before the own application, on the data path in memory: none keeps a place that it should not,
and whoever waits is called up, refused or forgotten."""

import gc

import pytest
import trio
import trio.testing
from support.http2_caller import Http2Caller
from support.memory_net import Net, Peer, memory_world

from sidecar.api import Filter, Reply
from sidecar.model.snapshot import Concurrency, Port, Priority, Protocol, Route, Service, Snapshot
from sidecar.policy.overload import Gate, Ticket
from sidecar.proxy.filtering import Chain, Link
from sidecar.proxy.serving import Serving
from sidecar.testing import make_context

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
ONE = Concurrency(most=1, queue=2, queue_timeout_s=10.0)
GRPC = (b"content-type", b"application/grpc")


def own(
    limit: Concurrency | None, protocol: Protocol = Protocol.HTTP, upgrade: frozenset[str] = frozenset()
) -> Snapshot:
    ports = (Port("http", 80, protocol),)
    routes = (Route("default", upgrade=upgrade),)
    return Snapshot({"web": Service("web", ports, routes=routes, concurrency=limit), "front": Service("front")})


def request(method: bytes = b"GET", fields: bytes = b"", body: bytes = b"") -> bytes:
    return b"%b / HTTP/1.1\r\nhost: web\r\n%b\r\n%b" % (method, fields, body)


def gate_of(net: Net) -> Gate:
    return net.world.state.gates["web"]


async def quiet() -> None:
    await trio.testing.wait_all_tasks_blocked()


async def led(net: Net, peer: Peer, data: bytes = b"") -> Peer:
    """Send a request that goes on; the application's end of its connection."""
    peer.send(data or request())
    inside = await net.accepted()
    await quiet()
    return inside


def at(net: Net) -> tuple[int, int]:
    gate = gate_of(net)
    return gate.in_flight, gate.waiting


async def test_what_a_mirror_sends_waits_behind_everybody(autojump_clock):
    async with memory_world(own(ONE)) as net:
        inside = await led(net, net.mesh_caller("front"))
        copy, real = net.mesh_caller("front"), net.mesh_caller("front")
        copy.send(request(fields=b"x-pillion-mirror: 1\r\n"))
        await quiet()
        real.send(request())
        await quiet()
        inside.send(OK)
        await quiet()
        inside.send(OK)
        await quiet()
        assert (real.read(), copy.read()) == (OK, b"")
        inside.send(OK)
        await quiet()
        assert copy.read() == OK


async def test_a_place_is_handed_on_with_the_last_byte(autojump_clock):
    async with memory_world(own(ONE)) as net:
        first, second = net.mesh_caller("front"), net.mesh_caller("front")
        inside = await led(net, first)
        second.send(request())
        await quiet()
        assert at(net) == (1, 1) and net.pending() == 0
        inside.send(OK[:-1])
        await quiet()
        assert at(net) == (1, 1)
        inside.send(OK[-1:])
        await quiet()
        assert first.read() == OK and at(net) == (1, 0)
        inside.read()
        inside.send(OK)
        await quiet()
        assert second.read() == OK and at(net) == (0, 0)


async def test_whoever_waits_too_long_is_refused_at_the_moment(autojump_clock):
    async with memory_world(own(Concurrency(most=1, queue=2, queue_timeout_s=0.1))) as net:
        inside = await led(net, net.mesh_caller("front"))
        begun = trio.current_time()
        late = net.mesh_caller("front")
        late.send(request())
        answer = await late.until()
        assert trio.current_time() - begun == pytest.approx(0.1)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"\r\nx-pillion-reason: overflow\r\n" in answer
        assert b"\r\nretry-after: 1\r\n" in answer
        assert at(net) == (1, 0) and gate_of(net).shed_why["late"] == 1
        inside.send(OK)


async def test_or_when_its_own_time_is_up(autojump_clock):
    async with memory_world(own(ONE)) as net:
        inside = await led(net, net.mesh_caller("front"))
        begun = trio.current_time()
        late = net.mesh_caller("front")
        late.send(request(fields=b"x-request-deadline-ms: 300\r\n"))
        assert (await late.until()).startswith(b"HTTP/1.1 503 ")
        assert trio.current_time() - begun == pytest.approx(0.3)
        inside.send(OK)


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_who_leaves_the_queue_makes_room_and_is_never_sent(autojump_clock, how):
    async with memory_world(own(ONE)) as net:
        inside = await led(net, net.mesh_caller("front"))
        gone, stays = net.mesh_caller("front"), net.mesh_caller("front")
        gone.send(request())
        stays.send(request())
        await trio.sleep(5.0)  # an end right behind the request might be that of a caller which still reads
        getattr(gone, how)()
        await quiet()
        assert at(net) == (1, 1)
        inside.send(OK)
        await quiet()
        inside.send(OK)
        await quiet()
        assert stays.read() == OK and at(net) == (0, 0)
        assert sorted(net.log) == [(200, "ok"), (200, "ok"), (499, "caller_gone")]


async def test_a_stream_that_is_reset_while_it_waits(autojump_clock):
    async with memory_world(own(ONE)) as net:
        caller = Http2Caller(net, "front")
        first, second, third = (caller.ask(host="web") for _ in range(3))
        inside = await net.accepted()
        await quiet()
        assert at(net) == (1, 2)
        second.reset()
        await quiet()
        assert at(net) == (1, 1)
        inside.send(OK)
        await quiet()
        inside.send(OK)
        await quiet()
        caller.settle()
        assert first.body == third.body == b"ok" and at(net) == (0, 0)


async def test_a_connection_that_goes_takes_all_its_waiting_streams_along(autojump_clock):
    async with memory_world(own(ONE)) as net:
        caller = Http2Caller(net, "front")
        for _ in range(3):
            caller.ask(host="web")
        await net.accepted()
        await quiet()
        caller.peer.reset()
        await quiet()
        assert at(net) == (0, 0) and net.log == [(499, "caller_gone")] * 3


async def test_an_upload_waits_unread_and_arrives_whole(autojump_clock):
    body = b"x" * 300_000
    head = request(b"POST", b"content-length: %d\r\n" % len(body))
    async with memory_world(own(ONE)) as net:
        inside = await led(net, net.mesh_caller("front"))
        upload = net.mesh_caller("front")
        upload.send(head)
        upload.send(body[:100_000])
        upload.send(body[100_000:])
        await quiet()
        (waiting,) = [each.serving for each in net.world.downstreams if each.serving and each.serving.waiting_filter]
        assert sum(map(len, waiting.m.body)) <= 100_000  # the rest is still in the socket
        inside.read()
        inside.send(OK)
        await quiet()
        assert inside.read().endswith(body)
        inside.send(OK)
        await quiet()
        assert upload.read() == OK


async def test_calls_of_grpc_are_refused_by_a_status_and_give_their_place_back_at_the_head(autojump_clock):
    limit = Concurrency(most=1, queue=0)
    async with memory_world(own(limit, Protocol.GRPC)) as net:
        caller = Http2Caller(net, "front")
        fields = [GRPC, (b"te", b"trailers")]
        caller.ask("/s.S/M", "web", "POST", fields, b"\0\0\0\0\0")
        refused = caller.ask("/s.S/M", "web", "POST", fields, b"\0\0\0\0\0")
        await quiet()
        caller.settle()
        assert refused.status == 200 and refused.headers[b"grpc-status"] == b"14"  # UNAVAILABLE
        assert refused.reason == b"overflow" and b"retry-after" not in refused.headers
        assert at(net) == (1, 0)
        caller.peer.reset()
        await quiet()
        assert at(net) == (0, 0)


@pytest.mark.parametrize("head", [
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
])  # fmt: skip
async def test_what_has_no_end_keeps_no_place(autojump_clock, head):
    async with memory_world(own(ONE), at_rest=False) as net:
        fields = b"connection: upgrade\r\nupgrade: websocket\r\n" if b" 101 " in head else b""
        inside = await led(net, net.mesh_caller("front"), request(fields=fields))
        assert at(net) == (1, 0)
        inside.send(head)
        await quiet()
        assert at(net) == (0, 0)
        inside.reset()
        await quiet()
        assert at(net) == (0, 0)


async def test_an_application_that_breaks_off_gives_the_place_back(autojump_clock):
    async with memory_world(own(ONE)) as net:
        peer, waits = net.mesh_caller("front"), net.mesh_caller("front")
        inside = await led(net, peer, request(b"POST", b"content-length: 0\r\n"))
        waits.send(request(b"POST", b"content-length: 0\r\n"))
        inside.reset()
        inside = await net.accepted()
        await quiet()
        assert peer.read().startswith(b"HTTP/1.1 502 ") and at(net) == (1, 0)
        inside.send(OK)


async def test_what_is_over_is_freed_without_the_collector(autojump_clock):
    """It would cost more than the gate itself."""
    async with memory_world(own(ONE)) as net:
        peer, other = net.mesh_caller("front"), net.mesh_caller("front")
        inside = await led(net, peer)
        gc.collect()
        gc.disable()
        try:
            for _ in range(20):
                other.send(request())
                await quiet()
                inside.send(OK)
                await quiet()
                inside.send(OK)
                await quiet()
                assert (peer.read(), other.read()) == (OK, OK)
                peer.send(request())
                await quiet()
            assert sum(isinstance(each, Ticket) for each in gc.get_objects()) <= 2
        finally:
            gc.enable()
        inside.send(OK)


# Policies


@pytest.mark.parametrize("limit", [None, Concurrency(most=3), Concurrency(adaptive=True, least=3)])
async def test_a_new_policy_with_room_lets_all_that_wait_go_on(autojump_clock, limit):
    async with memory_world(own(ONE)) as net:
        peers = [net.mesh_caller("front") for _ in range(3)]
        for peer in peers:
            peer.send(request())
        gate = gate_of(net)
        await quiet()
        assert (gate.in_flight, gate.waiting) == (1, 2)
        net.apply(own(limit))
        for inside in [await net.accepted() for _ in range(3)]:
            inside.send(OK)
        await quiet()
        assert [peer.read() for peer in peers] == [OK] * 3
        assert (gate.in_flight, gate.waiting) == (0, 0)


async def test_a_policy_without_more_room_keeps_them_and_their_classes(autojump_clock):
    classes = (Priority("high", callers=frozenset({"vip"})), Priority("default"))
    async with memory_world(own(Concurrency(most=1, queue=2, queue_timeout_s=10.0, priorities=classes))) as net:
        inside = await led(net, net.mesh_caller("front"))
        low, high = net.mesh_caller("front"), net.mesh_caller("vip")
        low.send(request())
        high.send(request())
        await quiet()
        other = (Priority("new", callers=frozenset({"x"})), *classes)
        net.apply(own(Concurrency(most=1, queue=0, queue_timeout_s=10.0, priorities=other)))
        await quiet()
        assert at(net) == (1, 2)
        inside.send(OK)
        await quiet()
        inside.send(OK)
        await quiet()
        assert high.read() == OK and low.read() == b""
        inside.send(OK)
        await quiet()
        assert low.read() == OK and at(net) == (0, 0)


# Mistakes


async def test_a_bug_on_the_way_in_ends_that_request_alone_and_frees_its_place(autojump_clock, monkeypatch):
    async with memory_world(own(ONE)) as net:
        inside = await led(net, net.mesh_caller("front"))
        hurt, well = net.mesh_caller("front"), net.mesh_caller("front")
        hurt.send(request(b"DELETE"))
        well.send(request())
        await quiet()
        let_in = Serving.let_in

        def planted(self: Serving) -> None:
            if self.m.method == b"DELETE":
                raise RuntimeError("a bug")
            let_in(self)

        monkeypatch.setattr(Serving, "let_in", planted)
        net.world.reactor.on_crash = (crashes := []).append
        inside.send(OK)
        await quiet()
        assert hurt.ended is not None and len(crashes) == 1
        inside.send(OK)
        await quiet()
        assert well.read() == OK and at(net) == (0, 0)


class Early(Filter):
    """Answers in the application's place, on the way in or back."""

    def __init__(self, where: str) -> None:
        super().__init__(None)
        self.where = where

    def on_request(self, request: object) -> Reply | None:
        return Reply(418, "tea") if self.where == "request" else None

    def on_response(self, request: object, response: object) -> Reply | None:
        return Reply(418, "tea") if self.where == "response" else None


@pytest.mark.parametrize(("where", "started"), [("request", 0), ("response", 1)])
async def test_a_filter_that_answers_leaves_no_place_behind(autojump_clock, where, started):
    def chain(net: Net) -> Chain:
        links = [Link(Early(where), "early", False, make_context(clock=trio.current_time))]
        return Chain(links, net.world.meters.service("in", "web"), net.world.note)

    async with memory_world(own(ONE), chains={("in", "web"): chain}) as net:
        peer = net.mesh_caller("front")
        peer.send(request())
        if where == "response":
            (await net.accepted()).send(OK)
        answer = await peer.until()
        assert answer.startswith(b"HTTP/1.1 418 ")
        assert gate_of(net).started == started and at(net) == (0, 0)
