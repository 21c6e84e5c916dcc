import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.model.snapshot import Match, ValueMatch
from sidecar.policy.matching import compile_match, compile_value, cookie_values, query_values

Fields = list[tuple[bytes, bytes]]


def matches(
    match: Match,
    method: bytes = b"GET",
    path: bytes = b"/a",
    query: bytes = b"",
    headers: Fields | None = None,
    caller: str | None = "web",
) -> bool:
    predicate = compile_match(match)
    assert predicate is not None
    return predicate(method, path, query, headers or [], caller)


def header(name: str, kind: str, value: str = "") -> Match:
    return Match(headers=((name, ValueMatch(kind, value)),))


def query(name: str, kind: str, value: str = "") -> Match:
    return Match(query=((name, ValueMatch(kind, value)),))


def test_a_match_that_asks_nothing_costs_nothing() -> None:
    assert compile_match(Match()) is None
    assert compile_match(Match(path="/**")) is None


def test_methods_are_exact_and_case_counts() -> None:
    assert matches(Match(methods=frozenset({"GET"})))
    assert not matches(Match(methods=frozenset({"GET"})), method=b"get")
    assert matches(Match(methods=frozenset({"PUT", "POST"})), method=b"POST")
    assert not matches(Match(methods=frozenset({"PUT", "POST"})))
    assert not matches(Match(methods=frozenset()))


def test_callers_are_service_names() -> None:
    assert matches(Match(callers=frozenset({"web"})))
    assert not matches(Match(callers=frozenset({"web"})), caller="webb")
    assert not matches(Match(callers=frozenset({"web"})), caller=None)


def test_paths_and_regular_expressions() -> None:
    assert matches(Match(path="/a/**"), path=b"/a/b")
    assert not matches(Match(path="/a"), path=b"/a/b")
    assert matches(Match(path_regex="/a/[0-9]+"), path=b"/a/12")
    assert not matches(Match(path_regex="/a/[0-9]+"), path=b"/a/12/")
    assert matches(Match(path="/a/**", path_regex=".*z"), path=b"/a/z")
    assert not matches(Match(path="/a/**", path_regex=".*z"), path=b"/b/z")


@pytest.mark.parametrize(
    ("match", "yes", "no"),
    [
        (header("x", "exact", "1"), [b"1"], [b"", b"11", b"1,2"]),
        (header("x", "prefix", "ab"), [b"ab", b"abc"], [b"a", b"xab"]),
        (header("x", "prefix", ""), [b"", b"a"], []),
        (header("x", "regex", "a+"), [b"a", b"aaa"], [b"", b"ab"]),
        (header("x", "present"), [b"", b"a", b"\xff"], []),
        (header("x", "exact", "Zoë"), ["Zoë".encode()], [b"Zo"]),
    ],
)
def test_header_values(match: Match, yes: list[bytes], no: list[bytes]) -> None:
    assert not matches(match)
    assert not matches(match, headers=[(b"y", b"1"), (b"xx", b"1")])
    for value in yes:
        assert matches(match, headers=[(b"x", value)])
        assert matches(match, headers=[(b"x", b"\x01"), (b"y", b""), (b"x", value)]), "any value of a repeated header"
    for value in no:
        assert not matches(match, headers=[(b"x", value)])


def test_every_named_header_is_asked_for() -> None:
    match = Match(headers=(("a", ValueMatch("exact", "1")), ("b", ValueMatch("present"))))
    assert matches(match, headers=[(b"b", b""), (b"a", b"1")])
    assert not matches(match, headers=[(b"a", b"1")])
    assert not matches(match, headers=[(b"b", b"1")])


