from collections.abc import Mapping
from dataclasses import replace

from control_plane.state.mirror import Held
from control_plane.state.records import Instance
from control_plane.state.registry import SUSPECT_S, TTL_S, endpoints, judge, next_due_s
from sidecar.model.snapshot import EndpointSpec

UP = Instance("10.0.0.1", 1)
Instances = dict[str, Held[Instance]]


def held(*names: str, **others: Instance) -> Instances:
    records = dict.fromkeys(names, UP) | others
    return {name: Held(record, 1) for name, record in records.items()}


def ages_s(instances: Instances, now: float) -> Mapping[str, float]:
    return {name: now - each.record.changed for name, each in instances.items()}


def after(instances: Instances, alive: set[str], now: float) -> Instances:
    result = dict(instances)
    for name, record in judge(instances, alive, now, ages_s(instances, now)).items():
        if record is None:
            del result[name]
        else:
            result[name] = Held(record, 1)
    return result


def states(instances: Instances) -> dict[str, str]:
    return {name: each.record.state for name, each in instances.items()}


def test_nothing_is_written_of_what_is_well() -> None:
    assert judge(held("a", "b"), {"a", "b"}, 100.0, {}) == {}


def test_one_of_many_that_goes_is_gone_at_once_and_forgotten_after_a_ttl() -> None:
    gone = after(held("a", "b", "c"), {"a", "b"}, 100.0)
    assert states(gone) == {"a": "up", "b": "up", "c": "gone"}
    assert [each.host for each in endpoints((), gone)] == ["10.0.0.1"] * 2
    assert next_due_s(gone, {"c": 5.0}) == TTL_S - 5.0
    assert judge(gone, {"a", "b"}, 100.0, {"c": TTL_S - 0.1}) == {}
    assert states(after(gone, {"a", "b"}, 100.0 + TTL_S)) == {"a": "up", "b": "up"}


def test_more_than_half_of_three_within_a_ttl_are_suspect_and_stay_for_three_more() -> None:
    first = after(held("a", "b", "c"), {"a", "b"}, 100.0)
    both = after(first, {"a"}, 104.0)
    assert states(both) == {"a": "up", "b": "suspect", "c": "suspect"}
    assert len(endpoints((), both)) == 3
    assert next_due_s(both, {"b": 7.0, "c": 3.0}) == SUSPECT_S - 7.0
    assert next_due_s(held("a"), {}) == float("inf")
    assert states(after(both, {"a"}, 104.0 + SUSPECT_S - 1)) == states(both)
    assert states(after(both, {"a"}, 104.0 + SUSPECT_S)) == {"a": "up"}


def test_more_than_a_ttl_apart_is_no_crowd() -> None:
    first = after(held("a", "b", "c"), {"a", "b"}, 100.0)
    second = after(first, {"a"}, 100.0 + TTL_S + 1)
    assert states(second) == {"a": "up", "b": "gone"}


def test_exactly_half_is_not_more_than_half() -> None:
    assert states(after(held("a", "b", "c", "d"), {"a", "b"}, 1.0)) == {"a": "up", "b": "up", "c": "gone", "d": "gone"}


def test_what_another_clock_has_written_decides_nothing() -> None:
    gone = held("a", "b", c=replace(UP, state="gone", changed=-1000.0))
    assert judge(gone, {"a", "b"}, 100.0, {"c": 1.0}) == {}
    assert judge(gone, {"a", "b"}, 100.0, {"c": TTL_S}) == {"c": None}
    suspect = held("a", "b", c=replace(UP, state="suspect", until=9e9))
    assert judge(suspect, {"a", "b"}, 100.0, {"c": SUSPECT_S}) == {"c": None}


def test_two_are_too_few_to_be_a_crowd() -> None:
    assert states(after(held("a", "b"), set(), 1.0)) == {"a": "gone", "b": "gone"}


def test_the_last_of_a_crowd_is_suspect_too() -> None:
    suspect = after(held("a", "b", "c"), {"a"}, 100.0)
    assert states(after(suspect, set(), 120.0)) == {"a": "suspect", "b": "suspect", "c": "suspect"}


def test_who_comes_back_is_up() -> None:
    suspect = after(held("a", "b", "c"), set(), 100.0)
    back = after(suspect, {"a", "b", "c"}, 110.0)
    assert states(back) == {"a": "up", "b": "up", "c": "up"}
    assert back["a"].record.until == 0.0
    gone = after(held("a"), set(), 100.0)
    assert states(after(gone, {"a"}, 101.0)) == {"a": "up"}


def test_endpoints_are_those_of_the_policy_and_those_that_registered() -> None:
    static = EndpointSpec("192.0.2.1", 80)
    sick = replace(UP, port=2, healthy=False, labels={"version": "2"}, weight=3, zone="eu-1a", priority=1)
    found = endpoints((static,), held("z", a=sick))
    assert found == (
        static,
        EndpointSpec("10.0.0.1", 2, {"version": "2"}, 3, healthy=False, zone="eu-1a", priority=1),
        EndpointSpec("10.0.0.1", 1),
    )
