"""The sidecar's checks of its own application: verdicts, HTTP on memory streams, time that is virtual."""

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from sidecar.discovery.health import TCP_ALONE, Checker, Verdict, check
from sidecar.model.snapshot import Health

HTTP = Health(http="/healthz", interval_s=10.0, timeout_s=2.0, healthy=2, unhealthy=3)


def test_the_first_result_decides_alone() -> None:
    for problem in (None, "down"):
        verdict = Verdict()
        verdict.result(problem, HTTP)
        assert verdict.healthy == (problem is None)


def test_it_turns_after_so_many_results_in_a_row() -> None:
    verdict = Verdict()
    results = [None, "a", "b", None, "a", "b", "c", None, "d", None, None]
    healthy = []
    for each in results:
        verdict.result(each, HTTP)
        healthy.append(verdict.healthy)
    assert healthy == [True, True, True, True, True, True, False, False, False, False, True]
    assert verdict.reason == ""


def test_a_new_reason_is_a_change() -> None:
    verdict = Verdict()
    assert verdict.result("a", HTTP) and not verdict.result("a", HTTP) and verdict.result("b", HTTP)
    assert (verdict.healthy, verdict.reason) == (False, "b")


Server = Callable[[trio.abc.Stream], Awaitable[None]]


async def checked(health: Health, server: Server) -> str | None:
    """The result of one check of an application that does this."""
    async with trio.open_nursery() as nursery:
        near, far = trio.testing.memory_stream_pair()

        async def connect() -> trio.abc.Stream:
            nursery.start_soon(server, far)
            return near

        result = await check(connect, health, "web")
        nursery.cancel_scope.cancel()
    return result


def answering(*pieces: bytes) -> Server:
    async def server(stream: trio.abc.Stream) -> None:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            request += await stream.receive_some()
        assert request.startswith(b"GET /healthz HTTP/1.1\r\n") and b"host: web\r\n" in request.lower()
        for piece in pieces:
            await stream.send_all(piece)
        await stream.aclose()

    return server


@pytest.mark.parametrize("status", [200, 204, 301, 399])
async def test_a_good_status(status: int) -> None:
    assert await checked(HTTP, answering(b"HTTP/1.1 %d X\r\ncontent-length: 0\r\n\r\n" % status)) is None


@pytest.mark.parametrize("status", [400, 404, 500, 503])
async def test_a_bad_status(status: int) -> None:
    problem = await checked(HTTP, answering(b"HTTP/1.1 %d X\r\n\r\n" % status))
    assert problem == f"GET /healthz was answered with {status}"


async def test_a_head_in_pieces_after_an_interim_one() -> None:
    pieces = [b"HTTP/1.1 100 C\r\n\r\nHT", b"TP/1.1 200 O", b"K\r\n", b"\r\n"]
    assert await checked(HTTP, answering(*pieces)) is None


async def test_what_is_not_http_or_no_answer() -> None:
    assert "not answered with HTTP" in (await checked(HTTP, answering(b"+OK redis\r\n\r\n")) or "")
    assert "not answered" in (await checked(HTTP, answering()) or "")


async def test_an_application_that_hangs(autojump_clock: trio.testing.MockClock) -> None:
    async def silent(stream: trio.abc.Stream) -> None:
        await trio.sleep_forever()

    began = trio.current_time()
    assert await checked(HTTP, silent) == "no answer within 2 s"
    assert trio.current_time() - began == pytest.approx(2.0)


async def test_tcp_alone_asks_nothing() -> None:
    async def server(stream: trio.abc.Stream) -> None:
        assert await stream.receive_some() == b""

    assert await checked(TCP_ALONE, server) is None


async def test_a_refused_connection() -> None:
    async def connect() -> trio.abc.Stream:
        raise ConnectionRefusedError(111, "Connection refused")

    assert await check(connect, TCP_ALONE, "web") == "it cannot be connected to: Connection refused"


async def test_the_checker_keeps_its_interval_and_tells_changes(autojump_clock: trio.testing.MockClock) -> None:
    told: list[tuple[float, bool]] = []
    checks: list[float] = []
    well = True

    async def connect(health: Health) -> trio.abc.Stream:
        checks.append(trio.current_time())
        if not well:
            raise ConnectionRefusedError(111, "Connection refused")
        return trio.testing.memory_stream_pair()[0]

    health = Health(interval_s=10.0, healthy=2, unhealthy=3)
    chances = iter([0.0, 1.0] * 50)
    checker = Checker(
        lambda: health, connect, "web", lambda v: told.append((trio.current_time(), v.healthy)), lambda: next(chances)
    )
    await checker.once()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(checker.run)
        await trio.sleep(41)
        assert checks[1:5] == pytest.approx([9.0, 20.0, 29.0, 40.0])
        assert told == []
        well = False
        await trio.sleep(40)
        assert len(told) == 1 and told[0][1] is False
        well = True
        await trio.sleep(30)
        assert [healthy for _, healthy in told] == [False, True]
        nursery.cancel_scope.cancel()
