"""Retries, deadlines, breakers, limits and weights as they look on the wire, from a live sidecar to scripted servers.

Most tests lead one caller's sidecar to plain endpoints, so that the script sees exactly what it sends.
"""

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from typing import Any

import pytest
from support.mesh import Backend, Client, Conn, Mesh, Response, Sidecar, until

KIB = 1024
numbers = itertools.count(1)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Mesh(tmp_path_factory.mktemp("resilience")) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def web(mesh: Mesh) -> Iterator[Sidecar]:
    sidecar = mesh.sidecar("web", {"web": {}}, inbound=False)
    yield sidecar
    assert sidecar.crashes == 0
    until(lambda: sidecar.metric("pillion_requests_active") == 0)


class Service:
    """A service of its own for one test: its name, its servers, and what the policy says of it."""

    def __init__(self, web: Sidecar, *backends: Any, **policy: Any) -> None:
        self.web, self.name = web, f"s{next(numbers)}"
        self.backends = backends
        policy.setdefault("address", [str(each) for each in backends])
        web.apply({self.name: {"tls": "plain", **policy}})

    def client(self) -> Client:
        return self.web.client()

    def get(self, target: str = "/", **more: Any) -> Response:
        with self.client() as client:
            return client.get(target, host=self.name, **more)

    def post(self, target: str = "/", body: bytes = b"x", **more: Any) -> Response:
        with self.client() as client:
            return client.post(target, body, host=self.name, **more)

    def count(self, name: str) -> float:
        return self.web.metric(f"pillion_{name}_total", service=self.name)

    def cluster(self) -> list[dict[str, Any]]:
        return [each for each in self.web.admin("/clusters") if each["service"] == self.name]


def statuses(*codes: int) -> Callable[[Conn], None]:
    """Answers with these in turn over all connections, then with 200; 0 resets instead."""
    left = iter(codes)
    lock = threading.Lock()

    def script(conn: Conn) -> None:
        while True:
            request = conn.take()
            with lock:
                code = next(left, 200)
            if not code:
                conn.reset()
                return
            conn.reply(code, request.body)

    return script


QUICK = {"base": "1ms", "max": "2ms", "budget": {"percent": "100%", "min_per_second": 100}}


def retry(max_retries: int, *when: object, **more: Any) -> dict[str, Any]:
    return {"max_retries": max_retries, "when": list(when), **QUICK, **more}


# -- retries


def test_a_listed_status_is_retried_and_the_caller_sees_success(mesh: Mesh, web: Sidecar) -> None:
    app = mesh.backend(statuses(503, 503))
    service = Service(web, app, retry=retry(2, 503))
    assert service.get().status == 200
    assert len(app.requests) == 3
    assert service.count("retries") == 2
    assert web.logged(service=service.name)["attempts"] == 3


def test_retries_are_counted_not_attempts_and_the_last_answer_is_relayed(mesh: Mesh, web: Sidecar) -> None:
    app = mesh.backend(statuses(503, 503, 503, 503))
    service = Service(web, app, retry=retry(2, 503))
    response = service.get(body=b"the answer's own body")
    assert (response.status, response.reason, response.body) == (503, "", b"the answer's own body")
    assert len(app.requests) == 3


def test_a_status_that_is_not_listed_is_not_retried(mesh: Mesh, web: Sidecar) -> None:
    app = mesh.backend(statuses(500))
    service = Service(web, app, retry=retry(3, "gateway-error", "reset"))
    assert service.get().status == 500
    assert len(app.requests) == 1


@pytest.mark.parametrize(("word", "code"), [("5xx", 500), ("gateway-error", 504), ("retriable-4xx", 409), (418, 418)])
def test_classes_of_statuses(mesh: Mesh, web: Sidecar, word: object, code: int) -> None:
    app = mesh.backend(statuses(code))
    assert Service(web, app, retry=retry(1, word)).get().status == 200


def test_a_reset_before_any_byte_of_the_answer_is_retried_where_repeating_is_safe(mesh: Mesh, web: Sidecar) -> None:
    app = mesh.backend(statuses(0, 0))
    service = Service(web, app, retry=retry(2, "reset"))
    assert service.get().status == 200
    assert len(app.requests) == 3


def test_a_post_whose_connection_died_after_a_byte_had_left_is_never_sent_again(mesh: Mesh, web: Sidecar) -> None:
    for code in (0, 503):
        app = mesh.backend(statuses(code))
        service = Service(web, app, retry=retry(5, "reset", 503, "timeout"))
        response = service.post()
        assert (response.status, response.reason) == ((502, "upstream_reset") if not code else (503, ""))
        assert len(app.requests) == 1


@pytest.mark.parametrize("more", [{"methods": ["any"]}, {}])
def test_a_post_is_retried_with_a_key_or_where_the_policy_says_so(
    mesh: Mesh, web: Sidecar, more: dict[str, Any]
) -> None:
    app = mesh.backend(statuses(503, 0))
    service = Service(web, app, retry=retry(3, "reset", 503, **more))
    response = service.post(body=b"pay", headers={} if more else {"Idempotency-Key": "k"})
    assert (response.status, response.body) == (200, b"pay")
    assert [request.body for request in app.complete] == [b"pay"] * 3


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"])
def test_idempotent_methods_are_retried(mesh: Mesh, web: Sidecar, method: str) -> None:
    def script(conn: Conn) -> None:
        while True:
            request = conn.take()
            first = len(app.requests) == 1
            head = (
                b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n"
                if first
                else b"HTTP/1.1 200 X\r\nContent-Length: 0\r\n\r\n"
            )
            assert request.method == method.encode()
            conn.send(head)

    app = mesh.backend(script)
    service = Service(web, app, retry=retry(1, 503))
    with service.client() as client:
        client.request(method, "/", service.name)
        assert client.response("HEAD").status == 200
    assert len(app.requests) == 2


