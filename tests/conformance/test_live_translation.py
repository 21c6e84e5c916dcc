"""HTTP/1.1 and HTTP/2 on either side of one sidecar and of two: every message means the same at the other end.

`link` is one way through: the caller's version, the application's, and what lies between: one sidecar ("direct"), two
("mesh", with pooled HTTP/1.1 between them), or two that multiplex ("mux", because requests are under way all the time).
"""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import http2_frames as f
from support.http2_live import (
    Call1,
    Call2,
    Cut,
    Exchange,
    Exchange1,
    Exchange2,
    Http1Client,
    Http2Client,
    caller,
    names,
    serve,
)
from support.mesh import Mesh, Response, dial, until

OURS = {b"traceparent", b"x-forwarded-client-cert", b"x-forwarded-proto", b"x-forwarded-for"}
HELD = 12
IDLE = {"timeout": {"idle": "60s"}, "circuit_breaker": {"consecutive_failures": 1_000_000}, "retry": {"max_retries": 0}}
HTTP = {"port": 80}
HTTP2 = {"port": 81, "protocol": "http2"}


class Live:
    """`reviews` behind its sidecar with a port of each version, and the same two applications without a sidecar."""

    def __init__(self, mesh: Mesh, engine: str) -> None:
        self.mesh = mesh
        self.handle: Callable[[Exchange], None] = lambda exchange: None
        self.seen: list[Exchange] = []
        self.apps = {version: mesh.backend(serve(version, self._handle)) for version in (1, 2)}
        ports = {"http": HTTP, "two": HTTP2}
        options = [f"--http2-engine={engine}"]
        self.reviews = mesh.sidecar(
            "reviews",
            {"web": {}, "reviews": {"ports": ports, **IDLE}},
            app={"http": self.apps[1], "two": self.apps[2]},
            outbound=False,
            options=options,
        )
        self.web = mesh.sidecar(
            "web",
            {
                "web": {},
                "reviews": {"ports": ports, "address": [self.reviews.inbound], **IDLE},
                "plain1": {"ports": {"http": HTTP}, "address": [str(self.apps[1])], "tls": "plain", **IDLE},
                "plain2": {"ports": {"http": HTTP2}, "address": [str(self.apps[2])], "tls": "plain", **IDLE},
            },
            inbound=False,
            options=options,
        )
        self.over = threading.Event()
        self.holders: dict[int, Http2Client] = {}

    def _handle(self, exchange: Exchange) -> None:
        if exchange.path == "/hold":
            exchange.begin()
            exchange.piece(b"held")
            self.over.wait(300)
            exchange.end()
            return
        self.seen.append(exchange)
        self.handle(exchange)

    def hold(self, version: int) -> None:
        """Keep so many requests under way that others go over HTTP/2 between the sidecars."""
        if version not in self.holders:
            before = self.web.metric("pillion_connections_opened_total", side="out", direction="up")
            client = self.holders[version] = Http2Client(dial(self.web.outbound)).settled()
            calls = [client.open("GET", "/hold", HOSTS["mux"][version]) for _ in range(HELD)]
            for call in calls:
                assert call.first(4) == b"held"
            opened = self.web.metric("pillion_connections_opened_total", side="out", direction="up") - before
            assert opened <= HELD / 2, "most of what is held shares connections"


HOSTS = {
    "direct": {1: "plain1", 2: "plain2"},
    "mesh": {1: "reviews", 2: "two.reviews"},
    "mux": {1: "reviews", 2: "two.reviews"},
}


def in_core(engine: str, way: str, down: int, up: int) -> bool:
    """Of the engine that fewer have a part will do; what has no HTTP/2 anywhere is also tested elsewhere."""
    if engine == "h2":
        return (way, down, up) in {("direct", 2, 2), ("mux", 2, 1)}
    return way == "mux" or (down, up) != (1, 1)


LINKS = [
    pytest.param(
        (engine, way, down, up),
        marks=[] if in_core(engine, way, down, up) else [pytest.mark.long],
        id=f"{engine} {way} {down}-{up}",
    )
    for engine in ("ngh2", "h2")
    for way in ("direct", "mesh", "mux")
    for down in (1, 2)
    for up in (1, 2)
]


