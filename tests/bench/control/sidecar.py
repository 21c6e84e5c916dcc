"""One simulated sidecar: it joins, keeps a stream, answers each push at once, sends heartbeats, registers.

It costs next to nothing: requests are made beforehand, and of what it is sent it keeps names, versions and, for the
services under watch, who is there. Two connections, as a real one has: the stream, and one for everything else.
Must not know other sidecars, or what is measured.
"""

import json
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from certs.authority import key_pem, new_key

from .http1 import Answers, Broken, Lines, post
from .loop import Connection, Loop

MESH_NAME = "api.pillion-control-plane.mesh"
JOIN_NAME = "join.pillion-control-plane.mesh"
VERSION = "0.1.0"
RETRY_S = 0.2
PORT = 15006
GET_CA = f"GET /v1/ca HTTP/1.1\r\nhost: {JOIN_NAME}\r\n\r\n".encode()

Answered = Callable[[int, bytes], None]


@dataclass(slots=True)
class Counters:
    """Of all sidecars of a process."""

    pushes: int = 0
    acks: int = 0
    heartbeats: int = 0
    stream_bytes: int = 0  # as decrypted: chunks, their frames, heads
    push_bytes: int = 0  # lines of type push
    post_bytes: int = 0
    lost: int = 0  # streams that ended unasked
    dead: int = 0
    registered_again: int = 0
    trouble: dict[str, int] = field(default_factory=dict)

    def complain(self, what: str) -> None:
        if what in self.trouble or len(self.trouble) < 50:
            self.trouble[what] = self.trouble.get(what, 0) + 1


@dataclass(slots=True, eq=False)
class Shared:
    """What the sidecars of a process have in common."""

    loop: Loop
    folder: Path
    trust: str  # PEM
    mesh: tuple[str, int]
    join: tuple[str, int]
    acked: "Callable[[Simulated, float, frozenset[str], int], None]"
    told: "Callable[[Simulated, str], None]"
    counters: Counters = field(default_factory=Counters)
    unverified: ssl.SSLContext = field(default_factory=lambda: _context(None))
    verified: ssl.SSLContext = field(init=False)

    def __post_init__(self) -> None:
        self.verified = _context(self.trust)


