"""Towards applications and between sidecars over HTTP/2, with real processes and sockets, on both engines."""

import asyncio
import random
import re
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support import http2_frames as h2
from support.http2_live import Exchange, caller, serve1, serve2
from support.mesh import Client, Conn, Mesh, Pair, connect, dial, environment, free_port, until

ENGINES = ("ngh2", "h2")
HTTP2_APP = {"ports": {"http": {"port": 80, "protocol": "http2"}}}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pair(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Its application speaks HTTP/1.1."""
    with Mesh(tmp_path_factory.mktemp(f"up1-{engine}")) as mesh:
        yield Pair(mesh, options=[f"--http2-engine={engine}"])


@pytest.fixture(scope="module")
def pair2(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Its application speaks HTTP/2 alone."""
    with Mesh(tmp_path_factory.mktemp(f"up2-{engine}")) as mesh:
        yield Pair(mesh, HTTP2_APP, options=[f"--http2-engine={engine}"])


@pytest.fixture(autouse=True)
def _no_crashes(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in ("pair", "pair2"):
        if name in request.fixturenames:
            used: Pair = request.getfixturevalue(name)
            assert used.web.crashes == 0 and used.reviews.crashes == 0, used.web.log + used.reviews.log


class App:
    """An application on an event loop in a thread: cheap enough for thousands of connections and requests."""

    def __init__(self, serve: Any, context: ssl.SSLContext | None = None) -> None:
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()
        self.address: tuple[str, int] = ("", 0)

        async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await serve(reader, writer)
            except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError, TimeoutError):
                pass
            finally:
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()

        async def begin() -> None:
            self.server = server = await asyncio.start_server(served, "127.0.0.1", 0, backlog=2048, ssl=context)
            self.address = server.sockets[0].getsockname()[:2]
            ready.set()

        def run() -> None:
            asyncio.set_event_loop(self.loop)
            self.loop.run_until_complete(begin())
            self.loop.run_forever()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert ready.wait(10)

    def __str__(self) -> str:
        return "{}:{}".format(*self.address)

    def stop(self) -> None:
        async def cancel() -> None:
            self.server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.1)  # the transports close
            self.loop.stop()

        asyncio.run_coroutine_threadsafe(cancel(), self.loop)
        self.thread.join(10)
        self.loop.close()


