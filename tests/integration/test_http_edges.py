"""What an HTTP/2 message can say and an HTTP/1.1 message cannot, and the other way round; tunnels and the caller's
policy. Applications without a sidecar of their own, so that what is seen is one sidecar's work."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from support import http2_frames as f
from support.http2_live import Cut, Exchange, Http1Client, Http2Client, serve
from support.mesh import Closed, Conn, Mesh, Response, Sidecar, dial, until

TRAILERS = [(b"x-sum", b"9")]
ENGINES = ["ngh2", "h2"]
WEBSOCKET = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="}


def switching(conn: Conn) -> None:
    """An application that agrees to every upgrade and then echoes bytes."""
    request = conn.take()
    if request.header("upgrade") is None:
        conn.reply(200, b"no upgrade")
        return
    conn.send(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
    while data := conn.sock.recv(65536):
        conn.send(data)


class Live:
    """`web`, and two applications that it calls in clear text: `one` speaks HTTP/1.1, `two` HTTP/2."""

    def __init__(self, mesh: Mesh, engine: str) -> None:
        self.seen: list[Exchange] = []
        self.handle: Any = None
        one, two = (mesh.backend(serve(version, self._handle)) for version in (1, 2))
        self.sockets = mesh.backend(switching)
        self.web = mesh.sidecar(
            "web",
            {
                "web": {},
                "one": {"ports": {"http": {"port": 80}}, **at(one)},
                "two": {"ports": {"http": {"port": 80, "protocol": "http2"}}, **at(two)},
                "sockets": self.service(upgrade=["websocket"]),
            },
            inbound=False,
            options=[f"--http2-engine={engine}"],
        )

    def service(self, **route: Any) -> dict[str, Any]:
        routes = [{"name": "chat", "match": {"path": "/chat/**"}, **route}, {"name": "rest"}]
        return {"ports": {"http": {"port": 80}}, **at(self.sockets), "routes": routes}

    def _handle(self, exchange: Exchange) -> None:
        self.seen.append(exchange)
        self.handle(exchange)

    def client(self, version: int) -> Any:
        self.seen.clear()
        sock = dial(self.web.outbound)
        return Http2Client(sock) if version == 2 else Http1Client(sock)


def at(app: Any) -> dict[str, Any]:
    return {"address": [str(app)], "tls": "plain", "retry": {"max_retries": 0}}


@pytest.fixture(scope="module", params=ENGINES)
def live(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Live]:
    with Mesh(tmp_path_factory.mktemp("edges")) as mesh:
        live = Live(mesh, request.param)
        yield live
        assert live.web.crashes == 0


def echo(exchange: Exchange) -> None:
    exchange.reply(200, exchange.read())


# Trailers beside a length, for which HTTP/1.1 has no form


def test_announced_trailers_of_a_request_with_a_length(live: Live) -> None:
    live.handle = echo
    with live.client(2) as client:
        call = client.open("POST", "/", "one", [("content-length", "4"), ("trailer", "x-sum")], end=False)
        call.send(b"some")
        time.sleep(0.02)
        call.end(TRAILERS)
        assert call.response().body == b"some"
    (exchange,) = live.seen
    assert exchange.trailers == TRAILERS
    assert exchange.header("content-length") is None and exchange.header("trailer") == b"x-sum"


def test_trailers_of_a_request_with_a_length_that_came_with_its_head(live: Live) -> None:
    live.handle = echo
    with live.client(2) as client:
        sid = client.stream()
        fields = f.request(b"POST", b"/", b"one", more=[(b"content-length", b"4")])
        client.wire.send(f.headers(sid, fields) + f.data(sid, b"some") + f.headers(sid, TRAILERS, True))
        until(lambda: live.seen and live.seen[0].trailers)
    assert (live.seen[0].body, live.seen[0].trailers) == (b"some", TRAILERS)


def test_a_length_without_announced_trailers_stays(live: Live) -> None:
    """Firefox says `te: trailers` in every request; that announces none."""
    live.handle = echo
    with live.client(2) as client:
        call = client.open("POST", "/", "one", [("content-length", "4"), ("te", "trailers")], end=False)
        call.send(b"some")
        time.sleep(0.02)
        call.end(TRAILERS)
        assert call.response().body == b"some"
        assert client.get("/next", "one").status == 200
    assert live.seen[0].header("content-length") == b"4"


@pytest.mark.parametrize("version", [1, 2])
def test_announced_trailers_of_an_answer_with_a_length(live: Live, version: int) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.begin(200, [(b"content-length", b"3"), (b"trailer", b"x-sum")])
        exchange.piece(b"abc")
        time.sleep(0.02)
        exchange.end(TRAILERS)

    live.handle = handle
    with live.client(version) as client:
        response: Response = client.get("/", "two")
        assert (response.body, response.trailers) == (b"abc", TRAILERS)
        assert response.header("content-length") == (b"3" if version == 2 else None)
        head = client.ask("HEAD", "/", "two").response()
        assert head.header("content-length") == b"3" and head.header("transfer-encoding") is None


# Lengths


@pytest.mark.parametrize("version", [1, 2])
def test_content_behind_a_length_of_zero_is_no_good_answer(live: Live, version: int) -> None:
    """Over HTTP/1.1 the head alone would be a whole answer."""

    def handle(exchange: Exchange) -> None:
        exchange.begin(200, [(b"content-length", b"0")])
        time.sleep(0.02)
        exchange.piece(b"x")
        exchange.end()

    live.handle = handle
    with live.client(version) as client:
        response = client.get("/", "two")
    assert (response.status, response.reason) == (502, "bad_response")


def test_a_length_of_zero_may_end_with_a_frame_of_its_own(live: Live) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.begin(200, [(b"content-length", b"0")])
        time.sleep(0.02)
        exchange.end()

    live.handle = handle
    with live.client(1) as client:
        response = client.get("/", "two")
    assert (response.status, response.header("content-length")) == (200, b"0")


# Cookies


def test_cookie_fields_of_http1_are_one_field_too(live: Live) -> None:
    """Applications take the first, or join them by a comma; and over HTTP/2 between sidecars they are joined anyway."""
    live.handle = echo
    with live.client(1) as client:
        client.ask("GET", "/", "one", [("cookie", "a=1"), ("x", "y"), ("Cookie", "b=2; c=3")]).response()
    assert live.seen[0].header("cookie") == b"a=1; b=2; c=3"


# Tunnels whose application has no sidecar: the caller's is the only one that can end them


def switched(web: Sidecar) -> Any:
    client = web.client()
    client.request("GET", "/chat/1", "sockets", headers=WEBSOCKET)
    assert client.response().status == 101
    return client


def alive(client: Any) -> bool:
    client.send(b"ping")
    try:
        return bool(client.reader.exactly(4) == b"ping")
    except (Closed, OSError):
        return False


@pytest.mark.parametrize(
    "route",
    [
        {"upgrade": ["websocket"], "timeout": {"total": "1s"}},
        {"upgrade": ["websocket"], "rewrite": {"path": "/elsewhere"}},
    ],
    ids=["timeout", "rewrite"],
)
def test_the_callers_policy_leaves_a_tunnel_that_it_still_allows(live: Live, route: dict[str, Any]) -> None:
    try:
        live.web.apply({"sockets": live.service(**route)})
        with switched(live.web) as client:
            assert alive(client)
            live.web.apply({"sockets": live.service(upgrade=["websocket"])})
            assert alive(client)
            live.web.apply({"sockets": live.service(**route)})
            assert alive(client)
    finally:
        live.web.apply({"sockets": live.service(upgrade=["websocket"])})


@pytest.mark.parametrize("route", [{}, {"respond": {"status": 410}}], ids=["no upgrade", "answered"])
def test_the_callers_policy_ends_a_tunnel_that_it_forbids(live: Live, route: dict[str, Any]) -> None:
    with switched(live.web) as client:
        assert alive(client)
        try:
            live.web.apply({"sockets": live.service(**route)})
            assert client.closed()
        finally:
            live.web.apply({"sockets": live.service(upgrade=["websocket"])})


@pytest.mark.parametrize("switched_to", ["foo", "websocket, foo", "h2c"])
def test_a_server_that_switches_to_what_nobody_asked_for(live: Live, switched_to: str) -> None:
    def script(conn: Conn) -> None:
        conn.take()
        conn.send(b"HTTP/1.1 101 X\r\nconnection: upgrade\r\nupgrade: %b\r\n\r\n" % switched_to.encode())
        conn.closed(2)

    before, live.sockets.script = live.sockets.script, script
    try:
        with live.web.client() as client:
            client.request("GET", "/chat/1", "sockets", headers=WEBSOCKET)
            response = client.response()
            assert (response.status, response.reason) == (502, "bad_response")
    finally:
        live.sockets.script = before


# An answer that is cut


def test_an_answer_that_breaks_off_behind_its_length(live: Live) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.begin(200, [(b"content-length", b"3"), (b"trailer", b"x-sum")])
        exchange.piece(b"ab")
        exchange.end(TRAILERS)

    live.handle = handle
    with live.client(1) as client:
        try:
            assert client.get("/", "two").status == 502
        except Cut:
            pass  # the head had gone on
