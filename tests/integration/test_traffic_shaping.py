"""Mirroring, canaries by cookie and shares of faults as they look on the wire, from a live sidecar to scripted servers
and through a pair of sidecars. What routes change or answer by themselves: test_shaping_answers.py."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from support.grpc_calls import GrpcServer, call_channel
from support.mesh import Backend, Conn, Mesh, Pair, Sidecar, until

VERSIONS = {"v1": {"labels": {"version": "1"}}, "v2": {"labels": {"version": "2"}}}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Mesh(tmp_path_factory.mktemp("shaping")) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def web(mesh: Mesh) -> Iterator[Sidecar]:
    sidecar = mesh.sidecar("web", {"web": {}}, inbound=False)
    yield sidecar
    assert sidecar.crashes == 0
    until(lambda: sidecar.metric("pillion_requests_active") == 0)


def versions(mesh: Mesh, web: Sidecar, name: str, routes: list[Any]) -> tuple[Backend, Backend]:
    one, two = mesh.backend(), mesh.backend()
    addresses = [{"at": str(each), "labels": {"version": str(n + 1)}} for n, each in enumerate((one, two))]
    web.apply({name: {"address": addresses, "tls": "plain", "versions": VERSIONS, "routes": routes}})
    return one, two


def mirrored(web: Sidecar, service: str, result: str, side: str = "out") -> float:
    return web.metric("pillion_mirrored_requests_total", service=service, result=result, side=side)


def test_a_mirror_gets_copies_and_the_caller_hears_nothing_of_it(mesh: Mesh, web: Sidecar) -> None:
    one, two = versions(mesh, web, "m1", [{"to": "v1", "mirror": {"to": "v2"}}])

    def failing(conn: Conn) -> None:
        conn.take()
        conn.reply(500)
        conn.take()
        conn.reset()

    two.script = failing
    with web.client() as client:
        for number in range(3):
            assert client.get(f"/{number}", host="m1").status == 200
        until(lambda: len(two.requests) >= 2)
        assert client.post("/3", b"x", host="m1").status == 200
    copy, original = two.requests[0], one.requests[0]
    assert (copy.target, copy.header("host")) == (original.target, original.header("host"))
    assert copy.header("x-pillion-mirror") == (original.header("traceparent") or b"")[3:35]
    assert original.header("x-pillion-mirror") is None
    until(lambda: mirrored(web, "m1", "5xx") >= 1)
    assert [request.method for request in one.requests] == [b"GET", b"GET", b"GET", b"POST"]
    assert b"POST" not in {request.method for request in two.requests}
    ends = [each for each in web.admin("/clusters") if each["service"] == "m1" and each["side"] == "out"]
    assert {each["failures"] for each in ends} == {0}  # the original's endpoints have not failed


def test_a_mirror_that_hangs_slows_nobody(mesh: Mesh, web: Sidecar) -> None:
    one, two = versions(mesh, web, "m2", [{"to": "v1", "mirror": {"to": "v2", "writes": True}}])
    two.script = lambda conn: conn.sock.recv(1) and time.sleep(0.5)
    body = b"x" * 60_000
    began = time.monotonic()
    with web.client() as client:
        for _ in range(20):
            assert client.post("/", body, host="m2").status == 200
    assert time.monotonic() - began < 2.0
    assert len(one.requests) == 20
    with web.client() as client:
        assert client.post("/", b"x" * 70_000, host="m2").status == 200
    until(lambda: mirrored(web, "m2", "too_large") == 1)


def test_the_callees_sidecar_counts_copies_apart_and_tells_the_application(mesh: Mesh) -> None:
    pair = Pair(mesh, services={"shop": {"address": [str(mesh.backend())], "tls": "plain", "routes": [
        {"name": "all", "mirror": {"service": "reviews"}},
    ]}})  # fmt: skip
    with pair.client() as client:
        assert client.get("/", host="shop").status == 200
        until(lambda: pair.app.requests)
        until(lambda: mirrored(pair.reviews, "reviews", "2xx", "in") == 1)
        assert mirrored(pair.web, "reviews", "2xx") == 1
    (copy,) = pair.app.requests
    assert copy.header("host") == b"reviews" and copy.header("x-pillion-mirror")
    assert not pair.reviews.metric("http_server_request_duration_seconds_count", service="reviews")


def shadowed(mesh: Mesh, reviews: dict[str, Any] | None = None, **mirror: Any) -> tuple[Pair, Backend]:
    """The pair of sidecars, with reviews as the shadow of a plain service `shop`."""
    shop = mesh.backend()
    routes = [{"mirror": {"service": "reviews", **mirror}}]
    return Pair(mesh, reviews, {"shop": {"address": [str(shop)], "tls": "plain", "routes": routes}}), shop


def test_requests_of_http2_are_copied_too(mesh: Mesh) -> None:
    pair, shop = shadowed(mesh, writes=True)
    with httpx.Client(http1=False, http2=True, trust_env=False) as client:
        for number in range(8):
            answer = client.post(f"http://{pair.web.outbound}/{number}", content=b"b" * 3000, headers={"host": "shop"})
            assert answer.status_code == 200 and answer.http_version == "HTTP/2"
    until(lambda: mirrored(pair.web, "reviews", "2xx") == 8)
    assert sorted(request.target for request in pair.app.complete) == [b"/%d" % number for number in range(8)]
    assert {request.body for request in pair.app.complete} == {b"b" * 3000} and len(shop.requests) == 8


def test_many_copies_at_a_time_share_connections_between_sidecars(mesh: Mesh) -> None:
    pair, shop = shadowed(mesh)

    def slow(conn: Conn) -> None:
        while True:
            conn.take()
            time.sleep(0.05)
            conn.reply(200)

    pair.app.script = slow
    with pair.client() as client:
        for _ in range(100):
            assert client.get("/", host="shop").status == 200
    until(lambda: mirrored(pair.web, "reviews", "2xx") == 100)
    assert len(shop.requests) == len(pair.app.complete) == 100
    assert pair.web.crashes == pair.reviews.crashes == 0


def test_a_call_of_grpc_is_copied_where_writes_are(mesh: Mesh) -> None:
    servers = GrpcServer("one"), GrpcServer("two")
    ports = {"grpc": {"port": 80, "protocol": "grpc"}}
    shadow = mesh.sidecar(
        "shadow", {"web": {}, "shadow": {"ports": ports}}, app={"grpc": servers[1].address}, outbound=False
    )
    routes = [{"mirror": {"service": "shadow", "writes": True}}]
    web = mesh.sidecar("web", {
        "web": {},
        "calls": {"ports": ports, "address": [servers[0].address], "tls": "plain", "routes": routes},
        "shadow": {"ports": ports, "address": [shadow.inbound]},
    }, inbound=False)  # fmt: skip
    try:
        with call_channel(web.outbound, "calls") as channel:
            assert channel.unary_unary("/test.Echo/Name")(b"a", timeout=10) == b"one"
            assert channel.unary_unary("/test.Echo/Unary")(b"b", timeout=10) == b"b"
            assert channel.stream_unary("/test.Echo/Collect")(iter([b"c", b"d"]), timeout=10) == b"cd"
            until(lambda: servers[1].times("Unary") == 1)
            assert len(list(channel.unary_stream("/test.Echo/Count")(b"20", timeout=10))) == 20
        until(lambda: mirrored(web, "shadow", "2xx") == 4)
        assert mirrored(shadow, "shadow", "2xx", "in") == 4
        (seen,) = [metadata for method, metadata, _ in servers[1].seen if method == "Unary"]
        assert len(seen["x-pillion-mirror"]) == 32
    finally:
        for server in servers:
            server.stop()


def test_a_shadow_that_is_not_who_it_should_be_gets_nothing(mesh: Mesh) -> None:
    impostor = mesh.sidecar("other", {"web": {}, "other": {"ports": {"http": {"port": 80}}}}, app=mesh.backend())
    shop = mesh.backend()
    web = mesh.sidecar("web", {
        "web": {},
        "shop": {"address": [str(shop)], "tls": "plain", "routes": [{"mirror": {"service": "shadow"}}]},
        "shadow": {"ports": {"http": {"port": 80}}, "address": [impostor.inbound]},
    }, inbound=False)  # fmt: skip
    with web.client() as client:
        assert client.get("/", host="shop").status == 200
    until(lambda: mirrored(web, "shadow", "connect_failed") == 1)
    assert not mirrored(impostor, "other", "2xx", "in") and len(shop.requests) == 1


def test_a_shadow_that_forbids_it_answers_the_copy_alone(mesh: Mesh) -> None:
    pair, _ = shadowed(mesh, {"authz": {"allow": [{"from": ["admin"]}]}})
    with pair.client() as client:
        assert client.get("/", host="shop").status == 200
    until(lambda: mirrored(pair.web, "reviews", "denied") == 1)
    assert not pair.app.requests and mirrored(pair.reviews, "reviews", "denied", "in") == 1


def test_a_sidecar_that_ends_does_not_wait_for_copies(mesh: Mesh) -> None:
    one, two = mesh.backend(), mesh.backend(hang)
    web = mesh.sidecar("web", {"web": {}, "s": {
        "address": [{"at": str(one), "labels": {"version": "1"}}, {"at": str(two), "labels": {"version": "2"}}],
        "tls": "plain", "versions": VERSIONS, "routes": [{"to": "v1", "mirror": {"to": "v2"}}],
    }}, inbound=False)  # fmt: skip
    with web.client() as client:
        for _ in range(20):
            assert client.get("/", host="s").status == 200
        until(lambda: two.count == 20)
    began = time.monotonic()
    assert web.stop() == 0 and time.monotonic() - began < 5
    assert "Traceback" not in web.log


def hang(conn: Conn) -> None:
    """Read nothing, and answer nothing, until the peer goes."""
    conn.sock.settimeout(60)
    while conn.sock.recv(65536):
        pass


def never_read(conn: Conn) -> None:
    time.sleep(0.5)
    conn.reset()


def reset(conn: Conn) -> None:
    conn.head_of_request()
    conn.reset()


@pytest.mark.long
@pytest.mark.parametrize("shadow", ["dead", "resets", "hangs", "reads nothing"])
def test_many_requests_with_a_shadow_that_is_of_no_use(mesh: Mesh, shadow: str) -> None:
    """Whatever becomes of its copies, the original's sidecar stays as large as it was, and keeps nothing."""
    one = mesh.backend()
    scripts = {"resets": reset, "hangs": hang, "reads nothing": never_read}
    two = mesh.dead_address() if shadow == "dead" else str(mesh.backend(scripts[shadow]))
    web = mesh.sidecar("web", {"web": {}, "s": {
        "address": [{"at": str(one), "labels": {"version": "1"}}, {"at": two, "labels": {"version": "2"}}],
        "tls": "plain", "versions": VERSIONS, "timeout": {"total": "2s"}, "limits": {"connections": 64},
        "routes": [{"to": "v1", "mirror": {"to": "v2", "writes": True}}],
    }}, inbound=False)  # fmt: skip
    body = b"b" * 8192
    with web.client() as client:

        def ask(count: int) -> None:
            for _ in range(count):
                assert client.post("/", body, host="s").status == 200

        ask(100)
        before = web.resident_bytes()
        ask(4900)  # 40 MB of bodies
        assert web.resident_bytes() - before < 20 * 1024 * 1024
        assert web.descriptors() < 100
    until(lambda: web.metric("pillion_requests_active", side="mirror") == 0)
    counted = web.metric("pillion_mirrored_requests_total", service="s", side="out")
    assert counted == len(one.requests) == 5000
    assert web.metric("pillion_held_bytes") == 0 and web.crashes == 0


