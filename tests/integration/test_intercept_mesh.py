"""Two machines, an unmodified curl, an unmodified server, a sidecar on each: what arrives, and what is on the wire.

The control for every claim of "nothing in clear text" is `test_the_wire_is_really_watched`.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.netns import Namespace, capture, require_root, wired

from sidecar.intercept.destinations import join

pytestmark = pytest.mark.root

PILLION = [sys.executable, "-c", "import sys; from control_plane.cli import main; sys.exit(main())"]
ROOT = Path(__file__).resolve().parents[2]
SECRET = b"the reviews are in: five stars of five"
BANNER = b"220 ready when you are"
OUTSIDE = b"a server that is not of the mesh"
INBOUND, ADMIN = 15006, 15090
CLEAR = (SECRET, BANNER, b"GET /", b"HTTP/1.", b"secret.txt", b"curl/")

POLICY = """
version: 1
services:
  web: {{}}
  reviews:
    ports:
      api: {{port: 8000, protocol: http}}
      talk: {{port: 7000, protocol: tcp}}
    address: ["{address}"]
    authz: {{allow: [{{from: [web]}}]}}
"""

# Speaks first, then says everything again, until the client has no more to say.
TALKER = f"""
import socket, threading
listener = socket.create_server(("127.0.0.1", 7000))
def talk(client):
    client.sendall({BANNER!r} + b"\\n")
    while data := client.recv(65536):
        client.sendall(data.upper())
    client.close()
while True:
    threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()
"""

# Asks past the client's interception, by the mark, and prints what comes back.
KNOCK = """
import socket, sys
client = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
client.setsockopt(socket.SOL_SOCKET, 36, 0x70696C)
client.settimeout(10)
client.connect((sys.argv[1], int(sys.argv[2])))
client.sendall(b"GET /secret.txt HTTP/1.0\\r\\nHost: reviews\\r\\n\\r\\n")
try:
    answer = client.makefile("rb").read()
except ConnectionResetError:
    answer = b""
print(answer.decode() or "closed without an answer")
"""


def pillion(where: Namespace, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = where.run([*PILLION, *arguments], env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done


@dataclass
class Mesh:
    """`client` runs curl beside the sidecar of web, `server` the servers beside that of reviews."""

    client: Namespace
    server: Namespace
    host: str  # the server's address, of the family under test
    folder: Path
    sidecars: dict[str, subprocess.Popen[bytes]]

    def start(self, service: str, *arguments: str) -> None:
        """A sidecar with interception, once it is ready."""
        where = self.client if service == "web" else self.server
        command = [*PILLION, "sidecar", "--service", service, "--policy", str(self.folder / "mesh.yaml")]
        command += ["--identity", str(self.folder / service), "--admin", f"127.0.0.1:{ADMIN}", "--intercept"]
        log = self.folder / f"{service}.log"
        process = where.start([*command, *arguments], log=log, env={"PYTHONPATH": str(ROOT)})
        self.sidecars[service] = process
        where.listening(ADMIN)
        again = ["--retry", "50", "--retry-all-errors", "--retry-delay", "0", "--retry-max-time", "15"]
        ready = where.run(["curl", "-sf", *again, "-o", "/dev/null", f"http://127.0.0.1:{ADMIN}/readyz"])
        assert ready.returncode == 0 and process.poll() is None, log.read_text()

    def stop(self, service: str, how: int = signal.SIGTERM) -> None:
        where = self.client if service == "web" else self.server
        where.end(self.sidecars.pop(service), how)

    def curl(self, host: str, port: int, path: str = "secret.txt") -> subprocess.CompletedProcess[str]:
        url = f"http://[{host}]:{port}/{path}" if ":" in host else f"http://{host}:{port}/{path}"
        return self.client.run(["curl", "-sS", "--fail-with-body", "--max-time", "10", url])

    def metric(self, name: str) -> float:
        """The sum of all series whose name contains this, at the client's sidecar."""
        done = self.client.run(["curl", "-sS", f"http://127.0.0.1:{ADMIN}/metrics"])
        lines = [
            line for line in done.stdout.splitlines() if name in line.partition("{")[0] and not line.startswith("#")
        ]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def logs(self) -> str:
        return "\n".join(file.read_text() for file in self.folder.glob("*.log"))


@pytest.fixture(scope="module", params=["ipv4", "ipv6"])
def mesh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    require_root("nft", "ss", "tcpdump", "curl")
    folder = tmp_path_factory.mktemp("mesh")
    with wired() as (client, server):
        host = server.ipv4 if request.param == "ipv4" else server.ipv6
        pillion(client, "ca", "init", "--dir", str(folder / "ca"))
        for service in ("web", "reviews"):
            pillion(
                client, "ca", "issue", "--service", service, "--dir", str(folder / "ca"), "--out", str(folder / service)
            )
        (folder / "mesh.yaml").write_text(POLICY.format(address=join((host, INBOUND))))
        for name, content in (("inside", SECRET), ("outside", OUTSIDE)):
            (folder / name).mkdir()
            (folder / name / "secret.txt").write_bytes(content)
        http = [sys.executable, "-m", "http.server", "--directory"]
        server.start([*http, str(folder / "inside"), "--bind", "127.0.0.1", "8000"], log=folder / "server.log")
        server.start([*http, str(folder / "outside"), "--bind", "::", "9000"], log=folder / "outside.log")
        server.start([sys.executable, "-c", TALKER], log=folder / "talker.log")
        for port in (8000, 9000, 7000):
            server.listening(port)
        mesh = Mesh(client, server, host, folder, {})
        mesh.start("reviews")
        mesh.start("web")
        yield mesh
        for service in list(mesh.sidecars):
            mesh.stop(service)


