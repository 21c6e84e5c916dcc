"""WebSocket through two sidecars, over HTTP/1.1 and over HTTP/2 (RFC 8441) on either side, with libraries of others.

HTTP/1.1: the package `websockets` at both ends. HTTP/2: the frames of `wsproto` on streams of raw frames, and Hypercorn
as one more application.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import websockets.exceptions
import wsproto.events as ws
from support import http2_frames as f
from support.browser import open_page
from support.crowded import Slow
from support.http2_live import Call2, Cut, Exchange, Exchange2, Half, Http2Client, Wire, serve, serve2
from support.mesh import Mesh, connect, dial, environment, free_port, free_ports, until
from support.renewal import renew
from websockets.http11 import Request, Response
from websockets.sync.client import connect as open_websocket
from websockets.sync.server import Server, ServerConnection
from websockets.sync.server import serve as serve_websockets
from wsproto import ConnectionType
from wsproto.connection import Connection, ConnectionState

HOSTS = {1: "reviews", 2: "two.reviews"}
PORTS = {"http": {"port": 80}, "two": {"port": 81, "protocol": "http2"}}
UPGRADE = [{"name": "sockets", "match": {"path": "/socket/**"}, "upgrade": ["websocket"]}, {"name": "rest"}]
DELAY_S = 0.05
CHUNK, CHUNKS = os.urandom(256 * 1024), 240  # more than all the sockets' buffers on the way hold
GROWTH_BYTES_MAX = 6 * 1024 * 1024

# For Hypercorn: echoes, and obeys `close CODE WHY` and `tell` (of the handshake) as the applications below.
APPLICATION = """
import json

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    if scope["type"] != "websocket":
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        return
    await receive()
    if scope["path"] == "/socket/no":
        await send({"type": "websocket.close"})
        return
    await send({"type": "websocket.accept", "subprotocol": (scope["subprotocols"] or [None])[0]})
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            return
        text = message.get("text")
        if text and text.startswith("close "):
            await send({"type": "websocket.close", "code": int(text.split()[1]), "reason": text.split(None, 2)[2]})
        elif text == "tell":
            headers = [[name.decode(), value.decode()] for name, value in scope["headers"]]
            told = {"path": scope["path"], "query": scope["query_string"].decode(), "headers": headers}
            await send({"type": "websocket.send", "text": json.dumps(told)})
        elif text is not None:
            await send({"type": "websocket.send", "text": text})
        else:
            await send({"type": "websocket.send", "bytes": message["bytes"]})
"""


class Ended(Exception):
    """`code` 1006: without a closing handshake."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason


class Framed:
    """The frames of WebSocket on one stream, of either side."""

    def __init__(self, kind: ConnectionType, wire: Wire, half: Half, send: Callable[[bytes], None]) -> None:
        self.ws, self.wire, self.half, self.send_bytes = Connection(kind), wire, half, send
        self.taken = 0
        self.waiting: list[Any] = []

    def send(self, data: str | bytes) -> None:
        self.event(ws.TextMessage(data) if isinstance(data, str) else ws.BytesMessage(data))

    def event(self, event: Any) -> None:
        self.send_bytes(self.ws.send(event))

    def next(self, limit_s: float) -> Any:
        half, wire = self.half, self.wire
        while not self.waiting:
            wire.wait(lambda: len(half.body) > self.taken or half.ended or half.reset is not None, limit_s)
            data = bytes(half.body[self.taken :])
            self.taken += len(data)
            if data:
                self.ws.receive_data(data)
                self.waiting += self.ws.events()
            elif half.ended or half.reset is not None or wire.ended is not None:
                raise Ended(1006)
            else:
                raise TimeoutError("nothing came")
        return self.waiting.pop(0)

    def receive(self, limit_s: float = 15.0) -> str | bytes:
        parts: list[Any] = []
        while True:
            event = self.next(limit_s)
            if isinstance(event, ws.Message):
                parts.append(event.data)
                if event.message_finished:
                    return b"".join(map(bytes, parts)) if isinstance(event, ws.BytesMessage) else "".join(parts)
            elif isinstance(event, ws.Ping):
                self.event(event.response())
            elif isinstance(event, ws.CloseConnection):
                if self.ws.state is ConnectionState.REMOTE_CLOSING:
                    self.event(event.response())
                raise Ended(event.code, event.reason or "")

    def pings(self, payload: bytes) -> bool:
        """Whether a ping is answered."""
        self.event(ws.Ping(payload))
        event = self.next(15.0)
        return isinstance(event, ws.Pong) and bytes(event.payload) == payload


