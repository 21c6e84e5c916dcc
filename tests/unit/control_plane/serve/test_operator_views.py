"""What operators look at, on virtual time over a store in memory."""

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import trio
from support.memory_store import MemoryStore
from support.operators import Api, running_api
from trio.testing import MockClock

from control_plane.state.records import (
    INSTANCES,
    LIVE,
    OBSERVED,
    REPLICAS,
    STATUS,
    Instance,
    Live,
    Observed,
    Status,
    encode,
)
from control_plane.store.base import Put

MESH = """\
version: 1
services:
  web: {owners: [team-web], ports: {http: {port: 8000}}, calls: {reviews: {}}}
  reviews:
    ports: {api: {port: 9000, protocol: http}}
    versions: {v1: {labels: {version: "1"}}, v2: {labels: {version: "2"}}}
    address: [{at: "10.0.0.9:8443", labels: {version: "1"}}]
    routes:
      - {name: beta, match: {path: /beta/**, methods: [GET]}, to: v2}
"""


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with running_api(MemoryStore()) as api:
        yield api


async def get(api: Api, path: str) -> Any:
    status, answer = await api.call("GET", path, token=api.admin)
    assert status == 200, answer
    return answer


async def put(api: Api, key: str, value: Any) -> None:
    await api.replica.commit([Put(key, encode(value))])


async def prepared(api: Api) -> tuple[str, str]:
    """The sidecars of two instances of reviews: one that is not healthy, one that is suspect."""
    await api.apply(MESH)
    one, two = (await api.join("reviews"))["sidecar"], (await api.join("reviews", name="host-2"))["sidecar"]
    await put(api, f"{INSTANCES}reviews/{one}", Instance("10.0.0.1", 1, {"version": "2"}, healthy=False, reason="503"))
    await put(api, f"{INSTANCES}reviews/{two}", Instance("fd00::1", 2, state="suspect", until=1e12, weight=3))
    await put(api, f"{INSTANCES}reviews/gone", Instance("10.0.0.3", 3, state="gone", changed=1e12))
    edges = (("web", "reviews", 8.0, 1.0), ("cron", "reviews", 1.0, 0.0))
    breakers = (("web", "reviews", "10.0.0.1:1", "open"), ("web", "reviews", "[fd00::1]:2", "half-open"))
    await put(api, OBSERVED + "r1", Observed(edges, breakers, (("web", "reviews", "10.0.0.1:1", "because"),)))
    await put(api, OBSERVED + "r2", Observed((("web", "reviews", 2.0, 1.0),), breakers[:1]))
    await trio.sleep(0.3)
    return one, two


async def test_a_service_described(api: Api, autojump_clock: MockClock) -> None:
    one, two = await prepared(api)
    found = await get(api, "/v1/services/reviews")
    assert found["ports"] == [{"name": "api", "number": 9000, "protocol": "http"}]
    rows = {each["address"]: each for each in found["endpoints"]}
    assert set(rows) == {"10.0.0.9:8443", "10.0.0.1:1", "[fd00::1]:2"}
    assert (rows["10.0.0.9:8443"]["state"], rows["10.0.0.9:8443"]["version"]) == ("static", "v1")
    unhealthy = rows["10.0.0.1:1"]
    assert (unhealthy["sidecar"], unhealthy["healthy"], unhealthy["reason"]) == (one, False, "503")
    assert unhealthy["breakers"] == [{"caller": "web", "state": "open"}]
    assert unhealthy["evidence"] == [{"caller": "web", "text": "because"}] and rows["[fd00::1]:2"]["evidence"] == []
    assert unhealthy["certificate_not_after"] > api.clock()
    suspect = rows["[fd00::1]:2"]
    assert (suspect["sidecar"], suspect["state"], suspect["version"], suspect["weight"]) == (two, "suspect", None, 3)
    assert {each["name"]: each["endpoints"] for each in found["versions"]} == {"v1": 1, "v2": 1}
    assert found["routes"][0]["match"] == "GET /beta/**" and found["routes"][0]["to"] == "v2"
    assert found["routes"][0]["source"] == "mesh.yaml:9"
    assert found["callers"] == [
        {"service": "cron", "requests_per_s": 1.0, "failures_per_s": 0.0},
        {"service": "web", "requests_per_s": 10.0, "failures_per_s": 2.0},
    ]
    assert [each["service"] for each in (await get(api, "/v1/services/web"))["callees"]] == ["reviews"]
    assert (found["document"]["file"], found["document"]["change"], found["problem"]) == ("mesh.yaml", 1, None)


async def test_lists(api: Api, autojump_clock: MockClock) -> None:
    await prepared(api)
    services = {each["name"]: each for each in (await get(api, "/v1/services"))["services"]}
    assert (services["reviews"]["endpoints"], services["reviews"]["healthy"]) == (3, 2)
    assert (services["reviews"]["callers"], services["reviews"]["policy"]) == (2, "mesh.yaml:4")
    assert services["web"]["owners"] == ["team-web"]
    assert len((await get(api, "/v1/endpoints"))["endpoints"]) == 3
    assert (await get(api, "/v1/endpoints?service=web"))["endpoints"] == []
    assert (await api.call("GET", "/v1/endpoints?service=nobody", token=api.admin))[0] == 404
    assert [each["caller"] for each in (await get(api, "/v1/edges"))["edges"]] == ["cron", "web"]
    assert len((await get(api, "/v1/edges?service=web"))["edges"]) == 1
    replicas = (await get(api, "/v1/replicas"))["replicas"]
    assert [(each["name"], each["this"]) for each in replicas] == [("r1", True)]


async def test_a_service_that_has_only_a_token(api: Api, autojump_clock: MockClock) -> None:
    await api.token(kind="join", service="new")
    await trio.sleep(0.3)
    found = await get(api, "/v1/services/new")
    assert (found["document"], found["owners"], found["endpoints"]) == (None, [], [])


async def test_sidecars_of_other_replicas(api: Api, autojump_clock: MockClock) -> None:
    one, two = await prepared(api)
    policy = (await get(api, "/v1/policy/status"))["revision"]
    await put(api, LIVE + one, Live("r2", {}, "0.2"))
    await put(api, LIVE + two, Live("r9"))  # that replica is gone
    await put(api, STATUS + "r2", Status(policy))
    await put(api, REPLICAS + "r2", replace(api.replica.state.get(REPLICAS, "r1"), mesh="h:1"))
    rows = {each["id"]: each for each in (await get(api, "/v1/sidecars"))["sidecars"]}
    assert (rows[one]["connected"], rows[one]["current"], rows[one]["replica"]) == (True, True, "r2")
    assert (rows[one]["healthy"], rows[one]["address"]) == (False, "10.0.0.1:1")
    assert (rows[two]["connected"], rows[two]["current"], rows[two]["name"]) == (False, False, "host-2")


async def test_the_snapshot_is_one_that_can_be_read(api: Api, autojump_clock: MockClock) -> None:
    from sidecar.model.canonical import snapshot_from_json

    await api.apply(MESH)
    found = snapshot_from_json(await get(api, "/v1/policy/snapshot"))
    assert found == api.replica.catalogue.snapshot
    assert str(found.services["reviews"].source) == "mesh.yaml:4"