def test_curl_reaches_the_server_and_nothing_is_in_clear_text(mesh: Mesh) -> None:
    with capture(mesh.client) as wire:
        done = mesh.curl(mesh.host, 8000)
    assert (done.returncode, done.stdout) == (0, SECRET.decode()), done.stderr + mesh.logs()
    carried = wire.to_port(INBOUND)
    # A record of TLS, of a handshake or of a connection that was there already.
    assert carried and all(stream[:3] in (b"\x16\x03\x01", b"\x17\x03\x03") for stream in carried)
    assert not wire.to_port(8000)
    assert not [text for text in CLEAR if wire.holds(text)]


def test_tcp_with_a_server_that_speaks_first(mesh: Mesh) -> None:
    talk = (
        "import socket, sys; c = socket.create_connection((sys.argv[1], 7000), 10); f = c.makefile('rb');"
        "print(f.readline().decode(), end=''); c.sendall(b'hello\\n'); c.shutdown(1); print(f.read().decode(), end='')"
    )
    with capture(mesh.client) as wire:
        done = mesh.client.run([sys.executable, "-c", talk, mesh.host])
    assert done.stdout == BANNER.decode() + "\nHELLO\n", done.stderr + mesh.logs()
    assert not [text for text in (*CLEAR, b"hello", b"HELLO") if wire.holds(text)]
    assert wire.to_port(INBOUND) and not wire.to_port(7000)


def test_the_wire_is_really_watched(mesh: Mesh) -> None:
    """An unknown destination is passed through, in clear text, and counted."""
    before = mesh.metric("passthrough")
    with capture(mesh.client) as wire:
        done = mesh.curl(mesh.host, 9000)
    assert (done.returncode, done.stdout) == (0, OUTSIDE.decode()), done.stderr + mesh.logs()
    assert wire.holds(OUTSIDE) and wire.holds(b"GET /secret.txt") and wire.to_port(9000)
    assert mesh.metric("passthrough") == before + 1


def test_whoever_has_no_sidecar_does_not_get_in(mesh: Mesh) -> None:
    """Past the client's interception by its mark: the server's interception leads to mutual TLS all the same."""
    done = mesh.client.run([sys.executable, "-c", KNOCK, mesh.host, "8000"])
    assert done.stdout == "closed without an answer\n", done.stdout + done.stderr
    allowed = mesh.client.run([sys.executable, "-c", KNOCK, mesh.host, "9000"])
    assert OUTSIDE.decode() in allowed.stdout, "the mark does lead past the client's interception"


def test_the_sidecars_own_port_is_refused_as_a_destination(mesh: Mesh) -> None:
    done = mesh.curl("::1" if ":" in mesh.host else "127.0.0.1", 15001)
    assert done.returncode != 0
    assert "no_route" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("prepare", "run", "says"),
    [
        ("true", "setpriv --bounding-set -net_admin,-net_raw", "--exclude-uid 0"),
        ("nft add table inet pillion '{ chain precious { } ; }'", "env", "that pillion did not make"),
        ("mount --bind /dev/null $(readlink -f $(command -v nft))", "env", "the program nft was not found"),
    ],
)
def test_a_sidecar_that_cannot_intercept_does_not_start(mesh: Mesh, prepare: str, run: str, says: str) -> None:
    require_root("unshare", "setpriv")
    script = f'ip link set lo up && {prepare} && exec {run} "$@"'
    command = [*PILLION, "sidecar", "--service", "web", "--policy", str(mesh.folder / "mesh.yaml"), "--admin", "off"]
    command += ["--identity", str(mesh.folder / "web"), "--intercept"]
    isolated = ["unshare", "-n", "-m", "sh", "-c", script, "sh", *command]
    done = mesh.client.run(isolated, env={"PYTHONPATH": str(ROOT)}, timeout_s=20)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and "help:" in done.stderr and "Traceback" not in done.stderr


def test_it_fails_closed_and_comes_back_after_a_kill(mesh: Mesh) -> None:
    """kill -9, and somebody edits the ruleset meanwhile: the next start puts it right."""
    process = mesh.sidecars["web"]
    pids = mesh.client.run(["ss", "-Htlnp", f"sport = :{ADMIN}"]).stdout
    assert f"pid={process.pid}" in pids, pids
    mesh.stop("web", signal.SIGKILL)
    with capture(mesh.client) as wire:
        for port in (8000, 9000):
            assert mesh.curl(mesh.host, port).returncode == 7, "refused at once"
    assert not wire.streams
    assert mesh.client.run(["nft", "flush chain inet pillion output"]).returncode == 0
    mesh.start("web")
    assert mesh.curl(mesh.host, 8000).stdout == SECRET.decode()
    shown = json.loads(pillion(mesh.client, "intercept", "show", "-o", "json").stdout)
    assert shown["outbound"]["connections"] >= 1


def test_strict_refuses_what_it_does_not_know(mesh: Mesh) -> None:
    mesh.stop("web")
    mesh.start("web", "--strict")
    try:
        with capture(mesh.client) as wire:
            refused = mesh.curl(mesh.host, 9000)
        assert refused.returncode != 0 and OUTSIDE.decode() not in refused.stdout
        assert not wire.to_port(9000)
        assert f"unknown destination {join((mesh.host, 9000))}" in (mesh.folder / "web.log").read_text()
        assert mesh.curl(mesh.host, 8000).stdout == SECRET.decode(), mesh.logs()
    finally:
        mesh.stop("web")
        mesh.start("web")
