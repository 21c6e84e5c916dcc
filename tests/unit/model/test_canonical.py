import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from jsonschema import Draft7Validator
from support.policies import policies

from sidecar.model.canonical import (
    SnapshotError,
    service_to_json,
    snapshot_from_json,
    snapshot_to_json,
)
from sidecar.model.load import load_texts
from sidecar.model.schema import json_schema
from sidecar.model.snapshot import Origin, Snapshot
from sidecar.policy.authz import Authorizer
from sidecar.policy.routing import RouteTable

SCHEMA = Draft7Validator(json_schema())


def provenance(snapshot: Snapshot) -> list[dict[str, Origin]]:
    services = snapshot.services.values()
    return [dict(route.provenance) for each in services for route in each.routes] + [
        dict(each.provenance) for each in services
    ]


@settings(max_examples=150, deadline=None)
@given(policies())
def test_generated_policies(data: Any) -> None:
    """They load, fit the schema, survive JSON, and compile to what the sidecar runs."""
    loaded = load_texts({"mesh.yaml": yaml.safe_dump(json.loads(json.dumps(data)), allow_unicode=True)})
    assert not loaded.errors, [problem.message for problem in loaded.errors]
    snapshot = loaded.snapshot
    assert snapshot is not None
    SCHEMA.validate(data)

    text = json.dumps(snapshot_to_json(snapshot), allow_nan=False)
    again = snapshot_from_json(json.loads(text))
    assert again == snapshot
    assert provenance(again) == provenance(snapshot)
    assert json.dumps(snapshot_to_json(again)) == text
    assert snapshot_from_json(snapshot_to_json(snapshot, provenance=False)) == snapshot

    for service in snapshot.services.values():
        RouteTable([(route.match, route) for route in service.routes])
        assert service.routes[-1].match == type(service.routes[-1].match)()
        for route in service.routes:
            Authorizer(route.authz, "mesh.local")


def small() -> dict[str, Any]:
    loaded = load_texts({"mesh.yaml": "version: 1\nservices: {web: {timeout: {total: none}, ports: {a: {port: 1}}}}\n"})
    assert loaded.snapshot is not None
    data = snapshot_to_json(loaded.snapshot)
    assert isinstance(data, dict)
    return data


def test_what_is_usual_is_left_out() -> None:
    data = small()
    web = data["services"]["web"]
    assert web["ports"] == [{"name": "a", "number": 1}]
    assert web["timeouts"] == {"total_s": "none"}
    assert web["source"] == "mesh.yaml:2:12"
    assert "limits" not in web and "authz" not in web
    assert data["origins"][web["provenance"]["timeout.total"]] == {
        "value": "none",
        "level": "service",
        "source": "mesh.yaml:2:28",
        "overrode": [{"value": "15s", "level": "built-in"}],
    }


def test_one_service_carries_its_provenance() -> None:
    service = snapshot_from_json(small()).services["web"]
    assert service_to_json(service)["provenance"]["mtls"] == {"value": "strict", "level": "built-in"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format=2), "not a snapshot of format 1"),
        (lambda data: data.update(extra=1), "unknown key 'extra'"),
        (lambda data: data.pop("revision"), "needs services and revision"),
        (lambda data: data["services"]["web"].update(nmae=1), "services.web: unknown key 'nmae'"),
        (lambda data: data["services"]["web"].pop("name"), "services.web: needs 'name'"),
        (lambda data: data["services"]["web"].update(name="api"), "services.web: its name is 'api'"),
        (lambda data: data["services"]["web"].update(mtls="no"), "services.web.mtls: unknown value 'no'"),
        (lambda data: data["services"]["web"].update(routes={}), "services.web.routes: must be list"),
        (lambda data: data["services"]["web"].update(timeouts={"total_s": "1"}), "timeouts.total_s: must be a number"),
        (lambda data: data["services"]["web"].update(timeouts={"total_s": float("nan")}), "must be a number"),
        (lambda data: data["services"]["web"].update(limits={"connections": True}), "limits.connections: must be int"),
        (lambda data: data["services"]["web"].update(source="mesh.yaml"), "source: not a place in a file"),
        (lambda data: data["services"]["web"].update(provenance={"mtls": 999}), "provenance.mtls: no such origin"),
        (lambda data: data["origins"].append({"value": "x"}), "not an origin"),
        (lambda data: data["services"].update(web=None), "services.web: must be a map"),
    ],
)
def test_malformed_data_says_where(change: Any, message: str) -> None:
    data = small()
    change(data)
    with pytest.raises(SnapshotError, match=message.replace("'", ".")):
        snapshot_from_json(data)


@pytest.mark.parametrize("data", [None, [], "x", {}, {"format": 1, "services": [], "revision": "x"}])
def test_what_is_no_snapshot(data: Any) -> None:
    with pytest.raises(SnapshotError):
        snapshot_from_json(data)
