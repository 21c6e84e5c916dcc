"""A scripted control plane on real TLS sockets, for tests of the sidecar as its client.

    with Control(pki) as control:
        control.hold({"service/web": {...}, "endpoints/reviews": [...]})
        text = control.token("web")                  # what a sidecar joins with
        control.change({"endpoints/reviews": [...]})   # a push to every stream
        until(lambda: control.acks)

It speaks the protocol and keeps what it was told; nothing is checked that a test does not ask for. Threads only, and
every wait has a limit. `stop` and `start` are a control plane that goes away and comes back at the same addresses.
"""

import hashlib
import json
import os
import queue
import secrets
import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from certs.authority import LEAF_TTL, certificate_pem
from certs.client import CONTROL_PLANE, JOIN_SNI, MESH_SNI
from certs.spiffe import SpiffeId
from certs.svid import fingerprint
from certs.tokens import make_token
from support.mesh import PILLION, WAIT_S, Backend, Closed, Conn, Mesh, Sidecar, environment, read_line, until
from support.pki import Pki

Json = Any
IDLE_S = 60.0
NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME: our TLS has the real clock, whatever `clock` says


@dataclass(eq=False)
class Stream:
    """One open stream: `hello` is what the sidecar said; lines put into `lines` go down, None ends it."""

    sidecar: str
    hello: dict[str, Json]
    lines: "queue.Queue[dict[str, Json] | None]" = field(default_factory=queue.Queue)
    held: dict[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class Known:
    """A sidecar that has joined."""

    service: str
    fingerprints: list[str] = field(default_factory=list)


class Refusal(Exception):
    """An error answer."""

    def __init__(self, status: int, code: str, message: str = "", help: str = "") -> None:
        super().__init__(code)
        self.status = status
        self.body = {"error": {"code": code, "message": message or code, "help": help}}


class Control:
    """One replica. `ttl` is that of the leaves it issues; `clock` is added to the time of what it issues."""

    def __init__(self, pki: Pki, ttl: timedelta = LEAF_TTL, *, clock: timedelta = timedelta(), name: str = "one"):
        self.pki, self.ttl, self.clock, self.name = pki, ttl, clock, name
        self.heartbeat_s = 0.3
        self.protocol = [1, 2]
        self.resources: dict[str, tuple[str, Json]] = {}
        self.sidecars: dict[str, Known] = {}
        self.tokens: dict[str, str] = {}
        self.registered: dict[str, dict[str, Json]] = {}
        self.heartbeats: list[tuple[str, dict[str, Json]]] = []
        self.acks: list[tuple[str, dict[str, str]]] = []
        self.requests: list[tuple[str, str]] = []  # path, sidecar
        self.streams: list[Stream] = []
        self.replicas: list[str] = []
        self.withdrawn: list[str] = []
        self.used: list[list[str]] = []
        self.renewals = 0
        self.mute = False  # no heartbeats down
        self.before: Callable[[str, str], None] = lambda path, sidecar: None  # raises Refusal
        self.operator = "an-operators-token"
        self.lock = threading.RLock()
        self.mesh_port = self.join_port = 0
        self.doors: list[socket.socket] = []
        self.conns: set[socket.socket] = set()
        self.start()

    def __enter__(self) -> "Control":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- life

    def start(self) -> None:
        self.ending = False
        self.mesh_port = self._open(self.mesh_port, MESH_SNI, self._mesh, client_auth=True)
        self.join_port = self._open(self.join_port, JOIN_SNI, self._join, client_auth=False)
        if not self.replicas:
            self.replicas = [self.mesh]

    @property
    def mesh(self) -> str:
        return f"127.0.0.1:{self.mesh_port}"

    @property
    def join(self) -> str:
        return f"127.0.0.1:{self.join_port}"

    def stop(self) -> None:
        self.ending = True
        for door in self.doors:
            try:
                door.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            door.close()
        self.doors = []
        for stream in self.streams:
            stream.lines.put(None)
        for sock in list(self.conns):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self.streams = []

    def _open(self, port: int, sni: str, serve: Callable[[Conn, str], None], client_auth: bool) -> int:
        context = self.pki.server_context(CONTROL_PLANE)
        context.set_alpn_protocols(["http/1.1"])
        context.num_tickets = 0
        if not client_auth:
            context.verify_mode = ssl.CERT_OPTIONAL
        if self.clock:
            context.verify_flags |= NO_CHECK_TIME
        door = socket.create_server(("127.0.0.1", port), backlog=64)
        self.doors.append(door)

        def accept() -> None:
            while True:
                try:
                    sock, _ = door.accept()
                except OSError:
                    return
                threading.Thread(target=connection, args=(sock,), daemon=True).start()

        def connection(plain: socket.socket) -> None:
            plain.settimeout(IDLE_S)
            self.conns.add(plain)
            try:
                sock = context.wrap_socket(plain, server_side=True)
            except OSError:
                plain.close()
                return
            finally:
                self.conns.discard(plain)
            self.conns.add(sock)
            der = sock.getpeercert(binary_form=True)
            conn = Conn(sock, 0, SimpleNamespace(requests=[], complete=[]))  # type: ignore[arg-type]
            try:
                serve(conn, fingerprint(der) if der else "")
            except (Closed, OSError, ValueError):  # ValueError: closed by `stop` while in use
                pass
            finally:
                self.conns.discard(sock)
                conn.close()

        threading.Thread(target=accept, daemon=True).start()
        return int(door.getsockname()[1])

    # -- what a test does

    def token(self, service: str) -> str:
        id, secret = secrets.token_hex(6), secrets.token_hex(16)
        root = self.pki.bundle.roots[0].fingerprint
        text = make_token("join", id, secret, [self.join], root, self.pki.trust_domain)
        self.tokens[text] = service
        return text

    def hold(self, data: Mapping[str, Json | None]) -> None:
        """Change what sidecars should hold, without telling them; None removes."""
        with self.lock:
            for name, each in data.items():
                if each is None:
                    self.resources.pop(name, None)
                else:
                    content = json.dumps(each, sort_keys=True).encode()
                    self.resources[name] = (hashlib.sha256(content).hexdigest()[:16], each)

    def change(self, data: Mapping[str, Json | None], **how: Any) -> None:
        """The same, and tell every stream."""
        self.hold(data)
        for stream in self.streams:
            self.push(stream, **how)

    def push(self, stream: Stream, *, split: bool = False, policy: int = 1) -> None:
        """What this stream does not hold yet."""
        with self.lock:
            wanted = {name: version for name, (version, _) in self.resources.items()}
            fresh = [name for name in sorted(wanted, key=_order) if stream.held.get(name) != wanted[name]]
            removed = sorted(set(stream.held) - set(wanted))
            stream.held = wanted
            resources = [{"name": name, "version": wanted[name], "data": self.resources[name][1]} for name in fresh]
        if not fresh and not removed:
            return
        nonce = secrets.token_hex(4)
        head = {"type": "push", "nonce": nonce, "revision": policy, "policy": policy}
        for each in resources[:-1] if split else []:
            stream.lines.put({**head, "resources": [each], "removed": [], "more": True})
        rest = resources[-1:] if split else resources
        stream.lines.put({**head, "resources": rest, "removed": removed, "more": False})

    def goodbye(self, reason: str = "ending") -> None:
        for stream in self.streams:
            stream.lines.put({"type": "goodbye", "reason": reason})
            stream.lines.put(None)

    def id_of(self, service: str) -> str:
        return next(id for id, known in self.sidecars.items() if known.service == service)

    # -- the join listener

    def _join(self, conn: Conn, peer: str) -> None:
        while True:
            request = conn.take()
            path = request.target.decode()
            try:
                self.requests.append((path, ""))
                self.before(path, "")
                if path == "/v1/ca":
                    answer: Json = {"trust_domain": self.pki.trust_domain, "bundle": self.pki.bundle.pem.decode()}
                elif path == "/v1/join":
                    answer = self._joined(json.loads(request.body))
                elif path == "/v1/rejoin":
                    answer = self._rejoined(json.loads(request.body))
                elif path == "/v1/tokens":
                    if request.header("authorization") != b"Bearer " + self.operator.encode():
                        raise Refusal(401, "token_unknown", "this operator is not known")
                    answer = {"id": "t", "token": self.token(json.loads(request.body)["service"])}
                else:
                    raise Refusal(404, "not_found")
                _reply(conn, 200, answer)
            except Refusal as refusal:
                _reply(conn, refusal.status, refusal.body)

    def _joined(self, told: dict[str, Json]) -> Json:
        service = self.tokens.get(told["token"])
        if service is None:
            raise Refusal(401, "token_unknown", "this token is not known", "make another")
        if service != told["service"]:
            raise Refusal(403, "token_service", f"the token is for {service}")
        id = secrets.token_hex(8)
        self.sidecars[id] = Known(service)
        return {**self._issue(id, told["csr"]), "sidecar": id, "mesh": list(self.replicas), "join": [self.join]}

    def _rejoined(self, told: dict[str, Json]) -> Json:
        leaf = x509.load_pem_x509_certificate(told["certificate"].encode())
        mark = fingerprint(leaf.public_bytes(Encoding.DER))
        id = next((id for id, known in self.sidecars.items() if mark in known.fingerprints), None)
        if id is None:
            raise Refusal(401, "unknown_sidecar", "not known")
        assert x509.load_pem_x509_csr(told["csr"].encode()).public_key() == leaf.public_key()
        return {**self._issue(id, told["csr"]), "sidecar": id, "mesh": list(self.replicas), "join": [self.join]}

    def _issue(self, id: str, csr: str) -> dict[str, Json]:
        known = self.sidecars[id]
        spiffe_id = SpiffeId.for_service(self.pki.trust_domain, known.service)
        request = x509.load_pem_x509_csr(csr.encode())
        now = datetime.now(UTC) + self.clock
        leaf = self.pki.issuing.issue(request.public_bytes(Encoding.DER), spiffe_id, self.ttl, now)
        known.fingerprints.append(fingerprint(leaf.public_bytes(Encoding.DER)))
        return {
            "certificate": certificate_pem([leaf, *self.pki.issuing.chain]).decode(),
            "bundle": self.pki.bundle.pem.decode(),
            "spiffe_id": str(spiffe_id),
            "trust_domain": self.pki.trust_domain,
            "not_after": leaf.not_valid_after_utc.timestamp(),
        }

    # -- the mesh listener

    def _mesh(self, conn: Conn, peer: str) -> None:
        while True:
            request = conn.take()
            path, body = request.target.decode(), json.loads(request.body)
            id = next((id for id, known in self.sidecars.items() if peer in known.fingerprints), "")
            try:
                self.requests.append((path, id))
                self.before(path, id)
                if not id:
                    raise Refusal(401, "unknown_sidecar", "no sidecar has joined with this certificate")
                if path == "/v1/stream":
                    self._stream(conn, id, body)
                    return
                _reply(conn, 200, self._verb(path, id, body))
            except Refusal as refusal:
                _reply(conn, refusal.status, refusal.body)

    def _verb(self, path: str, id: str, body: dict[str, Json]) -> Json:
        if path == "/v1/ack":
            self.acks.append((body["nonce"], body["rejected"]))
        elif path == "/v1/heartbeat":
            self.heartbeats.append((id, body))
            if id not in self.registered:
                raise Refusal(410, "not_registered")
            self.registered[id].update(healthy=body["healthy"], reason=body["reason"])
        elif path == "/v1/register":
            self.registered[id] = body
        elif path == "/v1/withdraw":
            self.registered.pop(id, None)
            self.withdrawn.append(id)
            return {"acknowledged": True}
        elif path == "/v1/uses":
            self.used.append(body["services"])
        elif path == "/v1/renew":
            self.renewals += 1
            return self._issue(id, body["csr"])
        else:
            raise Refusal(404, "not_found")
        return {}

    def _stream(self, conn: Conn, id: str, hello: dict[str, Json]) -> None:
        stream = Stream(id, hello, held=dict(hello["held"]))
        conn.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n")
        _line(
            conn,
            {
                "type": "hello",
                "protocol": self.protocol,
                "replica": self.name,
                "sidecar": id,
                "heartbeat_s": self.heartbeat_s,
                "dead_s": 15,
                "replicas": self.replicas,
            },
        )
        self.streams.append(stream)
        self.push(stream)
        try:
            while not self.ending:
                try:
                    line = stream.lines.get(timeout=1.0)
                except queue.Empty:
                    if not self.mute:
                        _line(conn, {"type": "heartbeat"})
                    continue
                if line is None:
                    conn.send(b"0\r\n\r\n")
                    return
                _line(conn, line)
        finally:
            if stream in self.streams:
                self.streams.remove(stream)


def _order(name: str) -> tuple[int, str]:
    kinds = ("bundle", "bans", "names", "cookies", "endpoints", "service")
    return kinds.index(name.partition("/")[0]), name


def _line(conn: Conn, data: dict[str, Json]) -> None:
    line = json.dumps(data).encode() + b"\n"
    conn.send(b"%x\r\n%b\r\n" % (len(line), line))


def _reply(conn: Conn, status: int, data: Json) -> None:
    conn.reply(status, json.dumps(data).encode(), [("content-type", "application/json")])


# -- sidecars that join


def launch(
    mesh: Mesh,
    service: str,
    *options: str,
    app: Backend | None = None,
    token: str | None = None,
    state: Path | None = None,
    inbound: str = "127.0.0.1:0",
    outbound: str = "127.0.0.1:0",
) -> "Member":
    """Start a sidecar that has a control plane, without waiting for it."""
    mesh.number += 1
    files = mesh.path / f"member-{mesh.number}-{service}"
    files.mkdir()
    state = state or files / "state"
    ready, tell = os.pipe()
    command = [
        *PILLION, "sidecar", f"--service={service}", f"--inbound={inbound}", f"--outbound={outbound}",
        "--admin=127.0.0.1:0", "--grace=0", f"--state-dir={state}", f"--access-log={files / 'access.jsonl'}",
        f"--ready-fd={tell}", *([f"--app={app}"] if app is not None else []), *options,
    ]  # fmt: skip
    variables = environment() | ({"PILLION_TOKEN": token} if token is not None else {})
    with open(files / "log", "wb") as log, open(files / "out", "wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=log, pass_fds=[tell], env=variables, cwd=files
        )
    os.close(tell)
    member = Member(process, files, files / "none", files / "none", mesh)
    member.state, member.ready = state, ready
    member.document = {"own": service}
    mesh.sidecars.append(member)
    mesh.stack.callback(member.forget)
    return member


class Member(Sidecar):
    """A sidecar process that has a control plane."""

    state: Path
    ready: int

    def await_ready(self, limit_s: float = WAIT_S) -> "Member":
        line = read_line(self.ready, limit_s)
        assert line, f"the sidecar did not become ready:\n{self.log}"
        self.addresses = json.loads(line)
        return self

    @property
    def is_ready(self) -> bool:
        return bool(self.addresses or select.select([self.ready], [], [], 0)[0])

    def forget(self) -> None:
        if self.ready >= 0:
            os.close(self.ready)
            self.ready = -1

    @property
    def source(self) -> Any:
        return self.admin("/config")["policy"]["source"]

    def says(self, text: str, limit_s: float = WAIT_S) -> None:
        """Wait until the log holds this."""
        try:
            until(lambda: text in self.log, repr(text), limit_s)
        except AssertionError:
            raise AssertionError(f"{text!r} is not in the log:\n{self.log}") from None


def join(mesh: Mesh, control: Control, service: str, *options: str, **how: Any) -> Member:
    """Start a sidecar with a token and wait until it is ready."""
    return launch(mesh, service, *options, token=control.token(service), **how).await_ready()


def service(name: str, **more: Any) -> dict[str, Json]:
    """The policy of a service in its canonical form, with one route to every endpoint."""
    return {"name": name, "ports": [{"name": "http", "number": 80}], "routes": [{"name": "default"}], **more}


def calls(*names: str) -> dict[str, Json]:
    return {name: {"service": name} for name in names}


def endpoint(address: str, **more: Any) -> dict[str, Json]:
    host, _, port = address.rpartition(":")
    return {"host": host, "port": int(port), **more}