class Link:
    def __init__(self, live: Live, way: str, down: int, up: int) -> None:
        self.live, self.way, self.down, self.up = live, way, down, up
        self.host = HOSTS[way][up]
        self.app = live.apps[up]
        if way == "mux":
            live.hold(up)

    def client(self) -> Http1Client | Http2Client:
        return caller(self.down, self.live.web.outbound)

    def handler(self, handle: Callable[[Exchange], None]) -> None:
        self.live.handle = handle

    @property
    def seen(self) -> Exchange:
        (exchange,) = self.live.seen
        return exchange


class Meshes(dict[str, Live]):
    """One for each engine, started when the first test wants it."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def __missing__(self, engine: str) -> Live:
        self[engine] = live = Live(self.mesh, engine)
        return live


@pytest.fixture(scope="module")
def meshes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Meshes]:
    with Mesh(tmp_path_factory.mktemp("translation")) as mesh:
        meshes = Meshes(mesh)
        yield meshes
        for live in meshes.values():
            live.over.set()
            for holder in live.holders.values():
                holder.close()
            for sidecar in (live.web, live.reviews):
                assert sidecar.crashes == 0
                until(lambda: sidecar.metric("pillion_requests_active") == 0)  # noqa: B023


@pytest.fixture(scope="module", params=LINKS)
def each_link(meshes: Meshes, request: pytest.FixtureRequest) -> Link:
    engine, way, down, up = request.param
    return Link(meshes[engine], way, down, up)


@pytest.fixture
def link(each_link: Link) -> Iterator[Link]:
    each_link.live.seen.clear()
    each_link.app.complete.clear()
    yield each_link
    failures = [failure for app in each_link.live.apps.values() for failure in app.failures]
    assert not failures, failures


def text(fields: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Without what the sidecars add."""
    return [field for field in fields if field[0] not in OURS]


def echo(exchange: Exchange) -> None:
    body = exchange.read()
    exchange.reply(200, body, [(b"x-method", exchange.method.encode())])


def whole(call: Call1 | Call2) -> Response | None:
    """The answer, None where it is cut; then with an error, where there are such."""
    try:
        return call.response()
    except Cut as exc:
        if isinstance(call, Call2) and exc.code in (None, 0):
            raise
        return None


# -- requests


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "M-SEARCH", "PURGE"])
def test_methods_and_targets(link: Link, method: str) -> None:
    link.handler(echo)
    path = "/a/b%20c//d;e=f?g=h&i=%2F~!$'()*,:@"
    with link.client() as client:
        response = client.ask(method, path, link.host, [("X-Case", "Kept As It Is"), ("x-empty", "")]).response()
    assert (response.status, response.body) == (200, b"")
    assert response.header("x-method") == method.encode()
    seen = link.seen
    assert (seen.method, seen.path, seen.host) == (method, path, link.host.encode())
    lengths = [field for field in seen.headers if field[0] == b"content-length"]
    kept = [field for field in text(seen.headers) if field not in lengths]
    assert kept == [(b"x-case", b"Kept As It Is"), (b"x-empty", b"")]
    assert lengths in ([], [(b"content-length", b"0")])


def test_a_request_without_content_stays_without(link: Link) -> None:
    link.handler(echo)
    with link.client() as client:
        assert client.get("/", link.host).status == 200
    assert text(link.seen.headers) == []
    if isinstance(link.seen, Exchange1):
        assert link.seen.request.header("transfer-encoding") is None
    if isinstance(link.seen, Exchange2):
        assert link.seen.half.ended and not link.seen.half.pieces


def test_a_post_without_content_says_so(link: Link) -> None:
    link.handler(echo)
    with link.client() as client:
        assert client.ask("POST", "/", link.host, [("content-length", "0")]).response().status == 200
    assert text(link.seen.headers) == [(b"content-length", b"0")]
    if isinstance(link.seen, Exchange1):
        assert link.seen.request.header("transfer-encoding") is None


