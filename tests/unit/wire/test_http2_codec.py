"""The codecs' contract: a client's codec against a server's in memory, for both engines and each against the other."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.http2_frames import (
    DATA,
    GOAWAY,
    INITIAL_WINDOW_SIZE,
    PREFACE,
    RST_STREAM,
    WINDOW_UPDATE,
    Parser,
    goaway,
    headers,
    request,
    response,
    settings,
)

from sidecar.wire.http2 import PEERS, STRANGERS, ErrorCode, Http2, Http2Error, Http2Limits, Stream, open_codec

ENGINES = ["h2", "ngh2"]
EVEN = Http2Limits()  # windows that begin at their full size
SMALL = Http2Limits(streams_max=4, window_bytes=65536)


class Pair:
    """A client and a server. `turn` carries what either has to send, `step` bytes at a time, until both are silent."""

    def __init__(self, engines: tuple[str, str] = ("h2", "h2"), limits: Http2Limits = EVEN, step: int = 0) -> None:
        self.client = open_codec(False, limits, engine=engines[0])
        self.server = open_codec(True, limits, engine=engines[1])
        self.step = step
        self.now = 0.0
        self.wire = {self.client: b"", self.server: b""}  # what each has sent
        self.came: dict[Http2, dict[Stream, None]] = {self.client: {}, self.server: {}}
        self.turn()

    def turn(self) -> None:
        for _ in range(1000):
            moved = False
            for codec, other in ((self.client, self.server), (self.server, self.client)):
                data = codec.to_send()
                self.wire[codec] += data
                for part in [data[i : i + self.step] for i in range(0, len(data), self.step)] if self.step else [data]:
                    other.receive(part, self.now)
                self.came[codec].update(dict.fromkeys(codec.take_news()))
                self.came[other].update(dict.fromkeys(other.take_news()))
                moved = moved or bool(data)
            if not moved:
                return
        raise AssertionError("never silent")

    def news(self, codec: Http2) -> list[Stream]:
        news, self.came[codec] = list(self.came[codec]), {}
        return news

    def ask(self, end: bool = True, method: bytes = b"GET", more: tuple[tuple[bytes, bytes], ...] = ()) -> Stream:
        stream = Stream(method=method)
        self.client.request(stream, request(method, more=more), end)
        return stream

    def open(self, end: bool = True, method: bytes = b"GET") -> tuple[Stream, Stream]:
        """A request under way: its stream here and there."""
        mine = self.ask(end, method)
        self.turn()
        (theirs,) = self.news(self.server)
        return mine, theirs


def test_a_codec_that_has_nothing_to_send_says_so() -> None:
    """Or may say that it does not know; what it has to send it never conceals."""
    pair = Pair(("ngh2", "ngh2"))
    codecs = (pair.client, pair.server)
    for number in range(300):
        mine = pair.ask(False, b"POST")
        pair.client.send(mine, bytes(number * 300), number % 2 == 0)
        assert pair.client.wants_to_send
        for codec, other in (codecs, codecs[::-1]) * 6:
            wants = codec.wants_to_send
            data = codec.to_send()
            assert wants or not (data or codec.news)
            other.receive(data, 0.0)
            for stream in other.take_news():
                if stream.m is not None and other is pair.server:
                    if number % 3:
                        stream.m.take()
                        other.consumed(stream)
                    if stream.ended:
                        other.respond(stream, response(), True)
        if not mine.closed:
            pair.client.reset(mine, ErrorCode.CANCEL)
    assert all(codec.error is None for codec in codecs)


@pytest.fixture(params=[(a, b) for a in ENGINES for b in ENGINES], ids=lambda pair: f"{pair[0]}-{pair[1]}")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(request.param)
    yield made
    for codec in (made.client, made.server):
        assert all(not stream.closed for stream in codec.streams.values())


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def body(stream: Stream) -> bytes:
    assert stream.m is not None
    return stream.m.take()


class TestExchanges:
    def test_settings(self, pair: Pair) -> None:
        assert pair.client.settled and pair.server.settled
        assert pair.client.extended_connect and not pair.server.extended_connect
        assert pair.client.peer_streams_max == 100
        assert pair.client.room == 100
        assert pair.client.error is None and pair.server.error is None

    def test_a_request_without_a_body(self, pair: Pair) -> None:
        mine, theirs = pair.open()
        m = theirs.m
        assert m is not None and (m.method, m.path, m.host, m.done, m.head) == (b"GET", b"/", b"app.test", True, True)
        assert theirs.ended and not theirs.closed and mine.sid == theirs.sid == 1
        pair.server.respond(theirs, response(204), True)
        pair.turn()
        assert pair.news(pair.client) == [mine]
        assert mine.m is not None and mine.m.status == 204 and mine.m.done and mine.m.length is None
        assert mine.closed and theirs.closed and not pair.client.streams and not pair.server.streams
        assert mine.error is theirs.error is None

    def test_bodies_both_ways(self, pair: Pair) -> None:
        mine, theirs = pair.open(False, b"POST")
        assert theirs.m is not None and theirs.m.chunked and not theirs.m.done
        pair.client.send(mine, b"one ")
        pair.turn()
        assert pair.news(pair.server) == [theirs] and body(theirs) == b"one "
        pair.client.send(mine, b"two", end=True)
        pair.turn()
        assert theirs.m.done and theirs.ended and body(theirs) == b"two"
        pair.server.respond(theirs, response(200, [(b"content-length", b"6")]), False)
        pair.server.send(theirs, b"three", False)
        pair.server.send(theirs, b"!", True)
        pair.turn()
        assert mine.m is not None and mine.m.length == 6 and mine.m.done and body(mine) == b"three!"
        assert mine.closed and theirs.closed

    def test_an_end_of_its_own(self, pair: Pair) -> None:
        mine, theirs = pair.open(False, b"POST")
        pair.client.send(mine, b"", end=True)
        pair.server.respond(theirs, response(), False)
        pair.turn()
        assert theirs.m is not None and theirs.m.done and not theirs.m.body
        pair.server.send(theirs, b"", end=True)
        pair.turn()
        assert mine.m is not None and mine.m.done and mine.closed

    def test_a_complete_response_with_its_head_has_length_zero(self, pair: Pair) -> None:
        mine, theirs = pair.open()
        pair.server.respond(theirs, response(200), True)
        pair.turn()
        assert mine.m is not None and mine.m.length == 0

    def test_head_has_no_content(self, pair: Pair) -> None:
        mine, theirs = pair.open(True, b"HEAD")
        pair.server.respond(theirs, response(200, [(b"content-length", b"77")]), True)
        pair.turn()
        assert mine.m is not None and mine.m.length == 77 and mine.m.done and mine.error is None

    def test_trailers_both_ways(self, pair: Pair) -> None:
        mine, theirs = pair.open(False, b"POST")
        pair.client.send(mine, b"x" * 100000)
        pair.client.trail(mine, [(b"checksum", b"abc")])
        pair.turn()
        assert theirs.m is not None and not theirs.m.done
        pair.server.consumed(theirs)
        pair.turn()
        assert theirs.m.done and theirs.m.trailers == [(b"checksum", b"abc")] and len(body(theirs)) == 100000
        pair.server.respond(theirs, response(200, [(b"content-type", b"application/grpc")]), False)
        pair.server.send(theirs, b"12345")
        pair.server.trail(theirs, [(b"grpc-status", b"7"), (b"grpc-message", b"no")])
        pair.turn()
        m = mine.m
        assert m is not None and m.grpc and m.grpc_status == 7 and (b"grpc-message", b"no") in m.trailers
        assert body(mine) == b"12345" and mine.closed

    def test_trailers_only(self, pair: Pair) -> None:
        mine, theirs = pair.open(False, b"POST")
        fields = response(200, [(b"content-type", b"application/grpc"), (b"grpc-status", b"14")])
        pair.server.respond(theirs, fields, True)
        pair.turn()
        assert mine.m is not None and mine.m.done and mine.m.grpc_status == 14 and mine.ended and not mine.closed

    def test_informational_responses(self, pair: Pair) -> None:
        mine, theirs = pair.open()
        pair.server.inform(theirs, response(103, [(b"link", b"</a>")]))
        pair.turn()
        assert pair.news(pair.client) == [mine]
        assert [m.status for m in mine.informational] == [103] and mine.m is None
        pair.server.inform(theirs, response(100))
        pair.server.respond(theirs, response(), True)
        pair.turn()
        assert [m.status for m in mine.informational] == [103, 100]
        assert mine.m is not None and mine.m.status == 200

    def test_a_tunnel(self, pair: Pair) -> None:
        stream = Stream(method=b"CONNECT")
        fields = [(b":method", b"CONNECT"), (b":protocol", b"websocket"), *request()[1:]]
        pair.client.request(stream, fields, False)
        pair.turn()
        (theirs,) = pair.news(pair.server)
        m = theirs.m
        assert m is not None and (m.method, m.upgrade, m.extended, m.done) == (b"GET", b"websocket", True, True)
        assert not theirs.ended
        pair.server.respond(theirs, response(), False)
        for word in (b"a", b"b"):
            pair.client.send(stream, word)
            pair.server.send(theirs, word * 2)
            pair.turn()
            assert (body(theirs), body(stream)) == (word, word * 2)
        pair.client.send(stream, b"", end=True)
        pair.turn()
        assert theirs.ended and not theirs.closed
        pair.server.send(theirs, b"bye", end=True)
        pair.turn()
        assert stream.closed and theirs.closed and body(stream) == b"bye"

    def test_many_at_once(self, pair: Pair) -> None:
        asked = [pair.ask() for _ in range(100)]
        assert pair.client.room == 0
        pair.turn()
        for theirs in pair.news(pair.server):
            pair.server.respond(theirs, response(200), False)
            pair.server.send(theirs, b"%d" % theirs.sid, True)
        pair.turn()
        assert [body(stream) for stream in asked] == [b"%d" % stream.sid for stream in asked]
        assert pair.client.room == 100

    def test_a_large_head(self, pair: Pair) -> None:
        mine = pair.ask(more=tuple((b"x-%d" % i, b"v" * 900) for i in range(60)))
        pair.turn()
        (theirs,) = pair.news(pair.server)
        assert theirs.m is not None and len(theirs.m.headers) == 60
        assert mine.error is None

    def test_a_head_over_the_limits_is_answered(self, pair: Pair) -> None:
        pair.ask(more=tuple((b"x-%d" % i, b"v" * 1200) for i in range(60)))
        pair.turn()
        (theirs,) = pair.news(pair.server)
        assert theirs.status == 431 and theirs.detail
        pair.server.respond(theirs, response(431), True)
        pair.turn()
        assert theirs.closed and pair.server.error is None

    def test_cookies_are_joined_and_credentials_pass(self, pair: Pair) -> None:
        pair.ask(more=((b"cookie", b"a=1"), (b"cookie", b"b=2"), (b"authorization", b"Bearer x")))
        pair.turn()
        (theirs,) = pair.news(pair.server)
        assert theirs.m is not None
        assert dict(theirs.m.headers) == {b"cookie": b"a=1; b=2", b"authorization": b"Bearer x"}

    def test_ping(self, pair: Pair) -> None:
        for codec in (pair.client, pair.server):
            codec.ping()
            codec.ping()
            assert codec.pongs == 0
            pair.turn()
            assert codec.pongs == 2


class TestWindows:
    def test_a_body_waits_for_the_window(self, pair: Pair) -> None:
        mine, theirs = pair.open(False, b"POST")
        pair.client.send(mine, b"x" * 100000)
        assert pair.client.queued_bytes(mine) == 100000
        pair.turn()
        assert 100000 - 65536 <= pair.client.queued_bytes(mine) <= 100000 - 65535
        assert 65535 <= theirs.unread_bytes <= 65536
        pair.client.send(mine, b"y", end=True)
        assert theirs.m is not None
        got = body(theirs)
        pair.server.consumed(theirs)
        assert theirs.unread_bytes == 0
        pair.turn()
        got += body(theirs)
        assert got == b"x" * 100000 + b"y" and theirs.m.done and pair.client.queued_bytes(mine) == 0

    def test_a_slow_reader_holds_up_nobody_else(self, pair: Pair) -> None:
        slow = [pair.open() for _ in range(50)]
        for _, theirs in slow:
            pair.server.respond(theirs, response(), False)
            pair.server.send(theirs, b"x" * 200000, True)
        pair.turn()
        assert sum(stream.unread_bytes for stream, _ in slow) <= 50 * 65536
        mine, theirs = pair.open()
        pair.server.respond(theirs, response(), False)
        pair.server.send(theirs, b"quick", True)
        pair.turn()
        assert body(mine) == b"quick" and mine.closed

    def test_a_long_body_flows(self, pair: Pair) -> None:
        mine, theirs = pair.open()
        pair.server.respond(theirs, response(), False)
        sent = got = 0
        while got < 3_000_000:
            if pair.server.queued_bytes(theirs) < 65536 and sent < 3_000_000:
                pair.server.send(theirs, b"z" * 30000)
                sent += 30000
            pair.turn()
            got += len(body(mine))
            pair.client.consumed(mine)
        assert got == sent and mine.error is None

    def test_streams_that_are_over_leave_the_window_whole(self, pair: Pair) -> None:
        """Otherwise the connection's window would dwindle until it stood still."""
        for number in range(130):
            mine, theirs = pair.open(False, b"POST")
            pair.client.send(mine, b"x" * 60000)
            pair.turn()
            if number % 2:
                pair.server.reset(theirs, ErrorCode.CANCEL)
            else:
                pair.server.respond(theirs, response(), True)
                pair.client.reset(mine, ErrorCode.CANCEL)
            pair.turn()
            pair.server.consumed(theirs)
            pair.news(pair.server)
        assert pair.server.error is None
        mine, theirs = pair.open(False, b"POST")
        pair.client.send(mine, b"x" * 60000, True)
        pair.turn()
        assert theirs.ended

    def test_a_window_that_shrinks_below_zero(self, engine: str) -> None:
        server = open_codec(True, STRANGERS, engine=engine)
        parser = Parser()
        server.receive(PREFACE + settings() + headers(1, request(), end=True), 0.0)
        (stream,) = server.take_news()
        server.respond(stream, response(), False)
        server.send(stream, b"x" * 100000)
        frames = parser.feed(server.to_send())
        assert sum(len(f.data) for f in frames if f.kind == DATA) == 65535
        server.receive(settings({INITIAL_WINDOW_SIZE: 1000}), 0.0)
        assert not [f for f in parser.feed(server.to_send()) if f.kind == DATA]
        server.receive(settings({INITIAL_WINDOW_SIZE: 65536}) + b"\0\0\x04\x08\0\0\0\0\0\0\x01\0\0", 0.0)
        assert sum(len(f.data) for f in parser.feed(server.to_send()) if f.kind == DATA) == 1

    def test_one_stream_does_not_push_the_others_aside(self, engine: str) -> None:
        server = open_codec(True, STRANGERS, engine=engine)
        server.receive(PREFACE + settings() + headers(1, request(), end=True) + headers(3, request(), end=True), 0.0)
        for stream in server.take_news():
            server.respond(stream, response(), False)
            server.send(stream, b"x" * 60000, True)
        data = [f for f in Parser().feed(server.to_send()) if f.kind == DATA]
        assert {f.sid for f in data} == {1, 3} and sum(len(f.data) for f in data) == 65535


