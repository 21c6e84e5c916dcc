"""The guard: frame rules told by nine bytes, budgets, and that no cut of the reads changes a verdict."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.http2_frames import (
    END_HEADERS,
    PADDED,
    PREFACE,
    continuation,
    data,
    frame,
    goaway,
    headers,
    ping,
    priority,
    push_promise,
    request,
    rst_stream,
    settings,
    window_update,
)

from sidecar.wire.http2 import ErrorCode, Http2Error
from sidecar.wire.http2_guard import (
    ANSWERS_MAX,
    BLOCK_BYTES_MAX,
    BUDGETS,
    CONTINUATIONS_MAX,
    RAPID_S,
    SETTINGS_ENTRIES_MAX,
    UNAGREED_STREAMS_MAX,
    Guard,
)

HELLO = PREFACE + settings() + settings(ack=True)
GET = headers(1, request(), end=True)
POST = headers(1, request(b"POST"))
BURST = {name: budget[0] for name, budget in BUDGETS.items()}


def server(now: float = 0.0, **more: bool) -> Guard:
    guard = Guard(True, **more)
    guard.feed(HELLO, now)
    return guard


def client() -> Guard:
    guard = Guard(False)
    guard.feed(settings() + settings(ack=True), 0.0)
    guard.opened(1)
    return guard


def verdict(guard: Guard, wire: bytes, now: float = 0.0) -> tuple[int, str] | None:
    try:
        guard.feed(wire, now)
    except Http2Error as exc:
        return exc.code, exc.limit
    return None


def calm(limit: str) -> tuple[int, str]:
    return ErrorCode.ENHANCE_YOUR_CALM, limit


def spent(guard: Guard, one: bytes, most: int, now: float = 0.0) -> int:
    """How many of these frames pass, and that the next one is refused."""
    for count in range(most + 1):
        if verdict(guard, one, now) is not None:
            return count
    raise AssertionError(f"{most} passed")


class TestFrameRules:
    @pytest.mark.parametrize(
        ("wire", "code"),
        [
            pytest.param(frame(0, 1, bytes(16385)), ErrorCode.FRAME_SIZE_ERROR, id="4.2 DATA"),
            pytest.param(frame(0x77, 0, bytes(16385)), ErrorCode.FRAME_SIZE_ERROR, id="4.2 unknown"),
            pytest.param(rst_stream(3), ErrorCode.PROTOCOL_ERROR, id="5.1 RST_STREAM idle"),
            pytest.param(data(3, b"x"), ErrorCode.PROTOCOL_ERROR, id="5.1 DATA idle"),
            pytest.param(window_update(3, 1), ErrorCode.PROTOCOL_ERROR, id="5.1 WINDOW_UPDATE idle"),
            pytest.param(headers(2, request()), ErrorCode.PROTOCOL_ERROR, id="5.1.1 even"),
            pytest.param(window_update(2, 1), ErrorCode.PROTOCOL_ERROR, id="5.1.1 even WINDOW_UPDATE"),
            pytest.param(data(0, b"x"), ErrorCode.PROTOCOL_ERROR, id="6.1 stream 0"),
            pytest.param(headers(0, request()), ErrorCode.PROTOCOL_ERROR, id="6.2 stream 0"),
            pytest.param(priority(0), ErrorCode.PROTOCOL_ERROR, id="6.3 stream 0"),
            pytest.param(frame(2, 1, bytes(4)), ErrorCode.FRAME_SIZE_ERROR, id="6.3 length"),
            pytest.param(rst_stream(0), ErrorCode.PROTOCOL_ERROR, id="6.4 stream 0"),
            pytest.param(frame(3, 1, bytes(5)), ErrorCode.FRAME_SIZE_ERROR, id="6.4 length"),
            pytest.param(frame(4, 1), ErrorCode.PROTOCOL_ERROR, id="6.5 stream"),
            pytest.param(frame(4, 0, bytes(5)), ErrorCode.FRAME_SIZE_ERROR, id="6.5 length"),
            pytest.param(frame(4, 0, bytes(6), 1), ErrorCode.FRAME_SIZE_ERROR, id="6.5 ACK with payload"),
            pytest.param(settings(ack=True), ErrorCode.PROTOCOL_ERROR, id="6.5.3 ACK of nothing"),
            pytest.param(push_promise(1, 2, request()), ErrorCode.PROTOCOL_ERROR, id="6.6"),
            pytest.param(frame(6, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR, id="6.7 stream"),
            pytest.param(frame(6, 0, bytes(7)), ErrorCode.FRAME_SIZE_ERROR, id="6.7 length"),
            pytest.param(frame(7, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR, id="6.8 stream"),
            pytest.param(frame(7, 0, bytes(7)), ErrorCode.FRAME_SIZE_ERROR, id="6.8 length"),
            pytest.param(frame(8, 0, bytes(3)), ErrorCode.FRAME_SIZE_ERROR, id="6.9 length"),
            pytest.param(continuation(1, b"", True), ErrorCode.PROTOCOL_ERROR, id="6.10 without HEADERS"),
            pytest.param(continuation(0, b"", True), ErrorCode.PROTOCOL_ERROR, id="6.10 stream 0"),
        ],
    )
    def test_refused(self, wire: bytes, code: int) -> None:
        guard = server()
        guard.feed(GET, 0.0)
        assert verdict(guard, wire) == (code, "")
        guard = server()
        assert verdict(guard, GET + wire) == (code, "")
        assert guard.passed == len(GET)

    @pytest.mark.parametrize(
        "between",
        [ping(), data(1, b"x"), continuation(3), headers(1, b""), settings(), frame(0x77), window_update(0, 1)],
        ids=["PING", "DATA", "other stream", "HEADERS", "SETTINGS", "unknown", "WINDOW_UPDATE"],
    )
    def test_a_header_block_is_not_interrupted(self, between: bytes) -> None:
        guard = server()
        guard.feed(headers(1, request(), end_headers=False), 0.0)
        assert guard.unfinished
        assert verdict(guard, between) == (ErrorCode.PROTOCOL_ERROR, "")

    def test_a_block_ends(self) -> None:
        guard = server()
        guard.feed(headers(1, request(), cuts=[5, 9], end=True), 0.0)
        assert not guard.unfinished
        assert verdict(guard, ping()) is None

    @pytest.mark.parametrize("at", [1, 3, 4, 14, 23, 24])
    def test_the_preface(self, at: int) -> None:
        guard = Guard(True)
        assert verdict(guard, PREFACE[: at - 1]) is None
        assert verdict(guard, b"x" + PREFACE[at:]) == (ErrorCode.PROTOCOL_ERROR, "")

    @pytest.mark.parametrize("first", [ping(), GET, settings(ack=True), window_update(0, 1), frame(0x77), data(1)])
    def test_settings_come_first(self, first: bytes) -> None:
        assert verdict(Guard(True), PREFACE + first) == (ErrorCode.PROTOCOL_ERROR, "")
        assert verdict(Guard(False), first) == (ErrorCode.PROTOCOL_ERROR, "")

    def test_the_reserved_bit_says_nothing(self) -> None:
        guard = server()
        assert verdict(guard, headers(1 | 1 << 31, request(b"POST")) + data(1 | 1 << 31, b"abc", end=True)) is None
        assert verdict(guard, frame(4, 1 << 31) + window_update(1 << 31, 1) + frame(6, 1 << 31, bytes(8))) is None


class TestStreams:
    def test_after_its_end_a_stream_is_closed_to_the_peer(self) -> None:
        closed = (ErrorCode.STREAM_CLOSED, "")
        for ended in (GET, POST + data(1, b"x", end=True), POST + headers(1, b"", end=True), POST + rst_stream(1)):
            for more in (data(1, b"x"), headers(1, request(), end=True), data(1, b"", end=True)):
                assert verdict(server(), ended + more) == closed
            for more in (window_update(1, 1), priority(1), rst_stream(1)):
                assert verdict(server(), ended + more) is None

    def test_a_lower_stream_id_than_before(self) -> None:
        wire = headers(5, request(), end=True) + headers(3, request(), end=True)
        assert verdict(server(), wire) == (ErrorCode.PROTOCOL_ERROR, "")

    def test_what_was_under_way_when_we_reset_a_stream_may_come(self) -> None:
        guard = server()
        guard.feed(POST, 0.0)
        guard.gave_up(1)
        assert verdict(guard, data(1, b"x" * 99) + window_update(1, 5) + headers(1, b"", end=True)) is None
        assert verdict(guard, data(1, b"x")) == (ErrorCode.STREAM_CLOSED, "")

    def test_memory_of_streams_that_we_reset_is_bounded(self) -> None:
        guard = server()
        for sid in range(1, 8001, 2):
            guard.feed(headers(sid, b""), 0.0)
            guard.gave_up(sid)
        assert len(guard._late) <= 1000 and not guard._open
        assert verdict(guard, data(7999, b"x")) is None

    def test_a_server_may_only_speak_of_streams_that_we_opened(self) -> None:
        assert verdict(client(), headers(1, b"\x88") + data(1, b"x") + headers(1, b"", end=True)) is None
        assert verdict(client(), headers(3, b"\x88")) == (ErrorCode.PROTOCOL_ERROR, "")
        assert verdict(client(), headers(2, b"\x88")) == (ErrorCode.PROTOCOL_ERROR, "")
        assert verdict(client(), push_promise(1, 2, request())) == (ErrorCode.PROTOCOL_ERROR, "")


class TestFloods:
    @pytest.mark.parametrize(
        ("one", "limit"),
        [
            (settings({3: 100}), "settings_frames"),
            (ping(), "ping_frames"),
            (ping(ack=True), "ping_frames"),
            (priority(3), "priority_frames"),
            (frame(0x77, 1, b"abc"), "unknown_frames"),
            (frame(0x10, 0, b"\0\0\0\x01u=1"), "unknown_frames"),
            (window_update(0, 1), "window_update_frames"),
            (window_update(1, 1), "window_update_frames"),
            (data(1), "empty_data_frames"),
            (data(1, b"", pad=0), "empty_data_frames"),
            (data(1, b"x"), "tiny_data_frames"),
            (data(1, b"", pad=16), "tiny_data_frames"),
            (rst_stream(1), "rst_stream_frames"),
            (goaway(), "goaway_frames"),
        ],
    )
    def test_ends_the_connection_and_names_the_limit(self, one: bytes, limit: str) -> None:
        guard = server()
        guard.feed(POST, 0.0)
        count = BURST[limit]
        passed = spent(guard, one, count + 100)
        assert count - 3 <= passed <= count + 50
        whole = server()
        assert verdict(whole, POST + one * (count + 100)) == calm(limit)
        assert whole.passed == len(POST) + passed * len(one)

    @pytest.mark.parametrize(
        ("one", "limit"), [(ping(), "ping_frames"), (settings(), "settings_frames"), (window_update(0, 1), "")]
    )
    def test_time_gives_back(self, one: bytes, limit: str) -> None:
        guard = server()
        limit = limit or "window_update_frames"
        burst, per_s, _, _ = BUDGETS[limit]
        for second in range(100):
            assert verdict(guard, one * int(per_s), float(second)) is None
            guard.flushed()
        assert spent(guard, one, 10000, 99.0) <= burst
        assert spent(server(0.0), one, 10000, 1e9) <= 2 * burst  # and never more than that

    def test_a_download_earns_window_updates_and_pings(self) -> None:
        guard = server()
        guard.feed(GET, 0.0)
        for _ in range(3000):
            guard.sent(65536)
            assert verdict(guard, (window_update(0, 16384) + window_update(1, 16384)) * 4 + ping()) is None
            guard.flushed()

    def test_a_large_window_is_acknowledged_late(self) -> None:
        guard = server()
        guard.feed(GET, 0.0)
        for _ in range(256):
            guard.sent(65536)
        assert verdict(guard, (window_update(0, 16384) + window_update(1, 16384)) * 1024) is None

    def test_tiny_messages_of_a_stream_earn_their_window_updates(self) -> None:
        guard = server()
        guard.feed(GET, 0.0)
        for _ in range(5000):
            guard.sent(6)
            assert verdict(guard, window_update(0, 6) + window_update(1, 6)) is None

    def test_streaming_small_messages_is_no_flood(self) -> None:
        guard = server()
        assert verdict(guard, POST + data(1, b"12345") * 20000) is None

    def test_requests_with_priorities_and_trailers(self) -> None:
        guard = server()
        for sid in range(1, 20001, 2):
            wire = headers(sid, b"\x82") + priority(sid) + data(sid, b"abcdef") + headers(sid, b"", end=True)
            assert verdict(guard, wire + window_update(sid, 1)) is None
            guard.stream_finished()

    def test_interim_responses(self) -> None:
        assert spent(client(), headers(1, b"\x08\x03103"), 1000) == BURST["more_header_sections"] + 4

    def test_acknowledgements_that_nobody_reads(self) -> None:
        guard = server()
        now, count = 0.0, 0
        while (end := verdict(guard, ping(), now)) is None:
            count += 1
            now += 0.06
        assert end == calm("unread_answers") and count == ANSWERS_MAX - 1  # the SETTINGS were one
        guard = server()
        for second in range(2000):
            assert verdict(guard, ping(), second) is None
            guard.flushed()


class TestHeaderBlocks:
    def test_bytes(self) -> None:
        guard = server()
        block = bytes(BLOCK_BYTES_MAX + 1)
        wire = headers(1, block, cuts=range(16384, len(block), 16384))
        assert verdict(guard, wire) == calm("header_block")
        wire = headers(1, block[:-1], cuts=range(16384, len(block) - 1, 16384))
        assert verdict(server(), wire) is None

    @pytest.mark.parametrize("fragment", [b"", b"x"])
    def test_continuations(self, fragment: bytes) -> None:
        guard = server()
        guard.feed(headers(1, b"\x82", end_headers=False), 0.0)
        assert spent(guard, continuation(1, fragment), 100) == CONTINUATIONS_MAX
        wire = headers(1, b"\x82", end_headers=False) + continuation(1, fragment) * 10000
        assert verdict(server(), wire) == calm("continuation_frames")

    def test_settings_entries(self) -> None:
        assert verdict(server(), settings([(3, 100)] * SETTINGS_ENTRIES_MAX)) is None
        assert verdict(server(), settings([(3, 100)] * (SETTINGS_ENTRIES_MAX + 1))) == calm("settings_entries")


class TestRapidReset:
    def attack(self, guard: Guard, now: float = 0.0, most: int = 5000) -> int:
        """Requests that are opened and reset, until the guard ends it."""
        first = guard._highest + 2 if guard._highest else 1
        for count in range(most):
            sid = first + 2 * count
            guard.feed(headers(sid, b"\x82", end=True), now)
            guard.feed(rst_stream(sid), now)
            try:
                guard.stream_reset_by_peer(guard.rapid_until(None))
            except Http2Error as exc:
                return count + 1 if (exc.code, exc.limit) == calm("rapid_reset") else -1
        return most

    def test_fewer_than_a_hundred_requests_get_through(self) -> None:
        assert self.attack(server()) == BURST["rapid_reset"] + 1 < 100

    def test_neither_does_time_help_much(self) -> None:
        guard = server()
        for second in range(60):
            for _ in range(2):
                try:
                    guard.now = float(second)
                    guard.stream_reset_by_peer(guard.rapid_until(None))
                except Http2Error:
                    assert guard.now < 60
                    return
        raise AssertionError("two a second for a minute")

    def test_calls_that_are_given_up_after_a_while_do_not_count(self) -> None:
        guard = server()
        until = guard.rapid_until(None)
        guard.now = RAPID_S
        for _ in range(10_000):
            guard.stream_reset_by_peer(until)
        assert self.attack(guard, RAPID_S) == BURST["rapid_reset"] + 1

    def test_nor_do_those_whose_deadline_is_near(self) -> None:
        """As nearly as clocks and networks can tell; but to state a short one is no way to go on and on."""
        guard = server()
        assert guard.rapid_until(100.0) == pytest.approx(0.08)
        assert guard.rapid_until(500.0) == pytest.approx(0.4)
        assert guard.rapid_until(60_000.0) == guard.rapid_until(99.0) == guard.rapid_until(0.0) == RAPID_S
        until = guard.rapid_until(500.0)
        guard.now = 0.45
        for _ in range(10_000):
            guard.stream_reset_by_peer(until)
        assert self.attack(guard, 0.45) == BURST["rapid_reset"] + 1

    def test_resets_that_errors_force_on_us_count(self) -> None:
        guard = server()
        for _ in range(BURST["rapid_reset"]):
            guard.stream_reset_by_us()
        with pytest.raises(Http2Error, match="ENHANCE_YOUR_CALM"):
            guard.stream_reset_by_us()

    def test_a_client_that_cancels_some_calls_is_never_hit(self) -> None:
        guard = server()
        for sid in range(1, 40001, 2):
            guard.feed(headers(sid, b"\x82", end=True), 0.0)
            if sid % 3:
                guard.stream_finished()
            else:
                guard.feed(rst_stream(sid), 0.0)
                guard.stream_reset_by_peer(guard.rapid_until(None))

    def test_finished_streams_save_up_nothing(self) -> None:
        guard = server()
        for _ in range(100000):
            guard.stream_finished()
        assert self.attack(guard) == BURST["rapid_reset"] + 1

    def test_between_sidecars_there_is_more(self) -> None:
        assert self.attack(server(between_sidecars=True)) == BURST["rapid_reset_peer"] + 1

    def test_a_servers_resets_are_no_attack(self) -> None:
        guard = client()
        for sid in range(3, 4003, 2):
            guard.opened(sid)
            guard.feed(rst_stream(sid), 0.0)
            guard.stream_reset_by_peer(guard.rapid_until(None))
            guard.stream_reset_by_us()

    def test_streams_before_our_settings_are_acknowledged(self) -> None:
        guard = Guard(True)
        wire = b"".join(headers(sid, b"\x82", end=True) for sid in range(1, 2 * UNAGREED_STREAMS_MAX + 1, 2))
        guard.feed(PREFACE + settings() + wire, 0.0)
        more = headers(2 * UNAGREED_STREAMS_MAX + 1, b"\x82", end=True)
        assert verdict(guard, more) == calm("refused_streams")
        guard = Guard(True)
        guard.feed(PREFACE + settings() + wire + settings(ack=True), 0.0)
        assert verdict(guard, more) is None


FRAMES = [
    GET,
    POST,
    headers(3, request(), cuts=[3]),
    headers(3, request(), end_headers=False),
    continuation(3, b"abc", True),
    data(1, b"hello"),
    data(1, b"hello", end=True, pad=3),
    data(3),
    rst_stream(1),
    rst_stream(9),
    settings({4: 70000}),
    ping(),
    window_update(0, 9),
    window_update(1, 9),
    goaway(),
    frame(0x77, 5, b"grease"),
    frame(6, 0, bytes(7)),
    frame(0, 1, b"", 0, length=20000),
    frame(0, 1, b"", PADDED),
    frame(1, 5, b"\x82", END_HEADERS),
]


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    frames=st.lists(st.sampled_from(FRAMES), max_size=12),
    cuts=st.lists(st.integers(0, 500), max_size=12),
)
def test_the_verdict_never_depends_on_the_cuts(frames: list[bytes], cuts: list[int]) -> None:
    wire = HELLO + b"".join(frames)
    whole = Guard(True)
    expected = verdict(whole, wire)
    passed = whole.passed if expected else len(wire)
    for edges in (sorted({0, *cuts, len(wire)}), range(len(wire) + 1)):
        guard = Guard(True)
        for start, end in pairwise(edge for edge in edges if edge <= len(wire)):
            got = verdict(guard, wire[start:end])
            if got is not None:
                assert got == expected
                # All that comes before the frame counts, and of the frame nine bytes at most are with the engine.
                assert passed <= max(start, start + guard.passed) <= passed + 8
                break
        else:
            assert expected is None
            assert guard.unfinished == whole.unfinished
