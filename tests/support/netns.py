"""Two machines for a test: network namespaces joined by a veth pair, and a tap on the wire between them.

    with wired() as (left, right):
        server = right.start(["python3", "-m", "http.server"])
        with capture(left) as wire:
            left.run(["curl", …])
        assert not wire.holds(b"secret")

Needs root and iproute2 (`require_root` skips, or fails under CI). Names carry the pid and start time of the test run:
whatever a killed run left behind is recognised and removed by the next one. Everything started in a namespace is ended
with it. Traffic never leaves the pair: neither namespace has a route out.
"""

import contextlib
import itertools
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PREFIX = "pltest"
NET4, NET6 = "10.231.7.{}", "fd97:7069:6c::{}"
_LAST = b"this is the last packet of the capture"
_numbers = itertools.count()


def require_root(*programs: str) -> None:
    """Skip where this machine cannot run such a test; under CI that is a failure."""
    missing = [program for program in ("ip", *programs) if _which(program) is None]
    reason = "needs root" if os.geteuid() != 0 else f"needs {', '.join(missing)}" if missing else _no_namespaces()
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def _which(program: str) -> str | None:
    return shutil.which(program, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


def _no_namespaces() -> str:
    done = subprocess.run(["unshare", "-n", "true"], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"no network namespaces here: {done.stderr.strip()}"


@dataclass
class Namespace:
    """One machine: a name for `ip netns`, the device that leads to the other, its addresses."""

    name: str
    device: str
    ipv4: str
    ipv6: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def command(self, command: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.name, *command]

    def run(
        self, command: Sequence[str], *, text: str = "", env: Mapping[str, str] | None = None, timeout_s: float = 30
    ) -> subprocess.CompletedProcess[str]:
        """Run to its end; the caller looks at the exit code."""
        return subprocess.run(
            self.command(command), input=text, capture_output=True, text=True, timeout=timeout_s, env=_environment(env)
        )

    def start(
        self,
        command: Sequence[str],
        *,
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Run in the background; `log` gets both streams, else standard output is a pipe. Ended with the namespace."""
        with contextlib.ExitStack() as files:
            out = files.enter_context(log.open("ab")) if log is not None else subprocess.PIPE
            errors = subprocess.STDOUT if log is not None else subprocess.DEVNULL
            process = subprocess.Popen(
                self.command(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                env=_environment(env),
                cwd=cwd,
            )
        self.processes.append(process)
        return process

    def listening(self, port: int, timeout_s: float = 10) -> None:
        """Wait until something listens on this port."""
        _until(lambda: bool(self.run(["ss", "-Htln", f"sport = :{port}"]).stdout.strip()), timeout_s, f"port {port}")

    def end(self, process: subprocess.Popen[bytes], how: int = signal.SIGTERM) -> None:
        if process.poll() is None:
            process.send_signal(how)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()
        if process in self.processes:
            self.processes.remove(process)


@contextlib.contextmanager
def wired() -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces and the wire between them; nothing of it outlives the block."""
    remove_leftovers()
    pid, number = os.getpid(), next(_numbers)
    stem = f"{PREFIX}-{pid}-{_started(pid)}-{number}"
    left, right = (
        Namespace(f"{stem}-{side}", f"pl{pid}x{number}{side}", NET4.format(host), NET6.format(host))
        for side, host in (("a", 1), ("b", 2))
    )
    try:
        for one in (left, right):
            _ip("netns", "add", one.name)
        _ip(
            "link",
            "add",
            left.device,
            "netns",
            left.name,
            "type",
            "veth",
            "peer",
            "name",
            right.device,
            "netns",
            right.name,
        )
        for one in (left, right):
            _ip("-n", one.name, "link", "set", "lo", "up")
            _ip("-n", one.name, "link", "set", one.device, "up")
            _ip("-n", one.name, "addr", "add", f"{one.ipv4}/24", "dev", one.device)
            # Without duplicate address detection the address can be used at once.
            _ip("-n", one.name, "addr", "add", f"{one.ipv6}/64", "dev", one.device, "nodad")
        yield left, right
    finally:
        for one in (left, right):
            for process in list(one.processes):
                one.end(process)
            _remove(one.name)


def remove_leftovers() -> None:
    """Namespaces of test runs that are no more (killed before they could clean up)."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for line in listed.splitlines():
        name = line.split()[0] if line.strip() else ""
        parts = name.split("-")
        if len(parts) == 5 and parts[0] == PREFIX and parts[1].isdecimal() and _started(int(parts[1])) != parts[2]:
            _remove(name)


def _started(pid: int) -> str:
    """Start time of a process, so that a pid used again is not taken for the old one; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _remove(name: str) -> None:
    """End what still runs in the namespace, then delete it; the veth pair goes with it."""
    pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **(extra or {})}


def _until(true: Callable[[], bool], timeout_s: float, what: str) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, f"{what}: nothing within {timeout_s:g} s"
        time.sleep(0.02)


class Wire:
    """What was seen on a device, once its capture has ended."""

    def __init__(self) -> None:
        self.streams: dict[tuple[str, int, str, int], bytes] = {}
        self.packets = 0

    def read(self, pcap: bytes) -> None:
        segments: dict[tuple[str, int, str, int], dict[int, bytes]] = {}
        for frame in _frames(pcap):
            self.packets += 1
            segment = _segment(frame)
            if segment is not None:
                flow, sequence, payload = segment
                if payload:
                    segments.setdefault(flow, {}).setdefault(sequence, payload)
        self.streams = {flow: b"".join(parts[at] for at in sorted(parts)) for flow, parts in segments.items()}

    def holds(self, text: bytes) -> bool:
        """Whether the text went over the wire in either direction of any connection, also across packets."""
        return any(text in stream for stream in self.streams.values())

    def to_port(self, port: int) -> list[bytes]:
        """What was sent to this port, a stream for each connection."""
        return [stream for (_, _, _, destination), stream in self.streams.items() if destination == port]


@contextlib.contextmanager
def capture(at: Namespace) -> Iterator[Wire]:
    """Everything that passes the namespace's device within the block; read when it ends."""
    wire = Wire()
    with tempfile.TemporaryDirectory(prefix="pillion-wire-") as folder:
        file = Path(folder, "wire.pcap")
        errors = Path(folder, "tcpdump.err")
        with errors.open("wb") as stderr:
            # -Z root: or it would drop its rights and could not write here. Each packet at once, from kernel to file.
            command = at.command(
                ["tcpdump", "-i", at.device, "--immediate-mode", "-U", "-s", "0", "-Z", "root", "-w", str(file)]
            )
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            _until(lambda: b"listening on" in errors.read_bytes(), 10, "tcpdump")
            yield wire
            # A last datagram: once it is in the file, so is all that went before it.
            peer = NET4.format(2 if at.ipv4 == NET4.format(1) else 1)
            send = f"from socket import *; socket(type=SOCK_DGRAM).sendto({_LAST!r}, ({peer!r}, 9))"
            at.run([sys.executable, "-W", "ignore", "-c", send])
            _until(lambda: _LAST in file.read_bytes(), 10, "the end of the capture")
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(10)
        wire.read(file.read_bytes())


def _frames(pcap: bytes) -> Iterator[bytes]:
    """The Ethernet frames of a pcap file (draft-ietf-opsawg-pcap)."""
    order = "<" if pcap[:4] in (b"\xd4\xc3\xb2\xa1", b"\x4d\x3c\xb2\xa1") else ">"
    at = 24
    while at + 16 <= len(pcap):
        (length,) = struct.unpack_from(f"{order}I", pcap, at + 8)
        yield pcap[at + 16 : at + 16 + length]
        at += 16 + length


def _segment(frame: bytes) -> tuple[tuple[str, int, str, int], int, bytes] | None:
    """(flow, sequence number, payload) of a TCP segment without IPv6 extension headers; None for anything else."""
    kind = frame[12:14]
    if kind == b"\x08\x00" and frame[23] == 6:
        start = 14 + (frame[14] & 0x0F) * 4
        end = 14 + int.from_bytes(frame[16:18])
        source, destination = frame[26:30], frame[30:34]
    elif kind == b"\x86\xdd" and frame[20] == 6:
        start, end = 54, 54 + int.from_bytes(frame[18:20])
        source, destination = frame[22:38], frame[38:54]
    else:
        return None
    source_port, destination_port, sequence = struct.unpack_from("!HHI", frame, start)
    payload = frame[start + (frame[start + 12] >> 4) * 4 : end]
    return (source.hex(), source_port, destination.hex(), destination_port), sequence, payload
