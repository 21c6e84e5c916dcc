"""What every store must do: one suite, run on each implementation.

    @pytest.mark.parametrize("check", CHECKS, ids=name_of)
    async def test_store(check: Check, store: Store) -> None:
        await check(store)

Each check is given a store that is open and empty (its own prefix will do: others may write to the same database, so
revisions are only ever compared, never counted). `check_closed`, in CHECKS too, closes it. Each has a time limit.
"""

import functools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest
import trio

from control_plane.store.base import (
    KEY_LENGTH_MAX,
    OPERATIONS_MAX,
    VALUE_BYTES_MAX,
    Batch,
    Compacted,
    Compare,
    Conflict,
    Delete,
    Entry,
    Event,
    Put,
    Store,
    StoreError,
)

LIMIT_S = 60.0
LEASE_TTL_S = 2  # the shortest that etcd grants with its default election timeout
LEASE_LATE_S = 8.0  # how long after its TTL a lease may live on

Check = Callable[[Store], Awaitable[None]]
CHECKS: list[Check] = []


def name_of(check: object) -> str:
    return getattr(check, "__name__", "check").removeprefix("check_")


def _check(function: Check) -> Check:
    @functools.wraps(function)
    async def limited(store: Store) -> None:
        with trio.fail_after(LIMIT_S):
            await function(store)

    CHECKS.append(limited)
    return limited


# -- helpers, of use to tests of one implementation too


async def put(store: Store, key: str, value: bytes = b"x", lease: int = 0) -> int:
    return await store.commit([Put(key, value, lease)])


async def revision_of(store: Store) -> int:
    return await store.commit([])


async def collect(batches: AsyncIterator[Batch], until: int) -> list[Batch]:
    """Batches of a watch until one reaches the revision `until`; that they are in order is checked on the way."""
    found: list[Batch] = []
    while not found or found[-1].revision < until:
        batch = await anext(batches)
        assert not found or batch.revision > found[-1].revision, "batches out of order"
        found.append(batch)
    return found


async def events_after(store: Store, after: int, until: int, prefix: str = "") -> list[Event]:
    async with store.watch(prefix, after) as batches:
        return [event for batch in await collect(batches, until) for event in batch.events]


def apply(entries: dict[str, Entry], events: Sequence[Event]) -> None:
    for event in events:
        if event.entry is None:
            entries.pop(event.key, None)
        else:
            assert event.entry.key == event.key
            entries[event.key] = event.entry


async def gone(store: Store, key: str, limit_s: float) -> None:
    """Wait until there is no such key."""
    with trio.fail_after(limit_s):
        while await store.get(key) is not None:  # noqa: ASYNC110 (the store is the one that knows)
            await trio.sleep(0.05)


# -- reading and writing


@_check
async def check_get_and_put(store: Store) -> None:
    assert await store.get("a") is None
    first = await put(store, "a", b"one")
    assert await store.get("a") == Entry("a", b"one", first)
    second = await put(store, "a", b"")
    assert second > first
    assert await store.get("a") == Entry("a", b"", second)
    binary = bytes(range(256)) * 3
    third = await put(store, "b/c.d:e-f_%~", binary)
    assert await store.get("b/c.d:e-f_%~") == Entry("b/c.d:e-f_%~", binary, third)
    assert await store.get("a") == Entry("a", b"", second)


@_check
async def check_read(store: Store) -> None:
    empty = await store.read()
    assert not empty.entries
    revisions = {key: await put(store, key, key.encode()) for key in ("a", "a/", "a/b", "a/c", "a0", "b/~", "~")}
    view = await store.read("a/")
    assert dict(view.entries) == {key: Entry(key, key.encode(), revisions[key]) for key in ("a/", "a/b", "a/c")}
    assert view.revision >= max(revisions.values()) > empty.revision
    assert set((await store.read("a")).entries) == {"a", "a/", "a/b", "a/c", "a0"}
    assert set((await store.read("~")).entries) == {"~"}
    assert set((await store.read("nothing/")).entries) == set()
    assert dict((await store.read()).entries) == {key: Entry(key, key.encode(), at) for key, at in revisions.items()}


