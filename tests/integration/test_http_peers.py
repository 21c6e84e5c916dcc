"""Who is let in: the inbound side judges its callers, the outbound side judges whom it has reached."""

import socket
import ssl
import threading
import time
from collections.abc import Iterator

import pytest
from support.mesh import Client, Closed, Conn, Mesh, Pair, connect, dial, until
from support.pki import Pki


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    ports = {"ports": {"http": {"port": 80}, "raw": {"port": 81, "protocol": "tcp"}}}
    # Without name constraints, so that odd identities get as far as our own check of them.
    with Mesh(tmp_path_factory.mktemp("peers"), Pki(constrained=False)) as mesh:
        yield Pair(mesh, ports, {"admin": {}})


@pytest.fixture(autouse=True)
def _clean(pair: Pair) -> Iterator[None]:
    pair.fresh()
    yield
    assert pair.web.crashes == 0 and pair.reviews.crashes == 0
    with pair.client() as client:
        assert client.get("/").status == 200  # whatever was tried, others are served


GET = b"GET /intruder HTTP/1.1\r\nHost: reviews\r\n\r\n"


def refused(client: Client) -> bool:
    """Whether the connection ends without an answer, in whichever way."""
    try:
        client.send(GET)
        return client.reader.rest() == b""
    except OSError:
        return True


@pytest.mark.parametrize(
    "fault",
    [
        "other-ca", "no-spiffe-id", "two-uris", "expired", "not-yet-valid", "ca-as-leaf", "other-trust-domain",
        "upper-case-id", "wrong-eku", "dns-name-only", "no-digital-signature", "cert-sign-usage", "encoded-path",
    ],
)  # fmt: skip
def test_a_caller_whose_certificate_is_wrong_is_refused(pair: Pair, fault: str) -> None:
    logged = len(pair.reviews.log)
    failed = pair.reviews.metric("pillion_tls_handshakes_failed_total", side="in")
    try:
        client = pair.reviews.mesh_client("web", fault=fault)
    except OSError:
        pass  # the handshake itself has failed
    else:
        with client:
            assert refused(client)
    assert pair.app.requests == []
    until(lambda: pair.reviews.metric("pillion_tls_handshakes_failed_total", side="in") == failed + 1)
    if "was refused" in pair.reviews.log[logged:]:  # said at most once in ten seconds
        assert "127.0.0.1" in pair.reviews.log[logged:]


def test_a_caller_without_a_certificate_is_refused(pair: Pair) -> None:
    try:
        client = pair.reviews.mesh_client(None)
    except OSError:
        return
    with client:
        assert refused(client)
    assert pair.app.requests == []


