"""The access log: one JSON line for each request or TCP connection.

Fields, in this order; texts that are empty are left out, numbers never:
time (of the end; RFC 3339, UTC), protocol (http or tcp; a tunnel is tcp), side (in or out), service, route, version,
rule (of authorization, the one that decided), caller (identity), peer (address), method, path (without its query),
status (0: no response could be given), grpc_status (of gRPC calls, by name), reason (ok, or what x-pillion-reason
says), attempts, duration_ms, request_bytes, response_bytes (of tcp: from and to the caller), trace_id, request_id,
upstream (the endpoint's address), user_agent, truncated (a list of the fields that were cut). TCP has no route,
version, method, path, status, attempts, ids or user agent. Bytes that are not UTF-8 appear as \\xNN.

On the hot path a record is a tuple and an append; a thread of its own renders and writes (see `writer`). Must not
know connections or policies.
Invariants: no record blocks the caller; the queue holds at most 10 000 records and some 10 MB, whatever peers send;
each line is valid ASCII JSON, so no value can forge a line, a field or a terminal sequence; queries never appear
unless asked for, since they carry secrets.
"""

import time
from collections import deque
from collections.abc import Callable
from json.encoder import encode_basestring_ascii

from .writer import QUEUE_MAX, LineWriter, Sink, SinkError

PATH_BYTES_MAX = 2048
TEXT_BYTES_MAX = 256  # any other text that a peer chooses
CROWDED_RECORDS = 1000  # from here on long paths are cut to TEXT_BYTES_MAX, so that a full queue stays small
CACHE_MAX = 2048
LINGER_S = 0.05

Text = str | bytes

HttpRecord = tuple[
    str,  # side: in | out
    str,  # service
    str,  # route
    str,  # version
    str,  # rule: the rule of authorization that decided, with its file and line
    str,  # caller: the peer's identity
    str,  # peer: address and port
    bytes,  # method
    bytes,  # path: the request target; the query is cut off when it is written
    int,  # status; 0 where no response could be given
    str,  # reason
    int,  # attempts
    float,  # duration in seconds
    int,  # request body in bytes
    int,  # response body in bytes
    bytes,  # trace id
    bytes,  # request id
    str,  # upstream: the endpoint's address
    bytes,  # user agent
    str,  # the name of a gRPC call's status
]
"""Texts that are absent are empty, and left out of the line."""

TcpRecord = tuple[
    str,  # side
    str,  # service
    str,  # rule
    str,  # caller
    str,  # peer
    str,  # reason
    float,  # duration in seconds
    int,  # bytes from the caller
    int,  # bytes to the caller
    str,  # upstream
]

_METHOD, _PATH, _REQUEST_ID, _USER_AGENT = 7, 8, 16, 18

_HTTP_HEAD = ("protocol", "side", "service", "route", "version", "rule", "caller", "peer", "method")
_HTTP_TAIL = ("upstream", "user_agent")
_TCP_HEAD = ("protocol", "side", "service", "rule", "caller", "peer", "reason")
_REASON = ("grpc_status", "reason")

HttpEntry = tuple[float, HttpRecord, tuple[str, ...]]  # when, what, and the names of texts that were cut
TcpEntry = tuple[float, TcpRecord]
Entry = HttpEntry | TcpEntry


