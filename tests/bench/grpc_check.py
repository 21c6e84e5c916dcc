"""Whether a path carries real gRPC: one unary call with grpcio, the usual client.

Run as `python -m tests.bench.grpc_check PORT HOST LIMIT_S`; tries until a call succeeds, and says why none did. A
process of its own because grpcio starts threads, which do not go well with a process that starts others.
"""

import sys
import time

import grpc

from .grpc_call import ANSWER, METHOD, REQUEST, message
from .stage import HOST


def call(port: int, host: str) -> str:
    """What is wrong; "" when nothing is."""
    options = [("grpc.default_authority", host), ("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]
    with grpc.insecure_channel(f"{HOST}:{port}", options=options) as channel:
        echo = channel.unary_unary(METHOD)
        try:
            answer, seen = echo.with_call(message(REQUEST), timeout=2)
        except grpc.RpcError as error:
            return f"{error.code()}: {error.details()}"
        if seen.code() is not grpc.StatusCode.OK or answer != message(ANSWER):
            return f"{seen.code()} and {answer!r}"
    return ""


def main(arguments: list[str]) -> None:
    port, host, limit_s = arguments
    deadline = time.monotonic() + float(limit_s)
    while wrong := call(int(port), host):
        if time.monotonic() > deadline:
            sys.exit(f"a gRPC call ended with {wrong}")
        time.sleep(0.05)


if __name__ == "__main__":
    main(sys.argv[1:])