def test_a_post_without_a_length_is_understood_by_all(link: Link) -> None:
    """A server of HTTP/1.1 may ask for one where none is (RFC 9110, section 8.6)."""
    link.handler(echo)
    with link.client() as client:
        assert client.ask("POST", "/", link.host).response().status == 200
    if link.up == 1:
        assert link.seen.header("content-length") == b"0" or link.seen.header("transfer-encoding") is None


@pytest.mark.parametrize("body", [b"", b"x", b"abc" * 5000], ids=len)
def test_a_body_of_a_stated_length(link: Link, body: bytes) -> None:
    link.handler(echo)
    with link.client() as client:
        headers = [("content-length", str(len(body)))]
        response = client.ask("PUT", "/", link.host, headers, body).response()
    assert response.body == body
    assert response.header("content-length") == str(len(body)).encode()
    assert link.seen.header("content-length") == str(len(body)).encode()


@pytest.mark.parametrize("body", [b"", b"x", b"abc" * 5000], ids=len)
def test_a_body_of_no_stated_length(link: Link, body: bytes) -> None:
    link.handler(echo)
    with link.client() as client:
        call = client.open("PUT", "/", link.host, end=False)
        if body:
            call.send(body)
        call.end()
        response = call.response()
    assert response.body == body
    if body:
        assert link.seen.header("content-length") is None
    if link.up == 1 and body:
        assert link.seen.request.header("transfer-encoding") == b"chunked"


@pytest.mark.parametrize("trailers", [[(b"x-sum", b"1")], [(b"x-a", b"1"), (b"x-b", b"2"), (b"x-a", b"3")]])
@pytest.mark.parametrize("body", [b"", b"some"])
def test_trailers_of_a_request(link: Link, body: bytes, trailers: Any) -> None:
    link.handler(echo)
    with link.client() as client:
        call = client.open("POST", "/", link.host, [("te", "trailers")], end=False)
        if body:
            call.send(body)
        call.end(trailers)
        assert call.response().body == body
    assert link.seen.trailers == trailers


def test_trailers_that_route_or_authenticate_are_left_out(link: Link) -> None:
    link.handler(echo)
    bad = [(b"host", b"evil"), (b"authorization", b"x"), (b"cookie", b"a=b"), (b"x-forwarded-client-cert", b"By=x")]
    bad += [(b"x-pillion-attempt", b"7"), (b"x_pillion_attempt", b"7")]
    with link.client() as client:
        call = client.open("POST", "/", link.host, end=False)
        call.send(b"some")
        call.end([*bad, (b"x-sum", b"1")])
        assert call.response().status == 200
    assert link.seen.trailers == [(b"x-sum", b"1")]


def test_cookies(link: Link) -> None:
    """One field over HTTP/1.1 (RFC 9113, section 8.2.3)."""
    link.handler(echo)
    with link.client() as client:
        if isinstance(client, Http2Client):
            headers = [("cookie", "a=1"), ("x-between", "y"), ("cookie", "b=2"), ("cookie", "c=3; d=4")]
        else:
            headers = [("cookie", "a=1; b=2; c=3; d=4"), ("x-between", "y")]
        assert client.get("/", link.host, headers).status == 200
    cookies = [value for name, value in link.seen.headers if name == b"cookie"]
    assert b"; ".join(cookies) == b"a=1; b=2; c=3; d=4"
    assert link.up == 2 or len(cookies) == 1


def test_fields_that_repeat_keep_their_order(link: Link) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.read()
        exchange.reply(200, b"", [(b"set-cookie", b"a=1, 2"), (b"x-r", b"1"), (b"set-cookie", b"b=2"), (b"x-r", b"2")])

    link.handler(handle)
    with link.client() as client:
        response = client.get("/", link.host, [("x-a", "1"), ("x-b", "2"), ("x-a", "3"), ("x-a", "")])
    assert text(link.seen.headers) == [(b"x-a", b"1"), (b"x-b", b"2"), (b"x-a", b"3"), (b"x-a", b"")]
    assert response.all("set-cookie") == [b"a=1, 2", b"b=2"]
    assert response.all("x-r") == [b"1", b"2"]