async def request_of(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Method and target of the next request, whose body is read."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    if length:
        await reader.readexactly(int(length[1]))
    method, target, _ = head.split(b" ", 2)
    return method, target


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes, bytes]:
    """Status, head and body of the next response."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    body = await reader.readexactly(int(length[1])) if length else b""
    return int(head[9:12]), head, body


async def ask(address: str, number: int, make: Any) -> list[tuple[int, bytes, bytes]]:
    """`make(n)` for n from 0, over one connection after the other where one ends, until it gives None."""
    host, _, port = address.rpartition(":")
    answers: list[tuple[int, bytes, bytes]] = []
    for n in range(number):
        if n == 0 or b"connection: close" in answers[-1][1]:
            reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(make(n))
        answers.append(await answer_of(reader))
        if b"connection: close" in answers[-1][1] or n == number - 1:
            writer.close()
            await writer.wait_closed()
    return answers


def ask_all(address: str, connections: int, each: int, make: Any) -> list[tuple[int, bytes, bytes]]:
    async def all_of_them() -> list[tuple[int, bytes, bytes]]:
        found = await asyncio.wait_for(
            asyncio.gather(*(ask(address, each, lambda n, at=at: make(at, n)) for at in range(connections))), 300
        )
        return [answer for answers in found for answer in answers]

    return asyncio.run(all_of_them())


# The main path


def test_many_requests_between_two_sidecars_share_a_connection(pair: Pair) -> None:
    pair.fresh()
    answers = ask_all(
        pair.web.outbound, 48, 10, lambda at, n: b"GET /%d/%d HTTP/1.1\r\nhost: reviews\r\n\r\n" % (at, n)
    )
    assert Counter(status for status, _, _ in answers) == {200: 480}
    assert sorted(request.target for request in pair.app.requests) == sorted(
        b"/%d/%d" % (at, n) for at in range(48) for n in range(10)
    )
    assert pair.web.connections("out", "up") < 10
    caller_seen = pair.app.requests[0].header("x-forwarded-client-cert")
    assert caller_seen is not None and b"service/web" in caller_seen


def test_a_thousand_requests_at_a_time(engine: str, tmp_path: Path) -> None:
    """The application answers none of them before all are there."""
    waiting: list[asyncio.StreamWriter] = []
    served = asyncio.Event()

    async def app(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        waiting.append(writer)
        if len(waiting) == 1000:
            for each in waiting:
                each.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            served.set()
        await served.wait()

    server = App(app)
    try:
        with Mesh(tmp_path) as mesh:
            option = f"--http2-engine={engine}"
            reviews = mesh.sidecar(
                "reviews", {"web": {}, "reviews": {}}, app=str(server), outbound=False, options=[option]
            )
            service = {"address": [reviews.inbound], "limits": {"requests": 2000}, "timeout": {"total": "60s"}}
            web = mesh.sidecar("web", {"web": {}, "reviews": service}, inbound=False, options=[option])
            answers = ask_all(web.outbound, 1000, 1, lambda at, n: b"GET / HTTP/1.1\r\nhost: reviews\r\n\r\n")
            assert Counter(status for status, _, _ in answers) == {200: 1000}
            assert 4 <= web.connections("out", "up") <= 12  # 256 streams each, and the few of HTTP/1.1
            assert web.crashes == 0 and reviews.crashes == 0
    finally:
        server.stop()


# Applications that speak HTTP/2


def echo2(exchange: Exchange) -> None:
    body = exchange.read()
    exchange.reply(200, exchange.method.encode() + b" " + exchange.path.encode() + b" " + body)


@pytest.mark.parametrize("version", [1, 2])
def test_an_application_over_http2(pair2: Pair, version: int) -> None:
    pair2.fresh(serve2(echo2))
    with caller(version, pair2.web.outbound) as client:
        assert client.get("/a").body == b"GET /a "
        assert client.ask("POST", "/b", body=b"x" * 300_000).response().body == b"POST /b " + b"x" * 300_000
        assert client.ask("HEAD", "/c").response().body == b""
    with connect(pair2.web.outbound) as plain:
        plain.send(b"POST /d HTTP/1.1\r\nhost: reviews\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n")
        assert plain.response().body == b"POST /d hi"
    assert pair2.app.count == 1


def test_trailers_both_ways(pair2: Pair) -> None:
    def app(exchange: Exchange) -> None:
        exchange.read()
        exchange.begin(200, [(b"trailer", b"x-sum")])
        exchange.piece(b"body")
        exchange.end([(b"x-sum", dict(exchange.trailers)[b"x-sum"])])

    pair2.fresh(serve2(app))
    with caller(1, pair2.web.outbound) as client:
        response = client.ask("POST", "/", body=b"abc", trailers=[(b"x-sum", b"6")]).response()
        assert response.body == b"body" and response.trailers == [(b"x-sum", b"6")]


def test_an_application_that_speaks_http1_where_http2_was_declared(pair2: Pair) -> None:
    def refuse(conn: Conn) -> None:
        conn.head_of_request()
        conn.reply(400, b"", [("connection", "close")])

    pair2.fresh(refuse)
    with pair2.client() as client:
        response = client.post("/", b"once")
        assert response.status == 503 and response.reason == "connect_failed"
    assert {request.method for request in pair2.app.requests} == {b"PRI"}  # no request of ours has reached it
    until(lambda: "declare the port's protocol as http" in pair2.reviews.log)


def test_hypercorn(engine: str, tmp_path: Path) -> None:
    pytest.importorskip("hypercorn")
    (tmp_path / "asgi.py").write_text(
        "async def app(scope, receive, send):\n"
        "    if scope['type'] != 'http':\n"
        "        return\n"
        "    more, size = True, 0\n"
        "    while more:\n"
        "        event = await receive()\n"
        "        more = event.get('more_body', False)\n"
        "        size += len(event.get('body', b''))\n"
        "    text = ('%s %d' % (scope['http_version'], size)).encode()\n"
        "    headers = [(b'content-length', b'%d' % len(text))]\n"
        "    await send({'type': 'http.response.start', 'status': 200, 'headers': headers})\n"
        "    await send({'type': 'http.response.body', 'body': text})\n"
    )
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "hypercorn", f"--bind=127.0.0.1:{port}", "asgi:app"],
        cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until(lambda: _listens(port))
        with Mesh(tmp_path) as mesh:
            pair = Pair(mesh, HTTP2_APP, apps={"http": f"127.0.0.1:{port}"}, options=[f"--http2-engine={engine}"])
            with pair.client() as client:
                assert client.get("/").body == b"2 0"
                assert client.post("/", bytes(500_000)).body == b"2 500000"
            answers = ask_all(pair.web.outbound, 20, 5, lambda at, n: b"GET / HTTP/1.1\r\nhost: reviews\r\n\r\n")
            assert Counter(status for status, _, _ in answers) == {200: 100}
    finally:
        process.terminate()
        process.wait(20)


def _listens(port: int) -> bool:
    try:
        dial(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


# Cancellation and back-pressure across two hops


@contextmanager
def held(pair: Pair, count: int) -> Iterator[list[Client]]:
    """That many requests in flight, so that the next one shares the multiplexed connection."""
    with ExitStack() as stack:
        clients = [stack.enter_context(pair.client()) for _ in range(count)]
        for client in clients:
            client.request("GET", "/hold")
        until(lambda: len(pair.app.requests) == count)
        yield clients


@pytest.mark.parametrize("version", [1, 2])
def test_a_caller_that_leaves_is_told_to_the_application_at_once(pair: Pair, pair2: Pair, version: int) -> None:
    both = pair if version == 1 else pair2
    release, noticed, begun = threading.Event(), [], threading.Event()

    def app(exchange: Exchange) -> None:
        exchange.read()
        if exchange.path == "/hold":
            release.wait(20)
            exchange.reply(200, b"held")
        else:
            begun.set()
            if exchange.gone(5.0):
                noticed.append(time.monotonic())

    both.fresh(serve1(app) if version == 1 else serve2(app))
    took = []
    with held(both, 6) as others:
        for _ in range(5):
            begun.clear()
            noticed.clear()
            with both.client() as client:
                client.request("GET", "/leave")
                assert begun.wait(10)
                left = time.monotonic()
                client.reset()
            until(lambda: noticed)
            took.append(noticed[0] - left)
        release.set()
        assert [client.response().body for client in others] == [b"held"] * 6
    assert min(took) < 0.1, took  # a busy machine may delay some of them


def test_a_slow_reader_costs_its_neighbours_nothing(pair: Pair) -> None:
    release = threading.Event()
    piece = bytes(65536)
    sent = [0]

    def app(exchange: Exchange) -> None:
        exchange.read()
        if exchange.path == "/hold":
            release.wait(30)
        elif exchange.path == "/endless":
            exchange.begin(200)
            exchange.conn.sock.settimeout(1.0)
            try:
                while sent[0] < 400_000_000:
                    exchange.piece(piece)
                    sent[0] += len(piece)
            except OSError:
                pass
            raise SystemExit
        exchange.reply(200, b"quick")

    def script(conn: Any) -> None:
        try:
            serve1(app)(conn)
        except SystemExit:
            conn.reset()

    pair.fresh(script)
    with held(pair, 6) as others, connect(pair.web.outbound, receive_bytes=16384) as slow:
        before = pair.web.resident_bytes(), pair.reviews.resident_bytes()
        slow.request("GET", "/endless")
        assert slow.response(body=False).status == 200
        time.sleep(1.0)
        with pair.client() as client:
            for _ in range(50):
                assert client.get("/quick").body == b"quick"
        after = pair.web.resident_bytes(), pair.reviews.resident_bytes()
        assert sent[0] < 30_000_000
        assert after[0] - before[0] < 8_000_000 and after[1] - before[1] < 8_000_000, (before, after)
        release.set()
        assert [client.response().body for client in others] == [b"quick"] * 6


# The race of an idle connection


def closing_app(seen: Counter[bytes], rnd: random.Random) -> Any:
    """HTTP/1.1: ends its connections at random, as if they had been idle for too long; some of them just as the next
    request comes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await request_of_counted(reader, seen)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
                if rnd.random() < 0.1:
                    wait_s = rnd.choice([0.0, 0.0002, 0.001, None])
                    await (asyncio.wait_for(reader.read(1), 1) if wait_s is None else asyncio.sleep(wait_s))
                    return
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            pass
        finally:
            writer.close()

    return serve


