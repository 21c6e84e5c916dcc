"""The codecs' contract with a driver: queues, limits, tunnels, the end of a connection."""

import pytest

from sidecar.wire.http1 import (
    HEAD_BYTES_MAX,
    LINE_BYTES_MAX,
    PIPELINED_MAX,
    Message,
    ProtocolError,
    Requests,
    Responses,
)

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: a\r\n\r\n"
UPGRADE = b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
CONNECT = b"CONNECT b:443 HTTP/1.1\r\nHost: b:443\r\n\r\n"


def feed(codec: Requests | Responses, piece: bytes, times: int) -> None:
    for _ in range(times):
        codec.receive(piece)
        if isinstance(codec, Requests):
            assert codec.head_buffered_bytes < HEAD_BYTES_MAX
        else:
            codec.informational.clear()


def paths(codec: Requests) -> list[bytes]:
    return [m.path for m in codec.messages]


class TestRequests:
    def test_a_head_in_parts_is_started_and_counted(self) -> None:
        codec = Requests()
        assert not codec.started
        codec.receive(b"GET / HT")
        assert codec.started
        assert codec.head_buffered_bytes == 8
        assert codec.m is None
        codec.receive(b"TP/1.1\r\nHost: a\r\n\r\n")
        assert not codec.started
        assert codec.head_buffered_bytes == 0
        assert paths(codec) == [b"/"]

    def test_pipelined_requests_come_from_one_read(self) -> None:
        codec = Requests()
        codec.receive(GET + NEXT + b"GET /part")
        assert paths(codec) == [b"/", b"/next"]
        assert codec.started

    def test_a_long_pipeline_is_read_as_it_is_taken(self) -> None:
        codec = Requests()
        codec.receive((GET + NEXT) * 500 + b"POST /last HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\na")
        taken = []
        while codec.messages:
            assert len(codec.messages) <= PIPELINED_MAX
            taken.append(codec.messages.popleft())
            if len(taken) == 5:
                codec.receive(b"b")
        assert [m.path for m in taken] == [b"/", b"/next"] * 500 + [b"/last"]
        last = taken[-1]
        assert not last.done
        codec.receive(b"c" + GET + b"GET")
        assert last.done and last.take() == b"abc"
        assert paths(codec) == [b"/"]
        assert codec.started

    def test_an_error_far_behind_in_a_pipeline(self) -> None:
        codec = Requests()
        codec.receive(GET * 100 + b"\x00")
        assert codec.error is None
        for _ in range(100):
            codec.messages.popleft()
        assert not codec.messages
        assert codec.started
        assert codec.error is not None
        with pytest.raises(ProtocolError):
            codec.receive(b"")

    def test_a_pipeline_that_nobody_takes_is_bounded(self) -> None:
        codec = Requests()
        with pytest.raises(ProtocolError):
            feed(codec, GET * 1000, 20)
        assert len(codec.messages) == PIPELINED_MAX

    def test_an_upgrade_far_behind_in_a_pipeline(self) -> None:
        codec = Requests()
        codec.receive(GET * 40 + UPGRADE + b"\x00")
        codec.receive(b"\x01")
        for _ in range(40):
            assert codec.messages.popleft().path == b"/"
        assert codec.messages.popleft().path == b"/ws"
        assert codec.leftover() == b"\x00\x01"

    def test_a_message_is_there_before_its_body(self) -> None:
        codec = Requests()
        codec.receive(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\r\nab")
        m = codec.messages.popleft()
        assert m is codec.m
        assert m.head and not m.done
        assert m.take() == b"ab"
        assert m.take() == b""
        codec.receive(b"c")
        codec.receive(b"d")
        assert m.take() == b"cd"
        codec.receive(b"ef" + NEXT)
        assert m.done
        assert m.take() == b"ef"
        assert paths(codec) == [b"/next"]

    def test_body_bytes_are_handed_on_as_they_are(self) -> None:
        codec = Requests()
        codec.receive(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2000000\r\n\r\n")
        data = b"x" * 1_000_000
        codec.receive(data)
        codec.receive(data)
        m = codec.messages[0]
        assert m.done
        assert all(piece is data for piece in m.body)

    def test_chunks_in_parts_leave_nothing_buffered_but_a_line(self) -> None:
        codec = Requests()
        codec.receive(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab")
        m = codec.messages[0]
        assert m.take() == b"ab"
        codec.receive(b"cde")
        assert m.take() == b"cde"
        codec.receive(b"\r")
        codec.receive(b"\n0\r\nX-Sum: 1\r\n")
        assert not m.done
        codec.receive(b"\r\n")
        assert m.done
        assert m.trailers == [(b"x-sum", b"1")]

    def test_two_chunked_bodies_do_not_share_their_limit_on_extensions(self) -> None:
        codec = Requests()
        raw = (
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"x" * 3000 + b"\r\na\r\n0\r\n\r\n"
        )
        codec.receive(raw * 3)
        assert all(m.done for m in codec.messages)

    def test_whole_requests_before_an_error_stay(self) -> None:
        codec = Requests()
        with pytest.raises(ProtocolError):
            codec.receive(GET + NEXT + b"nonsense\r\n\r\n")
        assert paths(codec) == [b"/", b"/next"]
        assert all(m.done for m in codec.messages)

    def test_after_an_error_nothing_more_is_read(self) -> None:
        codec = Requests()
        with pytest.raises(ProtocolError) as first:
            codec.receive(b"\x00")
        with pytest.raises(ProtocolError) as second:
            codec.receive(GET)
        assert second.value is first.value
        assert not codec.messages
        assert codec.head_buffered_bytes == 0

    def test_what_cannot_be_http_is_refused_at_once(self) -> None:
        for raw in (
            b"\x16\x03\x01\x02\x00",
            b"GET / HTTP/1.1\nHo",
            b"FOO\r\n",
            b"GET / HTTP/2.0\r\n",
            b"GET / HTTP/1.1\r\nA\rB",
        ):
            with pytest.raises(ProtocolError):
                Requests().receive(raw)

    @pytest.mark.parametrize("size", [1, 7, 1000])
    def test_a_head_without_end_is_bounded(self, size: int) -> None:
        codec = Requests()
        codec.receive(b"GET / HTTP/1.1\r\nX: ")
        with pytest.raises(ProtocolError) as caught:
            feed(codec, b"y" * size, HEAD_BYTES_MAX // size + 2)
        assert caught.value.status == 431

    def test_a_request_line_without_end_is_bounded(self) -> None:
        codec = Requests()
        with pytest.raises(ProtocolError) as caught:
            feed(codec, b"G", LINE_BYTES_MAX + 10)
        assert caught.value.status == 414

    def test_between_sidecars_there_is_room_for_what_the_first_adds(self) -> None:
        raw = b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 105 + b"\r\n"
        with pytest.raises(ProtocolError):
            Requests().receive(raw)
        Requests(between_sidecars=True).receive(raw)
        with pytest.raises(ProtocolError):
            Requests(between_sidecars=True).receive(raw[:-2] + b"X: y\r\n" * 20 + b"\r\n")
        raw = b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * (HEAD_BYTES_MAX + 1000) + b"\r\n\r\n"
        with pytest.raises(ProtocolError):
            Requests().receive(raw)
        Requests(between_sidecars=True).receive(raw)


class TestRequestsThatMayBecomeTunnels:
    @pytest.mark.parametrize("raw", [UPGRADE, CONNECT])
    def test_raw_bytes_behind_are_kept(self, raw: bytes) -> None:
        codec = Requests()
        codec.receive(raw + b"\x00\x01")
        codec.receive(b"\x02")
        codec.messages.popleft()
        assert codec.leftover() == b"\x00\x01\x02"
        with pytest.raises(ProtocolError):
            codec.receive(b"x")

    def test_bytes_behind_that_look_like_requests_are_raw_too(self) -> None:
        codec = Requests()
        codec.receive(UPGRADE + NEXT)
        codec.receive(b"GET /third")
        codec.messages.popleft()
        assert codec.leftover() == NEXT + b"GET /third"
        assert not codec.messages
        assert codec.head_buffered_bytes == 0

    def test_nothing_behind(self) -> None:
        codec = Requests()
        codec.receive(UPGRADE)
        codec.messages.popleft()
        assert codec.leftover() == b""

    def test_without_an_upgrade_the_next_request_is_read(self) -> None:
        codec = Requests()
        codec.receive(UPGRADE + NEXT)
        assert paths(codec) == [b"/ws", b"/next"]
        codec.messages.clear()
        codec.receive(GET)
        assert paths(codec) == [b"/"]

    def test_without_an_upgrade_a_later_request_is_read(self) -> None:
        codec = Requests()
        for _ in range(3):
            codec.receive(UPGRADE)
            assert codec.messages.popleft().path == b"/ws"
            codec.receive(NEXT)
            assert codec.messages.popleft().path == b"/next"

    def test_the_later_of_two_upgrades(self) -> None:
        codec = Requests()
        codec.receive(UPGRADE + UPGRADE.replace(b"/ws", b"/ws2") + b"\xff")
        codec.receive(b"\xfe")
        assert codec.messages.popleft().path == b"/ws"
        assert codec.messages.popleft().path == b"/ws2"
        codec.receive(b"\xfd")
        assert codec.leftover() == b"\xff\xfe\xfd"

    def test_noise_behind_an_upgrade_that_was_refused_ends_the_connection(self) -> None:
        codec = Requests()
        codec.receive(UPGRADE + NEXT + b"\x00")
        codec.messages.clear()
        assert codec.started
        with pytest.raises(ProtocolError):
            codec.receive(b"x")

    def test_what_is_kept_behind_is_bounded(self) -> None:
        codec = Requests()
        codec.receive(CONNECT)
        codec.messages.clear()
        feed(codec, b"\x00" * 4096, 64)
        with pytest.raises(ProtocolError):
            feed(codec, b"\x00" * 4096, 2)

    def test_a_body_is_a_body_first(self) -> None:
        codec = Requests()
        codec.receive(UPGRADE[:-2] + b"Content-Length: 3\r\n\r\nabcdef")
        m = codec.messages.popleft()
        assert m.done and m.take() == b"abc" and m.upgrade == b"websocket"
        assert codec.leftover() == b"def"

    def test_h2c_is_an_ordinary_request(self) -> None:
        codec = Requests()
        codec.receive(UPGRADE.replace(b"websocket", b"h2c"))
        assert codec.messages[0].upgrade is None
        with pytest.raises(ProtocolError):
            codec.receive(b"\x00")


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


def expecting(method: bytes = b"GET", upgrade: bool = False) -> Responses:
    codec = Responses()
    codec.expect(method, upgrade)
    return codec


def final(codec: Responses) -> Message:
    assert codec.m is not None
    return codec.m


class TestResponses:
    def test_one_after_the_other(self) -> None:
        codec = Responses()
        for method in (b"GET", b"HEAD", b"GET", b"HEAD"):
            codec.expect(method)
            assert codec.m is None
            codec.receive(OK[: -3 if method == b"HEAD" else None])
            m = final(codec)
            assert m.done
            assert m.length == 3
            assert m.take() == (b"" if method == b"HEAD" else b"abc")

    def test_no_message_before_its_head_is_complete(self) -> None:
        codec = expecting()
        codec.receive(OK[:20])
        assert codec.m is None
        codec.receive(OK[20:])
        assert final(codec).done

    def test_bytes_nobody_asked_for(self) -> None:
        with pytest.raises(ProtocolError, match="nobody asked for"):
            Responses().receive(OK)

    def test_bytes_after_the_end_later(self) -> None:
        codec = expecting()
        codec.receive(OK)
        with pytest.raises(ProtocolError, match="beyond the end"):
            codec.receive(b"H")
        assert final(codec).done

    def test_errors_have_status_502(self) -> None:
        for raw in (b"x\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: y\r\n" + b"A: b\r\n" * 100 + b"\r\n"):
            with pytest.raises(ProtocolError) as caught:
                expecting().receive(raw)
            assert caught.value.status == 502

    def test_informational_responses_come_in_order(self) -> None:
        codec = expecting(b"POST")
        codec.receive(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 1")
        assert [m.status for m in codec.informational] == [100, 103]
        assert codec.informational[1].headers == [(b"link", b"a")]
        assert codec.m is None
        codec.informational.clear()
        codec.receive(b"00 Continue\r\n\r\n" + OK)
        assert [m.status for m in codec.informational] == [100]
        assert final(codec).status == 200

    def test_informational_responses_are_counted_also_when_taken(self) -> None:
        codec = expecting()
        with pytest.raises(ProtocolError, match="too many informational"):
            feed(codec, b"HTTP/1.1 102 Processing\r\n\r\n", 20)

    def test_101_becomes_a_tunnel_if_asked_for(self) -> None:
        codec = expecting(upgrade=True)
        codec.receive(SWITCH + b"\x81\x00")
        m = final(codec)
        assert m.status == 101 and m.done and m.upgrade == b"websocket"
        codec.receive(b"\x01")
        assert codec.leftover() == b"\x81\x00\x01"
        with pytest.raises(ProtocolError):
            codec.receive(b"x")

    @pytest.mark.parametrize(
        ("raw", "upgrade"),
        [
            (SWITCH, False),
            (SWITCH.replace(b"websocket", b"h2c"), True),
            (SWITCH.replace(b"Connection: Upgrade\r\n", b""), True),
            (SWITCH.replace(b"Upgrade: websocket\r\n", b""), True),
            (SWITCH.replace(b"HTTP/1.1", b"HTTP/1.0"), True),
            (SWITCH.replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\nabc"), True),
        ],
    )
    def test_a_101_that_is_none(self, raw: bytes, upgrade: bool) -> None:
        with pytest.raises(ProtocolError):
            expecting(upgrade=upgrade).receive(raw)

    def test_an_upgrade_that_is_declined_is_an_ordinary_response(self) -> None:
        codec = expecting(upgrade=True)
        codec.receive(OK)
        assert final(codec).take() == b"abc"

    def test_connect(self) -> None:
        codec = expecting(b"CONNECT")
        codec.receive(b"HTTP/1.1 200 OK\r\n\r\n\x16\x03")
        assert final(codec).done
        assert codec.leftover() == b"\x16\x03"

    def test_the_end_of_the_connection(self) -> None:
        assert not Responses().eof()
        assert not expecting().eof()
        codec = expecting()
        codec.receive(b"HTTP/1.1 200 OK\r\n\r\nabc")
        assert not final(codec).done
        assert codec.eof()
        assert final(codec).done
        assert final(codec).take() == b"abc"

    @pytest.mark.parametrize(
        "raw",
        [
            OK[:10],
            OK[:-1],
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n",
        ],
    )
    def test_cut_short(self, raw: bytes) -> None:
        codec = expecting()
        codec.receive(raw)
        assert not codec.eof()
        assert codec.m is None or not codec.m.done

    def test_a_connection_is_not_used_again_before_the_end(self) -> None:
        codec = expecting()
        codec.receive(OK[:-1])
        with pytest.raises(AssertionError):
            codec.expect(b"GET")


def test_cookie_fields_become_one_where_the_first_stood() -> None:
    codec = Requests()
    codec.receive(b"GET / HTTP/1.1\r\nHost: a\r\nCookie: a=1\r\nX: y\r\nCOOKIE: b=2; c=3\r\ncookie:\r\n\r\n")
    assert codec.messages[0].headers == [(b"cookie", b"a=1; b=2; c=3; "), (b"x", b"y")]
