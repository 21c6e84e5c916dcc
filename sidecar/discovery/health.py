"""Is our own application well? Checks it for as long as the sidecar lives.

An HTTP GET or a TCP connection, every `interval_s` give or take 10%; the verdict turns after so many results in a row.
Must not know what is done with the verdict, nor how connections are made. Invariant: a check that hangs ends with its
time limit, and the next comes when it is due.
"""

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import h11
import trio

from sidecar.model.snapshot import Health

HEAD_BYTES_MAX = 64 * 1024
READ_BYTES = 16 * 1024
JITTER = 0.1

TCP_ALONE = Health(unhealthy=1, healthy=1)
"""Where the policy says nothing: an application that has ended must be seen."""

Connect = Callable[[], Awaitable[trio.abc.Stream]]
"""A new connection to the application. Raises OSError."""


@dataclass(slots=True)
class Verdict:
    """What a run of results comes to. The first result decides alone: until then nothing is known."""

    healthy: bool = True
    reason: str = ""
    known: bool = False
    run: int = 0  # results in a row that contradict the verdict

    def result(self, problem: str | None, health: Health) -> bool:
        """Take one result (None: well); whether the verdict has changed, or its reason."""
        before = (self.healthy, self.reason)
        well = problem is None
        if not self.known:
            self.known, self.healthy = True, well
        elif well == self.healthy:
            self.run = 0
        else:
            self.run += 1
            if self.run >= (health.healthy if well else health.unhealthy):
                self.healthy, self.run = well, 0
        if self.healthy:
            self.reason = ""
        elif problem is not None:
            self.reason = problem
        return before != (self.healthy, self.reason)


async def check(connect: Connect, health: Health, host: str) -> str | None:
    """One check: what is wrong, or None."""
    try:
        with trio.fail_after(health.timeout_s):
            stream = await connect()
            try:
                return None if health.http is None else await _ask(stream, health.http, host)
            finally:
                await trio.aclose_forcefully(stream)
    except trio.TooSlowError:
        return f"no {'connection' if health.http is None else 'answer'} within {health.timeout_s:g} s"
    except OSError as error:
        return f"it cannot be connected to: {error.strerror or error}"
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return "it broke the connection off"


async def _ask(stream: trio.abc.Stream, path: str, host: str) -> str | None:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES_MAX)
    request = h11.Request(
        method="GET",
        target=path,
        headers=[("host", host), ("user-agent", "pillion-health"), ("accept", "*/*"), ("connection", "close")],
    )
    await stream.send_all(connection.send(request) or b"")
    await stream.send_all(connection.send(h11.EndOfMessage()) or b"")
    try:
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some(READ_BYTES)))
            elif isinstance(event, h11.Response):
                return None if 200 <= event.status_code < 400 else f"GET {path} was answered with {event.status_code}"
            elif not isinstance(event, h11.InformationalResponse):
                return f"GET {path} was not answered"
    except h11.RemoteProtocolError as error:
        return f"GET {path} was not answered with HTTP: {error}"


class Checker:
    """Checks one application. `health` gives what the policy says at the moment, `connect` a connection by it."""

    def __init__(
        self,
        health: Callable[[], Health | None],
        connect: Callable[[Health], Awaitable[trio.abc.Stream]],
        host: str,
        changed: Callable[[Verdict], None],
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.verdict = Verdict()
        self._health, self._connect, self._host, self._changed, self._chance = health, connect, host, changed, chance

    async def once(self) -> str | None:
        """One check, which counts."""
        health = self._health() or TCP_ALONE
        problem = await check(lambda: self._connect(health), health, self._host)
        if self.verdict.result(problem, health):
            self._changed(self.verdict)
        return problem

    async def run(self) -> None:
        """For ever."""
        while True:
            health = self._health() or TCP_ALONE
            await trio.sleep(health.interval_s * (1 - JITTER + 2 * JITTER * self._chance()))
            await self.once()
