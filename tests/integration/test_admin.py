"""The admin interface on real sockets: with httpx as a client would, and with raw bytes as others would."""

import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import trio
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sidecar.proxy import admin as admin_module
from sidecar.proxy.admin import Admin
from sidecar.proxy.admin_door import CONNECTIONS_MAX, AdminSources, bind_admin
from sidecar.proxy.bind import BindError
from sidecar.telemetry.logs import check_level
from sidecar.telemetry.metrics import Registry


class Fake:
    """Sources over plain attributes."""

    def __init__(self) -> None:
        self.registry = Registry(lambda: 0.0)
        self.registry.requests(side="in", service="a", route="b").record(b"GET", 200, "ok", 0.1)
        self.wrong: list[str] = []
        self.missing: list[str] = []
        self.config: object = {"revision": "abc", "services": {"reviews": {"timeout_s": 1.5}}}
        self.rows: Iterable[Mapping[str, object]] = [
            {"service": "reviews", "endpoint": "10.0.0.1:80", "breaker": "closed", "active": 3, "rate": 0.5},
            {"service": "reviews", "endpoint": "10.0.0.22:80", "breaker": "open", "labels": {"v": "1"}, "zone": None},
        ]
        self.level = "info"

    def set_level(self, level: str) -> None:
        check_level(level)
        self.level = level

    def sources(self) -> AdminSources:
        return AdminSources(
            metrics=lambda openmetrics: self.registry.render(openmetrics=openmetrics),
            livez=lambda: self.wrong,
            readyz=lambda: self.missing,
            config=lambda: self.config,
            clusters=lambda: self.rows,
            set_log_level=self.set_level,
        )


@pytest.fixture
def fake() -> Fake:
    return Fake()


@asynccontextmanager
async def serving(sources: AdminSources, address: str = "127.0.0.1:0") -> AsyncIterator[socket.socket]:
    sock = bind_admin(address)
    async with trio.open_nursery() as nursery:
        await nursery.start(Admin(sources).serve, [trio.SocketListener(trio.socket.from_stdlib_socket(sock))])
        yield sock
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def client(sources: AdminSources) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        serving(sources) as sock,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{sock.getsockname()[1]}", trust_env=False) as http,
    ):
        yield http


async def raw(sock: socket.socket, data: bytes) -> bytes:
    """What comes back for these bytes, up to the end of the connection."""
    with trio.fail_after(10):
        stream = await trio.open_tcp_stream("127.0.0.1", sock.getsockname()[1])
        async with stream:
            await stream.send_all(data)
            answer = b""
            while part := await stream.receive_some():
                answer += part
            return answer


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 ")
    return int(answer[9:12])


GET = b"GET %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


async def test_the_index_and_a_404_list_what_there_is(fake: Fake) -> None:
    async with client(fake.sources()) as http:
        for path, expected in (("/", 200), ("/nothing", 404)):
            answer = await http.get(path)
            assert answer.status_code == expected
            for page in ("/metrics", "/livez", "/readyz", "/config", "/clusters", "/log-level"):
                assert page in answer.text
            assert answer.headers["x-content-type-options"] == "nosniff"


async def test_metrics_in_both_formats(fake: Fake) -> None:
    async with client(fake.sources()) as http:
        for accept in ("*/*", "text/plain", "text/html,*/*;q=0.1", ""):
            answer = await http.get("/metrics", headers={"accept": accept})
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            assert any(f.name == "http_server_request_duration_seconds" for f in parse_text(answer.text))
        prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
        answer = await http.get("/metrics", headers={"accept": prometheus})
        assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        assert list(parse_openmetrics(answer.text))
        answer = await http.get("/metrics", headers={"accept": "application/openmetrics-text;q=0,text/plain"})
        assert answer.headers["content-type"].startswith("text/plain")


async def test_a_large_scrape_arrives_whole_on_http_1_0_too(fake: Fake) -> None:
    for number in range(1000):
        fake.registry.requests(side="out", service="a", route=f"route-{number}").record(b"GET", 200, "ok", 0.1)
    async with serving(fake.sources()) as sock:
        for version in (b"1.0", b"1.1"):
            answer = await raw(sock, GET.replace(b"1.1", version) % b"/metrics")
            assert status(answer) == 200
            assert answer.count(b"http_client_request_duration_seconds_count{") == 1000
            assert (b"chunked" in answer) == (version == b"1.1")


