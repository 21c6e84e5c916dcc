"""A route's `fallback` where the service that is asked has too much to do: what its instances shed, and what the
caller's own limits hold back."""

from typing import Any

import pytest
import trio
import trio.testing
from support.http2_caller import Http2Caller
from support.memory_net import Net, Peer, memory_world

from sidecar.model.snapshot import (
    EndpointSpec,
    Fallback,
    Limits,
    Port,
    Protocol,
    Respond,
    Retry,
    Route,
    Service,
    Snapshot,
    Tls,
)

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
SHED = (
    b"HTTP/1.1 503 Service Unavailable\r\nx-pillion-reason: overflow\r\nretry-after: 1\r\ncontent-length: 4\r\n\r\nfull"
)
OTHER = Fallback(service="spare")
FIXED = Fallback(respond=Respond(200, "[]"))
EAGER = Retry(max_retries=3, statuses=frozenset({503}), methods=frozenset({"any"}), base_s=0.0, max_s=0.0)


def network(fallback: Fallback | None, *, tls: Tls = Tls.MESH, protocol: Protocol = Protocol.HTTP, **shop: Any) -> Any:
    ports = (Port("http", 80, protocol),)
    routes = (Route("default", retry=EAGER, fallback=fallback),)
    versions = {"v1": {"version": "1"}}
    return memory_world(
        Snapshot(
            {
                "web": Service("web", routes=(Route("default"),)),
                "shop": Service("shop", ports, (EndpointSpec("10.0.0.1", 1, {"version": "1"}, tls=tls),), versions,
                                routes, **shop),
                "spare": Service("spare", ports, (EndpointSpec("10.0.0.9", 1),), routes=(Route("default"),)),
            }
        )
    )  # fmt: skip


async def asked(net: Net, app: Peer, data: bytes = b"GET / HTTP/1.1\r\nhost: shop\r\n\r\n") -> Peer:
    app.send(data)
    server = await net.accepted()
    await trio.testing.wait_all_tasks_blocked()
    return server


async def said(app: Peer) -> bytes:
    await trio.testing.wait_all_tasks_blocked()
    return app.read()


async def test_another_service_serves_what_was_shed_and_nothing_is_retried(autojump_clock):
    async with network(OTHER) as net:
        app = net.caller()
        server = await asked(net, app)
        server.send(SHED)
        spare = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        assert spare.endpoint.identity.endswith("/service/spare") and b"\r\nhost: spare\r\n" in spare.read()
        spare.send(OK)
        assert await said(app) == OK
        assert net.cluster("shop").retries == 0 and net.log == [(200, "ok")]
        assert server.ended is None  # its connection is as good as before


async def test_whatever_was_shed_may_be_sent_to_it_with_all_its_body(autojump_clock):
    body = b"x" * 40_000
    async with network(OTHER) as net:
        app = net.caller()
        server = await asked(net, app, b"POST / HTTP/1.1\r\nhost: shop\r\ncontent-length: 40000\r\n\r\n" + body)
        server.send(SHED)
        spare = await net.accepted()
        await trio.testing.wait_all_tasks_blocked()
        assert spare.read().endswith(body)
        spare.send(OK)
        assert await said(app) == OK


async def test_an_upload_that_is_shed_in_the_middle_goes_on_elsewhere(autojump_clock):
    async with network(OTHER) as net:
        app = net.caller()
        server = await asked(net, app, b"POST / HTTP/1.1\r\nhost: shop\r\ncontent-length: 6\r\n\r\nabc")
        server.send(SHED)
        spare = await net.accepted()
        app.send(b"def")
        await trio.testing.wait_all_tasks_blocked()
        assert spare.read().endswith(b"abcdef")
        spare.send(OK)
        assert await said(app) == OK


async def test_a_fixed_response_takes_the_place_of_the_overflow(autojump_clock):
    async with network(FIXED) as net:
        app = net.caller()
        server = await asked(net, app)
        server.send(SHED)
        answer = await said(app)
        assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n\r\n[]")
        assert b"x-pillion-reason" not in answer and net.log == [(200, "overflow")]
        assert net.cluster("shop").retries == 0 and server.ended is None


@pytest.mark.parametrize("fallback", [None, Fallback(version="v1")])
async def test_without_one_or_with_another_version_the_overflow_is_passed_on(autojump_clock, fallback):
    async with network(fallback) as net:
        app = net.caller()
        (await asked(net, app)).send(SHED)
        answer = await said(app)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"\r\nretry-after: 1\r\n" in answer
        assert b"\r\nx-pillion-reason: overflow\r\n" in answer


async def test_only_a_peer_of_the_mesh_is_believed(autojump_clock):
    async with network(FIXED, tls=Tls.PLAIN) as net:
        app = net.caller()
        server = await asked(net, app)
        for _ in range(4):  # it is a 503 like any other, and retried
            server.send(SHED)
            await trio.sleep(2.0)
            server.read()
        answer = await said(app)
        assert answer.startswith(b"HTTP/1.1 503 ") and answer.endswith(b"full")


@pytest.mark.parametrize("limits", [Limits(requests=1), Limits(connections=1, pending=0)])
async def test_what_the_own_limits_hold_back_goes_there_too(autojump_clock, limits):
    async with network(OTHER, limits=limits) as net:
        first, second = net.caller(), net.caller()
        server = await asked(net, first)
        spare = await asked(net, second)
        assert spare.endpoint.identity.endswith("/service/spare")
        spare.send(OK)
        server.send(OK)
        assert await said(second) == await said(first) == OK
        assert net.cluster("shop").overflows == 1


@pytest.mark.parametrize(("fallback", "status"), [(FIXED, b"2"), (None, b"14")])
async def test_a_call_of_grpc(autojump_clock, fallback, status):
    """A fixed response is no gRPC: its status is translated, as everywhere."""
    async with network(fallback, protocol=Protocol.GRPC) as net:
        caller, fields = Http2Caller(net), [(b"content-type", b"application/grpc"), (b"te", b"trailers")]
        call = caller.ask("/s.S/M", "shop", "POST", fields, b"\0\0\0\0\0")
        far = Far(await net.accepted())
        await far.shed()
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked()
            caller.settle()
        assert call.done and call.headers[b"grpc-status"] == status
        assert net.cluster("shop").retries == 0


class Far:
    """An instance's sidecar that sheds the one call of its connection."""

    def __init__(self, peer: Peer) -> None:
        from sidecar.wire.http2 import PEERS, open_codec

        self.peer, self.codec = peer, open_codec(True, PEERS, between_sidecars=True)

    async def shed(self) -> None:
        self.peer.send(self.codec.to_send())
        await trio.testing.wait_all_tasks_blocked()
        self.codec.receive(self.peer.read(), 0.0)
        (stream,) = [each for each in self.codec.take_news() if each.m is not None]
        head = [(b":status", b"200"), (b"content-type", b"application/grpc"), (b"grpc-status", b"14")]
        self.codec.respond(stream, [*head, (b"x-pillion-reason", b"overflow")], True)
        self.peer.send(self.codec.to_send())
