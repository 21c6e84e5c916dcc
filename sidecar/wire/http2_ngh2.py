"""The fast engine: libnghttp2 through the package `ngh2`.

libnghttp2 frames, compresses, keeps windows and states; here its events become the streams and Messages of the common
interface. Must not know sockets, time or policy. Invariants: as in `http2`; a failure of the engine never escapes, it
becomes `error` with a GOAWAY of our own making, because a failed engine can make none any more.
"""

from collections.abc import Mapping, Sequence
from struct import pack
from typing import ClassVar

import ngh2
from ngh2 import (
    DataReceived,
    GoAwayReceived,
    InformationalResponseReceived,
    NGH2Error,
    PingAcknowledged,
    PushedStreamReceived,
    RequestReceived,
    ResponseReceived,
    SettingsAcknowledged,
    SettingsReceived,
    StreamClosed,
    StreamReset,
    TrailersReceived,
)

from .http1_guard import ProtocolError
from .http2 import ErrorCode, Fields, Http2, Http2Error, Http2Limits, Stream
from .http2_guard import SECTION_BYTES_MAX, SECTION_FIELDS_MAX, SENT_UNIT, Guard
from .http2_heads import Malformed, refused_message
from .http2_sections import Section, request_message, response_message, trailer_fields

_HEADER_TABLE, _ENABLE_PUSH, _STREAMS_MAX, _WINDOW, _FRAME_MAX, _SECTION_MAX = range(1, 7)
_EXTENDED_CONNECT, _NO_PRIORITIES = 8, 9
_DEFAULT_WINDOW = 65535


