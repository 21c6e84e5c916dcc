"""The clients that people use, as they are, through two sidecars: what they ask for is what they get.

Every client meets an application of HTTP/1.1 and one of HTTP/2. Those of HTTP/1.1 come as to any proxy, by URL; those
of HTTP/2 with prior knowledge, at the sidecar's own address.
"""

import hashlib
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import trio
from support.http2_live import Exchange, serve
from support.mesh import Mesh, environment, tool, until

BIG = hashlib.shake_256(b"big").digest(10 * 1024 * 1024)
DIGEST = hashlib.sha256(BIG).hexdigest()
PORTS = {"http": {"port": 80}, "two": {"port": 81, "protocol": "http2"}}
HOSTS = {1: "reviews", 2: "two.reviews"}
TRAILERS = [(b"x-checksum", b"abc"), (b"x-count", b"3")]


def application(exchange: Exchange) -> None:
    if exchange.header("expect") is not None:
        exchange.inform(100)
    body = exchange.read()
    if exchange.path == "/big":
        exchange.reply(200, BIG, [(b"content-type", b"application/octet-stream")])
    elif exchange.path == "/digest":
        exchange.reply(200, hashlib.sha256(body).hexdigest().encode(), [(b"x-method", exchange.method.encode())])
    elif exchange.path == "/trailers":
        exchange.begin(200, [(b"trailer", b"x-checksum, x-count")])
        for piece in (b"one ", b"two ", b"three"):
            exchange.piece(piece)
        exchange.end(TRAILERS)
    elif exchange.path == "/given-trailers":
        exchange.reply(200, b", ".join(b"%b=%b" % field for field in exchange.trailers))
    elif exchange.path == "/empty":
        exchange.bare(204)
    elif exchange.path == "/":
        exchange.reply(200, b"hello", [(b"x-method", exchange.method.encode())])
    else:
        exchange.reply(404, b"no such page", [(b"x-own", b"yes")])


@dataclass
class Live:
    """`reviews` with an application of each version, behind two sidecars."""

    mesh: Mesh
    address: str  # of the caller's sidecar
    sent: Path  # a file of BIG

    @property
    def proxy(self) -> str:
        return f"http://{self.address}"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    files = tmp_path_factory.mktemp("clients")
    with Mesh(files) as mesh:
        apps = {name: mesh.backend(serve(version, application)) for version, name in ((1, "http"), (2, "two"))}
        reviews = mesh.sidecar("reviews", {"web": {}, "reviews": {"ports": PORTS}}, app=apps, outbound=False)
        services = {"web": {}, "reviews": {"ports": PORTS, "address": [reviews.inbound]}}
        web = mesh.sidecar("web", services, inbound=False)
        sent = files / "big"
        sent.write_bytes(BIG)
        yield Live(mesh, web.outbound, sent)
        for sidecar in (web, reviews):
            until(lambda sidecar=sidecar: sidecar.metric("pillion_requests_active") == 0)  # type: ignore[misc]
            assert sidecar.crashes == 0


BOTH = [pytest.param(1, id="to-1"), pytest.param(2, id="to-2")]
SECOND_LONG = [pytest.param(1, id="to-1"), pytest.param(2, id="to-2", marks=pytest.mark.long)]
on_the_first = pytest.mark.parametrize("host", SECOND_LONG, indirect=True)


@pytest.fixture(params=BOTH)
def host(request: pytest.FixtureRequest) -> str:
    """Of the application of either version."""
    return HOSTS[request.param]


def run(*command: str) -> bytes:
    done = subprocess.run([tool(command[0]), *command[1:]], capture_output=True, timeout=60, env=environment())
    assert done.returncode == 0, (done.returncode, done.stderr, done.stdout[:2000])
    return done.stdout


# -- curl

Curl = Callable[..., bytes]


