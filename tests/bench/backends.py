"""What stands behind the proxies: an nginx that answers with a few bytes and counts, for HTTP/1.1 or for gRPC.

Also the ways to see that a path to it works. Must not know the proxies.
"""

import subprocess
import sys
import time
from dataclasses import dataclass

from .exchange import Client, answers
from .grpc_call import ANSWER
from .stage import HOST, START_LIMIT_S, BenchError, Process, Stage, free_port, until
from .stats import parse_stub_status

SETTLE_S, SETTLE_TRIES_MAX = 0.03, 100
TENANT_PATH = "/tenant"  # answers with the header field that a filter has set
BODY = b"0123456789abcdefghijklmnopqrstuvwxyz"  # 36 bytes


@dataclass(frozen=True, slots=True)
class Target:
    """A way to the backend."""

    name: str
    port: int  # where to call
    host: str  # whom to ask for
    proxies: tuple[Process, ...] = ()
    mesh_port: int = 0  # where the callee's side takes mutual TLS
    grpc: bool = False
    path: str = "/"


@dataclass(slots=True)
class Backend:
    """An nginx with a small answer."""

    port: int
    status_port: int
    process: Process
    body_bytes: int
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


def nginx(stage: Stage, name: str, server: str) -> Process:
    folder = stage.folder(name)
    config = folder / "nginx.conf"
    text = f"""
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
    config.write_text(text, encoding="latin-1")  # the bytes of a gRPC message as they are
    return stage.start(name, [stage.tools["nginx"], "-p", str(folder), "-e", "stderr", "-c", str(config)])


def backend(stage: Stage) -> Backend:
    return _backend(stage, BODY, "", f'location = {TENANT_PATH} {{ return 200 "$http_x_tenant"; }}')


def grpc_backend(stage: Stage) -> Backend:
    """A gRPC server as far as any client can see, at the cost of a static answer: HTTP/2, a message, trailers.

    What passes nginx's filter for server-side includes loses its content-length, which gRPC servers do not send.
    """
    say = "default_type application/grpc; add_trailer grpc-status 0; ssi on; ssi_types application/grpc;"
    return _backend(stage, ANSWER, "http2", f"http2_max_concurrent_streams 512; {say}")


def _backend(stage: Stage, body: bytes, protocol: str, settings: str) -> Backend:
    port, status_port = free_port(), free_port()
    process = nginx(
        stage,
        "backend",
        f"""
          server {{
            listen {HOST}:{port} {protocol} backlog=4096; {settings}
            location / {{ return 200 "{body.decode("latin-1")}"; }}
          }}
          server {{ listen {HOST}:{status_port}; location / {{ stub_status; }} }}
        """,
    )
    found = Backend(port, status_port, process, len(body))
    ready(Target("the backend", port, HOST, (process,), grpc=bool(protocol)))
    return found


def direct(backend: Backend, grpc: bool = False) -> Target:
    return Target("no proxy", backend.port, HOST, grpc=grpc)


def ready(target: Target) -> Target:
    """Once a request has been answered with 200, or a call of grpcio with OK."""
    if target.grpc:
        _called(target)
    else:
        until(lambda: answers(target.port, target.host), target.proxies[0], "an answer with 200")
    return target


def _called(target: Target) -> None:
    command = [sys.executable, "-m", "tests.bench.grpc_check", str(target.port), target.host, str(START_LIMIT_S)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=2 * START_LIMIT_S)
    target.proxies[0].check()
    if done.returncode:
        said = "\n".join(f"{proxy.name} said:\n{proxy.said()}" for proxy in target.proxies)
        raise BenchError(f"{target.name}: {done.stderr.strip()[-1000:]}\n{said}")