def test_te_trailers(link: Link) -> None:
    """Of one hop, but what gRPC servers insist on; over HTTP/1.1 it is nominated or left out."""
    link.handler(echo)
    with link.client() as client:
        headers = [("te", "trailers")] + ([("connection", "te")] if link.down == 1 else [])
        assert client.get("/", link.host, headers).status == 200
    seen = link.seen
    if isinstance(seen, Exchange2):
        values = [value for name, value in seen.half.sections[0] if name == b"te"]
        assert values in ([], [b"trailers"])
        if link.down == 2 and link.way == "direct":
            assert values == [b"trailers"]
    elif seen.request.header("te") is not None:  # type: ignore[attr-defined]
        assert b"te" in (seen.request.header("connection") or b"").lower()  # type: ignore[attr-defined]


def test_fields_of_one_hop_stop_there(link: Link) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.read()
        if link.up == 1:
            own = [(b"connection", b"x-hop, keep-alive"), (b"x-hop", b"1"), (b"keep-alive", b"timeout=5")]
        else:
            own = []
        exchange.reply(200, b"", [*own, (b"x-kept", b"2"), (b"proxy-authenticate", b"x")])

    link.handler(handle)
    hop = [("connection", "x-hop, keep-alive"), ("x-hop", "1"), ("keep-alive", "timeout=5"), ("proxy-connection", "x")]
    hop += [("proxy-authorization", "x")]
    with link.client() as client:
        headers = hop if link.down == 1 else [("proxy-authorization", "x")]
        response = client.get("/", link.host, [*headers, ("x-kept", "2")])
        assert names(text(link.seen.headers)) == [b"x-kept"]
        wanted = {b"content-length", b"x-kept", b"connection"}
        assert set(names(response.headers)) <= wanted | {b"proxy-authenticate"}
        assert response.header("connection") in (None, b"keep-alive")
        assert client.get("/", link.host).status == 200


def test_large_sections(link: Link) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.read()
        exchange.reply(200, b"", [(b"y-%d" % n, b"w" * 600) for n in range(90)])

    link.handler(handle)
    headers = [(f"x-{n}", "v" * 600) for n in range(95)]
    with link.client() as client:
        response = client.get("/", link.host, headers)
    assert response.status == 200, response
    assert text(link.seen.headers) == [(name.encode(), value.encode()) for name, value in headers]
    assert [field for field in response.headers if field[0][:2] == b"y-"] == [
        (b"y-%d" % n, b"w" * 600) for n in range(90)
    ]


def test_bytes_above_ascii_pass(link: Link) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.read()
        exchange.reply(200, b"", [(b"x-name", b"caf\xc3\xa9\xff")])

    link.handler(handle)
    with link.client() as client:
        response = client.get("/", link.host, [("x-name", "caf\xe9\xff")])
    assert (b"x-name", b"caf\xe9\xff") in link.seen.headers
    assert response.header("x-name") == b"caf\xc3\xa9\xff"


def test_the_asterisk(link: Link) -> None:
    link.handler(echo)
    with link.client() as client:
        assert client.ask("OPTIONS", "*", link.host).response().status == 200
    assert (link.seen.method, link.seen.path) == ("OPTIONS", "*")


def test_an_absolute_target_wins_over_host(link: Link) -> None:
    link.handler(echo)
    with link.client() as client:
        if isinstance(client, Http2Client):
            fields = [field for field in f.request(path=b"/x?y") if field[0] != b":authority"]
            response = client.raw([*fields, (b"host", link.host.encode())]).response()
        else:
            response = client.ask("GET", f"http://{link.host}/x?y", "elsewhere").response()
        assert response.status == 200
    assert (link.seen.path, link.seen.host) == ("/x?y", link.host.encode())


