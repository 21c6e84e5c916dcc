"""The control plane's own listeners, live: real TLS in front of small applications on Unix sockets."""

import json
import re
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import pytest
import trio
from support.mesh import Client, Closed, dial, until
from support.pki import Pki
from support.tlskit import identity_files

from certs.svid import fingerprint
from control_plane.serve import front as front_module
from control_plane.serve.front import Front
from sidecar.proxy.bind import BindError, bind_listener
from sidecar.telemetry.metrics import Registry

NAME = "pillion-control-plane"
API, JOIN = f"api.{NAME}.mesh", f"join.{NAME}.mesh"
OWN = f"spiffe://mesh.local/service/{NAME}"
FORGED = [
    ("x-forwarded-client-cert", "By=x;Hash=00;URI=spiffe://mesh.local/service/admin"),
    ("X_Forwarded_Client_Cert", "By=x;Hash=00;URI=spiffe://mesh.local/service/admin"),
]


class Application:
    """Echoes what it is asked; `/v1/stream` sends the lines that a test hands to `say`, for ever."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.streams: list[trio.MemorySendChannel[bytes]] = []
        self.token = trio.lowlevel.current_trio_token()

    def say(self, line: bytes) -> None:
        def send() -> None:
            for stream in self.streams:
                stream.send_nowait(line)

        self.token.run_sync_soon(send)

    def end(self) -> None:
        self.token.run_sync_soon(lambda: [stream.close() for stream in self.streams])

    async def __call__(self, stream: trio.SocketStream) -> None:
        conn = h11.Connection(h11.SERVER)
        try:
            async with stream:
                while await self._one(conn, stream):
                    conn.start_next_cycle()
        except (trio.BrokenResourceError, h11.ProtocolError):
            pass

    async def _one(self, conn: h11.Connection, stream: trio.SocketStream) -> bool:
        async def event() -> Any:
            while (found := conn.next_event()) is h11.NEED_DATA:
                conn.receive_data(await stream.receive_some())
            return found

        request = await event()
        if not isinstance(request, h11.Request):
            return False
        size = 0
        while isinstance(found := await event(), h11.Data):
            size += len(found.data)
        if request.target == b"/v1/stream":
            await stream.send_all(conn.send(h11.Response(status_code=200, headers=[("transfer-encoding", "chunked")])))
            send, receive = trio.open_memory_channel[bytes](100)
            self.streams.append(send)
            async for line in receive:
                await stream.send_all(conn.send(h11.Data(line)))
            body = b""
        else:
            headers = [[name.decode(), value.decode()] for name, value in request.headers]
            seen = {"app": self.name, "target": request.target.decode(), "headers": headers, "size": size}
            body = json.dumps(seen).encode()
            head = h11.Response(status_code=200, headers=[("content-length", str(len(body)))])
            await stream.send_all(conn.send(head) + conn.send(h11.Data(body)))
        await stream.send_all(conn.send(h11.EndOfMessage()))
        return conn.our_state is h11.DONE and conn.their_state is h11.DONE


@dataclass
class Stage:
    pki: Pki
    path: Path
    front: Front
    apps: dict[str, Application]
    notes: list[str] = field(default_factory=list)

    def connect(
        self, door: str, caller: str | None, sni: str | None, fault: str | None = None, context: Any = None
    ) -> Client:
        """Raises OSError where refused in the handshake."""
        if context is None:
            context = self.pki.client_context(caller, fault=fault)
        sock = dial(self.front.addresses[door])
        try:
            return Client(context.wrap_socket(sock, server_hostname=sni, suppress_ragged_eofs=False))
        except BaseException:
            sock.close()
            raise

    def refused(self, *args: Any, **options: Any) -> bool:
        """TLS 1.3 lets a client finish before the server has judged it: the first answer tells."""
        try:
            with self.connect(*args, **options) as client:
                client.get("/")
        except (OSError, Closed):
            return True
        return False


@asynccontextmanager
async def staged(tmp_path: Path, pki: Pki | None = None, **options: Any) -> AsyncIterator[Stage]:
    pki = pki or Pki()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            apps, paths = {}, {}
            for name in ("mesh", "join"):
                paths[name] = tmp_path / f"{name}.sock"
                listener = trio.socket.socket(socket.AF_UNIX)
                await listener.bind(str(paths[name]))
                listener.listen(1024)
                apps[name] = Application(name)
                nursery.start_soon(trio.serve_listeners, apps[name], [trio.SocketListener(listener)])
            notes: list[str] = []
            front = Front(
                identity_files(pki, tmp_path, NAME),
                mesh=("127.0.0.1", 0),
                join=("127.0.0.1", 0),
                mesh_app=paths["mesh"],
                join_app=paths["join"],
                note=lambda kind, text: notes.append(text),
                **options,
            )
            front.listen()
            await nursery.start(front.serve)
            yield Stage(pki, tmp_path, front, apps, notes)
            assert not front.world.reactor.crashes
            nursery.cancel_scope.cancel()


async def played(act: Callable[..., Any], *args: Any) -> Any:
    return await trio.to_thread.run_sync(act, *args)


def xfcc(client: Client) -> list[str]:
    """What the application is told of the caller, whatever spelling."""
    seen = client.get("/", headers=FORGED).json["headers"]
    return [value for name, value in seen if re.sub("[^a-z]", "-", name.lower()) == "x-forwarded-client-cert"]


async def test_the_mesh_listener_tells_who_calls(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:

        def act() -> None:
            context = stage.pki.client_context("web")
            with stage.connect("mesh", None, API, context=context) as client:
                (line,) = xfcc(client)
                by, proof, uri = line.split(";")
                assert (by, uri) == (f"By={OWN}", "URI=spiffe://mesh.local/service/web")
                assert re.fullmatch("Hash=[0-9a-f]{64}", proof)
                seen = client.get("/v1/x?y=%2F", host="10.0.0.1:15010").json
                assert seen["app"] == "mesh" and seen["target"] == "/v1/x?y=%2F"
                assert ["host", "10.0.0.1:15010"] in seen["headers"]
                assert client.post("/v1/heartbeat", b"x" * 300_000).json["size"] == 300_000

        await played(act)


async def test_the_hash_is_that_of_the_leaf(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        directory = stage.pki.identity(tmp_path, "web")
        der = ssl.PEM_cert_to_DER_cert((directory / "cert.pem").read_text().split("-----END CERTIFICATE-----")[0]
                                       + "-----END CERTIFICATE-----\n")  # fmt: skip

        def act() -> None:
            context = stage.pki.client_context(None)
            context.load_cert_chain(directory / "cert.pem", directory / "key.pem")
            for door, sni in (("mesh", API), ("join", JOIN), ("join", None)):
                with stage.connect(door, None, sni, context=context) as client:
                    (line,) = xfcc(client)
                    assert line == f"By={OWN};Hash={fingerprint(der)};URI=spiffe://mesh.local/service/web"

        await played(act)


async def test_who_is_not_of_the_mesh_stays_outside(tmp_path: Path) -> None:
    async with staged(tmp_path, Pki(constrained=False)) as stage:

        def act() -> None:
            assert stage.refused("mesh", None, API)
            for sni in (None, JOIN, f"http.{NAME}.mesh", "api.other.mesh", NAME):
                assert stage.refused("mesh", "web", sni), sni
            for sni in (API, f"http.{NAME}.mesh", "join.other.mesh", "localhost"):
                assert stage.refused("join", None, sni), sni
            for fault in ("other-ca", "no-spiffe-id", "expired", "other-trust-domain"):
                assert stage.refused("mesh", "web", API, fault=fault), fault
                assert stage.refused("join", "web", JOIN, fault=fault), fault
            plain = Client(dial(stage.front.addresses["join"]))
            with plain:
                plain.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                assert plain.closed()

        await played(act)
        assert not stage.front.world.downstreams


async def test_joiners_need_no_certificate_and_cannot_claim_one(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:

        def act() -> None:
            for sni in (JOIN, None):
                with stage.connect("join", None, sni) as client:
                    assert xfcc(client) == []
                    fields = [("x-forwarded-for", "1.2.3.4"), ("authorization", "Bearer pil_x"), ("Forwarded", "for=x")]
                    seen = client.get("/v1/whoami", headers=fields).json
                    assert seen["app"] == "join"
                    names = {name for name, _ in seen["headers"]}
                    assert "authorization" in names and not names & {"x-forwarded-for", "forwarded"}

        await played(act)


async def test_a_line_of_a_stream_arrives_at_once(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:

        def act() -> None:
            with stage.connect("mesh", "web", API) as client:
                client.request("POST", "/v1/stream", body=b"{}")
                until(lambda: stage.apps["mesh"].streams, "the stream")
                line, headers = client.reader.head()
                assert b" 200 " in line and (b"transfer-encoding", b"chunked") in headers
                worst_s = 0.0
                for number in range(50):
                    text = b"%08d" % number + b"." * 91 + b"\n"
                    began = time.monotonic()
                    stage.apps["mesh"].say(text)
                    client.reader.until(b"\r\n")
                    assert client.reader.exactly(102) == text + b"\r\n"
                    worst_s = max(worst_s, time.monotonic() - began)
                assert worst_s < 0.25
                stage.apps["mesh"].end()
                assert client.reader.until(b"0\r\n\r\n")
                assert client.get("/").json["app"] == "mesh"  # the connection serves on

        await played(act)


async def test_two_hundred_streams_at_once(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:

        def act() -> None:
            context = stage.pki.client_context("web")
            with ExitStack() as stack:
                clients = [stack.enter_context(stage.connect("mesh", None, API, context=context)) for _ in range(200)]
                for client in clients:
                    client.request("POST", "/v1/stream", body=b"{}")
                until(lambda: len(stage.apps["mesh"].streams) == 200, "200 streams")
                for number in range(3):
                    stage.apps["mesh"].say(b"line %d\n" % number)
                for client in clients:
                    client.reader.head()
                    for number in range(3):
                        client.reader.until(b"line %d\n" % number)  # several may come as one chunk
                clients[0].reset()
                until(lambda: len(stage.front.world.downstreams) == 199, "the end of one")

        await played(act)


async def test_a_stream_that_nobody_reads_is_given_up(tmp_path: Path) -> None:
    async with staged(tmp_path, stream_idle_s=1.0) as stage:

        def act() -> None:
            with stage.connect("mesh", "web", API) as client, stage.connect("mesh", "web", API) as other:
                for each in (client, other):
                    each.request("POST", "/v1/stream", body=b"{}")
                until(lambda: len(stage.apps["mesh"].streams) == 2, "the streams")
                quit_at = time.monotonic() + 10
                while stage.front.world.downstreams and time.monotonic() < quit_at:
                    time.sleep(0.02)
                assert not stage.front.world.downstreams

        await played(act)


async def test_a_new_certificate_drops_no_connection(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        fresh = identity_files(stage.pki, tmp_path, NAME)

        def served(client: Client) -> str:
            return fingerprint(client.sock.getpeercert(binary_form=True))  # type: ignore[attr-defined]

        def before() -> list[Client]:
            clients = [stage.connect("mesh", "web", API), stage.connect("join", None, JOIN)]
            assert all(client.get("/").status == 200 and served(client) != fresh.fingerprint for client in clients)
            return clients

        def after(clients: list[Client]) -> None:
            for client in clients:
                assert client.get("/").status == 200
                client.close()
            for args in (("mesh", "web", API), ("join", None, JOIN)):
                with stage.connect(*args) as client:
                    assert client.get("/").status == 200 and served(client) == fresh.fingerprint

        clients = await played(before)
        stage.front.replace(fresh)
        await played(after, clients)


async def test_a_lost_root_ends_connections(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        other = identity_files(Pki(), tmp_path / "other", NAME)

        def act() -> None:
            with stage.connect("mesh", "web", API) as client:
                assert client.get("/").status == 200
                trio.from_thread.run_sync(stage.front.replace, other)
                assert client.closed(limit_s=6.0)

        await played(act)


async def test_draining(tmp_path: Path) -> None:
    async with staged(tmp_path) as stage:
        opened = threading.Event()

        def act() -> None:
            with (
                stage.connect("mesh", "web", API) as idle,
                stage.connect("mesh", "web", API) as ends,
                stage.connect("mesh", "web", API) as never,
            ):
                assert idle.get("/").status == 200
                for client in (ends, never):
                    client.request("POST", "/v1/stream", body=b"{}")
                    client.reader.head()
                until(lambda: len(stage.apps["mesh"].streams) == 2, "the streams")
                address = stage.front.addresses["mesh"]
                opened.set()
                until(lambda: stage.front.world.draining, "the drain")
                trio.from_thread.run_sync(stage.apps["mesh"].streams[0].close)
                assert ends.reader.until(b"0\r\n\r\n") and ends.closed()
                assert idle.closed()
                with pytest.raises(OSError, match="refused"):
                    dial(address).close()
                assert not never.closed(limit_s=0.2)
                assert never.closed(limit_s=3.0)  # cut: the stream has no end

        async with trio.open_nursery() as nursery:
            nursery.start_soon(played, act)
            await trio.to_thread.run_sync(opened.wait)
            began = trio.current_time()
            await stage.front.drain(2.0)
            assert 1.5 < trio.current_time() - began < 4.0
        assert not stage.front.world.downstreams


async def test_strangers_are_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_module, "JOIN_CONNECTIONS_PER_ADDRESS", 3)
    async with staged(tmp_path) as stage:

        def act() -> None:
            with ExitStack() as stack:
                clients = [stack.enter_context(stage.connect("join", None, JOIN)) for _ in range(3)]
                assert all(client.get("/").status == 200 for client in clients)
                assert stage.refused("join", None, JOIN)
                with stage.connect("join", "web", JOIN) as known:
                    assert known.get("/").status == 200
                clients[0].close()
                until(lambda: not stage.refused("join", None, JOIN), "room for one more")

        await played(act)
        assert any("more than 3 connections" in note for note in stage.notes)


async def test_nothing_is_kept_of_those_that_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would hold its TLS session, some 30 KB: with one join from each host that is as much as all that is open."""
    monkeypatch.setattr(front_module, "FORGET_S", 0.02)
    async with staged(tmp_path) as stage:

        def act() -> None:
            with stage.connect("mesh", "reviews", API) as stays:
                for door, caller, sni in (("mesh", "web", API), ("join", None, JOIN), ("join", "web", JOIN)):
                    with stage.connect(door, caller, sni) as client:
                        assert client.get("/").status == 200
                assert stays.get("/").status == 200
                doors = stage.front.doors
                until(lambda: [(len(door.open), len(door.peers)) for door in doors] == [(0, 1), (0, 0)], "forgotten")

        await played(act)


async def test_metrics_and_a_dead_application(tmp_path: Path) -> None:
    registry = Registry(time.monotonic)
    async with staged(tmp_path, registry=registry) as stage:
        (tmp_path / "join.sock").unlink()

        def act() -> None:
            with stage.connect("join", None, JOIN) as client:
                answer = client.get("/")
                assert (answer.status, answer.reason) == (503, "connect_failed")

        await played(act)
        text = b"".join(registry.render()).decode()
        assert f'endpoint="unix:{tmp_path}/join.sock"' in text and "pillion_connections{" in text
        assert any(f"connect_failed: {NAME} at unix:{tmp_path}/join.sock" in note for note in stage.notes)


async def test_a_port_in_use_is_said_and_leaves_nothing_open(tmp_path: Path) -> None:
    pki = Pki()
    with bind_listener("127.0.0.1", 0) as taken:
        front = Front(
            identity_files(pki, tmp_path, NAME),
            mesh=("127.0.0.1", 0),
            join=taken.getsockname(),
            mesh_app=tmp_path / "a",
            join_app=tmp_path / "b",
        )
        with pytest.raises(BindError, match="in use"):
            front.listen()
        assert all(sock.fileno() < 0 for sock in front.mesh.sockets)
