"""The channel's dealings with OpenSSL and epoll, on a scripted socket and a reactor without epoll."""

import errno
import gc
import ssl
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from support.fakesock import FakeReactor, PlainSocket, TlsSocket

from sidecar.proxy.channel import (
    HELD_BYTES,
    HIGH_BYTES,
    LOW_BYTES,
    RECORD_BYTES,
    SMALL_BYTES,
    TIGHT_BYTES,
    Channel,
    share,
)
from sidecar.proxy.reactor import ERR, HUP, IN, OUT, RDHUP

RECORD = b"r" * RECORD_BYTES


class Owner:
    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.then: Callable[[], Any] = lambda: None
        self.within = False

    def hear(self, what: Any) -> None:
        assert not self.within, "re-entered from the owner's own call"
        self.heard.append(what)
        self.then()

    def received(self, data: bytes) -> None:
        self.hear(data)

    def drained(self) -> None:
        self.hear("drained")

    def ended(self) -> None:
        self.hear("ended")

    def lost(self, exc: Exception | None) -> None:
        self.hear(("lost", type(exc) if exc else None))


class Rig:
    def __init__(self, sock: Any, watch_hangup: bool = False) -> None:
        self.sock, self.owner, self.reactor = sock, Owner(), FakeReactor()
        self.channel = Channel(self.reactor, sock, self.owner, watch_hangup)  # type: ignore[arg-type]
        self.heard = self.owner.heard

    def event(self, events: int) -> None:
        assert self.reactor.mask is not None, "epoll would not tell"
        assert events & (self.reactor.mask | ERR | HUP), "epoll would not tell"
        self.channel.ready(events)
        self.reactor.batch_end()

    def write(self, data: bytes) -> bool:
        self.owner.within = True
        try:
            return self.channel.write(data)
        finally:
            self.owner.within = False


def plain(**options: Any) -> Rig:
    return Rig(PlainSocket(), **options)


def tls(**options: Any) -> Rig:
    return Rig(TlsSocket(), **options)


# Reading


def test_bytes_that_the_handshake_decrypted_are_read_although_epoll_never_tells():
    sock = TlsSocket()
    sock.inside, sock.reads = 5, [b"early"]
    rig = Rig(sock)
    rig.reactor.batch_end()
    assert rig.heard == [b"early"]


def test_bytes_inside_openssl_are_read_after_resume():
    rig = tls()
    rig.channel.pause()
    rig.sock.inside, rig.sock.reads = 4, [b"more"]
    rig.channel.resume()
    rig.reactor.batch_end()
    assert rig.heard == [b"more"]


def test_whole_records_are_read_and_joined():
    rig = tls()
    rig.sock.reads = [RECORD, RECORD, b"tail"]
    rig.event(IN)
    assert rig.heard == [RECORD * 2 + b"tail"]


def test_a_burst_is_bounded():
    rig = tls()
    rig.sock.reads = [RECORD] * 40
    rig.event(IN)
    assert [len(data) for data in rig.heard] == [16 * RECORD_BYTES]


@pytest.mark.parametrize("end", [b"", ssl.SSLZeroReturnError()])
def test_a_clean_end_behind_a_burst_comes_after_it_without_another_event(end):
    rig = tls()
    rig.sock.reads = [RECORD, end]
    rig.event(IN)
    assert rig.heard == [RECORD, ("lost", None)]


def test_an_error_behind_a_burst_comes_after_it_without_another_event():
    rig = tls()
    rig.sock.reads = [RECORD, ssl.SSLEOFError()]
    rig.event(IN)
    assert rig.heard == [RECORD, ("lost", ssl.SSLEOFError)]


def test_an_end_behind_a_burst_waits_where_the_owner_has_paused():
    rig = tls()
    rig.owner.then = rig.channel.pause
    rig.sock.reads = [RECORD, b""]
    rig.event(IN)
    assert rig.heard == [RECORD]
    assert rig.channel.unread()
    rig.channel.resume()
    rig.reactor.batch_end()
    assert rig.heard == [RECORD, ("lost", None)]


