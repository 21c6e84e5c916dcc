"""Clients that take their time, in great numbers: live sidecars stay quick for everybody else and small in memory."""

import resource
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.mesh import Client, Conn, Mesh, Pair, Sidecar, dial, until

MIB = 1024 * 1024
GROWTH_BYTES_MAX = 16 * MIB
TLS_CONNECTION_BYTES = 28 * 1024
LATENCY_S = 0.25
CROWD = [300, pytest.param(2000, marks=pytest.mark.long)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16384), hard))
    try:
        with Mesh(tmp_path_factory.mktemp("time")) as mesh:
            yield Pair(mesh)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(autouse=True)
def _clean(pair: Pair) -> Iterator[None]:
    pair.fresh()
    yield
    for sidecar in (pair.web, pair.reviews):
        assert sidecar.crashes == 0


class Neighbour:
    """Another client, all the while: a request every few milliseconds, and the worst answer that it has had."""

    def __init__(self, pair: Pair, sidecar: Sidecar) -> None:
        self.pair, self.sidecar = pair, sidecar
        self.worst_s, self.count = 0.0, 0
        self.wrong: list[object] = []
        self.stop = threading.Event()
        self.memory = sidecar.resident_bytes()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            with self.pair.client() as client:
                while not self.stop.wait(0.005):
                    began = time.monotonic()
                    response = client.get("/neighbour")
                    self.worst_s = max(self.worst_s, time.monotonic() - began)
                    self.count += 1
                    if response.status != 200:
                        self.wrong.append(response)
        except Exception as exc:
            self.wrong.append(exc)

    def __enter__(self) -> "Neighbour":
        with self.pair.client() as client:
            client.get("/warm")
        self.memory = self.sidecar.resident_bytes()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def check(self, beside_bytes: int = 0) -> None:
        assert not self.wrong, self.wrong[:3]
        assert self.count > 10
        assert self.worst_s < LATENCY_S, self.worst_s
        growth = self.sidecar.resident_bytes() - self.memory
        assert growth < GROWTH_BYTES_MAX + beside_bytes, growth


def attackers(pair: Pair) -> list[bytes]:
    return [request.target for request in pair.app.requests if request.target not in (b"/neighbour", b"/warm")]


def crowd(address: str, count: int) -> list[socket.socket]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda _: dial(address), range(count)))


def mesh_crowd(sidecar: Sidecar, count: int) -> list[ssl.SSLSocket]:
    sidecar.mesh.client_context("web", None, "http/1.1")
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda _: sidecar.mesh_socket(), range(count)))


def close_all(sockets: "list[socket.socket] | list[ssl.SSLSocket]") -> None:
    for sock in sockets:
        sock.close()


SLOW = {
    "silent": (b"", b""),
    "slow heads": (b"GET /slow HTTP/1.1\r\nHost: reviews\r\nX-", b"a"),
    "slow bodies": (b"POST /slow HTTP/1.1\r\nHost: reviews\r\nContent-Length: 1000\r\n\r\n", b"b"),
    "slow chunks": (b"POST /slow HTTP/1.1\r\nHost: reviews\r\nTransfer-Encoding: chunked\r\n\r\n3e8;", b"x"),
}


@pytest.mark.parametrize("count", CROWD)
@pytest.mark.parametrize("kind", ["silent", "slow heads", "slow chunks"])
def test_slow_clients_of_the_outbound_side_harm_nobody(pair: Pair, kind: str, count: int) -> None:
    head, more = SLOW[kind]
    with Neighbour(pair, pair.web) as neighbour:
        sockets = crowd(pair.web.outbound, count)
        try:
            for sock in sockets:
                sock.sendall(head)
            for _ in range(3):
                for sock in sockets:
                    try:
                        sock.sendall(more)
                    except OSError:
                        pass  # given up already
                time.sleep(0.1)
        finally:
            neighbour.stop.set()
            neighbour.thread.join()
            neighbour.check()
            close_all(sockets)
    if "chunks" not in kind:
        assert attackers(pair) == []


@pytest.mark.parametrize("count", CROWD)
@pytest.mark.parametrize("kind", ["silent", "slow heads"])
def test_slow_peers_of_the_inbound_side_harm_nobody(pair: Pair, kind: str, count: int) -> None:
    head, more = SLOW[kind]
    with Neighbour(pair, pair.reviews) as neighbour:
        sockets = mesh_crowd(pair.reviews, count)
        try:
            for sock in sockets:
                if head:
                    sock.sendall(head)
            for _ in range(3):
                for sock in sockets:
                    if more:
                        sock.sendall(more)
                time.sleep(0.1)
        finally:
            neighbour.stop.set()
            neighbour.thread.join()
            neighbour.check(beside_bytes=count * TLS_CONNECTION_BYTES)
            close_all(sockets)
    assert attackers(pair) == []


