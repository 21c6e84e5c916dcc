from control_plane.state.mirror import State
from control_plane.state.records import ALIVE, INSTANCES, META, Alive, Instance, Meta, encode
from control_plane.store.base import Batch, Entry, Event, View

ONE, TWO = Instance("10.0.0.1", 1), Instance("10.0.0.1", 2)


def entry(key: str, record: object, revision: int, lease: int = 0) -> Entry:
    return Entry(key, encode(record), revision, lease)


def view(revision: int, *entries: Entry) -> View:
    return View(revision, {each.key: each for each in entries})


def test_a_view_and_batches_give_the_same_as_a_later_view() -> None:
    followed, read = State(), State()
    followed.load(view(1, entry("meta", Meta("m", "mesh.local", 0.0), 1), entry("instances/web/a", ONE, 1)))
    followed.apply(Batch(3, (Event("instances/web/a", entry("instances/web/a", TWO, 2)),
                             Event("instances/web/b", entry("instances/web/b", ONE, 3)))))  # fmt: skip
    followed.apply(Batch(4, (Event("instances/web/b", None),)))
    read.load(view(4, entry("meta", Meta("m", "mesh.local", 0.0), 1), entry("instances/web/a", TWO, 2)))
    assert list(followed) == list(read)
    assert followed.revision == read.revision == 4


def test_it_tells_what_changed() -> None:
    state = State()
    assert state.load(view(1, entry("meta", Meta("m", "mesh.local", 0.0), 1))) == [(META, "")]
    assert state.apply(Batch(2, (Event("alive/a", entry("alive/a", Alive("r", 1.0), 2, 7)),))) == [(ALIVE, "a")]
    assert state.table(ALIVE)["a"].lease == 7
    same = Batch(3, (Event("alive/a", entry("alive/a", Alive("r", 1.0), 3, 7)),))
    assert state.apply(same) == []
    assert state.table(ALIVE)["a"].revision == 3
    assert state.apply(Batch(4, (Event("alive/a", None), Event("alive/b", None)))) == [(ALIVE, "a")]


def test_reading_everything_again_tells_only_what_differs() -> None:
    state = State()
    state.load(view(5, entry("instances/web/a", ONE, 3), entry("instances/web/b", ONE, 4)))
    changed = state.load(view(9, entry("instances/web/a", ONE, 3), entry("instances/web/c", TWO, 8)))
    assert changed == [(INSTANCES, "web/b"), (INSTANCES, "web/c")]


def test_what_is_no_record_is_reported_by_key_and_stands_for_nothing() -> None:
    state = State()
    state.load(view(2, Entry("instances/web/a", b"{", 1), Entry("foreign", b"x", 1), entry("instances/web/b", ONE, 2)))
    assert state.problems == {"instances/web/a": "not JSON", "foreign": "not a key of pillion"}
    assert set(state.table(INSTANCES)) == {"web/b"}
    changed = state.apply(
        Batch(3, (Event("instances/web/a", entry("instances/web/a", ONE, 3)), Event("foreign", None)))
    )
    assert changed == [(INSTANCES, "web/a")]
    assert state.problems == {}
    damaged = state.apply(Batch(4, (Event("instances/web/a", Entry("instances/web/a", b"", 4)),)))
    assert damaged == [(INSTANCES, "web/a")]
    assert state.get(INSTANCES, "web/a") is None


def test_that_damage_has_gone_is_told() -> None:
    """Whoever was told that a record cannot be read must hear that it is no more."""
    state = State()
    key = "policy/services/web"
    state.load(View(1, {key: Entry(key, b"?", 1)}))
    assert state.apply(Batch(2, (Event(key, None),))) == [("policy/services/", "web")]
    assert not state.problems


def test_what_is_known_from_elsewhere_stands_in_for_what_cannot_be_read() -> None:
    meta = Meta("m", "mesh.local", 1.0)
    state = State({META: meta})
    assert state.load(View(1, {})) == [] and state.meta is None, "nothing stands in for what is not there"
    assert state.apply(Batch(2, (Event(META, Entry(META, b"?", 2)),))) == [(META, "")]
    assert state.meta == meta and META in state.problems
    assert state.apply(Batch(3, (Event(META, Entry(META, encode(meta), 3)),))) == []
    assert state.meta == meta and not state.problems
