"""An application of a chain, run as a process: asks the next one through its sidecar, stops when its caller leaves.

It serves HTTP/1.1 and gRPC, and prints the two ports; then it reads a line of JSON: its `name`, `outbound` (HOST:PORT
of its sidecar's outbound side), `following` (the next service; none for the last). Each event is a line of JSON with
the system's monotonic time. What each is to do stands in a field that goes down the chain, `x-script`, call after call
of one trace: `first=503,go;third=hang`. A number is the answer, `go` asks the next one (the last one answers 200),
`50ms` does the same after so much work, `hang` never answers. With `lost=` in it `traceparent` is not passed on: that
is all that an application has to do for the mesh.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping

import grpc

METHOD = "/chain.App/Ask"
CODES = {200: grpc.StatusCode.OK, 503: grpc.StatusCode.UNAVAILABLE, 504: grpc.StatusCode.DEADLINE_EXCEEDED}
STATUSES = {code: status for status, code in CODES.items()}
Ask = Callable[[dict[str, str]], Awaitable[int]]


def tell(event: str, **more: object) -> None:
    print(json.dumps({"event": event, "at": time.monotonic(), **more}), flush=True)


async def head_of(reader: asyncio.StreamReader) -> tuple[str, dict[str, str]]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
    return first, {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


class App:
    def __init__(self) -> None:
        self.name, self.outbound, self.following = "", "", ""
        self.calls: Counter[str] = Counter()

    async def work(self, headers: Mapping[str, str], ask: Ask) -> int:
        """The status of the answer to a request with these headers."""
        trace, script = headers["traceparent"], headers.get("x-script", "")
        lines = dict(line.partition("=")[::2] for line in script.split(";"))
        words = lines.get(self.name, "go").split(",")
        word = words[min(self.calls[trace[3:35]], len(words) - 1)]
        self.calls[trace[3:35]] += 1
        if word == "hang":
            await asyncio.sleep(3600)
        elif word.endswith("ms"):
            await asyncio.sleep(int(word[:-2]) / 1000)
        elif word != "go":
            return int(word)
        if not self.following:
            return 200
        onward = {"x-script": script}
        return await ask(onward if "lost" in lines else {**onward, "traceparent": trace})

    async def http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            _, headers = await head_of(reader)
        except asyncio.IncompleteReadError:
            writer.close()  # a health check: it only connects
            return
        tell("begun", traceparent=headers.get("traceparent", ""))
        work = asyncio.create_task(self.work(headers, self.ask_http))
        left = asyncio.create_task(reader.read(1))
        await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            left.cancel()
            status = work.result()
            tell("answered", status=status)
            writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())
        else:
            tell("caller_gone")
            work.cancel()
        writer.close()

    async def ask_http(self, headers: dict[str, str]) -> int:
        host, _, port = self.outbound.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            lines = "".join(f"{name}: {value}\r\n" for name, value in {"host": self.following, **headers}.items())
            writer.write(f"GET / HTTP/1.1\r\n{lines}\r\n".encode())
            first, _ = await head_of(reader)
            return int(first.split(" ")[1])
        finally:
            writer.close()

    async def grpc(self, request: bytes, context: "grpc.aio.ServicerContext[bytes, bytes]") -> bytes:
        headers = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
        tell("begun", traceparent=headers.get("traceparent", ""), left_s=context.time_remaining())
        try:
            status = await self.work(headers, self.ask_grpc)
        except asyncio.CancelledError:
            tell("caller_gone")
            raise
        tell("answered", status=status)
        if status != 200:
            await context.abort(CODES[status], "as the script says")
        return request

    async def ask_grpc(self, headers: dict[str, str]) -> int:
        options = [("grpc.default_authority", f"grpc.{self.following}"), ("grpc.enable_retries", 0)]
        async with grpc.aio.insecure_channel(self.outbound, options=options) as channel:
            try:
                await channel.unary_unary(METHOD)(b"", metadata=tuple(headers.items()))
            except grpc.aio.AioRpcError as error:
                return STATUSES[error.code()]
        return 200


async def main() -> None:
    app = App()
    http = await asyncio.start_server(app.http, "127.0.0.1", 0)
    server = grpc.aio.server()
    handlers = {"Ask": grpc.unary_unary_rpc_method_handler(app.grpc)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("chain.App", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(http.sockets[0].getsockname()[1], port, flush=True)
    vars(app).update(json.loads(await asyncio.to_thread(sys.stdin.readline)))
    await http.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