@pytest.fixture(params=[1, 2], ids=["h1", "h2"])
def curl(request: pytest.FixtureRequest, live: Live, host: str) -> Curl:
    """curl for a path, with these options; it says its version and the status, alone on the last line."""

    def curl(path: str, *options: str) -> bytes:
        write = ["--silent", "--show-error", "--max-time", "30", "--write-out", "\n%{http_version} %{http_code}"]
        if request.param == 1:
            out = run("curl", *write, *options, "--proxy", live.proxy, f"http://{host}{path}")
        else:
            where = ["--header", f"host: {host}", f"{live.proxy}{path}"]
            out = run("curl", *write, "--http2-prior-knowledge", *options, *where)
        out, _, told = out.rpartition(b"\n")
        version, status = told.split()
        assert version == (b"1.1" if request.param == 1 else b"2")
        return status + b" " + out

    return curl


def test_curl(curl: Curl) -> None:
    assert curl("/") == b"200 hello"
    assert curl("/elsewhere") == b"404 no such page"
    assert curl("/empty") == b"204 "
    assert curl("/digest", "--data", "a=b") == b"200 " + hashlib.sha256(b"a=b").hexdigest().encode()
    head = curl("/big", "--head").lower()
    assert head.startswith(b"200 ") and re.search(rb"^content-length: %d\r$" % len(BIG), head, re.MULTILINE)


@on_the_first
def test_curl_with_ten_megabytes_each_way(curl: Curl, live: Live, tmp_path: Path) -> None:
    up = b"200 " + DIGEST.encode()
    assert curl("/digest", "--data-binary", f"@{live.sent}") == up
    assert curl("/digest", "--upload-file", str(live.sent)) == up
    chunked = ["--header", "transfer-encoding: chunked", "--header", "expect:", "--data-binary", f"@{live.sent}"]
    assert curl("/digest", *chunked) == up
    received = tmp_path / "received"
    assert curl("/big", "--output", str(received)) == b"200 "
    assert received.read_bytes() == BIG


def test_curl_shows_trailers(curl: Curl, tmp_path: Path) -> None:
    heads = tmp_path / "heads"
    assert curl("/trailers", "--dump-header", str(heads)) == b"200 one two three"
    assert {b"x-checksum: abc", b"x-count: 3"} <= set(heads.read_bytes().splitlines())


@on_the_first
def test_curl_asks_often_on_one_connection(live: Live, host: str) -> None:
    """Only over HTTP/1.1: curl 7.88 cannot use a connection again that it began with prior knowledge."""
    command = ["curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code} %{num_connects},"]
    out = run(*command, "--proxy", live.proxy, f"http://{host}/#[1-200]")
    assert out == b"200 1," + b"200 0," * 199


# -- the tools of nghttp2


def nghttp(live: Live, host: str, path: str, *options: str) -> bytes:
    return run("nghttp", *options, "-H", f":authority: {host}", f"{live.proxy}{path}")


@on_the_first
def test_nghttp(live: Live, host: str) -> None:
    assert nghttp(live, host, "/") == b"hello"
    assert nghttp(live, host, "/elsewhere") == b"no such page"
    assert nghttp(live, host, "/digest", "-d", str(live.sent)) == DIGEST.encode()
    assert nghttp(live, host, "/big") == BIG
    told = nghttp(live, host, "/big", "-nv", "-H", ":method: HEAD")
    assert b":status: 200" in told and b"content-length: %d" % len(BIG) in told and b"recv DATA" not in told


def test_nghttp_with_trailers_each_way(live: Live, host: str, tmp_path: Path) -> None:
    told = nghttp(live, host, "/trailers", "-nv")
    assert b"x-checksum: abc" in told and b"x-count: 3" in told
    (tmp_path / "sent").write_bytes(b"some")
    options = ["-d", str(tmp_path / "sent"), "--no-content-length", "--trailer", "x-end: here"]
    given = nghttp(live, host, "/given-trailers", *options)
    assert given == b"x-end=here"


@on_the_first
@pytest.mark.parametrize("h1", [True, False], ids=["h1", "h2"])
@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.long)])
def test_h2load(live: Live, host: str, h1: bool, count: int) -> None:
    options = ["--h1", "-c", "20", "-m", "1"] if h1 else ["-c", "4", "-m", "50"]
    out = run("h2load", "-n", str(count), *options, f"--connect-to={live.address}", f"http://{host}/")
    assert re.search(rb"%d succeeded, 0 failed, 0 errored, 0 timeout" % count, out), out
    assert re.search(rb"%d 2xx, 0 3xx, 0 4xx, 0 5xx" % count, out), out


