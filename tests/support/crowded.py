"""Two sidecars under attack: another client that goes on all the while, and the numbers that must hold meanwhile."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from support.mesh import Mesh, Pair, Sidecar

MIB = 1024 * 1024
GROWTH_BYTES_MAX = 16 * MIB
LATENCY_S = 0.25 if "PYTEST_XDIST_WORKER" not in os.environ else 1.0  # other tests run beside this one
DESCRIPTORS = 16384


# In a process of its own, so that what the crowd costs this one does not count: an application that answers at once,
# and a client that asks for it every few milliseconds between two lines on stdin, and then says how that was.
NEIGHBOUR = """
import json, socket, sys, threading, time

def serve(conn):
    data = b""
    while piece := conn.recv(65536):
        data += piece
        while b"\\r\\n\\r\\n" in data:
            data = data.partition(b"\\r\\n\\r\\n")[2]
            conn.sendall(b"HTTP/1.1 200 OK\\r\\nContent-Length: 5\\r\\n\\r\\nquick")

def accept():
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

def measure(going):
    seen = {"count": 0, "worst_s": 0.0, "p99_s": 0.0, "wrong": []}
    times = []
    with socket.create_connection((host, int(port)), 20) as sock:
        while not going.wait(0.005):
            began = time.monotonic()
            sock.sendall(b"GET /quick HTTP/1.1\\r\\nHost: quick.reviews\\r\\n\\r\\n")
            answer = b""
            while not answer.endswith(b"quick"):
                piece = sock.recv(65536)
                answer += piece
                if not piece or b"x-pillion-reason" in answer:
                    seen["wrong"].append(answer.decode())
                    return seen
            times.append(time.monotonic() - began)
            seen["count"] += 1
    times.sort()
    seen["worst_s"], seen["p99_s"] = times[-1], times[len(times) * 99 // 100]
    return seen

def run(going):
    try:
        seen = measure(going)
    except OSError as exc:
        seen = {"count": 0, "worst_s": 0.0, "p99_s": 0.0, "wrong": [repr(exc)]}
    print(json.dumps(seen), flush=True)

listener = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=accept, daemon=True).start()
print(listener.getsockname()[1], flush=True)
host, port = sys.stdin.readline().strip().split(":")
while sys.stdin.readline():
    going = threading.Event()
    thread = threading.Thread(target=run, args=(going,))
    thread.start()
    sys.stdin.readline()
    going.set()
    thread.join()
"""


class Crowded(Pair):
    """The usual two, and the neighbour's process."""

    def __init__(self, mesh: Mesh, options: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NEIGHBOUR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        mesh.stack.callback(self._end)
        quick = f"127.0.0.1:{self.line()}"
        ports = {"ports": {"http": {"port": 80}, "quick": {"port": 81}}}
        super().__init__(mesh, ports, apps={"quick": quick}, options=options)
        self.say(self.web.outbound)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def say(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")

    def _end(self) -> None:
        with self.process:
            self.process.kill()


@contextmanager
def crowded(path: Path, options: Sequence[str] = ()) -> Iterator[Crowded]:
    """With as many descriptors as crowds need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, DESCRIPTORS), hard))
    try:
        with Mesh(path) as mesh:
            yield Crowded(mesh, options)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Slow(AssertionError):
    """The neighbour had to wait. On a busy machine it is worth to look again."""


class Neighbour:
    """Another client, all the while; and how much the attacked sidecar has grown meanwhile."""

    def __init__(self, pair: Crowded, sidecar: Sidecar) -> None:
        self.pair, self.sidecar = pair, sidecar

    def __enter__(self) -> "Neighbour":
        with self.pair.client() as client:
            assert client.get("/warm", host="quick.reviews").status == 200
        self.memory = self.sidecar.resident_bytes()
        self.pair.say("go")
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def check(self, beside_bytes: int = 0, *, percentile: bool = False) -> None:
        """The end of the attack: before its connections are closed. `percentile`: one answer in a hundred may be late,
        because attackers in processes of their own keep the machine busy."""
        growth = self.sidecar.resident_bytes() - self.memory
        self.pair.say("stop")
        seen = json.loads(self.pair.line())
        assert not seen["wrong"], seen
        assert growth < GROWTH_BYTES_MAX + beside_bytes, growth
        if seen["count"] <= 10 or seen["p99_s" if percentile else "worst_s"] >= LATENCY_S:
            raise Slow(seen)


def patiently(run: Callable[[], None]) -> None:
    """What makes others wait does so every time; a machine that is busy with something else does not."""
    for _ in range(2):
        try:
            return run()
        except Slow:
            time.sleep(1)
    run()
