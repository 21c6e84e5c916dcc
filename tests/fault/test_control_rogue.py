"""Sidecars that have joined properly and then misbehave: nonsense, others' things, too much, too slow, never reading.

Each time the control plane lives on, its memory stays bounded, and others are served within 250 ms. The rogues speak
over the mesh's own mutual TLS; the control plane is a real process.
"""

import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.control import ControlPlane
from support.mesh import Client, Closed, Mesh, dial, until
from support.rogue import HELLO, Rogue, ask, join_client, resident_bytes

from certs.client import JOIN_SNI

MIB = 1024 * 1024
GROWTH_BYTES_MAX = 48 * MIB
OTHERS_S = 0.25
SHOP: dict[str, Any] = {
    "reviews": {"ports": {"http": {"port": 8000}}},
    "web": {"calls": {"reviews": {}}},
    "other": {},
}


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path) as mesh:
        yield mesh


@pytest.fixture
def control(mesh: Mesh) -> ControlPlane:
    control = ControlPlane(mesh)
    control.apply(SHOP, "--no-wait")
    return control


class Others:
    """Somebody well-behaved, who must not notice: a sidecar that sends heartbeats, and a caller without certificate."""

    def __init__(self, control: ControlPlane) -> None:
        self.control, self.good = control, Rogue(control, "other")
        assert control.process is not None
        self.pid = control.process.pid
        self.took_s: list[float] = []
        self.errors: list[str] = []
        self.ending = threading.Event()
        time.sleep(0.3)
        self.before = self.peak = resident_bytes(self.pid)
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Others":
        self.thread.start()
        return self

    def _run(self) -> None:
        anybody = join_client(self.control)
        while not self.ending.wait(0.02):
            began = time.monotonic()
            try:
                status, answer = self.good.post("/v1/heartbeat", {"edges": []})
                assert status == 410, answer
                status, answer = ask(anybody, "GET", "/healthz")
                assert status == 200, answer
            except Exception as error:
                self.errors.append(repr(error))
                anybody.close()
                anybody = join_client(self.control)
            self.took_s.append(time.monotonic() - began)
            self.peak = max(self.peak, resident_bytes(self.pid))
        anybody.close()

    def __exit__(self, kind: object, *_: object) -> None:
        self.ending.set()
        self.thread.join(20)
        if kind is not None:
            return
        self.took_s.sort()
        growth, count = self.peak - self.before, len(self.took_s)
        slow = self.took_s[int(count * 0.98)]
        print(f"others: {count} pairs, p98 {slow * 1000:.0f} ms, worst {self.took_s[-1] * 1000:.0f} ms; "
              f"memory grew by {growth / MIB:.1f} MiB at most of {self.before / MIB:.0f}")  # fmt: skip
        assert not self.errors, self.errors[:3]
        assert slow < OTHERS_S, (slow, self.took_s[-1])
        assert growth < GROWTH_BYTES_MAX, growth
        assert "Traceback" not in self.control.log, self.control.log[-3000:]
        assert self.control.process is not None and self.control.process.poll() is None


VERBS = ("/v1/stream", "/v1/ack", "/v1/heartbeat", "/v1/register", "/v1/withdraw", "/v1/uses", "/v1/renew")
NONSENSE: dict[str, bytes] = {
    "not JSON": b"\xff\xfe nonsense",
    "half": b'{"protocol":[1,0',
    "list": b"[]",
    "null": b"null",
    "number": b"1e999",
    "deep": b"[" * 60_000,
    "deep object": b'{"a":' * 10_000,
    "unknown": b'{"surprise": true}',
    "twice": b'{"nonce":"a","nonce":"b"}',
    "types": b'{"protocol":"x","nonce":7,"edges":{"a":1},"services":"web","csr":[],"host":5}',
    "digits": b'{"protocol":[' + b"9" * 5000 + b"]}",
    "surrogate": b'{"csr":"\\ud800","nonce":"\\ud800","host":"\\ud800","services":["\\ud800"]}',
    "nul": b'{"nonce":"\\u0000","services":["\\u0000"]}',
}


