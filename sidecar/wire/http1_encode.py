"""From Messages back to bytes: heads, chunks, the last chunk.

Everything that was not end-to-end is made anew here: the request line in origin-form, Host, framing, Connection. What
a sidecar adds (identity, trace, attempt) comes as fields in `extra`. Must not know policy. Invariants: one
framing field at most; names and values are clean because the codec, or `is_field` for edits, let them in.
"""

from collections.abc import Sequence
from http import HTTPStatus

from .http1_message import Message

Fields = Sequence[tuple[bytes, bytes]]

_join = b": ".join


def _status_line(status: int) -> bytes:
    try:
        reason = HTTPStatus(status).phrase
    except ValueError:
        reason = ""
    return f"HTTP/1.1 {status} {reason}\r\n".encode("ascii")


STATUS_LINES = tuple(_status_line(status) for status in range(600))
"""By status; the peer's own reason phrase is not passed on (RFC 9112, section 4: it carries no meaning)."""


def encode_request(m: Message, host: bytes, extra: Fields = (), upgrade: bytes | None = None) -> bytes:
    """The head to send upstream, always HTTP/1.1. `upgrade`: what it asks to upgrade to, where it may."""
    lines = b"\r\n".join(map(_join, [*m.headers, *extra]))
    if lines:
        lines += b"\r\n"
    if m.chunked:
        framing = b"transfer-encoding: chunked\r\n"
    elif m.length is not None:
        framing = b"content-length: %d\r\n" % m.length
    else:
        framing = b""
    if upgrade is not None:
        framing += b"connection: upgrade\r\nupgrade: %b\r\n" % upgrade
    return b"%b %b HTTP/1.1\r\nhost: %b\r\n%b%b\r\n" % (m.method, m.path or host, host, lines, framing)


def encode_response(
    m: Message, *, chunked: bool, close: bool, extra: Fields = (), http10_keep_alive: bool = False
) -> bytes:
    """The head to send downstream. With `chunked` the body is sent in chunks, whatever the upstream's framing was.

    A response to HEAD, and a 304, keeps its content-length although no body follows (RFC 9110, section 8.6); 1xx and
    204 never have framing fields. A 101 says again what was switched to. `http10_keep_alive` tells an HTTP/1.0 client
    that the connection stays open.
    """
    status = m.status
    out = [STATUS_LINES[status]]
    if m.headers or extra:
        out.append(b"\r\n".join(map(_join, [*m.headers, *extra] if extra else m.headers)))
        out.append(b"\r\n")
    if status < 200:
        if status == 101 and m.upgrade is not None:
            out.append(b"connection: upgrade\r\nupgrade: %b\r\n" % m.upgrade)
    elif status != 204:
        if chunked:
            out.append(b"transfer-encoding: chunked\r\n")
        elif m.length is not None:
            out.append(b"content-length: %d\r\n" % m.length)
    if close:
        out.append(b"connection: close\r\n\r\n")
    elif http10_keep_alive:
        out.append(b"connection: keep-alive\r\n\r\n")
    else:
        out.append(b"\r\n")
    return b"".join(out)


def chunk(data: bytes) -> bytes:
    """One chunk; nothing for no data, because an empty chunk would be the last."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


def last_chunk(trailers: list[tuple[bytes, bytes]]) -> bytes:
    """The end of a chunked body."""
    if not trailers:
        return b"0\r\n\r\n"
    return b"0\r\n%b\r\n\r\n" % b"\r\n".join(map(_join, trailers))
