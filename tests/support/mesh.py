"""A mesh of real processes for tests: identities, policy files, sidecars, scripted backends and raw clients.

    with Mesh(tmp_path) as mesh:
        app = mesh.backend()                                       # an HTTP/1.1 application, or any script
        reviews = mesh.sidecar("reviews", {"reviews": {}}, app=app)
        web = mesh.sidecar("web", {"web": {}, "reviews": {"address": [reviews.inbound]}})
        with web.client() as client:
            assert client.get("/", host="reviews").status == 200

All of it is synchronous: backends run in threads, sidecars in processes of their own, and every wait has a limit.
Whatever was started through a Mesh is gone when it closes.
"""

import http.client
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from support.pki import Pki

WAIT_S = 15.0
PILLION = (sys.executable, "-P", "-c", "import sys; from control_plane.cli import main; sys.exit(main())")
RESET = struct.pack("ii", 1, 0)
Address = tuple[str, int]
Headers = list[tuple[bytes, bytes]]


def until(true: Callable[[], Any], what: str = "a condition", limit_s: float = WAIT_S) -> Any:
    """Poll until something holds; its value."""
    deadline = time.monotonic() + limit_s
    while True:
        value = true()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {limit_s:g} s in vain for {what}"
        time.sleep(0.005)


def missing(what: str) -> NoReturn:
    """Skip for want of something on this machine, but never where everything must be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, and CI=true does not allow to skip")
    pytest.skip(f"{what} is not installed")


def tool(name: str) -> str:
    return shutil.which(name) or missing(name)


# -- messages on the wire, read strictly


class Closed(Exception):
    """The peer ended the connection in the middle of something, or before it began."""


class Reader:
    """Reads messages off a socket. Every wait is bounded by the socket's timeout."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.held = bytearray()
        self.ended = False

    def fill(self) -> bool:
        data = self.sock.recv(262144)
        self.held += data
        self.ended = self.ended or not data
        return bool(data)

    def until(self, mark: bytes) -> bytes:
        while True:
            at = self.held.find(mark)
            if at >= 0:
                data = bytes(self.held[: at + len(mark)])
                del self.held[: at + len(mark)]
                return data
            if not self.fill():
                raise Closed(f"after {bytes(self.held[:200])!r}")

    def exactly(self, size: int) -> bytes:
        while len(self.held) < size:
            if not self.fill():
                raise Closed(f"after {len(self.held)} of {size} bytes")
        data = bytes(self.held[:size])
        del self.held[:size]
        return data

    def discard(self, size: int) -> None:
        """As `exactly`, without keeping the bytes."""
        while size > 0:
            if not self.held and not self.fill():
                raise Closed(f"{size} bytes early")
            taken = min(size, len(self.held))
            del self.held[:taken]
            size -= taken

    def rest(self) -> bytes:
        """Everything up to the peer's clean end."""
        while self.fill():
            pass
        data = bytes(self.held)
        self.held.clear()
        return data

    def head(self) -> tuple[bytes, Headers]:
        lines = self.until(b"\r\n\r\n")[:-4].split(b"\r\n")
        return lines[0], _fields(lines[1:])

    def chunked(self) -> tuple[bytes, Headers]:
        parts = []
        while True:
            size = int(self.until(b"\r\n")[:-2].partition(b";")[0], 16)
            if not size:
                break
            parts.append(self.exactly(size))
            assert self.exactly(2) == b"\r\n"
        trailers = []
        while line := self.until(b"\r\n")[:-2]:
            trailers.append(line)
        return b"".join(parts), _fields(trailers)


def _fields(lines: Iterable[bytes]) -> Headers:
    fields = []
    for line in lines:
        name, colon, value = line.partition(b":")
        assert colon and name, line
        fields.append((name.lower(), value.strip()))
    return fields


class Fields:
    """Shared by both kinds of message."""

    headers: Headers

    def all(self, name: str) -> list[bytes]:
        return [value for each, value in self.headers if each == name.encode()]

    def header(self, name: str) -> bytes | None:
        values = self.all(name)
        assert len(values) <= 1, (name, values)
        return values[0] if values else None


class Request(Fields):
    """What a backend received. `connection` numbers the connection it came on, from 0."""

    def __init__(self, line: bytes, headers: Headers, connection: int) -> None:
        self.method, self.target, self.version = line.split(b" ")
        self.headers, self.connection = headers, connection
        self.body = b""
        self.trailers: Headers = []
        self.time = time.monotonic()

    def __repr__(self) -> str:
        return f"<{self.method.decode()} {self.target.decode()} on {self.connection}>"