@_check
async def check_delete(store: Store) -> None:
    await store.commit([Put("a", b"1"), Put("b", b"2")])
    at = await store.commit([Delete("a")])
    assert await store.get("a") is None
    assert set((await store.read()).entries) == {"b"}
    again = await store.commit([Delete("a"), Delete("never-was")])  # no error, and no event
    assert again >= at
    last = await put(store, "a", b"3")
    assert [(event.key, event.entry and event.entry.value) for event in await events_after(store, at, last)] == [
        ("a", b"3")
    ]


# -- transactions


@_check
async def check_transaction_is_one(store: Store) -> None:
    before = await put(store, "old")
    at = await store.commit([Put("a", b"1"), Put("b", b"2"), Delete("old")])
    assert at > before
    view = await store.read()
    assert dict(view.entries) == {"a": Entry("a", b"1", at), "b": Entry("b", b"2", at)}


@_check
async def check_compare(store: Store) -> None:
    created = await store.commit([Put("a", b"1")], [Compare("a", 0)])
    with pytest.raises(Conflict) as caught:
        await store.commit([Put("a", b"2"), Put("b", b"2")], [Compare("a", 0)])
    assert dict(caught.value.found) == {"a": Entry("a", b"1", created)}
    assert await store.get("b") is None
    changed = await store.commit([Put("a", b"3")], [Compare("a", created)])
    assert await store.get("a") == Entry("a", b"3", changed)
    with pytest.raises(Conflict):
        await store.commit([Delete("a")], [Compare("a", created)])
    deleted = await store.commit([Delete("a")], [Compare("a", changed)])
    with pytest.raises(Conflict) as caught:
        await store.commit([Put("a", b"4")], [Compare("a", changed)])
    assert dict(caught.value.found) == {"a": None}
    assert await store.commit([Put("a", b"5")], [Compare("a", 0)]) > deleted


@_check
async def check_compare_of_other_keys(store: Store) -> None:
    a, b = await put(store, "a", b"a"), await put(store, "b", b"b")
    with pytest.raises(Conflict) as caught:
        await store.commit([Put("c", b"")], [Compare("a", a), Compare("b", a), Compare("absent", 0)])
    assert dict(caught.value.found) == {"b": Entry("b", b"b", b)}  # only what did not hold
    assert await store.get("c") is None
    assert await store.commit([Put("c", b"")], [Compare("a", a), Compare("b", b), Compare("absent", 0)]) > b
    # compares alone: a question
    assert await store.commit([], [Compare("a", a)]) >= b
    with pytest.raises(Conflict):
        await store.commit([], [Compare("a", a), Compare("b", 0)])


@_check
async def check_empty_transaction(store: Store) -> None:
    at = await put(store, "a")
    assert await store.commit([]) >= at
    assert (await store.get("a")) == Entry("a", b"x", at)


@_check
async def check_limits(store: Store) -> None:
    before = await put(store, "a")
    too_many = [Put(f"k/{number}", b"") for number in range(OPERATIONS_MAX + 1)]
    wrong: list[tuple[list[Put | Delete], list[Compare]]] = [
        (list(too_many), []),
        (list(too_many[:-1]), [Compare("a", before)]),
        ([Put("k", b"1"), Put("k", b"2")], []),
        ([Put("k", b"1"), Delete("k")], []),
        ([Put("k", bytes(VALUE_BYTES_MAX + 1))], []),
        ([Put("", b"")], []),
        ([Put("with space", b"")], []),
        ([Put("naïve", b"")], []),
        ([Put("a\0b", b"")], []),
        ([Put("x" * (KEY_LENGTH_MAX + 1), b"")], []),
        ([Put("k", b"1")], [Compare("", 0)]),
        ([Put("k", b"1"), Delete("\n")], []),
    ]
    for operations, compares in wrong:
        with pytest.raises(ValueError):
            await store.commit(operations, compares)
    assert set((await store.read()).entries) == {"a"}
    assert await store.commit(too_many[:-1]) > before
    assert len((await store.read("k/")).entries) == OPERATIONS_MAX
    big = random.Random(1).randbytes(VALUE_BYTES_MAX)
    at = await store.commit([Put("x" * KEY_LENGTH_MAX, big)])
    assert await store.get("x" * KEY_LENGTH_MAX) == Entry("x" * KEY_LENGTH_MAX, big, at)