async def request_of_counted(reader: asyncio.StreamReader, seen: Counter[bytes]) -> None:
    _, target = await request_of(reader)
    seen[target] += 1


def leaving_app(seen: Counter[bytes], rnd: random.Random) -> Any:
    """HTTP/2: says GOAWAY at random, serves what it has begun and nothing that comes later."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parser, last, leaving = h2.Parser(preface=True), 0, False
        writer.write(h2.settings({h2.MAX_CONCURRENT_STREAMS: 100}))
        try:
            while data := await reader.read(65536):
                for frame in parser.feed(data):
                    if frame.kind == h2.SETTINGS and not frame.ack:
                        writer.write(h2.settings(ack=True))
                    elif frame.fields and not leaving and last and rnd.random() < 0.02:
                        leaving = True
                        writer.write(h2.goaway(last))  # this one crosses it on the way
                    elif frame.fields and not leaving:
                        last = frame.sid
                        seen[dict(frame.fields)[b":path"]] += 1
                        if rnd.random() < 0.05:
                            leaving = True
                            writer.write(h2.goaway(last))
                        head = h2.headers(last, h2.response(200, [(b"content-length", b"2")]))
                        writer.write(head + h2.data(last, b"ok", end=True))
                if leaving:
                    await asyncio.sleep(rnd.choice([0.0, 0.0002, 0.001]))
                    while await asyncio.wait_for(reader.read(65536), 1):  # what comes late is ignored
                        pass
        except (TimeoutError, ConnectionError):
            pass
        finally:
            writer.close()

    return serve


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("version", [1, 2])
def test_the_idle_connection_race(engine: str, tmp_path: Path, version: int, count: int) -> None:
    seen: Counter[bytes] = Counter()
    server = App((closing_app if version == 1 else leaving_app)(seen, random.Random(7)))
    callers_at_a_time = 10
    try:
        with Mesh(tmp_path) as mesh:
            ports = {"ports": {"http": {"port": 80, "protocol": "http" if version == 1 else "http2"}}}
            pair = Pair(mesh, ports, apps={"http": str(server)}, options=[f"--http2-engine={engine}"])
            address, each = pair.web.outbound, count // callers_at_a_time
            get, post = (
                lambda at, n: b"GET /g%d-%d HTTP/1.1\r\nhost: reviews\r\n\r\n" % (at, n),
                lambda at, n: b"POST /p%d-%d HTTP/1.1\r\nhost: reviews\r\ncontent-length: 2\r\n\r\nhi" % (at, n),
            )
            answers = ask_all(address, callers_at_a_time, each, get)
            assert Counter(status for status, _, _ in answers) == {200: count}
            assert pair.reviews.metric("pillion_resends_total", side="in") > 0
            answers = ask_all(address, callers_at_a_time, each, post)
            kinds = Counter((status, b"x-pillion-reason: upstream_reset" in head) for status, head, _ in answers)
            assert set(kinds) <= {(200, False), (502, True)} and kinds[200, False] > count * 0.9, kinds
            assert max(times for target, times in seen.items() if target.startswith(b"/p")) == 1
            assert pair.web.crashes == 0 and pair.reviews.crashes == 0
    finally:
        server.stop()


# WebSocket


def test_an_upgrade_to_an_application_over_http2(engine: str, tmp_path: Path) -> None:
    def app(exchange: Any) -> None:
        assert exchange.pseudo[b":method"] == b"CONNECT" and exchange.pseudo[b":protocol"] == b"websocket"
        exchange.begin(200)
        exchange.piece(b"hello")
        exchange.piece(exchange.first(5)[::-1])
        exchange.end()

    service = {**HTTP2_APP, "routes": [{"name": "chat", "upgrade": ["websocket"]}]}
    with Mesh(tmp_path) as mesh:
        settings = {h2.ENABLE_CONNECT_PROTOCOL: 1, h2.MAX_CONCURRENT_STREAMS: 100}
        pair = Pair(mesh, service, script=serve2(app, settings), options=[f"--http2-engine={engine}"])
        with pair.client() as client:
            client.send(
                b"GET /chat HTTP/1.1\r\nhost: reviews\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
                b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
            )
            response = client.response()
            assert response.status == 101
            assert response.header("sec-websocket-accept") == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
            assert client.reader.exactly(5) == b"hello"
            client.send(b"12345")
            assert client.reader.exactly(5) == b"54321"
            assert client.reader.rest() == b""
        assert pair.web.crashes == 0 and pair.reviews.crashes == 0


# Peers that cannot


def test_a_sidecar_that_knows_only_http1_is_spoken_to_so(tmp_path: Path) -> None:
    agreed: list[str | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        agreed.append(writer.get_extra_info("ssl_object").selected_alpn_protocol())
        try:
            while True:
                await request_of(reader)
                await asyncio.sleep(0.02)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    with Mesh(tmp_path) as mesh:
        context = mesh.pki.server_context("reviews")
        context.set_alpn_protocols(["http/1.1"])
        older = App(serve, context)
        try:
            web = mesh.sidecar("web", {"web": {}, "reviews": {"address": [str(older)]}}, inbound=False)
            answers = ask_all(web.outbound, 20, 5, lambda at, n: b"GET / HTTP/1.1\r\nhost: reviews\r\n\r\n")
            assert Counter(status for status, _, _ in answers) == {200: 100}
            assert agreed.count(None) <= 1  # asked once, and remembered
        finally:
            older.stop()