class Response(Fields):
    """What a client received."""

    def __init__(self, line: bytes, headers: Headers) -> None:
        self.version, status, self.phrase = (line + b" ").split(b" ", 2)
        self.status = int(status)
        self.headers = headers
        self.body = b""
        self.trailers: Headers = []
        self.informational: list[Response] = []

    @property
    def reason(self) -> str:
        """The word of `x-pillion-reason`, "" without."""
        return (self.header("x-pillion-reason") or b"").decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def __repr__(self) -> str:
        return f"<{self.status} {self.reason} {self.body[:80]!r}>"


# -- clients


class Client:
    """A raw HTTP/1.1 client on one connection, plain or TLS."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(WAIT_S)
        self.sock = sock
        self.reader = Reader(sock)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def shut(self) -> None:
        """Half-close."""
        self.sock.shutdown(socket.SHUT_WR)

    def request(
        self,
        method: str,
        target: str,
        host: str = "reviews",
        headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
        body: bytes | None = None,
    ) -> None:
        fields = list(headers.items() if isinstance(headers, Mapping) else headers)
        if body is not None:
            fields.append(("content-length", str(len(body))))
        lines = "".join(f"{name}: {value}\r\n" for name, value in [("host", host), *fields])
        self.send(f"{method} {target} HTTP/1.1\r\n{lines}\r\n".encode() + (body or b""))

    def response(self, method: str = "GET", *, body: bool = True) -> Response:
        """The next final response, with the informational ones before it."""
        reader, early = self.reader, []
        while True:
            line, headers = reader.head()
            response = Response(line, headers)
            if response.status >= 200 or response.status == 101:
                break
            early.append(response)
        response.informational = early
        if body:
            self._read_body(response, method)
        return response

    def _read_body(self, response: Response, method: str) -> None:
        reader = self.reader
        if method == "HEAD" or response.status in (101, 204, 304):
            return
        length = response.header("content-length")
        if response.header("transfer-encoding") == b"chunked":
            assert length is None
            response.body, response.trailers = reader.chunked()
        elif length is not None:
            response.body = reader.exactly(int(length))
        else:
            response.body = reader.rest()

    def get(self, target: str, host: str = "reviews", **more: Any) -> Response:
        self.request("GET", target, host, **more)
        return self.response()

    def post(self, target: str, body: bytes = b"", host: str = "reviews", **more: Any) -> Response:
        self.request("POST", target, host, body=body, **more)
        return self.response("POST")

    def closed(self, limit_s: float = 5.0) -> bool:
        """Whether the peer ends or resets the connection, with nothing more to read, within the limit."""
        self.sock.settimeout(limit_s)
        try:
            return not self.reader.held and self.sock.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True
        finally:
            self.sock.settimeout(WAIT_S)


def connect(address: str | Address, **options: Any) -> Client:
    return Client(dial(address, **options))


def dial(address: str | Address, receive_bytes: int | None = None, source: str | None = None) -> socket.socket:
    """A connected socket; `source` is the address that it comes from."""
    if isinstance(address, str):
        host, _, port = address.rpartition(":")
        address = (host, int(port))
    sock = socket.socket()
    try:
        if receive_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        if source is not None:
            sock.bind((source, 0))
        sock.settimeout(WAIT_S)
        sock.connect(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


# -- scripted backends


class Conn(Client):
    """A backend's end of one connection."""

    def __init__(self, sock: socket.socket, number: int, backend: "Backend") -> None:
        super().__init__(sock)
        self.number, self.backend = number, backend

    def head_of_request(self) -> Request:
        """The next request's head; it counts as received from here on."""
        line, headers = self.reader.head()
        request = Request(line, headers, self.number)
        self.backend.requests.append(request)
        return request

    def take(self) -> Request:
        """The next request, whole."""
        request = self.head_of_request()
        if request.header("transfer-encoding") is not None:
            request.body, request.trailers = self.reader.chunked()
        else:
            request.body = self.reader.exactly(int(request.header("content-length") or 0))
        self.backend.complete.append(request)
        return request

    def reply(self, status: int = 200, body: bytes = b"", headers: Sequence[tuple[str, str]] = ()) -> None:
        self.send(response_bytes(status, body, headers))


def response_bytes(status: int = 200, body: bytes = b"", headers: Sequence[tuple[str, str]] = ()) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n{lines}\r\n".encode() + body


Script = Callable[[Conn], None]