@on_the_first
def test_h2load_with_bodies(live: Live, host: str, tmp_path: Path) -> None:
    (tmp_path / "sent").write_bytes(BIG[:40_000])
    options = ["-n", "300", "-c", "3", "-m", "20", "-d", str(tmp_path / "sent")]
    out = run("h2load", *options, f"--connect-to={live.address}", f"http://{host}/digest")
    assert re.search(rb"300 succeeded, 0 failed, 0 errored, 0 timeout", out), out
    assert re.search(rb"300 2xx, 0 3xx, 0 4xx, 0 5xx", out), out


# -- libraries of Python


class Python:
    """What httpx and requests have in common."""

    def __init__(self, client: Any, at: str, headers: dict[str, str]) -> None:
        self.client, self.at, self.headers = client, at, headers

    def __call__(self, method: str, path: str, **options: Any) -> Any:
        response = self.client.request(method, self.at + path, headers=self.headers, **options)
        if isinstance(response, httpx.Response):
            assert response.http_version == ("HTTP/2" if self.headers else "HTTP/1.1")
        return response


@pytest.fixture(params=["httpx-1", "httpx-2", "requests"])
def python(request: pytest.FixtureRequest, live: Live, host: str) -> Iterator[Python]:
    if request.param == "httpx-1":
        with httpx.Client(proxy=live.proxy, timeout=30, trust_env=False) as client:
            yield Python(client, f"http://{host}", {})
    elif request.param == "httpx-2":
        with httpx.Client(http1=False, http2=True, timeout=30, trust_env=False) as client:
            yield Python(client, live.proxy, {"host": host})
    else:
        with requests.Session() as session:
            session.trust_env = False
            session.proxies = {"http": live.proxy}
            yield Python(session, f"http://{host}", {})


def test_libraries(python: Python) -> None:
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        answer = python(method, "/")
        assert (answer.status_code, answer.content) == (200, b"hello")
        assert answer.headers["x-method"] == method
    missing = python("GET", "/elsewhere")
    assert (missing.status_code, missing.content, missing.headers["x-own"]) == (404, b"no such page", "yes")
    empty = python("GET", "/empty")
    assert (empty.status_code, empty.content) == (204, b"")
    head = python("HEAD", "/big")
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(BIG)), b"")
    assert python("GET", "/trailers").content == b"one two three"
    assert python("GET", "/").content == b"hello"


@on_the_first
def test_libraries_with_ten_megabytes_each_way(python: Python) -> None:
    pieces = [BIG[at : at + 300_000] for at in range(0, len(BIG), 300_000)]
    whole = {"content": BIG} if isinstance(python.client, httpx.Client) else {"data": BIG}
    chunked = {next(iter(whole)): iter(pieces)}
    for options in (whole, chunked):
        answer = python("POST", "/digest", **options)
        assert (answer.status_code, answer.text) == (200, DIGEST)
    assert python("GET", "/big").content == BIG


@on_the_first
def test_libraries_ask_often(python: Python) -> None:
    for number in range(200):
        assert python("GET", "/" if number % 3 else "/elsewhere").status_code == (200 if number % 3 else 404)


async def test_httpx_with_many_requests_at_a_time(live: Live, host: str) -> None:
    """It ends its streams with a frame of its own, which must not find the stream reset because all is answered. What
    it sends fits a window: of several tasks that wait for one, httpcore 1.0 may leave some waiting."""
    body = BIG[:40_000]
    digest = hashlib.sha256(body).hexdigest()
    limits = httpx.Limits(max_connections=2)
    statuses: list[int] = []
    async with httpx.AsyncClient(http1=False, http2=True, timeout=30, trust_env=False, limits=limits) as client:

        async def ask(number: int) -> None:
            if number % 10:
                answer = await client.get(f"{live.proxy}/", headers={"host": host})
                assert answer.content == b"hello"
            else:
                answer = await client.post(f"{live.proxy}/digest", content=body, headers={"host": host})
                assert answer.text == digest
            statuses.append(answer.status_code)

        await ask(1)  # which brings the connection's own window
        async with trio.open_nursery() as nursery:
            for number in range(80):
                nursery.start_soon(ask, number)
    assert statuses == [200] * 81
