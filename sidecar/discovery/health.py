"""Is our own application well? Checks it for as long as the sidecar lives.

An HTTP GET, a question in gRPC's health protocol, or a TCP connection, every `interval_s` give or take 10%; the verdict
turns after so many results in a row.
Must not know what is done with the verdict, nor how connections are made. Invariant: a check that hangs ends with its
time limit, and the next comes when it is due.
"""

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import h11
import trio

from sidecar.model.snapshot import Health
from sidecar.policy.outcome import Grpc
from sidecar.wire.grpc import first_message, frame, read_message, write_timeout
from sidecar.wire.http2 import Http2, Stream, open_codec

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
                if health.grpc is not None:
                    return await _ask_grpc(stream, health.grpc, host, health.timeout_s)
                return None if health.http is None else await _ask(stream, health.http, host)
            finally:
                await trio.aclose_forcefully(stream)
    except trio.TooSlowError:
        asked = health.http is not None or health.grpc is not None
        return f"no {'answer' if asked else 'connection'} within {health.timeout_s:g} s"
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


GRPC_METHOD = b"/grpc.health.v1.Health/Check"
_SERVING_STATUSES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


async def _ask_grpc(stream: trio.abc.Stream, service: str, host: str, timeout_s: float) -> str | None:
    """grpc.health.v1.Health/Check (grpc/doc/health-checking.md), over HTTP/2 with prior knowledge."""
    codec = open_codec(False)
    call = Stream(method=b"POST")
    await _exchange(stream, codec, lambda: codec.settled)
    fields = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", GRPC_METHOD),
        (b":authority", host.encode()),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"user-agent", b"pillion-health"),
        (b"grpc-timeout", write_timeout(timeout_s)),
    ]
    if codec.error is None:
        codec.request(call, fields, False)
        codec.send(call, frame(_health_request(service)), True)
        await _exchange(stream, codec, lambda: call.error is not None or (call.m is not None and call.m.done))
    answer = call.m
    if answer is None or not answer.done:
        return f"it does not answer in HTTP/2: {codec.error or call.detail or 'it gave the call up'}"
    if answer.status != 200:
        return f"the health service was answered with HTTP status {answer.status}"
    if answer.grpc_status:
        message = next((read_message(v) for n, v in (*answer.trailers, *answer.headers) if n == b"grpc-message"), "")
        return f"the health service answered {Grpc(answer.grpc_status).name}{f': {message[:200]}' if message else ''}"
    try:
        found = _health_status(first_message(b"".join(answer.body)))
    except ValueError as error:
        return f"the health service's answer is malformed: {error}"
    return None if found == "SERVING" else f"the health service says {found}"


async def _exchange(stream: trio.abc.Stream, codec: Http2, over: Callable[[], bool]) -> None:
    """Send and receive until `over`, the connection's end, or an error."""
    while True:
        data = codec.to_send()
        if data:
            await stream.send_all(data)
        if over() or codec.error is not None:
            return
        data = bytes(await stream.receive_some(READ_BYTES))
        if not data:
            raise trio.BrokenResourceError
        codec.receive(data, trio.current_time())


def _health_request(service: str) -> bytes:
    """HealthCheckRequest: field 1 is the service, of 255 characters at most; its length as a varint of two bytes."""
    name = service.encode()
    return b"\n" + bytes((len(name) & 0x7F | 0x80, len(name) >> 7)) + name if name else b""


def _health_status(message: bytes | None) -> str:
    """HealthCheckResponse: field 1 is the status, a varint; left out it is 0."""
    if message is None:
        raise ValueError("it holds no message")
    if not message:
        return _SERVING_STATUSES[0]
    if len(message) != 2 or message[0] != 0x08 or message[1] >= len(_SERVING_STATUSES):
        raise ValueError("it is no HealthCheckResponse")
    return _SERVING_STATUSES[message[1]]


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