class Ngh2Codec(Http2):
    """One connection on libnghttp2."""

    name: ClassVar[str] = "ngh2"

    def __init__(self, server: bool, limits: Http2Limits, between_sidecars: bool) -> None:
        super().__init__(server, limits, between_sidecars)
        self._guard = Guard(server, between_sidecars)
        self._agreed = False  # the client has acknowledged our SETTINGS
        self._failed = False  # the engine, or the guard: nothing more comes of the engine
        self._goaway = b""  # of our own making, in that case
        self._last = b""  # what the engine had to say in the end
        self._highest = 0  # the last stream of the peer that we have taken
        self._informed: set[int] = set()
        conn = self._conn = ngh2.Connection(
            ngh2.Role.SERVER if server else ngh2.Role.CLIENT,
            ngh2.Configuration(
                auto_window_update=False,
                max_send_header_block_length=4 * SECTION_BYTES_MAX,
                max_inbound_header_list_size=SECTION_BYTES_MAX,
                max_inbound_header_count=SECTION_FIELDS_MAX,
                # Floods are the guard's: it names the limit, and judges both engines alike.
                stream_reset_rate_limit=(1 << 40, 1 << 40),
                glitch_rate_limit=(1 << 40, 1 << 40),
                max_continuations=1 << 20,
            ),
        )
        first = limits.first_window_bytes if server else limits.window_bytes
        settings = {_WINDOW: first, _SECTION_MAX: 65536, _NO_PRIORITIES: 1}
        if server:
            settings[_STREAMS_MAX] = limits.streams_max
            settings[_EXTENDED_CONNECT] = 1
        else:
            settings[_ENABLE_PUSH] = 0
        conn.initiate_connection(settings)
        if not server:
            self._open_window()

    def _open_window(self) -> None:
        whole = self.limits.streams_max * self.limits.window_bytes
        if whole > _DEFAULT_WINDOW:
            try:
                self._conn.set_local_window_size(whole)
            except NGH2Error:
                pass  # what came behind the acknowledgement has ended the connection

    # -- input

    @property
    def unfinished(self) -> bool:
        return self._guard.unfinished

    @property
    def unfinished_head(self) -> bool:
        return self._guard.unfinished_head

    def receive(self, data: bytes, now: float) -> None:
        if self.error is not None:
            return
        failure: Http2Error | None = None
        try:
            self._guard.feed(data, now)
        except Http2Error as exc:
            failure = exc
            data = data[: self._guard.passed]
        told = failure is not None
        conn = self._conn
        try:
            conn.receive_data(data)
        except ngh2.DenialOfServiceError:
            failure = Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "header section far over the limits", "header_section")
            told = False
        except NGH2Error as broken:
            failure = Http2Error(ErrorCode.PROTOCOL_ERROR, _words(broken))
            told = False
        try:
            self._take(conn.events())
            if told:  # by the guard. The engine may have ended the connection at what came before; now it says so.
                self._last = conn.data_to_send()
                self._take(conn.events())
        except Http2Error as exc:  # of the guard's hooks, for something that came before what else failed
            failure = exc
        except NGH2Error as broken:
            failure = failure or Http2Error(ErrorCode.INTERNAL_ERROR, _words(broken))
        if failure is not None:
            self._fail(failure)

    def _take(self, events: Sequence[object]) -> None:
        streams, news = self.streams, self.news
        for e in events:
            kind = type(e)
            if kind is DataReceived:
                stream = streams.get(e.stream_id)  # type: ignore[attr-defined]
                data: bytes = e.data  # type: ignore[attr-defined]
                if stream is None or stream.error is not None or stream.m is None:
                    self._stray(e.stream_id, len(data))  # type: ignore[attr-defined]
                    continue
                if data:
                    stream.m.body.append(data)
                    stream.unread_bytes += len(data)
                if e.end_stream:  # type: ignore[attr-defined]
                    stream.ended = stream.m.done = True
                elif not data:
                    continue
                news[stream] = None
            elif kind is RequestReceived:
                self._request(e)  # type: ignore[arg-type]
            elif kind is ResponseReceived:
                self._response(e)  # type: ignore[arg-type]
            elif kind is StreamClosed:
                stream = streams.pop(e.stream_id, None)  # type: ignore[attr-defined]
                if stream is not None:
                    self._closed(stream, e.error_code)  # type: ignore[attr-defined]
                elif e.error_code not in (ErrorCode.NO_ERROR, ErrorCode.REFUSED_STREAM):  # type: ignore[attr-defined]
                    self._guard.gave_up(e.stream_id)  # type: ignore[attr-defined]
                    self._guard.stream_reset_by_us()  # the engine let us see nothing of the request
            elif kind is TrailersReceived:
                stream = streams.get(e.stream_id)  # type: ignore[attr-defined]
                if stream is not None and stream.error is None:
                    self._trailers(stream, e.headers)  # type: ignore[attr-defined]
            elif kind is StreamReset:
                stream = streams.get(e.stream_id)  # type: ignore[attr-defined]
                if stream is not None and stream.error is None:
                    stream.by_peer = True
            elif kind is InformationalResponseReceived:
                stream = streams.get(e.stream_id)  # type: ignore[attr-defined]
                if stream is not None and stream.error is None:
                    try:
                        stream.informational.append(
                            response_message(e.headers, False, self.between_sidecars)  # type: ignore[attr-defined]
                        )
                        news[stream] = None
                    except (Malformed, ProtocolError) as exc:
                        self._malformed(stream, str(exc))
            elif kind is SettingsReceived:
                self._settings(e.settings)  # type: ignore[attr-defined]
            elif kind is SettingsAcknowledged:
                if self.server and not self._agreed:
                    self._agreed = True
                    self._open_window()
            elif kind is PingAcknowledged:
                self.pongs += 1
            elif kind is GoAwayReceived:
                self.closing = True
            elif kind is ngh2.ConnectionClosed:
                self._over(e)  # type: ignore[arg-type]
            elif kind is PushedStreamReceived:
                self._fail(Http2Error(ErrorCode.PROTOCOL_ERROR, "a push, which was not allowed"))

    def _request(self, e: RequestReceived) -> None:
        stream = Stream()
        stream.sid = sid = e.stream_id
        if sid > self._highest:
            self._highest = sid
        self.streams[sid] = stream
        try:
            stream.m = m = request_message(e.headers, e.end_stream, self.between_sidecars)
            stream.method = m.method
            stream.ended = e.end_stream
            stream.rapid_until = self._guard.rapid_until(m.deadline_ms)
        except Malformed as exc:
            self._malformed(stream, str(exc))
            return
        except ProtocolError as refused:
            stream.m = m = refused_message(e.headers)
            stream.rapid_until = self._guard.rapid_until(None)
            m.done = stream.ended = e.end_stream
            stream.status, stream.detail = refused.status, refused.detail
        self.news[stream] = None

    def _response(self, e: ResponseReceived) -> None:
        stream = self.streams.get(e.stream_id)
        if stream is None or stream.error is not None:
            return
        try:
            m = response_message(e.headers, e.end_stream, self.between_sidecars)
        except (Malformed, ProtocolError) as exc:
            self._malformed(stream, str(exc))
            return
        if e.end_stream:
            stream.ended = True
            if m.length is None and m.status not in (204, 304) and stream.method != b"HEAD":
                m.length = 0
        stream.m = m
        self.news[stream] = None

    def _stray(self, sid: int, size: int) -> None:
        """Content of a stream that is over: the connection's window is given back all the same."""
        if size:
            try:
                self._conn.acknowledge_received_data(size, sid)
            except NGH2Error:
                pass

    def _trailers(self, stream: Stream, fields: Section) -> None:
        m = stream.m
        if m is None:
            self._malformed(stream, "trailers without a head")
            return
        try:
            m.trailers, status = trailer_fields(fields)
        except Malformed as exc:
            self._malformed(stream, str(exc))
            return
        if status is not None:
            m.grpc_status = status
        stream.ended = m.done = True
        self.news[stream] = None

    def _malformed(self, stream: Stream, detail: str) -> None:
        """A stream error that we found: the engine would have let it pass."""
        stream.detail = detail
        stream.error = ErrorCode.PROTOCOL_ERROR
        self._reset(stream.sid, ErrorCode.PROTOCOL_ERROR)
        if not self.server or stream.owner is not None or stream in self.news:
            self.news[stream] = None
        self._guard.stream_reset_by_us()

    def _closed(self, stream: Stream, code: int) -> None:
        stream.closed = True
        guard = self._guard
        m = stream.m
        if not code and stream.ended and stream.error is None and not stream.by_peer:  # as nearly all
            guard.stream_finished()
            if stream.unread_bytes and (m is None or not m.body):
                self.consumed(stream)
            return
        guard.gave_up(stream.sid)
        if stream.error is None:
            whole = m is not None and stream.ended and (stream.answered or not self.server)
            if code == ErrorCode.NO_ERROR and stream.by_peer and not whole:
                code = ErrorCode.CANCEL  # it ends what is not whole (RFC 9113, section 8.1)
            if code != ErrorCode.NO_ERROR:
                stream.error = code
                stream.refused = code == ErrorCode.REFUSED_STREAM and not self.server
                self.news[stream] = None
                if not stream.by_peer and code != ErrorCode.REFUSED_STREAM:
                    stream.detail = stream.detail or "the peer broke the rules of this stream"
                    guard.stream_reset_by_us()
            if stream.by_peer and not stream.answered:
                guard.stream_reset_by_peer(stream.rapid_until)
            elif stream.by_peer or code == ErrorCode.NO_ERROR:
                guard.stream_finished()
        if stream.unread_bytes and (stream.error is not None or m is None or not m.body):
            self.consumed(stream)

    def _settings(self, settings: Mapping[int, int]) -> None:
        self.settled = True
        if _STREAMS_MAX in settings:
            self.peer_streams_max = settings[_STREAMS_MAX]
        if _EXTENDED_CONNECT in settings:
            self.extended_connect = settings[_EXTENDED_CONNECT] == 1

    def _over(self, e: ngh2.ConnectionClosed) -> None:
        if self.error is None:
            code = e.error_code
            words = e.debug_data.decode("ascii", "replace") if code else "closed"
            self.error = Http2Error(
                code,
                words if words.isprintable() and len(words) < 200 else f"the connection ended with error code {code}",
            )

    def _fail(self, error: Http2Error) -> None:
        if self.error is None:
            self.error = error.with_traceback(None)  # whose frames would keep all of this alive
            self.closing = self._failed = True
            self._goaway = b"\x00\x00\x08\x07\x00\x00\x00\x00\x00" + pack(">II", self._highest, error.code)

    # -- output

    @property
    def wants_to_send(self) -> bool:
        if self._failed or self._last:
            return True
        try:
            return self._conn.want_write
        except NGH2Error:
            return True  # its end will be found

    def to_send(self) -> bytes:
        if self._failed:
            rest, self._goaway = self._goaway, b""
            return rest
        conn = self._conn
        try:
            data = conn.data_to_send()
            if self._last:
                data, self._last = self._last + data, b""
        except NGH2Error as broken:
            if self.error is None:
                self._fail(Http2Error(ErrorCode.INTERNAL_ERROR, _words(broken)))
                return self.to_send()
            return b""
        self._guard.flushed()
        events = conn.events()
        if events:
            try:
                self._take(events)
            except Http2Error as exc:
                self._fail(exc)
        return data

    # -- actions

    def request(self, stream: Stream, fields: Fields, end: bool) -> None:
        try:
            stream.sid = sid = self._conn.send_request(fields, end_stream=end)
        except NGH2Error as exc:
            self.closing = True
            raise Http2Error(ErrorCode.REFUSED_STREAM, _words(exc)) from None
        stream.answered = end
        self.streams[sid] = stream
        self._guard.opened(sid)

    def respond(self, stream: Stream, fields: Fields, end: bool) -> None:
        if stream.error is None and not stream.closed:
            stream.answered = end
            try:
                self._conn.send_response(stream.sid, fields, end_stream=end)
            except NGH2Error:
                pass  # it was closed by what is already received; its news are under way

    def inform(self, stream: Stream, fields: Fields) -> None:
        if stream.error is None and not stream.closed:
            try:
                self._conn.send_informational_response(stream.sid, fields)
            except NGH2Error:
                pass

    def send(self, stream: Stream, data: bytes, end: bool = False) -> None:
        if stream.error is None and not stream.closed:
            self._guard.sent_units += 1 + len(data) // SENT_UNIT
            if end:
                stream.answered = True
            try:
                self._conn.send_data(stream.sid, data, end_stream=end)
            except NGH2Error:
                pass

    def trail(self, stream: Stream, fields: Fields) -> None:
        if stream.error is None and not stream.closed:
            stream.answered = True
            try:
                self._conn.send_trailers(stream.sid, fields)
            except NGH2Error:
                pass

    def reset(self, stream: Stream, code: int) -> None:
        if stream.error is None and not stream.closed:
            stream.error = code
            self.consumed(stream)
            self._reset(stream.sid, code)
            self.news.pop(stream, None)

    def _reset(self, sid: int, code: int) -> None:
        self._guard.gave_up(sid)
        try:
            self._conn.reset_stream(sid, code)
        except NGH2Error:
            pass

    def consumed(self, stream: Stream) -> None:
        unread = stream.unread_bytes
        if unread:
            stream.unread_bytes = 0
            try:
                self._conn.acknowledge_received_data(unread, stream.sid)
            except NGH2Error:
                pass

    def widen(self, stream: Stream) -> None:
        if stream.error is None and not stream.closed:
            try:
                self._conn.set_local_window_size(self.limits.window_bytes, stream_id=stream.sid)
            except NGH2Error:
                pass  # it was closed by what is already received

    def resize(self, window_bytes: int) -> None:
        if self.error is None:
            try:
                self._conn.update_settings({_WINDOW: window_bytes})
            except NGH2Error:
                return
            self._guard.proposed()

    def queued_bytes(self, stream: Stream) -> int:
        return self._conn.queued_body_size(stream.sid)

    @property
    def backlog_bytes(self) -> int:
        return self._conn.queued_body_size()

    def ping(self) -> None:
        try:
            self._conn.ping()
        except NGH2Error:
            pass

    def notice(self) -> None:
        try:
            self._conn.send_shutdown_notice()
        except NGH2Error:
            pass

    def goaway(self, code: int = ErrorCode.NO_ERROR) -> None:
        self.closing = True
        try:
            self._conn.send_goaway(code)
        except NGH2Error:
            pass


def _words(exc: Exception) -> str:
    return str(exc).removeprefix("HTTP/2 engine error: ")