class TestEnds:
    def test_the_client_cancels(self, pair: Pair) -> None:
        mine, theirs = pair.open()
        pair.client.reset(mine, ErrorCode.CANCEL)
        assert pair.client.take_news() == []
        pair.turn()
        assert pair.news(pair.server) == [theirs]
        assert theirs.error == ErrorCode.CANCEL and theirs.by_peer and theirs.closed and not theirs.refused
        assert mine.closed and pair.news(pair.client) == []
        pair.server.respond(theirs, response(), True)
        pair.server.send(theirs, b"x", True)
        pair.server.reset(theirs, ErrorCode.CANCEL)
        pair.turn()
        assert pair.server.error is pair.client.error is None

    def test_the_server_cancels_midway(self, pair: Pair) -> None:
        mine, theirs = pair.open()
        pair.server.respond(theirs, response(), False)
        pair.server.send(theirs, b"part")
        pair.turn()
        pair.server.reset(theirs, ErrorCode.INTERNAL_ERROR)
        pair.turn()
        assert mine.error == ErrorCode.INTERNAL_ERROR and mine.by_peer and mine.m is not None and not mine.m.done
        assert pair.server.queued_bytes(theirs) == 0

    def test_what_waits_of_a_body_is_dropped(self, pair: Pair) -> None:
        mine, theirs = pair.open()
        pair.server.respond(theirs, response(), False)
        pair.server.send(theirs, b"x" * 200000, True)
        pair.server.reset(theirs, ErrorCode.CANCEL)
        pair.turn()
        assert mine.error == ErrorCode.CANCEL and mine.unread_bytes == 0
        assert pair.server.queued_bytes(theirs) == 0

    def test_refused(self, pair: Pair) -> None:
        mine, theirs = pair.open()
        pair.server.reset(theirs, ErrorCode.REFUSED_STREAM)
        pair.turn()
        assert mine.error == ErrorCode.REFUSED_STREAM and mine.refused and mine.by_peer

    def test_a_response_before_the_end_of_the_request(self, pair: Pair) -> None:
        mine, theirs = pair.open(False, b"POST")
        pair.server.respond(theirs, response(), False)
        pair.server.send(theirs, b"enough", True)
        pair.turn()
        pair.server.reset(theirs, ErrorCode.NO_ERROR)
        pair.turn()
        assert mine.m is not None and mine.m.done and body(mine) == b"enough" and mine.closed
        assert mine.error is None

    def test_no_error_is_no_end_of_half_a_response(self, pair: Pair) -> None:
        mine, theirs = pair.open()
        pair.server.respond(theirs, response(), False)
        pair.server.send(theirs, b"half")
        pair.turn()
        pair.server.reset(theirs, ErrorCode.NO_ERROR)
        pair.turn()
        assert mine.error == ErrorCode.CANCEL and mine.m is not None and not mine.m.done

    def test_no_error_does_not_hide_a_cancelled_request(self, pair: Pair) -> None:
        mine, theirs = pair.open()
        pair.client.reset(mine, ErrorCode.NO_ERROR)
        pair.turn()
        assert pair.news(pair.server) == [theirs]
        assert theirs.error == ErrorCode.CANCEL and theirs.by_peer

    def test_graceful_end_of_a_server(self, pair: Pair) -> None:
        first, theirs = pair.open()
        pair.server.notice()
        pair.turn()
        assert pair.client.closing and pair.client.room == 0 and first.error is None
        assert not pair.server.closing
        pair.server.goaway()
        pair.turn()
        assert pair.server.closing and pair.client.error is None
        pair.server.respond(theirs, response(), True)
        pair.turn()
        assert first.m is not None and first.m.done and first.error is None
        for codec in (pair.client, pair.server):
            assert codec.error is not None and codec.error.code == ErrorCode.NO_ERROR
        last = [f.last for f in Parser().feed(pair.wire[pair.server]) if f.kind == GOAWAY]
        assert last == [0x7FFFFFFF, 1]

    def test_a_request_that_crosses_the_notice_is_served(self, pair: Pair) -> None:
        pair.open()
        late = pair.ask()
        pair.server.notice()
        pair.turn()
        (theirs,) = pair.news(pair.server)
        pair.server.respond(theirs, response(), True)
        pair.turn()
        assert late.m is not None and late.m.done

    def test_a_request_beyond_goaway_is_refused(self, pair: Pair) -> None:
        mine, theirs = pair.open()
        late = pair.ask()
        wire = pair.client.to_send()
        pair.server.goaway()
        pair.turn()
        assert late.error == ErrorCode.REFUSED_STREAM and late.refused and mine.error is None
        pair.server.receive(wire, 0.0)
        assert pair.server.take_news() == [] and pair.server.error is None
        pair.server.respond(theirs, response(), True)
        pair.turn()
        assert mine.m is not None and mine.m.done

    def test_no_request_after_goaway(self, pair: Pair) -> None:
        pair.open()
        pair.server.goaway()
        pair.turn()
        with pytest.raises(Http2Error):
            pair.ask()

    def test_a_client_that_leaves_lets_its_streams_end(self, pair: Pair) -> None:
        mine, theirs = pair.open()
        pair.client.goaway()
        pair.turn()
        assert pair.client.closing and pair.server.closing and pair.server.error is None
        pair.server.respond(theirs, response(), False)
        pair.server.send(theirs, b"all", True)
        pair.turn()
        assert body(mine) == b"all" and mine.closed
        assert pair.client.error is not None and pair.server.error is not None

    def test_goaway_with_an_error_code(self, engine: str) -> None:
        client = open_codec(False, STRANGERS, engine=engine)
        client.receive(settings(), 0.0)
        stream = Stream(method=b"GET")
        client.request(stream, request(), True)
        client.to_send()
        client.receive(goaway(0, ErrorCode.ENHANCE_YOUR_CALM), 0.0)
        assert stream.refused and client.take_news() == [stream]
        client.to_send()
        assert client.error is not None and client.error.code == ErrorCode.ENHANCE_YOUR_CALM

    def test_after_an_error_nothing_is_read_and_only_goaway_is_sent(self, engine: str) -> None:
        server = open_codec(True, STRANGERS, engine=engine)
        server.receive(PREFACE + settings() + headers(1, request(), end=True), 0.0)
        (stream,) = server.take_news()
        parser = Parser()
        parser.feed(server.to_send())
        server.receive(b"\x00\x00\x01\x00\x00\x00\x00\x00\x00x", 0.0)
        assert server.error is not None and server.error.code == ErrorCode.PROTOCOL_ERROR and server.closing
        assert str(server.error).startswith("PROTOCOL_ERROR: ")
        for act in (
            lambda: server.respond(stream, response(), True),
            lambda: server.send(stream, b"x", True),
            lambda: server.trail(stream, []),
            lambda: server.consumed(stream),
            lambda: server.ping(),
            lambda: server.notice(),
            lambda: server.goaway(),
            lambda: server.reset(stream, 8),
            lambda: server.receive(headers(3, request(), end=True), 0.0),
        ):
            act()
        (only,) = parser.feed(server.to_send())
        assert (only.kind, only.last, only.code) == (GOAWAY, 1, ErrorCode.PROTOCOL_ERROR)
        assert server.to_send() == b"" and server.take_news() == []


