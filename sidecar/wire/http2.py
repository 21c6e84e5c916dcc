"""HTTP/2 codecs: one interface over two engines. Bytes in, Messages out. Sans-IO.

A codec owns the frames of one connection and its Streams; whoever drives it gives it bytes (`receive`), looks at the
streams in `news`, acts on them, and writes what `to_send` gives. `http2_ngh2` (libnghttp2) and `http2_h2` are the
engines; `open_codec` picks one. Fields are judged here for both (`http2_heads`), floods likewise (`http2_guard`).
Must not know sockets, time or policy: `now` is an argument. Invariants: after `error` is set nothing further is read;
a stream is in `news` at most once until it is taken; what is held of a peer's bytes is bounded by the windows, and the
connection's window is as large as those of all its streams, so that no stream can starve another.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar

from .http1_message import Message

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client sends first (RFC 9113, section 3.4)."""

Fields = list[tuple[bytes, bytes]]


class ErrorCode(IntEnum):
    """RFC 9113, section 7."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


class Http2Error(Exception):
    """The connection is over. `detail` is for logs and never quotes the peer; `limit` names the limit that was hit,
    "" where the peer broke the protocol instead."""

    def __init__(self, code: int, detail: str, limit: str = "") -> None:
        super().__init__(code, detail, limit)
        self.code, self.detail, self.limit = code, detail, limit

    def __str__(self) -> str:
        return f"{name_of(self.code)}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Http2Limits:
    """What one connection may ask for. `window_bytes` is each stream's receive window; the connection's is
    `streams_max` times that. On a server's side a stream begins with `first_window_bytes`, until it is widened; and the
    connection's window is opened when the client has acknowledged that, since it may send more until then."""

    streams_max: int = 100
    window_bytes: int = 65536
    first_window_bytes: int = 65536


STRANGERS = Http2Limits()  # no smaller first window: httpx, for one, fails where its own turns negative (section 6.9.2)
PEERS = Http2Limits(streams_max=256, first_window_bytes=12288)
"""Between two sidecars."""


class Stream:
    """One request and its response. The codec fills in what the peer sends; `owner` belongs to the driver.

    `m` is what the peer sends: on a server's side the request, there from the stream's first news; on a client's the
    final response, None until its head is complete. Its body gathers in `m.body` until it is taken; `m.done` with
    its end, after which `m.trailers` are complete. `error` is set once, when the stream ends otherwise than by both
    sides' ends: an ErrorCode; `by_peer` says that the peer reset it. `refused`: the peer has not processed the
    request (REFUSED_STREAM, or beyond its GOAWAY's last stream). `status` other than 0 is the answer that a request
    deserves that could be read but not be served (431, 414, 417, 400; `detail` says why): nothing else is told of it.
    `unread_bytes` came and were not given back by `consumed`. `ended`: the peer's direction is over; the same as
    `m.done`, but for a tunnel (an extended CONNECT is read as a complete GET; what then comes in `m.body` is the
    tunnel's). `answered`: our direction is, or its end waits in the codec. `closed`: both directions are over.
    """

    __slots__ = (
        "answered", "by_peer", "closed", "detail", "ended", "error", "informational", "m", "method", "owner",
        "rapid_until", "refused", "sid", "status", "unread_bytes",
    )  # fmt: skip

    def __init__(self, owner: Any = None, method: bytes = b"") -> None:
        """`method`, on a client's side: of the request, since it says whether a response has content."""
        self.owner = owner
        self.method = method
        self.sid = 0
        self.rapid_until = 0.0  # on a server's side: a reset before then is a rapid one
        self.m: Message | None = None
        self.informational: list[Message] = []
        self.error: int | None = None
        self.answered = self.by_peer = self.refused = self.ended = self.closed = False
        self.status = 0
        self.detail = ""
        self.unread_bytes = 0