def test_reading_that_must_write_first_is_repeated_when_it_can():
    rig = tls()
    rig.sock.reads = [ssl.SSLWantWriteError(), b"after"]
    rig.event(IN)
    assert rig.reactor.mask == IN | OUT
    rig.event(OUT)  # and no IN: OpenSSL may hold everything already
    assert rig.heard == [b"after"]
    assert rig.reactor.mask == IN


def test_nothing_is_heard_after_close():
    rig = plain()
    rig.owner.then = rig.channel.close
    rig.sock.reads = [b"one", b"two"]
    rig.event(IN)
    rig.channel.ready(IN)
    assert rig.heard == [b"one"]
    assert rig.reactor.doomed == [rig.sock]


def test_half_close_is_told_only_to_who_asked():
    rig = plain()
    rig.sock.reads = [b""]
    rig.event(IN)
    assert rig.heard == [("lost", None)]
    rig = plain()
    rig.channel.half_close = True
    rig.sock.reads = [b""]
    rig.event(IN)
    assert rig.heard == ["ended"]
    assert rig.reactor.mask == 0  # IN and RDHUP would fire for ever
    rig.channel.resume()
    assert rig.reactor.mask == 0


# Hang-ups


def test_a_paused_channel_is_unregistered_on_a_hangup_or_it_spins():
    rig = plain()
    rig.channel.pause()
    assert rig.reactor.mask == 0
    rig.event(HUP | ERR)
    assert rig.reactor.mask is None
    assert rig.heard == []
    rig.sock.reads = [b"still there", ConnectionResetError()]
    rig.channel.resume()
    rig.event(IN | HUP)
    rig.event(IN | HUP)
    assert rig.heard == [b"still there", ("lost", ConnectionResetError)]


def test_rdhup_is_watched_only_where_asked_and_where_it_means_gone():
    for rig, mask in ((plain(), 0), (plain(watch_hangup=True), RDHUP), (tls(watch_hangup=True), RDHUP)):
        rig.channel.pause()
        assert rig.reactor.mask == mask
    rig = plain(watch_hangup=True)
    rig.channel.half_close = True
    rig.channel.pause()
    assert rig.reactor.mask == 0  # the same FIN is a half-close
    rig = tls(watch_hangup=True)
    rig.channel.half_close = True
    rig.channel.pause()
    rig.event(RDHUP)
    assert rig.heard == [("lost", ConnectionResetError)]


def test_both_directions_ended_is_unregistered_without_a_loss():
    rig = plain()
    rig.channel.half_close = True
    rig.sock.reads = [b""]
    rig.event(IN)
    rig.channel.end()
    rig.event(HUP)
    assert rig.reactor.mask is None
    assert rig.heard == ["ended"]
    rig = plain()
    rig.channel.half_close = True
    rig.sock.reads = [b""]
    rig.event(IN)
    rig.event(HUP | ERR)
    assert rig.heard == ["ended", ("lost", ConnectionResetError)]


# Writing


@pytest.mark.parametrize("blocked", [ssl.SSLWantWriteError(), BlockingIOError()])
def test_after_want_write_the_very_same_bytes_come_again(blocked):
    rig = tls()
    rig.sock.sends = [blocked]
    rig.write(b"first")
    rig.write(b"second")
    assert rig.reactor.mask == IN | OUT
    rig.event(OUT)
    assert rig.sock.sent == [b"first", b"first", b"second"]
    assert rig.reactor.mask == IN


def test_a_chunk_that_was_tried_does_not_grow():
    rig = tls()
    rig.sock.sends = [1, ssl.SSLWantWriteError()]
    rig.write(b"ab")
    rig.write(b"c")
    rig.sock.sends = [1, ssl.SSLWantWriteError()]
    rig.event(OUT)
    rig.write(b"d")
    rig.event(OUT)
    assert rig.sock.sent == [b"ab", b"b", b"b", b"c", b"c", b"d"]


def test_tls_writes_record_by_record_within_one_call():
    rig = tls()
    rig.sock.sends = [RECORD_BYTES, RECORD_BYTES]
    assert rig.write(RECORD * 3)
    assert [len(data) for data in rig.sock.sent] == [3 * RECORD_BYTES, 2 * RECORD_BYTES, RECORD_BYTES]
    assert rig.channel.out_bytes == 0
    assert rig.heard == []


