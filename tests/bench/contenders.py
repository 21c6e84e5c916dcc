"""The proxies that are compared, each started on a stage as a path: something to call, and processes to account for.

Every path is ready when its function returns: a request has been answered with 200. A new proxy is compared by adding a
function here and naming it in `rows.py`. Must not know what is measured.
"""

import json
import os
import select
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from certs.authority import bundle_of, create_root, new_key
from certs.files import write_identity
from certs.spiffe import SpiffeId

from . import envoy, policy
from .exchange import Client, answers
from .policy import CALLEE, CALLER, Service
from .stage import HOST, START_LIMIT_S, BenchError, Process, Stage, free_port, until
from .stats import parse_stub_status

SETTLE_S, SETTLE_TRIES_MAX = 0.03, 100
BODY = "0123456789abcdefghijklmnopqrstuvwxyz"  # 36 bytes


@dataclass(frozen=True, slots=True)
class Target:
    """A way to the backend."""

    name: str
    port: int  # where to call
    host: str  # whom to ask for
    proxies: tuple[Process, ...] = ()
    mesh_port: int = 0  # where the callee's side takes mutual TLS


@dataclass(slots=True)
class Backend:
    """An nginx with a small answer."""

    port: int
    status_port: int
    process: Process
    asked: int = 0

    def served(self) -> int:
        """Requests so far on its main port."""
        with Client(self.status_port) as client:
            client.send_head("GET", "/status", HOST, {"Connection": "close"})
            _, length, body = client.read_head()
            while len(body) < length:
                body += client.sock.recv(65536)
        self.asked += 1
        return parse_stub_status(body.decode()) - self.asked

    def settled(self) -> int:
        """The same, once nothing is under way any more: what a stopped client has sent may still arrive."""
        last = self.served()
        for _ in range(SETTLE_TRIES_MAX):
            time.sleep(SETTLE_S)
            now = self.served()
            if now == last:
                break
            last = now
        return last


@dataclass(frozen=True, slots=True)
class Identities:
    """A certificate authority made for this run, and directories of what it has issued."""

    directory: Path

    @classmethod
    def make(cls, directory: Path) -> "Identities":
        now = datetime.now(UTC)
        root = create_root(policy.TRUST_DOMAIN, now)
        issuing = root.issue_authority(now)
        bundle = bundle_of(root)
        for name in (CALLER, CALLEE):
            key = new_key()
            spiffe_id = SpiffeId.for_service(policy.TRUST_DOMAIN, name)
            leaf = issuing.issue_to_key(key.public_key(), spiffe_id, timedelta(hours=12), now)
            write_identity(directory / name, [leaf, *issuing.chain], key, bundle)
        return cls(directory)

    @property
    def caller(self) -> Path:
        return self.directory / CALLER

    @property
    def callee(self) -> Path:
        return self.directory / CALLEE


# -- backends


def _nginx(stage: Stage, name: str, server: str) -> Process:
    folder = stage.folder(name)
    config = folder / "nginx.conf"
    config.write_text(
        f"""
        daemon off; master_process off; worker_processes 1;
        pid {folder}/pid; error_log stderr error; worker_rlimit_nofile 16384;
        events {{ worker_connections 8192; }}
        http {{
          access_log off; keepalive_requests 1000000000; keepalive_timeout 1h;
          client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
          uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
          {server}
        }}
        """
    )
    return stage.start(name, [stage.tools["nginx"], "-p", str(folder), "-e", "stderr", "-c", str(config)])


def backend(stage: Stage) -> Backend:
    port, status_port = free_port(), free_port()
    process = _nginx(
        stage,
        "backend",
        f"""
          server {{ listen {HOST}:{port} backlog=4096; location / {{ return 200 "{BODY}"; }} }}
          server {{ listen {HOST}:{status_port}; location / {{ stub_status; }} }}
        """,
    )
    until(lambda: answers(port, HOST), process, "an answer")
    return Backend(port, status_port, process)


# -- one plain hop


def direct(backend: Backend) -> Target:
    return Target("no proxy", backend.port, HOST)


def nginx_plain(stage: Stage, app_port: int) -> Target:
    port = free_port()
    process = _nginx(
        stage,
        "nginx",
        f"""
          upstream app {{ server {HOST}:{app_port}; keepalive 512; keepalive_requests 1000000000; }}
          server {{
            listen {HOST}:{port} backlog=4096;
            location / {{
              proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection "";
              proxy_set_header Host $host; proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
              proxy_next_upstream error timeout http_503; proxy_next_upstream_tries 3; proxy_read_timeout 10s;
            }}
          }}
        """,
    )
    return _ready(Target("nginx", port, CALLEE, (process,)))


def haproxy_plain(stage: Stage, app_port: int) -> Target:
    port = free_port()
    folder = stage.folder("haproxy-config")
    config = folder / "haproxy.cfg"
    config.write_text(
        f"""
global
  nbthread 1
  maxconn 8192
defaults
  mode http
  timeout client 60s
  timeout server 10s
  timeout connect 5s
  timeout http-request 10s
  retries 2
  retry-on conn-failure empty-response 503
  option forwardfor
  http-reuse always
frontend in
  bind {HOST}:{port} backlog 4096
  unique-id-format %[uuid]
  unique-id-header x-request-id
  acl beta path_beg {policy.BETA_PATH}/
  use_backend beta if beta {{ req.hdr({policy.BETA_HEADER}) 1 }}
  default_backend app
backend beta
  server app {HOST}:{app_port} maxconn {policy.LIMIT}
backend app
  balance leastconn
  server app {HOST}:{app_port} maxconn {policy.LIMIT}
"""
    )
    process = stage.start("HAProxy", [stage.tools["haproxy"], "-db", "-f", str(config)])
    return _ready(Target("HAProxy", port, CALLEE, (process,)))


