"""Floods and frame rules: what can be told from the nine bytes before each frame, judged before an engine sees them.

One Guard a connection. It walks over the received bytes from frame header to frame header, spends budgets, and follows
which streams the peer may still write on. What a budget bounds is work that costs the peer less than it costs us;
legitimate use earns it back: by streams opened, by data that we sent, by time. Because both engines sit behind it,
both answer a broken frame header or a flood alike.
Must not know payloads, fields or policy; `now` is an argument. Invariants: the verdict depends on the bytes and on what
the codec did, never on how reads were cut; memory is bounded by the streams that are open, and `_LATE_MAX` more.
"""

from struct import Struct

from .http2 import PREFACE, ErrorCode, Http2Error

FRAME_BYTES_MAX = 16384
"""Our SETTINGS_MAX_FRAME_SIZE, the protocol's default (RFC 9113, section 4.2)."""
BLOCK_BYTES_MAX = 98304
"""One compressed header block, all its CONTINUATIONs included. Decoded it may have 64 KB and some; what is a little
over that still gets a 431, and the compressed form of a head is never much longer than the head."""
SECTION_BYTES_MAX = 131072
SECTION_FIELDS_MAX = 512
"""What the engines decompress of one section before they give up the connection (each field counts 32 bytes more);
`http2_heads` answers smaller excesses."""
CONTINUATIONS_MAX = 16
"""CONTINUATIONs in one block, empty ones too. Full frames need five; libnghttp2 allows 8."""
SETTINGS_ENTRIES_MAX = 32
"""Entries in one SETTINGS frame, as in libnghttp2. Nine are defined."""
ANSWERS_MAX = 1000
"""Acknowledgements that wait because the peer does not read (CVE-2019-9512, CVE-2019-9515); as in libnghttp2."""
UNAGREED_STREAMS_MAX = 1000
"""Streams that a client may open before it acknowledges our SETTINGS; those over the limit are refused until then, and
end the connection afterwards. (nginx: as many refused ones as the limit.)"""
TINY_BYTES = 1
"""Content of a DATA frame that is tiny. The shortest gRPC message has five bytes, a WebSocket frame two."""
RAPID_S = 1.0
"""A reset of a stream this old is no rapid one: whoever waits so long opens no more of them than one who lets them end,
and calls with a common deadline are reset all together. (Envoy draws the line at the same age.)"""
RAPID_SHARE = 0.8
PATIENCE_MS_MIN = 100.0
"""Nor is that of a request which has waited for this share of the deadline that it told us, if that is no shorter."""

SENT_UNIT = 4096
_LATE_MAX = 1000
_TINY_PADDED_BYTES = 17  # a padded frame no longer than this can be nearly all padding

_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS, _PUSH_PROMISE, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = (
    range(10)
)
_PRIORITY_UPDATE = 0x10
_END_STREAM, _ACK, _END_HEADERS, _PADDED = 0x1, 0x1, 0x4, 0x8
_LENGTHS = {_PRIORITY: 5, _RST_STREAM: 4, _PING: 8, _WINDOW_UPDATE: 4}  # of the types that have only one
_ANSWERED = frozenset({_SETTINGS, _PING})
_OF_CONNECTION = frozenset({_SETTINGS, _PING, _GOAWAY})
_OF_BLOCKS = frozenset({_HEADERS, _CONTINUATION})
_MASK = 0x7FFFFFFF

_unpack = Struct(">IBI").unpack_from  # length and type, flags, stream

# name -> (at once, a second, for each stream opened, for each unit of data that we sent).
# A unit is one call of `sent`, and 4 KB more of the same call.
BUDGETS: dict[str, tuple[int, float, int, int]] = {
    # Resets by the peer of requests that were not answered in full, and resets that its errors forced on us
    # (CVE-2023-44487, CVE-2025-8671). Attack requests that get through are these and one: under 100. A stream that
    # ends well earns one back, up to where it began. (Envoy: 500 of young streams; libnghttp2: 1000, and 33 a second.)
    "rapid_reset": (90, 0.1, 0, 0),
    # The same between sidecars, where one connection carries many callers' cancellations; libnghttp2's numbers.
    "rapid_reset_peer": (1000, 33.0, 0, 0),
    # RST_STREAM frames: never more than one a stream makes sense.
    "rst_stream_frames": (100, 1.0, 1, 0),
    # gRPC's C core tells a new window whenever its estimate of the bandwidth changes: at most ten a second.
    "settings_frames": (100, 10.0, 0, 0),
    # gRPC in Go measures its bandwidth with a PING a round trip while data flows to it, hence the units.
    "ping_frames": (200, 20.0, 0, 1),
    # Deprecated (RFC 9113, section 5.3.2), but Firefox and older clients send six at first and some with each request.
    "priority_frames": (200, 10.0, 4, 0),
    # Types that nobody has told us of, PRIORITY_UPDATE and greased ones among them: to be ignored (section 5.5).
    "unknown_frames": (200, 10.0, 4, 0),
    # A reader may send two for each DATA frame that it gets. (Envoy: 10 for each, and 5 + 2 a stream.)
    "window_update_frames": (1000, 100.0, 4, 4),
    # DATA without content or END_STREAM (CVE-2019-9518): one before the end of a stream is all that libraries send.
    "empty_data_frames": (100, 1.0, 2, 0),
    "tiny_data_frames": (2000, 200.0, 16, 0),
    # Header sections that open no stream: trailers, a server's final and informational responses.
    "more_header_sections": (100, 1.0, 4, 0),
    # A graceful end takes two.
    "goaway_frames": (16, 1.0, 0, 0),
}