def test_writing_that_must_read_first_waits_for_input_without_spinning():
    rig = tls()
    rig.sock.sends = [ssl.SSLWantReadError()]
    rig.channel.pause()
    rig.write(b"x")
    assert rig.reactor.mask == IN
    rig.event(IN)
    assert rig.sock.sent == [b"x", b"x"]
    assert rig.reactor.mask == 0


def test_high_and_low_marks():
    rig = plain()
    rig.sock.sends = [BlockingIOError()]
    assert rig.write(b"x" * (HIGH_BYTES - 1))
    assert not rig.write(b"x")
    rig.sock.sends = [HIGH_BYTES - 1 - LOW_BYTES, BlockingIOError()]
    rig.event(OUT)
    assert rig.heard == []
    rig.sock.sends = [1, BlockingIOError()]
    rig.event(OUT)
    assert rig.heard == ["drained"]
    rig.event(OUT)
    assert rig.heard == ["drained"]


def test_all_of_them_together_have_a_mark_above_which_each_gets_less():
    rig = plain()
    rig.reactor.held_bytes = HELD_BYTES  # of others
    rig.sock.reads = [RECORD[:SMALL_BYTES], b"more"]
    rig.event(IN)  # no more at a time than one may hold
    assert rig.heard == [RECORD[:SMALL_BYTES]]
    rig.heard.clear()
    rig.sock.sends = [BlockingIOError()]
    assert not rig.write(RECORD)
    rig.sock.sends = [RECORD_BYTES - SMALL_BYTES - 1, BlockingIOError()]
    rig.event(OUT)
    assert rig.heard == []
    rig.sock.sends = [1, BlockingIOError()]
    rig.event(OUT)
    assert rig.heard == ["drained"]
    rig.event(OUT)
    assert rig.reactor.held_bytes == HELD_BYTES
    rig.sock.sends = [BlockingIOError()]
    assert not rig.write(RECORD)
    rig.channel.cut()
    assert rig.reactor.held_bytes == HELD_BYTES


def test_however_many_do_not_read_they_hold_little_more_than_their_sum():
    for peers in (1, 16, 300, 3000):
        held, total = [0] * peers, 0
        for _ in range(100):
            for peer in range(peers):
                mark = HIGH_BYTES if total < TIGHT_BYTES else share(total)
                if held[peer] < mark:
                    held[peer] += SMALL_BYTES
                    total += SMALL_BYTES
        assert total <= HELD_BYTES + peers * SMALL_BYTES


@pytest.mark.parametrize("kind", ["write", "burst"])
def test_an_error_keeps_nothing_alive(kind: str):
    """Its traceback has the frames of all who called, and what they had in hand."""
    rig = tls() if kind == "burst" else plain()
    owner = weakref.ref(rig.owner)
    gc.disable()
    try:
        if kind == "burst":
            rig.sock.reads = [RECORD, ConnectionResetError()]
            rig.event(IN)
        else:
            rig.sock.sends = [ConnectionResetError()]
            rig.write(b"data")
            rig.sock.reads = [b""]
            rig.event(IN)
        assert not rig.channel.open
        del rig
        assert owner() is None
    finally:
        gc.enable()


def test_notify_empty_tells_the_last_byte_too():
    rig = plain()
    rig.sock.sends = [BlockingIOError()]
    rig.write(b"x")
    rig.channel.notify_empty = True
    rig.event(OUT)
    assert rig.heard == ["drained"]


def test_small_writes_are_gathered():
    rig = plain()
    rig.sock.sends = [BlockingIOError()]
    rig.write(b"x")
    for _ in range(1000):
        rig.write(b"y" * 10)
    rig.write(b"z" * SMALL_BYTES)
    rig.write(b"")
    assert len(rig.channel.out) <= 4
    rig.event(OUT)
    assert b"".join(rig.sock.sent[1:]) == b"x" + b"y" * 10_000 + b"z" * SMALL_BYTES


