"""What `check` finds, on virtual time over a store in memory."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import trio
from support.memory_store import MemoryStore
from support.operators import EPOCH, NOW, Api, running_api
from trio.testing import MockClock

from certs.authority import bundle_of, create_root
from certs.files import CaFiles
from control_plane.serve.hub import Stream
from control_plane.state.records import (
    ALIVE,
    AUDIT,
    INSTANCES,
    REPLICAS,
    SIDECARS,
    TOKENS,
    Alive,
    Audit,
    Instance,
    ReplicaRecord,
    encode,
)
from control_plane.store.base import Put, StoreFull

MESH = "version: 1\nservices:\n  web: {calls: {reviews: {}}}\n  reviews: {}\n"


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with running_api(MemoryStore()) as api:
        yield api


async def wrong(api: Api) -> list[tuple[str, str, str]]:
    """(category, name, cause) of what is not right; every line is whole."""
    status, answer = await api.call("GET", "/v1/check", token=api.admin)
    assert status == 200
    rows = [each for each in answer["checks"] if not each["ok"]]
    assert answer["ok"] is (not rows)
    assert all(each["cause"] and each["remedy"] and each["name"] for each in rows)
    assert {each["category"] for each in answer["checks"]} == {
        "store", "authority", "replicas", "clock", "sidecars", "policy", "services",
    }  # fmt: skip
    return [(each["category"], each["name"], each["cause"]) for each in rows]


async def only(api: Api) -> tuple[str, str, str]:
    (found,) = await wrong(api)
    return found


async def settled(api: Api) -> None:
    """What has changed is worked out."""
    await trio.sleep(0.7)


async def put(api: Api, key: str, value: Any) -> None:
    content = value if isinstance(value, bytes) else encode(value)
    await api.replica.commit([Put(key, content)])


async def connect(api: Api, service: str, register: bool = True, **instance: Any) -> Stream:
    joined = await api.join(service)
    replica = api.replica
    stream = Stream(joined["sidecar"], service, "0.1", False, set(), {}, replica.now(), trio.current_time())
    stream.policy = 10**9
    replica.hub.open(stream)
    if register:
        await replica.register(stream.id, service, Instance("10.0.0.1", 15006, **instance))
    return stream


async def test_all_is_well(api: Api, autojump_clock: MockClock) -> None:
    await settled(api)
    assert await wrong(api) == []
    await connect(api, "web")
    await connect(api, "reviews")
    await api.apply("version: 1\nservices:\n  web: {calls: {reviews: {}}}\n  reviews: {}\n")
    await settled(api)
    assert await wrong(api) == []


async def test_the_store_is_away_or_full(api: Api, autojump_clock: MockClock) -> None:
    await settled(api)
    store: Any = api.replica.store
    store.away = True
    category, name, cause = await only(api)
    assert category == "store" and "takes no changes" in name and "away" in cause
    store.away = False

    async def full(*_: Any) -> int:
        raise StoreFull("the quota of 2 GB is used up")

    store.commit = full
    category, name, cause = await only(api)
    assert category == "store" and "is full" in name and "quota" in cause


async def test_damaged_records_are_named_by_key(api: Api, autojump_clock: MockClock) -> None:
    await settled(api)
    await put(api, "sidecars/x", b"\0garbage")
    await put(api, "somebody/elses", b"1")
    await put(api, "tokens/t9", b'{"format": 99}')
    found = await wrong(api)
    assert [name for _, name, _ in found] == ["record sidecars/x", "record somebody/elses", "record tokens/t9"]
    assert "newer pillion" in found[2][2]


async def test_an_authority_that_ends(autojump_clock: MockClock) -> None:
    root = create_root("mesh.local", NOW, timedelta(days=100))
    authority = CaFiles("mesh.local", root.certificate, root.issue_authority(NOW, timedelta(days=5)), bundle_of(root))
    async with running_api(MemoryStore(), authority) as api:
        await settled(api)
        issuing, top = await wrong(api)
        assert issuing == ("authority", "issuing certificate of replica r1", "it expires in 5 days") or "4 days" in str(
            issuing
        )
        assert top[1].startswith("root certificate ")
        api.clock.added = 6 * 86400
        assert any(cause.startswith("it expired") for _, _, cause in await wrong(api))


async def test_the_last_admin_token_ends(api: Api, autojump_clock: MockClock) -> None:
    await settled(api)
    name = next(iter(api.replica.state.table(TOKENS)))
    record = api.replica.state.get(TOKENS, name)
    await put(api, TOKENS + name, replace(record, expires=EPOCH + 3 * 86400))
    category, name, cause = await only(api)
    assert (category, name) == ("authority", "admin tokens") and "days" in cause


async def test_replicas_that_do_not_fit(api: Api, autojump_clock: MockClock) -> None:
    await settled(api)
    other = ReplicaRecord("h:1", "h:2", "ff" * 32, "0.2", EPOCH)
    await put(api, REPLICAS + "r2", other)
    causes = [cause for category, name, cause in await wrong(api) if (category, name) == ("replicas", "replica r2")]
    assert len(causes) == 2
    assert "issuing certificate" in causes[0] and "version 0.2, this one 0.1" in causes[1]


async def test_clocks_that_differ(api: Api, autojump_clock: MockClock) -> None:
    await settled(api)
    issuer = next(iter(api.replica.state.table(REPLICAS).values())).record.issuer
    await put(api, REPLICAS + "r2", ReplicaRecord("h:1", "h:2", issuer, "0.1", EPOCH))
    assert await wrong(api) == []
    await put(api, ALIVE + "s1", Alive("r2", api.clock() + 300))
    category, name, cause = await only(api)
    assert (category, name) == ("clock", "clocks of r2 and r1") and "at least" in cause
    await put(api, ALIVE + "s1", Alive("r1", api.clock()))
    await put(api, f"{AUDIT}1-r2", Audit(api.clock() - 200, "x", "y", "z"))
    assert await only(api) == ("clock", "clocks of r1 and r2", "that of r1 is at least 3 minutes ahead")


async def test_sidecars_that_reject_or_lag(api: Api, autojump_clock: MockClock) -> None:
    web = await connect(api, "web")
    reviews = await connect(api, "reviews")
    await api.apply(MESH)
    await settled(api)
    web.rejected = {"service/web": "no such filter"}
    reviews.policy = 1
    found = await wrong(api)
    assert {(category, name) for category, name, _ in found} == {
        ("sidecars", f"sidecar {web.id} of web"),
        ("sidecars", f"sidecar {reviews.id} of reviews"),
    }
    assert "no such filter" in str(found) and "has not answered" in str(found)


async def test_leaves_that_are_not_renewed(api: Api, autojump_clock: MockClock) -> None:
    web = await connect(api, "web")
    await settled(api)
    record = api.replica.state.get(SIDECARS, web.id)
    await put(api, SIDECARS + web.id, replace(record, not_after=api.clock() + 3600))
    assert (await only(api))[2].startswith("it expires in")
    await put(api, SIDECARS + web.id, replace(record, not_after=api.clock() - 3600))
    assert (await only(api))[2].startswith("it expired")


async def test_services_that_nobody_serves(api: Api, autojump_clock: MockClock) -> None:
    web = await connect(api, "web", healthy=False, reason="connection refused")
    await api.apply(MESH)
    await settled(api)
    found = await wrong(api)
    assert [(category, name) for category, name, _ in found] == [
        ("policy", "service reviews"),
        ("services", "service web"),
        ("services", "service web"),
    ]
    assert "connection refused" in found[1][2] and "calls reviews" in found[2][2]
    await api.replica.withdraw(web.id, "web")


async def test_suspects(api: Api, autojump_clock: MockClock) -> None:
    web = await connect(api, "web")
    await settled(api)
    suspect = Instance("10.0.0.1", 1, state="suspect", until=api.clock() + 1000)
    await put(api, f"{INSTANCES}web/{web.id}", suspect)
    category, name, _ = await only(api)
    assert (category, name) == ("services", f"endpoint web/{web.id}")


async def test_documents_that_do_not_stand(api: Api, autojump_clock: MockClock) -> None:
    await connect(api, "web")
    await connect(api, "reviews")
    await api.apply(MESH)
    from control_plane.state.records import SERVICES, Document

    await put(api, SERVICES + "web", Document("mesh.yaml", 3, "  web: {routes: [{to: v9}]}\n", "x", EPOCH, 1))
    await settled(api)
    category, name, cause = await only(api)
    assert (category, name) == ("policy", "document services/web") and "mesh.yaml:3" in cause and "v9" in cause


async def test_much_that_is_wrong_is_cut_short(api: Api, autojump_clock: MockClock) -> None:
    await settled(api)
    for number in range(30):
        await put(api, f"sidecars/x{number:02}", b"?")
    found = await wrong(api)
    assert len(found) == 21 and found[-1][1] == "10 more of the same"
