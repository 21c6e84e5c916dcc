"""HTTP/2 where its edges meet: limits of connections, windows, upgrades with content, bugs of one stream."""

import random
from typing import Any

import pytest
import trio
import trio.testing
from support import http2_frames as h2
from support.http2_caller import Http2Caller
from support.memory_net import Net, Peer, memory_world

from sidecar.model.snapshot import EndpointSpec, Limits, Port, Protocol, Retry, Route, Service, Snapshot, Timeouts, Tls
from sidecar.proxy.serving import Serving
from sidecar.wire.http2 import PREFACE, Http2Limits, Stream, open_codec

GET = b"GET /%d HTTP/1.1\r\nhost: shop\r\n\r\n"
OK1 = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
UPGRADE = (
    b" /chat HTTP/1.1\r\nhost: shop\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n"
)
SETTINGS = {h2.ENABLE_CONNECT_PROTOCOL: 1, h2.MAX_CONCURRENT_STREAMS: 100}


@pytest.fixture(params=["ngh2", "h2"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def network(engine: str = "ngh2", *, mesh: bool = False, endpoints: int = 1, connections: int = 1024) -> Any:
    shop = Service(
        "shop",
        ports=(Port("http", 80, Protocol.HTTP if mesh else Protocol.HTTP2),),
        endpoints=tuple(
            EndpointSpec(f"10.0.0.{n + 1}", 1, tls=Tls.MESH if mesh else Tls.PLAIN) for n in range(endpoints)
        ),
        routes=(
            Route(
                "default",
                retry=Retry(max_retries=0),
                timeouts=Timeouts(total_s=60.0),
                upgrade=frozenset({"websocket"}),
            ),
        ),
        limits=Limits(connections, 1024),
    )
    web = Service("web", routes=(Route("default"),))
    return memory_world(Snapshot({"web": web, "shop": shop}), http2_engine=engine)


async def quiet() -> None:
    await trio.testing.wait_all_tasks_blocked()


class Server:
    """The other end of an HTTP/2 connection, by frames."""

    def __init__(self, peer: Peer, settings: dict[int, int] | None = None) -> None:
        self.peer = peer
        self.parser = h2.Parser(preface=True)
        peer.send(h2.settings(SETTINGS if settings is None else settings) + h2.settings(ack=True))

    async def take(self) -> list[h2.Frame]:
        """The frames of streams that have come since the last call."""
        await quiet()
        return [frame for frame in self.parser.feed(self.peer.read()) if frame.sid]

    async def requests(self) -> dict[int, dict[bytes, bytes]]:
        return {frame.sid: dict(frame.fields) for frame in await self.take() if frame.kind == h2.HEADERS}

    def answer(self, sid: int, body: bytes = b"ok") -> None:
        head = h2.headers(sid, h2.response(200, [(b"content-length", b"%d" % len(body))]))
        self.peer.send(head + h2.data(sid, body, end=True))


async def serve(net: Net, settings: dict[int, int] | None = None) -> Server:
    server = Server(await net.accepted(), settings)
    await quiet()
    return server


async def ask(net: Net, data: bytes) -> Peer:
    app = net.caller()
    app.send(data)
    await quiet()
    return app


# -- which connection


async def test_a_server_that_takes_no_stream_is_dialled_once(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        app = await ask(net, GET % 1)
        server = await serve(net, {h2.MAX_CONCURRENT_STREAMS: 0})
        await trio.sleep(3.0)
        assert net.dials == 1 and not app.got
        server.peer.send(h2.settings({h2.MAX_CONCURRENT_STREAMS: 1}))  # it has only been starting
        (sid,) = await server.requests()
        server.answer(sid)
        assert app.read() == OK1


async def test_a_server_that_never_takes_a_stream_has_failed_to_connect(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        app = await ask(net, GET % 1)
        await serve(net, {h2.MAX_CONCURRENT_STREAMS: 0})
        await trio.sleep(10.0)
        assert b"x-pillion-reason: connect_failed" in app.read() and net.dials == 1
        assert "allow no stream" in net.notes[-1][1]


async def test_at_the_limit_a_stream_is_as_good_as_a_connection(autojump_clock: Any, engine: str) -> None:
    async with network(engine, mesh=True, connections=1) as net:
        caller = Http2Caller(net)
        grpc = [(b"content-type", b"application/grpc"), (b"te", b"trailers")]
        call = caller.ask(method="POST", extra=grpc, body=b"x", end=False)
        server = await serve(net)
        await server.requests()
        await trio.sleep(2.0)
        app = await ask(net, GET % 1)  # one request alone would have a connection of its own; the call goes on
        (sid,) = await server.requests()
        server.answer(sid)
        assert app.read() == OK1
        call.reset()


async def test_at_the_limit_an_upgrade_is_an_extended_connect(autojump_clock: Any, engine: str) -> None:
    async with network(engine, mesh=True, connections=1) as net:
        net.world.pool.multiplex_from = 1
        first = await ask(net, GET % 1)
        server = await serve(net)
        (busy,) = await server.requests()
        app = await ask(net, b"GET" + UPGRADE + b"\r\n")
        ((sid, asked),) = (await server.requests()).items()
        assert asked[b":protocol"] == b"websocket" and asked[b":path"] == b"/chat"
        server.peer.send(h2.headers(sid, h2.response(200)) + h2.data(sid, b"hello", end=True))
        await quiet()
        assert app.read().startswith(b"HTTP/1.1 101 ")
        server.answer(busy)
        assert first.read() == OK1
        app.close()
        await quiet()


async def test_at_the_limit_an_upgrade_waits_where_the_peer_knows_no_other_way(autojump_clock: Any) -> None:
    async with network(mesh=True, connections=1) as net:
        net.world.pool.multiplex_from = 1
        first = await ask(net, GET % 1)
        server = await serve(net, {})
        (busy,) = await server.requests()
        app = await ask(net, b"GET" + UPGRADE + b"\r\n")
        assert await server.take() == []
        server.answer(busy)
        assert first.read() == OK1
        peer = await net.accepted()
        assert peer.alpn == "http/1.1"
        app.reset()
        await quiet()


# -- upgrades


@pytest.mark.parametrize(
    ("head", "frames"),
    [
        (b"POST" + UPGRADE + b"content-length: 5\r\n\r\nhe", [b"he", b"llo"]),
        (b"GET" + UPGRADE + b"content-length: 5\r\n\r\nhe", [b"he", b"llo"]),
        (b"POST" + UPGRADE + b"\r\n", []),
    ],
)
async def test_an_upgrade_with_content_or_another_method_is_no_tunnel(
    autojump_clock: Any, engine: str, head: bytes, frames: list[bytes]
) -> None:
    async with network(engine) as net:
        app = await ask(net, head)
        server = await serve(net)
        if frames:
            app.send(b"llo")
        came = await server.take()
        fields = dict(came[0].fields)
        assert fields[b":method"] == head.split()[0] and b":protocol" not in fields
        assert [frame.data for frame in came[1:]] == frames and came[-1].end_stream
        server.answer(1)
        assert app.read().startswith(b"HTTP/1.1 200 ")


# -- answers to what is not served


async def test_a_refused_head_is_answered_in_its_kind(autojump_clock: Any, engine: str) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        long = "/" + "a" * 20000
        call = caller.ask(long, method="POST", extra=[(b"content-type", b"application/grpc")])
        assert call.status == 200 and call.headers[b"grpc-status"] == b"13" and call.reason == b"uri_too_long"
        assert call.headers[b"grpc-message"] == b":path too long" and call.done and not call.body
        head = caller.ask(long, method="HEAD")
        assert head.status == 414 and head.done and head.error is None and not head.body
        get = caller.ask(long)
        assert get.status == 414 and b"uri_too_long" in get.body


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
async def test_what_has_no_content_ends_with_its_head(
    autojump_clock: Any, engine: str, method: str, status: int
) -> None:
    async with network(engine) as net:
        caller = Http2Caller(net)
        asked = caller.ask(method=method)
        server = await serve(net)
        await server.requests()
        server.peer.send(h2.headers(1, h2.response(status)))  # its END_STREAM is late, or never comes
        await quiet()
        caller.settle()
        assert asked.status == status and asked.done
        assert not net.cluster("shop").active and net.log == [(status, "ok")]
        server.peer.send(h2.data(1, end=True))
        again = caller.ask("/2")
        (sid,) = await server.requests()
        server.answer(sid)
        await quiet()
        caller.settle()
        assert again.status == 200 and net.dials == 1


# -- windows: whatever becomes of a stream, what came on it is given back to the connection


def _windows(frames: list[h2.Frame]) -> int:
    return sum(int.from_bytes(frame.payload, "big") for frame in frames if frame.kind == 8 and not frame.sid)


class _Windows:
    """What a peer knows of its window of the connection."""

    def __init__(self, engine: str, server: bool) -> None:
        self.codec = open_codec(server, Http2Limits(streams_max=4), engine=engine)
        self.parser = h2.Parser(preface=not server)
        self.left = 65535 + _windows(self.parser.feed(self.codec.to_send()))
        self.whole = self.left
        self.now = 0.0
        self.give((PREFACE if server else b"") + h2.settings() + h2.settings(ack=True))

    def give(self, data: bytes) -> None:
        self.codec.receive(data, self.now)

    def data(self, sid: int, size: int, end: bool = False, pad: int | None = None) -> None:
        wire = h2.data(sid, bytes(size), end, pad)
        self.left -= len(wire) - 9
        self.give(wire)

    def take(self) -> None:
        self.left += _windows(self.parser.feed(self.codec.to_send()))
        self.codec.take_news()


REQUEST_ENDS = ["read", "padded", "ours", "early", "theirs", "malformed", "bad_head"]


@pytest.mark.parametrize("ends", REQUEST_ENDS)
def test_requests_leave_the_connections_window_whole(engine: str, ends: str) -> None:
    windows = _Windows(engine, True)
    codec = windows.codec
    for sid in range(1, 241, 2):
        windows.now += 20.0
        more = {"malformed": [(b"content-length", b"5")], "bad_head": [(b"connection", b"x")]}.get(ends, [])
        windows.give(h2.headers(sid, h2.request(b"POST", more=more)))
        stream = (codec.take_news() or [Stream()])[0]
        stream.owner = codec
        windows.data(sid, 16000, pad=100 if ends == "padded" else None)
        if ends in ("read", "padded"):
            windows.data(sid, 10, True, pad=200 if ends == "padded" else None)
            assert stream.m is not None
            stream.m.body.clear()
            codec.consumed(stream)
            codec.respond(stream, h2.response(), True)
        elif ends == "ours":
            codec.reset(stream, 8)
            windows.data(sid, 16000)
        elif ends == "early":
            codec.respond(stream, h2.response(), True)
            windows.take()
            codec.reset(stream, 0)
        elif ends == "theirs":
            windows.give(h2.rst_stream(sid))
        windows.take()
        if ends in ("ours", "early", "malformed", "bad_head"):
            windows.data(sid, 16000)
            windows.data(sid, 10, True)
        windows.take()
        assert codec.error is None and windows.left > windows.whole // 2
    assert not codec.streams


@pytest.mark.parametrize("ends", ["read", "ours", "theirs", "malformed"])
def test_responses_leave_the_connections_window_whole(engine: str, ends: str) -> None:
    windows = _Windows(engine, False)
    codec = windows.codec
    for _ in range(120):
        windows.now += 20.0
        stream = Stream(codec, b"GET")
        codec.request(stream, h2.request(), True)
        windows.take()
        sid = stream.sid
        windows.give(h2.headers(sid, h2.response(200, [(b"content-length", b"5")] if ends == "malformed" else ())))
        windows.data(sid, 16000, pad=30)
        if ends == "read":
            windows.data(sid, 10, True)
            assert stream.m is not None
            stream.m.body.clear()
            codec.consumed(stream)
        elif ends == "ours":
            codec.reset(stream, 8)
            windows.data(sid, 16000)
            windows.take()
            windows.data(sid, 10, True)
        elif ends == "theirs":
            windows.give(h2.rst_stream(sid))
        windows.take()
        assert codec.error is None and windows.left > windows.whole // 2
    assert not codec.streams


# -- a bug in what serves one stream


@pytest.mark.parametrize("where", ["up", "down"])
async def test_a_bug_costs_its_stream_and_no_other(
    autojump_clock: Any, engine: str, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    name = "respond" if where == "up" else "start"
    sound = getattr(Serving, name)

    def broken(self: Serving, what: Any) -> None:
        if self.m.path == b"/1":
            raise RuntimeError("a bug")
        sound(self, what)

    async with network(engine) as net:
        crashes: list[Exception] = []
        net.world.reactor.on_crash = crashes.append
        monkeypatch.setattr(Serving, name, broken)
        caller = Http2Caller(net)
        before, bad, after = (caller.ask(f"/{n}") for n in range(3))
        server = await serve(net)
        wire = b""
        for sid in await server.requests():
            wire += h2.headers(sid, h2.response(), end=True)
        server.peer.send(wire)
        await quiet()
        caller.settle()
        assert before.status == after.status == 200 and len(crashes) == 1
        assert bad.status == 502 if where == "up" else bad.error == 2
        assert caller.ask("/3").error is None and len(net.world.downstreams) == 1
        (sid,) = await server.requests()
        server.answer(sid)


# -- chance


@pytest.mark.parametrize("seed", range(3))
async def test_nobody_is_left_waiting(autojump_clock: Any, engine: str, seed: int) -> None:
    """Requests, answers, resets, GOAWAYs, lost connections and callers that leave, in any order, at a low limit."""
    await chances(seed, engine, 150)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 130))
async def test_nobody_is_left_waiting_at_length(autojump_clock: Any, seed: int) -> None:
    await chances(seed, "ngh2", 400)


async def chances(seed: int, engine: str, steps: int) -> None:
    chance = random.Random(seed)
    mesh = chance.random() < 0.5
    async with network(
        engine, mesh=mesh, endpoints=chance.choice((1, 2, 3)), connections=chance.choice((1, 2, 5))
    ) as net:
        net.world.pool.multiplex_from = chance.choice((1, 2, 4))
        net.on_dial = lambda endpoint: chance.choice((None, None, 0.05, OSError("refused")))
        apps: list[Peer] = []
        servers: list[Any] = []

        def accept() -> None:
            while net.pending():
                peer = net._receive.receive_nowait()
                if peer.alpn == "h2":
                    most = chance.choice((1, 3, 100))
                    servers.append([Server(peer, {**SETTINGS, h2.MAX_CONCURRENT_STREAMS: most}), []])
                else:
                    servers.append([peer, []])

        async def look(one: Any) -> None:
            server, open_ = one
            if isinstance(server, Server):
                for frame in await server.take():
                    if frame.kind == h2.HEADERS:
                        open_.append(frame.sid)
                    elif frame.kind == h2.RST_STREAM and frame.sid in open_:
                        open_.remove(frame.sid)
            else:
                await quiet()
                open_ += [0] * server.read().count(b"\r\n\r\n")

        for n in range(steps):
            accept()
            act = chance.random()
            if act < 0.4:
                kind = chance.random()
                apps.append(await ask(net, b"GET" + UPGRADE + b"\r\n" if kind < 0.1 else GET % n))
            elif act < 0.5 and apps:
                apps.pop(chance.randrange(len(apps))).reset()
            elif act < 0.9 and servers:
                one = chance.choice(servers)
                await look(one)
                server, open_ = one
                if open_:
                    sid = open_.pop(chance.randrange(len(open_)))
                    if not isinstance(server, Server):
                        server.send(OK1)
                    elif chance.random() < 0.8:
                        server.answer(sid)
                    else:
                        server.peer.send(h2.rst_stream(sid, chance.choice((2, 7, 8))))
            elif act < 0.95 and servers:
                one = servers.pop(chance.randrange(len(servers)))
                server = one[0]
                if isinstance(server, Server):
                    await look(one)
                    if chance.random() < 0.5:
                        server.peer.send(h2.goaway(chance.choice(one[1] or [0])))
                    server.peer.close() if chance.random() < 0.5 else server.peer.reset()
                else:
                    server.close()
            else:
                await trio.sleep(chance.random())
            await quiet()
        await trio.sleep(200.0)  # every deadline is over
        for app in apps:
            if app.got.startswith(b"HTTP/1.1 101 "):
                app.reset()
        await quiet()
        assert not net.cluster("shop").active
        for app in apps:
            assert app.ended is not None or app.got, "a caller without an answer"
            app.close()
        await quiet()
