"""Retry-After in its three forms (RFC 9110, 10.2.3 and 5.6.7)."""

import pytest

from sidecar.policy.backoff import retry_after_s

EPOCH_S = 784_111_777.0 - 10.0  # ten seconds before the RFC's example


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"0", 0.0),
        (b"120", 120.0),
        (b"Sun, 06 Nov 1994 08:49:37 GMT", 10.0),
        (b"Sunday, 06-Nov-94 08:49:37 GMT", 10.0),
        (b"Sun Nov  6 08:49:37 1994", 10.0),
        (b"Sun, 06 Nov 1994 08:49:00 GMT", 0.0),  # gone by
        (b"", None),
        (b"-1", None),
        (b"1.5", None),
        (b"\xb2", None),
        (b"soon", None),
        (b"Mon, 99 Foo 9999999 99:99:99 GMT", None),
        (b"1" * 41, None),
        (b"\xff\xfe", None),
    ],
)
def test_forms(value, seconds):
    assert retry_after_s([(b"server", b"x"), (b"retry-after", value)], EPOCH_S) == seconds


def test_of_several_the_longest_and_nonsense_is_passed_over():
    fields = [(b"retry-after", value) for value in (b"2", b"soon", b"30", b"1")]
    assert retry_after_s(fields, EPOCH_S) == 30.0
    assert retry_after_s([], EPOCH_S) is None


def test_a_date_without_zone_is_gmt_wherever_we_are(monkeypatch):
    import time

    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert retry_after_s([(b"retry-after", b"Sun Nov  6 08:49:37 1994")], EPOCH_S) == 10.0
    finally:
        monkeypatch.undo()
        time.tzset()
