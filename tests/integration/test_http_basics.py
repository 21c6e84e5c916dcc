"""HTTP/1.1 through two live sidecars: how requests find their service, and how every kind of message travels."""

import json
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import httpx
import pytest
from support.mesh import (
    Client,
    Closed,
    Conn,
    Mesh,
    Pair,
    connect,
    environment,
    free_port,
    response_bytes,
    tool,
    until,
)

LOCAL_PORT = free_port()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    reviews = {
        "authz": {"deny": [{"headers": {"x-denied": {"present": True}}}]},
        "routes": [
            {"name": "socket", "match": {"path": "/socket"}, "upgrade": ["websocket"]},
            {"name": "rest"},
        ],
    }
    with Mesh(tmp_path_factory.mktemp("basics")) as mesh:
        yield Pair(mesh, reviews, {"admin": {}}, calls={"reviews": {"local_port": LOCAL_PORT}})


@pytest.fixture(autouse=True)
def _clean(pair: Pair) -> Iterator[None]:
    pair.fresh()
    yield
    assert pair.web.crashes == 0 and pair.reviews.crashes == 0


# -- finding the service


@pytest.mark.parametrize(
    "host", ["reviews", "reviews.mesh", "REVIEWS.Mesh.", "reviews:8000", "http.reviews", "http.reviews.mesh:80"]
)
def test_a_request_is_routed_by_its_host(pair: Pair, host: str) -> None:
    with pair.client() as client:
        response = client.get("/where?a=b", host=host)
    assert response.status == 200
    assert response.json["target"] == "/where?a=b"
    assert dict(response.json["headers"])["host"] == host


def test_an_unknown_host_is_answered_with_the_names_that_are_known(pair: Pair) -> None:
    with pair.client() as client:
        response = client.get("/", host="nowhere")
        assert (response.status, response.reason) == (404, "no_route")
        assert response.json["message"] == 'no service is called "nowhere"; known: admin, reviews, web'
        assert len(response.json["request_id"]) == 32
        assert client.get("/").status == 200  # the connection is none the worse


def test_an_absolute_target_wins_over_host_and_is_forwarded_in_origin_form(pair: Pair) -> None:
    with pair.client() as client:
        response = client.get("HTTP://Reviews.mesh:8080/a?b", host="admin")
    assert response.json["target"] == "/a?b"
    assert dict(response.json["headers"])["host"] == "Reviews.mesh:8080"


def test_an_unmodified_curl_with_http_proxy(pair: Pair) -> None:
    done = subprocess.run(
        [tool("curl"), "-sS", "--http1.1", "-d", "a=1", "http://reviews/a/b?c=d", "http://reviews.mesh/second"],
        env={**environment(), "http_proxy": f"http://{pair.web.outbound}"}, capture_output=True, timeout=10,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = [json.loads(line + b"}") for line in done.stdout.replace(b"}{", b"}\n{").replace(b"}", b"").splitlines()]
    assert [(each["method"], each["target"], each["body"]) for each in seen] == [
        ("POST", "/a/b?c=d", "a=1"),
        ("POST", "/second", "a=1"),
    ]


def test_an_unmodified_httpx_with_a_proxy(pair: Pair) -> None:
    with httpx.Client(proxy=f"http://{pair.web.outbound}", trust_env=False) as client:
        for number in range(3):
            response = client.put(f"http://reviews/{number}", content=b"x" * 100_000)
            assert response.status_code == 200
            assert response.json()["target"] == f"/{number}"
            assert len(response.json()["body"]) == 100_000
    assert pair.app.count == 1


def test_an_unmodified_urllib_with_a_proxy(pair: Pair) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({"http": f"http://{pair.web.outbound}"}))
    with opener.open("http://reviews.mesh/old", timeout=10) as response:  # it closes the connection by itself
        assert json.load(response)["target"] == "/old"


def test_a_local_port_leads_to_its_service_whatever_the_host_says(pair: Pair) -> None:
    with connect(("127.0.0.1", LOCAL_PORT)) as client:
        for host in ("localhost:1", "admin", "reviews"):
            response = client.get("/local", host=host)
            assert response.status == 200
            assert dict(response.json["headers"])["host"] == "reviews"


