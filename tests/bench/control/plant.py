"""What a run consists of: the store, the control plane, the processes of the swarm, and an operator.

Real processes, all on loopback, all gone at the end (see `stage`). Must not know what is measured.
"""

import http.client
import json
import os
import queue
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ..stage import HOST, BenchError, Process, Stage, free_port, until
from .plan import Plan
from .sidecar import JOIN_NAME

ANSWER_LIMIT_S = 120.0
READY_LIMIT_S = 60.0
TRUST_DOMAIN = "bench.local"


# -- the control plane and its store


@dataclass(slots=True)
class ControlPlane:
    """One that can be killed and started again on the same ports and the same state."""

    stage: Stage
    store: str  # embedded | etcd
    folder: Path
    mesh: tuple[str, int]
    join: tuple[str, int]
    process: Process
    store_process: Process | None
    started_s: float = 0.0

    def kill(self) -> None:
        self.stage.end([self.process])

    def start(self) -> float:
        """Until it is ready, in seconds."""
        self.process, self.started_s = _start(self.stage, self.folder, self.store_url, self.mesh, self.join)
        return self.started_s

    @property
    def store_url(self) -> str:
        return (self.folder / "store-url").read_text()

    @property
    def trust(self) -> str:
        return (self.folder / "ca" / "bundle.pem").read_text()

    def operator(self) -> "Operator":
        return Operator(self.join, self.trust, (self.folder / "admin-token").read_text().strip())

    def cpu_s(self) -> float:
        return self.process.cpu_s()

    def store_cpu_s(self) -> float:
        return self.store_process.cpu_s() if self.store_process else 0.0


