"""Request targets and authorities."""

import pytest

from sidecar.wire.http1_guard import ProtocolError
from sidecar.wire.target import ABSOLUTE, ASTERISK, AUTHORITY, HOST_KEYS, ORIGIN, Form, split_target


@pytest.mark.parametrize(
    ("method", "target", "want"),
    [
        (b"GET", b"/", (ORIGIN, b"/", None)),
        (b"GET", b"//x?y", (ORIGIN, b"//x?y", None)),
        (b"GET", b"http://h", (ABSOLUTE, b"/", b"h")),
        (b"GET", b"http://h:1/a?b", (ABSOLUTE, b"/a?b", b"h:1")),
        (b"GET", b"HTTPS://h?b", (ABSOLUTE, b"/?b", b"h")),
        (b"GET", b"http://h//a", (ABSOLUTE, b"//a", b"h")),
        (b"OPTIONS", b"http://h", (ABSOLUTE, b"*", b"h")),
        (b"OPTIONS", b"http://h/", (ABSOLUTE, b"/", b"h")),
        (b"OPTIONS", b"*", (ASTERISK, b"*", None)),
        (b"CONNECT", b"h:1", (AUTHORITY, b"", b"h:1")),
        (b"CONNECT", b"[::1]:1", (AUTHORITY, b"", b"[::1]:1")),
    ],
)
def test_forms(method: bytes, target: bytes, want: tuple[Form, bytes, bytes | None]) -> None:
    assert split_target(method, target) == want


@pytest.mark.parametrize(
    ("method", "target"),
    [
        (b"GET", b"*"),
        (b"GET", b"h:1"),
        (b"GET", b"h"),
        (b"GET", b"http:h"),
        (b"GET", b"http:/h"),
        (b"GET", b"ftp://h/"),
        (b"GET", b"xhttp://h/"),
        (b"CONNECT", b"h"),
        (b"CONNECT", b"h:"),
        (b"CONNECT", b"h:0"),
        (b"CONNECT", b"/"),
        (b"CONNECT", b"*"),
        (b"CONNECT", b"u@h:1"),
        (b"CONNECT", b"http://h:1"),
        (b"CONNECT", b"[::1]"),
    ],
)
def test_unknown_forms(method: bytes, target: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        split_target(method, target)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("authority", "key"),
    [
        (b"Reviews", b"reviews"),
        (b"REVIEWS.MESH.:80", b"reviews.mesh"),
        (b"a-b_c~d.e", b"a-b_c~d.e"),
        (b"10.0.0.1:8000", b"10.0.0.1"),
        (b"[2001:DB8::1]:8000", b"[2001:db8::1]"),
        (b"[::ffff:1.2.3.4]", b"[::ffff:1.2.3.4]"),
    ],
)
def test_host_keys(authority: bytes, key: bytes) -> None:
    assert HOST_KEYS[authority] == key
    assert HOST_KEYS[authority] is HOST_KEYS[authority]


@pytest.mark.parametrize(
    "authority",
    [*b". a..b a.b.. a: a:0 a:00 a:99999 a,b u@a [::1 ::1 [] [1] a%2e a/ a\xff".split(), b"", b"a b"],
)
def test_refused_authorities(authority: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        HOST_KEYS[authority]
    assert caught.value.status == 400