class Http2(ABC):
    """One connection's codec. Actions only queue; `to_send` gives the bytes. Actions on a stream that is closed or has
    an error do nothing: whoever acts may not have heard of it yet."""

    name: ClassVar[str] = ""  # of the engine

    def __init__(self, server: bool, limits: Http2Limits, between_sidecars: bool) -> None:
        """Begins with our preface and SETTINGS queued. `between_sidecars`: heads may be a little larger, and fields
        that only sidecars may set are believed (as in the codecs of HTTP/1.1)."""
        self.server = server
        self.limits = limits
        self.between_sidecars = between_sidecars
        self.streams: dict[int, Stream] = {}  # those not closed
        self.news: dict[Stream, None] = {}  # streams for which something came, in order; the driver takes them
        self.error: Http2Error | None = None
        self.closing = False  # the peer's GOAWAY has come, or ours has gone: no new streams
        self.peer_streams_max = 100  # how many the peer lets us open (RFC 9113, section 6.5.2 recommends no fewer)
        self.extended_connect = False  # the peer takes extended CONNECT (RFC 8441, section 3)
        self.settled = False  # the peer's SETTINGS have come
        self.pongs = 0  # PINGs of ours that were answered

    @property
    def room(self) -> int:
        """How many more streams we may open now."""
        if self.closing or self.error is not None:
            return 0
        return min(self.peer_streams_max, self.limits.streams_max) - len(self.streams)

    @property
    @abstractmethod
    def unfinished(self) -> bool:
        """Whether part of a frame, or of a header block, is here and the rest is not."""

    @property
    @abstractmethod
    def unfinished_head(self) -> bool:
        """Whether part of a header block is here and the rest is not."""

    def take_news(self) -> list[Stream]:
        """The streams with news, once each. Ask after `receive` and after `to_send`."""
        if not self.news:
            return []
        news, self.news = self.news, {}
        return list(news)

    # -- input and output

    @abstractmethod
    def receive(self, data: bytes, now: float) -> None:
        """Read on. Never raises for what a peer sent: `error` is set, and `to_send` then still gives our GOAWAY."""

    @property
    def wants_to_send(self) -> bool:
        """False: `to_send` would certainly give nothing, and make no news."""
        return True

    @abstractmethod
    def to_send(self) -> bytes:
        """Everything that may be sent now; call it again after every action, every `receive`, once a batch. May set
        `error` and make news."""

    # -- a client's actions

    @abstractmethod
    def request(self, stream: Stream, fields: Fields, end: bool) -> None:
        """Open a stream (`room` is positive): pseudo-fields first. Sets `stream.sid`. Raises Http2Error, with nothing
        sent, if no stream can be opened any more."""

    # -- a server's actions

    @abstractmethod
    def respond(self, stream: Stream, fields: Fields, end: bool) -> None:
        """The final response's head."""

    @abstractmethod
    def inform(self, stream: Stream, fields: Fields) -> None:
        """An informational response."""

    # -- both

    @abstractmethod
    def send(self, stream: Stream, data: bytes, end: bool = False) -> None:
        """More of the body; it waits for the peer's window. `end`: the last of it."""

    @abstractmethod
    def trail(self, stream: Stream, fields: Fields) -> None:
        """Trailers, behind all of the body; ends our direction."""

    @abstractmethod
    def reset(self, stream: Stream, code: int) -> None:
        """Give the stream up; what waits of its body is dropped. No news of it will come."""

    @abstractmethod
    def consumed(self, stream: Stream) -> None:
        """All that came of the body has gone on (or is of no interest): the peer may send as much again."""

    @abstractmethod
    def widen(self, stream: Stream) -> None:
        """Of a server's side: from now on the stream's receive window is `limits.window_bytes`, not the first one."""

    @abstractmethod
    def resize(self, window_bytes: int) -> None:
        """From now on every stream's receive window is that large, also of those that are open (RFC 9113, section
        6.9.2). What has come and is not consumed stays."""

    @abstractmethod
    def queued_bytes(self, stream: Stream) -> int:
        """How much of our body waits, for the peer's window or for the next `to_send`."""

    @property
    @abstractmethod
    def backlog_bytes(self) -> int:
        """The same of all streams together."""

    @abstractmethod
    def ping(self) -> None:
        """Ask for a sign of life; `pongs` counts the answers."""

    @abstractmethod
    def notice(self) -> None:
        """A server's first step of a graceful end: GOAWAY with the highest stream id, so that nothing on its way is
        lost (RFC 9113, section 6.8). Streams that still come are served."""

    @abstractmethod
    def goaway(self, code: int = ErrorCode.NO_ERROR) -> None:
        """No further streams: the peer is told the last one that we take. Those under way go on."""


def name_of(code: int) -> str:
    """An error code in words."""
    try:
        return ErrorCode(code).name
    except ValueError:
        return f"error code {code:#x}"


def open_codec(
    server: bool, limits: Http2Limits = STRANGERS, *, between_sidecars: bool = False, engine: str = "auto"
) -> Http2:
    """A codec for a new connection. `engine`: "ngh2", "h2", or "auto": ngh2 where it can be imported, some twenty
    times as fast."""
    return engine_class(engine)(server, limits, between_sidecars)


def engine_class(engine: str) -> type[Http2]:
    """The class behind the name. Raises ImportError where ngh2 is asked for and is not there, ValueError for a name
    that is no engine's."""
    if engine in ("auto", "ngh2"):
        try:
            from .http2_ngh2 import Ngh2Codec

            return Ngh2Codec
        except ImportError:
            if engine == "ngh2":
                raise
    elif engine != "h2":
        raise ValueError(f"{engine!r} is no HTTP/2 engine; choose auto, h2 or ngh2")
    from .http2_h2 import H2Codec

    return H2Codec