class Renderer:
    """Turns entries into lines. `with_query`: leave queries in paths."""

    def __init__(self, *, with_query: bool = False) -> None:
        self._with_query = with_query
        self._second = -1
        self._second_text = ""
        self._known: dict[tuple[tuple[str, ...], tuple[Text, ...]], str] = {}

    def __call__(self, entry: Entry) -> bytes:
        if len(entry) == 2:
            return self._tcp(*entry).encode("ascii") + b"}\n"
        time_s, record, cut = entry
        line = self._http(time_s, record)
        if cut:
            line += f',"truncated":[{",".join(map(encode_basestring_ascii, cut))}]'
        return line.encode("ascii") + b"}\n"

    def _http(self, time_s: float, record: HttpRecord) -> str:
        path, status, reason, attempts, duration_s, request_bytes, response_bytes, trace_id, request_id = record[8:17]
        upstream, user_agent, grpc_status = record[17:]
        if not self._with_query:
            path = path.partition(b"?")[0]
        return (
            f'{{"time":"{self._time(time_s)}",{self._fields(_HTTP_HEAD, ("http", *record[:8]))[1:]}'
            f"{_field('path', path)}"
            f',"status":{status:d}{self._fields(_REASON, (grpc_status, reason))},"attempts":{attempts:d}'
            f',"duration_ms":{duration_s * 1e3:.3f}'
            f',"request_bytes":{request_bytes:d},"response_bytes":{response_bytes:d}'
            f"{_field('trace_id', trace_id)}{_field('request_id', request_id)}"
            f"{self._fields(_HTTP_TAIL, (upstream, user_agent))}"
        )

    def _tcp(self, time_s: float, record: TcpRecord) -> str:
        duration_s, received, sent = record[6:9]
        return (
            f'{{"time":"{self._time(time_s)}",{self._fields(_TCP_HEAD, ("tcp", *record[:6]))[1:]}'
            f',"duration_ms":{duration_s * 1e3:.3f},"request_bytes":{received:d},"response_bytes":{sent:d}'
            f"{_field('upstream', record[9])}"
        )

    def _fields(self, names: tuple[str, ...], values: tuple[Text, ...]) -> str:
        """Fields that seldom change, rendered once."""
        key = (names, values)
        text = self._known.get(key)
        if text is None:
            if len(self._known) >= CACHE_MAX:
                self._known.clear()
            text = self._known[key] = "".join(map(_field, names, values))
        return text

    def _time(self, time_s: float) -> str:
        second = int(time_s)
        if second != self._second:
            self._second_text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = second
        return f"{self._second_text}.{int((time_s - second) * 1000):03d}Z"


def _field(name: str, value: Text) -> str:
    if not value:
        return ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    return f',"{name}":{encode_basestring_ascii(value)}'


class AccessLog:
    """`clock` gives Unix time; a record's time is that of its end. `enabled` is False where the log is off."""

    def __init__(self, target: int | str | None, clock: Callable[[], float], *, with_query: bool = False) -> None:
        """`target`: a descriptor, a file's path, or None for off."""
        self.enabled = target is not None
        self._clock = clock
        self._writer: LineWriter[Entry] | None = None
        self._queue: deque[Entry] = deque()
        self._put: Callable[[Entry], None] = _discard
        if target is not None:
            self._writer = LineWriter(
                Sink(target), Renderer(with_query=with_query), name="access-log", queue_max=QUEUE_MAX, linger_s=LINGER_S
            )
            self._put = self._writer.put
            self._queue = self._writer.queue

    @classmethod
    def of(cls, setting: str, clock: Callable[[], float], *, with_query: bool = False) -> "AccessLog":
        """`setting` as on the command line: stdout, off, or a file's path."""
        if setting in ("stdout", "-"):
            return cls(1, clock, with_query=with_query)
        if setting == "off":
            return cls(None, clock)
        if not setting:
            raise SinkError("the access log is to go nowhere: give a file's path, stdout, or off")
        return cls(setting, clock, with_query=with_query)

    def http(self, record: HttpRecord) -> None:
        """Queue the record of one request. Check `enabled` first, to save making the record."""
        if len(record[8]) + len(record[16]) + len(record[18]) > TEXT_BYTES_MAX or len(record[7]) > 32:
            self._put((self._clock(), *_fit(record, len(self._queue) >= CROWDED_RECORDS)))
        else:
            self._put((self._clock(), record, ()))

    def tcp(self, record: TcpRecord) -> None:
        """Queue the record of one TCP connection or tunnel."""
        self._put((self._clock(), record))

    @property
    def dropped(self) -> int:
        """Records that were not written, for whatever cause."""
        return self._writer.dropped + self._writer.lost if self._writer else 0

    def reopen(self) -> None:
        """After a rotation of the file."""
        if self._writer:
            self._writer.reopen()

    def close(self, timeout_s: float = 1.0) -> bool:
        return self._writer.close(timeout_s) if self._writer else True


def _discard(_entry: Entry) -> None:
    pass


def _fit(record: HttpRecord, crowded: bool) -> tuple[HttpRecord, tuple[str, ...]]:
    """The record with its long texts cut, and the names of those that were."""
    fitted = list(record)
    cut = []
    for name, index, bytes_max in (
        ("method", _METHOD, 32),
        ("path", _PATH, TEXT_BYTES_MAX if crowded else PATH_BYTES_MAX),
        ("request_id", _REQUEST_ID, TEXT_BYTES_MAX),
        ("user_agent", _USER_AGENT, TEXT_BYTES_MAX),
    ):
        value = record[index]
        assert isinstance(value, bytes)
        if len(value) > bytes_max:
            fitted[index] = value[:bytes_max]
            cut.append(name)
    return tuple(fitted), tuple(cut)  # type: ignore[return-value]
