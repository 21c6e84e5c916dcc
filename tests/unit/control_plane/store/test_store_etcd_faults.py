"""What statuses of etcd mean, and the inbox of a watch."""

import pytest
import trio

from control_plane.store.base import Batch, Compacted
from control_plane.store.etcd_faults import Fault, in_words, judge, refusal
from control_plane.store.etcd_watch import INBOX_BATCHES_MAX, INBOX_BYTES_MAX, Inbox


@pytest.mark.parametrize(
    ("code", "details", "fault"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses; last error: …", Fault.UNSENT),
        ("UNAVAILABLE", "etcdserver: no leader", Fault.UNSENT),
        ("UNAVAILABLE", "etcdserver: request timed out", Fault.UNSURE),
        ("UNAVAILABLE", "etcdserver: request timed out, possibly due to previous leader failure", Fault.UNSURE),
        ("UNAVAILABLE", "Socket closed", Fault.UNSURE),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", Fault.UNSURE),
        ("UNKNOWN", "anything", Fault.UNSURE),
        ("CANCELLED", "Channel closed!", Fault.UNSURE),
        ("RESOURCE_EXHAUSTED", "etcdserver: too many requests", Fault.UNSENT),
        ("RESOURCE_EXHAUSTED", "etcdserver: mvcc: database space exceeded", Fault.FULL),
        ("RESOURCE_EXHAUSTED", "grpc: received message larger than max (9 vs. 8)", Fault.TOO_LARGE),
        ("UNAUTHENTICATED", "etcdserver: invalid auth token", Fault.TOKEN),
        ("INVALID_ARGUMENT", "etcdserver: revision of auth store is old", Fault.TOKEN),
        ("INVALID_ARGUMENT", "etcdserver: authentication failed, invalid user ID or password", Fault.REFUSED),
        ("PERMISSION_DENIED", "etcdserver: permission denied", Fault.REFUSED),
        ("UNIMPLEMENTED", "unknown service", Fault.REFUSED),
        ("OUT_OF_RANGE", "etcdserver: mvcc: required revision has been compacted", Fault.COMPACTED),
        ("OUT_OF_RANGE", "etcdserver: mvcc: required revision is a future revision", Fault.FUTURE),
        ("NOT_FOUND", "etcdserver: requested lease not found", Fault.LEASE),
        ("INVALID_ARGUMENT", "etcdserver: request is too large", Fault.TOO_LARGE),
    ],
)
def test_judge(code: str, details: str, fault: Fault) -> None:
    assert judge(code, details) is fault


def test_in_words() -> None:
    assert in_words("DEADLINE_EXCEEDED", "Deadline Exceeded") == "no answer in time"
    assert in_words("UNKNOWN", "") == "unknown"
    assert in_words("UNAVAILABLE", "failed to connect to all addresses; last error: UNKNOWN: a\n b") == "a b"
    assert len(in_words("UNKNOWN", "x" * 1000)) == 200


def test_refusal_says_what_to_do() -> None:
    denied = refusal("PERMISSION_DENIED", "etcdserver: permission denied", "web", "pillion/")
    assert "user 'web'" in denied and "etcdctl role grant-permission ROLE --prefix=true readwrite pillion/" in denied
    assert "demands a user" in refusal("INVALID_ARGUMENT", "etcdserver: user name is empty", "", "pillion/")
    assert "is no etcd 3" in refusal("UNIMPLEMENTED", "unknown service", "", "pillion/")


async def test_inbox(autojump_clock: trio.testing.MockClock) -> None:
    inbox = Inbox()
    for revision in range(1, INBOX_BATCHES_MAX + 1):
        assert not inbox.full
        inbox.put(Batch(revision, ()), 1)
    assert inbox.full
    with trio.move_on_after(1) as scope:
        await inbox.room()
    assert scope.cancelled_caught
    with trio.CancelScope() as scope:
        scope.cancel()
        await anext(inbox)  # takes nothing
    async with trio.open_nursery() as nursery:
        nursery.start_soon(inbox.room)
        found = [(await anext(inbox)).revision for _ in range(INBOX_BATCHES_MAX // 2)]
    inbox.end(Compacted("gone"))
    inbox.end(Compacted("something else"))
    found += [(await anext(inbox)).revision for _ in range(INBOX_BATCHES_MAX // 2)]
    assert found == list(range(1, INBOX_BATCHES_MAX + 1))
    for _ in range(2):
        with pytest.raises(Compacted, match="gone"):
            await anext(inbox)


async def test_inbox_is_bounded_in_bytes() -> None:
    inbox = Inbox()
    inbox.put(Batch(1, ()), INBOX_BYTES_MAX)
    assert inbox.full
    await anext(inbox)
    await inbox.room()
    assert not inbox.full
