"""The cookie that keeps a client at the version, or the endpoint, that it was given.

The value is opaque to clients and authenticated (HMAC-SHA256, cut to 16 bytes): nobody can choose a version by writing
a cookie, and a cookie is good only for the name and the scope that it was issued for. An endpoint stands in it as a
token, so that addresses stay at home. Must not know which versions or endpoints exist: whoever reads one checks it
against the route. Invariant: whatever arrives, `read` gives a word that this key, or a former one that is still
honoured, has issued, or None.
"""

import binascii
import hmac
import math
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator

Former = tuple[tuple[bytes, float], ...]
"""Keys that make no more cookies, and until when (seconds since the epoch) those that they have made are honoured."""

_MAC_BYTES = 16
_TOKEN_BYTES = 8
_EXPIRY = struct.Struct(">Q")
_VALUE_CHARS_MAX = 400  # a version's name is far shorter
_CANDIDATES_MAX = 4  # a client may hold cookies of that name for several paths


class Sticky:
    """One for each route that says `sticky`. `scope` (the service's name) keeps cookies of one service from another;
    those of versions and of endpoints (`by_endpoint`) are not mistaken for each other either."""

    __slots__ = ("_attributes", "_former", "_key", "_prefix", "_salt", "by_endpoint", "ttl_s")

    def __init__(
        self,
        cookie: str,
        ttl_s: float,
        key: bytes,
        scope: str = "",
        *,
        by_endpoint: bool = False,
        former: Former = (),
    ) -> None:
        self.ttl_s = ttl_s
        self.by_endpoint = by_endpoint
        self._key, self._former = key, former
        self._prefix = cookie.encode("ascii") + b"="
        kind = b"pillion sticky endpoint 1\0" if by_endpoint else b"pillion sticky 1\0"
        self._salt = kind + scope.encode() + b"\0" + self._prefix
        self._attributes = b"; Path=/; Max-Age=%d; HttpOnly; SameSite=Lax" % max(1, math.ceil(ttl_s))

    def token(self, endpoint_key: str) -> str:
        """What stands for an endpoint in a cookie."""
        return self._token(self._key, endpoint_key)

    def tokens(self, endpoint_key: str) -> Iterator[str]:
        """All that may stand for it in a cookie that is still honoured."""
        yield self._token(self._key, endpoint_key)
        for key, _ in self._former:
            yield self._token(key, endpoint_key)

    def _token(self, key: bytes, endpoint_key: str) -> str:
        return hmac.digest(key, self._salt + b"\0token\0" + endpoint_key.encode(), "sha256")[:_TOKEN_BYTES].hex()

    def issue(self, version: str, now_epoch_s: float) -> bytes:
        """The value of a Set-Cookie field."""
        payload = _EXPIRY.pack(math.ceil(now_epoch_s + self.ttl_s)) + version.encode()
        value = urlsafe_b64encode(payload + self._mac(self._key, payload)).rstrip(b"=")
        return self._prefix + value + self._attributes

    def read(self, cookie_header: bytes, now_epoch_s: float) -> str | None:
        """The version in the value of a Cookie field; None where there is none, or it is forged or expired."""
        prefix = self._prefix
        if prefix not in cookie_header:
            return None
        seen = 0
        for pair in cookie_header.split(b";"):
            crumb = pair.strip(b" \t")
            if not crumb.startswith(prefix):
                continue
            version = self._open(crumb[len(prefix) :], now_epoch_s)
            seen += 1
            if version is not None or seen == _CANDIDATES_MAX:
                return version
        return None

    def _open(self, value: bytes, now_epoch_s: float) -> str | None:
        if len(value) > _VALUE_CHARS_MAX:
            return None
        try:
            # Python's decoder skips characters outside the alphabet; the round trip below refuses such spellings.
            raw = urlsafe_b64decode(value + b"=" * (-len(value) % 4))
        except (binascii.Error, ValueError):
            return None
        if len(raw) < _EXPIRY.size + _MAC_BYTES or urlsafe_b64encode(raw).rstrip(b"=") != value:
            return None
        payload, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
        if not hmac.compare_digest(mac, self._mac(self._key, payload)) and not any(
            now_epoch_s < until and hmac.compare_digest(mac, self._mac(key, payload)) for key, until in self._former
        ):
            return None
        if _EXPIRY.unpack_from(payload)[0] <= now_epoch_s:
            return None
        return payload[_EXPIRY.size :].decode()

    def _mac(self, key: bytes, payload: bytes) -> bytes:
        return hmac.digest(key, self._salt + payload, "sha256")[:_MAC_BYTES]