@_check
async def check_many_at_once(store: Store) -> None:
    """Transactions that wait at the same moment keep their own revisions and their own conflicts."""
    revisions: list[int] = []
    winners: list[int] = []
    losers: list[Entry | None] = []

    async def write(number: int) -> None:
        revisions.append(await put(store, f"k/{number}", str(number).encode()))

    async def race(number: int) -> None:
        try:
            revisions.append(await store.commit([Put("race", str(number).encode())], [Compare("race", 0)]))
            winners.append(number)
        except Conflict as conflict:
            losers.append(conflict.found["race"])

    async with trio.open_nursery() as nursery:
        for number in range(40):
            nursery.start_soon(write, number)
            if number % 2:
                nursery.start_soon(race, number)
    assert len(set(revisions)) == len(revisions) == 41
    assert len(winners) == 1 and len(losers) == 19
    entry = await store.get("race")
    assert entry is not None and entry.value == str(winners[0]).encode()
    assert losers == [entry] * 19
    entries = (await store.read("k/")).entries
    assert {(each.key, each.value) for each in entries.values()} == {(f"k/{n}", str(n).encode()) for n in range(40)}
    assert {each.revision for each in entries.values()} | {entry.revision} == set(revisions)


@_check
async def check_counter(store: Store) -> None:
    """No increment is lost between several that read, compare and set."""

    async def increment(times: int) -> None:
        while times:
            entry = await store.get("counter")
            value = str(int(entry.value) + 1 if entry else 1).encode()
            try:
                await store.commit([Put("counter", value)], [Compare("counter", entry.revision if entry else 0)])
            except Conflict:
                continue
            times -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(increment, 10)
    entry = await store.get("counter")
    assert entry is not None and entry.value == b"40"


# -- watches


@_check
async def check_watch(store: Store) -> None:
    start = await put(store, "a/before")
    async with store.watch("a/", start) as batches:
        one = await put(store, "a/1", b"one")
        await put(store, "b/1", b"not ours")
        two = await store.commit([Put("a/2", b"two"), Put("b/2", b""), Delete("a/1"), Put("a/3", b"three")])
        await store.commit([Delete("b/1")])
        three = await store.commit([Delete("a/2")])
        events = [event for batch in await collect(batches, three) for event in batch.events]
    state: dict[str, Entry] = {}
    apply(state, events)
    assert events[0] == Event("a/1", Entry("a/1", b"one", one))
    assert sorted(event.key for event in events[1:4]) == ["a/1", "a/2", "a/3"]
    assert events[4:] == [Event("a/2", None)]
    assert state == {"a/3": Entry("a/3", b"three", two)}


@_check
async def check_watch_never_splits(store: Store) -> None:
    start = await revision_of(store)
    sent = {}
    for number in range(20):
        sent[await store.commit([Put(f"{key}/{number}", b"") for key in "abcde"])] = number
    last = max(sent)
    async with store.watch("", start) as batches:
        found = await collect(batches, last)
    at = start
    for batch in found:
        inside = [event.entry.revision for event in batch.events if event.entry]
        assert all(at < revision <= batch.revision for revision in inside)
        assert inside == sorted(inside)
        assert all(inside.count(revision) == 5 for revision in inside)
        at = batch.revision
    assert sum(len(batch.events) for batch in found) == 100


