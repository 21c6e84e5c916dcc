"""What both APIs share: bodies that are bounded and read strictly, errors of one form, and who the peer is.

Plain ASGI, so that it runs under any of its servers. Must not know what is asked for. Invariants: nothing is read
beyond the bound; JSON that two readers could understand differently is refused; a peer is what our own listener says of
it, in exactly the form in which it says so, or the request is refused.
"""

import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

from certs.spiffe import SpiffeError, SpiffeId
from control_plane.store.base import StoreError, StoreFull

Json = Any
Scope = Any
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

CONTROL_PLANE = "pillion-control-plane"
RETRY_AFTER_S = 2
PEERS_KEPT = 4096  # each asks again and again
_XFCC = re.compile(r"By=([^;,\"\s]+);Hash=([0-9a-f]{64});URI=([^;,\"\s]+)", re.ASCII)
_SURROGATE = re.compile("[\ud800-\udfff]")
_BAD_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class ApiError(Exception):
    """An answer that says no. `help`: what to do about it; `details`: data for programs."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        help: str = "",
        details: Json = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.help, self.details = status, code, message, help, details
        self.retry_after_s = RETRY_AFTER_S if retry_after_s is None and status in (429, 503) else retry_after_s

    def to_json(self) -> dict[str, Json]:
        error: dict[str, Json] = {"code": self.code, "message": self.message, "help": self.help}
        if self.details is not None:
            error["details"] = self.details
        return {"error": error}


def of_store(error: StoreError) -> ApiError:
    """What becomes of a request when the store does not do its part."""
    if isinstance(error, StoreFull):
        return ApiError(
            503,
            "store_full",
            f"the store has no space left: {error}",
            "make room; what is stored is served on",
            None,
            30,
        )
    return ApiError(
        503,
        "store_unavailable",
        f"the store does not take the change: {error}",
        "the change may or may not have been made: look before you try again; pillion check says more",
    )


# Bodies


async def read_body(receive: Receive, bytes_max: int) -> bytes:
    """The body of a request. Raises ApiError; the caller has gone: ConnectionError."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the caller has gone")
        part = message.get("body", b"")
        size += len(part)
        if size > bytes_max:
            raise ApiError(413, "too_large", f"the body is larger than {bytes_max} bytes")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def read_json(receive: Receive, bytes_max: int) -> Json:
    """The body of a request, as JSON; an empty one stands for {}. Raises ApiError; ConnectionError as `read_body`."""
    body = await read_body(receive, bytes_max)
    return decode_json(body) if body else {}


def decode_json(body: bytes) -> Json:
    """RFC 8259, and nothing that is not: no NaN, no key twice, no half of a surrogate pair, nothing nested beyond
    measure. Raises ApiError."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, "invalid", f"the body is not UTF-8 (at byte {error.start})") from None
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise ApiError(400, "invalid", "the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, "invalid", f"the body is not JSON: {error}") from None
    except ValueError as error:  # ours, and numbers with thousands of digits
        raise ApiError(400, "invalid", f"the body is not JSON as it should be: {str(error)[:200]}") from None
    # Only an escape can smuggle half a pair in, and then no answer could quote it.
    if _BAD_ESCAPE.search(text) and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise ApiError(400, "invalid", "a text in the body has half of a surrogate pair")
    return value


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:60]!a} stands there twice")
            seen.add(key)
    return found


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


# Answers


async def send_bytes(send: Send, status: int, body: bytes, headers: Headers = ()) -> None:
    start = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
        *headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def send_json(send: Send, status: int, data: Json, headers: Headers = ()) -> None:
    body = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    await send_bytes(send, status, body, headers)


async def send_error(send: Send, error: ApiError) -> None:
    headers: list[tuple[bytes, bytes]] = []
    if error.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % error.retry_after_s))
    if error.status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="pillion"'))  # RFC 9110, 11.6.1: a must
    await send_json(send, error.status, error.to_json(), headers)


# Who asks


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom TLS has proven: a SPIFFE ID of our trust domain, and the SHA-256 (hex) of the leaf."""

    identity: SpiffeId
    fingerprint: str

    @property
    def service(self) -> str | None:
        return self.identity.service

    @property
    def operator(self) -> tuple[str, str] | None:
        """The name of the operator whose certificate this is, and the id of the token that it stands for."""
        parts = self.identity.path.split("/")
        return (parts[2], parts[3]) if len(parts) == 4 and parts[1] == "operator" else None


def header(scope: Scope, name: bytes) -> list[bytes]:
    """All values of a header."""
    return [value for key, value in scope["headers"] if key.lower() == name]


def peer_of(scope: Scope) -> Peer | None:
    """The peer, as our own listener tells it; None: it has shown no certificate. Raises ApiError."""
    values = header(scope, b"x-forwarded-client-cert")
    if not values:
        return None
    if len(values) > 1:
        raise _strange_peer("more than one x-forwarded-client-cert")
    try:
        return parse_peer(values[0].decode("ascii"))
    except (UnicodeDecodeError, SpiffeError) as error:
        raise _strange_peer(str(error)) from None


@lru_cache(PEERS_KEPT)
def parse_peer(text: str) -> Peer:
    """`By=<our own SPIFFE ID>;Hash=<hex>;URI=<the peer's>`, exactly. Raises SpiffeError."""
    found = _XFCC.fullmatch(text)
    if found is None:
        raise SpiffeError("not of the form By=…;Hash=…;URI=…")
    own, identity = SpiffeId.parse(found[1]), SpiffeId.parse(found[3])
    if own.service != CONTROL_PLANE:
        raise SpiffeError(f"said by {own}, which is no control plane")
    if own.trust_domain != identity.trust_domain:
        raise SpiffeError(f"{identity} is of another trust domain than {own}")
    return Peer(identity, found[2])


def _strange_peer(reason: str) -> ApiError:
    return ApiError(401, "no_certificate", f"it is not clear who asks: {reason}")


# Queries


def read_query(scope: Scope, known: Mapping[str, object]) -> dict[str, str]:
    """The query as a map. Raises ApiError for a name that is unknown or given twice, and for what is not UTF-8."""
    from urllib.parse import parse_qsl

    try:
        pairs = parse_qsl(
            scope["query_string"].decode("ascii"),
            keep_blank_values=True,
            strict_parsing=bool(scope["query_string"]),
            errors="strict",
            max_num_fields=32,
        )
    except ValueError:
        raise ApiError(400, "invalid", "the query is malformed") from None
    found: dict[str, str] = {}
    for name, value in pairs:
        if name not in known:
            told = ", ".join(known) or "none"
            raise ApiError(400, "invalid", f"unknown parameter {name[:60]!a} of the query; known: {told}")
        if name in found:
            raise ApiError(400, "invalid", f"the parameter {name!r} of the query is given twice")
        found[name] = value
    return found
