"""The reference engine: the package `h2`, in pure Python.

h2 keeps the states of streams and both ways' windows, makes frames and compresses fields. What it would answer with the
end of a connection where one stream's end will do is judged before it: frames are cut here and given to it one by one,
header sections are decompressed here, and h2 sees a stub in their place. GOAWAY is ours too, since to h2 it is the end.
Must not know sockets, time or policy. Invariants: as in `http2`; a failure of h2 never escapes, it becomes `error`.
"""

from collections import deque
from struct import pack, unpack_from
from typing import ClassVar

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    Event,
    PingAckReceived,
    RemoteSettingsChanged,
    SettingsAcknowledged,
    StreamReset,
)
from h2.exceptions import ProtocolError as H2ProtocolError
from h2.settings import SettingCodes, Settings

from .http1_guard import ProtocolError
from .http2 import PREFACE, ErrorCode, Fields, Http2, Http2Error, Http2Limits, Stream
from .http2_guard import Guard
from .http2_h2_frames import Flow, Sections, frame_bytes, guarded, split, unpadded
from .http2_heads import Malformed, refused_message, request_message, response_message, trailer_fields

_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS, _PUSH_PROMISE, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = (
    range(10)
)
_ALTSVC, _PRIORITY_UPDATE = 0xA, 0x10
_END_STREAM, _END_HEADERS = 0x1, 0x4
_ENABLE_PUSH, _STREAMS_MAX, _WINDOW, _SECTION_MAX, _EXTENDED_CONNECT, _NO_PRIORITIES = 2, 3, 4, 6, 8, 9
_HEADER_TABLE, _TABLE_BYTES_MAX = 1, 4096
_DEFAULT_WINDOW = 65535
_LAST_SID = 0x7FFFFFFF

# What h2 is shown of a header section, once it has been judged.
_REQUEST_STUB = b"\x82"  # :method GET
_RESPONSE_STUB = b"\x88"  # :status 200
_INFORMATIONAL_STUB = b"\x08\x03103"
_TRAILERS_STUB = b""


class _Connection(H2Connection):
    MAX_CLOSED_STREAMS = 64  # frames on those never reach h2, which would remember 65536