async def test_other_tasks_run_while_a_long_answer_is_made(fake: Fake) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    for number in range(640):
        fake.registry.requests(side="out", service="a", route=f"route-{number}").record(b"GET", 200, "ok", 0.1)
    seen: list[int] = []

    def metrics(openmetrics: bool) -> Iterable[bytes]:
        for step in fake.registry.render(openmetrics=openmetrics):
            seen.append(turns)
            yield step

    async with client(replace(fake.sources(), metrics=metrics)) as http, trio.open_nursery() as nursery:
        nursery.start_soon(count)
        assert (await http.get("/metrics")).status_code == 200
        nursery.cancel_scope.cancel()
    # Trio shuffles the tasks of one pass, so from one step to the next there may be none, one or two turns.
    assert seen[-1] - seen[0] >= len(seen) // 2


async def test_health(fake: Fake) -> None:
    async with client(fake.sources()) as http:
        assert (await http.get("/livez")).status_code == 200
        assert (await http.get("/readyz")).text == "ready\n"
        fake.missing = ["no certificate", "no policy"]
        answer = await http.get("/readyz")
        assert answer.status_code == 503
        assert answer.text == "not ready:\n- no certificate\n- no policy\n"
        fake.missing = ["draining"]
        assert "- draining" in (await http.get("/readyz")).text
        fake.wrong = ["the reactor stands still"]
        assert (await http.get("/livez")).status_code == 503


async def test_config_is_json_in_slices(fake: Fake) -> None:
    async with client(fake.sources()) as http:
        assert (await http.get("/config")).json() == fake.config
        fake.config = {f"service-{number}": {"path": Path("/x"), "values": list(range(10))} for number in range(2000)}
        answer = await http.get("/config")
        assert answer.headers["content-type"] == "application/json"
        assert len(answer.json()) == 2000


async def test_clusters_as_json_and_as_a_table(fake: Fake) -> None:
    async with client(fake.sources()) as http:
        assert (await http.get("/clusters")).json() == fake.rows
        table = (
            "SERVICE  ENDPOINT      BREAKER  ACTIVE  RATE   LABELS  ZONE\n"
            "reviews  10.0.0.1:80   closed   3       0.500  -       -\n"
            "reviews  10.0.0.22:80  open     -       -      v=1     -\n"
        )
        assert (await http.get("/clusters?format=text")).text == table
        assert (await http.get("/clusters", headers={"accept": "text/plain"})).text == table
        assert (await http.get("/clusters?format=json", headers={"accept": "text/plain"})).json() == fake.rows
        assert (await http.get("/clusters?format=xml")).status_code == 400
        fake.rows = ({"endpoint": str(number)} for number in range(1000))
        assert len((await http.get("/clusters")).json()) == 1000
        fake.rows = [{"endpoint": str(number)} for number in range(1000)]
        assert len((await http.get("/clusters?format=text")).text.splitlines()) == 1001
        fake.rows = []
        assert (await http.get("/clusters")).json() == []
        assert (await http.get("/clusters?format=text")).text == "no endpoints\n"


async def test_the_log_level_changes_by_post_only(fake: Fake) -> None:
    async with client(fake.sources()) as http:
        answer = await http.get("/log-level?level=debug")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert fake.level == "info"
        assert (await http.post("/log-level?level=debug")).status_code == 200
        assert fake.level == "debug"
        answer = await http.post("/log-level?level=loud")
        assert answer.status_code == 400
        assert "give one of debug" in answer.text
        for query in ("", "?level=debug&level=info", "?" + "&".join("abcdefghijklmnopqrst")):
            assert (await http.post(f"/log-level{query}")).status_code == 400
        assert fake.level == "debug"


async def test_methods_that_are_not_for_a_page(fake: Fake) -> None:
    async with client(fake.sources()) as http:
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
            answer = await http.request(method, "/metrics")
            assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