@pytest.mark.parametrize(
    "data", [GET, b"\x16\x03\x01\x00\x05hello", b"\x00" * 100, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
)
def test_a_plain_caller_is_refused(pair: Pair, data: bytes) -> None:
    with connect(pair.reviews.inbound) as client:
        client.send(data)
        answer = b""
        try:
            answer = client.reader.rest()
        except OSError:
            pass
        assert not answer.startswith(b"HTTP")
    assert pair.app.requests == []


def test_tls_1_2_is_refused(pair: Pair) -> None:
    context = pair.mesh.pki.client_context("web")
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with dial(pair.reviews.inbound) as sock, pytest.raises(OSError):
        context.wrap_socket(sock, server_hostname="http.reviews.mesh")


@pytest.mark.parametrize(
    "name", ["http.admin.mesh", "other.reviews.mesh", "reviews.mesh", "reviews", "http.reviews", ""]
)
def test_another_server_name_is_refused(pair: Pair, name: str) -> None:
    """With two ports even no name at all means none of them."""
    with pytest.raises(OSError):
        pair.reviews.mesh_socket(sni=name)


@pytest.mark.parametrize("name", ["HTTP.Reviews.MESH", "http.reviews.mesh."])
def test_a_server_name_is_compared_without_case_and_final_dot(pair: Pair, name: str) -> None:
    with pair.reviews.mesh_client(sni=name) as client:
        assert client.get("/").status == 200


@pytest.mark.parametrize(("port", "alpn"), [("http", "pillion-tcp"), ("raw", "http/1.1"), ("raw", None), ("raw", "h2")])
def test_an_alpn_that_contradicts_the_port_is_refused(pair: Pair, port: str, alpn: str | None) -> None:
    """Or opaque bytes would go round the rules for HTTP."""
    try:
        client = pair.reviews.mesh_client(port=port, alpn=alpn)
    except OSError:
        return
    with client:
        assert refused(client)
    assert pair.app.requests == [] and pair.app.count == 0


def test_a_host_that_this_sidecar_does_not_serve_is_misdirected(pair: Pair) -> None:
    with pair.reviews.mesh_client() as client:
        response = client.get("/", host="admin")
        assert (response.status, response.reason) == (421, "misdirected")
        assert client.get("/", host="reviews.mesh").status == 200
    assert [request.header("host") for request in pair.app.requests] == [b"reviews.mesh"]


def test_a_session_cannot_be_resumed(pair: Pair) -> None:
    with pair.reviews.mesh_socket() as sock:
        Client(sock).get("/")
        assert sock.session is None or not sock.session.has_ticket


# -- the callee


class Impostor:
    """A TLS server that answers in a mesh address's place, and remembers what was sent to it."""

    def __init__(self, context: ssl.SSLContext, alpn: str = "http/1.1") -> None:
        context.set_alpn_protocols([alpn])
        self.context = context
        self.received: list[bytes] = []
        self.connections = 0
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.sock.getsockname()[1]}"

    def _serve(self) -> None:
        while True:
            try:
                plain, _ = self.sock.accept()
            except OSError:
                return
            self.connections += 1
            plain.settimeout(5)
            try:
                with self.context.wrap_socket(plain, server_side=True) as sock:
                    self.received.append(sock.recv(1000))
            except OSError:
                self.received.append(b"")

    def stop(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()
        self.thread.join(10)


@pytest.mark.parametrize(
    ("service", "fault", "alpn"),
    [
        ("admin", None, "http/1.1"),
        ("reviews2", "other-ca", "http/1.1"),
        ("reviews2", "no-spiffe-id", "http/1.1"),
        ("reviews2", "two-uris", "http/1.1"),
        ("reviews2", "expired", "http/1.1"),
        ("reviews2", "other-trust-domain", "http/1.1"),
        ("reviews2", None, "h2"),
    ],
)
def test_a_callee_that_is_not_whom_we_dialled_gets_no_byte(
    pair: Pair, service: str, fault: str | None, alpn: str
) -> None:
    impostor = Impostor(pair.mesh.pki.server_context(service, fault=fault), alpn)
    pair.web.apply({"reviews2": {"ports": {"http": {"port": 80}}, "address": [impostor.address]}})
    try:
        with pair.client() as client:
            response = client.post("/", b"secret", host="reviews2")
        assert (response.status, response.reason) == (503, "connect_failed")
        assert "spiffe" not in response.body.decode()  # the caller is not told whom it reached
    finally:
        impostor.stop()
    assert impostor.connections >= 1
    assert set(impostor.received) <= {b""}
    assert "connect_failed: reviews2" in pair.web.log


def test_a_callee_may_be_stated_to_have_another_identity(pair: Pair) -> None:
    stated = {"at": pair.reviews.inbound, "identity": "spiffe://mesh.local/service/admin"}
    pair.web.apply({"other": {"ports": {"http": {"port": 80}}, "address": [stated]}})
    with pair.client() as client:
        assert client.get("/", host="other").reason == "connect_failed"


def test_an_application_that_is_not_listening(pair: Pair) -> None:
    mesh = pair.mesh
    gone = mesh.dead_address()
    orders = mesh.sidecar("orders", {"web": {}, "orders": {"ports": {"http": {"port": 80}}}}, app=gone, outbound=False)
    pair.web.apply({"orders": {"ports": {"http": {"port": 80}}, "address": [orders.inbound]}})
    with pair.client() as client:
        response = client.post("/", b"x", host="orders")
        assert (response.status, response.reason) == (503, "connect_failed")
        assert response.json["message"] and len(response.json["request_id"]) == 32
        assert client.get("/").status == 200
    assert f"connect_failed: orders at {gone}" in orders.log
    assert orders.stop() == 0


def test_a_sidecar_that_is_not_there(pair: Pair) -> None:
    pair.web.apply({"absent": {"ports": {"http": {"port": 80}}, "address": [pair.mesh.dead_address()]}})
    with pair.client() as client:
        response = client.get("/", host="absent")
        assert (response.status, response.reason) == (503, "connect_failed")
    line = pair.web.logged(service="absent")
    assert (line["reason"], line["attempts"]) == ("connect_failed", 2)  # connecting may always be tried again


# -- truncation


def test_a_cut_between_the_sidecars_is_no_end(pair: Pair) -> None:
    """A mesh peer whose connection ends without close_notify in a body that lasts until the end: cut, not complete."""

    mesh = pair.mesh
    app = mesh.backend(lambda conn: None)
    victim = mesh.sidecar("victim", {"web": {}, "victim": {"ports": {"http": {"port": 80}}}}, app=app, outbound=False)

    def until_killed(conn: Conn) -> None:
        conn.take()
        conn.send(b"HTTP/1.0 200 OK\r\n\r\nsome")
        time.sleep(0.1)
        victim.process.kill()
        conn.sock.recv(1)

    app.script = until_killed
    pair.web.apply({"victim": {"ports": {"http": {"port": 80}}, "address": [victim.inbound]}})
    with pair.client() as client:
        client.request("GET", "/", host="victim")
        assert client.response(body=False).status == 200
        with pytest.raises((Closed, OSError)):
            client.reader.chunked()


def test_a_caller_that_cuts_its_upload_completes_nothing(pair: Pair) -> None:
    sock = pair.reviews.mesh_socket()
    sock.sendall(b"POST / HTTP/1.1\r\nHost: reviews\r\nContent-Length: 10\r\n\r\nhalf")
    until(lambda: pair.app.requests)
    socket.socket.close(socket.socket(fileno=sock.detach()))  # no close_notify
    until(lambda: not pair.app.open)
    assert pair.app.complete == []
