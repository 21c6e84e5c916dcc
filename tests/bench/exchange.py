"""A blocking HTTP/1.1 client, just large enough to see that a path works and to hold connections open."""

import socket
import ssl
from collections.abc import Mapping

from .stage import HOST, BenchError

LIMIT_S = 10.0


class Client:
    """One connection."""

    def __init__(self, port: int, context: ssl.SSLContext | None = None) -> None:
        plain = socket.create_connection((HOST, port), timeout=LIMIT_S)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = plain if context is None else context.wrap_socket(plain)

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send_head(self, method: str, path: str, host: str, headers: Mapping[str, str] | None = None) -> None:
        lines = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        self.sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{lines}\r\n".encode())

    def read_head(self) -> tuple[int, int, bytes]:
        """Status, length of the body, and what of it came with the head."""
        held = b""
        while b"\r\n\r\n" not in held:
            data = self.sock.recv(65536)
            if not data:
                raise BenchError(f"the connection ended in the middle of a response: {held!r}")
            held += data
        head, _, body = held.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                return int(lines[0].split()[1]), int(value), body
        raise BenchError(f"a response without content-length: {head!r}")

    def skip(self, size: int) -> None:
        buffer = memoryview(bytearray(1 << 20))
        while size > 0:
            got = self.sock.recv_into(buffer[: min(size, len(buffer))])
            if not got:
                raise BenchError(f"the connection ended {size} bytes early")
            size -= got

    def get(self, host: str, path: str = "/") -> tuple[int, int]:
        """Status and length of the body, which has been read."""
        self.send_head("GET", path, host)
        status, length, body = self.read_head()
        self.skip(length - len(body))
        return status, length


def answers(port: int, host: str) -> bool:
    """Whether a GET is answered with 200 already."""
    try:
        with Client(port) as client:
            return client.get(host)[0] == 200
    except (OSError, BenchError):
        return False