@pytest.mark.parametrize(
    ("match", "yes", "no"),
    [
        (query("x", "exact", "1"), [b"x=1", b"y&x=1", b"x=2&x=1", b"x=%31", b"%78=1"], [b"", b"x", b"x=11", b"y=1"]),
        (query("x", "present"), [b"x", b"x=", b"x=1", b"a&x"], [b"", b"xx", b"X", b"y=x"]),
        (query("q", "exact", "a b"), [b"q=a+b", b"q=a%20b"], [b"q=ab"]),
        (query("q", "exact", "a+b"), [b"q=a%2Bb", b"q=a%2bb"], [b"q=a+b"]),
        (query("q", "exact", "é"), [b"q=%C3%A9", "q=é".encode()], [b"q=%E9"]),
        (query("q", "prefix", "a="), [b"q=a=b", b"q=a%3D"], [b"q=a"]),
        (query("q", "regex", "a.*"), [b"q=a%0a", b"q=a%ff"], [b"q=ba"]),
        (query("a b", "exact", "1"), [b"a+b=1", b"a%20b=1"], [b"ab=1"]),
        (query("q", "exact", "%zz"), [b"q=%zz"], [b"q=zz"]),
    ],
)
def test_query_values(match: Match, yes: list[bytes], no: list[bytes]) -> None:
    assert [text for text in yes if not matches(match, query=text)] == []
    assert [text for text in no if matches(match, query=text)] == []


def test_all_values_of_a_repeated_key_are_seen() -> None:
    assert query_values(b"a=1&b=2&a=&a&c&a=%33", b"a") == [b"1", b"", b"", b"3"]


def test_three_parts_are_all_asked() -> None:
    match = Match(path="/a", methods=frozenset({"GET"}), callers=frozenset({"web"}))
    assert matches(match)
    assert not matches(match, path=b"/b")
    assert not matches(match, method=b"PUT")
    assert not matches(match, caller="admin")


def test_bad_patterns_are_errors() -> None:
    with pytest.raises(ValueError, match="must begin"):
        compile_match(Match(path="a"))
    with pytest.raises(ValueError, match="regular expression"):
        compile_match(header("x", "regex", "("))
    with pytest.raises(ValueError, match='unknown kind of match "glob"'):
        compile_value(ValueMatch("glob", "x"))


@settings(deadline=None, derandomize=True)
@given(text=st.binary(max_size=30), value=st.binary(max_size=10), path=st.binary(max_size=10))
def test_no_request_makes_a_predicate_raise(text: bytes, value: bytes, path: bytes) -> None:
    match = Match(
        path="/a/*/**/b*",
        path_regex=".*a",
        headers=(("x", ValueMatch("regex", "a.*")),),
        query=(("q", ValueMatch("regex", "a.*")),),
    )
    for only in (
        match,
        Match(path=match.path),
        Match(path_regex=match.path_regex),
        Match(headers=match.headers),
        Match(query=match.query),
    ):
        matches(only, path=path, query=text, headers=[(b"x", value)])


def cookies(kind: str, value: str = "", name: str = "canary") -> Match:
    return Match(cookies=((name, ValueMatch(kind, value)),))


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ([], []),
        ([(b"cookie", b"canary=1")], [b"1"]),
        ([(b"cookie", b"a=b; canary=1;c=d")], [b"1"]),
        ([(b"cookie", b"a=b"), (b"cookie", b"canary=1")], [b"1"]),  # as HTTP/2 splits them
        ([(b"cookie", b"canary=1; canary=2")], [b"1", b"2"]),
        ([(b"cookie", b'canary="x y"')], [b"x y"]),
        ([(b"cookie", b'canary="')], [b'"']),
        ([(b"cookie", b"canary=a=b")], [b"a=b"]),
        ([(b"cookie", b"canary=")], [b""]),
        ([(b"cookie", b"canary")], []),
        ([(b"cookie", b"xcanary=1; canaryx=1; Canary=1")], []),
        ([(b"set-cookie", b"canary=1")], []),
    ],
)
def test_values_of_a_cookie(fields: Fields, found: list[bytes]) -> None:
    assert cookie_values(fields, b"canary") == found
    assert matches(cookies("present"), headers=fields) == bool(found)


def test_cookies_match_in_the_same_forms_as_headers() -> None:
    fields = [(b"cookie", b"canary=blue-2")]
    assert matches(cookies("exact", "blue-2"), headers=fields)
    assert matches(cookies("prefix", "blue"), headers=fields)
    assert matches(cookies("regex", "blue-[0-9]"), headers=fields)
    assert not matches(cookies("exact", "blue"), headers=fields)
    both = Match(cookies=(*cookies("present").cookies, *cookies("present", name="other").cookies))
    assert not matches(both, headers=fields)


@given(st.lists(st.tuples(st.just(b"cookie"), st.binary(max_size=40)), max_size=3))
def test_no_cookie_field_is_too_odd(fields: Fields) -> None:
    matches(cookies("prefix", "a"), headers=fields)
