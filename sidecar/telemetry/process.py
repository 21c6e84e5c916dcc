"""The process's own numbers under Prometheus's usual names, read from /proc when somebody asks.

Must not know anything of the proxy. Where /proc is absent only the CPU time is given.
"""

import os
from pathlib import Path

from .metrics import Registry


def register(registry: Registry, proc: Path = Path("/proc")) -> None:
    """Add process_* to the registry."""
    registry.reading_counter(
        "process_cpu_seconds_total", "Total user and system CPU time spent in seconds.", _cpu_seconds
    )
    if not (proc / "self/stat").exists():
        return
    started_s = _start_time(proc)
    own = proc / "self"
    registry.gauge("process_start_time_seconds", "Start time of the process since the Unix epoch.", lambda: started_s)
    registry.gauge("process_resident_memory_bytes", "Resident memory size in bytes.", lambda: _statm(own, 1))
    registry.gauge("process_virtual_memory_bytes", "Virtual memory size in bytes.", lambda: _statm(own, 0))
    registry.gauge("process_open_fds", "Number of open file descriptors.", lambda: len(os.listdir(own / "fd")))
    registry.gauge("process_max_fds", "Maximum number of open file descriptors.", lambda: _descriptors_max(own))


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _statm(own: Path, field: int) -> float:
    return int((own / "statm").read_text().split()[field]) * os.sysconf("SC_PAGE_SIZE")


def _descriptors_max(own: Path) -> float:
    for line in (own / "limits").read_text().splitlines():
        if line.startswith("Max open files"):
            soft = line.split()[3]
            return float("inf") if soft == "unlimited" else float(soft)
    raise ValueError("/proc/self/limits names no limit of open files")


def _start_time(proc: Path) -> float:
    """proc(5): field 22 of stat is in clock ticks since boot; the name in field 2 may hold spaces and brackets."""
    fields = (proc / "self/stat").read_text().rpartition(")")[2].split()
    for line in (proc / "stat").read_text().splitlines():
        if line.startswith("btime "):
            return int(line.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    raise ValueError("/proc/stat names no boot time")