def test_a_failed_write_does_not_re_enter_and_an_early_answer_is_still_read():
    rig = plain()
    rig.sock.reads = [b"413"]
    rig.sock.sends = [BrokenPipeError(errno.EPIPE, "")]
    assert rig.write(b"upload")
    rig.write(b"more of it")
    assert rig.heard == []
    rig.reactor.batch_end()
    assert rig.heard == [b"413"]
    rig.sock.reads = [b""]
    rig.event(IN)
    assert rig.heard == [b"413", ("lost", None)]  # EPIPE: the peer's FIN had come first, its stream is whole
    assert rig.sock.sent == [b"upload"]


def test_a_reset_noticed_by_a_write_makes_the_following_end_unclean():
    rig = plain()
    rig.channel.half_close = True
    rig.sock.sends = [ConnectionResetError(errno.ECONNRESET, "")]
    rig.sock.reads = [b""]
    rig.write(b"x")
    rig.reactor.batch_end()
    assert rig.heard == [("lost", ConnectionResetError)]


def test_a_write_that_fails_inside_openssl_is_a_loss_although_the_peer_is_silent():
    rig = tls()
    rig.sock.sends = [ssl.SSLError(1, "internal")]
    rig.write(b"x")
    rig.reactor.batch_end()
    assert rig.heard == [("lost", ssl.SSLError)]


def test_a_failed_write_of_a_paused_channel_waits_for_resume():
    rig = plain()
    rig.channel.pause()
    rig.sock.sends = [ConnectionResetError(errno.ECONNRESET, "")]
    rig.write(b"x")
    rig.reactor.batch_end()
    assert rig.heard == []
    rig.sock.reads = [b"answer", b""]
    rig.channel.resume()
    rig.event(IN)
    rig.event(IN)
    assert rig.heard == [b"answer", ("lost", ConnectionResetError)]


def test_a_failed_write_after_the_peers_half_close_is_told():
    rig = plain()
    rig.channel.half_close = True
    rig.sock.reads = [b""]
    rig.event(IN)
    rig.sock.sends = [BrokenPipeError(errno.EPIPE, "")]
    rig.write(b"answer")
    rig.reactor.batch_end()
    assert rig.heard == ["ended", ("lost", BrokenPipeError)]


# Ends


def test_end_comes_after_the_last_byte():
    rig = plain()
    rig.sock.sends = [BlockingIOError()]
    rig.write(b"x")
    rig.channel.end()
    assert rig.sock.calls == []
    rig.event(OUT)
    assert rig.sock.calls == ["fin"]
    with pytest.raises(RuntimeError):
        rig.channel.write(b"y")


def test_tls_cannot_be_half_closed():
    with pytest.raises(RuntimeError, match="frame the stream"):
        tls().channel.end()


def test_close_tells_a_clean_end_only_where_everything_has_left():
    rig = tls()
    rig.channel.close()
    assert rig.sock.calls == ["close_notify"]
    rig = tls()
    rig.sock.sends = [ssl.SSLWantWriteError()]
    rig.write(b"x")
    rig.channel.close()
    assert rig.sock.calls == []  # no close_notify: truncation
    rig = plain()
    rig.sock.sends = [BlockingIOError()]
    rig.write(b"x")
    rig.channel.close()
    assert rig.sock.calls == ["reset"]


def test_a_crash_is_a_cut_and_is_told_once():
    rig = tls()
    rig.channel.crashed(ValueError("a bug"))
    rig.channel.crashed(ValueError("a bug"))
    assert rig.heard == [("lost", ValueError)]
    assert rig.sock.calls == []


def test_a_closed_channel_lets_its_owner_go_and_ignores_everything():
    rig = plain()
    rig.channel.close()
    assert rig.channel.owner is not rig.owner
    for use in (rig.channel.close, rig.channel.abort, rig.channel.pause, rig.channel.resume, rig.channel.end):
        use()
    assert rig.channel.write(b"x")
    assert rig.channel.unread()
    rig.channel.linger_close()
    assert rig.reactor.doomed == [rig.sock]