class _Budget:
    """What is left of one; refilled only once it is empty, so that spending costs one subtraction."""

    __slots__ = ("burst", "each_sent", "each_stream", "left", "name", "per_s", "seen_sent", "seen_streams", "since")

    def __init__(self, name: str) -> None:
        self.name = name
        self.burst, self.per_s, self.each_stream, self.each_sent = BUDGETS[name]
        self.left = float(self.burst)
        self.since: float | None = None
        self.seen_streams = self.seen_sent = 0

    def refill(self, guard: "Guard") -> None:
        """`left` is below zero: add what was earned since the last time, or raise."""
        since = guard.since if self.since is None else self.since
        self.left += min(self.burst, max(0.0, guard.now - since) * self.per_s)
        self.left += (guard.opened_streams - self.seen_streams) * self.each_stream
        self.left += (guard.sent_units - self.seen_sent) * self.each_sent
        self.since, self.seen_streams, self.seen_sent = guard.now, guard.opened_streams, guard.sent_units
        if self.left < 0:
            name = self.name.removesuffix("_peer")
            raise Http2Error(ErrorCode.ENHANCE_YOUR_CALM, f"too many {name.replace('_', ' ')}", name)


class Guard:
    """Give it everything received (`feed`), before the engine; tell it what the codec did.

    When `feed` raises, `passed` says how many bytes of that read come before the offending frame: they still count,
    so that the verdict is the same however the bytes were cut. The hooks raise Http2Error like `feed`.
    """

    def __init__(self, server: bool, between_sidecars: bool = False) -> None:
        self.server = server
        self.passed = 0
        self.now = self.since = 0.0
        self.opened_streams = self.sent_units = 0
        self._preface = PREFACE if server else b""  # what of it is still to come
        self._begun = False  # the peer's first SETTINGS have come
        self._agreed = False  # it has acknowledged our first
        self._proposed = 1  # SETTINGS of ours that it has not acknowledged
        self._rest = b""  # of a frame header, cut off
        self._skip = 0  # bytes of a payload still to come
        self._cut = 0  # the type of that frame
        self._highest = 0  # the last stream that the client has opened
        self._open: set[int] = set()  # streams on which the peer may still send HEADERS or DATA
        self._late: dict[int, None] = {}  # those that we have reset since: what comes was under way
        self._gap = False  # a client has left out stream ids
        self._block = self._block_bytes = self._continuations = 0
        self._answers = 0
        self._resets = _Budget("rapid_reset_peer" if between_sidecars else "rapid_reset")
        self._window_updates = _Budget("window_update_frames")
        self._empty = _Budget("empty_data_frames")
        self._tiny = _Budget("tiny_data_frames")
        self._sections = _Budget("more_header_sections")
        self._unknown = _Budget("unknown_frames")
        self._others = {
            _PRIORITY: _Budget("priority_frames"),
            _RST_STREAM: _Budget("rst_stream_frames"),
            _SETTINGS: _Budget("settings_frames"),
            _PING: _Budget("ping_frames"),
            _GOAWAY: _Budget("goaway_frames"),
        }

    # -- what the codec did

    def opened(self, sid: int) -> None:
        """A client has opened this stream."""
        self._highest = sid
        self._open.add(sid)
        self.opened_streams += 1

    def proposed(self) -> None:
        """We have sent further SETTINGS."""
        self._proposed += 1

    def sent(self, size: int) -> None:
        """Body of this size was given to the engine to send."""
        self.sent_units += 1 + size // SENT_UNIT

    def flushed(self) -> None:
        """What the engine had to send has been taken."""
        self._answers = 0

    def gave_up(self, sid: int) -> None:
        """We have reset this stream, for whatever reason; frames may be on their way."""
        if sid in self._open:
            self._open.discard(sid)
            late = self._late
            late[sid] = None
            if len(late) > _LATE_MAX:
                del late[next(iter(late))]

    def stream_finished(self) -> None:
        """A stream has ended well, or its request was answered in full."""
        resets = self._resets
        if resets.left < resets.burst:
            resets.left += 1

    def rapid_until(self, deadline_ms: float | None) -> float:
        """Until when a reset of the request that has just come, with this deadline, is a rapid one."""
        if deadline_ms is None or deadline_ms < PATIENCE_MS_MIN:
            return self.now + RAPID_S
        return self.now + min(RAPID_S, deadline_ms * (RAPID_SHARE / 1000.0))

    def stream_reset_by_peer(self, rapid_until: float) -> None:
        """The peer has reset a request that was not answered in full."""
        if self.server and self.now < rapid_until:
            self._spend(self._resets)

    def stream_reset_by_us(self) -> None:
        """An error of the peer's has made us reset a stream."""
        if self.server:
            self._spend(self._resets)

    def _spend(self, budget: _Budget) -> None:
        budget.left -= 1
        if budget.left < 0:
            budget.refill(self)

    # -- what came

    @property
    def unfinished(self) -> bool:
        """Whether part of a frame, or of a header block, is here and the rest is not."""
        return bool(self._block or self._rest or self._skip)

    @property
    def unfinished_head(self) -> bool:
        """Whether part of a header block is here and the rest is not."""
        return bool(self._block) or (self._skip > 0 and self._cut in _OF_BLOCKS)

    def feed(self, data: bytes, now: float) -> None:
        """Raises Http2Error where the frames in `data` break a rule or a budget."""
        self.now = now
        base = 0
        at = self._skip
        if self._preface:
            at = self._begin(data, now)
        elif not self._begun and not self.since:
            self.since = now
        if self._rest:
            base = len(self._rest)
            data = self._rest + data
            self._rest = b""
        size = len(data)
        last = size - 9
        kind = self._cut
        open_, late = self._open, self._late
        sections = self._sections
        plain = self._begun and not self._block
        try:
            while at <= last:
                word, flags, sid = _unpack(data, at)
                length = word >> 8
                kind = word & 255
                if length > FRAME_BYTES_MAX:
                    raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "frame longer than 16384 bytes")
                if not plain:
                    self._frame(length, kind, flags, sid & _MASK)
                    plain = self._begun and not self._block
                elif kind == _HEADERS:
                    if not flags & _END_HEADERS:
                        self._headers(length, flags, sid & _MASK)
                        plain = False
                    elif sid in open_:
                        sections.left -= 1
                        if sections.left < 0:
                            sections.refill(self)
                        if flags & _END_STREAM:
                            open_.discard(sid)
                    elif self.server and self._agreed and sid & 1 and sid == self._highest + 2:
                        self._highest = sid
                        self.opened_streams += 1
                        if not flags & _END_STREAM:
                            open_.add(sid)
                    else:
                        self._headers(length, flags, sid & _MASK)
                elif kind == _DATA:
                    if sid not in open_:
                        sid &= _MASK
                        if sid not in open_ and sid not in late:
                            self._refuse(sid)
                    if flags & _END_STREAM:
                        open_.discard(sid)
                        if late:
                            late.pop(sid, None)
                    elif length <= _TINY_PADDED_BYTES:
                        if flags & _PADDED:  # what says how much is padding, is content to nobody
                            self._spend(self._tiny if length > 1 else self._empty)
                        elif length <= TINY_BYTES:
                            self._spend(self._tiny if length else self._empty)
                elif kind == _WINDOW_UPDATE and length == 4:
                    sid &= _MASK
                    if sid > self._highest or (sid and not sid & 1):
                        self._refuse(sid)
                    budget = self._window_updates
                    budget.left -= 1
                    if budget.left < 0:
                        budget.refill(self)
                else:
                    self._frame(length, kind, flags, sid & _MASK)
                at += 9 + length
        except Http2Error:
            self.passed = max(0, at - base)
            raise
        if at < size:
            self._rest = data[at:]
            self._skip = 0
        else:
            self._skip = at - size
            self._cut = kind

    def _begin(self, data: bytes, now: float) -> int:
        """Check the client's preface (RFC 9113, section 3.4); gives what of `data` it takes up."""
        if len(self._preface) == len(PREFACE):
            self.since = now
        part = data[: len(self._preface)]
        if not self._preface.startswith(part):
            self.passed = 0
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "not the preface of HTTP/2")
        self._preface = self._preface[len(part) :]
        return len(part)

    def _frame(self, length: int, kind: int, flags: int, sid: int) -> None:
        """Every frame but the most frequent, and all of them at the beginning and within a header block."""
        if not self._begun:
            if kind != _SETTINGS or flags & _ACK:
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
            self._begun = True
        if self._block or kind == _CONTINUATION:
            self._continuation(length, kind, flags, sid)
        elif kind == _HEADERS:
            self._headers(length, flags, sid)
        elif kind > _CONTINUATION:
            self._spend(self._unknown)
            if kind == _PRIORITY_UPDATE:
                self._priority_update(length, sid)
        else:
            self._control(length, kind, flags, sid)

    def _control(self, length: int, kind: int, flags: int, sid: int) -> None:
        if (sid != 0) == (kind in _OF_CONNECTION) and kind != _WINDOW_UPDATE:
            where = "with" if sid else "without"
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, f"a frame {where} a stream that may not be")
        if kind == _PUSH_PROMISE:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "a push, which was not allowed")
        if length != _LENGTHS.get(kind, length):
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "a frame of the wrong length for its type")
        if kind == _SETTINGS:
            if length % 6 or (length and flags & _ACK):
                raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS of a wrong length")
            if length > 6 * SETTINGS_ENTRIES_MAX:
                raise Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "too many settings in one frame", "settings_entries")
            if flags & _ACK:
                if not self._proposed:
                    raise Http2Error(ErrorCode.PROTOCOL_ERROR, "SETTINGS acknowledged that we have not sent")
                self._proposed -= 1
                self._agreed = True
        elif kind == _GOAWAY:
            if length < 8:
                raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY of a wrong length")
        elif kind == _RST_STREAM:
            if sid > self._highest or not sid & 1:
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, "frame on an idle stream")
            self._open.discard(sid)
            self._late.pop(sid, None)
        self._spend(self._others[kind])
        if kind in _ANSWERED and not flags & _ACK:
            self._answers += 1
            if self._answers > ANSWERS_MAX:
                raise Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "acknowledgements are not read", "unread_answers")

    def _priority_update(self, length: int, sid: int) -> None:
        """RFC 9218, section 7.1. It says nothing to us, but libnghttp2 reads it."""
        if self.server and length < 4:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "PRIORITY_UPDATE of a wrong length")
        if not self.server or sid:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "PRIORITY_UPDATE of a server, or on a stream")

    def _headers(self, length: int, flags: int, sid: int) -> None:
        if sid in self._open or sid in self._late:
            sections = self._sections
            sections.left -= 1
            if sections.left < 0:
                sections.refill(self)
        elif self.server and sid & 1 and sid > self._highest:
            self._gap = self._gap or sid > self._highest + 2
            self._highest = sid
            self._open.add(sid)
            self.opened_streams += 1
            if not self._agreed and self.opened_streams > UNAGREED_STREAMS_MAX:
                raise Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "our settings are not acknowledged", "refused_streams")
        else:
            self._refuse(sid)
        if flags & _END_STREAM:
            self._open.discard(sid)
            self._late.pop(sid, None)
        if not flags & _END_HEADERS:
            self._block, self._block_bytes, self._continuations = sid, length, 0

    def _continuation(self, length: int, kind: int, flags: int, sid: int) -> None:
        """A header block is open, or should be (RFC 9113, section 6.10)."""
        if kind != _CONTINUATION or sid != self._block:
            raise Http2Error(
                ErrorCode.PROTOCOL_ERROR, "a header block is interrupted, or continued without a beginning"
            )
        if not sid:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without a stream")
        self._block_bytes += length
        self._continuations += 1
        if self._block_bytes > BLOCK_BYTES_MAX:
            raise Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "header block too long", "header_block")
        if self._continuations > CONTINUATIONS_MAX:
            raise Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "too many continuation frames", "continuation_frames")
        if flags & _END_HEADERS:
            self._block = 0

    def _refuse(self, sid: int) -> None:
        """HEADERS or DATA where the peer may not send any, or WINDOW_UPDATE on an idle stream (RFC 9113, sections 5.1
        and 5.1.1). That a stream error would do in some cases is of no use: whoever does this has lost count."""
        if not sid or not sid & 1 or sid > self._highest:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "frame on an idle stream, or none")
        if self._gap:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "stream id lower than an earlier one")
        raise Http2Error(ErrorCode.STREAM_CLOSED, "frame on a stream that the peer has ended")