def start_control_plane(stage: Stage, store: str) -> ControlPlane:
    folder = stage.folder("control-plane-state")
    made = subprocess.run(
        [stage.tools["pillion"], "ca", "init", "--dir", str(folder / "ca"), "--trust-domain", TRUST_DOMAIN],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        raise BenchError(f"pillion ca init: {made.stderr}")
    store_process = None
    url = "embedded"
    if store == "etcd":
        store_process, url = _start_etcd(stage)
    (folder / "store-url").write_text(url)
    mesh, join = (HOST, free_port()), (HOST, free_port())
    process, seconds = _start(stage, folder, url, mesh, join)
    return ControlPlane(stage, store, folder, mesh, join, process, store_process, seconds)


def _start(stage: Stage, folder: Path, url: str, mesh: tuple[str, int], join: tuple[str, int]) -> tuple[Process, float]:
    token = folder / "admin-token"
    reader, writer = os.pipe()
    begun = time.monotonic()
    try:
        process = stage.start(
            "control plane",
            [
                *(stage.tools["pillion"], "control-plane", "--store", url, "--state-dir", str(folder / "state")),
                *("--listen-mesh", f"{mesh[0]}:{mesh[1]}", "--listen-join", f"{join[0]}:{join[1]}"),
                *("--ca", str(folder / "ca"), "--ready-fd", str(writer), "--log-level", "warning"),
                *([] if token.exists() else ["--admin-token-file", str(token)]),
            ],
            pass_fds=[writer],
        )
    finally:
        os.close(writer)
    os.set_blocking(reader, False)

    def ready() -> bool:
        try:
            return bool(os.read(reader, 65536))
        except BlockingIOError:
            return False

    try:
        until(ready, process, "readiness", READY_LIMIT_S)
    finally:
        os.close(reader)
    return process, time.monotonic() - begun


def _start_etcd(stage: Stage) -> tuple[Process, str]:
    folder = stage.folder("etcd-data")
    port, peer = free_port(), free_port()
    process = stage.start(
        "etcd",
        [
            *(stage.tools["etcd"], "--name", "bench", "--data-dir", str(folder)),
            *("--listen-client-urls", f"http://{HOST}:{port}", "--advertise-client-urls", f"http://{HOST}:{port}"),
            *("--listen-peer-urls", f"http://{HOST}:{peer}", "--initial-advertise-peer-urls", f"http://{HOST}:{peer}"),
            *("--initial-cluster", f"bench=http://{HOST}:{peer}"),
        ],
    )

    def answers() -> bool:
        client = http.client.HTTPConnection(HOST, port, timeout=1)
        try:
            client.request("GET", "/health")
            return client.getresponse().status == 200
        except OSError:
            return False
        finally:
            client.close()

    until(answers, process, "an answer")
    return process, f"etcd://{HOST}:{port}"


# -- the operator


class _Pinned(http.client.HTTPSConnection):
    """To an address, by the name that the control plane goes by in its mesh."""

    def __init__(self, address: tuple[str, int], context: ssl.SSLContext) -> None:
        super().__init__(JOIN_NAME, address[1], timeout=ANSWER_LIMIT_S, context=context)
        self._address, self._tls = address, context

    def connect(self) -> None:
        raw = socket.create_connection(self._address, ANSWER_LIMIT_S)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = self._tls.wrap_socket(raw, server_hostname=JOIN_NAME)


class Operator:
    """The operator API, over one connection."""

    def __init__(self, address: tuple[str, int], trust: str, token: str) -> None:
        context = ssl.create_default_context(cadata=trust)
        context.check_hostname = False  # its name is a SPIFFE ID; the roots are the run's own
        self._connection = _Pinned(address, context)
        self._headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}

    def ask(self, method: str, path: str, data: object = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        for attempt in (1, 2):
            try:
                self._connection.request(method, path, body, self._headers)
                response = self._connection.getresponse()
                answer = response.read()
                break
            except (http.client.HTTPException, OSError):
                self._connection.close()
                if attempt == 2:
                    raise
        if response.status != 200:
            raise BenchError(f"{method} {path}: {response.status} {answer[:2000].decode(errors='replace')}")
        return json.loads(answer)

    def apply(self, files: Mapping[str, str]) -> Any:
        return self.ask("POST", "/v1/policy/apply", {"files": files, "base": None, "prune": False, "dry_run": False})


# -- the swarm


class _Member:
    """One process of the swarm, and the answers that it gives."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self._answers: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self.ready: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            data = json.loads(line)
            if "id" not in data:
                self.ready.put(data)
            else:
                self.queue_of(data.pop("id")).put(data)

    def queue_of(self, number: int) -> "queue.SimpleQueue[dict[str, Any]]":
        with self._lock:
            return self._answers.setdefault(number, queue.SimpleQueue())

    def tell(self, data: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(data) + "\n")
        self.process.stdin.flush()

    def take(self, number: int, limit_s: float) -> dict[str, Any]:
        try:
            return self.queue_of(number).get(timeout=limit_s)
        except queue.Empty:
            raise BenchError(f"the swarm has not answered within {limit_s:g} s") from None


@dataclass(frozen=True, slots=True)
class Answered:
    """Who has answered for what was watched, and when."""

    times: tuple[float, ...]
    missing: tuple[int, ...]

    @property
    def last(self) -> float:
        return max(self.times, default=float("nan"))


class Swarm:
    """All simulated sidecars, in some processes."""

    def __init__(self, stage: Stage, plan: Plan, control_plane: ControlPlane, processes: int) -> None:
        self.plan, self._numbers = plan, count()
        self._members: list[_Member] = []
        for first in range(processes):
            log = (stage.folder("swarm") / "log").open("wb")
            with log:
                popen = subprocess.Popen(
                    [sys.executable, "-m", "tests.bench.control.swarm"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
            # The stage kills it, at the latest.
            stage.processes.append(Process(f"swarm {first}", popen, Path(log.name)))  # type: ignore[arg-type]
            member = _Member(popen)
            settings = {
                "sizes": asdict(plan.sizes),
                "first": first,
                "of": processes,
                "trust": control_plane.trust,
                "mesh": control_plane.mesh,
                "join": control_plane.join,
            }
            member.tell(settings)
            member.ready.get(timeout=READY_LIMIT_S)
            self._members.append(member)

    def ask(self, do: str, within_s: float = ANSWER_LIMIT_S, **what: Any) -> list[dict[str, Any]]:
        """Of all, at once."""
        number = next(self._numbers)
        for member in self._members:
            member.tell({"id": number, "do": do, **what})
        return [member.take(number, within_s) for member in self._members]

    def change(self, sidecar: int, what: str) -> dict[str, Any]:
        """The answer to one sidecar's request."""
        return self.begin_change(sidecar, what)()

    def begin_change(self, sidecar: int, what: str) -> Callable[[], dict[str, Any]]:
        number = next(self._numbers)
        member = self._members[sidecar % len(self._members)]
        member.tell({"id": number, "do": "change", "sidecar": sidecar, "what": what})

        def answer() -> dict[str, Any]:
            found = member.take(number, ANSWER_LIMIT_S)
            if found["status"] != 200:
                raise BenchError(f"{what} by sidecar {sidecar}: {found['status']} {found['body']}")
            return found

        return answer

    def watch(
        self, resource: str, sidecars: Sequence[int], host: str = "", state: str = "", limit_s: float = 30.0
    ) -> Callable[[], Answered]:
        """From now on; the result waits until all have answered, or the limit has passed."""
        number = next(self._numbers)
        for member in self._members:
            member.tell(
                {
                    "id": number,
                    "do": "watch",
                    "resource": resource,
                    "sidecars": list(sidecars),
                    "host": host,
                    "state": state,
                    "limit_s": limit_s,
                }
            )
        for member in self._members:
            member.take(number, ANSWER_LIMIT_S)

        def wait() -> Answered:
            found = [member.take(number, limit_s + 10.0) for member in self._members]
            return Answered(
                tuple(at for each in found for _, at in each["answered"]),
                tuple(one for each in found for one in each["missing"]),
            )

        return wait

    def synced(self, limit_s: float = 120.0) -> tuple[float, float]:
        """Wait until all have a stream and nothing is pushed any more: the last hello, the last answer."""
        found = self.ask("synced", within_s=limit_s + 10.0, limit_s=limit_s)
        out = sum(each["out_count"] for each in found)
        if out:
            lost = [each["lost_for"] for each in self.ask("count")]
            raise BenchError(f"{out} sidecars have no stream after {limit_s:g} s; they lost theirs for {lost}")
        return max(at for each in found for at in each["hellos"][-1:]), max(each["last"] for each in found)

    def count(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for each in self.ask("count"):
            for key, value in each.items():
                if isinstance(value, int | float):
                    total[key] = total.get(key, 0) + value
        return total

    def trouble(self) -> dict[str, int]:
        """What went wrong, and why streams were lost; how often."""
        found: dict[str, int] = {}
        for each in self.ask("count"):
            lost = {f"a stream was lost: {why}": number for why, number in each["lost_for"].items()}
            for what, number in (each["trouble"] | lost).items():
                found[what] = found.get(what, 0) + number
        return found
