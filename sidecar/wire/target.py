"""The request target and the authority: which form, which host, which path (RFC 9112, section 3.2; RFC 3986).

Pure functions over bytes. Must not know policy: what a path means, and how it is normalised, is decided elsewhere.
Invariant: an authority that passes has exactly one reading; userinfo, percent-encoding, empty labels and ports that
are not plain numbers are refused rather than interpreted.
"""

import re
from enum import Enum
from ipaddress import IPv6Address

from .http1_guard import ProtocolError


class Form(Enum):
    """The form in which a request target was written."""

    ORIGIN = "origin"
    ABSOLUTE = "absolute"
    ASTERISK = "asterisk"
    AUTHORITY = "authority"


ORIGIN, ABSOLUTE, ASTERISK, AUTHORITY = Form.ORIGIN, Form.ABSOLUTE, Form.ASTERISK, Form.AUTHORITY

_ENTRIES_MAX = 4096
_AUTHORITY_BYTES_MAX = 262  # a DNS name of 255, a colon and a port

_split_authority = re.compile(
    rb"((?:[a-z0-9_~-]+\.)*[a-z0-9_~-]+|\[[0-9a-f:.]+\])\.?(?::([1-9][0-9]{0,4}))?", re.IGNORECASE
).fullmatch
_absolute = re.compile(rb"https?://([^/?]*)(.*)", re.IGNORECASE).fullmatch


class _HostKeys(dict[bytes, bytes]):
    """Authority as received -> its host in lower case, without port and without one trailing dot."""

    def __missing__(self, authority: bytes) -> bytes:
        key = _host_key(authority)
        if len(self) >= _ENTRIES_MAX:
            self.clear()
        self[authority] = key
        return key


def _host_key(authority: bytes) -> bytes:
    if not authority:
        raise ProtocolError(400, "empty host")
    if len(authority) > _AUTHORITY_BYTES_MAX:
        raise ProtocolError(400, "host too long")
    if b"@" in authority:
        raise ProtocolError(400, "userinfo in the host")
    if b"," in authority:
        raise ProtocolError(400, "host repeated, or a list of hosts")
    match = _split_authority(authority)
    if match is None:
        raise ProtocolError(400, "malformed host or port")
    host, port = match.groups()
    if port is not None and int(port) > 65535:
        raise ProtocolError(400, "malformed host or port")
    host = host.lower()
    if host[:1] == b"[":
        if authority[len(host) : len(host) + 1] == b".":
            raise ProtocolError(400, "malformed host or port")
        try:
            IPv6Address(host[1:-1].decode("ascii"))
        except ValueError:
            raise ProtocolError(400, "malformed IPv6 address in the host") from None
    return bytes(host)


HOST_KEYS = _HostKeys()
"""Look-up that fills itself; raises ProtocolError for an authority that is refused."""


def split_target(method: bytes, target: bytes) -> tuple[Form, bytes, bytes | None]:
    """(form, path to forward in origin-form, authority). For targets that do not simply begin with '/'."""
    if method == b"CONNECT":
        if HOST_KEYS[target] and target.rpartition(b":")[2].isdigit():
            return AUTHORITY, b"", target
        raise ProtocolError(400, "target of CONNECT is not host:port")
    if target[:1] == b"/":
        return ORIGIN, target, None
    if target == b"*":
        if method != b"OPTIONS":
            raise ProtocolError(400, "asterisk as the target of another method than OPTIONS")
        return ASTERISK, b"*", None
    match = _absolute(target)
    if match is None:
        raise ProtocolError(400, "unknown form of request target")
    authority, path = match.groups()
    if not path:
        # RFC 9112, section 3.2.4: the last proxy on the way sends OPTIONS without a path as "*".
        path = b"*" if method == b"OPTIONS" else b"/"
    elif path[:1] == b"?":
        path = b"/" + path
    return ABSOLUTE, path, authority