class Socket(Protocol):
    def send(self, data: str | bytes) -> None: ...
    def receive(self, limit_s: float = 15.0) -> str | bytes: ...
    def close(self, code: int = 1000, reason: str = "") -> Ended: ...
    def cut(self) -> None: ...
    def pings(self, payload: bytes) -> bool: ...


class Socket1:
    """Over HTTP/1.1."""

    def __init__(self, address: str, host: str, path: str, **options: Any) -> None:
        self.sock = dial(address)
        self.sock.settimeout(None)
        try:
            self.ws = open_websocket(
                f"ws://{host}{path}",
                sock=self.sock,
                proxy=None,
                max_size=None,
                ping_interval=None,
                **options,
            ).__enter__()
        except BaseException:
            self.sock.close()
            raise

    def send(self, data: str | bytes) -> None:
        self.ws.send(data)

    def receive(self, limit_s: float = 15.0) -> str | bytes:
        try:
            return self.ws.recv(limit_s)
        except websockets.exceptions.ConnectionClosed as exc:
            raise Ended(exc.rcvd.code if exc.rcvd else 1006, exc.rcvd.reason if exc.rcvd else "") from None

    def close(self, code: int = 1000, reason: str = "") -> Ended:
        self.ws.close(code, reason)
        answer = self.ws.protocol.close_rcvd
        return Ended(answer.code, answer.reason) if answer else Ended(1006)

    def pings(self, payload: bytes) -> bool:
        return self.ws.ping(payload).wait(15.0)

    def cut(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended already
        self.ws.close_socket()


class Socket2(Framed):
    """Over HTTP/2: an extended CONNECT."""

    def __init__(self, address: str, host: str, path: str, headers: f.Fields | None = None) -> None:
        self.client = Http2Client(dial(address)).settled()
        assert self.client.wire.peer_settings is not None
        assert self.client.wire.peer_settings[f.ENABLE_CONNECT_PROTOCOL] == 1
        fields = [*f.connect(b"websocket", path.encode(), host.encode()), (b"sec-websocket-version", b"13")]
        self.call: Call2 = self.client.raw([*fields, *(headers or [])], end=False, method="CONNECT")
        self.response = self.call.head()
        if self.response.status != 200:
            self.client.close()
            raise Ended(self.response.status)
        assert self.response.header("sec-websocket-accept") is None
        super().__init__(ConnectionType.CLIENT, self.client.wire, self.call.half, self.call.send)

    def close(self, code: int = 1000, reason: str = "") -> Ended:
        self.event(ws.CloseConnection(code, reason))
        try:
            while True:
                self.receive()
        except Ended as exc:
            self.call.end()
            return exc
        finally:
            self.client.close()

    def cut(self) -> None:
        try:
            self.call.cancel()
        except OSError:
            pass  # it has ended already
        self.client.close()


class Live:
    """`reviews` behind two sidecars, with an application of each version.

    Both echo, and obey `close CODE WHY`, `cut`, `tell` (of the handshake), `ping`, `flood N`, and `hold N`: read
    nothing until `go` is set, then that many messages.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.events: list[dict[str, Any]] = []
        self.go = threading.Event()
        self.flooded = 0  # messages that an application has sent of its flood
        self.server: Server = serve_websockets(
            self.handle1,
            "127.0.0.1",
            0,
            max_size=None,
            ping_interval=None,
            select_subprotocol=lambda _, offered: offered[0] if offered else None,
            process_request=decline,
        )
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        mesh.stack.callback(self.server.shutdown)
        first = "{}:{}".format(*self.server.socket.getsockname())
        second = mesh.backend(serve2(self.handle2, {f.ENABLE_CONNECT_PROTOCOL: 1}))
        self.reviews = mesh.sidecar(
            "reviews", {"web": {}, "reviews": self.callee()}, app={"http": first, "two": second}, outbound=False
        )
        self.web = mesh.sidecar("web", {"web": {}, "reviews": self.at()}, inbound=False)

    @staticmethod
    def callee(**policy: Any) -> dict[str, Any]:
        return {"ports": PORTS, "routes": UPGRADE, **policy}

    def at(self, **policy: Any) -> dict[str, Any]:
        return {"address": [self.reviews.inbound], **self.callee(**policy)}

    def push(self, **policy: Any) -> None:
        self.reviews.apply({"reviews": self.callee(**policy)})
        self.web.apply({"reviews": self.at(**policy)})

    def obey(self, order: str, send: Callable[[str | bytes], None], receive: Callable[[], str | bytes]) -> bool:
        """Whether it was one that both versions obey alike."""
        verb, _, count = order.partition(" ")
        if verb == "flood":
            for _ in range(int(count)):
                send(CHUNK)
                self.flooded += 1
        elif verb == "hold":
            send("held")
            assert self.go.wait(30)
            send(str(sum(len(receive()) for _ in range(int(count)))))
        else:
            return False
        return True

    def handle1(self, connection: ServerConnection) -> None:
        request = connection.request
        assert request is not None
        try:
            for message in connection:
                if isinstance(message, str) and message.startswith("close "):
                    _, code, reason = message.split(None, 2)
                    connection.close(int(code), reason)
                elif message == "tell":
                    path, _, query = request.path.partition("?")
                    headers = [[name.lower(), value] for name, value in request.headers.raw_items()]
                    connection.send(json.dumps({"path": path, "query": query, "headers": headers}))
                elif message == "ping":
                    connection.send(str(connection.ping(b"are you there").wait(15.0)))
                elif message == "cut":
                    connection.socket.shutdown(socket.SHUT_RDWR)
                elif isinstance(message, bytes) or not self.obey(message, connection.send, connection.recv):
                    connection.send(message)
        except websockets.exceptions.ConnectionClosed:
            pass
        self.events.append({"code": connection.close_code})

    def handle2(self, exchange: Exchange) -> None:
        assert isinstance(exchange, Exchange2)
        if exchange.method == "GET":
            exchange.reply(404)
            return
        assert (exchange.method, exchange.pseudo[b":protocol"]) == ("CONNECT", b"websocket")
        assert exchange.header("sec-websocket-version") == b"13"
        assert not exchange.all("sec-websocket-key")
        if exchange.path == "/socket/no":
            exchange.reply(403, b"no")
            return
        offered = exchange.header("sec-websocket-protocol")
        exchange.begin(200, [(b"sec-websocket-protocol", offered.partition(b",")[0])] if offered else ())
        framed = Framed(ConnectionType.SERVER, exchange.wire, exchange.half, exchange.piece)
        try:
            while True:
                message = framed.receive(60)
                if message == "cut":
                    exchange.cut()
                    code = 1006
                    break
                self.answer2(framed, exchange, message)
        except Ended as end:
            code = end.code
            if exchange.half.reset is None and exchange.wire.ended is None:
                exchange.end()
        except (Cut, OSError):
            code = 1006
        self.events.append({"code": code})

    def answer2(self, framed: Framed, exchange: Exchange2, message: str | bytes) -> None:
        if isinstance(message, str) and message.startswith("close "):
            _, close, reason = message.split(None, 2)
            framed.event(ws.CloseConnection(int(close), reason))
        elif message == "tell":
            path, _, query = exchange.path.partition("?")
            headers = [[name.decode(), value.decode()] for name, value in exchange.headers]
            framed.send(json.dumps({"path": path, "query": query, "headers": headers}))
        elif message == "ping":
            framed.send(str(framed.pings(b"are you there")))
        elif isinstance(message, bytes):
            framed.send(message)
        else:
            holds = message.startswith("hold ")
            exchange.wire.reads = not holds
            taken = exchange.wire.received_bytes

            def receive() -> str | bytes:
                if not exchange.wire.reads:
                    exchange.wire.reads = True
                    size = exchange.wire.received_bytes - taken
                    if size:
                        exchange.wire.send(f.window_update(0, size) + f.window_update(exchange.sid, size))
                return framed.receive()

            if not self.obey(message, framed.send, receive):
                framed.send(message)


def decline(connection: ServerConnection, request: Request) -> Response | None:
    return connection.respond(403, "no") if request.path == "/socket/no" else None


def listens(address: str) -> bool:
    try:
        connect(address).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with Mesh(tmp_path_factory.mktemp("websocket")) as mesh:
        yield Live(mesh)


@pytest.fixture(autouse=True)
def _clean(live: Live) -> Iterator[None]:
    live.events.clear()
    live.go.clear()
    live.flooded = 0
    yield
    for sidecar in (live.web, live.reviews):
        assert sidecar.crashes == 0
        until(lambda sidecar=sidecar: sidecar.metric("pillion_tcp_tunnels") == 0)  # type: ignore[misc]
        until(lambda sidecar=sidecar: sidecar.metric("pillion_requests_active") == 0)  # type: ignore[misc]


def combinations(*core: tuple[int, int]) -> list[Any]:
    """Of the versions of the caller and of the application. What is not named takes long."""
    return [
        pytest.param((down, up), id=f"{down}-{up}", marks=[] if (down, up) in core else [pytest.mark.long])
        for down in (1, 2)
        for up in (1, 2)
    ]


ALL = combinations((1, 1), (1, 2), (2, 1), (2, 2))
TRANSLATED = combinations((1, 2), (2, 1))
UPWARDS = combinations((1, 2))
DOWNWARDS = combinations((2, 1))


@pytest.fixture(params=ALL)
def versions(request: pytest.FixtureRequest) -> tuple[int, int]:
    """Of the caller and of the application."""
    down, up = request.param
    return int(down), int(up)


@pytest.fixture
def dialled(live: Live, versions: tuple[int, int]) -> Iterator[Callable[..., Any]]:
    down, up = versions
    opened: list[Socket] = []

    def dial_socket(path: str = "/socket/echo", **options: Any) -> Any:
        opened.append((Socket1 if down == 1 else Socket2)(live.web.outbound, HOSTS[up], path, **options))
        return opened[-1]

    yield dial_socket
    for each in opened:
        each.cut()


def test_messages_of_every_size(dialled: Callable[..., Socket]) -> None:
    sock = dialled()
    for size in (0, 1, 125, 126, 65535, 65536, 2_000_000):
        sock.send("x" * size)
        assert sock.receive() == "x" * size
        data = os.urandom(size)
        sock.send(data)
        assert sock.receive() == data
    sock.close()


def test_each_message_arrives_when_it_is_sent(dialled: Callable[..., Socket]) -> None:
    sock = dialled()
    sock.send("warm")
    sock.receive()
    for attempt in range(3):
        times = []
        for number in range(50):
            began = time.monotonic()
            sock.send(str(number))
            assert sock.receive() == str(number)
            times.append(time.monotonic() - began)
        if sorted(times)[47] < DELAY_S:
            break
        if attempt == 2:
            raise Slow(times)
    sock.close()


def test_both_directions_at_once(dialled: Callable[..., Socket]) -> None:
    """A hundred messages are under way before the first is read."""
    sock = dialled()
    for number in range(100):
        sock.send(b"%03d" % number * 300)
    for number in range(100):
        assert sock.receive() == b"%03d" % number * 300
    sock.close()


def test_pings_of_either_side(dialled: Callable[..., Socket]) -> None:
    sock = dialled()
    assert sock.pings(b"")
    assert sock.pings(bytes(range(125)))
    sock.send("ping")
    assert sock.receive() == "True"
    sock.close()


def test_the_handshake_says_what_the_caller_said(
    live: Live, versions: tuple[int, int], dialled: Callable[..., Socket]
) -> None:
    down, up = versions
    if down == 1:
        sock = dialled(
            "/socket/a?b=c%20d",
            additional_headers=[("cookie", "a=1; b=2"), ("x-mine", "yes")],
            subprotocols=["chat", "other"],
            origin="https://app.test",
        )
        assert sock.ws.subprotocol == "chat"  # type: ignore[attr-defined]
    else:
        headers = [(b"cookie", b"a=1"), (b"cookie", b"b=2"), (b"x-mine", b"yes"), (b"origin", b"https://app.test")]
        sock = dialled("/socket/a?b=c%20d", headers=[*headers, (b"sec-websocket-protocol", b"chat, other")])
        assert sock.response.header("sec-websocket-protocol") == b"chat"  # type: ignore[attr-defined]
    sock.send("tell")
    told = json.loads(sock.receive())
    sock.close()
    assert (told["path"], told["query"]) == ("/socket/a", "b=c%20d")
    seen = dict(told["headers"])
    assert (seen["x-mine"], seen["origin"]) == ("yes", "https://app.test")
    cookies = [value for name, value in told["headers"] if name == "cookie"]
    assert "; ".join(cookies) == "a=1; b=2" and (up == 2 or len(cookies) == 1)
    assert "x-forwarded-client-cert" in seen
    if up == 1:
        assert seen["host"] == HOSTS[up] and seen["sec-websocket-key"] and seen["upgrade"] == "websocket"


def grown(live: Live, before: list[int]) -> int:
    return max(sidecar.resident_bytes() - was for sidecar, was in zip((live.web, live.reviews), before, strict=True))


def stands_still(value: Callable[[], int]) -> int:
    """What it is once it does not change any more."""
    seen, since = value(), time.monotonic()
    while time.monotonic() - since < 0.3:
        time.sleep(0.02)
        if value() != seen:
            seen, since = value(), time.monotonic()
    return seen


@pytest.mark.parametrize("versions", UPWARDS, indirect=True)
def test_a_caller_that_does_not_read_stops_the_application(live: Live, dialled: Callable[..., Socket]) -> None:
    sock = dialled()
    sock.send("hello")
    sock.receive()
    before = [sidecar.resident_bytes() for sidecar in (live.web, live.reviews)]
    sock.send(f"flood {CHUNKS}")
    until(lambda: live.flooded, "the flood")
    assert stands_still(lambda: live.flooded) < CHUNKS
    assert grown(live, before) < GROWTH_BYTES_MAX
    neighbour = dialled()  # towards HTTP/2 on the same connection
    neighbour.send(CHUNK)
    assert neighbour.receive() == CHUNK
    neighbour.close()
    for _ in range(CHUNKS):
        assert sock.receive() == CHUNK
    sock.close()


@pytest.mark.parametrize("versions", DOWNWARDS, indirect=True)
def test_an_application_that_does_not_read_stops_the_caller(live: Live, dialled: Callable[..., Socket]) -> None:
    sock = dialled()
    sock.send(f"hold {CHUNKS}")
    assert sock.receive() == "held"
    before = [sidecar.resident_bytes() for sidecar in (live.web, live.reviews)]
    sent = 0

    def send() -> None:
        nonlocal sent
        for _ in range(CHUNKS):
            sock.send(CHUNK)
            sent += 1

    thread = threading.Thread(target=send)
    thread.start()
    try:
        assert stands_still(lambda: sent) < CHUNKS
        assert grown(live, before) < GROWTH_BYTES_MAX
    finally:
        live.go.set()
        thread.join()
    assert sock.receive() == str(CHUNKS * len(CHUNK))
    sock.close()


def test_a_caller_closes(live: Live, dialled: Callable[..., Socket]) -> None:
    sock = dialled()
    sock.send("hello")
    sock.receive()
    answer = sock.close(4000, "bye")
    assert (answer.code, answer.reason) == (4000, "bye")
    until(lambda: {"code": 4000} in live.events, "the closing handshake")


def test_an_application_closes(dialled: Callable[..., Socket]) -> None:
    sock = dialled()
    sock.send("close 4001 enough of it")
    with pytest.raises(Ended) as caught:
        sock.receive()
    assert (caught.value.code, caught.value.reason) == (4001, "enough of it")


def test_a_caller_is_cut_off(live: Live, dialled: Callable[..., Socket]) -> None:
    sock = dialled()
    sock.send("hello")
    sock.receive()
    sock.cut()
    until(lambda: {"code": 1006} in live.events, "the application to notice")


def test_an_application_is_cut_off(dialled: Callable[..., Socket]) -> None:
    sock = dialled()
    sock.send("cut")
    with pytest.raises(Ended) as caught:
        sock.receive()
    assert caught.value.code == 1006


def test_a_caller_whose_connection_is_lost(live: Live, versions: tuple[int, int]) -> None:
    """All of an HTTP/2 connection's sockets, and no other."""
    down, up = versions
    if down == 1:
        return
    other = Socket2(live.web.outbound, HOSTS[up], "/socket/other")
    sock = Socket2(live.web.outbound, HOSTS[up], "/socket/lost")
    sock.send("hello")
    sock.receive()
    sock.client.abort()
    until(lambda: {"code": 1006} in live.events, "the application to notice")
    other.send("still")
    assert other.receive() == "still"
    other.close()


def test_many_at_once(live: Live, versions: tuple[int, int], dialled: Callable[..., Socket]) -> None:
    socks = [dialled() for _ in range(20)]
    for number, sock in enumerate(socks):
        sock.send(f"number {number}")
    for number, sock in enumerate(socks):
        assert sock.receive() == f"number {number}"
    assert live.web.metric("pillion_tcp_tunnels") == 20
    for sock in socks:
        sock.close()


def test_an_application_that_declines(versions: tuple[int, int], dialled: Callable[..., Socket]) -> None:
    if versions[0] == 1:
        with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
            dialled("/socket/no")
        assert refused.value.response.status_code == 403
    else:
        with pytest.raises(Ended) as caught:
            dialled("/socket/no")
        assert caught.value.code == 403


def test_a_route_that_does_not_allow_it(versions: tuple[int, int], dialled: Callable[..., Socket]) -> None:
    if versions[0] == 1:
        with pytest.raises(websockets.exceptions.InvalidHandshake):
            dialled("/elsewhere")
    else:
        with pytest.raises(Ended) as caught:
            dialled("/elsewhere")
        assert caught.value.code == 501


@pytest.mark.parametrize("versions", TRANSLATED, indirect=True)
def test_what_changes_meanwhile_does_not_cut_it(live: Live, dialled: Callable[..., Socket]) -> None:
    """A policy that still allows it, and new certificates on both sides."""
    sock = dialled()

    def alive(text: str) -> None:
        sock.send(text)
        assert sock.receive() == text

    alive("before")
    try:
        live.push(timeout={"total": "100ms", "idle": "10s"})
        alive("policy")
        for sidecar in (live.reviews, live.web):
            renew(sidecar)
            alive("certificate")
        live.push(authz={"deny": [{"paths": ["/other/**"]}]})
        time.sleep(0.2)
        alive("after")
    finally:
        live.push()
    alive("and back")
    sock.close()


@pytest.mark.parametrize("versions", TRANSLATED, indirect=True)
@pytest.mark.parametrize(
    "policy",
    [{"authz": {"deny": [{"paths": ["/socket/**"]}]}}, {"routes": [{"name": "all"}]}],
    ids=["denied", "no-upgrade"],
)
def test_a_policy_that_forbids_it_ends_it(live: Live, dialled: Callable[..., Socket], policy: dict[str, Any]) -> None:
    sock = dialled()
    sock.send("before")
    sock.receive()
    try:
        live.reviews.apply({"reviews": live.callee(**policy)})
        with pytest.raises(Ended) as caught:
            sock.receive(10)
        assert caught.value.code == 1006
    finally:
        live.reviews.apply({"reviews": live.callee()})


@pytest.mark.parametrize("versions", UPWARDS, indirect=True)
def test_silence_is_held_to_the_idle_timeout_and_nothing_else(live: Live, dialled: Callable[..., Socket]) -> None:
    live.push(timeout={"total": "300ms", "try": "300ms", "idle": "600ms"})
    try:
        sock = dialled()
        for number in range(5):
            time.sleep(0.15)
            sock.send(str(number))
            assert sock.receive() == str(number)
        began = time.monotonic()
        with pytest.raises(Ended) as caught:
            sock.receive(10)
        assert caught.value.code == 1006
        assert 0.4 < time.monotonic() - began < 4
    finally:
        live.push()


@pytest.mark.long
@pytest.mark.parametrize("down", [1, 2])
def test_hypercorn(down: int, tmp_path: Path) -> None:
    """Behind one sidecar, over HTTP/2."""
    (tmp_path / "echoes.py").write_text(APPLICATION)
    address = f"127.0.0.1:{free_port()}"
    with open(tmp_path / "log", "wb") as log, Mesh(tmp_path) as mesh:
        process = subprocess.Popen(
            [sys.executable, "-m", "hypercorn", "--bind", address, "--worker-class", "trio", "echoes:app"],
            cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(), start_new_session=True,
        )  # fmt: skip
        try:
            until(lambda: listens(address), "Hypercorn")
            ports = {"http": {"port": 80, "protocol": "http2"}}
            echoes = {"address": [address], "tls": "plain", "ports": ports, "routes": UPGRADE}
            web = mesh.sidecar("web", {"web": {}, "echoes": echoes}, inbound=False)
            sock: Socket = (Socket1 if down == 1 else Socket2)(web.outbound, "echoes", "/socket/here")
            for size in (0, 1, 65536, 300_000):
                data = os.urandom(size)
                sock.send(data)
                assert sock.receive() == data
            sock.send("tell")
            assert json.loads(sock.receive())["path"] == "/socket/here"
            sock.send("close 4001 enough of it")
            with pytest.raises(Ended) as caught:
                sock.receive()
            assert (caught.value.code, caught.value.reason) == (4001, "enough of it")
            sock.cut()
            assert web.crashes == 0
        finally:
            os.killpg(process.pid, 9)
            process.wait()


PAGE = b"""<!doctype html><title>socket</title><script>
const seen = [];
const socket = new WebSocket(`ws://127.0.0.1:${location.search.slice(1)}/socket/browser`);
const report = () => fetch("/report", {method: "POST", body: JSON.stringify(seen)});
let began;
const ask = () => {
  began = performance.now();
  socket.send(seen.length % 2 ? `text ${seen.length}` : new Uint8Array(9));
};
socket.binaryType = "arraybuffer";
socket.onopen = ask;
socket.onmessage = (event) => {
  const data = typeof event.data === "string" ? event.data : event.data.byteLength;
  seen.push([data, performance.now() - began]);
  if (seen.length < 20) ask(); else socket.send("close 4321 done");
};
socket.onclose = (event) => { seen.push([event.code, event.reason, event.wasClean]); report(); };
</script>"""


@pytest.mark.long
def test_a_browser(live: Live, tmp_path: Path) -> None:
    """With its own compression, towards an application of HTTP/1.1."""
    reports: list[Any] = []
    page_port, socket_port = free_ports(2)

    def handle(exchange: Exchange) -> None:
        body = exchange.read()
        if exchange.path == "/report":
            reports.append(json.loads(body))
        exchange.reply(200, PAGE if exchange.path[:2] == "/?" else b"", [(b"content-type", b"text/html")])

    app = live.mesh.backend(serve(1, handle))
    services = {
        "web": {"calls": {"page": {"local_port": page_port}, "reviews": {"local_port": socket_port, "port": "http"}}},
        "page": {"address": [str(app)], "tls": "plain"},
        "reviews": live.at(),
    }
    live.mesh.sidecar("web", services, inbound=False)
    with open_page(f"http://127.0.0.1:{page_port}/?{socket_port}", tmp_path):
        until(lambda: reports, "the browser's report", limit_s=60)
    (seen,) = reports
    *messages, end = seen
    assert end == [4321, "done", True]
    assert [data for data, _ in messages] == [f"text {number}" if number % 2 else 9 for number in range(20)]
    assert sorted(delay for _, delay in messages)[18] < 1000 * DELAY_S, messages