def test_a_canary_by_cookie(mesh: Mesh, web: Sidecar) -> None:
    routes = [{"match": {"cookies": {"canary": "always", "group": {"prefix": "b"}}}, "to": "v2"}, {"to": "v1"}]
    one, two = versions(mesh, web, "c1", routes)
    with web.client() as client:
        for cookie in ("canary=always; group=beta", 'group="b"; x=y;canary=always'):
            client.get("/", host="c1", headers={"cookie": cookie})
        assert (len(one.requests), len(two.requests)) == (0, 2)
        client.get("/", host="c1", headers=[("cookie", "canary=always"), ("cookie", "group=b1")])  # as over HTTP/2
        assert len(two.requests) == 3
        for cookie in ("canary=always", "canary=never; group=b", "xcanary=always; group=b", "Canary=always; group=b"):
            client.get("/", host="c1", headers={"cookie": cookie})
        client.get("/", host="c1")
    assert (len(one.requests), len(two.requests)) == (5, 3)


def test_faults_take_their_shares(mesh: Mesh, web: Sidecar) -> None:
    fault = {"delay": {"fixed": "1ms", "percent": "50%"}, "abort": {"status": 429, "percent": "30%"}}
    one, two = versions(mesh, web, "f1", [{"to": "v1", "fault": fault}])
    with web.client() as client:
        statuses = [client.get("/", host="f1").status for _ in range(300)]
    aborted = statuses.count(429)
    assert set(statuses) == {200, 429} and 50 <= aborted <= 130  # five standard deviations either way
    assert len(one.requests) == 300 - aborted and not two.requests