def test_authority_and_host_that_differ_are_refused(link: Link) -> None:
    link.handler(echo)
    with link.client() as client:
        if isinstance(client, Http2Client):
            call = client.open("GET", "/", link.host, [("host", "elsewhere")])
            assert call.reset_code() == 1
        else:
            call1 = client.open("GET", "/", link.host, [("host", link.host)])
            assert call1.response().status == 400
    assert not link.live.seen


def test_connect_is_not_served(link: Link) -> None:
    link.handler(echo)
    with link.client() as client:
        if isinstance(client, Http2Client):
            call = client.raw([(b":method", b"CONNECT"), (b":authority", link.host.encode() + b":80")], end=False)
            assert call.response().status == 501
        else:
            assert client.ask("CONNECT", f"{link.host}:80", link.host).response().status == 501
    assert not link.live.seen


def test_an_upgrade_of_http1_that_is_not_allowed_is_just_a_request(link: Link) -> None:
    link.handler(echo)
    with link.client() as client:
        if isinstance(client, Http2Client):
            fields = f.connect(authority=link.host.encode())
            assert client.raw(fields, end=False).head().status == 501
            assert not link.live.seen
        else:
            hop = [("connection", "upgrade, http2-settings"), ("upgrade", "h2c"), ("http2-settings", "AAMAAABkAAQ")]
            assert client.get("/", link.host, hop).status == 200
            assert text(link.seen.headers) == []


# -- responses


@pytest.mark.parametrize("status", [200, 201, 206, 301, 400, 404, 418, 500, 503, 599])
def test_statuses(link: Link, status: int) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.read()
        exchange.reply(status, b"said", [(b"x-pillion-reason", b"denied")])

    link.handler(handle)
    with link.client() as client:
        response = client.ask("POST", "/", link.host, body=b"x").response()
    assert (response.status, response.body, response.reason) == (status, b"said", "")


def test_head(link: Link) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.read()
        exchange.reply(200, b"twelve bytes")

    link.handler(handle)
    with link.client() as client:
        for _ in range(2):
            response = client.ask("HEAD", "/", link.host).response()
            assert (response.status, response.body) == (200, b"")
            assert response.header("content-length") == b"12"
    assert all(exchange.method == "HEAD" for exchange in link.live.seen)


@pytest.mark.parametrize("status", [204, 304])
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_statuses_without_content(link: Link, status: int, method: str) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.read()
        exchange.bare(status, [(b"etag", b'"x"')])

    link.handler(handle)
    with link.client() as client:
        for _ in range(2):
            response = client.ask(method, "/", link.host).response()
            assert (response.status, response.body) == (status, b"")
            assert response.header("etag") == b'"x"'
            assert response.header("transfer-encoding") is None
            assert response.header("content-length") is None


def test_304_may_tell_the_length_of_what_it_does_not_send(link: Link) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.read()
        exchange.bare(304, [(b"content-length", b"1234")])

    link.handler(handle)
    with link.client() as client:
        for _ in range(2):
            response = client.get("/", link.host)
            assert (response.status, response.body) == (304, b"")
            assert response.header("content-length") in (b"1234", None)


@pytest.mark.parametrize("pieces", [[], [b"x"], [b"abc", b"d" * 20000, b"e"]], ids=len)
def test_an_answer_of_no_stated_length(link: Link, pieces: list[bytes]) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.read()
        exchange.begin(200)
        for piece in pieces:
            exchange.piece(piece)
        exchange.end()

    link.handler(handle)
    with link.client() as client:
        for _ in range(2):
            response = client.get("/", link.host)
            assert response.body == b"".join(pieces)
            assert response.header("content-length") in (None, b"0")


@pytest.mark.parametrize("body", [b"", b"some"])
def test_trailers_of_an_answer(link: Link, body: bytes) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.read()
        exchange.begin(200)
        if body:
            exchange.piece(body)
        exchange.end([(b"x-sum", b"1"), (b"set-cookie", b"evil=1"), (b"x-pillion-reason", b"denied"), (b"x-b", b"2")])

    link.handler(handle)
    with link.client() as client:
        response = client.get("/", link.host, [("te", "trailers")])
        assert (response.body, response.trailers) == (body, [(b"x-sum", b"1"), (b"x-b", b"2")])
        assert response.all("set-cookie") == []
        assert client.get("/", link.host).status == 200


