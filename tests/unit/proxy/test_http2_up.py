"""Requests on HTTP/2 connections to endpoints, against a scripted server on memory channels. Virtual time."""

from typing import Any

import pytest
import trio
import trio.testing
from support import http2_frames as h2
from support.memory_net import DialError, Net, Peer, memory_world

from sidecar.model.snapshot import EndpointSpec, Limits, Port, Protocol, Retry, Route, Service, Snapshot, Timeouts, Tls
from sidecar.proxy.connect import OtherProtocol
from sidecar.proxy.http2_up import PONG_S, SILENT_S
from sidecar.proxy.streams import STAY_S

GET = b"GET /%d HTTP/1.1\r\nhost: shop\r\n\r\n"
POST = b"POST /%d HTTP/1.1\r\nhost: shop\r\ncontent-length: 2\r\n\r\nhi"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
OK1 = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.fixture(params=["ngh2", "h2"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def network(
    *, tls: Tls = Tls.PLAIN, protocol: Protocol = Protocol.HTTP2, engine: str = "ngh2", endpoints: int = 1, **more: Any
) -> Any:
    route: dict[str, Any] = {"retry": more.pop("retry", Retry(max_retries=0))}
    route["timeouts"] = more.pop("timeouts", Timeouts(total_s=60.0))
    route["upgrade"] = frozenset({"websocket"})
    shop = Service(
        "shop",
        ports=(Port("http", 80, protocol),),
        endpoints=tuple(EndpointSpec(f"10.0.0.{n + 1}", 1, tls=tls) for n in range(endpoints)),
        routes=(Route("default", **route),),
        limits=Limits(more.pop("connections", 1024), more.pop("pending", 1024)),
        **more,
    )
    web = Service("web", routes=(Route("default"),))
    return memory_world(Snapshot({"web": web, "shop": shop}), http2_engine=engine)


async def quiet() -> None:
    await trio.testing.wait_all_tasks_blocked()


class Server:
    """The other end of one HTTP/2 connection, by frames."""

    def __init__(self, peer: Peer, settings: dict[int, int] | None = None, greet: bool = True) -> None:
        self.peer = peer
        self.parser = h2.Parser(preface=True)
        self.frames: list[h2.Frame] = []
        if greet:
            peer.send(h2.settings(settings or {h2.MAX_CONCURRENT_STREAMS: 100}) + h2.settings(ack=True))

    async def take(self, kind: int | None = None) -> list[h2.Frame]:
        """What has come since the last call, of this kind."""
        await quiet()
        frames = self.parser.feed(self.peer.read())
        return [frame for frame in frames if kind is None or frame.kind == kind]

    async def requests(self) -> dict[int, dict[bytes, bytes]]:
        return {frame.sid: dict(frame.fields) for frame in await self.take(h2.HEADERS)}

    def answer(self, sid: int, body: bytes = b"ok", status: int = 200) -> None:
        head = h2.headers(sid, h2.response(status, [(b"content-length", b"%d" % len(body))]))
        self.peer.send(head + h2.data(sid, body, end=True))


async def serve(net: Net, **options: Any) -> Server:
    server = Server(await net.accepted(), **options)
    await quiet()
    return server


async def callers(net: Net, count: int, request: bytes = GET) -> list[Peer]:
    apps = []
    for n in range(count):
        apps.append(net.caller())
        apps[-1].send(request % n)
        await quiet()
    return apps


async def test_many_requests_share_one_connection(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine) as net:
        apps = await callers(net, 20)
        assert net.dials == 1
        server = await serve(net)
        assert server.peer.alpn == "h2"
        asked = await server.requests()
        assert [fields[b":path"] for fields in asked.values()] == [b"/%d" % n for n in range(20)]
        first = next(iter(asked.values()))
        assert first[b":method"] == b"GET" and first[b":authority"] == b"shop" and first[b":scheme"] == b"http"
        for sid in reversed(asked):
            server.answer(sid)
        assert [app.read() for app in apps] == [OK] * 20
        assert net.cluster("shop").connections == 1 and net.log == [(200, "ok")] * 20


async def test_nothing_is_sent_before_the_peers_settings(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine) as net:
        (app,) = await callers(net, 1, POST)
        server = Server(await net.accepted(), greet=False)
        assert all(frame.kind in (h2.SETTINGS, h2.WINDOW_UPDATE) for frame in await server.take())
        server.peer.send(h2.settings())
        frames = await server.take()
        assert [frame.name for frame in frames if frame.sid] == ["HEADERS", "DATA"]
        assert frames[-1].data == b"hi" and frames[-1].end_stream
        server.answer(1)
        assert app.read() == OK


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n", b"", None])
async def test_an_application_that_does_not_speak_http2(autojump_clock: Any, engine: str, answer: bytes | None) -> None:
    async with network(engine=engine) as net:
        (app,) = await callers(net, 1, POST)
        server = Server(await net.accepted(), greet=False)
        if answer:
            server.peer.send(answer)
        if answer is not None:
            server.peer.close()
        else:
            await trio.sleep(5.1)
        await quiet()
        assert b"x-pillion-reason: connect_failed" in app.read()
        assert "declare the port's protocol as http" in net.notes[-1][1]
        assert not any(frame.sid for frame in await server.take())


async def test_a_failed_dial_is_told_to_all_who_wait(autojump_clock: Any) -> None:
    async with network() as net:
        net.on_dial = lambda endpoint: DialError("refused")
        apps = await callers(net, 1)
        assert b"connect_failed" in apps[0].read()

        async def late(endpoint: Any) -> Any:
            await trio.sleep(1.0)
            return DialError("refused")

        net.on_dial = late
        apps = await callers(net, 5)
        await trio.sleep(1.1)
        assert all(b"connect_failed" in app.read() for app in apps) and net.dials == 2


async def test_streams_at_the_peers_limit_wait_for_another_connection(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine) as net:
        apps = await callers(net, 5)
        few = {h2.MAX_CONCURRENT_STREAMS: 2}
        servers = [await serve(net, settings=few) for _ in range(3)]
        asked = [await server.requests() for server in servers]
        assert [len(requests) for requests in asked] == [2, 2, 1] and net.dials == 3
        for server, requests in zip(servers, asked, strict=True):
            for sid in requests:
                server.answer(sid)
        assert [app.read() for app in apps] == [OK] * 5


async def test_at_the_limit_of_connections_who_waits_gets_the_next_stream(autojump_clock: Any) -> None:
    async with network(connections=1, pending=2) as net:
        apps = await callers(net, 1)
        server = await serve(net, settings={h2.MAX_CONCURRENT_STREAMS: 1})
        assert list(await server.requests()) == [1]
        apps += await callers(net, 3)
        assert b"x-pillion-reason: overflow" in apps[3].read() and net.dials == 1
        for sid in (1, 3, 5):
            server.answer(sid)
            await quiet()
        assert [app.read() for app in apps[:3]] == [OK] * 3 and len(await server.requests()) == 2


async def test_bodies_and_trailers_both_ways(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine) as net:
        app = net.caller()
        app.send(
            b"POST /up HTTP/1.1\r\nhost: shop\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n4\r\nabcd\r\n"
        )
        server = await serve(net)
        frames = [frame for frame in await server.take() if frame.sid]
        assert b"content-length" not in dict(frames[0].fields)
        assert b"".join(frame.data for frame in frames[1:]) == b"abcd" and not frames[-1].end_stream
        app.send(b"2\r\nef\r\n0\r\nx-sum: 6\r\n\r\n")
        frames = [frame for frame in await server.take() if frame.sid]
        assert frames[0].data == b"ef" and frames[1].fields == [(b"x-sum", b"6")] and frames[1].end_stream
        server.peer.send(h2.headers(1, h2.response(103, [(b"link", b"</a>")])))
        server.peer.send(h2.headers(1, h2.response(200)) + h2.data(1, b"one"))
        await quiet()
        got = app.read()
        assert got.startswith(b"HTTP/1.1 103 ") and b"3\r\none\r\n" in got
        server.peer.send(h2.data(1, b"two") + h2.headers(1, [(b"x-sum", b"6")], end=True))
        assert app.read() == b"3\r\ntwo\r\n0\r\nx-sum: 6\r\n\r\n"


async def test_head_requests_and_responses_without_content(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine) as net:
        app = net.caller()
        app.send(b"HEAD / HTTP/1.1\r\nhost: shop\r\n\r\n")
        server = await serve(net)
        server.peer.send(h2.headers(1, h2.response(200, [(b"content-length", b"77")]), end=True))
        assert app.read() == b"HTTP/1.1 200 OK\r\ncontent-length: 77\r\n\r\n"
        for sid, status in ((3, 204), (5, 304)):
            app.send(GET % 1)
            await quiet()
            server.peer.send(h2.headers(sid, h2.response(status), end=True))
            await quiet()
            assert app.read().startswith(b"HTTP/1.1 %d" % status)
        app.send(GET % 1)
        await quiet()
        server.peer.send(h2.headers(7, h2.response(200), end=True))
        assert b"content-length: 0" in app.read()


async def test_a_slow_server_stops_the_callers_upload_and_nobody_elses(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine) as net:
        app, other = net.caller(), net.caller()
        app.send(b"POST / HTTP/1.1\r\nhost: shop\r\ncontent-length: 2000000\r\n\r\n")
        server = await serve(net)
        sent = 0
        while app.channel is not None and app.channel.reading and sent < 2_000_000:
            app.send(bytes(50_000))
            sent += 50_000
            await quiet()
        assert 300_000 <= sent <= 500_000
        got = sum(len(frame.data) for frame in await server.take(h2.DATA))
        assert got == 65535
        other.send(GET % 1)
        await quiet()
        server.answer(3)
        assert other.read() == OK
        while sent < 2_000_000 or got < 2_000_000:
            assert app.channel is not None
            if app.channel.reading and sent < 2_000_000:
                app.send(bytes(50_000))
                sent += 50_000
            server.peer.send(h2.window_update(0, 60_000) + h2.window_update(1, 60_000))
            got += sum(len(frame.data) for frame in await server.take(h2.DATA))
        server.answer(1)
        assert app.read() == OK


async def test_a_slow_caller_stops_its_stream_and_nobody_elses(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine) as net:
        slow, other = net.caller(window=1000), net.caller()
        slow.send(GET % 0)
        server = await serve(net)
        server.peer.send(h2.headers(1, h2.response(200)))
        window, sent = 65536, 0
        await quiet()
        while window >= 16384 and sent < 2_000_000:
            server.peer.send(h2.data(1, bytes(16384)))
            sent += 16384
            window -= 16384
            for frame in await server.take(h2.WINDOW_UPDATE):
                window += frame.increment if frame.sid == 1 else 0
        assert 256 * 1024 <= sent <= 450 * 1024
        other.send(GET % 1)
        await quiet()
        server.answer(3)
        assert other.read() == OK
        slow.accept()
        await quiet()
        server.peer.send(h2.data(1, b"end", end=True))
        assert slow.read().endswith(b"3\r\nend\r\n0\r\n\r\n")


async def test_a_caller_that_leaves_cancels_its_stream(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine) as net:
        apps = await callers(net, 2)
        server = await serve(net)
        await server.take()
        apps[0].reset()
        (reset,) = await server.take(h2.RST_STREAM)
        assert (reset.sid, reset.code) == (1, 8)
        server.answer(3)
        assert apps[1].read() == OK


async def test_a_reset_before_the_head_and_after_it(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine) as net:
        apps = await callers(net, 2)
        server = await serve(net)
        server.peer.send(h2.rst_stream(1, 2))
        server.peer.send(h2.headers(3, h2.response(200)) + h2.data(3, b"part") + h2.rst_stream(3, 2))
        await quiet()
        assert b"x-pillion-reason: upstream_reset" in apps[0].read()
        assert b"part" in apps[1].read() and apps[1].ended == "reset"
        assert net.log == [(502, "upstream_reset"), (0, "cut_short")]


@pytest.mark.parametrize("by", ["stream", "connection"])
async def test_a_response_that_breaks_the_protocol(autojump_clock: Any, engine: str, by: str) -> None:
    async with network(engine=engine) as net:
        apps = await callers(net, 2)
        server = await serve(net)
        if by == "stream":
            server.peer.send(h2.headers(1, [(b":status", b"200"), (b"Upper", b"x")], end=True))
        else:
            server.peer.send(h2.frame(h2.HEADERS, 0, b"", 4))
        await quiet()
        assert b"x-pillion-reason: bad_response" in apps[0].read()
        assert "bad_response: from 10.0.0.1:1" in net.notes[0][1]
        if by == "stream":
            server.answer(3)
            assert apps[1].read() == OK
        else:
            assert b"x-pillion-reason: bad_response" in apps[1].read() and server.peer.ended


async def test_a_refused_stream_is_sent_again_also_a_post(autojump_clock: Any, engine: str) -> None:
    retry = Retry(max_retries=1, failures=frozenset())
    async with network(engine=engine, retry=retry) as net:
        (app,) = await callers(net, 1, POST)
        server = await serve(net)
        await server.take()
        server.peer.send(h2.rst_stream(1, 7))
        await trio.sleep(1.0)
        assert list(await server.requests()) == [3]
        server.answer(3)
        assert app.read() == OK
        endpoint = next(iter(net.cluster("shop").endpoints.values()))
        assert endpoint.failures == 0 and net.cluster("shop").retries == 1


async def test_a_goaway_refuses_what_lies_beyond_and_lets_the_rest_finish(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine) as net:
        apps = await callers(net, 3, POST)
        server = await serve(net)
        assert len(await server.requests()) == 3
        server.peer.send(h2.goaway(3))
        second = await serve(net)  # free of charge, on a new connection
        assert [fields[b":path"] for fields in (await second.requests()).values()] == [b"/2"]
        second.answer(1)
        server.answer(1)
        server.answer(3)
        await quiet()
        assert [app.read() for app in apps] == [OK] * 3
        assert server.peer.ended == "close" and net.cluster("shop").resends == 1 and not net.cluster("shop").retries
        apps[0].send(GET % 4)
        await quiet()
        assert list(await second.requests()) == [3]
        second.answer(3)


async def test_a_used_connection_that_dies_sends_safe_requests_again(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine) as net:
        apps = await callers(net, 1)
        server = await serve(net)
        server.answer(1)
        await quiet()
        gets, (post,) = await callers(net, 3), await callers(net, 1, POST)
        server.peer.reset()
        second = await serve(net)
        asked = await second.requests()
        assert sorted(fields[b":path"] for fields in asked.values()) == [b"/0", b"/1", b"/2"]
        for sid in asked:
            second.answer(sid)
        assert [app.read() for app in (*apps, *gets)] == [OK] * 4
        assert b"x-pillion-reason: upstream_reset" in post.read()


async def test_a_whole_response_survives_the_connection(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine) as net:
        slow = net.caller(window=100)
        slow.send(GET % 0)
        server = await serve(net)
        server.peer.send(h2.headers(1, h2.response(200, [(b"content-length", b"400000")])))
        left = 400_000
        window = 65536
        for _ in range(200):
            size = min(left, 16384, window)
            left -= size
            window -= size
            if size:
                server.peer.send(h2.data(1, bytes(size), end=not left))
            if not window and slow.window < 100_000:
                slow.accept(100_000)
            if not left:
                break
            for frame in await server.take(h2.WINDOW_UPDATE):
                window += frame.increment if frame.sid == 1 else 0
        server.peer.reset()
        await quiet()
        slow.accept()
        await quiet()
        assert len(slow.read().partition(b"\r\n\r\n")[2]) == 400_000


async def test_idle_connections_age_and_close_with_a_goaway(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine, pool_idle_s=4.0) as net:
        net.world.nursery.start_soon(net.world.sweep)
        apps = await callers(net, 1)
        server = await serve(net)
        server.answer(1)
        await trio.sleep(3.5)
        assert server.peer.ended is None
        await trio.sleep(2.0)
        assert server.peer.ended == "close" and [f.code for f in await server.take(h2.GOAWAY)] == [0]
        assert apps[0].read() == OK and net.cluster("shop").connections == 0


async def test_a_silent_connection_is_asked_and_given_up(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine, timeouts=Timeouts(total_s=2.0)) as net:
        apps = await callers(net, 1)
        server = await serve(net)
        await trio.sleep(2.1)
        assert b"timeout_total" in apps[0].read()
        assert [frame.ack for frame in await server.take(h2.PING)] == [False]
        apps[0].send(GET % 1)  # in doubt, another connection is made
        second = await serve(net)
        assert list(await second.requests()) == [1]
        second.answer(1)
        await trio.sleep(PONG_S)
        assert server.peer.ended == "reset" and second.peer.ended is None
        assert net.cluster("shop").connections == 1


async def test_a_silent_connection_that_answers_serves_on(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine, timeouts=Timeouts(total_s=2.0)) as net:
        apps = await callers(net, 1)
        server = await serve(net)
        await trio.sleep(2.1)
        (ping,) = await server.take(h2.PING)
        server.peer.send(h2.ping(ping.payload, ack=True))
        await trio.sleep(PONG_S + SILENT_S)
        apps[0].send(GET % 1)
        await quiet()
        server.answer(3)
        await quiet()
        assert apps[0].read().endswith(OK) and net.dials == 1


@pytest.mark.parametrize("kind", ["identity", "distrust"])
async def test_connections_of_a_banned_peer_end(autojump_clock: Any, kind: str) -> None:
    async with network(tls=Tls.MESH) as net:
        net.world.pool.multiplex_from = 1
        apps = await callers(net, 2)
        server = await serve(net)
        server.answer(1)
        await quiet()
        if kind == "identity":
            net.world.ban(["spiffe://mesh.local/service/shop"])
        else:
            net.call(net.world.distrust)
        apps[0].send(GET % 3)
        second = await serve(net)
        assert list(await second.requests()) == [1]
        await trio.sleep(5.0)
        assert server.peer.ended == "reset"
        assert list(await second.requests()) == [3]  # it had been used before: the other request is sent again
        second.answer(1)
        second.answer(3)
        assert [app.read()[-2:] for app in apps] == [b"ok"] * 2


async def test_endpoints_that_leave_take_their_connections_along(autojump_clock: Any) -> None:
    async with network() as net:
        apps = await callers(net, 1)
        server = await serve(net)
        services = dict(net.world.plans.snapshot.services)
        from dataclasses import replace

        services["shop"] = replace(services["shop"], endpoints=(EndpointSpec("10.9.9.9", 1, tls=Tls.PLAIN),))
        net.apply(Snapshot(services))
        server.answer(1)
        await quiet()
        assert apps[0].read() == OK and server.peer.ended == "close"


# Between sidecars


async def test_few_requests_have_connections_and_many_share_one(autojump_clock: Any) -> None:
    async with network(tls=Tls.MESH, protocol=Protocol.HTTP) as net:
        net.world.pool.multiplex_from = 3
        apps = await callers(net, 6)
        peers = [await net.accepted() for _ in range(3)]
        assert [peer.alpn for peer in peers] == ["http/1.1", "http/1.1", "h2"] and net.dials == 3
        server = Server(peers[2])
        asked = await server.requests()
        assert len(asked) == 4 and next(iter(asked.values()))[b":scheme"] == b"https"
        for peer in peers[:2]:
            peer.send(OK)
        for sid in asked:
            server.answer(sid)
        assert [app.read() for app in apps] == [OK] * 6


async def test_after_a_burst_streams_are_used_for_a_while(autojump_clock: Any) -> None:
    async with network(tls=Tls.MESH, protocol=Protocol.HTTP) as net:
        net.world.pool.multiplex_from = 2
        apps = await callers(net, 2)
        plain = await net.accepted()
        server = await serve(net)
        for sid in await server.requests():
            server.answer(sid)
        plain.send(OK)
        await quiet()
        apps[0].send(GET % 2)
        ((sid, fields),) = (await server.requests()).items()
        assert fields[b":path"] == b"/2"
        server.answer(sid)
        await trio.sleep(STAY_S)
        apps[0].send(GET % 3)
        assert await server.requests() == {}
        plain.send(OK)
        await quiet()
        assert apps[0].read() == OK * 3 and net.dials == 2


async def test_a_connection_that_comes_free_serves_who_waits_for_a_stream(autojump_clock: Any) -> None:
    async with network(tls=Tls.MESH, protocol=Protocol.HTTP) as net:
        net.world.pool.multiplex_from = 2
        apps = await callers(net, 2)
        first = await net.accepted()
        first.read()
        first.send(OK)
        await quiet()
        assert first.read().startswith(b"GET /1 ")
        first.send(OK)
        await quiet()
        assert [app.read() for app in apps] == [OK] * 2
        server = await serve(net)
        assert await server.requests() == {}


async def test_an_older_peer_is_spoken_to_in_http1(autojump_clock: Any) -> None:
    async with network(tls=Tls.MESH, protocol=Protocol.HTTP) as net:
        net.world.pool.multiplex_from = 1
        fates: list[Any] = [OtherProtocol("expected ALPN h2")]
        net.on_dial = lambda endpoint: fates.pop(0) if fates else None
        apps = await callers(net, 2)
        peers = [await net.accepted(), await net.accepted()]
        for peer in peers:
            assert peer.alpn == "http/1.1"
            peer.send(OK)
        await quiet()
        assert [app.read() for app in apps] == [OK] * 2 and net.dials == 3
        await trio.sleep(61.0)
        apps[0].send(GET % 3)  # the peer may have learnt it
        server = await serve(net)
        assert server.peer.alpn == "h2"
        server.answer(1)


async def test_upgrades_have_connections_of_their_own(autojump_clock: Any) -> None:
    async with network(tls=Tls.MESH, protocol=Protocol.HTTP) as net:
        net.world.pool.multiplex_from = 1
        app = net.caller()
        app.send(b"GET / HTTP/1.1\r\nhost: shop\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
        peer = await net.accepted()
        assert peer.alpn == "http/1.1" and b"upgrade: websocket" in peer.read()
        app.reset()


# Extended CONNECT

UPGRADE = (
    b"GET /chat HTTP/1.1\r\nhost: shop\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
)
SETTINGS = {h2.ENABLE_CONNECT_PROTOCOL: 1, h2.MAX_CONCURRENT_STREAMS: 100}


async def test_an_upgrade_becomes_an_extended_connect(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine) as net:
        app = net.caller()
        app.send(UPGRADE)
        server = await serve(net, settings=SETTINGS)
        (asked,) = (await server.requests()).values()
        assert asked[b":method"] == b"CONNECT" and asked[b":protocol"] == b"websocket"
        assert asked[b":path"] == b"/chat" and b"sec-websocket-key" not in asked
        server.peer.send(h2.headers(1, h2.response(200)) + h2.data(1, b"hello"))
        await quiet()
        got = app.read()
        assert got.startswith(b"HTTP/1.1 101 ") and got.endswith(b"\r\n\r\nhello")
        assert b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in got
        app.send(b"there")
        assert [frame.data for frame in await server.take(h2.DATA)] == [b"there"]
        other = net.caller()
        other.send(GET % 1)
        await quiet()
        server.answer(3)
        assert other.read() == OK
        app.reset()
        assert [frame.code for frame in await server.take(h2.RST_STREAM)] == [8]
        assert net.log[-1] == (101, "tunnel_cut") and not net.world.tunnels and server.peer.ended is None


async def test_an_upgrade_that_the_application_cannot_take(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine) as net:
        app = net.caller()
        app.send(UPGRADE)
        server = await serve(net)
        assert await server.requests() == {}
        got = app.read()
        assert got.startswith(b"HTTP/1.1 501 ") and b"extended CONNECT" in got


async def test_an_upgrade_that_the_application_refuses(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine) as net:
        app = net.caller()
        app.send(UPGRADE)
        server = await serve(net, settings=SETTINGS)
        server.answer(1, b"no", 403)
        assert app.read().startswith(b"HTTP/1.1 403 ")


async def test_a_tunnel_whose_connection_dies_is_cut(autojump_clock: Any, engine: str) -> None:
    async with network(engine=engine) as net:
        app = net.caller()
        app.send(UPGRADE)
        server = await serve(net, settings=SETTINGS)
        server.peer.send(h2.headers(1, h2.response(200)))
        await quiet()
        server.peer.reset()
        await quiet()
        assert app.ended == "reset" and net.log[-1] == (101, "tunnel_cut")