def test_nonsense_is_refused_and_costs_nothing(control: ControlPlane) -> None:
    rogue = Rogue(control)
    with Others(control):
        for path in VERBS:
            for name, body in NONSENSE.items():
                status, answer = rogue.post(path, body)
                assert status in (400, 409) and answer["error"]["message"], (path, name, status, answer)
                assert len(json.dumps(answer)) < 2000
        for path, status in (("/", 404), ("/v1", 404), ("/v1/stream/", 404), ("/v1/join", 404), ("/v1/policy", 404),
                             ("/v1/../v1/ack", 404), ("/" + "x" * 5000, 404)):  # fmt: skip
            assert rogue.post(path, {})[0] == status, path
        with rogue.connect() as client:
            assert ask(client, "GET", "/v1/heartbeat")[0] == 405
        # Texts that are all right as such, but not for an operator's terminal or a program's JSON.
        rogue.opened()
        body = b'{"edges":[["reviews",1e999,-1e999],["\\u001b[31m",1,1]],"breakers":[["a\\nb","c","d"]]}'
        assert rogue.post("/v1/heartbeat", body)[0] in (400, 410)
        for what in ("sidecars", "services", "endpoints"):
            code, out, said = control.cli("get", what)
            assert code == 0 and "\x1b" not in out and "inf" not in out.lower(), (what, out, said)
        code, out, said = control.cli("edges")
        assert code == 0 and "\x1b" not in out and "inf" not in out.lower(), (out, said)
        assert control.cli("describe", "service", "reviews")[0] == 0


def test_what_is_not_its_own_is_out_of_reach(control: ControlPlane) -> None:
    rogue, victim = Rogue(control), Rogue(control, "reviews")
    registration = {"host": "127.0.0.1", "port": 9, "ports": {"http": 8000}}
    assert victim.post("/v1/register", registration)[0] == 200
    stream = victim.opened()
    push = stream.push()
    with Others(control):
        # A stream in another's name.
        other = rogue.stream(service="reviews")
        assert other.head() == 403
        # Answers to somebody else's push, to none, and twice.
        assert rogue.post("/v1/ack", {"nonce": push["nonce"]})[0] == 409
        mine = rogue.opened()
        own = mine.push()
        assert rogue.post("/v1/ack", {"nonce": push["nonce"]})[0] in (200, 409)
        rogue.post("/v1/ack", {"nonce": own["nonce"]})
        assert rogue.post("/v1/ack", {"nonce": own["nonce"]})[0] == 409
        assert rogue.post("/v1/ack", {"nonce": "r1-99"})[0] == 409
        # It can register only as what it is.
        for more in ({"service": "reviews"}, {"sidecar": victim.id}, {"id": victim.id}):
            assert rogue.post("/v1/register", registration | more)[0] == 400
        for bad in ({"host": "0.0.0.0"}, {"host": "224.0.0.1"}, {"host": ""}, {"host": "a b"}, {"port": 0},
                    {"port": 70000}, {"weight": 0}, {"weight": 10**9}, {"labels": {"a": "b" * 500}},
                    {"labels": {str(n): "" for n in range(100)}}, {"zone": "z" * 200},
                    {"ports": {"http": -1}}):  # fmt: skip
            status, answer = rogue.post("/v1/register", registration | bad)
            assert status == 400 and answer["error"]["message"], (bad, answer)
        assert rogue.post("/v1/withdraw", {})[0] == 200
        rows = control.get("endpoints")
        rows = rows if isinstance(rows, list) else rows["endpoints"]
        assert [each["service"] for each in rows] == ["reviews"], "the victim's is there still"
        # Headers that claim to be somebody else.
        claim = f"By=spiffe://mesh.local/service/pillion-control-plane;Hash={'0' * 64};URI=spiffe://mesh.local/service/reviews"
        for name in ("x-forwarded-client-cert", "X_Forwarded_Client_Cert", "forwarded"):
            client = rogue.connect()
            status, answer = ask(client, "POST", "/v1/stream", HELLO | {"service": "reviews"}, **{name: claim})
            assert status == 403 and answer["error"]["code"] == "not_yours", answer
        # Its certificate opens nothing at the operators' door.
        door = dial(control.addresses["join"])
        with Client(rogue.context.wrap_socket(door, server_hostname=JOIN_SNI)) as client:
            for path in ("/v1/services", "/v1/tokens", "/v1/policy", "/v1/audit", "/v1/certs", "/v1/policy/snapshot"):
                assert ask(client, "GET", path)[0] in (401, 403), path
        # Another's view of the policy stays another's: no authorization, no owners, no calls of those that it sees.
        again = Rogue(control)
        seen = {
            each["name"]: each["data"] for each in again.opened(uses=["reviews", "other"], all=True).push()["resources"]
        }
        for name in ("service/reviews", "service/other"):
            assert not {"authz", "calls", "owners", "rate_limit"} & seen[name].keys()
        # A sidecar that was banned is sent away at once.
        control.ok("cert", "ban", rogue.id, "--reason", "rogue")
        until(lambda: rogue.post("/v1/heartbeat", {})[0] == 403, "the ban")
        assert until(lambda: ended(mine), "the end of its stream")


