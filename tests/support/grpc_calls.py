"""A gRPC server and a client for tests, without generated code: messages are bytes.

server = GrpcServer()
with call_channel(web.outbound, "reviews") as channel:
    assert channel.unary_unary("/test.Echo/Unary")(b"hello") == b"hello"
"""

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc

SERVICE = "test.Echo"
HEALTH = "grpc.health.v1.Health"
WAIT_S = 15.0


class GrpcServer:
    """`test.Echo`, each of whose methods does what its name says. `seen` are the calls, by method; `codes` are the
    statuses that Fail and Late answer with in turn, then OK; `health` is what the health service says."""

    def __init__(self, name: str = "", threads: int = 32) -> None:
        self.name = name
        self.seen: list[tuple[str, dict[str, Any], float | None]] = []
        self.codes: Iterator[grpc.StatusCode] = iter(())
        self.trailers: tuple[tuple[str, str], ...] = ()
        self.cancelled = threading.Event()
        self.hanging = threading.Event()
        self.health: bytes | grpc.StatusCode = b"\x08\x01"
        self.asked: list[bytes] = []
        self.server = grpc.server(futures.ThreadPoolExecutor(threads))
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        methods = {
            "Unary": unary(self.unary),
            "Name": unary(lambda request, context: self.name.encode()),
            "Fail": unary(self.fail),
            "Late": unary(self.late),
            "Hang": unary(self.hang),
            "Remaining": unary(lambda request, context: str(self._enter("Remaining", context)).encode()),
            "Count": grpc.unary_stream_rpc_method_handler(self.count),
            "Collect": grpc.stream_unary_rpc_method_handler(self.collect),
            "First": grpc.stream_unary_rpc_method_handler(lambda requests, context: next(requests)),
            "PingPong": stream(self.ping_pong),
        }
        check = {"Check": unary(self.check)}
        self.server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(SERVICE, methods),
                grpc.method_handlers_generic_handler(HEALTH, check),
            )
        )
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{self.port}"
        self.server.start()

    def stop(self) -> None:
        self.server.stop(0).wait(WAIT_S)

    def times(self, method: str) -> int:
        return sum(1 for name, _, _ in self.seen if name == method)

    def _enter(self, method: str, context: grpc.ServicerContext) -> float | None:
        left: float | None = context.time_remaining()
        self.seen.append((method, dict(context.invocation_metadata()), left))
        return left

    def unary(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._enter("Unary", context)
        back = [(key, value) for key, value in context.invocation_metadata() if key.startswith("echo-")]
        context.set_trailing_metadata(back)
        return request

    def fail(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """A failure without a message: its head is its trailers."""
        self._enter("Fail", context)
        code = next(self.codes, None)
        if code is not None:
            context.set_trailing_metadata(self.trailers)
            context.abort(code, f"because of {request.decode()}")
        return request

    def late(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """The head goes out by itself, the failure some milliseconds later."""
        self._enter("Late", context)
        context.send_initial_metadata((("early", "1"),))
        time.sleep(0.02)
        code = next(self.codes, None)
        if code is not None:
            context.abort(code, "late")
        return request

    def hang(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._enter("Hang", context)
        context.add_callback(self.cancelled.set)
        self.hanging.set()
        self.cancelled.wait(WAIT_S)
        return b""

    def count(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """So many messages; with `N hang` it never ends by itself."""
        self._enter("Count", context)
        context.send_initial_metadata((("early", "1"),))
        number, _, more = request.partition(b" ")
        for each in range(int(number)):
            yield b"%d" % each
        if more:
            ended = threading.Event()
            context.add_callback(ended.set)
            ended.wait(WAIT_S)

    def collect(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        self._enter("Collect", context)
        return b"".join(requests)

    def ping_pong(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self._enter("PingPong", context)
        for request in requests:
            yield b"pong " + request

    def check(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.asked.append(request)
        if isinstance(self.health, grpc.StatusCode):
            context.abort(self.health, "no")
        return self.health


_channels = itertools.count()


def call_channel(address: str, host: str) -> grpc.Channel:
    """A channel of its own (gRPC shares connections between equal ones) that asks for a host."""
    return grpc.insecure_channel(
        address,
        options=[
            ("grpc.default_authority", host),
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("test.number", next(_channels)),
        ],
    )


def failure(call: Any) -> grpc.RpcError:
    """How a call fails."""
    try:
        result = call()
        if not isinstance(result, bytes):
            result = list(result)
    except grpc.RpcError as error:
        return error
    raise AssertionError(f"it did not fail: {result!r}")


def reason(error: Any) -> str:
    """The `x-pillion-reason` of a failure, "" without."""
    found = [
        value for key, value in (*error.initial_metadata(), *error.trailing_metadata()) if key == "x-pillion-reason"
    ]
    return str(found[0]) if found else ""