@pytest.mark.parametrize("method", ["PATCH", "POST", "PROPFIND"])
def test_other_methods_are_not(mesh: Mesh, web: Sidecar, method: str) -> None:
    app = mesh.backend(statuses(503))
    service = Service(web, app, retry=retry(1, 503))
    with service.client() as client:
        client.request(method, "/", service.name, body=b"x")
        assert client.response().status == 503
    assert len(app.requests) == 1


def test_a_connect_error_is_retried_elsewhere_for_every_method(mesh: Mesh, web: Sidecar) -> None:
    app = mesh.backend()
    service = Service(web, mesh.dead_address(), app, retry=retry(1, 503), balance={"policy": "round-robin"})
    assert [service.post().status for _ in range(6)] == [200] * 6
    assert len(app.requests) == 6


def test_a_megabyte_that_met_a_connect_error_before_a_byte_left_is_sent_elsewhere(mesh: Mesh, web: Sidecar) -> None:
    app = mesh.backend()
    body = b"z" * (KIB * KIB)
    service = Service(web, mesh.dead_address(), app, retry=retry(1, 503), balance={"policy": "round-robin"})
    for _ in range(3):
        assert len(service.post(body=body).json["body"]) == len(body)


def test_a_retry_goes_to_an_endpoint_that_was_not_tried(mesh: Mesh, web: Sidecar) -> None:
    bad, good = mesh.backend(statuses(*[503] * 50)), mesh.backend()
    service = Service(web, bad, good, retry=retry(1, 503), circuit_breaker={"consecutive_failures": 1000})
    assert {service.get().status for _ in range(20)} == {200}
    assert len(good.requests) == 20


def test_a_timeout_of_the_try_is_retried_where_listed(mesh: Mesh, web: Sidecar) -> None:
    def script(conn: Conn) -> None:
        conn.take()
        if conn.number == 0:
            conn.sock.recv(1)  # until the sidecar gives up
        conn.reply(200, b"second")

    app = mesh.backend(script)
    service = Service(web, app, retry=retry(1, "timeout"), timeout={"try": "150ms", "total": "5s"})
    assert service.get().body == b"second"
    other = mesh.backend(script)
    response = Service(web, other, retry=retry(1, 503), timeout={"try": "150ms", "total": "5s"}).get()
    assert (response.status, response.reason) == (504, "timeout_try")


def test_the_back_off_lies_between_the_attempts(mesh: Mesh, web: Sidecar) -> None:
    app = mesh.backend(statuses(*[503] * 8))
    service = Service(
        web, app, retry={**retry(8, 503), "base": "40ms", "max": "40ms"}, circuit_breaker={"consecutive_failures": 99}
    )
    service.get()
    times = [request.time for request in app.requests]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert len(gaps) == 8
    assert all(gap < 0.3 for gap in gaps)
    assert sum(gaps) > 0.04  # with full jitter a single one may be nearly nothing; together they are 160 ms on average


@pytest.mark.parametrize(("asked", "answer", "least_s"), [("1", 200, 1.0), ("60", 503, 0.0), ("nonsense", 200, 0.0)])
def test_retry_after_is_obeyed_within_bounds(mesh: Mesh, web: Sidecar, asked: str, answer: int, least_s: float) -> None:
    def script(conn: Conn) -> None:
        conn.take()
        conn.reply(503, b"", [("Retry-After", asked)])
        while True:
            conn.take()
            conn.reply(200)

    app = mesh.backend(script)
    service = Service(web, app, retry=retry(1, 503))
    began = time.monotonic()
    assert service.get().status == answer
    assert time.monotonic() - began >= least_s


@pytest.mark.parametrize(("in_s", "answer"), [(-60, 200), (60, 503)])
def test_retry_after_may_be_a_date(mesh: Mesh, web: Sidecar, in_s: int, answer: int) -> None:
    """One that has passed: at once. One beyond `max_server_delay`: never."""
    date = formatdate(time.time() + in_s, usegmt=True)
    app = mesh.backend(lambda conn: _busy_once(conn, app, ("Retry-After", date)))
    began = time.monotonic()
    assert Service(web, app, retry=retry(1, 503)).get().status == answer
    assert time.monotonic() - began < 5


def test_a_server_may_be_given_less_time_or_not_be_heard(mesh: Mesh, web: Sidecar) -> None:
    app = mesh.backend(lambda conn: _busy_once(conn, app, ("Retry-After", "3")))
    assert Service(web, app, retry=retry(1, 503, max_server_delay="2s")).get().status == 503
    app.clear()
    began = time.monotonic()
    assert Service(web, app, retry=retry(1, 503, honour_retry_after=False)).get().status == 200
    assert time.monotonic() - began < 3


