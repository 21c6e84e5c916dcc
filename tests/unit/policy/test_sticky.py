"""Only what the sidecar issued is believed, and only for as long as it said."""

from base64 import urlsafe_b64decode, urlsafe_b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.policy.sticky import Sticky

KEY = bytes(range(32))
STICKY = Sticky("pillion_version", 3600.0, KEY, scope="reviews")


def value_of(set_cookie: bytes) -> bytes:
    return set_cookie.split(b";")[0].partition(b"=")[2]


def test_issue_gives_a_set_cookie_value_with_its_attributes() -> None:
    cookie, *attributes = STICKY.issue("v2", 1000.0).split(b"; ")
    assert cookie.startswith(b"pillion_version=")
    assert attributes == [b"Path=/", b"Max-Age=3600", b"HttpOnly", b"SameSite=Lax"]


def test_read_gives_the_version_back_among_other_cookies() -> None:
    pair = STICKY.issue("v2", 1000.0).split(b";")[0]
    assert STICKY.read(pair, 1000.0) == "v2"
    assert STICKY.read(b"a=b; xpillion_version=junk;\t" + pair + b"; c=d", 1000.0) == "v2"
    assert STICKY.read(b"pillion_version=stale; " + pair, 1000.0) == "v2"


def test_it_expires_exactly() -> None:
    pair = STICKY.issue("v2", 1000.0).split(b";")[0]
    assert STICKY.read(pair, 4599.9) == "v2"
    assert STICKY.read(pair, 4600.0) is None


@pytest.mark.parametrize(
    "other",
    [
        Sticky("pillion_version", 3600.0, bytes(32), scope="reviews"),
        Sticky("pillion_version", 3600.0, KEY, scope="ratings"),
    ],
)
def test_another_key_or_scope_is_not_believed(other: Sticky) -> None:
    assert STICKY.read(other.issue("v2", 1000.0).split(b";")[0], 1000.0) is None


def test_another_cookie_name_is_not_believed() -> None:
    other = Sticky("other", 3600.0, KEY, scope="reviews")
    assert STICKY.read(b"pillion_version=" + value_of(other.issue("v2", 1000.0)), 1000.0) is None


def test_every_changed_bit_is_noticed() -> None:
    raw = urlsafe_b64decode(value_of(STICKY.issue("v2", 1000.0)) + b"==")
    for position in range(len(raw) * 8):
        changed = bytearray(raw)
        changed[position // 8] ^= 1 << position % 8
        value = urlsafe_b64encode(changed).rstrip(b"=")
        assert STICKY.read(b"pillion_version=" + value, 1000.0) is None


def test_there_is_one_spelling_only() -> None:
    value = value_of(STICKY.issue("v2", 1000.0))
    for spelling in (value + b"=", value + b"!", b"!" + value, value[:4] + b"\x00" + value[4:], value[:-1]):
        assert STICKY.read(b"pillion_version=" + spelling, 1000.0) is None


def test_the_number_of_candidates_is_bounded() -> None:
    pair = STICKY.issue("v2", 1000.0).split(b";")[0]
    assert STICKY.read(b"pillion_version=x; " * 3 + pair, 1000.0) == "v2"
    assert STICKY.read(b"pillion_version=x; " * 4 + pair, 1000.0) is None


@given(st.binary(max_size=600))
def test_junk_is_never_believed(junk: bytes) -> None:
    assert STICKY.read(junk, 1000.0) is None
    assert STICKY.read(b"pillion_version=" + junk, 1000.0) is None


def test_a_short_ttl_still_has_a_whole_second() -> None:
    assert b"Max-Age=1;" in Sticky("c", 0.2, KEY).issue("v", 0.0)


def test_cookies_of_endpoints_hide_addresses_and_are_not_those_of_versions() -> None:
    sticky = Sticky("c", 60.0, KEY, "reviews", by_endpoint=True)
    token = sticky.token("10.0.0.1:80")
    assert len(token) == 16 and token != sticky.token("10.0.0.2:80")
    assert token != Sticky("c", 60.0, KEY, "other", by_endpoint=True).token("10.0.0.1:80")
    assert token != Sticky("c", 60.0, KEY[::-1], "reviews", by_endpoint=True).token("10.0.0.1:80")
    pair = sticky.issue(token, 0.0).split(b";")[0]
    assert sticky.read(pair, 0.0) == token
    assert Sticky("c", 60.0, KEY, "reviews").read(pair, 0.0) is None
    value = value_of(pair)
    assert b"10.0" not in urlsafe_b64decode(value + b"=" * (-len(value) % 4))


def test_what_a_former_key_has_made_is_honoured_until_then() -> None:
    former = Sticky("c", 3600.0, KEY[::-1], "reviews", by_endpoint=True)
    now = Sticky("c", 3600.0, KEY, "reviews", by_endpoint=True, former=((KEY[::-1], 1500.0), (bytes(32), 9e9)))
    token = former.token("10.0.0.1:80")
    pair = former.issue(token, 1000.0).split(b";")[0]
    assert now.read(pair, 1499.0) == token and now.read(pair, 1500.0) is None
    oldest = Sticky("c", 60.0, bytes(32), "reviews", by_endpoint=True)
    pair = oldest.issue("x", 1000.0).split(b";")[0]
    assert now.read(pair, 1059.0) == "x" and now.read(pair, 1060.0) is None, "its own end holds all the same"
    tokens = list(now.tokens("10.0.0.1:80"))
    assert tokens == [now.token("10.0.0.1:80"), token, oldest.token("10.0.0.1:80")] and len(set(tokens)) == 3
    fresh = now.issue("x", 1000.0).split(b";")[0]
    assert former.read(fresh, 1000.0) is None, "none is made with a former key"
