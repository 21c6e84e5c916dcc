"""One HTTP/1.1 message as both sides of the proxy see it: what is end-to-end in lists, everything else in attributes.

Filled in place by a codec as bytes arrive, read and edited by filters and the driver. Must not know how it was parsed.
Invariants: names are lower case; `headers` and `trailers` hold no hop-by-hop field, nothing that Connection nominates,
no framing, no Host, and no field that only sidecars may set.
"""

from .target import ORIGIN, Form


class Message:
    """Mutable; one per head."""

    __slots__ = (
        "attempt",
        "body",
        "chunked",
        "deadline_ms",
        "done",
        "exhausted",
        "expect_continue",
        "extended",
        "form",
        "forwarded",
        "grpc",
        "grpc_status",
        "head",
        "headers",
        "host",
        "host_key",
        "http10",
        "keep_alive",
        "length",
        "method",
        "path",
        "reason",
        "status",
        "target",
        "te_trailers",
        "traceparent",
        "trailers",
        "until_close",
        "upgrade",
    )

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.trailers: list[tuple[bytes, bytes]] = []
        self.forwarded: list[tuple[bytes, bytes]] = []  # x-forwarded-*, x-real-ip, forwarded: as received, not believed
        self.body: list[bytes] = []  # arrived and not taken yet
        self.head = self.done = False  # complete?
        self.length: int | None = None
        self.chunked = self.http10 = self.expect_continue = self.exhausted = self.until_close = False
        self.keep_alive = True
        self.grpc = False  # content-type application/grpc, over HTTP/2; grpc-timeout is in `deadline_ms`
        self.grpc_status: int | None = None  # what a response's head or trailers say
        self.te_trailers = False  # the caller says `te: trailers` (HTTP/2 alone passes it on)
        self.extended = False  # an extended CONNECT (RFC 8441), read as the GET with `upgrade` that it stands for
        self.upgrade: bytes | None = None  # lower-case tokens, if an upgrade is really asked for; never h2c
        self.traceparent: bytes | None = None
        self.attempt = self.status = 0
        self.deadline_ms: float | None = None
        self.reason: bytes | None = None
        self.method = self.target = self.path = b""
        self.form: Form = ORIGIN
        self.host: bytes | None = None
        self.host_key = b""

    def take(self) -> bytes:
        """The body bytes that arrived since the last call."""
        body = self.body
        if len(body) == 1:
            return body.pop()
        data = b"".join(body)
        body.clear()
        return data
