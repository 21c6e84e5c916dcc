import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.model.snapshot import HeaderEdit, Match, Redirect, Rewrite
from sidecar.model.words import redirect_target
from sidecar.policy.targets import PLAIN_TEXT, Redirecting, redirecting, respond_fields, rewriting


def rewritten(to: str, path: str | None, target: str) -> str:
    found = rewriting(Rewrite(to), Match(path=path))
    assert found is not None
    return found.target(target.encode()).decode()


@pytest.mark.parametrize(
    ("match", "to", "target", "said"),
    [
        ("/old", "/new", "/old", "/new"),
        ("/old", "/new", "/old?a=b?c", "/new?a=b?c"),
        ("/old/**", "/new", "/old/x", "/new"),  # all of it
        (None, "/new", "/x?", "/new?"),
        ("/old/**", "/new/**", "/old", "/new"),
        ("/old/**", "/new/**", "/old/", "/new/"),
        ("/old/**", "/new/**", "/old/a//b;c?d=/e", "/new/a//b;c?d=/e"),
        ("/old/**", "/a/b/**", "/old/x", "/a/b/x"),
        ("/a/*/c/**", "/n/**", "/a/b/c/d/e", "/n/d/e"),
        ("/**", "/api/**", "/", "/api/"),
        ("/**", "/api/**", "/x", "/api/x"),
        (None, "/api/**", "/x/y?z", "/api/x/y?z"),
        ("/old/**", "/**", "/old", "/"),
        ("/old/**", "/**", "/old?q", "/?q"),
        ("/old/**", "/**", "/old/x/y", "/x/y"),
        ("/old/**", "/**", "/old//evil.example/x", "/evil.example/x"),
    ],
)
def test_rewritten_paths(match: str | None, to: str, target: str, said: str) -> None:
    assert rewritten(to, match, target) == said


def test_a_rewrite_of_the_host_alone_leaves_the_path() -> None:
    found = rewriting(Rewrite(None, "b.example"), Match())
    assert found is not None and found.host == b"b.example" and found.target(b"/x?y") == b"/x?y"
    assert rewriting(None, Match()) is None


def redirect(to: str, path: str | None = None, edit: HeaderEdit | None = None) -> Redirecting:
    assert redirect_target(to) is None
    found = redirecting(Redirect(to, 308), Match(path=path), edit or HeaderEdit())
    assert found is not None and found.status == 308
    return found


@pytest.mark.parametrize(
    ("to", "said"),
    [
        ("https://e.example", "https://e.example/old/a?b"),
        ("https://e.example:8443", "https://e.example:8443/old/a?b"),
        ("https://e.example/", "https://e.example/?b"),
        ("https://e.example/x", "https://e.example/x?b"),
        ("https://e.example/x?c=d", "https://e.example/x?c=d"),
        ("https://e.example/x#y", "https://e.example/x#y"),
        ("/x", "/x?b"),
        ("/x?", "/x?"),
        ("/x#y", "/x#y"),
        ("/new/**", "/new/a?b"),
        ("/new/**?c", "/new/a?c"),
        ("https://e.example/new/**", "https://e.example/new/a?b"),
        ("https://", "https://own.example/old/a?b"),
        ("https:///x", "https://own.example/x?b"),
        ("http://", "http://own.example/old/a?b"),
    ],
)
def test_where_redirects_lead(to: str, said: str) -> None:
    assert redirect(to, "/old/**").location(b"/old/a?b", b"own.example") == said.encode()


@pytest.mark.parametrize("target", [b"/old//evil.example", b"/old/\\evil.example", b"/old//\\/evil.example/x"])
def test_no_request_leads_a_redirect_to_another_host(target: bytes) -> None:
    location = redirect("/**", "/old/**").location(target, b"own.example")
    assert location.startswith(b"/evil.example")
    assert redirect("https://e.example/**", "/old/**").location(target, b"x").startswith(b"https://e.example/evil.")


def test_a_target_that_is_no_path() -> None:
    assert redirect("https://e.example").location(b"*", b"x") == b"https://e.example/"


@given(st.sampled_from(["/**", "/new/**", "https://e.example/**", "https://e.example", "/x", "https://"]), st.binary())
def test_the_host_of_a_location_is_never_the_requests_to_choose(to: str, rest: bytes) -> None:
    location = redirect(to, "/old/**").location(b"/old" + rest, b"own.example")
    found = re.match(rb"(https://(e|own)\.example)?/(?![/\\])", location)
    assert found or (to.startswith("https://") and re.match(rb"https://(e|own)\.example/", location))


def test_own_answers_carry_the_routes_edits() -> None:
    edit = HeaderEdit((("x-a", "1"),), (("x-b", "2"), ("x-a", "3")), ("content-type",))
    assert respond_fields("hi", HeaderEdit()) == (PLAIN_TEXT,)
    assert respond_fields("", HeaderEdit()) == ()
    assert respond_fields("hi", edit) == ((b"x-a", b"1"), (b"x-b", b"2"), (b"x-a", b"3"))
    assert respond_fields("{}", HeaderEdit((("content-type", "application/json"),))) == (
        (b"content-type", b"application/json"),
    )
    assert redirect("/x", edit=HeaderEdit(add=(("x-b", "ä"),))).fields == ((b"x-b", b"\xe4"),)
