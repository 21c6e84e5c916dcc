"""Framing of opaque TCP between two sidecars (ALPN `pillion-tcp`): a length before each chunk, length 0 at the end.

TLS can end one direction with close_notify, but OpenSSL's SSL_shutdown, as Python offers it, goes on to read, and what
the peer still has in flight at that moment is lost ("application data after close notify"). So the end of a direction
is said in the stream, and the TLS connection stays whole until both directions have ended.
Must not know sockets. Invariants: chunks are handed on as they arrive, a frame is never gathered; a stream whose end
frame has not come has been cut; after the end frame not one byte may follow.
"""

HEADER_BYTES = 4
FRAME_BYTES_MAX = 1 << 20
END = bytes(HEADER_BYTES)


class FrameError(Exception):
    """The peer broke the framing."""


def header(length: int) -> bytes:
    """The header of one chunk of 1 to FRAME_BYTES_MAX bytes."""
    if not 0 < length <= FRAME_BYTES_MAX:
        raise ValueError(f"a frame carries 1 to {FRAME_BYTES_MAX} bytes, not {length}")
    return length.to_bytes(HEADER_BYTES, "big")


class FrameDecoder:
    """One direction of one stream: `feed` bytes as they come, get the payload back in pieces."""

    __slots__ = ("_left", "_partial", "ended")

    def __init__(self) -> None:
        self.ended = False
        self._left = 0  # bytes of the present frame that are still to come
        self._partial = b""  # the beginning of a header

    def feed(self, data: bytes) -> list[memoryview]:
        """Pieces of payload, none of them empty. `ended` turns true with the end frame."""
        pieces: list[memoryview] = []
        if self._partial:
            data = self._partial + data
            self._partial = b""
        view, at, size = memoryview(data), 0, len(data)
        while at < size:
            if self.ended:
                raise FrameError("bytes after the end of the stream")
            if self._left:
                take = min(self._left, size - at)
                pieces.append(view[at : at + take])
                self._left -= take
                at += take
                continue
            if size - at < HEADER_BYTES:
                self._partial = bytes(view[at:])
                break
            length = int.from_bytes(view[at : at + HEADER_BYTES], "big")
            at += HEADER_BYTES
            if length > FRAME_BYTES_MAX:
                raise FrameError(f"a frame of {length} bytes; at most {FRAME_BYTES_MAX} are allowed")
            self._left = length
            self.ended = length == 0
        return pieces
