"""gRPC's fields and framing: what is read, what is written, and that either end understands the other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.wire.grpc import (
    first_message,
    frame,
    is_grpc,
    read_message,
    read_pushback_ms,
    read_status,
    read_timeout_ms,
    write_message,
    write_timeout,
)


@pytest.mark.parametrize(
    ("content_type", "grpc"),
    [
        (b"application/grpc", True),
        (b"application/grpc+proto", True),
        (b"application/grpc;charset=utf-8", True),
        (b"Application/gRPC+json", True),
        (b"application/grpc-web", False),
        (b"application/grpc-web+proto", False),
        (b"application/grpcx", False),
        (b"application/json", False),
        (b"", False),
    ],
)
def test_content_types(content_type: bytes, grpc: bool) -> None:
    assert is_grpc(content_type) is grpc


@pytest.mark.parametrize(
    ("value", "ms"),
    [
        (b"1H", 3_600_000),
        (b"2M", 120_000),
        (b"3S", 3000),
        (b"4m", 4),
        (b"5u", 0.005),
        (b"1001u", 1.001),
        (b"6n", 0.000006),
        (b"0n", 0),
        (b"99999999H", 359_999_996_400_000),
        (b"00000001S", 1000),
        (b"123456789S", None),
        (b"1s", None),
        (b"1.5S", None),
        (b"-1S", None),
        (b"S", None),
        (b"1", None),
        (b"1S ", None),
        (b"", None),
    ],
)
def test_timeouts(value: bytes, ms: float | None) -> None:
    assert read_timeout_ms(value) == ms


@pytest.mark.parametrize(
    ("left_s", "value"),
    [
        (0.0, b"0n"),
        (-1.0, b"0n"),
        (0.05, b"50000000n"),
        (1.0, b"1000000u"),
        (15.0, b"15000000u"),
        (100.5, b"100500m"),
        (99_999.999, b"99999999m"),
        (200_000.0, b"200000S"),
        (1e9, b"16666666M"),
        (1e12, b"99999999H"),
    ],
)
def test_written_timeouts_are_as_fine_as_eight_digits_allow(left_s: float, value: bytes) -> None:
    assert write_timeout(left_s) == value


@given(st.floats(0, 1e9))
def test_a_written_timeout_is_never_longer(left_s: float) -> None:
    value = write_timeout(left_s)
    ms = read_timeout_ms(value)
    assert ms is not None and len(value) <= 9
    assert ms <= left_s * 1000 + 1
    assert ms >= left_s * 1000 * 0.99 - 1


@pytest.mark.parametrize(
    ("value", "status"),
    [(b"0", 0), (b"14", 14), (b"016", 16), (b"17", 2), (b"999", 2), (b"1000", None), (b"-1", None), (b"", None)],
)
def test_statuses(value: bytes, status: int | None) -> None:
    assert read_status(value) == status


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no route leads there", b"no route leads there"),
        ("100%", b"100%25"),
        ("line\nbreak\r", b"line%0Abreak%0D"),
        ("Größe", b"Gr%C3%B6%C3%9Fe"),
        ("~ \x7f", b"~ %7F"),
        (" because of ", b"%20because of%20"),
        (" ", b"%20"),
        ("", b""),
    ],
)
def test_messages(text: str, value: bytes) -> None:
    assert write_message(text) == value
    assert read_message(value) == text


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_message_comes_back_and_fits_into_a_field(text: str) -> None:
    value = write_message(text)
    assert all(0x20 <= byte <= 0x7E for byte in value) and len(value) <= 3 * 1024
    assert text.startswith(read_message(value))
    assert len(text.encode()) > 1024 or read_message(value) == text


def test_a_long_message_is_cut_between_characters() -> None:
    assert read_message(write_message("ö" * 1000)) == "ö" * 512
    assert write_message("\ud800") == b"?"


@pytest.mark.parametrize(
    ("value", "ms"), [(b"0", 0), (b"250", 250), (b"-1", -1), (b"soon", -1), (b"", -1), (b"9" * 11, -1)]
)
def test_push_back(value: bytes, ms: int) -> None:
    assert read_pushback_ms([(b"a", b"1"), (b"grpc-retry-pushback-ms", value)]) == ms


def test_no_push_back() -> None:
    assert read_pushback_ms([(b"retry-after", b"1")]) is None


@given(st.binary(max_size=600), st.binary(max_size=5))
def test_a_framed_message_comes_back(message: bytes, more: bytes) -> None:
    framed = frame(message)
    assert first_message(framed + more) == message
    assert first_message(framed[:-1]) is None


def test_a_compressed_message_is_refused() -> None:
    with pytest.raises(ValueError, match="compressed"):
        first_message(b"\x01\x00\x00\x00\x00")