def envoy_plain(stage: Stage, app_port: int, identities: Identities) -> Target:
    return envoy_out(stage, [plain_service(app_port)], identities, "Envoy")


def pillion_plain(stage: Stage, app_port: int, identities: Identities) -> Target:
    return pillion_out(stage, [plain_service(app_port)], identities)


def plain_service(app_port: int) -> Service:
    return Service(CALLEE, ((HOST, app_port),), mesh=False)


# -- two hops


def pillion_pair(stage: Stage, app_port: int, identities: Identities) -> Target:
    """Application → pillion → mutual TLS → pillion → application."""
    mesh_port = free_port()
    services = [Service(CALLEE, ((HOST, mesh_port),))]
    inbound, _ = _pillion(
        stage,
        "pillion in",
        services,
        [
            *("--service", CALLEE, "--identity", str(identities.callee), "--app", f"{HOST}:{app_port}"),
            *("--inbound", f"{HOST}:{mesh_port}", "--outbound", "off"),
        ],
    )
    outbound = pillion_out(stage, services, identities)
    _refuses(outbound)
    return Target("pillion", outbound.port, CALLEE, (*outbound.proxies, inbound), mesh_port)


def pillion_out(stage: Stage, services: Sequence[Service], identities: Identities) -> Target:
    """The caller's sidecar alone."""
    process, addresses = _pillion(
        stage,
        "pillion out",
        services,
        ["--service", CALLER, "--identity", str(identities.caller), "--inbound", "off", "--outbound", f"{HOST}:0"],
    )
    return _ready(Target("pillion", _port(addresses["outbound"]), CALLEE, (process,)))


def _pillion(
    stage: Stage, name: str, services: Sequence[Service], options: Sequence[str]
) -> tuple[Process, dict[str, str]]:
    command = pillion_command(stage, services)
    ready, write_end = os.pipe()
    try:
        process = stage.start(
            name,
            [*command, *options, "--admin", f"{HOST}:0", "--ready-fd", str(write_end)],
            pass_fds=[write_end],
        )
    finally:
        os.close(write_end)
    try:
        return process, json.loads(_read_line(ready, process))
    finally:
        os.close(ready)


def pillion_command(stage: Stage, services: Sequence[Service]) -> list[str]:
    """The beginning of the command line, with the policy written."""
    folder = stage.folder("policy")
    for number, text in enumerate(policy.pillion(services)):
        (folder / f"{number}.yaml").write_text(text)
    return [stage.tools["pillion"], "sidecar", "--policy", str(folder)]


def _read_line(descriptor: int, process: Process) -> bytes:
    line = b""
    deadline = time.monotonic() + START_LIMIT_S
    while not line.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            raise BenchError(f"{process.name} was not ready after {START_LIMIT_S:g} s; it said:\n{process.said()}")
        data = os.read(descriptor, 65536)
        if not data:
            process.popen.wait(START_LIMIT_S)
            process.check()
        line += data
    return line


def envoy_pair(stage: Stage, app_port: int, identities: Identities, http2: bool, bodies: bool = False) -> Target:
    """The same with Envoy. `bodies`: without deadlines, which in Envoy would end a long body."""
    mesh_port = free_port()
    name = "Envoy HTTP/2" if http2 else "Envoy HTTP/1.1"
    inbound = _envoy(
        stage,
        f"{name} in",
        envoy.inbound(mesh_port, app_port, identities.callee, CALLEE, [CALLER], http2),
        mesh_port,
    )
    services = [Service(CALLEE, ((HOST, mesh_port),))]
    outbound = envoy_out(stage, services, identities, name, envoy.Features(http2=http2, deadlines=not bodies))
    _refuses(outbound)
    return Target(name, outbound.port, CALLEE, (*outbound.proxies, inbound), mesh_port)


def envoy_out(
    stage: Stage,
    services: Sequence[Service],
    identities: Identities,
    name: str = "Envoy",
    features: envoy.Features | None = None,
) -> Target:
    port = free_port()
    config = envoy.outbound(port, services, identities.caller, CALLER, features)
    process = _envoy(stage, f"{name} out", config, port)
    return _ready(Target(name, port, CALLEE, (process,)))


def _envoy(stage: Stage, name: str, config: envoy.Json, port: int) -> Process:
    process = stage.start(name, envoy_command(stage, config))
    until(lambda: _accepts(port), process, "its listener")
    return process


def envoy_command(stage: Stage, config: envoy.Json) -> list[str]:
    file = stage.folder("envoy") / "config.json"
    file.write_text(json.dumps(config))
    options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
    return [stage.tools["envoy"], "-c", str(file), *options]


# -- shared


def _ready(path: Target) -> Target:
    until(lambda: answers(path.port, path.host), path.proxies[0], "an answer with 200")
    return path


def _refuses(target: Target) -> None:
    """Authorization is in force: what no rule allows is refused."""
    with Client(target.port) as client:
        client.send_head("DELETE", "/", target.host)
        status, _, _ = client.read_head()
    if status != 403:
        raise BenchError(f"{target.name} answered {status} to a method that its rules do not allow")


def _accepts(port: int) -> bool:
    try:
        Client(port).close()
    except OSError:
        return False
    return True


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])