def test_early_hints(link: Link) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.read()
        exchange.inform(103, [(b"link", b"</a>")])
        exchange.inform(103, [(b"link", b"</b>")])
        exchange.reply(200, b"done")

    link.handler(handle)
    with link.client() as client:
        response = client.get("/", link.host)
    assert [(each.status, each.header("link")) for each in response.informational] == [(103, b"</a>"), (103, b"</b>")]
    assert (response.status, response.body) == (200, b"done")


def test_100_continue(link: Link) -> None:
    """The application says when; the body does not come before."""

    def handle(exchange: Exchange) -> None:
        exchange.inform(100)
        exchange.reply(200, exchange.read())

    link.handler(handle)
    with link.client() as client:
        headers = [("expect", "100-continue"), ("content-length", "4")]
        call = client.open("POST", "/", link.host, headers, end=False)
        assert call.informed()[0].status == 100
        call.send(b"some", end=True)
        response = call.response()
    assert (response.status, response.body) == (200, b"some")
    assert [each.status for each in response.informational] == [100]


def test_an_expectation_that_the_application_refuses(link: Link) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.reply(417, b"no")

    link.handler(handle)
    with link.client() as client:
        call = client.open(
            "POST", "/", link.host, [("expect", "100-continue"), ("content-length", "400000")], end=False
        )
        response = call.response()
    assert (response.status, response.body, response.informational) == (417, b"no", [])


def test_an_answer_before_the_end_of_the_request(link: Link) -> None:
    """It arrives whole, and the caller is not left to send the rest for nothing."""

    def handle(exchange: Exchange) -> None:
        exchange.first(5)
        exchange.reply(413, b"enough")

    link.handler(handle)
    with link.client() as client:
        call = client.open("POST", "/", link.host, [("content-length", "10000000")], end=False)
        call.send(b"first")
        response = call.response()
        assert (response.status, response.body) == (413, b"enough")
        if isinstance(call, Call2):
            assert call.reset_code(5) in (0, 8)
    assert not link.app.complete


def test_both_directions_at_once(link: Link) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.first(4)
        exchange.begin(200)
        exchange.piece(b"pong")
        exchange.read()
        exchange.piece(b"last")
        exchange.end()

    link.handler(handle)
    with link.client() as client:
        call = client.open("POST", "/", link.host, end=False)
        call.send(b"ping")
        assert call.head().status == 200
        assert call.first(4) == b"pong"
        call.send(b"more", end=True)
        if isinstance(call, Call2):
            assert call.response().body == b"ponglast"
        else:
            assert call.response().body == b"last"


def test_large_bodies_both_ways(link: Link) -> None:
    up = hashlib.sha256(b"up").digest() * 60000  # 1.9 MB
    down = hashlib.sha256(b"down").digest() * 60000

    def handle(exchange: Exchange) -> None:
        told = hashlib.sha256(exchange.read()).hexdigest().encode()
        exchange.begin(200, [(b"x-sum", told)])
        for at in range(0, len(down), 100_000):
            exchange.piece(down[at : at + 100_000])
        exchange.end()

    link.handler(handle)
    with link.client() as client:
        response = client.ask("POST", "/", link.host, [("content-length", str(len(up)))], up).response()
    assert response.header("x-sum") == hashlib.sha256(up).hexdigest().encode()
    assert response.body == down


# -- ends that are not clean


def test_a_caller_that_leaves_while_it_waits(link: Link) -> None:
    gone: list[bool] = []

    def handle(exchange: Exchange) -> None:
        exchange.read()
        gone.append(exchange.gone())

    link.handler(handle)
    client = link.client()
    call = client.ask("POST", "/", link.host, body=b"some")
    until(lambda: link.live.seen)
    time.sleep(0.01)
    call.cancel()
    until(lambda: gone)
    assert gone == [True]
    client.close()


