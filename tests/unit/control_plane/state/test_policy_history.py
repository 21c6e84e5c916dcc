"""Changes and documents in the store: whatever the order in which they get there, the policy is that of the changes."""

import base64
import json
import random
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.policy_shelf import Shelf

from control_plane.state.mirror import State
from control_plane.state.policy import Catalogue, history, plan, policy_of, settle
from control_plane.state.records import BYTES_MAX, Change, Document, RecordError, decode, encode
from control_plane.store.base import Conflict, View

NAMES = ("a", "b", "c", "d", "e", "f")


def text_of(services: dict[str, int]) -> str:
    lines = [f"  {name}: {{max_connection_age: {age + 1}s}}\n" for name, age in services.items()]
    return "version: 1\nservices:" + ("\n" + "".join(lines) if lines else " {}\n")


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("apply"), st.dictionaries(st.sampled_from(NAMES), st.integers(0, 3), max_size=6), st.booleans()
        ),
        st.tuples(st.just("rollback"), st.floats(0, 1), st.none()),
        st.tuples(st.just("settle"), st.integers(1, 3), st.none()),
        st.tuples(st.just("restart"), st.none(), st.none()),
        st.tuples(st.just("late"), st.sampled_from(NAMES), st.none()),
    ),
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_whatever_happens_in_between(steps: list[tuple[str, Any, Any]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "DIRECT_MAX", 2)
        patch.setattr(history, "SETTLED_AT_ONCE", 2)
        made = Shelf()
        now: dict[str, int] = {}
        past = [dict(now)]
        for what, how, more in steps:
            if what == "apply":
                made.apply({"mesh.yaml": text_of(how)}, prune=more)
                after = dict(how) if more else now | how
                if after != now:
                    past.append(dict(after))
                now = after
            elif what == "rollback":
                to = int(how * (len(past) - 1))
                made.rollback(to)
                if past[to] != now:
                    past.append(past[to])
                now = past[to]
            elif what == "settle":
                for _ in range(how):
                    step = settle(made.policy)
                    if step is not None:
                        made.commit(step.operations, step.compares)
            elif what == "restart":
                made.state = State()
                made.state.load(View(made.revision, made.entries))
                made.catalogue = Catalogue()
            else:  # a step of settling that was planned before an apply
                step, before = settle(made.policy), made.policy.latest
                made.apply({"mesh.yaml": text_of({how: 9})})
                if now.get(how) != 9:
                    past.append(now | {how: 9})
                now = now | {how: 9}
                if step is not None and made.policy.latest > before:
                    with pytest.raises(Conflict):
                        made.commit(step.operations, step.compares)
            check(made, now, len(past) - 1)
        made.settle()
        check(made, now, len(past) - 1)
        policy = made.policy
        assert {name: held.record for name, held in policy.documents.items()} == {
            name: held.record for name, held in policy.own.items()
        }


def check(made: Shelf, now: dict[str, int], latest: int) -> None:
    policy = made.policy
    assert {name: each.text.split()[-1].rstrip("s}") for name, each in policy.services.items()} == {
        name: str(age + 1) for name, age in now.items()
    }
    assert policy.latest == latest
    again = State()
    again.load(View(made.revision, made.entries))
    assert policy_of(again) == policy
    made.follow()
    fresh = Catalogue()
    fresh.update(policy.defaults, policy.enforced, policy.services)
    assert made.catalogue.snapshot == fresh.snapshot
    assert made.catalogue.broken == fresh.broken == {}


def change_of(count: int, words: int = 20) -> Change:
    noise = random.Random(1)
    documents: dict[str, Document | None] = {
        f"services/s{number}": Document(
            "m.yaml", number, " ".join(str(noise.random()) for _ in range(words)), "a", 1.0, 1
        )
        for number in range(count)
    }
    return Change("ana", 1.0, "message é", dict.fromkeys(documents), documents)


def test_large_records_are_compressed() -> None:
    small, large = change_of(3), change_of(1000)
    assert decode(Change, encode(small)) == small and b"services/s1" in encode(small)
    value = encode(large)
    assert len(value) < 400_000 and json.loads(value).keys() == {"format", "deflated"}
    assert decode(Change, value) == large


@pytest.mark.parametrize(
    "packed",
    [
        "",
        "!",
        7,
        None,
        base64.b64encode(b"nonsense").decode(),
        base64.b64encode(zlib.compress(b"nonsense")).decode(),
        base64.b64encode(zlib.compress(b"[1]")).decode(),
        base64.b64encode(zlib.compress(b'{"author":"x"}')).decode(),
        base64.b64encode(zlib.compress(b'{"format":1,"author":7}')).decode(),
        base64.b64encode(zlib.compress(b'{"format":1,"deflated":""}')).decode(),
        base64.b64encode(encode(change_of(1))).decode(),
        base64.b64encode(zlib.compress(b" " * (BYTES_MAX + 10))).decode(),
        base64.b64encode(zlib.compress(encode(change_of(1)))[:-9]).decode(),
    ],
)
def test_what_is_compressed_badly(packed: object) -> None:
    with pytest.raises(RecordError):
        decode(Change, json.dumps({"format": 1, "deflated": packed}).encode())
