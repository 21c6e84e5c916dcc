"""HTTP/1.1 codecs: bytes in, Messages out. Sans-IO.

A head is gathered whole, judged on its raw bytes, split by lines and looked up; bodies are counted or unchunked; the
result never depends on where reads were cut. (llhttp was measured and left out: with a callback into Python for each
field it costs as much as this, and what it lets pass had to be checked on the raw bytes anyway. Tests compare with it.)
Must not know sockets, time or policy. Invariants: after a ProtocolError no further input is read; bytes that follow
what may become a tunnel are kept as they came until it is decided; what is held is bounded, by HEAD_BYTES_MAX and what
a driver reads before it pauses.
"""

from collections import deque

from .http1_backlog import Backlog
from .http1_chunks import Chunks
from .http1_encode import STATUS_LINES, chunk, encode_request, encode_response, last_chunk
from .http1_guard import (
    FIELDS_MAX,
    HEAD_BYTES_MAX,
    LINE_BYTES_MAX,
    SPARE_BYTES,
    SPARE_FIELDS,
    ProtocolError,
    check_unfinished,
    is_field,
)
from .http1_heads import request_head, response_head
from .http1_message import Message
from .target import ABSOLUTE, ASTERISK, AUTHORITY, HOST_KEYS, ORIGIN, Form

__all__ = [
    "ABSOLUTE",
    "ASTERISK",
    "AUTHORITY",
    "FIELDS_MAX",
    "HEAD_BYTES_MAX",
    "HOST_KEYS",
    "INFORMATIONAL_MAX",
    "LINE_BYTES_MAX",
    "ORIGIN",
    "PIPELINED_MAX",
    "STATUS_LINES",
    "Form",
    "Message",
    "ProtocolError",
    "Requests",
    "Responses",
    "chunk",
    "encode_request",
    "encode_response",
    "is_field",
    "last_chunk",
]

INFORMATIONAL_MAX = 16
"""1xx responses before the final one."""
PIPELINED_MAX = 16
"""Requests read ahead; what a client has pipelined beyond them stays raw until they have been taken."""
BEHIND_BYTES_MAX = 262144
"""Raw bytes kept behind such requests, or behind one that may become a tunnel; a driver that pauses stays below."""


class _Codec:
    """What both sides share: unfinished heads, and bodies. Limits are a little wider where the peer is a sidecar."""

    __slots__ = ("_bytes_max", "_chunks", "_error", "_fields_max", "_held", "_left", "m")

    def __init__(self, between_sidecars: bool = False) -> None:
        self.m: Message | None = None
        self._bytes_max = HEAD_BYTES_MAX + (SPARE_BYTES if between_sidecars else 0)
        self._fields_max = FIELDS_MAX + (SPARE_FIELDS if between_sidecars else 0)
        self._held = bytearray()  # an unfinished head
        self._left = 0  # of a counted body; negative: it comes in chunks (`m.chunked` may be changed for sending on)
        self._chunks: Chunks | None = None
        self._error: ProtocolError | None = None

    def _gather(self, data: bytes, request: bool) -> bytes:
        """Add to the unfinished head; gives everything once the head is whole, else nothing."""
        held = self._held
        seen = len(held)
        held += data
        if held.find(b"\r\n\r\n", max(seen - 3, 0), self._bytes_max) < 0:
            check_unfinished(held, seen, self._bytes_max, request)
            return b""
        whole = bytes(held)
        held.clear()
        return whole

    def _chunked(self) -> None:
        """The body of the current message is chunked."""
        self._left = -1
        if self._chunks is None:
            self._chunks = Chunks()
        else:
            self._chunks.begin()

    def _body(self, m: Message, data: bytes, pos: int) -> tuple[bytes, int]:
        """Read more of a framed body; gives the data it went on with, and how far it read in it."""
        left = self._left
        if left < 0:
            assert self._chunks is not None
            return self._chunks.feed(m, data, pos)
        size = len(data)
        if size - pos < left:
            m.body.append(data[pos:] if pos else data)
            self._left = left - (size - pos)
            return data, size
        m.body.append(data[pos : pos + left] if pos or size > left else data)
        m.done = True
        return data, pos + left