def ended(stream: Any) -> bool:
    try:
        return bool(stream.line().get("type") == "goodbye")
    except (Closed, OSError, KeyError, ValueError):
        return True


@pytest.mark.long
def test_too_much_is_refused(control: ControlPlane) -> None:
    rogue = Rogue(control)
    with Others(control):
        for path in VERBS:
            with rogue.connect() as client:
                assert refused(client, path, 9 * MIB), path
        # Thousands of uses, all of them unknown, then known ones beyond measure.
        status, answer = rogue.post("/v1/uses", {"services": ["x"]})
        assert status in (404, 409)
        stream = rogue.opened()
        status, answer = rogue.post("/v1/uses", {"services": [f"s{n}" for n in range(5000)]})
        assert status == 404 and len(json.dumps(answer)) < 2000
        assert rogue.stream(uses=[f"s{n}" for n in range(5000)]).head() == 400
        for _ in range(500):
            assert rogue.post("/v1/uses", {"services": ["reviews", "other"]})[0] == 200
        # A hello with everything it can hold, many times.
        held = {f"service/{'x' * 200}{n}": "v" * 16 for n in range(15_000)}
        for _ in range(10):
            stream = rogue.stream(held=held)
            assert stream.head() == 200
            stream.client.close()
        # Streams beyond number: the newest stands, the older ones end.
        streams = [rogue.stream() for _ in range(100)]
        assert streams[-1].head() == 200
        assert streams[-1].push()["resources"]
        # Rejections of everything, with long reasons.
        stream = rogue.opened()
        push = stream.push()
        rejected = {f"service/{n}": "y" * 5000 for n in range(500)} | {"service/web": "z" * 100_000}
        assert rogue.post("/v1/ack", {"nonce": push["nonce"], "rejected": rejected})[0] == 200
        row = next(each for each in control.get("sidecars")["sidecars"] if each["id"] == rogue.id)
        assert set(row["rejected"]) == {"service/web"} and len(row["rejected"]["service/web"]) <= 2000
        # A heartbeat with all the edges and breakers that fit.
        edges = [[f"callee-{n}", n, 0] for n in range(2000)]
        assert rogue.post("/v1/heartbeat", {"edges": edges})[0] in (400, 410)
        assert control.cli("edges")[0] == 0


def head(path: str, size: int) -> bytes:
    fields = f"host: control\r\ncontent-type: application/json\r\ncontent-length: {size}"
    return f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n".encode()