def test_a_caller_that_leaves_in_its_request(link: Link) -> None:
    cut: list[Exception] = []

    def handle(exchange: Exchange) -> None:
        exchange.first(4)
        call.cancel()
        try:
            exchange.read()
        except Cut as exc:
            cut.append(exc)
            raise

    link.handler(handle)
    client = link.client()
    call = client.open("POST", "/", link.host, end=False)
    call.send(b"some")
    until(lambda: cut)
    client.close()


def test_a_caller_that_leaves_in_the_answer(link: Link) -> None:
    gone: list[bool] = []

    def handle(exchange: Exchange) -> None:
        exchange.read()
        exchange.begin(200)
        exchange.piece(b"some")
        gone.append(exchange.gone())

    link.handler(handle)
    client = link.client()
    call = client.ask("GET", "/", link.host)
    assert call.first(4) == b"some"
    call.cancel()
    until(lambda: gone)
    assert gone == [True]
    client.close()


def test_a_caller_whose_connection_is_reset(link: Link) -> None:
    gone: list[bool] = []

    def handle(exchange: Exchange) -> None:
        exchange.read()
        gone.append(exchange.gone())

    link.handler(handle)
    client = link.client()
    client.ask("GET", "/", link.host)
    until(lambda: link.live.seen)
    client.abort()
    until(lambda: gone)
    assert gone == [True]


def test_an_application_that_breaks_off_before_its_answer(link: Link) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.read()
        exchange.cut()

    link.handler(handle)
    with link.client() as client:
        response = client.ask("POST", "/", link.host, body=b"x").response()
        assert (response.status, response.reason) == (502, "upstream_reset")
    assert len(link.live.seen) == 1


@pytest.mark.parametrize("stated", [False, True])
def test_an_application_that_breaks_off_in_its_answer(link: Link, stated: bool) -> None:
    """Never a clean end, whatever the framing."""

    def handle(exchange: Exchange) -> None:
        exchange.read()
        if stated:
            exchange.inform(200, [(b"content-length", b"1000")])
            if isinstance(exchange, Exchange1):
                exchange.conn.send(b"some")
            else:
                exchange.piece(b"some")
        else:
            exchange.begin(200)
            exchange.piece(b"some")
        go.wait(10)
        exchange.cut()

    go = threading.Event()
    link.handler(handle)
    with link.client() as client:
        call = client.ask("POST", "/", link.host, body=b"x")
        assert call.head().status == 200
        assert call.first(4) == b"some"
        go.set()
        with pytest.raises(Cut) as caught:
            call.response()
        if isinstance(call, Call2):
            assert caught.value.code not in (None, 0, 8)
            assert isinstance(client, Http2Client) and client.wire.ended is None


@pytest.mark.parametrize("sent", [b"abc", b"abcde"])
def test_a_request_whose_length_is_a_lie(link: Link, sent: bytes) -> None:
    """Less or more than the four bytes that were announced: never completed, nor what is beyond taken for a request."""
    link.handler(echo)
    with link.client() as client:
        call = client.open("POST", "/", link.host, [("content-length", "4")], end=False)
        if isinstance(call, Call2):
            assert isinstance(client, Http2Client)
            client.wire.send(f.data(call.sid, sent, True))
            assert call.reset_code() == 1
            assert not link.app.complete
        elif len(sent) < 4:
            call.send(sent)
            client.client.shut()
            with pytest.raises(Cut):
                call.response()
            assert not link.app.complete
        else:
            call.send(sent + b" / HTTP/1.1\r\n\r\n")
            assert call.response().body == sent[:4]
            assert b"HTTP/1.1 2" not in client.client.reader.rest()
            assert len(link.app.complete) == 1


