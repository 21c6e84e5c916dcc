"""The opening handshake of WebSocket over HTTP/1.1, for the hop where only one side has one.

Over HTTP/2 (RFC 8441, section 5) an extended CONNECT takes the place of `sec-websocket-key` and `sec-websocket-accept`;
over HTTP/1.1 (RFC 6455, sections 4.1 and 4.2.2) the server proves with them that it has understood. Inside the proxy a
request to upgrade always has a key and a 101 its accept, whatever the hops speak.
Pure; must not know frames or connections. Invariant: a key is made anew for each request that came without one.
"""

from base64 import b64encode
from hashlib import sha1

from .http1_message import Message

WEBSOCKET = b"websocket"
KEY, ACCEPT = b"sec-websocket-key", b"sec-websocket-accept"
KEY_BITS = 128
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3

Field = tuple[bytes, bytes]


def new_key(bits: int) -> bytes:
    """A key of KEY_BITS random bits."""
    return b64encode(bits.to_bytes(KEY_BITS // 8))


def accept_of(key: bytes) -> bytes:
    """What a server answers to this key."""
    return b64encode(sha1(key + _GUID, usedforsecurity=False).digest())


def complete_request(m: Message, bits: int) -> None:
    """An extended CONNECT becomes what HTTP/1.1 asks for: a key of ours, whatever the caller may have sent."""
    m.headers = [field for field in m.headers if field[0] not in (KEY, ACCEPT)]
    m.headers.append((KEY, new_key(bits)))


def complete_response(request: Message, m: Message) -> None:
    """The same for the answer of an HTTP/2 server that has accepted such a request."""
    m.headers = [field for field in m.headers if field[0] not in (KEY, ACCEPT)]
    key = _value(request.headers, KEY)
    if key is not None:
        m.headers.append((ACCEPT, accept_of(key)))


def accepted(request: Message, m: Message) -> bool:
    """Whether a server has answered the key of this request."""
    key = _value(request.headers, KEY)
    return key is not None and _value(m.headers, ACCEPT) == accept_of(key)


def without_handshake(headers: list[Field]) -> list[Field]:
    """What of the fields there is over HTTP/2."""
    return [field for field in headers if field[0] not in (KEY, ACCEPT)]


def _value(headers: list[Field], name: bytes) -> bytes | None:
    """The field's one value; None where it is absent or repeated."""
    values = [value for each, value in headers if each == name]
    return values[0] if len(values) == 1 else None
