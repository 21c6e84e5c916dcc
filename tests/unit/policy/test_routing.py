from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.model.snapshot import Match, ValueMatch
from sidecar.policy.matching import compile_match
from sidecar.policy.routing import RouteTable, match_covers, unreachable

Fields = list[tuple[bytes, bytes]]
BETA = (("x-beta", ValueMatch("exact", "1")),)


def table(*matches: Match) -> RouteTable[int]:
    return RouteTable([(match, index) for index, match in enumerate(matches)])


def linear(matches: Sequence[Match], method: bytes, target: bytes, headers: Fields, caller: str | None) -> int | None:
    """The definition: the first route in the file that matches."""
    path, _, query = target.partition(b"?")
    for index, match in enumerate(matches):
        predicate = compile_match(match)
        if predicate is None or predicate(method, path, query, headers, caller):
            return index
    return None


def test_first_match_wins() -> None:
    routes = table(
        Match(path="/reviews/**", headers=BETA),
        Match(methods=frozenset({"POST", "PUT"})),
        Match(path="/reviews/slow"),
        Match(),
    )
    assert routes.find(b"GET", b"/reviews/7", [(b"x-beta", b"1")], None) == 0
    assert routes.find(b"POST", b"/reviews/7", [(b"x-beta", b"1")], None) == 0
    assert routes.find(b"POST", b"/reviews/slow", [], None) == 1
    assert routes.find(b"GET", b"/reviews/slow", [], None) == 2
    assert routes.find(b"GET", b"/reviews/slow?x=1", [], None) == 2
    assert routes.find(b"GET", b"/x", [], None) == 3


def test_an_earlier_broad_route_beats_a_later_exact_one() -> None:
    routes = table(Match(path="/a/**"), Match(path="/a/b"), Match(path="/a/b/**"))
    assert routes.find(b"GET", b"/a/b", [], None) == 0
    routes = table(Match(path="/a/b/**"), Match(path="/a/**"), Match(path="/a/b"))
    assert routes.find(b"GET", b"/a/b", [], None) == 0
    assert routes.find(b"GET", b"/a/c", [], None) == 1
    routes = table(Match(path_regex="/a.*"), Match(path="/a"))
    assert routes.find(b"GET", b"/a", [], None) == 0


def test_no_route() -> None:
    assert table().find(b"GET", b"/", [], None) is None
    assert table(Match(path="/a")).find(b"GET", b"/b", [], None) is None
    assert table(Match(methods=frozenset({"PUT"}))).find(b"GET", b"/b", [], None) is None


def test_a_payload_may_be_false_or_none() -> None:
    assert RouteTable([(Match(path="/a"), 0), (Match(), 1)]).find(b"GET", b"/a", [], None) == 0
    assert RouteTable([(Match(path="/a"), ""), (Match(), "x")]).find(b"GET", b"/a", [], None) == ""


def test_a_lone_catch_all_looks_at_nothing() -> None:
    class Untouchable(list[tuple[bytes, bytes]]):
        def __iter__(self) -> None:  # type: ignore[override]
            raise AssertionError("headers were looked at")

    assert table(Match()).find(b"GET", b"/", Untouchable(), None) == 0
    assert table(Match(path="/**"), Match(path="/a")).find(b"GET", b"/a", Untouchable(), None) == 0
    assert table(Match(path="/a", headers=BETA), Match(path="/b")).find(b"GET", b"/b", Untouchable(), None) == 1


def test_the_table_says_whether_it_needs_the_path() -> None:
    assert not table(Match()).needs_path
    assert not table(Match(path="/**", headers=BETA), Match(methods=frozenset({"GET"}))).needs_path
    assert table(Match(path="/a"), Match()).needs_path
    assert table(Match(path_regex="/a"), Match()).needs_path


def test_look_up_asks_no_predicate_of_other_paths() -> None:
    """The work of a look-up does not grow with the number of routes: other routes' predicates are never called."""
    counted = CountingFields()
    for count in (10, 10_000):
        routes = [(Match(path=f"/svc{i}/**", headers=BETA), i) for i in range(count)]
        routes += [(Match(path=f"/exact/{i}", headers=BETA), count + i) for i in range(count)]
        found = RouteTable([*routes, (Match(), -1)])
        for target, asked in ((b"/svc7/a/b", 1), (b"/exact/9", 1), (b"/none", 0), (b"/svc5", 1)):
            counted.asked = 0
            assert found.find(b"GET", target, counted, None) == -1
            assert counted.asked == asked


class CountingFields(list[tuple[bytes, bytes]]):
    asked = 0

    def __contains__(self, item: object) -> bool:
        self.asked += 1
        return False