def test_a_host_outside_the_mesh_is_passed_through_as_by_an_ordinary_proxy(pair: Pair) -> None:
    outside = pair.mesh.backend()
    with pair.client() as client:
        response = client.get(f"http://{outside}/x?y", host="whatever")
    assert response.status == 200
    assert response.json["target"] == "/x?y"
    headers = dict(response.json["headers"])
    assert headers["host"] == str(outside)
    assert not any(name.startswith("x-pillion") or name == "x-forwarded-client-cert" for name in headers)


def test_a_proxied_request_that_leads_back_to_the_sidecar_does_not_loop(pair: Pair) -> None:
    with pair.client() as client:
        response = client.get(f"http://{pair.web.outbound}/x", host="whatever")
    assert response.status == 404


def test_https_is_not_passed_through_in_clear_text(pair: Pair) -> None:
    outside = pair.mesh.backend()
    with pair.client() as client:
        assert client.get(f"https://{outside}/x", host="whatever").status >= 400
    assert outside.count == 0


def test_methods_that_a_caller_makes_up_do_not_fill_the_metrics(pair: Pair) -> None:
    with pair.client() as client:
        for number in range(300):
            client.request(f"M{number}", "/")
            assert client.response().status == 200
    for sidecar in (pair.web, pair.reviews):
        assert sidecar.admin("/metrics").count("\n") < 1000


