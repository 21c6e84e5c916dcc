"""What a request is hashed by."""

import pytest

from sidecar.policy.hashing import compile_key, hash64


def test_the_hash_is_the_same_in_every_process() -> None:
    assert hash64(b"user-7") == 11056362442684682814


def test_by_header() -> None:
    key = compile_key("header:X-User")
    assert key([(b"x-user", b"7"), (b"x-other", b"8")], "web", "1.2.3.4") == hash64(b"7")
    assert key([(b"x-user", b"7"), (b"x-user", b"8")], "web", "1.2.3.4") == hash64(b"7,8")
    assert key([(b"x-user", b"")], "web", "") == hash64(b"")
    assert key([(b"x-users", b"7")], "web", "1.2.3.4") is None


def test_by_cookie() -> None:
    key = compile_key("cookie:session")
    assert key([(b"cookie", b"a=b; session=abc;c=d")], "", "") == hash64(b"abc")
    assert key([(b"cookie", b"xsession=1"), (b"cookie", b"session=2; session=3")], "", "") == hash64(b"2")
    assert key([(b"cookie", b"xsession=1"), (b"session", b"2")], "", "") is None
    assert key([], "", "") is None


def test_by_caller_and_address() -> None:
    assert compile_key("caller")([], "web", "1.2.3.4") == hash64(b"web")
    assert compile_key("address")([], "web", "1.2.3.4") == hash64(b"1.2.3.4")
    assert compile_key("caller")([], "", "1.2.3.4") is None
    assert compile_key("address")([], "web", "") is None


def test_anything_else_is_an_error() -> None:
    with pytest.raises(ValueError, match="is not a key"):
        compile_key("query:user")
