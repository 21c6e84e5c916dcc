"""Opens listening sockets, and says plainly why one cannot be opened: also who has the port.

Must not know what is served. Linux: the owner of a port is looked up in /proc.
"""

import errno
import os
import resource
import socket
from pathlib import Path

from .connect import numeric_address

BACKLOG = 1024
PROC = Path("/proc")
LISTENING = "0A"  # TCP_LISTEN in /proc/net/tcp
IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75


class BindError(Exception):
    """A listener that cannot be opened, with the reason and what to do."""


def bind_listener(host: str, port: int, *, backlog: int = BACKLOG, transparent: bool = False) -> socket.socket:
    """A non-blocking listening socket; port 0 picks a free one. `host` is an IPv4 or IPv6 address, or `localhost`;
    "::" listens on IPv6 only, so that "0.0.0.0" can stand beside it."""
    where = numeric_address("127.0.0.1" if host == "localhost" else host, port)
    if where is None or not 0 <= port <= 65535:
        raise BindError(f"cannot listen on {shown(host, port)}: that is not an IP address and a port up to 65535")
    family, address = where
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as exc:
        raise BindError(f"cannot listen on {shown(host, port)}: {exc.strerror}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if transparent:
            level, option = (
                (socket.IPPROTO_IP, IP_TRANSPARENT)
                if family == socket.AF_INET
                else (socket.IPPROTO_IPV6, IPV6_TRANSPARENT)
            )
            sock.setsockopt(level, option, 1)
        sock.bind(address)
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError as exc:
        sock.close()
        raise BindError(f"cannot listen on {shown(host, port)}: {_reason(exc, host, port)}") from None
    return sock


def shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _reason(exc: OSError, host: str, port: int) -> str:
    if exc.errno == errno.EADDRINUSE:
        holder = port_holder(port)
        return f"the port is in use by {holder}" if holder else "the port is in use (by a process we may not look at)"
    if exc.errno in (errno.EACCES, errno.EPERM):
        if 0 < port < 1024:
            return (
                "permission denied: ports below 1024 need CAP_NET_BIND_SERVICE "
                "(or a lower net.ipv4.ip_unprivileged_port_start); choose a higher port, or grant it"
            )
        return "permission denied; a transparent listener needs CAP_NET_ADMIN"
    if exc.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine"
    return exc.strerror or str(exc)


def port_holder(port: int, proc: Path = PROC) -> str | None:
    """Which process listens on a port: "redis-server (pid 17)"; None where that cannot be found out."""
    wanted = {f"socket:[{inode}]" for inode in _listening_inodes(port, proc)}
    if not wanted:
        return None
    for process in proc.iterdir():
        if not process.name.isdigit():
            continue
        try:
            for link in (process / "fd").iterdir():
                if os.readlink(link) in wanted:
                    name = (process / "comm").read_text(errors="replace").strip()
                    return f"{name} (pid {process.name})"
        except OSError:
            continue  # not ours to look at, or gone
    return None


def _listening_inodes(port: int, proc: Path) -> set[str]:
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            # sl, local_address, rem_address, st, queues, tr, retrnsmt, uid, timeout, inode
            if len(fields) > 9 and fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(fields[9])
    return inodes


def raise_nofile() -> tuple[int, int]:
    """As many descriptors as we may have. Returns the soft limit before and now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            return soft, soft  # a kernel that allows less than it says: what we have must do
    return soft, hard
