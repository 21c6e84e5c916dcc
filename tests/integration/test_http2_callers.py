"""HTTP/2 from callers, through live sidecars: real clients, both engines."""

import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    InformationalResponseReceived,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes
from support.mesh import WAIT_S, Conn, Mesh, Pair, connect, dial, environment, tool, until

from sidecar.wire.http2 import PEERS, Stream, open_codec

BIG = 10 * 1024 * 1024


class Answer:
    """What has come on one stream."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.informational: list[str] = []
        self.body = bytearray()
        self.trailers: dict[str, str] = {}
        self.ended = False
        self.reset: int | None = None

    @property
    def status(self) -> int:
        return int(self.headers.get(":status", 0))


class Http2Client:
    """The package h2 on a socket. `unread` streams get no window back."""

    def __init__(self, sock: Any) -> None:
        self.sock = sock
        self.conn = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
        self.conn.initiate_connection()
        self.conn.increment_flow_control_window(1 << 24)
        self.answers: dict[int, Answer] = {}
        self.unread: set[int] = set()
        self.last: int | None = None  # what a GOAWAY said was the last stream
        self.closed = False
        self.settled = False
        self.flush()

    def __enter__(self) -> "Http2Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def flush(self) -> None:
        data = self.conn.data_to_send()
        if data and not self.closed:
            self.sock.sendall(data)

    def ask(self, path: str = "/", host: str = "reviews", method: str = "GET", end: bool = True, **headers: str) -> int:
        sid: int = self.conn.get_next_available_stream_id()
        fields = [(":method", method), (":scheme", "http"), (":path", path), (":authority", host)]
        fields += [(name.replace("_", "-"), value) for name, value in headers.items()]
        self.answers[sid] = Answer()
        self.conn.send_headers(sid, fields, end_stream=end)
        self.flush()
        return sid

    def switch(self, path: str, host: str = "reviews") -> int:
        """An extended CONNECT for WebSocket."""
        self.until(lambda: self.settled)
        assert self.conn.remote_settings[SettingCodes.ENABLE_CONNECT_PROTOCOL] == 1
        sid: int = self.conn.get_next_available_stream_id()
        self.answers[sid] = Answer()
        fields = [
            (":method", "CONNECT"), (":protocol", "websocket"), (":scheme", "http"), (":path", path),
            (":authority", host), ("sec-websocket-version", "13"),
        ]  # fmt: skip
        self.conn.send_headers(sid, fields)
        self.flush()
        return sid

    def send(self, sid: int, data: bytes, end: bool = False) -> None:
        view = memoryview(data)
        while len(view):
            size = min(self.conn.local_flow_control_window(sid), 16384, len(view))
            if not size:
                self.read()
                continue
            self.conn.send_data(sid, bytes(view[:size]))
            view = view[size:]
            self.flush()
        if end:
            self.conn.end_stream(sid)
            self.flush()

    def read(self, limit_s: float = WAIT_S) -> None:
        self.sock.settimeout(limit_s)
        try:
            data = self.sock.recv(262144)
        except ConnectionResetError:
            data = b""
        if not data:
            self.closed = True
            return
        for event in self.conn.receive_data(data):
            self._heard(event)
        self.flush()

    def _heard(self, event: Event) -> None:
        answer = self.answers.get(getattr(event, "stream_id", None) or 0, Answer())
        if isinstance(event, ResponseReceived):
            answer.headers = dict(event.headers or ())
        elif isinstance(event, InformationalResponseReceived):
            answer.informational.append(dict(event.headers or ())[":status"])
        elif isinstance(event, TrailersReceived):
            answer.trailers = dict(event.headers or ())
        elif isinstance(event, DataReceived):
            answer.body += event.data or b""
            if event.stream_id not in self.unread and event.flow_controlled_length:
                try:
                    self.conn.acknowledge_received_data(event.flow_controlled_length, event.stream_id or 0)
                except ProtocolError:
                    pass  # it has ended meanwhile
        elif isinstance(event, StreamEnded):
            answer.ended = True
        elif isinstance(event, StreamReset):
            answer.reset = int(event.error_code or 0)
        elif isinstance(event, ConnectionTerminated):
            self.last = event.last_stream_id
        elif isinstance(event, RemoteSettingsChanged):
            self.settled = True

    def until(self, true: Any, limit_s: float = WAIT_S) -> None:
        deadline = time.monotonic() + limit_s
        while not true():
            assert not self.closed, "the connection was closed"
            self.read(max(0.01, deadline - time.monotonic()))

    def answer(self, sid: int) -> Answer:
        answer = self.answers[sid]
        self.until(lambda: answer.ended or answer.reset is not None)
        return answer


def plain(address: str) -> Http2Client:
    return Http2Client(dial(address))


@pytest.fixture(scope="module", params=["ngh2", "h2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    reviews = {
        "routes": [
            {"name": "socket", "match": {"path": "/socket"}, "upgrade": ["websocket"]},
            {"name": "rest"},
        ],
    }
    with Mesh(tmp_path_factory.mktemp(f"http2-{request.param}")) as mesh:
        yield Pair(mesh, reviews, options=[f"--http2-engine={request.param}"])


@pytest.fixture(autouse=True)
def _clean(request: pytest.FixtureRequest) -> Iterator[None]:
    if "pair" not in request.fixturenames:
        yield
        return
    pair: Pair = request.getfixturevalue("pair")
    pair.fresh()
    yield
    assert pair.web.crashes == 0 and pair.reviews.crashes == 0


# -- clients that people use


def curl(pair: Pair, *args: str) -> "subprocess.CompletedProcess[bytes]":
    command = [tool("curl"), "--silent", "--show-error", "--max-time", "30", "--http2-prior-knowledge", *args]
    return subprocess.run(command, capture_output=True, timeout=60, env=environment())


def test_curl_with_prior_knowledge(pair: Pair) -> None:
    url = f"http://{pair.web.outbound}/hello"
    done = curl(pair, "--write-out", "\n%{http_version} %{http_code}", "--header", "host: reviews", url)
    body, _, told = done.stdout.rpartition(b"\n")
    assert told == b"2 200", done
    assert json.loads(body)["target"] == "/hello"
    assert dict(json.loads(body)["headers"])["host"] == "reviews"
    done = curl(pair, "--head", "--header", "host: reviews", url)
    assert done.stdout.startswith(b"HTTP/2 200"), done
    done = curl(pair, "--data", "a=b", "--header", "host: reviews", url)
    assert json.loads(done.stdout)["body"] == "a=b", done


def test_curl_hears_why_it_is_refused(pair: Pair) -> None:
    done = curl(pair, "--include", "--header", "host: nowhere", f"http://{pair.web.outbound}/")
    assert b"HTTP/2 404" in done.stdout and b"x-pillion-reason: no_route" in done.stdout


def test_httpx_with_large_bodies_both_ways(pair: Pair) -> None:
    def swap(conn: Conn) -> None:
        while True:
            request = conn.take()
            conn.reply(200, b"r" * BIG, [("x-got", str(len(request.body)))])

    pair.fresh(swap)
    with httpx.Client(http1=False, http2=True, timeout=60, trust_env=False) as client:
        for body in (b"b" * BIG, b"", b"c" * 100_000):
            answer = client.post(f"http://{pair.web.outbound}/x", content=body, headers={"host": "reviews"})
            assert answer.http_version == "HTTP/2" and answer.status_code == 200
            assert int(answer.headers["x-got"]) == len(body) and len(answer.content) == BIG
        chunks = client.post(
            f"http://{pair.web.outbound}/x",
            content=(b"d" * 1000 for _ in range(50)),
            headers={"host": "reviews"},
        )
        assert int(chunks.headers["x-got"]) == 50_000


def test_nghttp(pair: Pair) -> None:
    done = subprocess.run(
        [tool("nghttp"), "-v", "-m", "5", "-H", ":authority: reviews", f"http://{pair.web.outbound}/n"],
        capture_output=True, timeout=30,
    )  # fmt: skip
    assert done.stdout.count(b":status: 200") == 5, done
    assert len(pair.app.requests) == 5


def test_a_hundred_streams_at_a_time(pair: Pair) -> None:
    done = subprocess.run(
        [tool("h2load"), "-n", "2000", "-c", "2", "-m", "100", "-H", ":authority: reviews", f"http://{pair.web.outbound}/"],
        capture_output=True, timeout=60,
    )  # fmt: skip
    assert re.search(rb"2000 total, 2000 started, 2000 done, 2000 succeeded, 0 failed", done.stdout), done
    assert len(pair.app.complete) == 2000


# -- whatever HTTP/2 has


def test_over_mutual_tls_by_alpn(pair: Pair) -> None:
    sock = pair.reviews.mesh_socket(alpn="h2")
    assert sock.selected_alpn_protocol() == "h2"
    with Http2Client(sock) as client:
        answer = client.answer(client.ask("/x"))
        assert answer.status == 200
        seen = dict(json.loads(answer.body)["headers"])
        assert "URI=spiffe://mesh.local/service/web" in seen["x-forwarded-client-cert"]
    context = pair.mesh.pki.client_context("web")
    context.set_alpn_protocols(["http/1.1", "h2"])
    with context.wrap_socket(dial(pair.reviews.inbound), server_hostname="http.reviews.mesh") as both:
        assert both.selected_alpn_protocol() == "h2"


def test_tcp_ports_are_not_for_http2(pair: Pair, tmp_path: Path) -> None:
    with Mesh(tmp_path, pair.mesh.pki) as mesh:
        app = mesh.backend()
        service = {"ports": {"raw": {"port": 9000, "protocol": "tcp"}}}
        sidecar = mesh.sidecar("reviews", {"reviews": service}, app=app, outbound=False)
        with sidecar.mesh_client(alpn="h2", port="raw") as client:
            assert client.closed()
        assert not app.count


def test_trailers_informational_and_continue(pair: Pair) -> None:
    def script(conn: Conn) -> None:
        request = conn.head_of_request()
        assert request.header("expect") == b"100-continue"
        conn.send(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
        body, trailers = conn.reader.chunked()
        assert body == b"content" and dict(trailers) == {b"x-sum": b"7"}
        conn.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-end\r\n\r\n")
        conn.send(b"4\r\nback\r\n0\r\nx-end: yes\r\n\r\n")

    pair.fresh(script)
    with plain(pair.web.outbound) as client:
        sid = client.ask("/t", method="POST", end=False, expect="100-continue")
        client.until(lambda: client.answers[sid].informational == ["103", "100"])
        client.conn.send_data(sid, b"content")
        client.conn.send_headers(sid, [("x-sum", "7")], end_stream=True)
        client.flush()
        answer = client.answer(sid)
        assert (answer.status, bytes(answer.body), answer.trailers) == (200, b"back", {"x-end": "yes"})


def test_a_slow_reader_holds_up_nobody_else(pair: Pair) -> None:
    def script(conn: Conn) -> None:
        while True:
            request = conn.take()
            if request.target == b"/big":
                conn.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (20 * BIG))
                for _ in range(200):
                    conn.send(b"b" * (BIG // 10))
            else:
                conn.reply(200, b"quick")

    pair.fresh(script)
    with plain(pair.web.outbound) as client:
        client.answer(client.ask("/warm"))
        before = pair.web.resident_bytes(), pair.reviews.resident_bytes()
        big = [client.ask("/big") for _ in range(10)]
        client.unread.update(big)
        client.until(lambda: all(len(client.answers[sid].body) >= 65535 for sid in big))
        for number in range(20):
            answer = client.answer(client.ask(f"/quick/{number}"))
            assert bytes(answer.body) == b"quick"
        grown = pair.web.resident_bytes() - before[0], pair.reviews.resident_bytes() - before[1]
        assert max(grown) < 24 << 20, grown  # of 2 GB
        for sid in big:
            client.conn.reset_stream(sid, 8)
        client.flush()
    until(lambda: not pair.app.open or True)


def test_a_stream_that_is_reset_cancels_its_request_and_no_other(pair: Pair) -> None:
    gone = threading.Event()
    go_on = threading.Event()

    def script(conn: Conn) -> None:
        request = conn.take()
        if request.target == b"/slow":
            if conn.closed(WAIT_S):
                gone.set()
        else:
            go_on.wait(WAIT_S)
            conn.reply(200, b"other")

    pair.fresh(script)
    with plain(pair.web.outbound) as client:
        slow, other = client.ask("/slow"), client.ask("/other")
        until(lambda: len(pair.app.complete) == 2, "both requests")
        client.conn.reset_stream(slow, 8)
        client.flush()
        assert gone.wait(WAIT_S)
        go_on.set()
        assert bytes(client.answer(other).body) == b"other"
    assert pair.web.logged(path="/slow")["reason"] == "caller_gone"


def test_an_answer_that_breaks_off_is_reset(pair: Pair) -> None:
    def script(conn: Conn) -> None:
        conn.take()
        conn.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")

    pair.fresh(script)
    with plain(pair.web.outbound) as client:
        answer = client.answer(client.ask())
        assert answer.status == 200 and not answer.ended and answer.reset == 2


def test_a_broken_connection_is_ended_with_goaway_and_named(pair: Pair) -> None:
    with plain(pair.web.outbound) as client:
        client.answer(client.ask())
        client.sock.sendall(b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00")  # a window of nothing
        with pytest.raises(AssertionError, match="closed"):
            client.until(lambda: False, 5)
        assert client.last is not None
    until(lambda: pair.web.metric("pillion_http2_limits_total", side="out") >= 1, "the count")
    until(lambda: "bad_request: from 127.0.0.1: HTTP/2: PROTOCOL_ERROR" in pair.web.log, "the line in the log")


def test_http1_goes_on_beside_it(pair: Pair) -> None:
    with pair.client() as client:
        client.send(b"P")
        time.sleep(0.05)
        client.send(b"OST /x HTTP/1.1\r\nhost: reviews\r\ncontent-length: 0\r\n\r\n")
        assert client.response("POST").json["method"] == "POST"
        assert client.get("/y").status == 200


def test_the_engine_is_shown(pair: Pair) -> None:
    shown = pair.web.admin("/config")
    assert shown["http2_engine"] == shown["settings"]["http2_engine"]


def test_an_unknown_engine_is_refused(tmp_path: Path) -> None:
    with Mesh(tmp_path) as mesh:
        code, _, err = mesh.run("sidecar", "--service=web", "--http2-engine=fast")
        assert code == 2 and "--http2-engine" in err


# -- WebSocket


def websocket_frame(data: bytes) -> bytes:
    """A text message of a client, masked with zeros (RFC 6455, section 5.2)."""
    assert len(data) < 126
    return bytes([0x81, 0x80 | len(data)]) + bytes(4) + data


def test_websocket_over_http2_to_an_ordinary_server(pair: Pair) -> None:
    server = pytest.importorskip("websockets.sync.server")

    def echo(connection: Any) -> None:
        for message in connection:
            connection.send(f"you said {message}")

    def script(conn: Conn) -> None:
        with socket.create_connection(real.socket.getsockname()) as far:
            pump = threading.Thread(target=_pump, args=(far, conn.sock), daemon=True)
            pump.start()
            _pump(conn.sock, far)
            pump.join(WAIT_S)

    with server.serve(echo, "127.0.0.1", 0, compression=None) as real:
        threading.Thread(target=real.serve_forever, daemon=True).start()
        pair.fresh(script)
        with plain(pair.web.outbound) as client:
            sid = client.switch("/socket")
            answer = client.answers[sid]
            client.until(lambda: answer.status)
            assert answer.status == 200 and "sec-websocket-accept" not in answer.headers
            for word in (b"one", b"two"):
                client.conn.send_data(sid, websocket_frame(word))
                client.flush()
                client.until(lambda word=word: b"you said " + word in answer.body)
            client.conn.send_data(sid, b"\x88\x82\x00\x00\x00\x00\x03\xe8")  # close, 1000
            client.conn.end_stream(sid)
            client.flush()
            client.until(lambda: answer.ended)
            assert answer.reset is None
        real.shutdown()
    until(lambda: not pair.web.metric("pillion_requests_active"), "the end of the tunnel")


def _pump(source: socket.socket, to: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            to.sendall(data)
        to.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def test_an_upgrade_that_is_not_allowed(pair: Pair) -> None:
    with plain(pair.web.outbound) as client:
        answer = client.answer(client.switch("/elsewhere"))
        assert answer.status == 501 and answer.headers["x-pillion-reason"] == "not_implemented"


# -- the end


@pytest.mark.parametrize("engine", ["ngh2", "h2"])
def test_a_drain_under_load_loses_no_request(engine: str, tmp_path: Path) -> None:
    """With our own codec, since to the package h2 a GOAWAY is the end."""
    with Mesh(tmp_path) as mesh:
        pair = Pair(mesh, options=[f"--http2-engine={engine}"])
        codec = open_codec(False, PEERS, between_sidecars=True)
        asked: list[Stream] = []
        stopping = threading.Thread(target=pair.reviews.stop)
        deadline = time.monotonic() + 2 * WAIT_S
        with pair.reviews.mesh_socket(alpn="h2") as sock:
            sock.settimeout(0.001)
            while time.monotonic() < deadline:
                while not codec.closing and len(codec.streams) < 20 and len(asked) < 100_000:
                    stream = Stream(method=b"GET")
                    fields = [(b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/%d" % len(asked))]
                    codec.request(stream, [*fields, (b":authority", b"reviews")], True)
                    asked.append(stream)
                if len(asked) > 300 and stopping.ident is None:
                    stopping.start()
                sock.settimeout(WAIT_S)
                sock.sendall(codec.to_send())
                sock.settimeout(0.001)
                try:
                    data = sock.recv(65536)
                except TimeoutError:
                    continue
                if not data:
                    break
                codec.receive(data, 0.0)
                for stream in codec.take_news():
                    codec.consumed(stream)
        stopping.join(30)
        refused = [stream for stream in asked if stream.refused]
        served = [stream for stream in asked if stream.m is not None and stream.m.status == 200 and stream.ended]
        assert len(served) > 300 and len(served) + len(refused) == len(asked), (len(served), len(refused), len(asked))
        assert len(refused) <= 20


def test_an_http1_client_still_finds_its_way(pair: Pair) -> None:
    with connect(pair.web.outbound) as client:
        assert client.get("/").status == 200
