import time

import pytest

from sidecar.policy.regexes import PATTERN_CHARACTERS_MAX, compile_regex


def test_matches_the_whole_value() -> None:
    test = compile_regex("v[0-9]+")
    assert test(b"v12")
    assert not test(b"xv12")
    assert not test(b"v12 ")
    assert not test(b"v12\n")


def test_alternatives_are_anchored_too() -> None:
    test = compile_regex("a|b")
    assert test(b"a")
    assert test(b"b")
    assert not test(b"ab")


@pytest.mark.parametrize("value", [b"bad\xff", b"bad\n", b"bad\x00x", b"bad\xc0\xae", "badé".encode()])
def test_no_byte_slips_past_a_dot(value: bytes) -> None:
    assert compile_regex("bad.*")(value)


def test_bytes_can_be_named() -> None:
    assert compile_regex(r"Zo\xc3\xab")("Zoë".encode())


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", r'regular expression "\(": missing \)'),
        ("a(?=b)", "no look-around"),
        (r"(a)\1", "invalid escape sequence"),
        ("[a", "missing ]"),
        ("a{1001}", "repetition"),
        ("((a{100}){100}){100}", "repetition|too large|instructions"),
        ("[a-z]{900}{2}", "repetition|too large|instructions"),
        ("(?:abcdefghij){150}", "instructions"),
        ("a" * (PATTERN_CHARACTERS_MAX + 1), "at most"),
        ("é", "ASCII"),
        ("(" * 1024, "regular expression"),
    ],
)
def test_bad_patterns_say_what_is_wrong(pattern: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compile_regex(pattern)


@pytest.mark.parametrize("pattern", ["(a*)*b", "(a|a)*b", "(.*a){40}b", "(?:a?){300}a{300}b", ".*.*.*.*.*=.*;"])
def test_hostile_patterns_take_linear_time(pattern: str) -> None:
    test = compile_regex(pattern)
    before = time.process_time()
    assert not test(b"a" * 65536)
    assert time.process_time() - before < 2  # tenths at worst; a backtracking matcher would need years