class TestLimits:
    def test_a_client_keeps_to_the_servers_limit(self, engine: str) -> None:
        pair = Pair((engine, engine), SMALL)
        assert pair.client.room == 4
        for _ in range(4):
            pair.ask()
        assert pair.client.room == 0
        pair.turn()
        for theirs in pair.news(pair.server):
            pair.server.respond(theirs, response(), True)
        pair.turn()
        assert pair.client.room == 4

    def test_streams_over_the_limit_are_refused_until_the_client_knows_it(self, engine: str) -> None:
        server = open_codec(True, SMALL, engine=engine)
        wire = b"".join(headers(sid, request(), end=True) for sid in range(1, 13, 2))
        server.receive(PREFACE + settings() + wire, 0.0)
        assert [stream.sid for stream in server.take_news()] == [1, 3, 5, 7]
        refused = [(f.sid, f.code) for f in Parser().feed(server.to_send()) if f.kind == RST_STREAM]
        assert refused == [(9, ErrorCode.REFUSED_STREAM), (11, ErrorCode.REFUSED_STREAM)]
        server.receive(settings(ack=True) + headers(13, request(), end=True), 0.0)
        server.to_send()
        assert server.error is not None and server.error.code == ErrorCode.PROTOCOL_ERROR

    def test_the_windows_are_as_told(self, engine: str) -> None:
        for limits in (STRANGERS, PEERS):
            server = open_codec(True, limits, engine=engine)
            (told,) = Parser().feed(server.to_send())
            assert told.settings[INITIAL_WINDOW_SIZE] == limits.first_window_bytes
            server.receive(PREFACE + settings(), 0.0)
            assert WINDOW_UPDATE not in {frame.kind for frame in Parser().feed(server.to_send())}
            server.receive(settings(ack=True), 0.0)  # until then the client may take its streams' windows for larger
            (opened,) = Parser().feed(server.to_send())
            assert opened.kind == WINDOW_UPDATE and opened.sid == 0
            assert opened.increment == limits.streams_max * limits.window_bytes - 65535
            server.receive(settings(ack=True), 0.0)
            client = open_codec(False, limits, engine=engine)
            told, opened = Parser(preface=True).feed(client.to_send())
            assert told.settings[INITIAL_WINDOW_SIZE] == limits.window_bytes
            assert opened.increment == limits.streams_max * limits.window_bytes - 65535

    def test_a_widened_window(self, engine: str) -> None:
        limits = Http2Limits(first_window_bytes=10_000)
        pair = Pair((engine, engine), limits)
        mine, theirs = pair.open(False, b"POST")
        other, others = pair.open(False, b"POST")
        for stream in (mine, other):
            pair.client.send(stream, b"x" * 200_000)
        pair.turn()
        assert theirs.unread_bytes == others.unread_bytes == 10_000
        pair.server.consumed(theirs)
        pair.server.widen(theirs)
        pair.turn()
        assert (theirs.unread_bytes, others.unread_bytes) == (65536, 10_000)
        pair.server.consumed(theirs)
        pair.turn()
        assert (theirs.unread_bytes, others.unread_bytes) == (65536, 10_000)
        pair.server.reset(theirs, ErrorCode.CANCEL)
        pair.server.widen(theirs)  # which is over: nothing
        pair.turn()
        assert pair.server.error is None

    def test_what_is_told(self, engine: str) -> None:
        server = open_codec(True, STRANGERS, engine=engine)
        (told,) = Parser().feed(server.to_send())
        assert told.settings == {3: 100, 4: 65536, 6: 65536, 8: 1, 9: 1}
        client = open_codec(False, STRANGERS, engine=engine)
        (told, _) = Parser(preface=True).feed(client.to_send())
        assert told.settings == {2: 0, 4: 65536, 6: 65536, 9: 1}

    def test_larger_heads_between_sidecars(self, engine: str) -> None:
        fields = request(more=[(b"x-%d" % i, b"v") for i in range(105)])
        wire = PREFACE + settings() + headers(1, fields, end=True)
        for between, status in ((False, 431), (True, 0)):
            server = open_codec(True, STRANGERS, between_sidecars=between, engine=engine)
            server.receive(wire, 0.0)
            (stream,) = server.take_news()
            assert stream.status == status