def _busy_once(conn: Conn, app: Backend, *fields: tuple[str, str]) -> None:
    while True:
        conn.take()
        conn.reply(503 if len(app.requests) == 1 else 200, b"", fields if len(app.requests) == 1 else ())


def test_a_retry_stays_within_the_version_that_was_chosen(mesh: Mesh, web: Sidecar) -> None:
    """Both endpoints of v1 fail, one after the other; that v2 would serve does not matter."""
    ones = [mesh.backend(statuses(*[503] * 50)) for _ in range(2)]
    two = mesh.backend()
    service = Service(
        web,
        retry=retry(3, 503),
        circuit_breaker={"consecutive_failures": 1000},
        address=[
            *({"at": str(one), "labels": {"version": "1"}} for one in ones),
            {"at": str(two), "labels": {"version": "2"}},
        ],
        versions={"v1": {"labels": {"version": "1"}}, "v2": {"labels": {"version": "2"}}},
        routes=[{"name": "all", "to": "v1"}],
    )
    assert service.get().status == 503
    asked = [len(one.requests) for one in ones]
    assert sum(asked) == 4 and min(asked) > 0, "each, before one of them again"
    assert two.requests == []


def test_all_bodies_that_are_kept_share_8_mib(mesh: Mesh, web: Sidecar) -> None:
    """Of 132 bodies of 64 KiB under way at once 128 fit, and can be sent again."""
    count, fit, body = 132, 128, b"k" * (64 * KIB)
    all_here = threading.Barrier(count)
    first = itertools.count()

    def script(conn: Conn) -> None:
        while True:
            conn.take()
            if next(first) < count:
                all_here.wait(15)
                conn.reply(503)
            else:
                conn.reply(200)

    app = mesh.backend(script)
    service = Service(web, app, retry=retry(1, 503), circuit_breaker={"consecutive_failures": 10_000})
    clients = [service.client() for _ in range(count)]
    try:
        for client in clients:
            client.request("PUT", "/", service.name, body=body)
        answers = Counter(client.response("PUT").status for client in clients)
    finally:
        for client in clients:
            client.close()
    assert answers == {200: fit, 503: count - fit}
    assert service.count("retries") == fit


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("size", "attempts"), [(1, 2), (64 * KIB, 2), (64 * KIB + 1, 1), (300 * KIB, 1)])
def test_a_body_is_replayed_up_to_64_kib(mesh: Mesh, web: Sidecar, size: int, attempts: int, chunked: bool) -> None:
    """The server reads the whole body before it fails."""
    app = mesh.backend(statuses(503))
    service = Service(web, app, retry=retry(1, 503))
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]
    with service.client() as client:
        if chunked:
            head = f"PUT / HTTP/1.1\r\nHost: {service.name}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
            client.send(head + b"%x\r\n%b\r\n0\r\n\r\n" % (size, body))
        else:
            client.request("PUT", "/", service.name, body=body)
        response = client.response("PUT")
    assert [request.body for request in app.complete] == [body] * attempts
    assert response.status == (200 if attempts == 2 else 503)


def test_a_retry_in_the_middle_of_an_upload_sends_what_came_and_what_comes(mesh: Mesh, web: Sidecar) -> None:
    def script(conn: Conn) -> None:
        if conn.number == 0:
            conn.head_of_request()
            conn.reader.exactly(3)
            conn.reset()
            return
        conn.reply(200, conn.take().body)

    app = mesh.backend(script)
    service = Service(web, app, retry=retry(1, "reset"))
    with service.client() as client:
        client.send(f"PUT / HTTP/1.1\r\nHost: {service.name}\r\nContent-Length: 9\r\n\r\none".encode())
        until(lambda: app.count == 2)
        client.send(b"two")
        time.sleep(0.05)
        client.send(b"six")
        response = client.response("PUT")
    assert (response.status, response.body) == (200, b"onetwosix")


def test_nothing_is_retried_after_the_first_byte_of_the_answer_went_down(mesh: Mesh, web: Sidecar) -> None:
    def script(conn: Conn) -> None:
        conn.take()
        conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
        time.sleep(0.05)
        conn.reset()

    app = mesh.backend(script)
    service = Service(web, app, retry=retry(3, "reset", 503))
    with service.client() as client:
        client.request("GET", "/", service.name)
        client.response(body=False)
        with pytest.raises(Exception):  # noqa: B017
            client.reader.exactly(10)
    assert len(app.requests) == 1
    assert web.logged(service=service.name)["reason"] == "cut_short"


def test_the_budget_bounds_retries(mesh: Mesh, web: Sidecar) -> None:
    """A reserve of 10, and 20 % of the requests: 10 + 8 of 40."""
    app = mesh.backend(statuses(*[503] * 1000))
    policy = {**retry(1, 503), "budget": {"percent": "20%", "min_per_second": 1}}
    service = Service(web, app, retry=policy, circuit_breaker={"consecutive_failures": 10_000})
    with service.client() as client:
        for _ in range(40):
            assert client.get("/", host=service.name).status == 503
    assert 17 <= service.count("retries") <= 19
    assert service.count("retry_budget_exhausted") == 40 - service.count("retries")
    assert len(app.requests) == 40 + service.count("retries")


# -- the race between an idle connection's end and the next request


