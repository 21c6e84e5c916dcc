import pytest

from sidecar.model.load import load_texts
from sidecar.model.snapshot import Destination, Match, Mirror, Redirect, Respond, Route, ValueMatch
from sidecar.model.summary import concurrency_text, destination_text, match_text


@pytest.mark.parametrize(
    ("match", "text"),
    [
        (Match(), "*"),
        (Match(path="/a/**", methods=frozenset({"PUT", "GET"})), "GET,PUT /a/**"),
        (Match(path_regex="/v[0-9]", callers=frozenset({"web", "app"})), "~/v[0-9] from app,web"),
        (Match(headers=(("x", ValueMatch("exact", "1")), ("y", ValueMatch("present")))), "x=1 y"),
        (Match(cookies=(("c", ValueMatch("exact", "1")), ("d", ValueMatch("present")))), "cookie c=1 cookie d"),
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
        (Route("r", destinations=(Destination("v1"),), mirror=Mirror("v2", None, 2.5)), "v1; copies of 2.5% to v2"),
        (Route("r", mirror=Mirror(service="spare")), "every endpoint; copies of 100% to spare"),
        (Route("r", respond=Respond(204)), "respond 204"),
        (Route("r", redirect=Redirect("/new", 301)), "redirect 301 /new"),
    ],
)
def test_destinations(route: Route, text: str) -> None:
    assert destination_text(route) == text


@pytest.mark.parametrize(
    ("stated", "text"),
    [
        ("{}", None),
        ("{max: 8, queue: 0}", "8 at a time, 0 wait"),
        ("{adaptive: true}", "adaptive, 3 to 1000 at a time, 100 wait up to 100ms"),
        (
            "{max: 8, queue_timeout: 1s, priorities: [{class: vip, from: [web]}]}",
            "8 at a time, 100 wait up to 1s; vip > default",
        ),
    ],
)
def test_limits_of_concurrency(stated: str, text: str | None) -> None:
    found = load_texts({"mesh.yaml": f"version: 1\nservices:\n  web: {{concurrency: {stated}}}\n"})
    assert found.snapshot is not None
    assert concurrency_text(found.snapshot.services["web"]) == text