class Requests(_Codec):
    """The server's side of a connection. `messages` holds complete heads in order; the last may still lack body.

    Take them with `popleft`: taking the last one reads on in what was pipelined behind it. An error found there, like
    one behind an undecided upgrade, is raised by the next `receive`, and shown by `error` at once.
    """

    __slots__ = ("_behind", "_rest", "_undecided", "messages")

    def __init__(self, between_sidecars: bool = False) -> None:
        super().__init__(between_sidecars)
        self.messages: deque[Message] = deque()
        self._rest = b""  # behind PIPELINED_MAX requests
        self._behind: bytearray | None = None  # raw bytes behind the first of `_undecided`
        self._undecided: list[tuple[Message, int]] = []  # requests that may become tunnels; offset of what is behind

    @property
    def started(self) -> bool:
        """Whether part of a head is here and the rest is not (or can never be)."""
        return bool(self._held) or self._error is not None

    @property
    def error(self) -> ProtocolError | None:
        """Why nothing more is read."""
        return self._error

    @property
    def head_buffered_bytes(self) -> int:
        """How much of an unfinished head is held."""
        return len(self._held)

    def receive(self, data: bytes) -> None:
        """Read on. Raises ProtocolError; requests that were complete before the error stay in `messages`."""
        if self._behind is not None:
            self._keep_behind(data)
        if self._rest:
            self._rest += data
            if len(self._rest) > BEHIND_BYTES_MAX:
                self._fail(ProtocolError(400, "too much data behind pipelined requests"))
            data = b""
        if self._error is None:
            try:
                self._parse(data)
                return
            except ProtocolError as exc:
                self._fail(exc)
        if self._behind is None:  # else it may not be HTTP at all
            assert self._error is not None
            raise self._error

    def read_on(self) -> None:
        """The requests that were read ahead have been taken."""
        data = self._rest
        self._rest = b""
        if data and self._error is None:
            try:
                self._parse(data)
            except ProtocolError as exc:
                self._fail(exc)

    def _fail(self, error: ProtocolError) -> None:
        self._error = error
        self._held.clear()
        self._rest = b""

    def _parse(self, data: bytes) -> None:
        if self._held:
            data = self._gather(data, True)
        pos = 0
        size = len(data)
        m = self.m
        while pos < size:
            if m is None or m.done:
                if len(self.messages) >= PIPELINED_MAX:
                    self._rest = data[pos:]
                    if type(self.messages) is deque:
                        self.messages = Backlog(self.read_on, self.messages)
                    return
                end = data.find(b"\r\n\r\n", pos, pos + self._bytes_max)
                if end < 0:
                    self._gather(data[pos:], True)
                    return
                m = request_head(data[pos:end], self._fields_max)
                pos = end + 4
                self.m = m
                self.messages.append(m)
                if m.chunked:
                    self._chunked()
                elif m.length:
                    self._left = m.length
                else:
                    m.done = True
            else:
                data, pos = self._body(m, data, pos)
                size = len(data)
            if m.done and (m.upgrade is not None or m.form is AUTHORITY):
                self._may_tunnel(m, data[pos:])

    # -- requests that may become tunnels: what follows is HTTP if they do not (so it is read as such), raw if they do

    def _may_tunnel(self, m: Message, rest: bytes) -> None:
        if self._behind is None:
            self._behind = bytearray(rest)
        self._undecided.append((m, len(self._behind) - len(rest)))

    def _keep_behind(self, data: bytes) -> None:
        behind = self._behind
        assert behind is not None
        if not self.messages:
            last, offset = self._undecided[-1]
            if self.m is not last:  # a request behind it has been taken, so it became no tunnel
                self._behind = None
                self._undecided.clear()
                return
            del behind[:offset], self._undecided[:-1]
            self._undecided[0] = (last, 0)
        if len(behind) > BEHIND_BYTES_MAX:
            self._behind = None
            self._undecided.clear()
            self._error = self._error or ProtocolError(400, "too much data behind an undecided upgrade")
            return
        behind += data

    def leftover(self) -> bytes:
        """The request that was taken last becomes a tunnel: gives the bytes that came behind it. Parsing stops."""
        rest = bytes(self._held)
        for m, offset in self._undecided:
            if m not in self.messages:
                rest = bytes(self._behind or b"")[offset:]
        self.messages.clear()
        self._undecided.clear()
        self._behind = None
        self._fail(ProtocolError(400, "the connection has become a tunnel"))
        return rest


