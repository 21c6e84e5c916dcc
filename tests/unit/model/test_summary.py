import pytest

from sidecar.model.snapshot import Destination, Match, Redirect, Respond, Route, ValueMatch
from sidecar.model.summary import destination_text, match_text


@pytest.mark.parametrize(
    ("match", "text"),
    [
        (Match(), "*"),
        (Match(path="/a/**", methods=frozenset({"PUT", "GET"})), "GET,PUT /a/**"),
        (Match(path_regex="/v[0-9]", callers=frozenset({"web", "app"})), "~/v[0-9] from app,web"),
        (Match(headers=(("x", ValueMatch("exact", "1")), ("y", ValueMatch("present")))), "x=1 y"),
        (Match(query=(("q", ValueMatch("prefix", "a")), ("r", ValueMatch("regex", "b")))), "?q^=a ?r~b"),
    ],
)
def test_matches(match: Match, text: str) -> None:
    assert match_text(match) == text


@pytest.mark.parametrize(
    ("route", "text"),
    [
        (Route("r"), "every endpoint"),
        (Route("r", destinations=(Destination("v1"),)), "v1"),
        (Route("r", destinations=(Destination("v1", 90), Destination("v2", 10))), "v1 90%, v2 10%"),
        (Route("r", respond=Respond(204)), "respond 204"),
        (Route("r", redirect=Redirect("/new", 301)), "redirect 301 /new"),
    ],
)
def test_destinations(route: Route, text: str) -> None:
    assert destination_text(route) == text