@pytest.mark.parametrize("count", CROWD)
@pytest.mark.parametrize("first", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"])
def test_connections_that_stop_before_or_within_the_handshake_harm_nobody(pair: Pair, first: bytes, count: int) -> None:
    """Also not those who make new connections meanwhile."""
    with Neighbour(pair, pair.reviews) as neighbour:
        sockets = crowd(pair.reviews.inbound, count)
        try:
            for sock in sockets:
                try:
                    sock.sendall(first)
                except OSError:
                    pass
            slowest = 0.0
            for _ in range(3):
                began = time.monotonic()
                with pair.reviews.mesh_client() as client:
                    assert client.get("/neighbour").status == 200
                slowest = max(slowest, time.monotonic() - began)
            assert slowest < 5.0, slowest
        finally:
            neighbour.stop.set()
            neighbour.thread.join()
            neighbour.check(beside_bytes=count * TLS_CONNECTION_BYTES)
            close_all(sockets)


def test_unfinished_heads_share_four_megabytes_and_the_oldest_gives_way(pair: Pair) -> None:
    head = b"GET /big HTTP/1.1\r\nHost: reviews\r\n" + b"".join(b"X-%d: %b\r\n" % (n, b"v" * 1000) for n in range(50))
    with Neighbour(pair, pair.web) as neighbour:
        sockets = crowd(pair.web.outbound, 200)
        for sock in sockets:
            sock.sendall(head)
        time.sleep(0.3)
        gone = 0
        for sock in sockets:
            sock.setblocking(False)
            try:
                gone += sock.recv(100).startswith(b"HTTP/1.1 408")
            except BlockingIOError:
                pass
        assert 110 <= gone <= 130, gone  # 4 MiB hold some 80
        neighbour.stop.set()
        neighbour.thread.join()
        neighbour.check()
        close_all(sockets)
    assert attackers(pair) == []


def test_an_unfinished_head_is_given_up_after_ten_seconds(pair: Pair) -> None:
    with pair.client() as trickle, pair.client() as reused:
        assert reused.get("/").status == 200
        began = time.monotonic()
        for client in (trickle, reused):
            client.send(b"GET / HTTP/1.1\r\nHost:")
        trickle.sock.settimeout(0.5)
        while time.monotonic() - began < 15:
            try:
                trickle.send(b"x")
                if trickle.sock.recv(1):
                    break
            except TimeoutError:
                continue
        assert 9 < time.monotonic() - began < 12
        response = reused.response()
        assert (response.status, response.reason) == (408, "request_timeout")


def test_pipelined_requests_behind_a_slow_one_do_not_fill_the_memory(pair: Pair) -> None:
    """Tiny requests are parsed into objects much larger than they are."""
    go = threading.Event()

    def script(conn: Conn) -> None:
        while True:
            if conn.take().target == b"/hang":
                go.wait(20)
            conn.reply()

    pair.app.script = script
    flood = b"GET /hang HTTP/1.1\r\nHost: reviews\r\n\r\n" + b"GET / HTTP/1.1\r\nHost: reviews\r\n\r\n" * 8000
    with Neighbour(pair, pair.web) as neighbour:
        sockets = crowd(pair.web.outbound, 50)
        for sock in sockets:
            sock.settimeout(0.05)
            try:
                sock.sendall(flood)
            except TimeoutError:
                pass
        time.sleep(0.5)
        neighbour.stop.set()
        neighbour.thread.join()
        try:
            neighbour.check()
        finally:
            for sock in sockets:
                sock.close()
            go.set()


def test_partial_heads_behind_slow_requests_do_not_fill_the_memory(pair: Pair) -> None:
    go = threading.Event()

    def script(conn: Conn) -> None:
        while True:
            if conn.take().target == b"/hang":
                go.wait(20)
            conn.reply()

    pair.app.script = script
    part = b"GET / HTTP/1.1\r\nHost: reviews\r\n" + b"".join(b"X-%d: %b\r\n" % (n, b"v" * 1000) for n in range(55))
    with Neighbour(pair, pair.web) as neighbour:
        sockets = crowd(pair.web.outbound, 400)
        for sock in sockets:
            sock.sendall(b"GET /hang HTTP/1.1\r\nHost: reviews\r\n\r\n" + part)
        time.sleep(0.7)
        neighbour.stop.set()
        neighbour.thread.join()
        try:
            # 400 requests are really under way, each with its connections and its objects
            neighbour.check(beside_bytes=400 * (TLS_CONNECTION_BYTES + 10_000))
        finally:
            close_all(sockets)
            go.set()


def test_three_hundred_handshakes_at_once_from_one_address_all_succeed(pair: Pair) -> None:
    """All of them legitimate: a fleet behind one address that has just been restarted."""
    with Neighbour(pair, pair.reviews) as neighbour:
        sockets = crowd(pair.reviews.inbound, 300)
        tls = pair.mesh.client_context("web", None, "http/1.1")

        def prove(sock: socket.socket) -> object:
            try:
                wrapped = tls.wrap_socket(sock, server_hostname="http.reviews.mesh", suppress_ragged_eofs=False)
                client = Client(wrapped)
                status = client.get("/neighbour").status
                client.close()
                return status
            except Exception as exc:
                return repr(exc)

        with ThreadPoolExecutor(300) as pool:
            answers = list(pool.map(prove, sockets))
        assert {str(answer): answers.count(answer) for answer in answers} == {"200": 300}
        close_all(sockets)
    assert not neighbour.wrong


def test_idle_connections_are_small(pair: Pair) -> None:
    """At most 4 KB plain and 24 KB with mutual TLS was asked for; the allocator's own steps are allowed for."""
    count = 500
    before = pair.web.resident_bytes()
    sockets = crowd(pair.web.outbound, count)
    time.sleep(0.3)
    plain = (pair.web.resident_bytes() - before) / count
    close_all(sockets)
    assert plain < 6 * 1024, plain
    before = pair.reviews.resident_bytes()
    tls = mesh_crowd(pair.reviews, 200)
    time.sleep(0.3)
    mutual = (pair.reviews.resident_bytes() - before) / 200
    close_all(tls)
    assert mutual < 36 * 1024, mutual


def test_everything_is_given_back(pair: Pair) -> None:
    """Runs last: no descriptor, request or connection of the crowds is left."""
    for sidecar in (pair.web, pair.reviews):
        until(lambda sidecar=sidecar: sidecar.connections("in", "down") + sidecar.connections("out", "down") <= 5)  # type: ignore[misc]
        until(lambda sidecar=sidecar: sidecar.metric("pillion_requests_active") == 0)  # type: ignore[misc]
        assert sidecar.descriptors() < 700