class Responses(_Codec):
    """The client's side of a connection: one response for each `expect`.

    `m` is the final response once its head is complete; `informational` holds the 1xx before it.
    Errors have status 502. A message that was complete before the error is still in `m`.
    """

    __slots__ = ("_behind", "_informational_left", "_method", "_tunnel", "_upgrade", "informational")

    def __init__(self, between_sidecars: bool = False) -> None:
        super().__init__(between_sidecars)
        self.informational: list[Message] = []
        self._method: bytes | None = None  # of the request that is being answered
        self._upgrade = False
        self._informational_left = 0
        self._tunnel = False
        self._behind = b""

    def expect(self, method: bytes, upgrade: bool = False) -> None:
        """A request goes out; `upgrade` if it asks for one."""
        assert self.m is None or self.m.done, "the previous response is not complete"
        self.m = None
        self._method = method
        self._upgrade = upgrade
        self._informational_left = INFORMATIONAL_MAX
        if self.informational:
            self.informational.clear()

    def receive(self, data: bytes) -> None:
        """Read on. Raises ProtocolError, also for bytes that nobody asked for."""
        if self._error is not None:
            raise self._error
        try:
            self._parse(data)
        except ProtocolError as exc:
            exc.status = 502
            self._error = exc
            self._held.clear()
            raise

    def _parse(self, data: bytes) -> None:
        if self._held:
            data = self._gather(data, False)
        pos = 0
        size = len(data)
        while pos < size:
            m = self.m
            if m is None:
                if self._method is None:
                    raise ProtocolError(502, "a response that nobody asked for")
                end = data.find(b"\r\n\r\n", pos, pos + self._bytes_max)
                if end < 0:
                    self._gather(data[pos:], False)
                    return
                m = response_head(data[pos:end], self._fields_max)
                pos = end + 4
                if m.status < 200 and m.status != 101:
                    self._inform(m)
                else:
                    self._final(m)
            elif self._tunnel:
                self._behind += data[pos:]
                return
            elif m.done:
                raise ProtocolError(502, "data beyond the end of the response")
            elif m.until_close:
                m.body.append(data[pos:])
                return
            else:
                data, pos = self._body(m, data, pos)
                size = len(data)

    def _inform(self, m: Message) -> None:
        _no_content(m)
        if not self._informational_left:
            raise ProtocolError(502, "too many informational responses")
        self._informational_left -= 1
        self.informational.append(m)

    def _final(self, m: Message) -> None:
        """Whether and how a body follows (RFC 9112, section 6.3)."""
        status = m.status
        if status == 101:
            if not self._upgrade or m.upgrade is None:
                raise ProtocolError(502, "101 without an upgrade that was asked for")
            _no_content(m)
            m.done = self._tunnel = True
        elif self._method == b"CONNECT" and status < 300:
            m.length, m.chunked = None, False  # to be ignored (RFC 9110, section 9.3.6)
            m.done = self._tunnel = True
        elif status == 204:
            _no_content(m)
            m.done = True
        elif status == 304 or self._method == b"HEAD":
            m.done = True
        elif m.chunked:
            self._chunked()
        elif m.length:
            self._left = m.length
        elif m.length is not None:
            m.done = True
        else:
            m.until_close = True
            m.keep_alive = False
        self.m = m

    def eof(self) -> bool:
        """The peer closed. True if the response is complete, perhaps by that; False if it was cut short."""
        m = self.m
        if m is None or self._error is not None:
            return False
        if m.until_close:
            m.done = True
        return m.done

    def leftover(self) -> bytes:
        """After 101, or 2xx to CONNECT: the bytes that came behind the head. Parsing stops."""
        rest = self._behind
        self._behind = b""
        self._error = ProtocolError(502, "the connection has become a tunnel")
        return rest


def _no_content(m: Message) -> None:
    """1xx and 204 have no framing (RFC 9112, section 6.1; RFC 9110, section 8.6). Many write a length of zero."""
    if m.chunked or m.length:
        raise ProtocolError(502, "content in a response that has none")
    m.length = None
