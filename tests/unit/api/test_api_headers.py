"""What filters may read and write of header fields."""

import pytest

from sidecar.api import HeaderError, Headers
from sidecar.api.headers import Field, fields_of, writable_name
from sidecar.wire.http1_names import ORDINARY, kind_of


def some() -> tuple[list[Field], Headers]:
    fields = [(b"accept", b"a"), (b"x-one", b"1"), (b"accept", b"b"), (b"x-latin", b"\xe4")]
    return fields, Headers(fields)


def test_reading_is_case_insensitive_and_keeps_the_order() -> None:
    _, headers = some()
    assert headers.get("Accept") == "a"
    assert headers.get(b"ACCEPT") == "a"
    assert headers.get_all("accept") == ["a", "b"]
    assert headers.get("none") is None and headers.get("none", "x") == "x" and headers.get_all("none") == []
    assert headers.get("x-latin") == "\xe4"
    assert "X-One" in headers and b"x-one" in headers and "x-two" not in headers and 1 not in headers
    assert list(headers) == ["accept", "x-one", "x-latin"]
    assert headers.items()[:2] == [("accept", "a"), ("x-one", "1")]
    assert len(headers) == 4
    assert not headers.changed


def test_set_replaces_all_of_a_name_in_the_list_that_is_forwarded() -> None:
    fields, headers = some()
    headers.set("Accept", "c")
    assert fields == [(b"x-one", b"1"), (b"x-latin", b"\xe4"), (b"accept", b"c")]
    assert headers.changed


def test_add_keeps_what_is_there() -> None:
    fields, headers = some()
    headers.add("ACCEPT", b"c")
    assert fields[-1] == (b"accept", b"c") and headers.get_all("accept") == ["a", "b", "c"]
    assert headers.changed


def test_remove_takes_all_and_says_whether_there_was_one() -> None:
    fields, headers = some()
    assert headers.remove("Accept")
    assert [name for name, _ in fields] == [b"x-one", b"x-latin"] and headers.changed
    assert not Headers([]).remove("accept")


@pytest.mark.parametrize("name", ["", "a b", "a:", "a\r\n", "ä", "a\x00", "(a)", "x" * 257, "\u0131"])
def test_bad_names_are_refused(name: str) -> None:
    fields, headers = some()
    before = list(fields)
    with pytest.raises(HeaderError, match="not a header name"):
        headers.set(name, "v")
    assert fields == before and not headers.changed


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "a\x00", "\x7f", b"\x01", "\u20ac"])
def test_bad_values_are_refused(value: str | bytes) -> None:
    fields, headers = some()
    before = list(fields)
    for write in (headers.set, headers.add):
        with pytest.raises(HeaderError, match="x-one"):
            write("x-one", value)
    assert fields == before and not headers.changed


def test_values_are_bounded_typed_and_stripped() -> None:
    fields, headers = some()
    with pytest.raises(HeaderError, match="16384"):
        headers.set("x-one", "v" * 16_385)
    with pytest.raises(HeaderError, match="must be str or bytes, not int"):
        headers.set("x-one", 1)  # type: ignore[arg-type]
    headers.set("x-one", " a\tb ")
    assert fields[-1] == (b"x-one", b"a\tb")


@pytest.mark.parametrize(
    "name",
    [
        *("Content-Length", "Transfer-Encoding", "Connection", "Host", "TE", "Trailer", "Upgrade", "Keep-Alive"),
        *("Proxy-Connection", "Expect", "X-Pillion-Reason", "x_pillion_attempt", "X-Forwarded-Client-Cert"),
        *("x_forwarded-client_cert", "content_length", b"Transfer_Encoding", "content.length", "X-Forwarded-For"),
        *("Forwarded", "X-Real-IP", "traceparent", "X-Request-Deadline-MS", "Proxy-Authorization"),
    ],
)
def test_what_frames_routes_or_speaks_for_the_mesh_cannot_be_written(name: str | bytes) -> None:
    headers = Headers([(b"content-length", b"5"), (b"x-pillion-reason", b"denied")])
    for write in (lambda: headers.set(name, "1"), lambda: headers.add(name, "1"), lambda: headers.remove(name)):
        with pytest.raises(HeaderError, match="the proxy writes it, a filter cannot"):
            write()
    assert headers.get("content-length") == "5" and not headers.changed


def test_fields_of_takes_mappings_and_pairs() -> None:
    assert fields_of({"X-A": "1"}) == fields_of([("x-a", b"1")]) == ((b"x-a", b"1"),)
    with pytest.raises(HeaderError, match="pairs"):
        fields_of([("x-a",)])  # type: ignore[list-item]


def test_what_the_codec_holds_apart_cannot_be_written() -> None:
    """A field that the proxy makes itself would go out twice."""
    for name in (b"traceparent", b"te", b"x-real-ip", b"x-forwarded-proto", b"x-pillion-caller", b"http2-settings"):
        assert kind_of(name) != ORDINARY
        with pytest.raises(HeaderError):
            writable_name(name)
