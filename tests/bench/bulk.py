"""An application for long bodies: GET /N answers with N bytes, PUT swallows its body and then answers.

Run as `python -m tests.bench.bulk PORT`. Blocking, a thread a connection, so that it costs next to nothing itself.
"""

import socket
import sys
import threading

from .stage import HOST

BLOCK = bytes(1 << 20)


def serve(sock: socket.socket) -> None:
    buffer = memoryview(bytearray(1 << 20))
    held = b""
    with sock:
        while True:
            while b"\r\n\r\n" not in held:
                data = sock.recv(65536)
                if not data:
                    return
                held += data
            head, _, held = held.partition(b"\r\n\r\n")
            left = body_length(head) - len(held)
            held = b""
            while left > 0:
                got = sock.recv_into(buffer[: min(left, len(buffer))])
                if not got:
                    return
                left -= got
            size = int(head.split(b" ", 2)[1].strip(b"/") or b"0")
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
            while size > 0:
                size -= sock.send(memoryview(BLOCK)[: min(size, len(BLOCK))])


def body_length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    if b"\r\ntransfer-encoding:" in head.lower():
        raise NotImplementedError("this application reads bodies of a stated length only")
    return 0


def main(port: int) -> None:
    with socket.create_server((HOST, port), backlog=128) as listener:
        while True:
            sock, _ = listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=serve, args=(sock,), daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]))