def echo(conn: Conn) -> None:
    """The usual application: says what it received. `/status/N` answers with that status."""
    while True:
        request = conn.take()
        target = request.target.decode()
        found = re.search(r"/status/(\d{3})", target)
        seen = {
            "method": request.method.decode(),
            "target": target,
            "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in request.headers],
            "trailers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in request.trailers],
            "body": request.body.decode("latin-1"),
            "connection": request.connection,
        }
        body = b"" if request.method == b"HEAD" else json.dumps(seen).encode()
        conn.reply(int(found[1]) if found else 200, body)


class Backend:
    """A server whose script a test may change at any time; each connection runs the script of its moment in a thread.

    `requests` are the heads received, `complete` the requests that were whole; `count` is the number of connections.
    What the script raises, other than the end of the connection, is in `failures`, and fails the test at the end."""

    def __init__(self, script: Script = echo, path: Path | None = None) -> None:
        """`path`: of the Unix socket to listen on, in place of a port of loopback."""
        self.script = script
        if path is None:
            self.sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
            self.address: Address = self.sock.getsockname()
        else:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.bind(str(path))
            self.sock.listen(1024)
            self.address = (f"unix:{path}", 0)
        self.count = 0
        self.requests: list[Request] = []
        self.complete: list[Request] = []
        self.failures: list[BaseException] = []
        self.conns: set[Conn] = set()
        self.closing = False
        threading.Thread(target=self._accept, daemon=True).start()

    def __str__(self) -> str:
        return f"{self.address[0]}:{self.address[1]}" if self.address[1] else self.address[0]

    @property
    def open(self) -> int:
        return len(self.conns)

    def clear(self, script: Script | None = None) -> None:
        """Forget what was received, and follow another script."""
        self.requests, self.complete, self.count = [], [], 0
        if script is not None:
            self.script = script

    def end_connections(self) -> None:
        for conn in list(self.conns):
            try:
                conn.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.sock.accept()
            except OSError:
                return
            if self.closing:
                sock.close()
                return
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            conn = Conn(sock, self.count, self)
            self.count += 1
            self.conns.add(conn)
            threading.Thread(target=self._run, args=(conn, self.script), daemon=True).start()

    def _run(self, conn: Conn, script: Script) -> None:
        conn.sock.settimeout(120)
        try:
            script(conn)
        except (Closed, OSError):
            pass
        except BaseException as exc:
            self.failures.append(exc)
        finally:
            conn.close()
            self.conns.discard(conn)

    def stop(self) -> None:
        self.closing = True
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.sock.close()
        self.end_connections()


# -- sidecars


class Sidecar:
    """One running sidecar process."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", files: Path, policy: Path, identity: Path, mesh: "Mesh"
    ) -> None:
        self.process, self.policy_file, self.identity, self.mesh = process, policy, identity, mesh
        self.log_file, self.out_file, self.access_file = files / "log", files / "out", files / "access.jsonl"
        self.addresses: dict[str, str] = {}
        self.services: dict[str, Any] = {}
        self.document: dict[str, Any] = {}

    @property
    def inbound(self) -> str:
        return self.addresses["inbound"]

    @property
    def outbound(self) -> str:
        return self.addresses["outbound"]

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def client(self, **options: Any) -> Client:
        """A plain connection to the outbound side."""
        return connect(self.outbound, **options)

    def mesh_socket(
        self,
        caller: str | None = "web",
        *,
        port: str = "http",
        service: str | None = None,
        alpn: str | None = "http/1.1",
        fault: str | None = None,
        sni: str | None = None,
        source: str | None = None,
    ) -> ssl.SSLSocket:
        """A mutual-TLS connection to the inbound side, whatever the caller is. Raises OSError where refused."""
        context = self.mesh.client_context(caller, fault, alpn)
        name = sni if sni is not None else f"{port}.{service or self.name}.mesh"
        sock = dial(self.inbound, source=source)
        try:
            return context.wrap_socket(sock, server_hostname=name or None, suppress_ragged_eofs=False)
        except BaseException:
            sock.close()
            raise

    def mesh_client(self, caller: str | None = "web", **options: Any) -> Client:
        return Client(self.mesh_socket(caller, **options))

    @property
    def name(self) -> str:
        return str(self.document["own"])

    def admin(self, path: str) -> Any:
        host, _, port = self.addresses["admin"].rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=WAIT_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        assert answer.status == 200, (path, answer.status, data)
        return json.loads(data) if "json" in (answer.getheader("content-type") or "") else data.decode()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels."""
        total = 0.0
        for line in self.admin("/metrics").splitlines():
            match = re.match(r"([a-z0-9_]+)(?:\{(.*)\})? (\S+)", line)
            if match and match[1] == name:
                found = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
                if all(found.get(key) == value for key, value in labels.items()):
                    total += float(match[3])
        return total

    def connections(self, side: str, direction: str) -> float:
        """Open connections: side "in" or "out", direction "down" (the caller's) or "up"."""
        return self.metric("pillion_connections", side=side, direction=direction)

    @property
    def crashes(self) -> float:
        return self.metric("pillion_crashes_total")

    def access(self) -> list[dict[str, Any]]:
        """The access log so far; its writer runs behind."""
        try:
            return [json.loads(line) for line in self.access_file.read_text().splitlines()]
        except FileNotFoundError:
            return []

    def logged(self, **wanted: Any) -> dict[str, Any]:
        """The last line of the access log with these fields, waited for."""

        def last() -> dict[str, Any] | None:
            found = [line for line in self.access() if all(line.get(key) == value for key, value in wanted.items())]
            return found[-1] if found else None

        return until(last, f"an access log line with {wanted}")  # type: ignore[no-any-return]

    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    def page_faults(self) -> int:
        """Pages that the kernel has had to find for it so far (`minflt` in proc_pid_stat(5))."""
        return int(Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[7])

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def apply(self, services: Mapping[str, Any] | None = None, **levels: Any) -> None:
        """Write the policy anew and wait until it is in force: what is not stated stays."""
        before, failed = self.reloads(), self.reloads("failed")
        self.write(services, **levels)
        self.process.send_signal(signal.SIGHUP)
        until(lambda: self.reloads() > before or self.reloads("failed") > failed, "the new policy")
        assert self.reloads("failed") == failed, self.log

    def write(self, services: Mapping[str, Any] | None = None, **levels: Any) -> None:
        self.services.update(services or {})
        self.document.update(levels)
        self.mesh.write_policy(self.policy_file, self.services, self.document)

    def reloads(self, result: str = "ok") -> float:
        return self.metric("pillion_policy_reloads_total", result=result)

    def stop(self, limit_s: float = 30.0) -> int:
        if self.alive:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(limit_s)


