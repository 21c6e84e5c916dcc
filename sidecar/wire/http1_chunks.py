"""Decoding the chunked transfer coding (RFC 9112, section 7.1). Sans-IO.

Chunk sizes are plain hexadecimal digits, line ends are CRLF, extensions are well-formed, counted and thrown away, and
data is followed by CRLF at once. Invariant: at most one incomplete line or trailer section is held, and it is bounded.
Must not know heads or connections.
"""

import re

from .http1_guard import CHUNK_EXTENSION_BYTES_MAX, TOKEN, TRAILER_BYTES_MAX, ProtocolError, has_bare_ending
from .http1_heads import trailer_fields
from .http1_message import Message

_QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
_EXTENSIONS = rb"(?:;" + TOKEN + rb"+(?:=(?:" + TOKEN + rb"+|" + _QUOTED + rb"))?)+"
# No white space anywhere (it is "bad" even where the grammar allows it), and sizes of at most 15 digits: 1 EiB.
_first_line = re.compile(rb"()([0-9A-Fa-f]{1,15})(" + _EXTENSIONS + rb")?\r\n").match
_next_line = re.compile(rb"(\r\n)([0-9A-Fa-f]{1,15})(" + _EXTENSIONS + rb")?\r\n").match
_first_so_far = re.compile(rb"(?:[0-9A-Fa-f]{1,15}(;[\t -~\x80-\xff]*)?\r?)?").fullmatch
_next_so_far = re.compile(rb"\r(?:\n(?:[0-9A-Fa-f]{1,15}(;[\t -~\x80-\xff]*)?\r?)?)?").fullmatch


class Chunks:
    """One body at a time: `begin`, then `feed` until the message is done."""

    __slots__ = ("_extension_bytes", "_first", "_left", "_trailing", "held")

    def __init__(self) -> None:
        self.held = b""
        self.begin()

    def begin(self) -> None:
        self._left = self._extension_bytes = 0
        self._first = True
        self._trailing = False

    def feed(self, m: Message, data: bytes, pos: int) -> tuple[bytes, int]:
        """Read from data[pos:]; gives the data it went on with, and how far it read in it."""
        if self.held:
            ended = data.find(b"\n", pos) >= 0
            data = self.held + data[pos:]
            pos = 0
            self.held = b""
            if not ended:  # patterns need not be tried at every byte of a line that trickles in
                if self._trailing:
                    self._hold_trailers(data)
                else:
                    self._hold_line(data)
                return data, len(data)
        size = len(data)
        while pos < size and not self._trailing:
            left = self._left
            if left:
                if size - pos < left:
                    m.body.append(data[pos:] if pos else data)
                    self._left = left - (size - pos)
                    return data, size
                m.body.append(data[pos : pos + left])
                pos += left
                self._left = 0
                if data.startswith(b"\r\n0\r\n\r\n", pos):  # how nearly every body ends
                    m.done = True
                    return data, pos + 7
                continue
            line = (_first_line if self._first else _next_line)(data, pos)
            if line is None:
                self._hold_line(data[pos:])
                return data, size
            pos = line.end()
            self._first = False
            if line[3] is not None:
                self._extended(len(line[3]))
            self._left = int(line[2], 16)
            self._trailing = not self._left
        if pos < size:
            return data, self._trailers(m, data, pos)
        return data, pos

    def _extended(self, size: int) -> None:
        self._extension_bytes += size
        if self._extension_bytes > CHUNK_EXTENSION_BYTES_MAX:
            raise ProtocolError(400, "chunk extensions too long")

    def _hold_line(self, rest: bytes) -> None:
        """A line that does not match: unfinished, or wrong."""
        match = (_first_so_far if self._first else _next_so_far)(rest)
        if match is None:
            if not self._first and not rest.startswith(b"\r\n"):
                raise ProtocolError(400, "chunk data is not followed by CRLF")
            raise ProtocolError(400, "malformed chunk size or extension")
        if match[1] is not None and self._extension_bytes + len(match[1]) > CHUNK_EXTENSION_BYTES_MAX:
            raise ProtocolError(400, "chunk extensions too long")
        self.held = rest

    def _trailers(self, m: Message, data: bytes, pos: int) -> int:
        if data.startswith(b"\r\n", pos):
            m.done = True
            return pos + 2
        end = data.find(b"\r\n\r\n", pos, pos + TRAILER_BYTES_MAX)
        if end >= 0:
            m.trailers = trailer_fields(data[pos:end])
            m.done = True
            return end + 4
        self._hold_trailers(data[pos:])
        return len(data)

    def _hold_trailers(self, rest: bytes) -> None:
        if has_bare_ending(rest, 0, TRAILER_BYTES_MAX):
            raise ProtocolError(400, "bare line feed or carriage return among the fields")
        if len(rest) >= TRAILER_BYTES_MAX:
            raise ProtocolError(431, "trailer section too large")
        self.held = rest
