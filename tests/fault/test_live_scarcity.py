"""A sidecar that lacks something, or is given something bad: it says what, and nothing is lost or hangs."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.mesh import Conn, Mesh, Pair, connect, dial, environment, until

HTTP = {"ports": {"http": {"port": 80}}}


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path) as mesh:
        yield mesh


def start(mesh: Mesh, *, policy: str | bytes | None = None, service: str = "web", **options: str) -> tuple[int, str]:
    """Start a sidecar that cannot start: its exit code and what it said on stderr; nothing goes to stdout."""
    path = mesh.path / "mesh.yaml"
    if policy is None:
        policy = "version: 1\nservices: {web: {}}\n"
    path.write_bytes(policy.encode() if isinstance(policy, str) else policy)
    identity = Path(options.pop("identity", "") or mesh.pki.identity(mesh.path, "web"))
    named = {"inbound": "127.0.0.1:0", "outbound": "127.0.0.1:0", "admin": "127.0.0.1:0", **options}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in named.items()]
    began = time.monotonic()
    code, out, err = mesh.run(
        "sidecar", f"--service={service}", f"--policy={path}", f"--identity={identity}", *arguments
    )
    assert time.monotonic() - began < 10
    assert "Traceback" not in err, err
    assert out == ""
    assert "-----BEGIN" not in err
    return code, err


# -- what cannot start


@pytest.mark.parametrize("door", ["inbound", "outbound", "admin"])
def test_a_port_in_use_names_its_holder(mesh: Mesh, door: str) -> None:
    taken = mesh.backend()
    code, err = start(mesh, **{door: str(taken)})
    assert code == 2
    assert str(taken) in err and f"(pid {os.getpid()})" in err


def test_a_local_port_in_use_names_its_holder(mesh: Mesh) -> None:
    taken = mesh.backend()
    code, err = start(
        mesh, policy=f"version: 1\nservices: {{web: {{calls: {{a: {{local_port: {taken.address[1]}}}}}}}, a: {{}}}}\n"
    )
    assert code == 2 and f"(pid {os.getpid()})" in err


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("version: 1\nservices:\n  web: {tiemout: {}}\n", ["mesh.yaml:3:9", "tiemout", "timeout"]),
        ("", ["mesh.yaml"]),
        ("version: 1\nservices: [\n", ["mesh.yaml:"]),
        ("version: 1\nservices: {other: {}}\n", ["web", "other"]),
        (b"version: 1\nservices: {web: {}}\n# \xff\xfe\n", ["mesh.yaml"]),
        ("version: 1\nservices: {web: {filters: [{use: no-such-filter}]}}\n", ["mesh.yaml:2", "no-such-filter"]),
        ("version: 1\nservices: {web: {filters: [{use: 'os.path:join'}]}}\n", ["os.path:join", "--allow-filters"]),
        ("version: 1\nservices: {web: {}}\n" + "x: &a [" + "*a, " * 1000 + "]\n", ["mesh.yaml:3"]),
        ("[" * 100_000, ["mesh.yaml"]),
        ("version: 1\nservices: {web: {}}\n#" + "x" * 20_000_000, ["mesh.yaml"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else repr(value[:60]),
)
def test_a_policy_that_is_invalid_is_refused_with_its_place(mesh: Mesh, policy: str | bytes, words: list[str]) -> None:
    code, err = start(mesh, policy=policy)
    assert code == 2, err
    assert all(word in err for word in words), err


def test_a_policy_that_cannot_be_read(mesh: Mesh) -> None:
    identity = mesh.pki.identity(mesh.path, "web")
    for path, word in ((mesh.path / "absent.yaml", "absent.yaml"), (Path("/proc/self/mem"), "/proc/self/mem")):
        code, _, err = mesh.run(
            "sidecar", "--service=web", f"--policy={path}", f"--identity={identity}", "--inbound=off",
            "--outbound=127.0.0.1:0", "--admin=off",
        )  # fmt: skip
        assert code == 2 and word in err and "Traceback" not in err, err


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("expired", ["cert.pem", "expired"]),
        ("other-ca", ["cert.pem", "bundle.pem"]),
        ("no-spiffe-id", ["cert.pem"]),
        ("two-uris", ["cert.pem"]),
    ],
)
def test_a_certificate_that_is_wrong(mesh: Mesh, fault: str, words: list[str]) -> None:
    code, err = start(mesh, identity=str(mesh.pki.identity(mesh.path, "web", fault=fault)))
    assert code == 2
    assert all(word in err for word in words), err


def test_a_key_that_others_can_read(mesh: Mesh) -> None:
    identity = mesh.pki.identity(mesh.path, "web")
    for mode in (0o644, 0o620):
        (identity / "key.pem").chmod(mode)
        code, err = start(mesh, identity=str(identity))
        assert code == 2 and "chmod 600" in err and "key.pem" in err, err
        (identity / "key.pem").chmod(0o600)


def test_a_key_of_another_certificate(mesh: Mesh) -> None:
    identity = mesh.pki.identity(mesh.path, "web")
    (identity / "key.pem").write_bytes(mesh.pki.leaf("web").key_pem)
    code, err = start(mesh, identity=str(identity))
    assert code == 2 and "key.pem" in err


@pytest.mark.parametrize("name", ["cert.pem", "key.pem", "bundle.pem"])
@pytest.mark.parametrize("content", [None, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_file_of_the_identity_that_is_missing_or_nonsense(mesh: Mesh, name: str, content: bytes | None) -> None:
    identity = mesh.pki.identity(mesh.path, "web")
    (identity / name).unlink()
    if content is not None:
        (identity / name).write_bytes(content)
        (identity / name).chmod(0o600)
    code, err = start(mesh, identity=str(identity))
    assert code == 2 and name in err, err


def test_the_identity_of_another_service(mesh: Mesh) -> None:
    code, err = start(mesh, identity=str(mesh.pki.identity(mesh.path, "admin")))
    assert code == 2 and "spiffe://mesh.local/service/admin" in err and "pillion ca issue --service web" in err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"inbound": "nonsense"}, "nonsense"),
        ({"inbound": "127.0.0.1:99999"}, "99999"),
        ({"outbound": "192.0.2.1:0"}, "192.0.2.1"),
        ({"admin": "0.0.0.0:0"}, "loopback"),
        ({"access_log": "/no/such/directory/log"}, "/no/such/directory"),
        ({"log_level": "loud"}, "loud"),
    ],
)
def test_options_that_cannot_be(mesh: Mesh, options: dict[str, str], word: str) -> None:
    code, err = start(mesh, **options)
    assert code == 2 and word in err, err


# -- what runs short while it serves


def few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def test_a_sidecar_without_descriptors_recovers_and_says_so(mesh: Mesh) -> None:
    app = mesh.backend()
    services = {"web": {}, "a": {"address": [str(app)], "tls": "plain"}}
    web = mesh.sidecar("web", services, inbound=False, preexec=few_descriptors)
    with web.client() as neighbour:
        assert neighbour.get("/", host="a").status == 200
        sockets = []
        for _ in range(100):
            try:
                sockets.append(dial(web.outbound))
            except OSError:
                break
        time.sleep(0.5)
        assert web.alive
        assert neighbour.get("/", host="a").status == 200  # who is in is served
        until(lambda: "Too many open files" in web.log, web.log)
        for sock in sockets:
            sock.close()
    until(lambda: _serves(web.outbound))
    assert web.log.count("Too many open files") == 1  # said once in a while
    assert web.crashes == 0
    assert web.stop() == 0


def _serves(address: str) -> bool:
    try:
        with connect(address) as client:
            return client.get("/", host="a").status == 200
    except Exception:
        return False


def test_a_sidecar_without_descriptors_cannot_connect_and_says_so(mesh: Mesh) -> None:
    app = mesh.backend()
    services = {"web": {}, "a": {"address": [str(app)], "tls": "plain"}}
    web = mesh.sidecar("web", services, inbound=False, preexec=few_descriptors)
    clients = []
    for _ in range(40):
        try:
            clients.append(web.client())
        except OSError:
            break
    answers = []
    for client in clients:
        try:
            client.sock.settimeout(3)
            answers.append(client.get("/", host="a", headers={"connection": "close"}).status)
        except Exception:
            answers.append(0)
    assert 200 in answers
    for client in clients:
        client.close()
    until(lambda: _serves(web.outbound))
    assert web.crashes == 0


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_blocked_stream_stops_nothing(mesh: Mesh, stream: str) -> None:
    """Nobody reads the pipe: lines are dropped and counted, requests go on, and the end is not held up."""
    app = mesh.backend()
    files = mesh.path / "blocked"
    files.mkdir()
    policy = files / "mesh.yaml"
    mesh.write_policy(policy, {"web": {}, "a": {"address": [str(app)], "tls": "plain"}}, {})
    identity = mesh.pki.identity(files, "web")
    ready, tell = os.pipe()
    full, end = os.pipe()
    os.set_blocking(end, False)
    try:
        while True:
            os.write(end, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(end, True)
    command = mesh.command(
        "web", policy, identity, f"--ready-fd={tell}", "--access-log=stdout", "--log-level=debug", inbound="off"
    )
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: end}
    process = subprocess.Popen(command, pass_fds=[tell], stdin=subprocess.DEVNULL, env=environment(), **streams)  # type: ignore[call-overload]
    try:
        os.close(tell)
        addresses = json.loads(os.read(ready, 10_000))
        with connect(addresses["outbound"]) as client:
            for _ in range(3000):
                assert client.get("/", host="a").status == 200
            for _ in range(20):
                assert client.get("/", host="nowhere").status == 404
        if stream == "stdout":
            text = _admin(addresses["admin"], "/metrics")
            dropped = re.search(r'pillion_log_lines_dropped_total\{log="access"\} (\S+)', text)
            assert dropped is not None
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()
        for descriptor in (ready, full, end):
            os.close(descriptor)


def _admin(address: str, path: str) -> str:
    import urllib.request

    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://{address}{path}") as answer:
        return str(answer.read().decode())


def test_a_full_disk_under_the_access_log_stops_nothing(mesh: Mesh) -> None:
    app = mesh.backend()
    services = {"web": {}, "a": {"address": [str(app)], "tls": "plain"}}
    web = mesh.sidecar("web", services, inbound=False, options=["--access-log=/dev/full"])
    with web.client() as client:
        for _ in range(50):
            assert client.get("/", host="a").status == 200
    until(lambda: web.metric("pillion_log_lines_dropped_total", log="access") > 0)
    assert web.stop() == 0


# -- how it ends


def test_a_second_signal_ends_at_once(mesh: Mesh) -> None:
    app = mesh.backend(lambda conn: (conn.take(), conn.sock.recv(1), None)[-1])
    web = mesh.sidecar("web", {"web": {}, "a": {"address": [str(app)], "tls": "plain"}}, app=app)
    with web.client() as client:
        client.request("GET", "/", "a")
        until(lambda: app.requests)
        web.process.send_signal(signal.SIGTERM)
        until(lambda: "draining" in web.log)
        time.sleep(0.1)
        assert web.alive
        began = time.monotonic()
        web.process.send_signal(signal.SIGTERM)
        web.process.wait(5)
        assert time.monotonic() - began < 2
        assert client.closed()
    assert "Traceback" not in web.log


def test_a_request_in_flight_finishes_before_the_end(mesh: Mesh) -> None:
    import threading

    go = threading.Event()

    def slow(conn: Conn) -> None:
        conn.take()
        go.wait(10)
        conn.reply(200, b"done")

    pair = Pair(mesh, script=slow)
    with pair.client() as client, pair.reviews.mesh_client() as idle:
        client.request("GET", "/")
        until(lambda: pair.app.requests)
        pair.reviews.process.send_signal(signal.SIGTERM)
        assert idle.closed()
        time.sleep(0.3)
        go.set()
        response = client.response()
        assert (response.status, response.body) == (200, b"done")
        assert pair.reviews.process.wait(15) == 0
        assert client.get("/").reason == "connect_failed"


def test_killed_it_leaves_its_ports_free(mesh: Mesh) -> None:
    web = mesh.sidecar("web", {"web": {}}, inbound=False)
    with web.client() as client:
        client.get("/", host="nowhere")
        web.process.kill()
        web.process.wait()
    host, _, port = web.outbound.rpartition(":")
    with socket.create_server((host, int(port))):
        pass
