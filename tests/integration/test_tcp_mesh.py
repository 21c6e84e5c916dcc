"""Plain TCP through two live sidecars: any protocol, either side first, each direction with an end of its own."""

import hashlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from support.mesh import Client, Conn, Mesh, connect, dial, environment, free_port, tool, until

from sidecar.wire.tcp_frames import header

MIB = 1024 * 1024


class Line:
    """web's local port → reviews' port of its own for TCP → a scripted application."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.app = mesh.backend(lambda conn: None)
        self.other_app = mesh.backend()
        self.ports = {name: free_port() for name in ("raw", "short", "tight", "gone", "closed")}
        tcp = {"ports": {"raw": {"port": 7000, "protocol": "tcp"}}}
        self.raw = {**tcp, "authz": {"allow": [{"from": ["web"]}]}}
        self.reviews = mesh.sidecar("raw", {"web": {}, "admin": {}, "raw": self.raw}, app=self.app, outbound=False)
        denied = {**tcp, "authz": {"allow": [{"from": ["admin"]}]}}
        self.closed = mesh.sidecar("closed", {"web": {}, "admin": {}, "closed": denied}, app=self.app, outbound=False)
        address = {"address": [self.reviews.inbound]}
        direct = {"address": [str(self.app)], "tls": "plain"}
        services = {
            "raw": {**tcp, **address},
            "short": {**tcp, **direct, "timeout": {"idle": "400ms"}},
            "tight": {**tcp, **direct, "limits": {"connections": 2}},
            "gone": {**tcp, "address": [mesh.dead_address()]},
            "closed": {**tcp, "address": [self.closed.inbound]},
        }
        calls = {name: {"local_port": port} for name, port in self.ports.items()}
        self.web = mesh.sidecar("web", {"web": {"calls": calls}, **services}, inbound=False)

    def connect(self, name: str = "raw", **options: int) -> Client:
        return connect(("127.0.0.1", self.ports[name]), **options)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    with Mesh(tmp_path_factory.mktemp("tcp")) as mesh:
        yield Line(mesh)


@pytest.fixture(autouse=True)
def _clean(line: Line) -> Iterator[None]:
    line.app.clear()
    yield
    for sidecar in (line.web, line.reviews, line.closed):
        assert sidecar.crashes == 0
        until(lambda sidecar=sidecar: sidecar.metric("pillion_tunnels") == 0, sidecar.log)  # type: ignore[misc]


def test_a_client_that_speaks_first(line: Line) -> None:
    def script(conn: Conn) -> None:
        while data := conn.sock.recv(65536):
            conn.send(data.upper())

    line.app.script = script
    with line.connect() as client:
        for word in (b"one", b"two", b"\x00\xff"):
            client.send(word)
            assert client.reader.exactly(len(word)) == word.upper()
    entry = line.reviews.logged(protocol="tcp", side="in", reason="ok")
    assert entry["caller"] == "spiffe://mesh.local/service/web"
    assert (entry["request_bytes"], entry["response_bytes"]) == (8, 8)


def test_a_server_that_speaks_first_is_heard_at_once(line: Line) -> None:
    def script(conn: Conn) -> None:
        conn.send(b"220 ready\r\n")
        assert conn.reader.until(b"\r\n") == b"QUIT\r\n"
        conn.send(b"221 bye\r\n")

    line.app.script = script
    began = time.monotonic()
    with line.connect() as client:
        assert client.reader.until(b"\r\n") == b"220 ready\r\n"
        assert time.monotonic() - began < 1.0
        client.send(b"QUIT\r\n")
        assert client.reader.rest() == b"221 bye\r\n"


def test_the_caller_may_shut_its_side_with_data_still_coming_back(line: Line) -> None:
    """The usual `cat file | nc`: everything is sent, then the end, then the answer comes, which is longer."""
    size = 8 * MIB
    received = hashlib.sha256()

    def script(conn: Conn) -> None:
        total = 0
        while data := conn.sock.recv(262144):
            received.update(data)
            total += len(data)
        assert total == size
        time.sleep(0.1)
        conn.send(b"y" * size)

    line.app.script = script
    data = bytes(range(256)) * (size // 256)
    with line.connect() as client:
        client.send(data)
        client.shut()
        assert len(client.reader.rest()) == size
    assert received.hexdigest() == hashlib.sha256(data).hexdigest()


def test_the_server_may_shut_its_side_with_data_still_coming(line: Line) -> None:
    got = 0

    def script(conn: Conn) -> None:
        nonlocal got
        conn.send(b"x" * MIB)
        conn.shut()
        while data := conn.sock.recv(262144):
            got += len(data)

    line.app.script = script
    with line.connect() as client:
        assert len(client.reader.rest()) == MIB
        for _ in range(8):
            client.send(b"z" * MIB)
        client.shut()
        until(lambda: got == 8 * MIB, f"{got} bytes")


def send_and_shut(client: Client, data: bytes) -> None:
    client.send(data)
    client.shut()


def test_both_directions_at_once_and_both_ends(line: Line) -> None:
    size = 16 * MIB

    def script(conn: Conn) -> None:
        sender = threading.Thread(target=send_and_shut, args=(conn, b"b" * size))
        sender.start()
        total = 0
        while data := conn.sock.recv(262144):
            total += len(data)
        sender.join()
        assert total == size

    line.app.script = script
    with line.connect() as client:
        sender = threading.Thread(target=send_and_shut, args=(client, b"a" * size))
        sender.start()
        assert len(client.reader.rest()) == size
        sender.join()


def test_a_slow_reader_stops_its_source_and_memory_stays_flat(line: Line) -> None:
    sent = 0

    def script(conn: Conn) -> None:
        nonlocal sent
        for _ in range(256):
            conn.send(b"x" * MIB)
            sent += MIB

    line.app.script = script
    before = [sidecar.resident_bytes() for sidecar in (line.web, line.reviews)]
    with line.connect(receive_bytes=65536) as client:
        client.reader.exactly(100)
        until(lambda: _settled(lambda: sent))
        assert sent < 32 * MIB
        after = [sidecar.resident_bytes() for sidecar in (line.web, line.reviews)]
        assert max(now - then for now, then in zip(after, before, strict=True)) < 16 * MIB
        client.reset()


def _settled(read: Callable[[], int]) -> bool:
    first = read()
    time.sleep(0.3)
    return bool(first and first == read())


@pytest.mark.parametrize("end", ["reset", "killed"])
def test_a_server_that_is_cut_off_does_not_look_like_one_that_ended(line: Line, end: str) -> None:
    def script(conn: Conn) -> None:
        conn.send(b"some")
        conn.sock.recv(1)
        if end == "reset":
            conn.reset()

    line.app.script = script
    mesh = line.mesh
    if end == "killed":
        victim = mesh.sidecar("raw", {"web": {}, "raw": line.raw}, app=line.app, outbound=False)
        line.web.apply({"raw": {**line.web.services["raw"], "address": [victim.inbound]}})
    try:
        with line.connect() as client:
            assert client.reader.exactly(4) == b"some"
            if end == "killed":
                victim.process.kill()
            else:
                client.send(b"x")
            with pytest.raises(ConnectionResetError):
                client.sock.recv(1)
    finally:
        line.web.apply({"raw": {**line.web.services["raw"], "address": [line.reviews.inbound]}})


def test_a_caller_that_is_cut_off_does_not_look_like_one_that_ended(line: Line) -> None:
    ends: list[object] = []

    def script(conn: Conn) -> None:
        conn.reader.exactly(4)
        try:
            ends.append(conn.sock.recv(1))
        except OSError as exc:
            ends.append(type(exc))

    line.app.script = script
    client = line.connect()
    client.send(b"some")
    until(lambda: line.app.open)
    time.sleep(0.05)
    client.reset()
    until(lambda: ends)
    assert ends == [ConnectionResetError]


def test_a_mesh_peer_that_is_cut_off_does_not_look_like_one_that_ended(line: Line) -> None:
    """TLS without close_notify, and TLS with close_notify but without the end frame."""
    for polite in (False, True):
        ends: list[object] = []

        def script(conn: Conn, ends: list[object] = ends) -> None:
            try:
                conn.reader.exactly(4)
                ends.append(conn.sock.recv(1))
            except OSError as exc:
                ends.append(type(exc))

        line.app.script = script
        sock = line.reviews.mesh_socket(port="raw", alpn="pillion-tcp")
        sock.sendall(_frame(b"some"))
        until(lambda: line.app.open)
        time.sleep(0.05)
        if polite:
            try:
                sock.settimeout(0.2)
                sock.unwrap()
            except OSError:
                pass
            sock.close()
        else:
            socket.socket(fileno=sock.detach()).close()
        until(lambda: ends)  # noqa: B023
        assert ends == [ConnectionResetError], polite


def _frame(data: bytes) -> bytes:
    return header(len(data)) + data


@pytest.mark.parametrize("data", [b"\xff" * 64, b"GET / HTTP/1.1\r\nHost: raw\r\n\r\n", b"\x00"])
def test_broken_framing_from_a_mesh_peer_ends_its_connection_only(line: Line, data: bytes) -> None:
    got: list[bytes] = []

    def script(conn: Conn) -> None:
        try:
            while piece := conn.sock.recv(100):
                got.append(piece)
        except OSError:
            got.append(b"<reset>")

    line.app.script = script
    with line.connect() as neighbour, Client(line.reviews.mesh_socket(port="raw", alpn="pillion-tcp")) as client:
        neighbour.send(b"fine")
        until(lambda: got == [b"fine"])
        client.send(data)
        if data != b"\x00":
            assert client.closed()
            until(lambda: b"<reset>" in got)
        neighbour.send(b"still")
        until(lambda: b"still" in got)


def test_an_idle_connection_ends(line: Line) -> None:
    def script(conn: Conn) -> None:
        while conn.sock.recv(100):
            pass

    line.app.script = script
    with line.connect("short") as client:
        for _ in range(4):
            time.sleep(0.2)
            client.send(b"x")  # not idle
        began = time.monotonic()
        assert client.closed()
        assert 0.3 < time.monotonic() - began < 1.5
    assert line.web.logged(service="short")["reason"] == "idle"
    until(lambda: not line.app.open)


def test_a_caller_without_permission_is_closed_and_nothing_reaches_the_application(line: Line) -> None:
    with line.connect("closed") as client:
        client.send(b"x")
        assert client.closed()
    assert line.app.count == 0
    assert line.closed.logged(reason="denied", service="closed")["caller"] == "spiffe://mesh.local/service/web"
    assert "denied: tcp closed" in line.closed.log


def test_an_authorization_that_is_withdrawn_ends_what_it_had_admitted(line: Line) -> None:
    def script(conn: Conn) -> None:
        while data := conn.sock.recv(100):
            conn.send(data)

    line.app.script = script
    with line.connect() as client:
        client.send(b"x")
        assert client.reader.exactly(1) == b"x"
        line.reviews.apply({"raw": {**line.raw, "authz": {"allow": [{"from": ["admin"]}]}}})
        assert client.closed()
        line.reviews.apply({"raw": line.raw})


def test_connections_beyond_the_limit_are_closed(line: Line) -> None:
    def script(conn: Conn) -> None:
        while data := conn.sock.recv(100):
            conn.send(data)

    line.app.script = script
    with line.connect("tight") as first, line.connect("tight") as second:
        for client in (first, second):
            client.send(b"x")
            assert client.reader.exactly(1) == b"x"
        with line.connect("tight") as third:
            assert third.closed()
        assert line.web.logged(service="tight", reason="overflow")
        first.close()
        until(lambda: line.web.metric("pillion_upstream_connections", service="tight") == 1)
        with line.connect("tight") as third:
            third.send(b"x")
            assert third.reader.exactly(1) == b"x"


def test_an_upstream_that_is_not_there(line: Line) -> None:
    with line.connect("gone") as client:
        assert client.closed()
    assert line.web.logged(service="gone")["reason"] == "connect_failed"
    assert "connect_failed: tcp gone" in line.web.log


def test_an_http_request_to_a_tcp_service_by_host_is_not_carried(line: Line) -> None:
    with line.web.client() as client:
        response = client.get("/", host="raw")
        assert (response.status, response.reason) == (404, "no_route")


# -- a real Redis and its own clients


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The local port that leads through two sidecars to a redis-server."""
    path = tmp_path_factory.mktemp("redis")
    own = free_port()
    server = subprocess.Popen(
        [tool("redis-server"), "--port", str(own), "--bind", "127.0.0.1", "--save", "", "--dir", str(path)],
        stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        until(lambda: _listening(own))
        with Mesh(path) as mesh:
            port = free_port()
            service = {"ports": {"redis": {"port": own, "protocol": "tcp"}}}
            store = mesh.sidecar("store", {"web": {}, "store": service}, outbound=False)
            calls = {"store": {"local_port": port}}
            mesh.sidecar(
                "web", {"web": {"calls": calls}, "store": {**service, "address": [store.inbound]}}, inbound=False
            )
            yield port
    finally:
        server.terminate()
        server.wait(10)


def _listening(port: int) -> bool:
    try:
        dial(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def cli(port: int, *args: str, data: bytes = b"") -> str:
    done = subprocess.run(
        [tool("redis-cli"), "-h", "127.0.0.1", "-p", str(port), *args], input=data, capture_output=True, timeout=30,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def test_redis_with_its_own_client(redis: int) -> None:
    assert cli(redis, "set", "greeting", "hello") == "OK\n"
    assert cli(redis, "get", "greeting") == "hello\n"
    assert "redis_version" in cli(redis, "info", "server")


def test_redis_mass_insertion_by_a_pipe_that_shuts_its_side(redis: int) -> None:
    count = 20_000
    data = b"".join(b"SET key:%d value:%d\r\n" % (number, number) for number in range(count))
    assert f"errors: 0, replies: {count}" in cli(redis, "--pipe", data=data)
    assert cli(redis, "get", f"key:{count - 1}") == f"value:{count - 1}\n"


def test_redis_pipelining_and_large_values(redis: int) -> None:
    with connect(("127.0.0.1", redis)) as client:
        client.send(b"PING\r\n" * 5000)
        for _ in range(5000):
            assert client.reader.until(b"\r\n") == b"+PONG\r\n"
        value = b"v" * (4 * MIB)
        client.send(b"*3\r\n$3\r\nSET\r\n$1\r\nb\r\n$%d\r\n%b\r\n" % (len(value), value))
        assert client.reader.until(b"\r\n") == b"+OK\r\n"
        client.send(b"GET b\r\n")
        assert client.reader.until(b"\r\n") == b"$%d\r\n" % len(value)
        assert client.reader.exactly(len(value) + 2) == value + b"\r\n"
        client.send(b"QUIT\r\n")
        assert client.reader.rest() == b"+OK\r\n"


def test_redis_publishes_to_a_client_that_only_listens(redis: int) -> None:
    with connect(("127.0.0.1", redis)) as listener:
        listener.send(b"SUBSCRIBE news\r\n")
        until(lambda: b":1\r\n" in listener.reader.until(b":1\r\n"))
        assert cli(redis, "publish", "news", "flash").strip() == "1"
        assert b"flash\r\n" in listener.reader.until(b"flash\r\n")