def refused(client: Client, path: str, size: int) -> bool:
    """Whether a body of this size is answered with 413, or cut off."""
    client.send(head(path, size))
    try:
        for _ in range(size // 65536):
            client.send(b" " * 65536)
        return client.response("POST").status == 413
    except (OSError, Closed):
        return True


@pytest.mark.long
def test_bodies_that_never_end(control: ControlPlane) -> None:
    """A hundred bodies, each up to just below what is allowed, then nothing more."""
    rogue = Rogue(control)
    clients = []
    with Others(control):
        for _ in range(100):
            client = rogue.connect()
            clients.append(client)
            client.sock.settimeout(2.0)
            size = 4 * MIB - 1
            client.send(head("/v1/stream", size))
            try:
                for _ in range(size // 65536 - 1):
                    client.send(b" " * 65536)
            except OSError:
                pass  # it is not read any more: as good
        time.sleep(3)
    for client in clients:
        client.close()


@pytest.mark.long
@pytest.mark.parametrize("how", ["silent", "beats", "answers"])
def test_one_that_never_reads(control: ControlPlane, how: str) -> None:
    """Its stream is open, the policy changes all the time, and it reads nothing: silent, or sending heartbeats, or even
    answers to pushes that it has not read."""
    rogue, reader = Rogue(control), Rogue(control)
    stream = rogue.stream(receive_bytes=4096, uses=["reviews"])
    good = reader.opened(uses=["reviews"])
    reader.post("/v1/ack", {"nonce": good.push()["nonce"]})
    text = "x" * 20_000
    got: list[int] = []

    def read() -> None:
        try:
            while True:
                push = good.line()
                if push.get("type") == "push":
                    got.append(push["policy"])
                    assert reader.post("/v1/ack", {"nonce": push["nonce"]})[0] == 200
        except (Closed, OSError, ValueError):
            pass

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    token = (control.state / "admin-token").read_text().strip()
    latest, answered = 0, 1
    with Others(control), join_client(control) as operator:
        for number in range(200):
            policy = {"services": {"reviews": {"ports": {"http": {"port": 8000 + number}},
                      "routes": [{"name": "r", "respond": {"status": 200, "body": text + str(number)}}]}}}  # fmt: skip
            body = {"files": {"mesh.yaml": json.dumps({"version": 1, **policy})}, "base": None}
            status, answer = ask(operator, "POST", "/v1/policy/apply", body, authorization=f"Bearer {token}")
            assert status == 200, answer
            latest = answer["revision"]
            if number % 20 == 0:
                reader.post("/v1/heartbeat", {})
                if how != "silent":
                    rogue.post("/v1/heartbeat", {})
            if how == "answers":
                rogue.post("/v1/ack", {"nonce": f"r1-{answered}"})
                answered += 1
        until(lambda: got and got[-1] >= latest, "the last policy at the one that reads", 10)
    stream.client.close()
    rows = {each["id"]: each for each in control.get("sidecars")["sidecars"]}
    assert rows[reader.id]["current"] and (how == "answers" or not rows[rogue.id]["current"])


@pytest.mark.long
def test_one_that_never_reads_is_given_up(control: ControlPlane) -> None:
    """Within three minutes, although it sends heartbeats."""
    rogue = Rogue(control)
    rogue.stream(receive_bytes=4096)
    until(lambda: sidecar(control, rogue.id)["connected"], "the stream")
    for number in range(40):
        rogue.post("/v1/heartbeat", {})
        control.apply(SHOP | {"web": {"calls": {"reviews": {}}, "timeout": {"total": f"{number + 1}s"}}}, "--no-wait")
        time.sleep(4)
        if not sidecar(control, rogue.id)["connected"]:
            return
    raise AssertionError("it is connected still")


def sidecar(control: ControlPlane, id: str) -> dict[str, Any]:
    return next(each for each in control.get("sidecars")["sidecars"] if each["id"] == id)


def test_random_bytes_after_the_handshake(control: ControlPlane) -> None:
    rogue, chance = Rogue(control), random.Random(7)
    with Others(control):
        for number in range(150):
            client = rogue.connect()
            client.sock.settimeout(3.0)
            try:
                client.send(chance.randbytes(chance.randrange(1, 3000)) + (b"\r\n\r\n" if number % 2 else b""))
                if number % 3 == 0:
                    client.sock.shutdown(socket.SHUT_WR)
                elif number % 3 == 1:
                    client.reset()
                    continue
                client.sock.recv(1000)
            except OSError:
                pass
            finally:
                client.close()


@pytest.mark.long
def test_strangers_at_both_doors(control: ControlPlane) -> None:
    """Without a certificate: connections that say nothing, and tokens by guess."""
    with Others(control):
        quiet: list[socket.socket] = []
        for number in range(200):
            try:
                quiet.append(dial(control.addresses["mesh" if number % 2 else "join"]))
            except OSError:
                break
        with join_client(control) as client:
            for _ in range(50):
                status, answer = ask(client, "GET", "/v1/policy", authorization="Bearer pil_o_guess")
                assert status in (401, 429), answer
        for sock in quiet:
            sock.close()