class TestCuts:
    @pytest.mark.parametrize("step", [1, 2, 7, 9, 100])
    def test_reads_of_any_size(self, step: int) -> None:
        for engines in (("h2", "ngh2"), ("ngh2", "h2")):
            pair = Pair(engines, step=step)
            mine, theirs = pair.open(False, b"POST")
            pair.client.send(mine, b"hello")
            pair.client.trail(mine, [(b"a", b"b")])
            pair.server.inform(theirs, response(100))
            pair.server.respond(theirs, response(), False)
            pair.server.send(theirs, b"x" * 20000)
            pair.server.trail(theirs, [(b"grpc-status", b"0")])
            pair.turn()
            assert theirs.m is not None and theirs.m.trailers == [(b"a", b"b")] and body(theirs) == b"hello"
            assert mine.m is not None and body(mine) == b"x" * 20000 and mine.m.grpc_status == 0 and mine.closed

    @hypothesis_settings(max_examples=25, deadline=None)
    @given(cuts=st.lists(st.integers(1, 400), max_size=10), engine=st.sampled_from(ENGINES))
    def test_any_cuts(self, cuts: list[int], engine: str) -> None:
        client = open_codec(False, STRANGERS, engine="h2")
        streams = [Stream(method=b"POST") for _ in range(3)]
        for number, stream in enumerate(streams):
            client.request(stream, request(b"POST", b"/%d" % number, more=[(b"x-name", b"value")]), False)
            client.send(stream, b"body" * number)
            client.trail(stream, [(b"sum", b"%d" % number)])
        client.reset(streams[1], ErrorCode.CANCEL)
        wire = client.to_send()
        server = open_codec(True, STRANGERS, engine=engine)
        seen: dict[Stream, None] = {}
        edges = [0, *sorted({cut for cut in cuts if cut < len(wire)}), len(wire)]
        for start, end in itertools.pairwise(edges):
            server.receive(wire[start:end], 0.0)
            seen.update(dict.fromkeys(server.take_news()))
        assert server.error is None and not server.unfinished
        told = [(s.sid, s.error, s.m and (s.m.path, b"".join(s.m.body), s.m.trailers)) for s in seen]
        assert told == [
            (1, None, (b"/0", b"", [(b"sum", b"0")])),
            (3, ErrorCode.CANCEL, (b"/1", b"", [])),
            (5, None, (b"/2", b"bodybody", [(b"sum", b"2")])),
        ]

    def test_unfinished(self, engine: str) -> None:
        server = open_codec(True, STRANGERS, engine=engine)
        server.receive(PREFACE + settings(), 0.0)
        assert not server.unfinished
        server.receive(headers(1, request(), end_headers=False), 0.0)
        assert server.unfinished
        server.receive(b"\0\0\0\x09\x04\0\0\0", 0.0)
        assert server.unfinished and not server.news
        server.receive(b"\x01", 0.0)
        assert not server.unfinished and server.news


@pytest.mark.parametrize("engine", ENGINES)
def test_a_peers_word_does_not_make_the_table_of_our_encoder_large(engine: str) -> None:
    """It says what it would remember; what we remember is ours to say (RFC 7541, section 4.2)."""
    codec = open_codec(False, engine=engine)
    codec.receive(settings({1: 0xFFFFFFFF}), 0.0)
    assert codec.error is None
    wire = codec.to_send()
    parser = Parser(preface=True)
    parser.feed(wire)
    for n in range(400):
        stream = Stream(method=b"GET")
        codec.request(stream, request(more=[(b"x-unique-%d" % n, b"%d" % n * 20)]), True)
        assert parser.feed(codec.to_send())  # its table has 4096 bytes, as everybody's at first: more would not parse
        codec.receive(headers(stream.sid, response(), True), 0.0)
        assert codec.error is None