class _Dumper(yaml.SafeDumper):
    """Without anchors, which a policy file may not have."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class Mesh:
    """Everything that one test, or one module of tests, starts."""

    def __init__(self, tmp_path: Path, pki: Pki | None = None) -> None:
        self.path = tmp_path
        self.pki = pki or Pki()
        self.stack = ExitStack()
        self.backends: list[Backend] = []
        self.sidecars: list[Sidecar] = []
        self.contexts: dict[tuple[str | None, str | None, str | None], ssl.SSLContext] = {}
        self.number = 0

    def __enter__(self) -> "Mesh":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.close()
        if kind is None:
            failures = [failure for backend in self.backends for failure in backend.failures]
            assert not failures, failures
            crashed = [sidecar.log for sidecar in self.sidecars if "Traceback" in sidecar.log]
            assert not crashed, "\n".join(crashed)

    def close(self) -> None:
        """End everything, surely."""
        self.stack.close()
        for sidecar in self.sidecars:
            if sidecar.alive:
                sidecar.process.kill()
            sidecar.process.wait()
        for backend in self.backends:
            backend.stop()

    def backend(self, script: Script = echo, path: Path | None = None) -> Backend:
        backend = Backend(script, path)
        self.backends.append(backend)
        return backend

    def dead_address(self) -> str:
        """An address of loopback at which nobody listens, and nobody will while the mesh lives."""
        sock = socket.socket()
        self.stack.callback(sock.close)
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"

    def client_context(self, caller: str | None, fault: str | None, alpn: str | None) -> ssl.SSLContext:
        key = (caller, fault, alpn)
        context = self.contexts.get(key)
        if context is None:
            context = self.contexts[key] = self.pki.client_context(caller, fault=fault)
            if alpn is not None:
                context.set_alpn_protocols([alpn])
        return context

    @staticmethod
    def write_policy(path: Path, services: Mapping[str, Any], levels: Mapping[str, Any]) -> None:
        document = {"version": 1, "services": dict(services)}
        document.update({key: value for key, value in levels.items() if key in ("defaults", "enforced")})
        fresh = path.with_suffix(".new")
        fresh.write_text(yaml.dump(document, Dumper=_Dumper, sort_keys=False))
        fresh.replace(path)

    def command(
        self,
        service: str,
        policy: Path,
        identity: Path,
        *options: str,
        app: "Backend | str | Mapping[str, Backend | str] | None" = None,
        inbound: str = "127.0.0.1:0",
        outbound: str = "127.0.0.1:0",
        admin: str = "127.0.0.1:0",
    ) -> list[str]:
        apps = {"": app} if isinstance(app, Backend | str) else app or {}
        named = [f"--app={port + '=' if port else ''}{where}" for port, where in apps.items()]
        return [
            *PILLION, "sidecar", f"--service={service}", f"--policy={policy}", f"--identity={identity}",
            f"--inbound={inbound}", f"--outbound={outbound}", f"--admin={admin}", *named, *options,
        ]  # fmt: skip

    def sidecar(
        self,
        service: str,
        services: Mapping[str, Any],
        *,
        app: "Backend | str | Mapping[str, Backend | str] | None" = None,
        inbound: bool = True,
        outbound: bool = True,
        options: Sequence[str] = (),
        preexec: Callable[[], None] | None = None,
        stdout: Any = None,
        **levels: Any,
    ) -> Sidecar:
        """Start a sidecar and wait until it is ready."""
        self.number += 1
        files = self.path / f"{service}-{self.number}"
        files.mkdir()
        policy = files / "mesh.yaml"
        identity = self.pki.identity(files, service)
        self.write_policy(policy, services, levels)
        access = f"--access-log={files / 'access.jsonl'}"
        ready, tell = os.pipe()
        command = self.command(
            service, policy, identity, access, f"--ready-fd={tell}", *options, app=app,
            inbound="127.0.0.1:0" if inbound else "off", outbound="127.0.0.1:0" if outbound else "off",
        )  # fmt: skip
        try:
            with open(files / "log", "wb") as log, open(files / "out", "wb") as out:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=stdout or out, stderr=log,
                    pass_fds=[tell], preexec_fn=preexec, env=environment(), cwd=files,
                )  # fmt: skip
        finally:
            os.close(tell)
        sidecar = Sidecar(process, files, policy, identity, self)
        sidecar.services, sidecar.document = dict(services), {"own": service, **levels}
        self.sidecars.append(sidecar)
        try:
            line = read_line(ready)
        finally:
            os.close(ready)
        assert line, f"the sidecar of {service} did not start:\n{sidecar.log}"
        sidecar.addresses = json.loads(line)
        return sidecar

    def run(self, *args: str, limit_s: float = WAIT_S, **options: Any) -> tuple[int, str, str]:
        """Run `pillion …` to its end: exit code, stdout, stderr."""
        done = subprocess.run(
            [*PILLION, *args], stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, env=environment(),
            cwd=self.path, **options,
        )  # fmt: skip
        return done.returncode, done.stdout.decode(), done.stderr.decode()


class Pair:
    """The usual two: the sidecar of `web` (outbound) before that of `reviews` (inbound), which has a scripted
    application. `reviews` is what the policy says of that service; `services` are further ones, known to both."""

    def __init__(
        self,
        mesh: Mesh,
        reviews: Mapping[str, Any] | None = None,
        services: Mapping[str, Any] | None = None,
        *,
        script: Script = echo,
        calls: Mapping[str, Any] | None = None,
        apps: Mapping[str, str] | None = None,
        options: Sequence[str] = (),
        **levels: Any,
    ) -> None:
        self.mesh = mesh
        self.app = mesh.backend(script)
        service = {"ports": {"http": {"port": 80}}, **(reviews or {})}
        others = dict(services or {})
        all_apps: dict[str, Backend | str] = {"": self.app, **(apps or {})}
        self.reviews = mesh.sidecar(
            "reviews",
            {"web": {}, "reviews": service, **others},
            app=all_apps,
            outbound=False,
            options=options,
            **levels,
        )
        caller = {"web": {"calls": dict(calls or {})}, "reviews": {**service, "address": [self.reviews.inbound]}}
        self.web = mesh.sidecar("web", {**caller, **others}, inbound=False, options=options, **levels)

    def fresh(self, script: Script = echo) -> Backend:
        """The application with an empty memory, for the next test; connections to it that are idle are ended."""
        self.app.clear(script)
        self.app.end_connections()
        until(lambda: not self.app.open, "the end of the application's connections")
        return self.app

    def client(self, **options: Any) -> Client:
        return self.web.client(**options)


def free_port() -> int:
    """A port that was free a moment ago, for what cannot take port 0."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def free_ports(count: int) -> list[int]:
    """The same for several, no two of them alike."""
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in socks]


def environment() -> dict[str, str]:
    """Ours, without what would steer a sidecar or a client."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PILLION_") and not name.lower().endswith("_proxy")
    }


def read_line(descriptor: int, limit_s: float = WAIT_S) -> bytes:
    """One line from a pipe; b"" where the other end closed or time is up."""
    data = b""
    deadline = time.monotonic() + limit_s
    while not data.endswith(b"\n"):
        readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        piece = os.read(descriptor, 65536) if readable else b""
        if not piece:
            return b""
        data += piece
    return data
