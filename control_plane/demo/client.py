"""A small HTTP/1.1 client: GET over kept connections, on Trio and h11.

For the load generator and for reading admin interfaces many times a second; everything else uses httpx. Invariants:
every call ends within its time limit; answers are bounded; a kept connection that died is replaced once.
"""

from dataclasses import dataclass

import h11
import trio

ANSWER_BYTES_MAX = 8 * 1024 * 1024
GET_S = 10.0


class CallError(Exception):
    """No answer; the text says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


class Client:
    """One connection to one address, one call at a time."""

    def __init__(self, address: str, host: str | None = None) -> None:
        """`address` is HOST:PORT, `host` what the Host field says."""
        self._where, _, port = address.rpartition(":")
        self._port = int(port)
        self._host = host or address
        self._stream: trio.SocketStream | None = None
        self._connection = h11.Connection(h11.CLIENT)

    async def get(self, target: str) -> Answer:
        """Raises CallError."""
        with trio.move_on_after(GET_S):
            for again in (self._stream is not None, False):
                try:
                    return await self._get(target)
                except (OSError, trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError) as error:
                    await self.aclose()
                    if not again:
                        raise CallError(str(error) or type(error).__name__) from None
                except BaseException:
                    await self.aclose()
                    raise
        await self.aclose()
        raise CallError(f"no answer within {GET_S:g} s")

    async def _get(self, target: str) -> Answer:
        if self._stream is None:
            self._stream = await trio.open_tcp_stream(self._where, self._port)
            self._connection = h11.Connection(h11.CLIENT)
        elif self._connection.our_state is h11.DONE:
            self._connection.start_next_cycle()
        connection = self._connection
        head = connection.send(h11.Request(method="GET", target=target, headers=[("host", self._host)]))
        await self._stream.send_all((head or b"") + (connection.send(h11.EndOfMessage()) or b""))
        response: h11.Response | None = None
        body = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(bytes(await self._stream.receive_some(65536)))
            elif isinstance(event, h11.Response):
                response = event
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > ANSWER_BYTES_MAX:
                    raise h11.RemoteProtocolError("the answer is too long")
            elif isinstance(event, h11.EndOfMessage):
                break
            elif isinstance(event, h11.ConnectionClosed):
                raise trio.BrokenResourceError("the connection was closed without an answer")
        assert response is not None
        if connection.their_state is not h11.DONE:
            await self.aclose()
        return Answer(response.status_code, tuple(response.headers), bytes(body))

    async def aclose(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await trio.aclose_forcefully(stream)