@pytest.mark.parametrize("target", ["reviews:80", "reviews.mesh:443", "example.com:443", "127.0.0.1:1"])
def test_connect_is_refused_and_opens_no_tunnel(pair: Pair, target: str) -> None:
    with pair.client() as client:
        client.send(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        response = client.response("GET")
    assert 400 <= response.status < 600 and response.reason
    assert pair.app.requests == []


# -- connections


def test_both_sides_keep_their_connections(pair: Pair) -> None:
    opened = pair.web.metric("pillion_upstream_connections", service="reviews")
    assert opened <= 1
    with pair.client() as client:
        numbers = {client.get(f"/{number}").json["connection"] for number in range(50)}
        assert len(numbers) == 1
    with pair.client() as client:  # another caller uses the same pool
        assert client.get("/").json["connection"] in numbers
    assert pair.app.count == 1
    assert pair.web.metric("pillion_upstream_connections", service="reviews") == 1


def test_concurrent_requests_have_a_connection_each_and_no_more_afterwards(pair: Pair) -> None:
    import threading

    gate = threading.Barrier(6)

    def together(conn: Conn) -> None:
        while True:
            conn.take()
            gate.wait(10)
            conn.reply()

    pair.app.script = together
    clients = [pair.client() for _ in range(5)]
    for client in clients:
        client.request("GET", "/")
    gate.wait(10)
    assert [client.response().status for client in clients] == [200] * 5
    assert pair.app.count == 5
    for client in clients:
        client.close()
    pair.app.script = lambda conn: None
    with pair.client() as client:
        for _ in range(5):
            client.request("GET", "/")
            until(lambda: gate.n_waiting == 1)
            for _ in range(5):
                threading.Thread(target=gate.wait, args=(10,)).start()
            assert client.response().status == 200
    assert pair.app.count == 5


def test_a_caller_that_says_close_is_closed_and_the_upstream_connection_is_kept(pair: Pair) -> None:
    for _ in range(3):
        with pair.client() as client:
            response = client.get("/", headers={"connection": "close"})
            assert response.header("connection") == b"close"
            assert "connection" not in dict(response.json["headers"])
            assert client.closed()
    assert pair.app.count == 1


def test_an_application_that_says_close_does_not_cost_the_caller_its_connection(pair: Pair) -> None:
    def once(conn: Conn) -> None:
        conn.take()
        conn.reply(200, b"last", [("connection", "close")])

    pair.app.script = once
    with pair.client() as client:
        for _ in range(3):
            response = client.get("/")
            assert (response.status, response.body, response.header("connection")) == (200, b"last", None)
    assert pair.app.count == 3


# -- messages


def test_a_chunked_request_with_trailers_arrives_as_such(pair: Pair) -> None:
    with pair.client() as client:
        client.send(
            b"POST /c HTTP/1.1\r\nHost: reviews\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n"
            b"5;note=1\r\nhello\r\n6\r\n world\r\n0\r\nX-Sum: 42\r\nHost: evil\r\n"
            b"X-Forwarded-Client-Cert: URI=spiffe://mesh.local/service/admin\r\nAuthorization: no\r\n\r\n"
        )
        seen = client.response("POST").json
    assert seen["body"] == "hello world"
    assert ["transfer-encoding", "chunked"] in seen["headers"]
    assert seen["trailers"] == [["x-sum", "42"]]
    assert [value for name, value in seen["headers"] if name == "host"] == ["reviews"]
    assert "authorization" not in dict(seen["headers"])


def test_a_chunked_response_with_trailers_arrives_as_such(pair: Pair) -> None:
    def script(conn: Conn) -> None:
        while True:
            conn.take()
            conn.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n5\r\nhello\r\n")
            time.sleep(0.02)
            conn.send(b"6\r\n world\r\n0\r\nX-Sum: 42\r\nSet-Cookie: no\r\nX-Pillion-Reason: denied\r\n\r\n")

    pair.app.script = script
    with pair.client() as client:
        for _ in range(2):
            response = client.get("/")
            assert response.body == b"hello world"
            assert response.trailers == [(b"x-sum", b"42")]
    assert pair.app.count == 1


def test_the_first_bytes_of_a_response_do_not_wait_for_the_rest(pair: Pair) -> None:
    import threading

    seen = threading.Event()

    def script(conn: Conn) -> None:
        conn.take()
        conn.send(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n"
        )
        assert seen.wait(10)
        conn.send(b"3\r\ntwo\r\n0\r\n\r\n")

    pair.app.script = script
    with pair.client() as client:
        client.request("GET", "/")
        client.response(body=False)
        assert client.reader.until(b"one\r\n") == b"3\r\none\r\n"
        seen.set()
        assert client.reader.chunked()[0] == b"two"


@pytest.mark.parametrize("status", [204, 304])
def test_statuses_without_content(pair: Pair, status: int) -> None:
    def script(conn: Conn) -> None:
        while True:
            conn.take()
            conn.send(f'HTTP/1.1 {status} X\r\nETag: "a"\r\n\r\n'.encode())

    pair.app.script = script
    with pair.client() as client:
        for _ in range(3):
            response = client.get("/")
            assert (response.status, response.header("etag")) == (status, b'"a"')
            assert response.header("transfer-encoding") is None
    assert pair.app.count == 1


@pytest.mark.parametrize("framing", ["content-length: 1234", "transfer-encoding: chunked", "x-none: 1"])
def test_head_has_no_body_and_says_what_the_application_said(pair: Pair, framing: str) -> None:
    def script(conn: Conn) -> None:
        while True:
            request = conn.take()
            assert request.method == b"HEAD"
            conn.send(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode())

    pair.app.script = script
    with pair.client() as client:
        for _ in range(3):
            client.request("HEAD", "/")
            response = client.response("HEAD")
            assert response.status == 200
            name, _, value = framing.partition(": ")
            assert response.header(name) == value.encode()
    assert pair.app.count == 1


def test_reason_phrases_and_odd_but_legal_headers_pass(pair: Pair) -> None:
    def script(conn: Conn) -> None:
        conn.take()
        conn.send(
            b"HTTP/1.1 299 Half\xe9 way\r\nContent-Length: 0\r\nX-Empty:\r\nX-A: 1\r\nX-A: 2\r\nX-L: \xff\r\n\r\n"
        )

    pair.app.script = script
    with pair.client() as client:
        response = client.get("/")
    assert response.status == 299
    assert response.all("x-a") == [b"1", b"2"]
    assert response.header("x-empty") == b"" and response.header("x-l") == b"\xff"


# -- 100-continue


def test_100_continue_is_asked_of_the_application_and_relayed_once(pair: Pair) -> None:
    def script(conn: Conn) -> None:
        request = conn.head_of_request()
        assert request.header("expect") == b"100-continue"
        conn.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
        conn.reply(200, conn.reader.exactly(5))

    pair.app.script = script
    with pair.client() as client:
        client.send(b"POST / HTTP/1.1\r\nHost: reviews\r\nExpect: 100-Continue\r\nContent-Length: 5\r\n\r\n")
        assert client.reader.head()[0].startswith(b"HTTP/1.1 100")
        client.send(b"hello")
        response = client.response("POST")
    assert (response.body, response.informational) == (b"hello", [])


def test_an_application_that_refuses_the_expectation_is_heard_before_the_body(pair: Pair) -> None:
    def script(conn: Conn) -> None:
        conn.head_of_request()
        conn.reply(413, b"too large", [("connection", "close")])
        assert conn.reader.rest() == b""

    pair.app.script = script
    with pair.client() as client:
        client.send(b"POST / HTTP/1.1\r\nHost: reviews\r\nExpect: 100-continue\r\nContent-Length: 500\r\n\r\n")
        response = client.response("POST")
        assert (response.status, response.body, response.informational) == (413, b"too large", [])
        assert response.header("connection") == b"close"
        assert client.closed()


def test_a_policy_that_refuses_is_heard_before_the_body_and_nothing_reaches_the_application(pair: Pair) -> None:
    with pair.client() as client:
        client.send(
            b"POST / HTTP/1.1\r\nHost: reviews\r\nX-Denied: 1\r\nExpect: 100-continue\r\nContent-Length: 500\r\n\r\n"
        )
        response = client.response("POST")
        assert (response.status, response.reason, response.informational) == (403, "denied", [])
        assert client.closed()
    assert pair.app.requests == []


def test_another_expectation_is_refused(pair: Pair) -> None:
    with pair.client() as client:
        client.send(b"POST / HTTP/1.1\r\nHost: reviews\r\nExpect: miracles\r\nContent-Length: 1\r\n\r\nx")
        assert client.response("POST").status == 417
    assert pair.app.requests == []


def test_other_informational_responses_pass_in_order(pair: Pair) -> None:
    def script(conn: Conn) -> None:
        while True:
            conn.take()
            conn.send(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n")
            conn.reply(200, b"done")

    pair.app.script = script
    with pair.client() as client:
        for _ in range(2):
            response = client.get("/")
            assert [each.status for each in response.informational] == [103, 102]
            assert response.informational[0].header("link") == b"</a>"
            assert response.body == b"done"


# -- early responses


@pytest.mark.parametrize("close", [False, True])
def test_an_answer_in_the_middle_of_an_upload_reaches_the_caller(pair: Pair, close: bool) -> None:
    """With the kernel's buffers full of body, and with an application that closes at once, the harder case."""

    def script(conn: Conn) -> None:
        conn.head_of_request()
        conn.reader.exactly(1000)
        conn.reply(413, b"too large", [("connection", "close")] if close else [])
        if not close:  # the sidecar gives up by itself
            while conn.sock.recv(65536):
                pass

    pair.app.script = script
    with pair.client() as client:
        client.send(b"POST / HTTP/1.1\r\nHost: reviews\r\nContent-Length: 100000000\r\n\r\n" + b"x" * 1000)
        client.sock.settimeout(0.3)
        try:
            for _ in range(100):
                client.send(b"x" * 100_000)
        except OSError:
            pass
        client.sock.settimeout(10)
        response = client.response("POST")
        assert (response.status, response.body) == (413, b"too large")
        assert response.header("connection") == b"close"


def test_a_response_that_begins_before_the_request_has_ended_streams_both_ways(pair: Pair) -> None:
    def script(conn: Conn) -> None:
        conn.head_of_request()
        conn.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            size = int(conn.reader.until(b"\r\n"), 16)
            if not size:
                break
            data = conn.reader.exactly(size)
            conn.reader.exactly(2)
            conn.send(b"%x\r\n%b\r\n" % (size, data.upper()))
        conn.reader.exactly(2)
        conn.send(b"0\r\n\r\n")
        conn.take()
        conn.reply(200, b"and on")

    pair.app.script = script
    with pair.client() as client:
        client.send(b"POST / HTTP/1.1\r\nHost: reviews\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.response("POST", body=False)
        for word in (b"one", b"two", b"three"):
            client.send(b"%x\r\n%b\r\n" % (len(word), word))
            assert client.reader.until(b"\r\n") == b"%x\r\n" % len(word)
            assert client.reader.exactly(len(word) + 2) == word.upper() + b"\r\n"
        client.send(b"0\r\n\r\n")
        assert client.reader.chunked() == (b"", [])
        assert client.get("/").body == b"and on"


# -- pipelining, half-close, HTTP/1.0


def test_three_thousand_requests_in_one_write_are_answered_in_order(pair: Pair) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def script(conn: Conn) -> None:
        while True:
            conn.reply(200, conn.take().target)

    pair.app.script = script
    count = 3000
    data = b"".join(b"GET /%d HTTP/1.1\r\nHost: reviews\r\n\r\n" % number for number in range(count))
    with pair.client() as client, ThreadPoolExecutor() as pool:
        sent = pool.submit(client.send, data)
        assert [client.response().body for _ in range(count)] == [b"/%d" % number for number in range(count)]
        sent.result()
    assert pair.app.count == 1


def test_pipelined_posts_and_gets_keep_their_bodies_apart(pair: Pair) -> None:
    with pair.client() as client:
        client.send(
            b"POST /1 HTTP/1.1\r\nHost: reviews\r\nContent-Length: 3\r\n\r\nabc"
            b"GET /2 HTTP/1.1\r\nHost: reviews\r\n\r\n"
            b"POST /3 HTTP/1.1\r\nHost: reviews\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nde\r\n0\r\n\r\n"
            b"GET /4 HTTP/1.1\r\nHost: reviews\r\nConnection: close\r\n\r\nGET /5 HTTP/1.1\r\nHost: reviews\r\n\r\n"
        )
        seen = [client.response().json for _ in range(4)]
        assert client.closed()
    assert [(each["target"], each["body"]) for each in seen] == [("/1", "abc"), ("/2", ""), ("/3", "de"), ("/4", "")]


@pytest.mark.parametrize(
    "framing", ["Content-Length: 5\r\n\r\nhello", "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"]
)
def test_a_request_that_comes_while_the_one_before_is_served_disturbs_nothing(pair: Pair, framing: str) -> None:
    import threading

    answer = threading.Event()
    logged = len(pair.reviews.log)

    def script(conn: Conn) -> None:
        while True:
            request = conn.take()
            assert answer.wait(10)
            conn.reply(200, request.target + request.body)

    pair.app.script = script
    with pair.client() as client:
        client.send(f"POST /1 HTTP/1.1\r\nHost: reviews\r\n{framing}".encode())
        until(lambda: pair.app.complete)
        client.send(b"GET /2 HTTP/1.1\r\nHost: reviews\r\n\r\nGET /3 HTTP/1.1\r\nHost:")
        time.sleep(0.05)
        answer.set()
        assert [client.response().body, client.response().body] == [b"/1hello", b"/2"]
        client.send(b" reviews\r\n\r\n")
        assert client.response().body == b"/3"
    assert pair.app.count == 1
    assert "bad_request" not in pair.reviews.log[logged:]  # nothing was sent twice


def test_a_caller_that_shuts_its_sending_side_still_gets_its_answer(pair: Pair) -> None:
    def script(conn: Conn) -> None:
        while True:
            request = conn.take()
            time.sleep(0.05)
            conn.reply(200, request.target)

    pair.app.script = script
    with pair.client() as client:
        client.send(b"GET /1 HTTP/1.1\r\nHost: reviews\r\n\r\n")
        client.shut()
        assert client.response().body == b"/1"
        assert client.closed()
    with pair.client() as client:
        client.send(b"GET /2 HTTP/1.1\r\nHost: reviews\r\n\r\nGET /3 HTTP/1.1\r\nHost: reviews\r\n\r\n")
        client.shut()
        assert [client.response().body, client.response().body] == [b"/2", b"/3"]
        assert client.closed()


def test_a_caller_that_shuts_its_side_in_the_middle_of_a_request_is_not_completed(pair: Pair) -> None:
    with pair.client() as client:
        client.send(b"POST / HTTP/1.1\r\nHost: reviews\r\nContent-Length: 10\r\n\r\nhalf")
        until(lambda: pair.app.requests)
        client.shut()
        client.closed()
    until(lambda: not pair.app.open)
    assert pair.app.complete == []


def test_an_http_1_0_caller(pair: Pair) -> None:
    def script(conn: Conn) -> None:
        while True:
            request = conn.take()
            assert request.version == b"HTTP/1.1"
            conn.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n")

    pair.app.script = script
    with pair.client() as client:
        client.send(b"GET / HTTP/1.0\r\nHost: reviews\r\n\r\n")
        response = client.response()
        assert response.header("transfer-encoding") is None
        assert response.body == b"hi"
    pair.fresh()
    with pair.client() as client:  # and one that asks to keep the connection
        for _ in range(2):
            client.send(b"GET / HTTP/1.0\r\nHost: reviews\r\nConnection: keep-alive\r\n\r\n")
            response = client.response()
            assert response.header("connection") == b"keep-alive"
            assert response.json["target"] == "/"
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        assert client.response().status == 404  # no host: no service is named


def test_an_http_1_0_application(pair: Pair) -> None:
    def script(conn: Conn) -> None:
        conn.take()
        conn.send(b"HTTP/1.0 200 OK\r\n\r\nuntil ")
        conn.send(b"the end")

    pair.app.script = script
    with pair.client() as client:
        for _ in range(3):
            response = client.get("/")
            assert response.body == b"until the end"
            assert response.header("transfer-encoding") == b"chunked"
    assert pair.app.count == 3


def test_an_http_1_0_application_that_is_reset_does_not_look_complete(pair: Pair) -> None:
    def script(conn: Conn) -> None:
        conn.take()
        conn.send(b"HTTP/1.0 200 OK\r\n\r\nuntil ")
        time.sleep(0.05)
        conn.reset()

    pair.app.script = script
    with pair.client() as client:
        client.request("GET", "/")
        client.response(body=False)
        with pytest.raises((Closed, OSError)):
            client.reader.chunked()


# -- upgrades

UPGRADE = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    "sec-websocket-version": "13",
}
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: s\r\n\r\n"
)


def test_a_websocket_becomes_a_tunnel_with_the_bytes_right_behind_both_heads(pair: Pair) -> None:
    def script(conn: Conn) -> None:
        request = conn.head_of_request()
        assert request.header("upgrade") == b"websocket"
        assert request.header("connection") == b"upgrade"
        assert request.header("sec-websocket-key")
        conn.send(SWITCH + b"server first")
        assert conn.reader.exactly(12) == b"client first"
        while conn.reader.held or conn.reader.fill():
            conn.send(bytes(conn.reader.held).upper())
            conn.reader.held.clear()

    pair.app.script = script
    with pair.client() as client:
        lines = "".join(f"{name}: {value}\r\n" for name, value in UPGRADE.items())
        client.send(f"GET /socket HTTP/1.1\r\nhost: reviews\r\n{lines}\r\nclient first".encode())
        response = client.response()
        assert response.status == 101
        assert response.header("upgrade") == b"websocket" and response.header("sec-websocket-accept") == b"s"
        assert client.reader.exactly(12) == b"server first"
        for _ in range(3):
            client.send(b"\x00GET / HTTP/1.1\r\n\r\n")
            assert client.reader.exactly(19) == b"\x00GET / HTTP/1.1\r\n\r\n"
        client.shut()
        assert client.closed()
    until(lambda: pair.web.metric("pillion_tunnels") == 0)
    until(lambda: not pair.app.open)


def test_an_upgrade_that_the_route_does_not_allow_is_not_passed_on(pair: Pair) -> None:
    with pair.client() as client:
        response = client.get("/other", headers=UPGRADE)
        assert response.status == 200
        headers = dict(response.json["headers"])
        assert "upgrade" not in headers and "connection" not in headers
        assert client.get("/").status == 200


@pytest.mark.parametrize("token", ["h2c", "websocket2", "websocket, h2c", "TLS/1.0"])
def test_other_upgrades_are_not_passed_on_even_there(pair: Pair, token: str) -> None:
    with pair.client() as client:
        headers = {
            "connection": "Upgrade, HTTP2-Settings",
            "upgrade": token,
            "http2-settings": "AAMAAABkAARAAAAAAAIAAAAA",
        }
        response = client.get("/socket", headers=headers)
        assert response.status == 200
        seen = dict(response.json["headers"])
        assert "h2c" not in seen.get("upgrade", "") and "http2-settings" not in seen


def test_an_application_that_does_not_upgrade_is_answered_as_usual(pair: Pair) -> None:
    with pair.client() as client:
        assert client.get("/socket", headers=UPGRADE).status == 200
        assert client.get("/socket/2").status == 200


def test_what_follows_an_upgrade_is_http_only_if_it_was_declined(pair: Pair) -> None:
    lines = "".join(f"{name}: {value}\r\n" for name, value in UPGRADE.items())
    data = f"POST /socket HTTP/1.1\r\nhost: reviews\r\n{lines}content-length: 3\r\n\r\nabc".encode()
    behind = b"GET /2 HTTP/1.1\r\nhost: reviews\r\n\r\nGET /3 HTTP/1.1\r\nhost: rev"
    with pair.client() as client:
        client.send(data + behind)
        assert [client.response().json["target"], client.response().json["target"]] == ["/socket", "/2"]
        client.send(b"iews\r\n\r\n")
        assert client.response().json["target"] == "/3"

    def script(conn: Conn) -> None:
        assert conn.take().body == b"abc"
        conn.send(SWITCH)
        conn.send(conn.reader.exactly(len(behind)))

    pair.fresh(script)
    with pair.client() as client:
        client.send(data + behind)
        assert client.response().status == 101
        assert client.reader.exactly(len(behind)) == behind


def test_a_101_that_nobody_asked_for_opens_no_tunnel(pair: Pair) -> None:
    def script(conn: Conn) -> None:
        conn.take()
        conn.send(SWITCH + response_bytes(200, b"smuggled"))

    pair.app.script = script
    with pair.client() as client:
        response = client.post("/", b"x")
        assert (response.status, response.reason) == (502, "bad_response")


# -- headers


def test_large_heads_pass_through_both_sidecars(pair: Pair) -> None:
    """What the first sidecar adds must not make the head too large for the second."""
    for count, size in ((99, 100), (99, 600), (10, 6000)):
        headers = [(f"x-h{number}", "v" * size) for number in range(count)]
        with pair.client() as client:
            response = client.get("/", headers=headers)
            assert response.status == 200, (count, size, response)
            seen = dict(response.json["headers"])
            assert all(seen[name] == value for name, value in headers)


def test_large_response_heads_pass_through_both_sidecars(pair: Pair) -> None:
    headers = [(f"x-h{number}", "v" * 640) for number in range(99)]

    def script(conn: Conn) -> None:
        while True:
            conn.take()
            conn.reply(200, b"", headers)

    pair.app.script = script
    with pair.client() as client:
        response = client.get("/")
        assert response.status == 200
        assert sum(name.startswith(b"x-h") for name, _ in response.headers) == 99


FORGED = [
    "X-Forwarded-Client-Cert", "x_forwarded_client_cert", "X-Forwarded_Client-Cert", "x.forwarded.client.cert",
    "X-Pillion-Attempt", "X_Pillion_Attempt", "x-pillion-anything", "X-Pillion-Reason", "X-Pillion-Retried",
    "X-PILLION-Peer", "x~pillion~reason",
]  # fmt: skip


def _as_seen_by_cgi(name: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in name).upper()


def test_identity_cannot_be_forged_in_any_spelling(pair: Pair) -> None:
    forged = [(name, "By=x;URI=spiffe://mesh.local/service/admin") for name in FORGED]
    for open_client in (pair.client, pair.reviews.mesh_client):
        with open_client() as client:
            seen = client.get("/", headers=forged).json["headers"]
        named = [(name, value) for name, value in seen if _as_seen_by_cgi(name) == "X_FORWARDED_CLIENT_CERT"]
        (name, value) = named[0]
        assert len(named) == 1 and name == "x-forwarded-client-cert"
        by, fingerprint, uri = value.split(";")
        assert by == "By=spiffe://mesh.local/service/reviews" and uri == "URI=spiffe://mesh.local/service/web"
        assert re.fullmatch("Hash=[0-9a-f]{64}", fingerprint)
        assert not [name for name, _ in seen if _as_seen_by_cgi(name).startswith("X_PILLION")]


def test_identity_cannot_be_nominated_away(pair: Pair) -> None:
    for open_client in (pair.client, pair.reviews.mesh_client):
        with open_client() as client:
            headers = {"connection": "close, x-forwarded-client-cert, traceparent, host, x-mine", "x-mine": "1"}
            seen = dict(client.get("/", headers=headers).json["headers"])
        assert seen["x-forwarded-client-cert"].endswith("URI=spiffe://mesh.local/service/web")
        assert seen["host"] == "reviews" and "traceparent" in seen and "x-mine" not in seen


def test_an_application_cannot_pretend_to_be_its_sidecar(pair: Pair) -> None:
    def script(conn: Conn) -> None:
        while True:
            conn.take()
            conn.reply(503, b"", [(name, "connect_failed") for name in FORGED])

    pair.app.script = script
    with pair.client() as client:
        response = client.get("/")
    assert response.status == 503
    assert not [name for name, _ in response.headers if _as_seen_by_cgi(name.decode()).startswith("X_PILLION")]
    assert len(pair.app.requests) == 1  # believed, it would have been retried


def test_a_caller_that_goes_away_cancels_the_work_upstream(pair: Pair) -> None:
    """Measured from the close to the moment when the application sees its connection end; the best of three, since
    the machine may be busy."""
    ended: list[float] = []

    def script(conn: Conn) -> None:
        conn.take()
        try:
            conn.sock.recv(1)
        finally:
            ended.append(time.monotonic())

    pair.app.script = script
    delays: list[float] = []
    for close in (Client.close, Client.reset, Client.close):
        client = pair.client()
        client.request("GET", "/")
        until(lambda: len(pair.app.requests) == len(delays) + 1)
        time.sleep(0.15)
        began = time.monotonic()
        close(client)
        until(lambda: len(ended) == len(delays) + 1, limit_s=5)
        delays.append(ended[-1] - began)
    assert min(delays) < 0.1, delays
    assert max(delays) < 1.0, delays
    assert pair.web.logged(reason="caller_gone")


def test_the_access_log_tells_what_happened(pair: Pair) -> None:
    with pair.client() as client:
        client.post("/logged", b"12345", headers={"user-agent": "test/1"})
    line = pair.web.logged(path="/logged")
    assert {key: line.get(key) for key in ("method", "status", "service", "route")} == {
        "method": "POST", "status": 200, "service": "reviews", "route": "rest",
    }  # fmt: skip
    assert pair.reviews.logged(path="/logged")["caller"] == "spiffe://mesh.local/service/web"


def test_nothing_is_left_behind(pair: Pair) -> None:
    """Runs last: after all of the above, nothing counts as under way."""
    assert os.getpid() > 0
    for sidecar in (pair.web, pair.reviews):
        until(lambda sidecar=sidecar: sidecar.metric("pillion_requests_active") == 0)  # type: ignore[misc]
        until(lambda sidecar=sidecar: sidecar.connections("in", "down") + sidecar.connections("out", "down") <= 5)  # type: ignore[misc]
        assert sidecar.metric("pillion_tunnels") == 0
