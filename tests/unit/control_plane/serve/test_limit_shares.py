"""Who divides global rate limits and how shares reach sidecars, on virtual time over a store in memory."""

import pytest
import trio
from support.memory_store import MemoryStore
from support.replicas import Kit, beat, connect

from control_plane.serve.replica import Replica
from control_plane.state.records import DEFAULTS, SHARES, Document, encode
from control_plane.store.base import Put


async def with_limit(replica: Replica, scope: str = "global") -> None:
    text = f"version: 1\ndefaults: {{rate_limit: {{requests: 100, scope: {scope}}}}}\n"
    await replica.commit([Put(DEFAULTS, encode(Document("mesh.yaml", 1, text, "me", 0.0, 1, whole=True)))])
    await trio.sleep(1.0)


def shares(replica: Replica, service: str = "web") -> dict[str, float]:
    record = replica.state.get(SHARES, service)
    return dict(record.shares) if record is not None else {}


async def test_a_limit_is_divided_by_demand_and_told(autojump_clock: trio.abc.Clock) -> None:
    async with Kit(MemoryStore()).running() as one, trio.open_nursery() as nursery:
        await with_limit(one)
        streams = {name: await connect(one, name, port=n) for n, name in enumerate("abc", 1)}
        nursery.start_soon(beat, one, *streams)
        await trio.sleep(5.0)
        assert shares(one) == {} and not one.hub.shares  # none has said that it knows of shares
        for stream in streams.values():
            one.limit_shares.heard(stream, -1.0)
        await trio.sleep(3.0)
        assert shares(one) == pytest.approx(dict.fromkeys("abc", 1 / 3), abs=1e-5)
        for stream, demand in zip(streams.values(), (1.6, 0.3, 0.1), strict=True):
            one.limit_shares.heard(stream, demand)
        await trio.sleep(12.0)
        assert shares(one)["a"] == pytest.approx(1 / 30 + 0.9 * 0.8, rel=0.05)
        pushed = one.hub.shares["a"]
        assert pushed.name == "share" and b'{"share":%f' % shares(one)["a"] in pushed.line
        streams["a"].greeted, streams["a"].heard = True, trio.current_time()
        lines = b"".join(await one.hub.next_lines(streams["a"], list))
        assert b'"name":"share"' in lines
        revision = one.state.revision
        await trio.sleep(20.0)
        assert one.state.revision == revision  # what stands still is not written again
        await one.withdraw("a", "web")
        await trio.sleep(3.0)
        assert shares(one).keys() == {"b", "c"} and sum(shares(one).values()) == pytest.approx(1.0, abs=1e-5)
        await with_limit(one, "local")
        await trio.sleep(3.0)
        assert shares(one) == {} and not one.hub.shares
        nursery.cancel_scope.cancel()


async def test_the_dead_give_theirs_back_after_their_lease(autojump_clock: trio.abc.Clock) -> None:
    async with Kit(MemoryStore()).running() as one, trio.open_nursery() as nursery:
        await with_limit(one)
        for n, name in enumerate("abc", 1):
            one.limit_shares.heard(await connect(one, name, port=n), 0.5)
        nursery.start_soon(beat, one, "a", "b")
        await trio.sleep(8.0)
        assert shares(one).keys() == {"a", "b", "c"}
        one.hub.close(one.hub.streams["c"])
        await trio.sleep(20.0)
        assert shares(one).keys() == {"a", "b"}
        nursery.cancel_scope.cancel()


async def test_of_two_replicas_one_divides_for_both(autojump_clock: trio.abc.Clock) -> None:
    kit = Kit(MemoryStore())
    async with kit.running() as one, kit.running("r2") as two, trio.open_nursery() as nursery:
        await with_limit(one)
        assert one.limit_shares.divides() and not two.limit_shares.divides()
        ours, theirs = await connect(one, "a", port=1), await connect(two, "b", port=2)
        nursery.start_soon(beat, one, "a")
        nursery.start_soon(beat, two, "b")
        one.limit_shares.heard(ours, 0.5)
        two.limit_shares.heard(theirs, 1.5)
        await trio.sleep(15.0)
        assert shares(one) == shares(two) and sum(shares(one).values()) <= 1.0
        assert shares(two)["b"] == pytest.approx(0.05 + 0.9 * 0.75, rel=0.05)
        assert two.hub.shares["b"].version == one.hub.shares["b"].version
        nursery.cancel_scope.cancel()


async def test_another_one_goes_on_from_where_the_first_ended(autojump_clock: trio.abc.Clock) -> None:
    kit = Kit(MemoryStore())
    async with kit.running("r2") as two, trio.open_nursery() as nursery:
        async with kit.running() as one:
            await with_limit(two)
            for name, demand in (("a", 1.8), ("b", 0.2)):
                stream = await connect(two, name, port=ord(name))
                two.limit_shares.heard(stream, demand)
            nursery.start_soon(beat, two, "a", "b")
            await trio.sleep(15.0)
            before = shares(one)
            assert before["a"] == pytest.approx(0.05 + 0.9 * 0.9, rel=0.05)
        await trio.sleep(20.0)
        assert two.limit_shares.divides() and shares(two) == before
        two.limit_shares.heard(two.hub.streams["a"], 0.2)
        await trio.sleep(12.0)
        assert shares(two)["a"] == pytest.approx(0.5, rel=0.05)
        nursery.cancel_scope.cancel()
