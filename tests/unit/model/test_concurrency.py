"""`concurrency` in a policy file: off until it is turned on, merged, and warned of where it never acts."""

from dataclasses import replace

import pytest

from sidecar.model.load import load_texts
from sidecar.model.snapshot import BUILT_IN, Concurrency, Priority, Service, ValueMatch


def loaded(service: str, rest: str = "") -> tuple[Service, list[str]]:
    found = load_texts({"mesh.yaml": f"version: 1\nservices:\n  web: {service}\n{rest}"})
    assert found.snapshot is not None, found.problems
    return found.snapshot.services["web"], [str(each.message) for each in found.problems]


def policy(service: str, rest: str = "") -> Concurrency | None:
    found = loaded(service, rest)[0].concurrency
    return found and replace(found, source=BUILT_IN)


def test_it_is_off_until_adaptive_or_max_turns_it_on() -> None:
    assert policy("{}") is None
    assert policy("{concurrency: {adaptive: true}}") == Concurrency(adaptive=True)
    assert policy("{concurrency: {max: 20}}") == Concurrency(most=20)


def test_one_line_for_every_service_which_one_may_undo() -> None:
    line = "defaults: {concurrency: {adaptive: true}}\n"
    assert policy("{concurrency: {queue: 5}}", line) == Concurrency(adaptive=True, queue=5)
    assert policy("{concurrency: {adaptive: false}}", line) is None


def test_classes_keep_their_order() -> None:
    classes = "[{class: a, from: [web]}, {class: default}, {class: b, headers: {x-p: low}}]"
    found = policy(f"{{concurrency: {{max: 1, priorities: {classes}}}}}")
    assert found is not None
    low = (("x-p", ValueMatch("exact", "low")),)
    assert found.priorities == (Priority("a", frozenset({"web"})), Priority("default"), Priority("b", headers=low))


@pytest.mark.parametrize(
    ("stated", "warning"),
    [
        ("{queue: 5}", "neither `adaptive` nor `max` turns it on"),
        ("{max: 5, min: 4}", "the limit is not adaptive"),
        ("{adaptive: true, min: 5, max: 5}", "leaves no room"),
        ("{max: 5, priorities: [{class: a}]}", "takes no request"),
        ("{max: 5, priorities: [{class: a, from: [web]}, {class: a, from: [web]}]}", "stands twice"),
        ("{max: 5, priorities: [{class: a, from: [nobody]}]}", "is no service of this policy"),
    ],
)
def test_what_never_acts_is_warned_of(stated: str, warning: str) -> None:
    problems = loaded(f"{{concurrency: {stated}}}")[1]
    assert len(problems) == 1 and warning in problems[0]
