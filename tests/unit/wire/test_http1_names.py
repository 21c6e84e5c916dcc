"""The tables of names and lines: what they say, and that they stay small."""

import pytest

from sidecar.wire import http1_names as names
from sidecar.wire.http1_guard import ProtocolError
from sidecar.wire.target import HOST_KEYS


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (b"accept", names.ORDINARY),
        (b"host", names.HOST),
        (b"content-length", names.CONTENT_LENGTH),
        (b"content_length", names.REFUSED),
        (b"transfer.encoding", names.REFUSED),
        (b"x-forwarded-for", names.FORWARDED),
        (b"x-forwarded-anything", names.FORWARDED),
        (b"x_forwarded-for", names.DROPPED),
        (b"x-forwarded-client-cert", names.DROPPED),
        (b"x_forwarded_client_cert", names.DROPPED),
        (b"x-pillion-new", names.DROPPED),
        (b"x~pillion!new", names.DROPPED),
        (b"x-pillion", names.ORDINARY),
        (b"x-forwarded", names.ORDINARY),
        (b"xforwarded-for", names.ORDINARY),
    ],
)
def test_kinds(name: bytes, kind: int) -> None:
    assert names.kind_of(name) == kind


def test_credentials_are_never_kept() -> None:
    lines = (b"Authorization: Bearer 1", b"Cookie: a=1", b"Set-Cookie: a=1", b"X-Api-Key: 1", b"Proxy-Authorization: 1")
    for line in lines:
        names.LINES[line]
        assert line not in names.LINES
    names.LINES[b"Accept: */*"]
    assert b"Accept: */*" in names.LINES


def test_tables_are_bounded() -> None:
    for i in range(10_000):
        names.LINES[b"Accept: %d" % i]
        names.LINES[b"X-%d: y" % i]
        names.CONNECTIONS[b"x-%d" % i]
        names.LENGTHS[b"%d" % i]
        names.STATUSES[b"HTTP/1.1 200 %d" % i]
        HOST_KEYS[b"h%d" % i]
    for table in (names.LINES, names._NAMES, names.CONNECTIONS, names.LENGTHS, names.STATUSES, HOST_KEYS):
        assert 0 < len(table) <= 4096
        assert max(map(len, table)) <= 300


def test_long_keys_are_not_kept() -> None:
    long = b"x" * 10_000
    assert names.LINES[b"Accept: " + long][1] == (b"accept", long)
    assert names.LINES[long + b": y"][1] == (long, b"y")
    assert long[:4000] in names.CONNECTIONS[long[:4000]].nominated
    with pytest.raises(ProtocolError):
        names.CONNECTIONS[long]
    assert names.STATUSES[b"HTTP/1.1 200 " + long[:8000]] == (200, False)
    for table in (names.LINES, names._NAMES, names.CONNECTIONS, names.STATUSES):
        assert all(len(key) <= 160 for key in table)


def test_a_refused_line_is_refused_again() -> None:
    for _ in range(2):
        with pytest.raises(ProtocolError):
            names.LINES[b"Accept : y"]
        with pytest.raises(ProtocolError):
            HOST_KEYS[b"a@b"]
        with pytest.raises(ProtocolError):
            names.LENGTHS[b"+1"]


@pytest.mark.parametrize(
    ("name", "may"),
    [
        (b"grpc-status", True),
        (b"grpc-message", True),
        (b"x-checksum", True),
        (b"server-timing", True),
        (b"content-type", False),
        (b"content_type", False),
        (b"authorization", False),
        (b"set-cookie", False),
        (b"host", False),
        (b"trailer", False),
        (b"x-pillion-reason", False),
        (b"x-forwarded-for", False),
        (b"forwarded", False),
        (b"traceparent", False),
    ],
)
def test_trailers(name: bytes, may: bool) -> None:
    assert names.may_trail(name) is may