@pytest.mark.parametrize("sent", [b"abc", b"abcde"])
def test_an_answer_whose_length_is_a_lie(link: Link, sent: bytes) -> None:
    def handle(exchange: Exchange) -> None:
        exchange.read()
        exchange.inform(200, [(b"content-length", b"4")])
        if isinstance(exchange, Exchange2):
            exchange.wire.send(f.data(exchange.sid, sent, True))
        else:
            assert isinstance(exchange, Exchange1)
            exchange.conn.send(sent)
            if len(sent) < 4:
                exchange.conn.shut()
            exchange.conn.closed(5)

    link.handler(handle)
    with link.client() as client:
        response = whole(client.ask("POST", "/", link.host, body=b"x"))
    if response is not None and response.status != 502:
        # HTTP/1.1: what is beyond is no part of the answer, and the connection goes
        assert link.up == 1 and len(sent) > 4 and response.body == b"abcd"


EVIL = {
    "CR LF in a value": (b"x-a", b"b\r\nevil: 1"),
    "LF in a value": (b"x-a", b"b\nevil: 1"),
    "CR in a value": (b"x-a", b"b\revil: 1"),
    "NUL in a value": (b"x-a", b"b\0evil"),
    "CR LF in a name": (b"x-a: b\r\nevil", b"1"),
    "space in a name": (b"x evil", b"1"),
    "a second request": (b"x-a", b"b\r\n\r\nGET /evil HTTP/1.1\r\nhost: reviews\r\n\r\n"),
    "transfer-encoding": (b"transfer-encoding", b"chunked"),
    "connection": (b"connection", b"close"),
}


@pytest.mark.parametrize("field", EVIL.values(), ids=EVIL)
def test_nothing_is_injected_by_a_caller(link: Link, field: tuple[bytes, bytes]) -> None:
    if link.down == 1:
        return  # bytes of HTTP/1.1: test_live_framing.py
    link.handler(echo)
    with link.client() as client:
        assert isinstance(client, Http2Client)
        fields = f.request(b"POST", b"/", link.host.encode(), more=[field])
        call = client.raw(fields, end=False)
        assert call.reset_code() == 1
        assert client.get("/", link.host).status == 200
    assert len(link.live.seen) == 1


@pytest.mark.parametrize("field", EVIL.values(), ids=EVIL)
def test_nothing_is_injected_by_an_application(link: Link, field: tuple[bytes, bytes]) -> None:
    if link.up == 1:
        return  # bytes of HTTP/1.1: test_live_framing.py

    def handle(exchange: Exchange) -> None:
        exchange.read()
        exchange.bare(200, [field])

    link.handler(handle)
    with link.client() as client:
        response = client.ask("POST", "/", link.host, body=b"x").response()
        assert (response.status, response.reason) == (502, "bad_response")
        assert response.header("evil") is None
        link.handler(echo)
        assert client.get("/", link.host).status == 200


def test_trailers_that_inject_are_no_clean_end(link: Link) -> None:
    if link.up == 1:
        return  # bytes of HTTP/1.1: test_live_framing.py

    def handle(exchange: Exchange) -> None:
        exchange.read()
        exchange.begin(200)
        exchange.piece(b"some")
        exchange.end([(b"x-a", b"b\r\nevil: 1")])

    link.handler(handle)
    with link.client() as client:
        response = whole(client.ask("POST", "/", link.host, body=b"x"))
    assert response is None or response.status == 502


def test_an_answer_to_nobody(link: Link) -> None:
    """An application that answers with a status that only an upgrade has, though nobody asked."""

    def handle(exchange: Exchange) -> None:
        exchange.read()
        exchange.bare(101, [(b"x-a", b"b")])

    link.handler(handle)
    with link.client() as client:
        response = client.ask("POST", "/", link.host, body=b"x").response()
        assert (response.status, response.reason) == (502, "bad_response")


def test_many_at_once_are_kept_apart(link: Link) -> None:
    link.handler(echo)
    clients = [link.client() for _ in range(1 if link.down == 2 else 20)]
    calls = []
    for number in range(20):
        client = clients[number % len(clients)]
        calls.append(client.open("POST", f"/{number}", link.host, end=False))
    for number, call in enumerate(calls):
        call.send(b"%d:" % number)
    for number, call in enumerate(calls):
        call.send(b"x" * (number * 1000), end=True)
    for number, call in enumerate(calls):
        assert call.response().body == b"%d:" % number + b"x" * (number * 1000)
    for client in clients:
        client.close()
