import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.policy.globs import GLOB_SEGMENTS_MAX, compile_glob, compile_glob_bytes, covers


def reference(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression: slow on hostile input, but plainly right."""
    expression = ""
    for segment in pattern[1:].split("/"):
        if segment == "**":
            expression += "(?:/[^/]*)*"
        elif segment == "*":
            expression += "/[^/]+"
        else:
            expression += "/" + "[^/]*".join(re.escape(part) for part in segment.split("*"))
    return re.compile(expression)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("/", ["/"], ["", "/a", "//"]),
        ("/reviews", ["/reviews"], ["/reviews/", "/Reviews", "/reviewsx", "/x/reviews"]),
        ("/reviews/", ["/reviews/"], ["/reviews", "/reviews/a"]),
        ("/reviews/**", ["/reviews", "/reviews/", "/reviews/7", "/reviews/7/x", "/reviews//x"], ["/", "/reviewsx"]),
        ("/**", ["/", "/a", "//", "/a/b"], []),
        ("/*", ["/a", "/a.b"], ["/", "//", "/a/", "/a/b"]),
        ("/a/*", ["/a/b"], ["/a", "/a/", "/a//", "/a/b/"]),
        ("/a/*/c", ["/a/b/c"], ["/a//c", "/a/c", "/a/b/b/c", "/a/b/c/"]),
        ("/a/**/c", ["/a/c", "/a/b/c", "/a/b/b/c", "/a//c", "/a/c/c"], ["/a", "/a/cc", "/ac", "/a/c/", "/b/a/c"]),
        ("/**/c", ["/c", "/a/c", "/a/b/c"], ["/", "/ac", "/c/"]),
        ("/**/m/**/m/*", ["/m/m/x", "/a/m/b/m/c"], ["/m/x", "/m/m/", "/m/m"]),
        ("/**/*", ["/a", "/a/b", "//b"], ["/", "/a/"]),
        ("/img/*.png", ["/img/a.png", "/img/.png"], ["/img/a.jpg", "/img/a/b.png", "/img/png"]),
        ("/a*a", ["/aa", "/aba"], ["/a", "/ab"]),
        ("/v*-*-x*", ["/v1-2-x", "/v---x", "/v-a-xx"], ["/v-x", "/v1-2-y"]),
        ("/%7euser/%c3%a9", ["/~user/%C3%A9"], ["/%7euser/%c3%a9"]),
        ("/a b/é", ["/a%20b/%C3%A9"], ["/a b/é"]),
    ],
)
def test_meaning(pattern: str, yes: list[str], no: list[str]) -> None:
    test = compile_glob(pattern)
    assert [path for path in yes if not test(path)] == []
    assert [path for path in no if test(path)] == []
    assert all(test(path.encode()) for path in yes)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("", 'must begin with "/"'),
        ("reviews", 'must begin with "/"'),
        ("*", 'must begin with "/"'),
        ("/a**", "segment of its own"),
        ("/a/***", "segment of its own"),
        ("/a?x=1", "query"),
        ("/a#b", "fragment"),
        ("/a/{id}", "write \\* for one segment"),
        ("/[ab]", "character classes"),
        ("/a\\b", "backslash"),
        ("/a/../b", "can never match"),
        ("/a/%2e/b", "can never match"),
        ("/a//b", "empty segment"),
        ("/a%2", "malformed percent-encoding"),
        ("/a%2Fb", "encoded slash"),
        ("/a\x00", "control character"),
        ("/" + "a" * 1100, "too long"),
        ("/a" * (GLOB_SEGMENTS_MAX + 1), "too long"),
    ],
)
def test_malformed_globs_say_what_is_wrong(pattern: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compile_glob(pattern)


segment = st.text("ab*", min_size=1, max_size=4).filter(lambda text: "**" not in text) | st.just("**")


@settings(deadline=None, derandomize=True)
@given(
    pattern=st.lists(segment, min_size=1, max_size=5).map(lambda parts: "/" + "/".join(parts)),
    path=st.lists(st.text("ab", max_size=3), min_size=1, max_size=6).map(lambda parts: "/" + "/".join(parts)),
)
def test_agrees_with_a_regular_expression(pattern: str, path: str) -> None:
    assert compile_glob_bytes(pattern)(path.encode()) == bool(reference(pattern).fullmatch(path))


@settings(deadline=None, derandomize=True)
@given(
    wide=st.lists(segment, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts)),
    narrow=st.lists(segment, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts)),
    path=st.lists(st.text("ab", max_size=3), min_size=1, max_size=5).map(lambda parts: "/" + "/".join(parts)),
)
def test_covers_is_never_wrong_when_it_says_yes(wide: str, narrow: str, path: str) -> None:
    if covers(wide, narrow) and compile_glob_bytes(narrow)(path.encode()):
        assert compile_glob_bytes(wide)(path.encode())


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [("/a/**", "/a"), ("/a/**", "/a/*/c"), ("/a/*", "/a/b*"), ("/**", "/x"), ("/a/*/c", "/a/b/c"), ("/a*", "/ab")],
)
def test_covers_the_sure_cases(wide: str, narrow: str) -> None:
    assert covers(wide, narrow)
    assert not covers(narrow, wide)


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("/" + "*a" * 40 + "b", b"/" + b"a" * 8000),
        ("/" + "**/*a/" * 20 + "b", b"/a" * 4000),
        ("/**/" + "*/" * 50 + "b/**", b"/a" * 4000),
        ("/" + "a*" * 200, b"/" + b"a" * 8000 + b"/"),
    ],
)
def test_hostile_patterns_take_bounded_time(pattern: str, path: bytes) -> None:
    test = compile_glob_bytes(pattern)
    before = time.process_time()
    assert not test(path)
    assert time.process_time() - before < 2  # tenths at worst; a backtracking matcher would need years