async def test_head_is_get_without_a_body(fake: Fake) -> None:
    async with client(fake.sources()) as http:
        for path in ("/", "/metrics", "/config", "/clusters", "/readyz"):
            head = await http.head(path)
            get = await http.get(path)
            assert head.status_code == 200
            assert head.content == b""
            assert {**head.headers, "date": ""} == {**get.headers, "date": ""}
        assert (await http.head("/nothing")).status_code == 404
    async with serving(fake.sources()) as sock:
        answer = await raw(sock, (GET % b"/").replace(b"GET", b"HEAD"))
        assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("host", "accepted"),
    [
        (b"localhost", True),
        (b"LOCALHOST:1", True),
        (b"127.0.0.1:9901", True),
        (b"[::1]:9901", True),
        (b"[::1]", True),
        (b"evil.example", False),
        (b"127.0.0.1.evil.example", False),
        (b"localhost.evil.example:9901", False),
        (b"localhost:80@evil.example", False),
        (b"localhost:", False),
        (b"10.0.0.1", False),
        (b"", False),
    ],
)
async def test_only_names_of_loopback_are_served(fake: Fake, host: bytes, accepted: bool) -> None:
    async with serving(fake.sources()) as sock:
        answer = await raw(sock, b"GET /config HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % host)
        assert (status(answer) == 200) == accepted
        assert (b"revision" in answer) == accepted
        if not accepted:
            assert status(answer) in (400, 403)


@pytest.mark.parametrize(
    ("field", "accepted"),
    [
        (b"Origin: http://localhost:9901", True),
        (b"Origin: http://localhost", False),
        (b"Origin: https://localhost:9901", False),
        (b"Origin: http://evil.example", False),
        (b"Origin: null", False),
        (b"Origin: http://localhost:9901\r\nOrigin: http://evil.example", False),
        (b"Sec-Fetch-Site: same-origin", True),
        (b"Sec-Fetch-Site: none", True),
        (b"Sec-Fetch-Site: cross-site", False),
        (b"Sec-Fetch-Site: same-site", False),
    ],
)
async def test_pages_of_other_origins_are_refused(fake: Fake, field: bytes, accepted: bool) -> None:
    async with serving(fake.sources()) as sock:
        for method in (b"POST", b"GET"):
            request = b"%b /log-level?level=error HTTP/1.1\r\nHost: localhost:9901\r\n%b\r\nConnection: close\r\n\r\n"
            answer = await raw(sock, request % (method, field))
            assert status(answer) == ((200 if method == b"POST" else 405) if accepted else 403)
        assert fake.level == ("error" if accepted else "info")


@pytest.mark.parametrize(
    ("request_bytes", "expected"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\n\r\n", 403),  # valid, but without a Host nobody can tell who asks
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET http://evil.example/config HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET //localhost/config HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET /../config HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 4000 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: x\r\n\r\n", 501),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST /log-level?level=debug HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n" + b"a" * 5000, 413),
        (
            b"POST /log-level?level=debug HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"600\r\n" + b"a" * 0x600 + b"\r\n",
            413,
        ),
        (b"HEAD / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n" + b"a" * 5000, 413),
    ],
)
async def test_what_is_malformed_or_too_long_is_refused(fake: Fake, request_bytes: bytes, expected: int) -> None:
    async with serving(fake.sources()) as sock:
        closing = request_bytes.replace(b"Host: localhost\r\n", b"Host: localhost\r\nConnection: close\r\n", 1)
        assert status(await raw(sock, closing)) == expected
        assert status(await raw(sock, GET % b"/livez")) == 200
    assert fake.level == "info"


async def test_pipelined_requests_are_answered_in_order(fake: Fake) -> None:
    one = b"GET /%b HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with serving(fake.sources()) as sock:
        answer = await raw(sock, one % b"livez" + one % b"nothing" + GET % b"readyz".join((b"/", b"")))
        assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [200, 404, 200]


async def test_100_continue(fake: Fake) -> None:
    async with serving(fake.sources()) as sock, await trio.open_tcp_stream(*sock.getsockname()) as stream:
        await stream.send_all(
            b"POST /log-level?level=debug HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n"
        )
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 100")
        await stream.send_all(b"{}")
        answer = b""
        while part := await stream.receive_some():
            answer += part
        assert status(answer) == 200
    assert fake.level == "debug"


async def test_sources_that_raise_end_one_answer_only(fake: Fake, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> object:
        raise RuntimeError("broken on purpose")

    def broken_in_the_middle(_openmetrics: bool) -> Iterable[bytes]:
        yield b"x" * 20_000
        raise RuntimeError("broken in the middle")

    async with serving(replace(fake.sources(), config=broken, metrics=broken_in_the_middle)) as sock:
        answer = await raw(sock, GET % b"/config")
        assert status(answer) == 500
        assert b"on purpose" not in answer
        answer = await raw(sock, GET % b"/metrics")
        assert not answer.endswith(b"0\r\n\r\n")  # cut, and seen to be cut
        assert status(await raw(sock, GET % b"/livez")) == 200
    assert "broken on purpose" in caplog.text
    assert "broken in the middle" in caplog.text


async def test_slow_requests_and_slow_readers_meet_deadlines(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_module, "REQUEST_S", 0.2)
    monkeypatch.setattr(admin_module, "SEND_S", 0.2)

    def endless(_openmetrics: bool) -> Iterable[bytes]:
        while True:
            yield b"x" * 65_536

    async with serving(replace(fake.sources(), metrics=endless)) as sock:
        assert await raw(sock, b"GET / HT") == b""
        assert await raw(sock, b"") == b""
        stream = await trio.open_tcp_stream(*sock.getsockname())
        with trio.fail_after(10):
            await stream.send_all(GET % b"/metrics")
            await trio.sleep(0.5)  # what is tested is that the other side does not wait for us
            with suppress(trio.BrokenResourceError):  # an end without a reset is as good
                while await stream.receive_some(1 << 20):
                    pass
        await stream.aclose()


async def test_the_number_of_connections_is_bounded(fake: Fake) -> None:
    async with serving(fake.sources()) as sock:
        held = []
        for _ in range(CONNECTIONS_MAX):
            stream = await trio.open_tcp_stream(*sock.getsockname())
            await stream.send_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert status(await stream.receive_some()) == 200
            held.append(stream)
        assert status(await raw(sock, GET % b"/livez")) == 503
        await held.pop().aclose()
        with trio.fail_after(5):
            while status(await raw(sock, GET % b"/livez")) != 200:
                pass
        for stream in held:
            await stream.aclose()


async def test_a_unix_socket_is_for_its_owner_alone(fake: Fake, tmp_path: Path) -> None:
    path = str(tmp_path / "admin.sock")
    for _ in range(2):  # the second time over the stale socket of the first
        async with (
            serving(fake.sources(), f"unix:{path}"),
            httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=path), base_url="http://localhost") as http,
        ):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            assert (await http.get("/readyz")).status_code == 200
            with pytest.raises(OSError, match="Address already in use"):
                bind_admin(f"unix:{path}")
    other = tmp_path / "file"
    other.write_text("precious")
    with pytest.raises(OSError, match=r"cannot listen on unix:.*file: Address already in use"):
        bind_admin(f"unix:{other}")
    assert other.read_text() == "precious"


def test_addresses_beyond_loopback_and_ports_in_use_are_refused() -> None:
    for address in ("0.0.0.0:0", "10.0.0.1:80", "[::]:0", "127.0.0.1:99999"):
        with pytest.raises(ValueError, match="loopback only"):
            bind_admin(address)
    for address in ("", "9901", "example.com:80", "127.0.0.1:x"):
        with pytest.raises(ValueError, match="give HOST:PORT or unix:PATH"):
            bind_admin(address)
    with bind_admin("localhost:0") as sock, pytest.raises(BindError, match=r"cannot listen on 127\.0\.0\.1:"):
        bind_admin(f"127.0.0.1:{sock.getsockname()[1]}")


def test_the_json_of_rows_has_a_line_for_each() -> None:
    from sidecar.proxy.admin_pages import row_slices

    text = b"".join(row_slices([{"a": 1}, {"b": None}]))
    assert text == b'[\n{"a": 1},\n{"b": null}\n]\n'
    assert json.loads(text) == [{"a": 1}, {"b": None}]
