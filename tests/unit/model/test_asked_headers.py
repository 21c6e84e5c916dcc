"""What a policy may ask of a request's headers and paths: only what the data path judges.

The codec takes some fields out of a request before any rule is asked, and an opaque port passes paths on as they came.
A rule on either would never match, so a deny would let everything in: such a policy is refused.
"""

import json
from pathlib import Path

import pytest

from control_plane.cli import main
from sidecar.model.load import load_policy
from sidecar.model.problems import Severity
from sidecar.wire import http1_names
from sidecar.wire.http1_names import ORDINARY, kind_of

PLACES = {
    "allow": "authz: {allow: [{headers: {NAME: a}}]}",
    "deny": "authz: {deny: [{headers: {NAME: {present: true}}}]}",
    "route's deny": "routes: [{name: a, authz: {deny: [{headers: {NAME: {prefix: a}}}]}}]",
    "match": "routes: [{name: a, match: {headers: {NAME: a}}}]",
    "rate_limit": "rate_limit: {requests: 10, per: 1s, key: KEY}",
    "route's rate_limit": "routes: [{name: a, rate_limit: {requests: 10, per: 1s, key: KEY}}]",
}
TABLE = tuple(name.decode() for name in http1_names._KINDS)
PREFIXED = (
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-forwarded-port",
    "x-forwarded-prefix",
    "x-forwarded-a",
    "x-pillion-a",
    "x-pillion-peer",
)
ORDINARY_NAMES = (
    "accept",
    "authorization",
    "content-type",
    "cookie",
    "date",
    "forwarded-by",
    "hosts",
    "host-name",
    "origin",
    "referer",
    "tracestate",
    "user-agent",
    "via",
    "x-forwarded",
    "x-pillion",
    "x-real-ips",
    "X-Tenant",
    "x_tenant",
    "x-request-id",
    "x-upgrade",
)


def spellings(name: str) -> list[str]:
    spelled = (name, name.upper(), name.title(), name.replace("-", "_"), name.title().replace("-", "."))
    return list(dict.fromkeys(spelled))


def policy(place: str, name: str) -> str:
    block = PLACES[place].replace("NAME", json.dumps(name)).replace("KEY", json.dumps(f"header:{name}"))
    return f"version: 1\nservices:\n  web:\n    {block}\n"


def checked(tmp_path: Path, text: str) -> list[tuple[str, str | None]]:
    """(message, help) of every error."""
    path = tmp_path / "mesh.yaml"
    path.write_text(text)
    loaded = load_policy([path])
    return [(each.message, each.help) for each in loaded.problems if each.severity is Severity.ERROR]


def test_every_special_name_of_the_codec_is_one_that_it_takes_out() -> None:
    for name in (*TABLE, *PREFIXED):
        for spelled in spellings(name):
            assert kind_of(spelled.lower().encode()) != ORDINARY, spelled
    assert all(kind_of(name.lower().encode()) == ORDINARY for name in ORDINARY_NAMES)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [*TABLE, *PREFIXED])
def test_a_header_that_the_codec_takes_out_cannot_be_asked_for(tmp_path: Path, name: str, place: str) -> None:
    for spelled in spellings(name):
        errors = checked(tmp_path, policy(place, spelled))
        assert [message for message, _ in errors] == [f'the header "{spelled}" cannot be asked for'], spelled
        assert errors[0][1] is not None and "taken out before rules are asked" in errors[0][1]


@pytest.mark.parametrize("place", PLACES)
def test_an_ordinary_header_can_be_asked_for(tmp_path: Path, place: str) -> None:
    for name in ORDINARY_NAMES:
        assert checked(tmp_path, policy(place, name)) == [], name


def test_policy_check_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(policy("deny", "Host"))
    code = main(["policy", "check", str(path)])
    said = capsys.readouterr().err
    assert code == 2
    assert 'the header "Host" cannot be asked for' in said and f"{path}:4:" in said


# Paths that are passed on as they came

ADMIN = "{name: adm, match: {path: /admin/**}, authz: {allow: [{from: [admin]}]}}"
ADMIN_REGEX = '{name: adm, match: {path_regex: "/admin/.*"}, authz: {deny: [{from: [web]}]}}'
BY_PATH = "{name: adm, match: {path: /admin/**}}"
REST = "{name: rest, authz: {allow: [{from: [web, admin]}]}}"
ANYWHERE = "{name: all, match: {path: /**}, authz: {allow: [{from: [admin]}]}}"


def reviews(handling: str, *routes: str) -> str:
    port = "{port: 8000" + (f", path_handling: {handling}" if handling else "") + "}"
    return (
        "version: 1\nservices:\n  web: {}\n  admin: {}\n  reviews:\n"
        f"    ports: {{api: {port}}}\n    routes: [{', '.join(routes)}]\n"
    )


@pytest.mark.parametrize("routes", [(ADMIN, REST), (ADMIN,), (ADMIN_REGEX,), (BY_PATH, REST)])
def test_an_opaque_port_with_routes_that_differ_by_path_in_authorization_is_refused(
    tmp_path: Path, routes: tuple[str, ...]
) -> None:
    errors = checked(tmp_path, reviews("opaque", *routes))
    said = ("`path_handling: opaque` together with authorization by path", "use path_handling: strict, or rules ")
    assert [message for message, _ in errors] == [said[0]]
    assert errors[0][1] is not None and errors[0][1].startswith(said[1])


@pytest.mark.parametrize(
    ("handling", "routes"),
    [("strict", (ADMIN, REST)), ("", (ADMIN, REST)), ("opaque", (BY_PATH,)), ("opaque", (ANYWHERE,))],
)
def test_a_port_that_can_judge_its_routes_is_taken(tmp_path: Path, handling: str, routes: tuple[str, ...]) -> None:
    assert checked(tmp_path, reviews(handling, *routes)) == []