values = st.builds(ValueMatch, st.sampled_from(["exact", "prefix", "present"]), st.sampled_from(["1", "12", ""]))
named = st.lists(st.tuples(st.sampled_from(["x", "y"]), values), max_size=2, unique_by=lambda item: item[0]).map(tuple)
globs = st.lists(st.sampled_from(["a", "b", "*", "**", "a*", ""]), min_size=1, max_size=4).map(
    lambda parts: "/" + "/".join([*(part for part in parts[:-1] if part), parts[-1]])
)
some = st.none() | st.sampled_from([frozenset({"GET"}), frozenset({"GET", "PUT"}), frozenset({"PUT"})])
callers = st.none() | st.sampled_from([frozenset({"web"}), frozenset({"web", "admin"})])
match_strategy = st.builds(
    Match,
    path=st.none() | globs,
    path_regex=st.none() | st.none() | st.sampled_from(["/a.*", "/a/b"]),
    methods=some,
    headers=named,
    query=named,
    callers=callers,
) | st.builds(Match, path=globs)
request = st.tuples(
    st.sampled_from([b"GET", b"PUT"]),
    st.tuples(
        st.lists(st.sampled_from([b"a", b"b", b"ab", b""]), min_size=1, max_size=4).map(lambda p: b"/" + b"/".join(p)),
        st.sampled_from([b"", b"?", b"?x=1", b"?x=12&y", b"?y=1&x=2"]),
    ).map(b"".join),
    st.lists(st.tuples(st.sampled_from([b"x", b"y", b"z"]), st.sampled_from([b"1", b"12", b""])), max_size=3),
    st.sampled_from([None, "web", "admin"]),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(matches=st.lists(match_strategy, max_size=8), requests=st.lists(request, min_size=1, max_size=5))
def test_find_is_the_linear_scan(matches: list[Match], requests: list[tuple[bytes, bytes, Fields, str | None]]) -> None:
    routes = table(*matches)
    for method, target, headers, caller in requests:
        assert routes.find(method, target, headers, caller) == linear(matches, method, target, headers, caller)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(matches=st.lists(match_strategy, max_size=8), requests=st.lists(request, min_size=1, max_size=5))
def test_what_is_called_unreachable_is_never_found(
    matches: list[Match], requests: list[tuple[bytes, bytes, Fields, str | None]]
) -> None:
    found = unreachable([(match, None) for match in matches])
    shadowed = dict(found)
    assert all(earlier < later for later, earlier in found)
    for method, target, headers, caller in requests:
        assert linear(matches, method, target, headers, caller) not in shadowed


@settings(deadline=None, derandomize=True)
@given(matches=st.lists(match_strategy, max_size=8))
def test_filing_finds_all_that_comparing_each_pair_would(matches: list[Match]) -> None:
    found = unreachable([(match, None) for match in matches])
    slow = {
        later for later, narrow in enumerate(matches) if any(match_covers(wide, narrow) for wide in matches[:later])
    }
    assert {later for later, _ in found} == slow


def test_unreachable_routes_name_what_shadows_them() -> None:
    get, put = frozenset({"GET"}), frozenset({"PUT"})
    x1, x12 = (("x", ValueMatch("exact", "1")),), (("x", ValueMatch("prefix", "1")),)

    def shadows(*matches: Match) -> list[tuple[int, int]]:
        return unreachable([(match, None) for match in matches])

    assert shadows(Match(), Match(path="/a")) == [(1, 0)]
    assert shadows(Match(path="/a"), Match(path="/b"), Match()) == []
    assert shadows(Match(path="/a/**"), Match(path="/b"), Match(path="/a/*/c", methods=get)) == [(2, 0)]
    assert shadows(Match(methods=get | put), Match(methods=get), Match(methods=None)) == [(1, 0)]
    assert shadows(Match(methods=get), Match(methods=put), Match(methods=get | put)) == [], "only sure cases"
    assert shadows(Match(headers=x12), Match(headers=x1)) == [(1, 0)]
    assert shadows(Match(headers=x1), Match(headers=x12)) == []
    assert shadows(Match(query=x1), Match(headers=x1)) == []
    assert shadows(Match(path_regex="/a.*"), Match(path="/ab"), Match(path="/b")) == [(1, 0)]
    assert shadows(Match(callers=frozenset({"web"})), Match(path="/a", callers=frozenset({"web"}))) == [(1, 0)]
    assert shadows(Match(), Match(), Match()) == [(1, 0), (2, 0)]


def test_ten_thousand_routes_are_linted_without_comparing_all_pairs() -> None:
    many = [(Match(path=f"/s{i}/**", headers=BETA), None) for i in range(5_000)]
    many += [(Match(path="/x", headers=(("x-tenant", ValueMatch("exact", str(i))),)), None) for i in range(5_000)]
    assert unreachable(many) == []
