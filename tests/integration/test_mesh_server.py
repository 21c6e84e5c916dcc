"""The server behind the mesh listener, on real Unix sockets: framing, streams, what goes wrong on either side."""

import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from control_plane.serve import server
from control_plane.serve.server import listen, serve_app

POST = b"POST /v1/ack?x=%%31 HTTP/1.1\r\nhost: api\r\nx-a: 1\r\ncontent-length: %d\r\n\r\n%b"
LARGE = bytes(range(256)) * 40_000


class Application:
    """Echoes what it is asked, and notes what it saw; by its path it does something else."""

    def __init__(self) -> None:
        self.gone = trio.Event()
        self.begun = trio.Event()
        self.served = 0

    async def __call__(self, scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        assert scope["type"] == "http"
        self.served += 1
        path = scope["path"]
        if path == "/refuse":
            await _answer(send, 401, b"no")
            return
        if path == "/fail":
            raise ValueError("as planned")
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone.set()
                return
            body += message["body"]
            more = message["more_body"]
        if path == "/stream":
            await self._stream(receive, send)
        elif path == "/large":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in range(4):
                self.begun.set()
                await send({"type": "http.response.body", "body": LARGE, "more_body": True})
            await send({"type": "http.response.body"})
        elif path == "/cut":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
            raise ValueError("as planned")
        else:
            headers = {name.decode(): value.decode() for name, value in scope["headers"]}
            told = {"method": scope["method"], "path": path, "query": scope["query_string"].decode()}
            await _answer(send, 200, json.dumps({**told, "headers": headers, "size": len(body)}).encode())

    async def _stream(self, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        for number in range(3):
            await send({"type": "http.response.body", "body": b"line %d\n" % number, "more_body": True})
        self.begun.set()
        assert await receive() == {"type": "http.disconnect"}
        await send({"type": "http.response.body", "body": b"to nobody", "more_body": True})
        self.gone.set()


async def _answer(send: Callable[[Any], Any], status: int, body: bytes) -> None:
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


class Caller:
    """The listener's side of a connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.read = b""

    async def until(self, end: bytes) -> bytes:
        while end not in self.read:
            more = await self.stream.receive_some()
            if not more:
                raise EOFError(self.read)
            self.read += bytes(more)
        found, _, self.read = self.read.partition(end)
        return found

    async def head(self) -> tuple[int, dict[str, str]]:
        first, *lines = (await self.until(b"\r\n\r\n")).decode().split("\r\n")
        return int(first.split(" ")[1]), dict(line.split(": ", 1) for line in lines)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        status, headers = await self.head()
        size = int(headers["content-length"])
        while len(self.read) < size:
            more = await self.stream.receive_some()
            assert more
            self.read += bytes(more)
        body, self.read = self.read[:size], self.read[size:]
        return status, headers, body

    async def chunk(self) -> bytes:
        size = int(await self.until(b"\r\n"), 16)
        while len(self.read) < size + 2:
            self.read += bytes(await self.stream.receive_some())
        data, end, self.read = self.read[:size], self.read[size : size + 2], self.read[size + 2 :]
        assert end == b"\r\n"
        return data

    async def ended(self) -> bool:
        """Whether the connection is closed without another byte."""
        with trio.fail_after(5):
            try:
                return not self.read and not await self.stream.receive_some()
            except trio.BrokenResourceError:
                return True


class Stage:
    def __init__(self, app: Application, path: Path) -> None:
        self.app, self.path = app, path

    @asynccontextmanager
    async def call(self, data: bytes = b"") -> AsyncIterator[Caller]:
        async with await trio.open_unix_socket(self.path) as stream:
            if data:
                await stream.send_all(data)
            yield Caller(stream)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    app = Application()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_app, app, listen(tmp_path / "app"))
            yield Stage(app, tmp_path / "app")
            nursery.cancel_scope.cancel()


async def test_requests_follow_one_another(stage: Stage) -> None:
    async with stage.call() as caller:
        for size in (0, 1, 70_000):
            await caller.stream.send_all(POST % (size, b"x" * size))
            status, headers, body = await caller.answer()
            told = json.loads(body)
            assert (status, told["size"]) == (200, size)
            assert (told["method"], told["path"], told["query"]) == ("POST", "/v1/ack", "x=%31")
            assert told["headers"] == {"host": "api", "x-a": "1", "content-length": str(size)}
            assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", headers["date"])
            assert "connection" not in headers


async def test_a_path_is_decoded_once(stage: Stage) -> None:
    async with stage.call(b"POST /v1/%61ck%2525 HTTP/1.1\r\nhost: api\r\n\r\n") as caller:
        _, _, body = await caller.answer()
        assert json.loads(body)["path"] == "/v1/ack%25"


@pytest.mark.parametrize("framing", ["counted", "chunks"])
async def test_however_a_request_is_cut(stage: Stage, framing: str) -> None:
    if framing == "counted":
        data = POST % (11, b"hello world")
    else:
        data = b"POST /v1/ack HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
    async with stage.call() as caller:
        for step in (1, 3, len(data)):
            for at in range(0, len(data), step):
                await caller.stream.send_all(data[at : at + step])
                await trio.lowlevel.checkpoint()
            status, _, body = await caller.answer()
            assert (status, json.loads(body)["size"]) == (200, 11)


async def test_a_head_is_answered_without_a_body(stage: Stage) -> None:
    async with stage.call(b"HEAD / HTTP/1.1\r\nhost: api\r\n\r\n") as caller:
        status, headers = await caller.head()
        assert status == 200 and int(headers["content-length"]) > 0
        await caller.stream.send_all(POST % (0, b""))
        assert (await caller.answer())[0] == 200


async def test_a_caller_that_waits_for_100_is_told_to_go_on(stage: Stage) -> None:
    async with stage.call(b"POST / HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n") as caller:
        assert (await caller.head())[0] == 100
        await caller.stream.send_all(b"ok")
        status, _, body = await caller.answer()
        assert (status, json.loads(body)["size"]) == (200, 2)


async def test_a_stream_goes_on_until_the_caller_hangs_up(stage: Stage) -> None:
    async with stage.call(b"POST /stream HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}") as caller:
        status, headers = await caller.head()
        assert (status, headers["transfer-encoding"], headers["content-type"]) == (200, "chunked", "text/plain")
        assert [await caller.chunk() for _ in range(3)] == [b"line 0\n", b"line 1\n", b"line 2\n"]
    await stage.app.gone.wait()


async def test_whoever_sends_more_before_the_answer_is_cut_off(stage: Stage) -> None:
    async with stage.call(b"POST /stream HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}") as caller:
        await stage.app.begun.wait()
        await caller.stream.send_all(POST % (0, b""))
        await stage.app.gone.wait()
        await caller.until(b"line 2\n\r\n")
        assert await caller.ended()
    assert stage.app.served == 1


@pytest.mark.parametrize(("here", "kept"), [(b"whole", True), (b"ha", False)])
async def test_an_answer_before_the_body_was_read(stage: Stage, here: bytes, kept: bool) -> None:
    """What is here already is skipped; what is not may be anything, so the connection ends."""
    async with stage.call(b"POST /refuse HTTP/1.1\r\ncontent-length: 5\r\n\r\n" + here) as caller:
        status, headers, body = await caller.answer()
        assert (status, body, headers.get("connection")) == (401, b"no", None if kept else "close")
        if kept:
            await caller.stream.send_all(POST % (0, b""))
            assert (await caller.answer())[0] == 200
        else:
            assert await caller.ended()


async def test_an_error_of_the_application(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    async with stage.call(b"POST /fail HTTP/1.1\r\n\r\n") as caller:
        status, _, body = await caller.answer()
        assert (status, body) == (500, b"")
        await caller.stream.send_all(b"POST /cut HTTP/1.1\r\n\r\n")
        assert (await caller.head())[0] == 200
        assert await caller.chunk() == b"half"
        assert await caller.ended()  # never completed as if nothing were missing
    assert caplog.text.count("as planned") >= 2
    async with stage.call(POST % (0, b"")) as caller:
        assert (await caller.answer())[0] == 200


async def test_a_body_that_breaks_off_is_no_body(stage: Stage) -> None:
    async with stage.call(b"POST /v1/ack HTTP/1.1\r\ncontent-length: 5\r\n\r\nha"):
        await trio.sleep(0.01)
    await stage.app.gone.wait()


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"POST / HTTP/1.0\r\n\r\n",
        b"POST / / HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nno colon\r\n\r\n",
        b"POST / HTTP/1.1\r\nX-Upper: 1\r\n\r\n",
        b"POST / HTTP/1.1\r\na: 1\r\n b: folded\r\n\r\n",
        b"POST / HTTP/1.1\r\na : 1\r\n\r\n",
        b"POST / HTTP/1.1\r\na: 1\n\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 1, 1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: " + b"1" * 30 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\nx",
        b"POST / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST / HTTP/1.1\r\na: " + b"x" * 200_000,
    ],
)
async def test_what_our_listener_never_writes_ends_the_connection(stage: Stage, data: bytes) -> None:
    async with stage.call() as other, stage.call() as caller:
        try:
            await caller.stream.send_all(data)
        except trio.BrokenResourceError:
            pass  # it has ended while we wrote
        try:
            assert (await caller.head())[0] == 500  # the application was asked, and its body broke
        except (EOFError, trio.BrokenResourceError):
            pass
        assert await caller.ended()
        await other.stream.send_all(POST % (0, b""))
        assert (await other.answer())[0] == 200


async def test_a_slow_reader_gets_everything(stage: Stage) -> None:
    async with stage.call(b"POST /large HTTP/1.1\r\n\r\n") as caller:
        await stage.app.begun.wait()
        await trio.sleep(0.05)
        assert (await caller.head())[0] == 200
        assert [await caller.chunk() for _ in range(5)] == [LARGE] * 4 + [b""]


async def test_a_reader_that_leaves_in_the_middle(stage: Stage) -> None:
    async with stage.call(b"POST /large HTTP/1.1\r\n\r\n"):
        await stage.app.begun.wait()
        await trio.sleep(0.01)
    async with stage.call(POST % (0, b"")) as caller:
        assert (await caller.answer())[0] == 200


async def test_many_at_once(stage: Stage) -> None:
    async def one() -> None:
        async with stage.call(POST % (3, b"abc")) as caller:
            assert (await caller.answer())[0] == 200

    async with trio.open_nursery() as nursery:
        for _ in range(3 * server.ACCEPTS_AT_ONCE):
            nursery.start_soon(one)
    assert stage.app.served == 3 * server.ACCEPTS_AT_ONCE


async def test_out_of_descriptors_it_waits(stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Full(socket.socket):
        failures = 2

        def accept(self) -> Any:
            if self.failures:
                Full.failures -= 1
                raise OSError(24, "Too many open files")
            return super().accept()

    monkeypatch.setattr(server.socket, "socket", Full)
    path = tmp_path / "full"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_app, stage.app, listen(path))
        async with Stage(stage.app, path).call(POST % (0, b"")) as caller:
            assert (await caller.answer())[0] == 200
        nursery.cancel_scope.cancel()
    assert not Full.failures


async def test_nobody_else_reaches_it(stage: Stage) -> None:
    assert stage.path.stat().st_mode & 0o777 == 0o600