class H2Codec(Http2):
    """One connection on h2."""

    name: ClassVar[str] = "h2"

    def __init__(self, server: bool, limits: Http2Limits, between_sidecars: bool) -> None:
        super().__init__(server, limits, between_sidecars)
        self._guard = Guard(server, between_sidecars)
        self._goaway = b""  # of our own making, once the connection has failed
        self._out: list[bytes] = []  # taken from h2, or made here; before what h2 still has
        self._input = bytearray()  # of an unfinished frame
        self._preface_left = len(PREFACE) if server else 0
        self._block: list[bytes] = []
        self._block_flags = 0
        self._sections = Sections()
        self._flows: dict[int, Flow] = {}  # of the streams in `streams`
        self._waiting: dict[Stream, Flow] = {}  # those with something to send
        self._newest = 0  # the client's last stream
        self._highest = 0  # the last one that we have taken
        self._acknowledged = False  # our SETTINGS
        self._going = self._left = False  # our GOAWAY has gone; the peer's has come
        self._last_told = _LAST_SID  # what the peer's GOAWAY said
        self._code = 0  # of either GOAWAY
        conn = self._conn = _Connection(
            H2Configuration(
                client_side=not server,
                header_encoding=None,
                validate_inbound_headers=False,
                normalize_inbound_headers=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        # The limit on streams is kept here, and by the guard.
        conn.local_settings = Settings(client=not server, initial_values={SettingCodes(_STREAMS_MAX): _LAST_SID})
        conn.initiate_connection()
        conn.clear_outbound_data_buffer()
        if server:
            conn.receive_data(PREFACE)
        else:
            self._out.append(PREFACE)
        first = limits.first_window_bytes if server else limits.window_bytes
        settings: dict[SettingCodes | int, int] = {_WINDOW: first, _SECTION_MAX: 65536, _NO_PRIORITIES: 1}
        if server:
            settings[_EXTENDED_CONNECT] = 1
        else:
            settings[_ENABLE_PUSH] = 0
        conn.update_settings(settings)
        if server:
            conn.clear_outbound_data_buffer()
            settings[_STREAMS_MAX] = limits.streams_max
            told = b"".join(pack(">HI", key, value) for key, value in settings.items())
            self._out.append(frame_bytes(_SETTINGS, 0, 0, told))
        if not server:
            self._open_window()

    def _open_window(self) -> None:
        whole = self.limits.streams_max * self.limits.window_bytes
        if whole > _DEFAULT_WINDOW:
            self._conn.increment_flow_control_window(whole - _DEFAULT_WINDOW)

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
        try:
            self._read(data)
        except Http2Error as exc:
            failure = exc
        except H2ProtocolError as refused:
            failure = Http2Error(int(refused.error_code), f"refused by h2 ({type(refused).__name__})")
        except Exception as broken:
            failure = Http2Error(ErrorCode.INTERNAL_ERROR, f"the engine failed ({type(broken).__name__})")
        if failure is not None:
            self._fail(failure)
        elif not self.streams:
            self._over()

    def _read(self, data: bytes) -> None:
        """Cut `data` into frames."""
        if self._preface_left:
            part = min(self._preface_left, len(data))
            self._preface_left -= part
            data = data[part:]
        wire = self._input
        wire += data
        at, size = 0, len(wire)
        try:
            while size - at >= 9:
                word, flags, sid = unpack_from(">IBI", wire, at)
                end = at + 9 + (word >> 8)
                if end > size:
                    break
                payload = bytes(wire[at + 9 : end])
                at = end
                self._frame(word & 255, flags, sid & _LAST_SID, payload)
        finally:
            del wire[:at]

    def _frame(self, kind: int, flags: int, sid: int, payload: bytes) -> None:
        if kind == _DATA:
            self._data(flags, sid, payload)
        elif kind == _HEADERS:
            opens = self.server and sid > self._newest
            self._block = [unpadded(flags, payload, sid if opens else 0, True)]
            self._block_flags = flags
            if flags & _END_HEADERS:
                self._section(sid)
        elif kind == _CONTINUATION:
            self._block.append(payload)
            if flags & _END_HEADERS:
                self._section(sid)
        elif kind == _GOAWAY:
            self._left_by_peer(payload)
        elif kind in (_SETTINGS, _PING, _WINDOW_UPDATE, _RST_STREAM):
            if kind == _WINDOW_UPDATE:
                payload = bytes([payload[0] & 0x7F]) + payload[1:]  # the reserved bit, which h2 minds
            for event in self._conn.receive_data(frame_bytes(kind, flags, sid, payload)):
                self._event(event)
        elif kind == _PRIORITY_UPDATE:
            about = int.from_bytes(payload[:4], "big") & _LAST_SID
            if about and not about & 1:
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, "PRIORITY_UPDATE of a push")
        elif kind == _ALTSVC and not self.server and int.from_bytes(payload[:2], "big") > len(payload) - 2:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "ALTSVC too short for its origin")
        # PRIORITY says nothing to us (RFC 9113, section 5.3.2), other types we do not know (section 5.5).

    def _event(self, e: Event) -> None:
        if isinstance(e, StreamReset):
            if not e.remote_reset:
                raise Http2Error(ErrorCode.FLOW_CONTROL_ERROR, "a stream's window was opened too far")
            stream = self.streams.get(e.stream_id or 0)
            if stream is not None:
                self._reset_by_peer(stream, int(e.error_code or 0))
        elif isinstance(e, RemoteSettingsChanged):
            self.settled = True
            changed = {int(key): setting.new_value for key, setting in e.changed_settings.items()}
            self.peer_streams_max = changed.get(_STREAMS_MAX, self.peer_streams_max)
            if changed.get(_HEADER_TABLE, 0) > _TABLE_BYTES_MAX:
                encoder = self._conn.encoder
                encoder.header_table_size = _TABLE_BYTES_MAX  # the memory is ours (libnghttp2 does the same)
                encoder.table_size_changes = [size for size in encoder.table_size_changes if size <= _TABLE_BYTES_MAX]
            if changed.get(_NO_PRIORITIES, 0) > 1:
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, "SETTINGS_NO_RFC7540_PRIORITIES is neither 0 nor 1")
            if _EXTENDED_CONNECT in changed:
                if self.extended_connect and not changed[_EXTENDED_CONNECT]:
                    raise Http2Error(ErrorCode.PROTOCOL_ERROR, "extended CONNECT taken back (RFC 8441, section 3)")
                self.extended_connect = changed[_EXTENDED_CONNECT] == 1
        elif isinstance(e, SettingsAcknowledged):
            if self.server and not self._acknowledged:
                self._open_window()
            self._acknowledged = True
        elif isinstance(e, PingAckReceived):
            self.pongs += 1

    def _reset_by_peer(self, stream: Stream, code: int) -> None:
        stream.by_peer = True
        whole = stream.m is not None and stream.ended and (stream.answered or not self.server)
        if code == ErrorCode.NO_ERROR and not whole:
            code = ErrorCode.CANCEL  # it ends what is not whole (RFC 9113, section 8.1)
        if code != ErrorCode.NO_ERROR:
            stream.error = code
            stream.refused = code == ErrorCode.REFUSED_STREAM and not self.server
            self.news[stream] = None
        self._close(stream)
        if stream.answered:
            self._guard.stream_finished()
        else:
            self._guard.stream_reset_by_peer(stream.rapid_until)

    def _left_by_peer(self, payload: bytes) -> None:
        """GOAWAY. h2 would end everything; RFC 9113, section 6.8, lets the streams below go on."""
        last, code = unpack_from(">II", payload)
        last &= _LAST_SID
        if last > self._last_told or (last and last & 1 == self.server):
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "GOAWAY with a last stream that cannot be")
        self._last_told = last
        self.closing = self._left = True
        self._code = code
        if self.server:
            return
        for stream in [stream for sid, stream in self.streams.items() if sid > last]:
            stream.error = ErrorCode.REFUSED_STREAM
            stream.refused = True
            self._forget(stream.sid)
            self._close(stream)
            self.news[stream] = None

    # -- header sections

    def _section(self, sid: int) -> None:
        fields = self._sections.decode(b"".join(self._block))
        self._block = []
        end = bool(self._block_flags & _END_STREAM)
        stream = self.streams.get(sid)
        if stream is None:
            if self.server and sid > self._newest:
                self._newest = sid
                self._request(sid, fields, end)
        elif stream.m is None:
            self._response(stream, fields, end)
        else:
            self._trailers(stream, fields, end)

    def _request(self, sid: int, fields: Fields, end: bool) -> None:
        self._show(sid, _REQUEST_STUB, end)
        if self._going:  # RFC 9113, section 6.8: ignored
            self._forget(sid)
            return
        if len(self.streams) >= self.limits.streams_max:
            if self._acknowledged:
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, "more streams than allowed")
            self._conn.reset_stream(sid, ErrorCode.REFUSED_STREAM)
            self._guard.gave_up(sid)
            return
        self._highest = sid
        stream = Stream()
        stream.sid = sid
        self.streams[sid] = stream
        flow = self._flows[sid] = Flow()
        try:
            stream.m = m = request_message(fields, end, self.between_sidecars)
            stream.method = m.method
            stream.ended = end
            stream.rapid_until = self._guard.rapid_until(m.deadline_ms)
        except Malformed as exc:
            self._malformed(stream, str(exc))
            return
        except ProtocolError as refused:
            stream.m = m = refused_message(fields)
            m.done = stream.ended = end
            stream.rapid_until = self._guard.rapid_until(None)
            stream.status, stream.detail = refused.status, refused.detail
        flow.expected = m.length
        self.news[stream] = None

    def _response(self, stream: Stream, fields: Fields, end: bool) -> None:
        try:
            m = response_message(fields, end, self.between_sidecars)
            if m.status < 200 and end:
                raise Malformed("an informational response that ends the stream")
            bodiless = m.status in (204, 304) or stream.method == b"HEAD"
            if end and m.length and not bodiless:
                raise Malformed("content-length without content")
            if m.status == 204 and m.length:
                raise Malformed("content-length with status 204")
        except (Malformed, ProtocolError) as exc:
            self._malformed(stream, str(exc))
            return
        if m.status < 200:
            self._show(stream.sid, _INFORMATIONAL_STUB, False)
            stream.informational.append(m)
            self.news[stream] = None
            return
        self._show(stream.sid, _RESPONSE_STUB, end)
        stream.m = m
        if stream.method != b"CONNECT":
            self._flows[stream.sid].expected = 0 if bodiless else m.length
        if end:
            if m.length is None and not bodiless:
                m.length = 0
            self._ended(stream)
        self.news[stream] = None

    def _trailers(self, stream: Stream, fields: Fields, end: bool) -> None:
        m = stream.m
        assert m is not None
        flow = self._flows[stream.sid]
        try:
            if not end:
                raise Malformed("trailers that do not end the stream")
            trailers, status = trailer_fields(fields)
            if flow.expected is not None and flow.got != flow.expected:
                raise Malformed("less content than content-length says")
        except Malformed as exc:
            self._malformed(stream, str(exc))
            return
        self._show(stream.sid, _TRAILERS_STUB, True)
        m.trailers = trailers
        if status is not None:
            m.grpc_status = status
        m.done = True
        self._ended(stream)
        self.news[stream] = None

    def _show(self, sid: int, stub: bytes, end: bool) -> None:
        """Let h2 see a header section that is in order."""
        flags = _END_HEADERS | (_END_STREAM if end else 0)
        self._conn.receive_data(frame_bytes(_HEADERS, flags, sid, stub))

    # -- content

    def _data(self, flags: int, sid: int, payload: bytes) -> None:
        stream = self.streams.get(sid)
        if stream is None:
            self._late(sid, payload)
            return
        content = unpadded(flags, payload, 0, False)
        m = stream.m
        if m is None:
            if not stream.informational:
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, "DATA before the response's head")
            self._malformed(stream, "DATA before the final response's head")
            self._late(sid, payload)
            return
        end = bool(flags & _END_STREAM)
        flow = self._flows[sid]
        flow.got += len(content)
        if flow.expected is not None and (flow.got > flow.expected or (end and flow.got != flow.expected)):
            self._malformed(stream, "content that disagrees with content-length")
            self._late(sid, payload)
            return
        conn = self._conn
        conn.receive_data(frame_bytes(_DATA, flags, sid, payload))
        if len(payload) > len(content):
            conn.acknowledge_received_data(len(payload) - len(content), sid)
        stream.unread_bytes += len(content)
        if content:
            m.body.append(content)
        if end:
            m.done = True
            self._ended(stream)
        elif not content:
            return
        self.news[stream] = None

    def _late(self, sid: int, payload: bytes) -> None:
        """DATA of a stream that is over: the connection's window is given back all the same."""
        self._drain()
        self._conn.receive_data(frame_bytes(_DATA, 0, sid, payload))
        rest = self._conn.data_to_send()
        # h2 answers each such frame with RST_STREAM; one was enough (RFC 9113, section 5.4.2).
        self._out += [frame for frame in split(rest) if frame[3] != _RST_STREAM]

    # -- ends

    def _ended(self, stream: Stream) -> None:
        """The peer's direction is over."""
        stream.ended = True
        if self._flows[stream.sid].sent_end:
            self._finish(stream)

    def _sent_end(self, stream: Stream, flow: Flow) -> None:
        flow.sent_end = True
        self._waiting.pop(stream, None)
        if stream.ended:
            self._finish(stream)

    def _finish(self, stream: Stream) -> None:
        self._guard.stream_finished()
        self._close(stream)

    def _close(self, stream: Stream) -> None:
        stream.closed = True
        self.streams.pop(stream.sid, None)
        self._flows.pop(stream.sid, None)
        self._waiting.pop(stream, None)
        self._guard.gave_up(stream.sid)
        if stream.unread_bytes and (stream.error is not None or stream.m is None or not stream.m.body):
            self.consumed(stream)

    def _malformed(self, stream: Stream, detail: str) -> None:
        """A stream error."""
        stream.detail = detail
        stream.error = ErrorCode.PROTOCOL_ERROR
        self._conn.reset_stream(stream.sid, ErrorCode.PROTOCOL_ERROR)
        self._close(stream)
        if not self.server or stream.owner is not None or stream in self.news:
            self.news[stream] = None
        self._guard.stream_reset_by_us()

    def _forget(self, sid: int) -> None:
        """Let h2 close a stream without telling the peer."""
        self._drain()
        self._conn.reset_stream(sid)
        self._conn.clear_outbound_data_buffer()
        self._guard.gave_up(sid)

    def _over(self) -> None:
        """Nothing more can happen once either side has said GOAWAY and no stream is left."""
        if (self._going or self._left) and self.error is None:
            self._drain()
            if not self._out:
                self.error = Http2Error(self._code, "closed")

    def _fail(self, error: Http2Error) -> None:
        if self.error is None:
            self.error = error.with_traceback(None)  # whose frames would keep all of this alive
            self.closing = True
            self._goaway = frame_bytes(_GOAWAY, 0, 0, pack(">II", self._highest, error.code))

    # -- output

    def to_send(self) -> bytes:
        if self._goaway:
            rest, self._goaway = self._goaway, b""
            return rest
        if self.error is not None:
            return b""
        try:
            if self._waiting:
                self._pump()
        except H2ProtocolError as exc:
            self._fail(Http2Error(ErrorCode.INTERNAL_ERROR, f"the engine failed ({type(exc).__name__})"))
            return self.to_send()
        self._drain()
        out = b"".join(self._out)
        self._out.clear()
        self._guard.flushed()
        if not self.streams:
            self._over()
        return out

    def _drain(self) -> None:
        rest = self._conn.data_to_send()
        if rest:
            self._out.append(rest)

    def _pump(self) -> None:
        """Make DATA of what waits, a frame a stream in turn, as far as the windows let us."""
        conn = self._conn
        turn = deque(self._waiting.items())
        while turn:
            stream, flow = turn.popleft()
            sid = stream.sid
            if flow.queued:
                size = min(flow.queued, conn.local_flow_control_window(sid), conn.max_outbound_frame_size)
                if size <= 0:
                    continue
                chunk = flow.take(size)
                end = flow.end and not flow.queued
                conn.send_data(sid, chunk, end)
                if end:
                    self._sent_end(stream, flow)
                    continue
                if flow.queued:
                    turn.append((stream, flow))
                    continue
            if flow.trailers is not None:
                conn.send_headers(sid, guarded(flow.trailers), True)
                self._sent_end(stream, flow)
            elif flow.end:
                conn.end_stream(sid)
                self._sent_end(stream, flow)
            else:
                self._waiting.pop(stream, None)

    # -- actions

    def request(self, stream: Stream, fields: Fields, end: bool) -> None:
        if self.closing or self.error is not None:
            raise Http2Error(ErrorCode.REFUSED_STREAM, "the connection is about to end")
        try:
            sid = self._conn.get_next_available_stream_id()
            self._conn.send_headers(sid, guarded(fields), end)
        except H2ProtocolError as exc:
            self.closing = True
            raise Http2Error(ErrorCode.REFUSED_STREAM, f"no stream can be opened ({type(exc).__name__})") from None
        self._conn.streams[sid].request_method = None  # or h2 would judge what comes to a HEAD
        stream.sid = sid
        stream.answered = end
        self.streams[sid] = stream
        self._flows[sid] = flow = Flow()
        flow.sent_end = end
        self._guard.opened(sid)

    def respond(self, stream: Stream, fields: Fields, end: bool) -> None:
        flow = self._flow(stream)
        if flow is not None:
            stream.answered = end
            try:
                self._conn.send_headers(stream.sid, guarded(fields), end)
            except H2ProtocolError:
                return  # closed by what is already received
            if end:
                self._sent_end(stream, flow)

    def inform(self, stream: Stream, fields: Fields) -> None:
        if self._flow(stream) is not None:
            try:
                self._conn.send_headers(stream.sid, guarded(fields))
            except H2ProtocolError:
                pass

    def send(self, stream: Stream, data: bytes, end: bool = False) -> None:
        flow = self._flow(stream)
        if flow is None or flow.end or flow.trailers is not None:
            return
        if data:
            flow.chunks.append(data)
            flow.queued += len(data)
            self._guard.sent(len(data))
        if end:
            flow.end = stream.answered = True
        self._waiting[stream] = flow

    def trail(self, stream: Stream, fields: Fields) -> None:
        flow = self._flow(stream)
        if flow is not None and not flow.end:
            flow.trailers = fields
            stream.answered = True
            self._waiting[stream] = flow

    def _flow(self, stream: Stream) -> Flow | None:
        """None for a stream on which nothing can be sent any more."""
        if stream.error is not None or stream.closed or self.error is not None:
            return None
        flow = self._flows.get(stream.sid)
        return None if flow is None or flow.sent_end else flow

    def reset(self, stream: Stream, code: int) -> None:
        if stream.error is None and not stream.closed:
            stream.error = code
            if self.error is None:
                try:
                    self._conn.reset_stream(stream.sid, code)
                except H2ProtocolError:
                    pass
            self._close(stream)
            self.news.pop(stream, None)

    def consumed(self, stream: Stream) -> None:
        unread = stream.unread_bytes
        if unread:
            stream.unread_bytes = 0
            if self.error is None:
                try:
                    self._conn.acknowledge_received_data(unread, stream.sid)
                except H2ProtocolError:
                    pass

    def widen(self, stream: Stream) -> None:
        more = self.limits.window_bytes - self.limits.first_window_bytes
        if more > 0 and stream.error is None and not stream.closed and self.error is None:
            try:
                self._conn.increment_flow_control_window(more, stream.sid)
            except (H2ProtocolError, ValueError):
                pass  # it was closed by what is already received

    def resize(self, window_bytes: int) -> None:
        if self.error is None:
            try:
                self._conn.update_settings({_WINDOW: window_bytes})
            except H2ProtocolError:
                return
            self._guard.proposed()

    def queued_bytes(self, stream: Stream) -> int:
        flow = self._flows.get(stream.sid)
        return 0 if flow is None else flow.queued

    @property
    def backlog_bytes(self) -> int:
        return sum(flow.queued for flow in self._flows.values())

    def ping(self) -> None:
        if self.error is None:
            self._conn.ping(bytes(8))

    def notice(self) -> None:
        if self.error is None and not self._going:
            self._say_goaway(_LAST_SID, ErrorCode.NO_ERROR)

    def goaway(self, code: int = ErrorCode.NO_ERROR) -> None:
        self.closing = True
        if self.error is None:
            self._going = True
            self._code = code
            self._say_goaway(self._highest, code)

    def _say_goaway(self, last: int, code: int) -> None:
        self._drain()
        self._out.append(frame_bytes(_GOAWAY, 0, 0, pack(">II", last, code)))
