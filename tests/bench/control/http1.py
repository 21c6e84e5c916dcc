"""HTTP/1.1 as the swarm needs it: requests made beforehand, and a parser for answers, which may never end.

Sans-IO, and lenient: it reads one server's answers only. Invariant: what is handed out does not depend on how the bytes
were cut.
"""

from collections.abc import Callable
from enum import Enum, auto

HEAD_BYTES_MAX = 64 * 1024


def post(path: str, host: str, body: bytes) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body


class Broken(Exception):
    """The server said something that is no answer."""


class _Do(Enum):
    HEAD = auto()
    SIZE = auto()
    CHUNK = auto()
    CHUNK_END = auto()
    TRAILERS = auto()
    LENGTH = auto()


class Answers:
    """Calls `head(status)`, then `data(bytes)` for each piece, then `end()`, for one answer after another."""

    def __init__(self, head: Callable[[int], None], data: Callable[[bytes], None], end: Callable[[], None]) -> None:
        self._head, self._data, self._end = head, data, end
        self._held = b""
        self._do = _Do.HEAD
        self._left = 0

    def feed(self, received: bytes) -> None:
        held = self._held + received if self._held else received
        at = 0
        while True:
            if self._do in (_Do.CHUNK, _Do.LENGTH):
                piece = held[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                if piece:
                    self._data(piece)
                if self._left:
                    break
                if self._do is _Do.CHUNK:
                    self._do = _Do.CHUNK_END
                else:
                    self._finish()
                continue
            mark = b"\r\n\r\n" if self._do is _Do.HEAD else b"\r\n"
            found = held.find(mark, at)
            if found < 0:
                if len(held) - at > HEAD_BYTES_MAX:
                    raise Broken("an endless line")
                break
            line = held[at:found]
            at = found + len(mark)
            self._line(line)
        self._held = held[at:]

    def _line(self, line: bytes) -> None:
        if self._do is _Do.HEAD:
            self._read_head(line)
        elif self._do is _Do.SIZE:
            self._left = int(line.split(b";")[0], 16)
            self._do = _Do.CHUNK if self._left else _Do.TRAILERS
        elif self._do is _Do.CHUNK_END:
            self._do = _Do.SIZE
        elif not line:
            self._finish()

    def _read_head(self, text: bytes) -> None:
        lines = text.split(b"\r\n")
        try:
            status = int(lines[0].split(b" ")[1])
        except (IndexError, ValueError):
            raise Broken(f"not a status line: {lines[0][:80]!r}") from None
        fields = {}
        for line in lines[1:]:
            name, _, value = line.partition(b":")
            fields[name.strip().lower()] = value.strip()
        if status < 200:
            return
        self._head(status)
        if b"chunked" in fields.get(b"transfer-encoding", b"").lower():
            self._do = _Do.SIZE
        elif length := int(fields.get(b"content-length", b"0")):
            self._left, self._do = length, _Do.LENGTH
        else:
            self._finish()

    def _finish(self) -> None:
        self._do = _Do.HEAD
        self._end()


class Lines:
    """Cuts a stream into lines, without their ends."""

    def __init__(self) -> None:
        self._held: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        pieces = data.split(b"\n")
        if len(pieces) == 1:
            self._held.append(data)
            return []
        pieces[0] = b"".join((*self._held, pieces[0]))
        last = pieces.pop()
        self._held = [last] if last else []
        return pieces
