"""Trace context: the specification's own cases, and chance from a seed."""

import random
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.telemetry.tracing import (
    Trace,
    accept_request_id,
    make_request_id,
    make_traceparent,
    next_traceparent,
    parse_traceparent,
    trace_id_of,
)

ID = b"0af7651916cd43dd8448eb211c80319c"
SPAN = b"b7ad6b7169203331"


def zeros(_bits: int) -> int:
    return 0


@pytest.mark.parametrize(
    ("value", "flags"),
    [
        (b"00-%b-%b-00" % (ID, SPAN), 0),
        (b"00-%b-%b-01" % (ID, SPAN), 1),
        (b"00-%b-%b-ff" % (ID, SPAN), 3),  # unknown flags are not passed on
        (b"01-%b-%b-01" % (ID, SPAN), 1),
        (b"cc-%b-%b-01-what the future will be like" % (ID, SPAN), 1),
        (b"cc-%b-%b-01-" % (ID, SPAN), 1),
    ],
)
def test_valid_values(value: bytes, flags: int) -> None:
    trace = parse_traceparent(value)
    assert trace == Trace(ID, SPAN, flags)
    assert trace.sampled == bool(flags & 1)
    following = next_traceparent(value, random.Random(1).getrandbits)
    assert following is not None
    assert following[:36] == b"00-%b-" % ID
    assert following[36:52] != SPAN
    assert following[52:] == b"-%02x" % flags
    assert trace_id_of(following) == ID


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"00",
        b"00-%b-%b-0" % (ID, SPAN),
        b"00-%b-%b-01-" % (ID, SPAN),
        b"00-%b-%b-01-more" % (ID, SPAN),
        b"00-%b-%b-01\n" % (ID, SPAN),
        b" 00-%b-%b-01" % (ID, SPAN),
        b"00-%b-%b-01,00-%b-%b-01" % (ID, SPAN, ID, SPAN),  # two fields, joined
        b"ff-%b-%b-01" % (ID, SPAN),
        b"cc-%b-%b-01.more" % (ID, SPAN),
        b"00-%b-%b-01" % (ID.upper(), SPAN),
        b"00-%b-%b-01" % (b"0" * 32, SPAN),
        b"00-%b-%b-01" % (ID, b"0" * 16),
        b"0x-%b-%b-01" % (ID, SPAN),
        b"00-%b-%b-0x" % (ID, SPAN),
        b"00_%b_%b_01" % (ID, SPAN),
    ],
)
def test_invalid_values(value: bytes) -> None:
    assert parse_traceparent(value) is None
    assert next_traceparent(value, random.Random(1).getrandbits) is None


@given(st.randoms(use_true_random=False), st.booleans())
def test_what_is_made_is_valid(chance: random.Random, sampled: bool) -> None:
    made = make_traceparent(chance.getrandbits, sampled=sampled)
    trace = parse_traceparent(made)
    assert trace is not None
    assert trace.sampled == sampled
    assert trace.flags & 2  # random
    assert trace.trace_id == trace_id_of(made)


@given(st.binary(max_size=80))
def test_no_bytes_from_outside_raise_or_pass_unchecked(value: bytes) -> None:
    following = next_traceparent(value, random.Random(0).getrandbits)
    assert following is None or parse_traceparent(following) is not None


def test_ids_are_never_zero() -> None:
    made = make_traceparent(zeros)
    assert parse_traceparent(made) is not None
    assert parse_traceparent(next_traceparent(made, zeros) or b"") is not None


def test_chance_is_an_argument() -> None:
    assert make_traceparent(random.Random(7).getrandbits) == make_traceparent(random.Random(7).getrandbits)


@given(st.integers(0, 2**128 - 1))
def test_request_ids_are_uuids_of_version_4(bits: int) -> None:
    text = make_request_id(lambda _bits: bits)
    parsed = uuid.UUID(text.decode())
    assert (parsed.version, parsed.variant, str(parsed).encode()) == (4, uuid.RFC_4122, text)
    assert accept_request_id(text)


@pytest.mark.parametrize("value", [b"", b"a b", b"a\nb", b"x" * 129, b'a"', b"\xff", b"a\x1b[2J", b"abc\n"])
def test_request_ids_from_outside_that_are_refused(value: bytes) -> None:
    assert not accept_request_id(value)
