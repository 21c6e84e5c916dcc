"""The framing of opaque TCP between sidecars."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.wire.tcp_frames import END, FRAME_BYTES_MAX, FrameDecoder, FrameError, header


def framed(*chunks: bytes) -> bytes:
    return b"".join(header(len(chunk)) + chunk for chunk in chunks)


@given(st.lists(st.binary(min_size=1, max_size=50)), st.lists(st.integers(0, 400)))
def test_whatever_the_read_boundaries_the_payload_is_the_same(chunks: list[bytes], cuts: list[int]) -> None:
    stream = framed(*chunks) + END
    bounds = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    decoder = FrameDecoder()
    got = b""
    for start, stop in pairwise(bounds):
        assert not decoder.ended
        got += b"".join(decoder.feed(stream[start:stop]))
    assert got == b"".join(chunks)
    assert decoder.ended


def test_a_frame_is_handed_on_as_it_arrives() -> None:
    decoder = FrameDecoder()
    assert [bytes(piece) for piece in decoder.feed(header(1000) + b"begin")] == [b"begin"]


def test_a_stream_without_its_end_frame_has_not_ended() -> None:
    decoder = FrameDecoder()
    decoder.feed(framed(b"all of it") + END[:3])
    assert not decoder.ended


def test_bytes_after_the_end_are_refused() -> None:
    with pytest.raises(FrameError, match="after the end"):
        FrameDecoder().feed(END + b"x")
    decoder = FrameDecoder()
    decoder.feed(END)
    with pytest.raises(FrameError, match="after the end"):
        decoder.feed(b"x")


def test_lengths_are_bounded_both_ways() -> None:
    assert FrameDecoder().feed(header(FRAME_BYTES_MAX)) == []
    with pytest.raises(FrameError, match="a frame of 1048577 bytes"):
        FrameDecoder().feed((FRAME_BYTES_MAX + 1).to_bytes(4, "big"))
    for length in (0, FRAME_BYTES_MAX + 1):
        with pytest.raises(ValueError):
            header(length)