def closing(seed: int) -> Callable[[Conn], None]:
    """Closes the connection at random: after an answer at once, a little later, or on the next request's arrival."""
    chance = random.Random(seed)
    lock = threading.Lock()

    def script(conn: Conn) -> None:
        with lock:
            how, rounds = chance.choice(("close", "reset", "late", "late reset", "unseen")), chance.randrange(1, 6)
        for number in range(rounds):
            if how == "unseen" and number == rounds - 1 and number:
                conn.sock.recv(1)  # the request has come, but nobody reads it
                return
            conn.reply(200, conn.take().body)
        if "late" in how:
            time.sleep(0.0005)
        if "reset" in how:
            conn.reset()

    return script


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.long)])
def test_gets_survive_a_server_that_closes_idle_connections_at_random(mesh: Mesh, web: Sidecar, count: int) -> None:
    app = mesh.backend(closing(count))
    service = Service(web, app, retry=retry(0), circuit_breaker={"consecutive_failures": 10_000})

    def run(number: int) -> Counter[tuple[int, str]]:
        answers: Counter[tuple[int, str]] = Counter()
        with service.client() as client:
            for _ in range(count // 4):
                response = client.get("/", host=service.name)
                answers[response.status, response.reason] += 1
        return answers

    with ThreadPoolExecutor(4) as pool:
        answers = sum(pool.map(run, range(4)), Counter())
    assert answers == {(200, ""): count}
    assert service.count("resends") > 0  # the race did happen, and was free of charge
    assert service.count("retries") == 0


def test_posts_to_such_a_server_are_never_doubled(mesh: Mesh, web: Sidecar) -> None:
    app = mesh.backend(closing(7))
    service = Service(web, app, retry=retry(3, "reset", 503), circuit_breaker={"consecutive_failures": 10_000})
    answers: Counter[tuple[int, str]] = Counter()
    with service.client() as client:
        for number in range(500):
            response = client.post("/", b"%d" % number, host=service.name)
            answers[response.status, response.reason] += 1
            if response.status == 200:
                assert response.body == b"%d" % number
    assert set(answers) <= {(200, ""), (502, "upstream_reset")}
    received = Counter(request.body for request in app.requests)
    assert max(received.values()) == 1
    # One that meets an end which is already there goes out on another connection; only a true race is lost.
    assert answers[200, ""] >= 350, answers


# -- deadlines


def test_the_total_covers_a_server_that_does_not_answer(mesh: Mesh, web: Sidecar) -> None:
    app = mesh.backend(lambda conn: (conn.take(), conn.sock.recv(1), None)[-1])
    service = Service(web, app, timeout={"total": "200ms"}, retry=retry(3, "timeout", "reset"))
    began = time.monotonic()
    response = service.get()
    assert (response.status, response.reason) == (504, "timeout_total")
    assert 0.2 <= time.monotonic() - began < 1.0
    until(lambda: not app.open)  # the work is cancelled


def test_the_total_covers_connecting(mesh: Mesh, web: Sidecar) -> None:
    import socket

    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = f"127.0.0.1:{full.getsockname()[1]}"
        held = [socket.socket() for _ in range(4)]
        for sock in held:
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        service = Service(web, address, timeout={"total": "200ms", "connect": "5s"})
        response = service.get()
        assert (response.status, response.reason) == (504, "timeout_total")
        service = Service(web, address, timeout={"connect": "150ms"}, retry=retry(0))
        response = service.get()
        assert (response.status, response.reason) == (503, "connect_failed")
        for sock in held:
            sock.close()


def test_a_long_upload_is_no_slow_server(mesh: Mesh, web: Sidecar) -> None:
    """`total` and `try` restart at the last byte of the request's body."""
    app = mesh.backend()
    service = Service(web, app, timeout={"total": "250ms", "try": "250ms"})
    with service.client() as client:
        client.send(f"PUT / HTTP/1.1\r\nHost: {service.name}\r\nContent-Length: 5\r\n\r\n".encode())
        for byte in b"12345":
            time.sleep(0.1)
            client.send(bytes([byte]))
        assert client.response("PUT").json["body"] == "12345"


@pytest.mark.parametrize("which", ["idle", "body"])
def test_bodies_are_held_to_their_own_timeouts(mesh: Mesh, web: Sidecar, which: str) -> None:
    def script(conn: Conn) -> None:
        request = conn.head_of_request()
        if request.method == b"PUT":
            conn.sock.recv(1000)
            conn.sock.recv(1)
            return
        conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(1000):
            conn.send(b"x")
            time.sleep(10 if which == "idle" else 0.05)

    app = mesh.backend(script)
    service = Service(web, app, timeout={which: "300ms"})
    began = time.monotonic()
    with service.client() as client:
        client.request("GET", "/", service.name)
        client.response(body=False)
        with pytest.raises(Exception):  # noqa: B017
            client.reader.exactly(1000)
    with service.client() as client:
        client.send(f"PUT / HTTP/1.1\r\nHost: {service.name}\r\nContent-Length: 100\r\n\r\nx".encode())
        response = client.response("PUT")
        assert (response.status, response.reason) == (408, "request_timeout")
        assert client.closed()
    assert 0.6 <= time.monotonic() - began < 3


def test_a_deadline_that_the_application_states_is_kept(mesh: Mesh, web: Sidecar) -> None:
    app = mesh.backend(lambda conn: (conn.take(), conn.sock.recv(1), None)[-1])
    service = Service(web, app)
    began = time.monotonic()
    assert service.get(headers={"x-request-deadline-ms": "150"}).reason == "timeout_total"
    assert time.monotonic() - began < 1.0
    app.clear()
    assert service.get(headers={"x-request-deadline-ms": "0"}).reason == "timeout_total"
    assert app.requests == []


# -- across an application


@pytest.fixture(scope="module")
def chain(mesh: Mesh) -> "Chain":
    return Chain(mesh)


class Chain:
    """web → middle → last; the application `middle` calls `last` through its sidecar and passes traceparent on."""

    def __init__(self, mesh: Mesh) -> None:
        http = {"ports": {"http": {"port": 80}}}
        again = {"retry": retry(1, 503), "circuit_breaker": {"consecutive_failures": 10_000}}
        self.last_app = mesh.backend()
        self.last = mesh.sidecar("last", {"last": http, "middle": {}}, app=self.last_app, outbound=False)
        self.middle_app = mesh.backend(self.relay)
        self.propagate = True
        self.middle = mesh.sidecar(
            "middle",
            {"web": {}, "middle": http, "last": {**http, **again, "address": [self.last.inbound]}},
            app=self.middle_app,
        )
        self.web = mesh.sidecar(
            "web", {"web": {}, "middle": {**http, **again, "address": [self.middle.inbound]}}, inbound=False
        )

    def relay(self, conn: Conn) -> None:
        while True:
            request = conn.take()
            trace = request.header("traceparent")
            assert trace is not None
            headers = {"traceparent": trace.decode()} if self.propagate else {}
            with self.middle.client() as client:
                answer = client.get(request.target.decode(), host="last", headers=headers)
            conn.reply(answer.status, answer.body)

    def get(self, **headers: str) -> Response:
        self.last_app.clear()
        self.middle_app.clear()
        with self.web.client() as client:
            return client.get(
                "/", host="middle", headers={name.replace("_", "-"): text for name, text in headers.items()}
            )


def test_a_trace_is_made_where_it_is_missing_and_kept_where_it_is_not(chain: Chain) -> None:
    chain.last_app.script = statuses()
    chain.get()
    made = chain.middle_app.requests[0].header("traceparent")
    assert made is not None and made == chain.last_app.requests[0].header("traceparent")
    given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    chain.get(traceparent=given)
    assert chain.last_app.requests[0].header("traceparent") == given.encode()
    chain.get(traceparent="00-nonsense-01", tracestate="a=b")
    assert chain.last_app.requests[0].header("traceparent") not in (None, b"00-nonsense-01")


def test_a_deadline_travels_across_the_application(chain: Chain) -> None:
    def endless(conn: Conn) -> None:
        conn.take()
        conn.sock.recv(1)

    chain.last_app.script = endless
    chain.last_app.end_connections()
    began = time.monotonic()
    assert chain.get(x_request_deadline_ms="400").status == 504
    assert time.monotonic() - began < 2
    until(lambda: not chain.last_app.open)  # the work two hops away is cancelled
    assert chain.middle.logged(side="out", service="last", reason="timeout_total")["duration_ms"] < 450


def test_one_layer_retries_and_the_others_know(chain: Chain) -> None:
    """Without marking, a service that fails would be called four times."""
    chain.last_app.script = statuses(*[503] * 20)
    chain.last_app.end_connections()
    assert chain.get().status == 503
    assert len(chain.last_app.requests) == 2
    assert len(chain.middle_app.requests) == 1
    chain.propagate = False
    try:
        assert chain.get().status == 503
        assert len(chain.last_app.requests) == 4
    finally:
        chain.propagate = True


def test_inside_another_layers_retry_nothing_is_retried_that_may_have_reached_the_application(chain: Chain) -> None:
    attempts = []

    def flaky(conn: Conn) -> None:
        while True:
            request = conn.take()
            attempts.append(request)
            if len(attempts) == 1:  # fails by itself; the caller's sidecar retries it as attempt 1
                conn.reply(503)
                continue
            trace = request.header("traceparent")
            assert trace is not None
            with chain.middle.client() as client:
                answer = client.get("/", host="last", headers={"traceparent": trace.decode()})
            conn.reply(answer.status, answer.body)

    chain.middle_app.end_connections()
    chain.last_app.script = statuses(*[503] * 20)
    chain.last_app.end_connections()
    try:
        chain.middle_app.script = flaky
        chain.last_app.clear()
        with chain.web.client() as client:
            assert client.get("/", host="middle").status == 503
        assert len(attempts) == 2
        assert len(chain.last_app.requests) == 1
    finally:
        chain.middle_app.clear(chain.relay)
        chain.middle_app.end_connections()


def test_marks_do_not_reach_applications(chain: Chain) -> None:
    chain.last_app.script = statuses()
    chain.last_app.end_connections()
    response = chain.get(x_pillion_attempt="7")
    for fields in (chain.last_app.requests[0], chain.middle_app.requests[0], response):
        assert not [name for name, _ in fields.headers if name.startswith(b"x-pillion")]
        assert fields.header("x-request-deadline-ms") is None


# -- breakers and limits


def test_a_breaker_opens_and_recovers(mesh: Mesh, web: Sidecar) -> None:
    app = mesh.backend(statuses(500, 500, 500))
    breaker = {"consecutive_failures": 3, "open_for": "300ms", "max_open": "1s"}
    service = Service(web, app, retry=retry(0), circuit_breaker=breaker)
    assert [service.get().status for _ in range(3)] == [500] * 3
    response = service.get()
    assert (response.status, response.reason) == (503, "circuit_open")
    assert len(app.requests) == 3
    assert service.cluster()[0]["breaker"] == "open"
    assert web.metric("pillion_breaker_state", service=service.name) == 2
    assert f"breaker of {service.name}" in web.log
    time.sleep(0.47)  # and up to half as much again
    assert service.get().status == 200  # the probe
    assert service.cluster()[0]["breaker"] == "closed"
    assert service.get().status == 200


def test_a_failing_probe_opens_for_longer(mesh: Mesh, web: Sidecar) -> None:
    app = mesh.backend(statuses(500, 500, 500))
    breaker = {"consecutive_failures": 2, "open_for": "200ms", "max_open": "1s"}
    service = Service(web, app, retry=retry(0), circuit_breaker=breaker)
    for _ in range(2):
        service.get()
    until(lambda: service.get().status == 500, limit_s=2)  # the probe fails
    failed = time.monotonic()
    until(lambda: service.get().status == 200, limit_s=3)
    assert 0.38 <= time.monotonic() - failed <= 0.8
    assert len(app.requests) == 4


def test_an_open_breaker_leaves_the_other_endpoints_to_serve(mesh: Mesh, web: Sidecar) -> None:
    bad, good = mesh.backend(statuses(*[500] * 100)), mesh.backend()
    breaker = {"consecutive_failures": 2, "open_for": "30s"}
    service = Service(web, bad, good, retry=retry(0), circuit_breaker=breaker, balance={"policy": "round-robin"})
    answers = Counter(service.get().status for _ in range(30))
    assert answers == {500: 2, 200: 28}


def test_connections_beyond_the_limit_wait_and_beyond_the_queue_overflow(mesh: Mesh, web: Sidecar) -> None:
    go = threading.Event()

    def slow(conn: Conn) -> None:
        while True:
            conn.take()
            go.wait(10)
            conn.reply(200)

    app = mesh.backend(slow)
    service = Service(web, app, limits={"connections": 2, "pending": 3, "requests": 100})
    clients = [service.client() for _ in range(8)]
    for client in clients:
        client.request("GET", "/", service.name)
    refused: list[Client] = []
    until(lambda: _answered(clients, refused) == 3)
    assert [client.response().reason for client in refused] == ["overflow"] * 3
    until(lambda: app.count == 2)
    go.set()
    for client in clients:
        if client not in refused:
            assert client.response().status == 200
    assert app.count == 2
    assert service.count("overflows") == 3
    for client in clients:
        client.close()


def _answered(clients: list[Client], found: list[Client]) -> int:
    import select

    readable, _, _ = select.select([client.sock for client in clients], [], [], 0)
    found[:] = [client for client in clients if client.sock in readable]
    return len(found)


def test_requests_beyond_the_limit_overflow_at_once(mesh: Mesh, web: Sidecar) -> None:
    app = mesh.backend(lambda conn: (conn.take(), conn.sock.recv(1), None)[-1])
    service = Service(web, app, limits={"requests": 2})
    clients = [service.client() for _ in range(2)]
    for client in clients:
        client.request("GET", "/", service.name)
    until(lambda: len(app.requests) == 2)
    time.sleep(0.15)  # an end right behind a request would mean "no more requests"
    response = service.get()
    assert (response.status, response.reason) == (503, "overflow")
    for client in clients:
        client.close()
    until(lambda: web.metric("pillion_requests_active", service=service.name) == 0)
    app.script = statuses()
    assert service.get().status == 200


def test_who_waits_for_a_connection_may_leave(mesh: Mesh, web: Sidecar) -> None:
    go = threading.Event()

    def slow(conn: Conn) -> None:
        while True:
            conn.take()
            go.wait(10)
            conn.reply(200)

    app = mesh.backend(slow)
    service = Service(web, app, limits={"connections": 1})
    with service.client() as first, service.client() as third:
        first.request("GET", "/1", service.name)
        until(lambda: app.requests)
        second = service.client()
        second.request("GET", "/2", service.name)
        third.request("GET", "/3", service.name)
        until(lambda: service.cluster()[0]["service_waiting"] == 2)
        time.sleep(0.15)
        second.close()
        until(lambda: service.cluster()[0]["service_waiting"] == 1)
        go.set()
        assert first.response().status == 200 and third.response().status == 200
    assert [request.target for request in app.requests] == [b"/1", b"/3"]


# -- versions


def versions(mesh: Mesh, web: Sidecar, routes: list[Any], **more: Any) -> tuple[Service, Backend, Backend]:
    one, two = mesh.backend(), mesh.backend()
    addresses = [{"at": str(one), "labels": {"version": "1"}}, {"at": str(two), "labels": {"version": "2"}}]
    declared = {"v1": {"labels": {"version": "1"}}, "v2": {"labels": {"version": "2"}}}
    return Service(web, address=addresses, versions=declared, routes=routes, **more), one, two


def test_canary_weights(mesh: Mesh, web: Sidecar) -> None:
    service, one, two = versions(mesh, web, [{"to": {"v1": 90, "v2": 10}}])
    with service.client() as client:
        for _ in range(500):
            assert client.get("/", host=service.name).status == 200
    assert len(one.requests) + len(two.requests) == 500
    assert 20 <= len(two.requests) <= 85  # five standard deviations either way


def test_routes_by_header_and_path(mesh: Mesh, web: Sidecar) -> None:
    routes = [
        {"match": {"headers": {"x-beta": "1"}}, "to": "v2"},
        {"match": {"path": "/two/**", "methods": ["GET"]}, "to": "v2"},
        {"match": {"query": {"v": "2"}}, "to": "v2"},
        {"to": "v1"},
    ]
    service, one, two = versions(mesh, web, routes)
    service.get("/", headers={"X-Beta": "1"})
    service.get("/two/x")
    service.get("/two")
    service.get("/?v=2")
    assert (len(one.requests), len(two.requests)) == (0, 4)
    service.get("/")
    service.post("/two/x")
    service.get("/", headers={"X-Beta": "2"})
    service.get("/%74wo/../one")
    assert (len(one.requests), len(two.requests)) == (4, 4)
    assert one.requests[-1].target == b"/one"  # one path is judged and forwarded


def test_a_sticky_cookie_keeps_a_client_with_its_version(mesh: Mesh, web: Sidecar) -> None:
    service, one, two = versions(mesh, web, [{"to": {"v1": 50, "v2": 50}, "sticky": {"cookie": "stay"}}])
    for _ in range(6):
        one.clear()
        two.clear()
        first = service.get()
        cookie = (first.header("set-cookie") or b"").decode()
        assert cookie.startswith("stay=") and "httponly" in cookie.lower()
        pair = cookie.partition(";")[0]
        for _ in range(5):
            response = service.get(headers={"cookie": f"a=b; {pair}"})
            assert response.header("set-cookie") is None
        assert sorted((len(one.requests), len(two.requests))) == [0, 6]
    forged = service.get(headers={"cookie": "stay=v1"})
    assert forged.header("set-cookie") is not None


def test_a_fallback_serves_when_a_version_cannot(mesh: Mesh, web: Sidecar) -> None:
    one = mesh.backend()
    declared = {"v1": {"labels": {"version": "1"}}, "v2": {"labels": {"version": "2"}}}
    addresses = [{"at": str(one), "labels": {"version": "1"}}]
    routes = [
        {"match": {"path": "/fixed"}, "to": "v2", "fallback": {"status": 503, "body": "try later"}},
        {"match": {"path": "/none"}, "to": "v2"},
        {"to": "v2", "fallback": {"version": "v1"}},
    ]
    service = Service(web, address=addresses, versions=declared, routes=routes)
    assert service.get("/").status == 200 and len(one.requests) == 1
    response = service.get("/fixed")
    assert (response.status, response.body) == (503, b"try later")
    response = service.get("/none")
    assert (response.status, response.reason) == (503, "no_healthy_endpoint")


def test_a_fixed_response_a_redirect_and_a_rewrite(mesh: Mesh, web: Sidecar) -> None:
    app = mesh.backend()
    routes = [
        {"match": {"path": "/fixed"}, "respond": {"status": 418, "body": "teapot"}},
        {"match": {"path": "/moved"}, "redirect": {"to": "https://example.com/there", "status": 308}},
        {"match": {"path": "/old"}, "rewrite": {"path": "/new", "host": "inner"}},
        {"headers": {"request": {"set": {"x-a": "1"}, "remove": ["x-b"]}, "response": {"add": {"x-c": "2"}}}},
    ]
    service = Service(web, app, routes=routes)
    with service.client() as client:
        response = client.get("/fixed", host=service.name)
        assert (response.status, response.body) == (418, b"teapot")
        response = client.get("/moved?x", host=service.name)
        assert (response.status, response.header("location")) == (308, b"https://example.com/there?x")
        response = client.get("/old?q", host=service.name)
        assert response.json["target"] == "/new?q" and dict(response.json["headers"])["host"] == "inner"
        response = client.get("/", host=service.name, headers={"x-a": "0", "x-b": "0"})
        assert response.header("x-c") == b"2"
        seen = dict(response.json["headers"])
        assert seen["x-a"] == "1" and "x-b" not in seen


def test_faults_are_injected(mesh: Mesh, web: Sidecar) -> None:
    app = mesh.backend()
    routes = [
        {"match": {"path": "/abort"}, "fault": {"abort": {"status": 555, "percent": "100%"}}},
        {"match": {"path": "/delay"}, "fault": {"delay": {"fixed": "200ms", "percent": "100%"}}},
        {"match": {"path": "/never"}, "fault": {"abort": {"status": 555, "percent": "0%"}}},
    ]
    service = Service(web, app, routes=routes)
    response = service.get("/abort")
    assert (response.status, response.reason) == (555, "fault_injected")
    assert app.requests == []
    began = time.monotonic()
    assert service.get("/delay").status == 200
    assert time.monotonic() - began >= 0.2
    began = time.monotonic()
    assert service.post("/delay", b"z" * 100_000).status == 200
    assert time.monotonic() - began >= 0.2
    assert service.get("/never").status == 200


def test_a_caller_that_leaves_while_a_fault_delays_it(mesh: Mesh, web: Sidecar) -> None:
    app = mesh.backend()
    service = Service(web, app, routes=[{"fault": {"delay": {"fixed": "400ms", "percent": "100%"}}}])
    client = service.client()
    client.request("GET", "/", service.name)
    time.sleep(0.2)
    client.close()
    time.sleep(0.4)
    assert app.requests == []


# -- what the callee's sidecar enforces


@pytest.fixture(scope="module")
def guarded(mesh: Mesh) -> tuple[Sidecar, Backend]:
    app = mesh.backend()
    service = {
        "ports": {"http": {"port": 80}},
        "authz": {
            "allow": [
                {"from": ["web"], "methods": ["GET"]},
                {"from": ["admin"], "paths": ["/admin/**"]},
                {"from": ["web"], "paths": ["/open/**"]},
            ],
            "deny": [{"headers": {"x-tenant": "blocked"}, "message": "tenant suspended"}, {"paths": ["/secret/**"]}],
        },
        "routes": [
            {"name": "audited", "match": {"path": "/audited/**"},
             "authz": {"mode": "audit", "deny": [{"methods": ["GET"]}]}},
            {"name": "limited", "match": {"path": "/limited"},
             "rate_limit": {"requests": 3, "per": "10s", "burst": 3, "key": "caller"}},
            {"name": "rest"},
        ],
    }  # fmt: skip
    return mesh.sidecar("guarded", {"web": {}, "admin": {}, "guarded": service}, app=app, outbound=False), app


@pytest.mark.parametrize(
    ("caller", "method", "target", "headers", "allowed"),
    [
        ("web", "GET", "/", {}, True),
        ("web", "POST", "/", {}, False),
        ("web", "POST", "/open/x", {}, True),
        ("web", "POST", "/open/../x", {}, False),
        ("web", "POST", "/open/%2e%2e/x", {}, False),
        ("web", "POST", "/open//..//x", {}, True),  # goes on as /open//x
        ("web", "POST", "/open/x;/../../y", {}, False),
        ("admin", "DELETE", "/admin/1", {}, True),
        ("admin", "GET", "/", {}, False),
        ("orders", "GET", "/", {}, False),
        ("web", "GET", "/", {"x-tenant": "blocked"}, False),
        ("web", "GET", "/secret/1", {}, False),
        ("web", "GET", "/%73ecret/1", {}, False),
        ("web", "GET", "/x/..//secret/1", {}, False),
        ("web", "GET", "/secret;a=b/1", {}, False),
        ("web", "GET", "/SECRET/1", {}, True),
        ("web", "GET", "/secretary", {}, True),
    ],
)
def test_authorization_by_caller_method_path_and_header(
    guarded: tuple[Sidecar, Backend], caller: str, method: str, target: str, headers: dict[str, str], allowed: bool
) -> None:
    sidecar, app = guarded
    app.clear()
    with sidecar.mesh_client(caller) as client:
        client.request(method, target, "guarded", headers=headers)
        response = client.response()
    assert (response.status, len(app.requests)) == ((200, 1) if allowed else (403, 0))
    if not allowed:
        assert response.reason == "denied"
        assert "tenant" not in response.body.decode() and "mesh.yaml" not in response.body.decode()
        line = sidecar.logged(reason="denied", method=method, caller=f"spiffe://mesh.local/service/{caller}")
        assert line["rule"]


def test_a_repeated_header_is_judged_by_each_value(guarded: tuple[Sidecar, Backend]) -> None:
    with guarded[0].mesh_client() as client:
        client.request("GET", "/", "guarded", headers=[("x-tenant", "fine"), ("X-Tenant", "blocked")])
        assert client.response().status == 403


@pytest.mark.parametrize("target", ["/a%2fb", "/a%5cb", "/a\\b", "/a%00b", "/%zz", "/../x", "/a%"])
def test_ambiguous_paths_are_refused_where_paths_are_judged(guarded: tuple[Sidecar, Backend], target: str) -> None:
    sidecar, app = guarded
    app.clear()
    with sidecar.mesh_client() as client:
        response = client.get(target, host="guarded")
        assert (response.status, response.reason) == (400, "bad_request")
    assert app.requests == []


def test_audit_lets_pass_and_counts(guarded: tuple[Sidecar, Backend]) -> None:
    sidecar, _ = guarded
    before = sidecar.metric("pillion_authz_would_deny_total")
    with sidecar.mesh_client() as client:
        assert client.get("/audited/x", host="guarded").status == 200
    assert sidecar.metric("pillion_authz_would_deny_total") == before + 1


def test_a_rate_limit_answers_429_with_its_fields_and_keeps_callers_apart(guarded: tuple[Sidecar, Backend]) -> None:
    sidecar, app = guarded
    app.clear()
    with sidecar.mesh_client() as client:
        answers = [client.get("/limited", host="guarded") for _ in range(5)]
    assert [answer.status for answer in answers] == [200, 200, 200, 429, 429]
    refused = answers[-1]
    assert refused.reason == "rate_limited"
    assert 1 <= int(refused.header("retry-after") or 0) <= 10
    assert refused.header("ratelimit") and refused.header("ratelimit-policy")
    assert len(app.requests) == 3
    assert sidecar.metric("pillion_rate_limited_total") == 2
