"""What follows from the secret of sticky cookies, and what is kept of it."""

import hashlib
import hmac
import json

import pytest

from control_plane.state.cookies import keys_of, rotated, service_key
from control_plane.state.records import (
    COOKIE_SECRETS_MAX,
    COOKIES,
    CookieSecret,
    CookieSecrets,
    RecordError,
    decode,
    encode,
    kind_of,
)

FIRST, SECOND, THIRD = (digit * 64 for digit in "abc")


def test_a_services_key_is_its_own_and_always_the_same() -> None:
    secret = CookieSecret(FIRST)
    expected = hmac.new(bytes.fromhex(FIRST), b"pillion sticky cookies 1\0web", hashlib.sha256).digest()
    assert service_key(secret, "web") == expected, "another version of pillion must derive the same"
    assert len({service_key(secret, name) for name in ("web", "reviews", "we", "", "web2")}) == 5
    assert service_key(CookieSecret(SECOND), "web") != expected


def test_what_is_told_has_the_services_keys_and_nothing_else() -> None:
    secrets = CookieSecrets((CookieSecret(SECOND), CookieSecret(FIRST, 150.0)), 100.0)
    told = keys_of(secrets, "web")
    line = json.loads(told.line)
    assert (told.name, line["name"]) == (COOKIES, "cookies")
    assert line["data"] == {
        "keys": [
            {"key": service_key(CookieSecret(SECOND), "web").hex()},
            {"key": service_key(CookieSecret(FIRST), "web").hex(), "until": 150.0},
        ]
    }
    assert FIRST.encode() not in told.line and SECOND.encode() not in told.line
    assert keys_of(secrets, "web").version == told.version != keys_of(secrets, "reviews").version


def test_a_rotation_keeps_the_former_one_for_a_while() -> None:
    first = rotated(None, FIRST, 100.0, 60.0)
    assert first == CookieSecrets((CookieSecret(FIRST),), 100.0)
    second = rotated(first, SECOND, 200.0, 60.0)
    assert second == CookieSecrets((CookieSecret(SECOND), CookieSecret(FIRST, 260.0)), 200.0)
    third = rotated(second, THIRD, 210.0, 3600.0)
    assert third.secrets == (CookieSecret(THIRD), CookieSecret(SECOND, 3810.0), CookieSecret(FIRST, 260.0))
    assert rotated(third, FIRST, 300.0, 60.0).secrets[1:] == (CookieSecret(THIRD, 360.0), CookieSecret(SECOND, 360.0))
    assert rotated(third, FIRST, 220.0, 0.0).secrets == (CookieSecret(FIRST),), "at once, those before it too"


def test_however_often_it_is_rotated_few_are_kept() -> None:
    held = rotated(None, FIRST, 0.0, 1e6)
    for number in range(10):
        held = rotated(held, f"{number:064x}", float(number), 1e6)
    assert len(held.secrets) == COOKIE_SECRETS_MAX and held.secrets[0].secret == f"{9:064x}"


def test_the_record_is_read_as_it_was_written_and_shows_no_secret() -> None:
    record = CookieSecrets((CookieSecret(SECOND), CookieSecret(FIRST, 150.0)), 100.0)
    assert decode(CookieSecrets, encode(record)) == record
    assert kind_of(COOKIES) == COOKIES and kind_of("cookies/web") is None
    assert FIRST not in repr(record)


@pytest.mark.parametrize(
    ("secrets", "words"),
    [
        ([], "1 to 4 secrets"),
        ([{"secret": FIRST}] * 5, "1 to 4 secrets"),
        ([{"secret": "beef"}], "not 64 digits"),
        ([{"secret": "BEEF" * 16}], "not 64 digits"),
        ([{"secret": "beef " * 13}], "not 64 digits"),
        ([{"secret": ["beef"]}], "must be str"),
        ([{"secret": FIRST, "until": "beef"}], "must be a number"),
        ("beef", "must be list"),
    ],
)
def test_a_damaged_record_says_why_but_not_what(secrets: object, words: str) -> None:
    value = json.dumps({"format": 1, "secrets": secrets, "changed": 1.0}).encode()
    with pytest.raises(RecordError, match=words) as caught:
        decode(CookieSecrets, value)
    assert "beef" not in str(caught.value).lower()