def _context(trust: str | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED if trust else ssl.CERT_NONE
    if trust:
        context.load_verify_locations(cadata=trust)
    return context


@dataclass(slots=True)
class _Post:
    data: bytes
    answered: Answered
    again: bool = True


class Simulated:
    def __init__(
        self, shared: Shared, number: int, service: str, address: str, uses: list[str], calls: list[str]
    ) -> None:
        self.shared, self.number, self.service, self.address, self.uses = shared, number, service, address, uses
        self.held: dict[str, str] = {}
        self.versions: dict[str, str] = {}  # the same, as of the last answered push
        self._there: dict[str, bytes] = {}
        self.policy = 0
        self.hello_at = 0.0
        self.in_sync_at = 0.0
        self.healthy = True
        self.registered = False
        self._withdrawing = False
        self._up = False
        self._wanted = False
        self._stream: Connection | None = None
        self._poster: Connection | None = None
        self._posts: deque[_Post] = deque()
        self._post_status = 0
        self._post_body: list[bytes] = []
        self._heard = 0.0
        self._heartbeat_s = 5.0
        self._beating = False
        self._identity: ssl.SSLContext | None = None
        self._key = new_key()
        self._push: list[str] = []
        edges = [[each, 50, 0] for each in (*calls, *uses)]
        self._beats = {
            healthy: post(
                "/v1/heartbeat",
                MESH_NAME,
                _json({"edges": edges, "breakers": [], "healthy": healthy, "reason": "" if healthy else "simulated"}),
            )
            for healthy in (True, False)
        }

    # -- joining

    def join_with(self, token: str, done: Callable[[str], None]) -> None:
        """As a real one does: ask for the roots, trusting nothing; then join, trusting these roots only."""

        def has_roots(status: int, body: bytes) -> None:
            if status != 200:
                done(f"GET /v1/ca: {status} {body[:300]!r}")
                return
            request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
            csr = request.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()
            name = f"host-{self.number}"
            body = _json({"token": token, "csr": csr, "service": self.service, "name": name})
            self._once(shared.verified, shared.join, JOIN_NAME, post("/v1/join", JOIN_NAME, body), joined)

        def joined(status: int, body: bytes) -> None:
            if status != 200:
                done(f"POST /v1/join: {status} {body[:300]!r}")
                return
            self._take(json.loads(body)["certificate"])
            done("")

        shared = self.shared
        self._once(shared.unverified, shared.join, JOIN_NAME, GET_CA, has_roots)

    def _once(
        self, context: ssl.SSLContext, address: tuple[str, int], name: str, request: bytes, answered: Answered
    ) -> None:
        """One request on a connection of its own."""
        status = 0
        body: list[bytes] = []

        def head(number: int) -> None:
            nonlocal status
            status = number

        def end() -> None:
            nonlocal status
            found, status = status, -1
            connection.close()
            answered(found, b"".join(body))

        def closed(reason: str) -> None:
            if status != -1:
                answered(0, reason.encode())

        answers = Answers(head, body.append, end)
        connection = Connection(self.shared.loop, address, context, name, self.address, answers.feed, closed)
        connection.send(request)
        connection.open()

    def _take(self, certificate: str) -> None:
        path = self.shared.folder / f"{self.number}.pem"
        path.touch(0o600)
        path.write_bytes(key_pem(self._key) + certificate.encode())
        self._identity = _context(self.shared.trust)
        self._identity.load_cert_chain(path)
        path.unlink()

    # -- the stream

    def connect(self) -> None:
        self._wanted = True
        self._open_stream()

    def drop(self) -> None:
        """Lose every connection, and open them anew at once."""
        self.hello_at = self.in_sync_at = 0.0
        self._close_poster()
        if self._stream is not None:
            self._stream.close("dropped")

    def stop(self) -> None:
        self._wanted = False
        self._close_poster()
        if self._stream is not None:
            self._stream.close("stopped")

    def _open_stream(self) -> None:
        assert self._identity is not None
        hello = {
            "protocol": [1, 0],
            "version": VERSION,
            "service": self.service,
            "held": self.versions,
            "uses": self.uses,
            "all": False,
            "policy": self.policy,
        }
        self.held = dict(self.versions)
        lines = Lines()

        def data(piece: bytes) -> None:
            for line in lines.feed(piece):
                self._line(line)

        def head(status: int) -> None:
            if status != 200:
                counters.complain(f"POST /v1/stream: {status}")

        def received(piece: bytes) -> None:
            counters.stream_bytes += len(piece)
            try:
                answers.feed(piece)
            except (Broken, ValueError, KeyError) as error:
                counters.complain(f"stream: {type(error).__name__}: {error}")
                stream.close("broken")

        def ended() -> None:
            stream.close("the stream has ended")

        counters = self.shared.counters
        answers = Answers(head, data, ended)
        stream = Connection(
            self.shared.loop, self.shared.mesh, self._identity, MESH_NAME, self.address, received, self._stream_closed
        )
        self._stream = stream
        stream.send(post("/v1/stream", MESH_NAME, _json(hello)))
        stream.open()

    def _stream_closed(self, reason: str) -> None:
        self._stream = None
        self._up = False
        self._push.clear()
        if not self._wanted:
            return
        self.hello_at = self.in_sync_at = 0.0
        if reason == "dropped":
            self._open_stream()
            return
        self.shared.counters.lost += 1
        self.shared.told(self, reason)
        # Not all in the same millisecond, but all within RETRY_S: worse than real ones, which back off.
        self.shared.loop.after(RETRY_S * (0.5 + self.number * 0.618 % 0.5), self._again)

    def _again(self) -> None:
        if self._wanted and self._stream is None:
            self._open_stream()

    def _line(self, line: bytes) -> None:
        self._heard = monotonic()
        if line.startswith(b'{"type":"heartbeat"'):
            return
        message = json.loads(line)
        kind = message["type"]
        if kind == "push":
            self.shared.counters.push_bytes += len(line)
            self._pushed(message)
        elif kind == "hello":
            self.hello_at = self.in_sync_at = monotonic()
            self._up = True
            self._heartbeat_s = message["heartbeat_s"]
            if not self._beating:
                self._beating = True
                self.shared.loop.after(self._heartbeat_s * (self.number * 0.618 % 1), self._beat)
        elif kind == "goodbye" and self._stream is not None:
            self._stream.close("goodbye: " + message.get("reason", ""))

    def _pushed(self, message: Mapping[str, object]) -> None:
        resources = message["resources"]
        assert isinstance(resources, list)
        for each in resources:
            name: str = each["name"]
            if self.held.get(name) != each["version"]:
                self.held[name] = each["version"]
                self._push.append(name)
                if name.startswith("endpoints/"):
                    self._remember(name, each["data"])
        removed = message.get("removed") or []
        assert isinstance(removed, list)
        for name in removed:
            self.held.pop(name, None)
            self._push.append(name)
        if message.get("more"):
            return
        changed = frozenset(self._push)
        self._push.clear()
        policy = int(str(message.get("policy", 0)))
        self.shared.counters.pushes += 1

        def answered(status: int, body: bytes) -> None:
            if status != 200:
                self.shared.counters.complain(f"POST /v1/ack: {status} {body[:200]!r}")
                return
            self.shared.counters.acks += 1
            self.versions = dict(self.held)
            self.policy = max(self.policy, policy)
            self.in_sync_at = monotonic()
            self.shared.acked(self, self.in_sync_at, changed, policy)

        request = post("/v1/ack", MESH_NAME, _json({"nonce": message["nonce"], "rejected": {}}))
        if self._withdrawing and self._identity is not None:
            # The answer to a withdrawal waits for this one, which must not wait for that on the same connection.
            self._once(self._identity, self.shared.mesh, MESH_NAME, request, answered)
        else:
            self.send(request, answered)

    def _remember(self, name: str, endpoints: list[dict[str, object]]) -> None:
        """Remember who of those on loopback, which are the simulated ones, is there: `+` healthy, `-` not."""
        text = " ".join(
            f"{'-' if each.get('healthy') is False else '+'}{each['host']}"
            for each in endpoints
            if str(each["host"]).startswith("127.")
        )
        self._there[name] = text.encode()

    def sees(self, name: str, host: str) -> str:
        """`up`, `down` or `absent`."""
        found = self._there.get(name, b"").decode().split()
        return "up" if "+" + host in found else "down" if "-" + host in found else "absent"

    def _beat(self) -> None:
        if not self._wanted:
            self._beating = False
            return
        self.shared.loop.after(self._heartbeat_s, self._beat)
        if not self._up:
            return
        if monotonic() - self._heard > 3 * self._heartbeat_s:
            self.shared.counters.dead += 1
            if self._stream is not None:
                self._stream.close("no heartbeat")
            return
        self.shared.counters.heartbeats += 1
        self.send(self._beats[self.healthy], self._beaten)

    def _beaten(self, status: int, body: bytes) -> None:
        if status == 410 and self.registered:
            self.shared.counters.registered_again += 1
            self.register(lambda status, body: None)
        elif status not in (200, 410):
            self.shared.counters.complain(f"POST /v1/heartbeat: {status} {body[:200]!r}")

    # -- what changes

    def register(self, answered: Answered) -> None:
        self.registered = True
        self.post(
            "/v1/register",
            {
                "host": self.address,
                "port": PORT,
                "labels": {"version": "1"},
                "ports": {"http": 8000},
                "weight": 1,
                "zone": "",
                "healthy": True,
            },
            answered,
        )

    def withdraw(self, answered: Answered) -> None:
        def done(status: int, body: bytes) -> None:
            self._withdrawing = False
            answered(status, body)

        self.registered, self._withdrawing = False, True
        self.post("/v1/withdraw", {}, done)

    def set_health(self, healthy: bool, answered: Answered) -> None:
        self.healthy = healthy
        self.send(self._beats[healthy], answered)

    # -- posts, one after another on one connection

    def post(self, path: str, data: Mapping[str, object], answered: Answered) -> None:
        self.send(post(path, MESH_NAME, _json(data)), answered)

    def send(self, data: bytes, answered: Answered) -> None:
        self._posts.append(_Post(data, answered))
        if self._poster is None:
            self._open_poster()
        elif len(self._posts) == 1:
            self._poster.send(data)

    def _open_poster(self) -> None:
        assert self._identity is not None
        self._post_status, self._post_body = 0, []
        answers = Answers(self._post_head, self._post_data, self._post_end)

        def received(piece: bytes) -> None:
            self.shared.counters.post_bytes += len(piece)
            answers.feed(piece)

        self._poster = Connection(
            self.shared.loop, self.shared.mesh, self._identity, MESH_NAME, self.address, received, self._poster_closed
        )
        self._poster.send(self._posts[0].data)
        self._poster.open()

    def _close_poster(self) -> None:
        self._posts.clear()
        if self._poster is not None:
            self._poster.close("dropped")

    def _post_head(self, status: int) -> None:
        self._post_status = status

    def _post_data(self, data: bytes) -> None:
        self._post_body.append(data)

    def _post_end(self) -> None:
        done = self._posts.popleft()
        status, body = self._post_status, b"".join(self._post_body)
        self._post_status, self._post_body = 0, []
        if self._posts and self._poster is not None:
            self._poster.send(self._posts[0].data)
        done.answered(status, body)

    def _poster_closed(self, reason: str) -> None:
        self._poster = None
        if not self._posts:
            return
        if self._posts[0].again:  # an idle connection that the server has closed meanwhile
            self._posts[0].again = False
            self._open_poster()
            return
        failed, self._posts = self._posts, deque()
        for each in failed:
            each.answered(0, reason.encode())


def _json(data: object) -> bytes:
    return json.dumps(data, separators=(",", ":")).encode()