@_check
async def check_watch_waits(store: Store) -> None:
    """Events come by themselves, soon after the commit, to each watcher."""
    start = await revision_of(store)
    seen: list[int] = []

    async def reader(prefix: str, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with store.watch(prefix, start) as batches:
            task_status.started()
            async for batch in batches:
                seen.append(batch.revision)
                return

    async with trio.open_nursery() as nursery:
        for prefix in ("", "a", "a/", "a/b"):
            await nursery.start(reader, prefix)
        await trio.sleep(0.2)
        assert not seen
        at = await put(store, "a/b")
        with trio.fail_after(5):
            while len(seen) < 4:  # noqa: ASYNC110
                await trio.sleep(0.01)
    assert seen == [at] * 4


@_check
async def check_watch_from_a_view(store: Store) -> None:
    """A view and a watch after its revision are together everything: what a control plane relies on."""
    chance = random.Random(3)
    done = trio.Event()

    async def writer(name: str) -> None:
        for number in range(40):
            key = f"k/{chance.randrange(12)}"
            if chance.random() < 0.3:
                await store.commit([Delete(key), Put(f"last/{name}", str(number).encode())])
            else:
                await store.commit([Put(key, f"{name}{number}".encode()), Put(f"last/{name}", str(number).encode())])

    async def writers() -> None:
        async with trio.open_nursery() as nursery:
            for name in "ab":
                nursery.start_soon(writer, name)
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(writers)
        while True:
            finished = done.is_set()
            view = await store.read()
            state = dict(view.entries)
            at = view.revision
            target = await put(store, "mark", b"")
            while at < target:  # interrupted again and again, and resumed
                async with store.watch("", at) as batches:
                    batch = await anext(batches)
                    assert batch.revision > at
                    apply(state, batch.events)
                    at = batch.revision
            if finished:
                break
    assert state == dict((await store.read()).entries)


@_check
async def check_resume_without_a_gap(store: Store) -> None:
    """A reader that comes and goes at random sees each change once, in order."""
    chance = random.Random(5)
    start = at = await revision_of(store)
    sent: list[int] = []
    seen: list[int] = []

    async def writer() -> None:
        for number in range(150):
            sent.append(await put(store, f"k/{number % 7}", str(number).encode()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer)
        while len(seen) < 150:
            async with store.watch("k/", at) as batches:
                for _ in range(chance.randrange(1, 6)):
                    with trio.move_on_after(chance.choice((0.001, 1.0))):
                        batch = await anext(batches)
                        seen += [int(event.entry.value) for event in batch.events if event.entry]
                        at = batch.revision
    assert seen == list(range(150))
    assert sent == sorted(set(sent)) and sent[0] > start


@_check
async def check_watch_is_left_at_once(store: Store) -> None:
    for after in (await revision_of(store), 10**12):  # one of the future waits too
        async with store.watch("", after) as batches:
            with trio.move_on_after(0.05) as scope:
                await anext(batches)
            assert scope.cancelled_caught
        with trio.move_on_after(0.05) as scope:
            async with store.watch("", after) as batches:
                async for _ in batches:
                    raise AssertionError("nothing happened")
        assert scope.cancelled_caught
    assert await put(store, "a")


# -- leases


@_check
async def check_lease_ends(store: Store) -> None:
    lease = await store.grant(LEASE_TTL_S)
    assert lease
    at = await store.commit([Put("a", b"1", lease), Put("b", b"2", lease), Put("stays", b"")])
    assert await store.get("a") == Entry("a", b"1", at, lease)
    assert (await store.read("b")).entries["b"].lease == lease
    async with store.watch("", at) as batches:
        begun = trio.current_time()
        with trio.fail_after(LEASE_TTL_S + LEASE_LATE_S):
            batch = await anext(batches)
        assert trio.current_time() - begun > LEASE_TTL_S / 2
    assert {event.key: event.entry for event in batch.events} == {"a": None, "b": None}  # one revision
    assert set((await store.read()).entries) == {"stays"}
    assert await store.keep_alive([lease]) == {lease}
    with pytest.raises(ValueError):
        await store.commit([Put("a", b"1", lease)])
    assert await store.get("a") is None


@_check
async def check_keep_alive(store: Store) -> None:
    kept, left = await store.grant(LEASE_TTL_S), await store.grant(LEASE_TTL_S)
    await store.commit([Put("kept", b"", kept), Put("left", b"", left)])
    with trio.fail_after(2 * LEASE_TTL_S + LEASE_LATE_S):
        while await store.get("left") is not None:
            assert await store.keep_alive([kept]) == frozenset()
            await trio.sleep(0.2)
    assert await store.get("kept") is not None
    assert await store.keep_alive([kept, left]) == {left}
    assert await store.keep_alive([]) == frozenset()
    await gone(store, "kept", LEASE_TTL_S + LEASE_LATE_S)


@_check
async def check_revoke(store: Store) -> None:
    lease, other = await store.grant(60), await store.grant(60)
    assert lease != other
    await store.commit([Put("a", b"", lease), Put("b", b"", lease)])
    await store.commit([Put("c", b"", other), Put("moved", b"", lease), Put("freed", b"", lease)])
    at = await store.commit([Put("moved", b"", other), Put("freed", b"")])
    async with store.watch("", at) as batches:
        await store.revoke(lease)
        batch = await anext(batches)
    assert {event.key: event.entry for event in batch.events} == {"a": None, "b": None}
    assert set((await store.read()).entries) == {"c", "moved", "freed"}
    await store.revoke(lease)  # no error
    assert await store.keep_alive([lease, other]) == {lease}
    with pytest.raises(ValueError):
        await put(store, "a", b"", lease)
    await store.revoke(other)
    assert set((await store.read()).entries) == {"freed"}


@_check
async def check_lease_nobody_has(store: Store) -> None:
    for lease in (4711, 2**62):
        assert await store.keep_alive([lease]) == {lease}
        await store.revoke(lease)
        with pytest.raises(ValueError):
            await store.commit([Put("a", b"", lease), Put("b", b"")])
    for ttl_s in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError):
            await store.grant(ttl_s)
    assert not (await store.read()).entries


@_check
async def check_deleted_keys_leave_their_lease(store: Store) -> None:
    lease = await store.grant(60)
    await put(store, "a", b"leased", lease)
    await store.commit([Delete("a")])
    at = await put(store, "a", b"free")
    await store.revoke(lease)
    assert await store.get("a") == Entry("a", b"free", at)


# -- compaction


@_check
async def check_compact(store: Store) -> None:
    start = await put(store, "a", b"0")
    for number in range(1, 10):
        middle = await put(store, "a", str(number).encode())
        await put(store, f"b/{number}")
    await store.commit([Delete("b/1")])
    last = await put(store, "c")
    before = dict((await store.read()).entries)
    await store.compact(middle)
    assert dict((await store.read()).entries) == before
    with pytest.raises(Compacted):
        await events_after(store, start, last)
    assert [(event.key, event.entry is None) for event in await events_after(store, middle, last)] == [
        ("b/9", False),
        ("b/1", True),
        ("c", False),
    ]
    assert before["a"].revision == middle
    await store.commit([Put("a", b"compared")], [Compare("a", middle)])  # an old revision still compares


@_check
async def check_compact_again(store: Store) -> None:
    old = await put(store, "a")
    last = await put(store, "a")
    await store.compact(last)
    await store.compact(last)
    await store.compact(old)
    with pytest.raises(ValueError):
        await store.compact(last + 10**6)
    assert [event.key for event in await events_after(store, last, await put(store, "b"))] == ["b"]
    with pytest.raises(Compacted):
        await events_after(store, old - 1, last)


@_check
async def check_watch_lives_through_compaction(store: Store) -> None:
    """One that is up to date notices nothing, whatever its prefix."""
    at = await put(store, "a")
    async with store.watch("quiet/", at) as batches:
        with trio.move_on_after(0.1):
            await anext(batches)
        for _ in range(5):
            last = await put(store, "a")
        with trio.move_on_after(0.3):
            await anext(batches)
        await store.compact(last)
        end = await put(store, "quiet/a")
        assert [event.key for batch in await collect(batches, end) for event in batch.events] == ["quiet/a"]


# -- the rest


@_check
async def check_cancelled_commits(store: Store) -> None:
    """Each happened or did not, as a whole, and the store works on."""
    for number in range(20):
        with trio.move_on_after(number * 0.0005):
            await store.commit([Put(f"{number}/a", b""), Put(f"{number}/b", b"")])
    await put(store, "after")
    keys = set((await store.read()).entries)
    assert "after" in keys
    assert all((f"{number}/a" in keys) == (f"{number}/b" in keys) for number in range(20))


@_check
async def check_description(store: Store) -> None:
    assert store.description and store.description.isprintable()


@_check
async def check_closed(store: Store) -> None:
    at = await put(store, "a")
    ended = trio.Event()

    async def reader(task_status: trio.TaskStatus[None]) -> None:
        async with store.watch("", at) as batches:
            task_status.started()
            with pytest.raises(StoreError):
                await anext(batches)
        ended.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(reader)
        await trio.sleep(0.1)
        await store.aclose()
        await ended.wait()
    await store.aclose()
    with pytest.raises(StoreError):
        await put(store, "b")
    with pytest.raises(StoreError):
        await store.get("a")
    with pytest.raises(StoreError):
        await store.read()
    with pytest.raises(StoreError):
        await store.grant(10)
