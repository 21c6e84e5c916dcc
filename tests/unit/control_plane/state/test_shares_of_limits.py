"""Dividing a global rate limit: exact numbers, and what must hold whatever is reported."""

import random
from itertools import pairwise

import pytest

from control_plane.state.shares_of_limits import FLOOR, STILL, divide


def rounds(
    held: dict[str, float], demands: dict[str, float], instances: list[str], count: int = 10
) -> list[dict[str, float]]:
    found = []
    for _ in range(count):
        held = divide(held, demands, instances)
        found.append(held)
    return found


def test_it_begins_with_equal_shares_and_goes_half_of_the_way_in_each_round() -> None:
    demands = {"a": 1.6, "b": 0.3, "c": 0.1}
    assert divide({}, {}, ["a", "b", "c"]) == {"a": 0.333333, "b": 0.333333, "c": 0.333333}
    told = rounds({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, demands, ["a", "b", "c"])
    assert told[0] == {"a": 0.543333, "b": 0.250833, "c": 0.205833}
    aim = 1 / 30 + 0.9 * 0.8
    assert [round(aim - each["a"], 2) for each in told[:4]] == [0.21, 0.11, 0.05, 0.03]
    assert told[5] == told[6] == told[9]  # still
    assert told[9]["a"] == pytest.approx(aim, rel=STILL)


def test_a_newcomer_begins_with_an_equal_share_and_the_dead_leave_theirs() -> None:
    held = {"a": 0.6, "b": 0.4}
    three = divide(held, {}, ["a", "b", "new"])
    assert three["new"] == pytest.approx(1 / 3, abs=1e-3) and three["a"] > three["b"] > FLOOR / 3
    assert sum(three.values()) == pytest.approx(1.0, abs=1e-5)
    assert divide(three, {}, ["a"]) == {"a": 1.0}
    assert divide(three, {}, []) == {}


def test_without_demands_shares_stay_and_without_any_demand_they_become_equal() -> None:
    held = {"a": 0.8, "b": 0.2}
    assert divide(held, {}, ["a", "b"]) == held
    assert rounds(held, {"a": 0.0, "b": 0.0}, ["a", "b"])[-1]["a"] == pytest.approx(0.5, abs=STILL / 2)


def test_whose_demand_is_unknown_keeps_its_weight() -> None:
    after = rounds({"a": 0.5, "b": 0.25, "c": 0.25}, {"b": 3.0, "c": 1.0}, ["a", "b", "c"])[-1]
    assert after["a"] == pytest.approx(0.5, abs=1e-3)
    assert after["b"] > 2 * after["c"]


@pytest.mark.parametrize("seed", range(20))
def test_shares_never_sum_to_more_than_one_and_nobody_is_starved(seed: int) -> None:
    rnd = random.Random(seed)
    held: dict[str, float] = {}
    for _ in range(60):
        instances = [f"i{n}" for n in range(rnd.choice([1, 2, 3, 10, 200])) if rnd.random() < 0.8] or ["only"]
        demands = {each: rnd.choice([0.0, rnd.random(), 1e6]) for each in instances if rnd.random() < 0.8}
        held = divide(held, demands, instances)
        assert held.keys() == set(instances)
        assert 1.0 - len(instances) * 2e-6 <= sum(held.values()) <= 1.0 + 1e-9
        assert min(held.values()) >= FLOOR / len(instances) - 1e-6


@pytest.mark.parametrize("seed", range(10))
def test_steady_demand_gives_shares_that_stand_still_and_nothing_swings(seed: int) -> None:
    rnd = random.Random(seed)
    instances = [f"i{n}" for n in range(rnd.choice([2, 5, 50]))]
    demands = {each: rnd.random() ** 4 for each in instances}
    begun = {each: rnd.random() for each in instances}
    begun = {each: value / sum(begun.values()) for each, value in begun.items()}
    told = rounds(divide(begun, {}, instances), demands, instances, 12)
    assert told[8] == told[11]
    for each in instances:
        steps = [after[each] - before[each] for before, after in pairwise(told)]
        assert all(step >= -2e-6 for step in steps) or all(step <= 2e-6 for step in steps)


def test_equal_input_gives_equal_output_whatever_its_order() -> None:
    demands = {f"i{n}": n / 7 for n in range(20)}
    forth = divide({}, demands, sorted(demands))
    assert divide({}, dict(reversed(demands.items())), sorted(demands, reverse=True)) == forth
