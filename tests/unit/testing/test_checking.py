"""check_filter finds each way of breaking the contract, and says so."""

import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import trio

from sidecar.api import AsyncFilter, Connection, Filter, FilterBase, FilterContext, Reply, Request, Response
from sidecar.testing import acheck_filter, check_filter

# mypy: disable-error-code="override,no-untyped-def"


class Everything(Filter):
    """A proper filter with every hook."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.resource: object | None = None

    async def open(self, context: FilterContext) -> None:
        await super().open(context)
        self.seen = context.counter("seen", "Requests seen.")
        self.resource = object()

    async def aclose(self) -> None:
        self.resource = None

    def on_connection(self, connection: Connection) -> str | None:
        return None if connection.caller else "no identity"

    def on_request(self, request: Request) -> Reply | None:
        self.seen.inc()
        request.state["everything"] = request.path
        return Reply(405) if request.method == "PURGE" else None

    def on_response(self, request: Request, response: Response) -> Reply | None:
        response.headers.set("x-path", request.state["everything"][:100])
        return None

    def on_request_data(self, request: Request, data: bytes, end: bool) -> bytes:
        return data.upper()

    def on_response_data(self, request: Request, data: bytes, end: bool) -> bytes:
        return data + b"\n" if end else data


class Waits(AsyncFilter):
    async def on_request(self, request: Request) -> Reply | None:
        await self.context.sleep(0.9)
        return None


def test_proper_filters_pass() -> None:
    check_filter(Filter)
    check_filter(Everything)
    check_filter(Waits)


async def test_from_an_asynchronous_test(autojump_clock: trio.testing.MockClock) -> None:
    await acheck_filter(Waits)


def complaint(cls: type[FilterBase], config: Mapping[str, object] | None = None) -> str:
    with pytest.raises(AssertionError) as caught:
        check_filter(cls, config)
    return str(caught.value)


def test_not_a_filter() -> None:
    assert "must be a class that derives from" in complaint(dict)  # type: ignore[arg-type]


def test_wrong_side_and_on_error() -> None:
    class Side(Filter):
        side = "left"  # type: ignore[assignment]

    class OnError(Filter):
        on_error = "maybe"  # type: ignore[assignment]

    assert "Side.side must be" in complaint(Side)
    assert "OnError.on_error must be" in complaint(OnError)


def test_a_misspelt_hook() -> None:
    class Typo(Filter):
        def on_requst(self, request: Request) -> None:
            pass

    assert "Typo.on_requst is never called; the hooks are on_connection, on_request" in complaint(Typo)


def test_settings() -> None:
    @dataclass(frozen=True)
    class Settings:
        header: str

    class Strict(Filter):
        Config = Settings

    class Loose(Filter):
        @classmethod
        def decode(cls, config: Mapping[str, object]) -> Any:
            return config

    class Clumsy(Filter):
        @classmethod
        def decode(cls, config: Mapping[str, object]) -> Any:
            assert set(config) == {"a"}
            return {"a": 1}["b"] if len(config) > 1 else None

    check_filter(Strict, {"header": "x"})
    assert "refuses the settings given to check_filter: header: required" in complaint(Strict)
    assert "ignores unknown keys" in complaint(Loose)
    assert "must raise ConfigError for an unknown key, not AssertionError" in complaint(Clumsy, {"a": 1})


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (lambda: open("/dev/null").close(), "opens a file (/dev/null)"),
        (lambda: socket.getaddrinfo("127.0.0.1", 1), "resolves a name"),
        (lambda: time.sleep(0), "sleeps"),
        (lambda: subprocess.run([sys.executable, "-c", ""], check=True), "starts a process"),
    ],
)
def test_work_in_the_constructor_and_blocking_hooks(work: Any, says: str) -> None:
    class Eager(Filter):
        def __init__(self, config: Any = None) -> None:
            super().__init__(config)
            work()

    class Blocks(Filter):
        def on_request(self, request: Request) -> None:
            work()

    class BlocksAsync(AsyncFilter):
        async def on_request(self, request: Request) -> None:
            work()

    text = complaint(Eager)
    assert "Eager.__init__ " in text and says in text and "move it into `open`" in text
    assert says in complaint(Blocks)
    assert says in complaint(BlocksAsync)


def test_work_in_a_thread_is_no_blocking() -> None:
    class Threads(AsyncFilter):
        async def on_request(self, request: Request) -> None:
            await trio.to_thread.run_sync(lambda: open("/dev/null").close())

    check_filter(Threads)


def test_a_hook_that_is_slow() -> None:
    class Slow(Filter):
        budget_s = 0.0001

        def on_request(self, request: Request) -> None:
            sum(range(200_000))

    assert "its budget is 0.1 ms" in complaint(Slow)


def test_a_hook_that_raises_says_for_what() -> None:
    class Trusting(Filter):
        def on_request(self, request: Request) -> None:
            assert request.headers.get("user-agent")

    class Careless(Filter):
        def on_response(self, request: Request, response: Response) -> None:
            response.headers.items()[0]

    assert "Trusting.on_request raised AssertionError" in complaint(Trusting)
    assert "IndexError" in complaint(Careless) and "answered with 204 and no header" in complaint(Careless)


def test_wrong_results() -> None:
    class Yes(Filter):
        def on_request(self, request: Request):
            return True

    class Text(Filter):
        def on_response_data(self, request: Request, data: bytes, end: bool):
            return data.decode("latin-1")

    class Nothing(Filter):
        def on_request_data(self, request: Request, data: bytes, end: bool):
            return None

    class Bool(Filter):
        def on_connection(self, connection: Connection):
            return False

    assert "Yes.on_request returned True for an ordinary GET" in complaint(Yes)
    assert "Text.on_response_data returned str" in complaint(Text)
    assert "Nothing.on_request_data returned NoneType" in complaint(Nothing)
    assert "Bool.on_connection returned False" in complaint(Bool)


def test_a_head_spoilt_behind_the_view() -> None:
    class Splits(Filter):
        def on_response(self, request: Request, response: Response) -> None:
            response._message.headers.append((b"x", b"a\r\nb"))

    class Strings(Filter):
        def on_request(self, request: Request) -> None:
            request._message.headers.append(("x", "y"))  # type: ignore[arg-type]

    assert "left a malformed field" in complaint(Splits)
    assert "must be bytes" in complaint(Strings)


def test_open_and_close() -> None:
    class Forgets(Filter):
        async def open(self, context: FilterContext) -> None:
            pass

    class Fails(Filter):
        async def open(self, context: FilterContext) -> None:
            raise OSError("no such file")

    class HalfOpen(Filter):
        async def open(self, context: FilterContext) -> None:
            await super().open(context)
            self.seen = context.counter("seen", "Seen.")
            self.late = object()

        async def aclose(self) -> None:
            if hasattr(self, "context"):
                del self.late

    assert "must call `await super().open(context)`" in complaint(Forgets)
    assert "Fails.open raised OSError('no such file')" in complaint(Fails)
    assert "HalfOpen.aclose after an open that failed half-way raised" in complaint(HalfOpen)


def test_an_asynchronous_hook_past_its_limit() -> None:
    class Long(AsyncFilter):
        timeout_s = 2.0

        async def on_response(self, request: Request, response: Response) -> None:
            await self.context.sleep(3.0)

    assert "Long.on_response took longer than timeout_s = 2.0 s" in complaint(Long)
