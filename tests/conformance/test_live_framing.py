"""The framing cases of HTTP/1.1 as raw bytes against live sidecars: inbound over mutual TLS, outbound plain.

What is refused must be answered with its status, close the connection, and leave nothing with the application or on
the connections towards it; what is accepted must arrive as one request with the same meaning.
"""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.http1_cases import REQUEST_DEFAULTS, REQUESTS, RESPONSES, Case
from support.mesh import Client, Closed, Conn, Mesh, Pair, until

HTTP = {"ports": {"http": {"port": 80}}, "circuit_breaker": {"consecutive_failures": 1_000_000}}


def for_us(want: dict[str, Any]) -> bool:
    """Whether a request that is accepted is whole, and meant for the service `a`."""
    return bool(want["host_key"] == b"a" and want["form"] != "authority" and want["done"])


REFUSED = [case for case in REQUESTS if case.status]
ACCEPTED = [case for case in REQUESTS if not case.status and for_us(REQUEST_DEFAULTS | case.want)]
ROOMIER = {"101 fields", "head of 65537"}  # between sidecars, by what the first of them adds
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The service is called `a`, as the hosts of the cases."""
    with Mesh(tmp_path_factory.mktemp("framing")) as mesh:
        pair = object.__new__(Pair)
        pair.mesh, pair.app = mesh, mesh.backend()
        pair.reviews = mesh.sidecar("a", {"web": {}, "a": HTTP}, app=pair.app, outbound=False)
        pair.web = mesh.sidecar("web", {"web": {}, "a": {**HTTP, "address": [pair.reviews.inbound]}}, inbound=False)
        yield pair
        for sidecar in (pair.web, pair.reviews):
            assert sidecar.crashes == 0
            until(lambda sidecar=sidecar: sidecar.metric("pillion_requests_active") == 0)  # type: ignore[misc]


@pytest.fixture(params=["outbound", "inbound"])
def side(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def open_client(pair: Pair, side: str) -> Client:
    return pair.client() if side == "outbound" else pair.reviews.mesh_client()


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused_with_its_status_and_nothing_forwarded(pair: Pair, side: str, case: Case) -> None:
    if side == "outbound" and case.name == "HTTP/2 preface":
        return  # there it opens a connection of HTTP/2: test_live_http2
    if side == "inbound" and case.name in ROOMIER:
        return
    pair.app.clear()
    with open_client(pair, side) as client:
        client.send(case.raw + SMUGGLED)
        response = client.response()
        assert response.status == case.status
        assert response.header("connection") == b"close"
        assert response.reason
        assert client.reader.rest() == b""
    assert pair.app.requests == []
    with pair.client() as client:  # others, on the same connections upstream, are served as ever
        assert client.get("/after", host="a").json["target"] == "/after"
    assert [request.target for request in pair.app.requests] == [b"/after"]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused_also_when_it_comes_in_two_pieces(pair: Pair, case: Case) -> None:
    """A body that breaks later has a head that may be on its way: it must never be completed."""
    pair.app.clear()
    with pair.client() as client:
        middle = max(case.raw.find(b"\r\n\r\n") + 4, len(case.raw) // 2)
        client.send(case.raw[:middle])
        time.sleep(0.002)
        try:
            client.send(case.raw[middle:] + SMUGGLED)
            response = client.response()
        except (Closed, ConnectionError):
            pass  # it was answered and closed before the second piece, which then met a reset
        else:
            assert response.status == case.status
    assert pair.app.complete == []


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.name)
def test_accepted_and_forwarded_as_one_request(pair: Pair, side: str, case: Case) -> None:
    pair.app.clear()
    want = REQUEST_DEFAULTS | case.want
    with open_client(pair, side) as client:
        client.send(case.raw)
        response = client.response(want["method"].decode())
        if want["deadline_ms"] == 0:
            assert response.reason == "timeout_total"
            return
        assert response.status == 200, response
        if want["keep_alive"]:
            assert client.get("/after", host="a").json["target"] == "/after"
        else:
            assert client.closed()
    request = pair.app.complete[0]
    assert len(pair.app.complete) == 1 + want["keep_alive"]
    assert (request.method, request.target, request.body) == (want["method"], want["path"], want["body"])
    ours = {b"host", b"traceparent", b"x-forwarded-client-cert", b"content-length", b"transfer-encoding", b"expect"}
    kept = [(name, value) for name, value in request.headers if name not in ours]
    forwarded = [field for field in want["forwarded"] if field in kept]
    assert [field for field in kept if field not in forwarded] == want["headers"]
    assert request.header("x-forwarded-client-cert") is not None
    assert request.trailers == want["trailers"]


@pytest.mark.parametrize("case", RESPONSES, ids=lambda case: case.name)
def test_responses_are_held_to_the_same(pair: Pair, case: Case) -> None:
    """A response that is refused is never begun, or never completed."""

    def script(conn: Conn) -> None:
        conn.take()
        conn.send(case.raw)
        if case.status or case.eof is not None:
            time.sleep(0.002)
            return
        conn.sock.recv(1)

    pair.app.clear(script)
    pair.app.end_connections()
    until(lambda: not pair.app.open)
    with pair.client() as client:
        client.request(case.method.decode(), "/", "a")
        if case.method == b"CONNECT":
            assert client.response().status >= 400
            return
        if case.status:
            response = client.response(case.method.decode())
            if response.status == 502:
                assert response.reason == "bad_response"
            else:  # it was whole before the bytes that nobody asked for
                assert case.name.startswith("beyond") or case.name == "second response"
                client.sock.settimeout(0.02)
                with pytest.raises(TimeoutError):
                    client.sock.recv(1)
            return
        status = case.want.get("status", 200)
        if status == 101:
            assert client.response().status == 502  # nobody asked for it
            return
        if case.want.get("done") is False and case.eof is not True:
            try:
                assert client.response(case.method.decode()).status == 502
            except (Closed, OSError):
                pass  # begun, and cut
            return
        response = client.response(case.method.decode())
        assert response.status == status
        if case.method != b"HEAD" and status not in (204, 304):
            assert response.body == case.want.get("body", b"")
    pair.app.clear()


def test_after_all_of_it_the_mesh_serves(pair: Pair) -> None:
    from support.mesh import echo

    pair.app.clear(echo)
    pair.app.end_connections()
    for side in ("outbound", "inbound"):
        with open_client(pair, side) as client:
            assert client.get("/", host="a").status == 200
