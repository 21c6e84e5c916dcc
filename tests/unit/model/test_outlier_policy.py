"""`outliers` of a policy file: when ejection is on, what holds then, where it comes from, and what can never act."""

import pytest

from sidecar.model.canonical import snapshot_from_json, snapshot_to_json
from sidecar.model.load import load_texts
from sidecar.model.snapshot import Outliers, Service


def load(text: str) -> tuple[Service, list[str]]:
    """The service `web`, and the messages of the lint."""
    loaded = load_texts({"mesh.yaml": f"version: 1\n{text}\n"})
    assert loaded.snapshot is not None, [problem.message for problem in loaded.errors]
    return loaded.snapshot.services["web"], [problem.message for problem in loaded.problems]


def web(outliers: str, addresses: int = 0, more: str = "") -> tuple[Service, list[str]]:
    at = ", ".join(f"10.0.0.{number + 1}:80" for number in range(addresses))
    return load(f"services:\n  web: {{outliers: {outliers}{f', address: [{at}]' if at else ''}}}\n{more}")


@pytest.mark.parametrize(
    ("outliers", "expected"),
    [
        ("{panic_threshold: 30%}", None),
        ("{stdev_factor: 1.9}", Outliers()),  # what is built in, and yet stated
        ("{interval: 5s}", Outliers(interval_s=5.0)),
        ("{eject_for: 1m}", Outliers(eject_for_s=60.0)),
        ("{max_eject_for: 1m}", Outliers(max_eject_for_s=60.0)),
        ("{max_ejected: 25%}", Outliers(max_ejected=25.0)),
        ("{stdev_factor: 2, interval: 1s, eject_for: 2s, max_eject_for: 3s, max_ejected: 4%}",
         Outliers(2.0, 1.0, 2.0, 3.0, 4.0)),
    ],
)  # fmt: skip
def test_on_when_any_key_of_ejection_is_stated(outliers: str, expected: Outliers | None) -> None:
    service, problems = web(outliers)
    assert service.outliers == expected and problems == []


def test_an_empty_map_switches_nothing_on_and_that_is_said() -> None:
    service, problems = web("{}")
    assert service.outliers is None and problems == ["`outliers: {}` says nothing: one of its keys switches it on"]


def test_null_restores_what_is_built_in_which_is_off() -> None:
    defaults = "defaults: {outliers: {interval: 5s, eject_for: 1m}}\nservices: "
    assert load(f"{defaults}{{web: {{}}}}")[0].outliers == Outliers(interval_s=5.0, eject_for_s=60.0)
    assert load(f"{defaults}{{web: {{outliers: null}}}}")[0].outliers is None
    assert load(f"{defaults}{{web: {{outliers: {{interval: null}}}}}}")[0].outliers == Outliers(eject_for_s=60.0)


def test_enforced_turns_it_on_and_a_bound_does_not() -> None:
    assert web("{}", more="enforced: {outliers: {interval: 5s}}")[0].outliers == Outliers(interval_s=5.0)
    bound = "enforced: {outliers: {eject_for: {max: 20s}}}"
    assert web("{}", more=bound)[0].outliers is None
    assert web("{interval: 5s}", more=bound)[0].outliers == Outliers(interval_s=5.0, eject_for_s=20.0)


def test_where_it_comes_from_and_that_it_is_off() -> None:
    origins = load("defaults: {outliers: {interval: 5s}}\nservices: {web: {outliers: {max_ejected: 30%}}}")[
        0
    ].provenance
    shown = {key: (origins[f"outliers.{key}"].value, origins[f"outliers.{key}"].level.value)
             for key in ("interval", "max_ejected", "stdev_factor", "panic_threshold")}  # fmt: skip
    assert shown == {
        "interval": ("5s", "defaults"),
        "max_ejected": ("30%", "service"),
        "stdev_factor": ("1.9", "built-in"),
        "panic_threshold": ("50%", "built-in"),
    }
    off = web("{panic_threshold: 30%}")[0].provenance
    assert off["outliers.stdev_factor"].value == "off" and off["outliers.panic_threshold"].value == "30%"


def test_it_survives_json() -> None:
    loaded = load_texts({"mesh.yaml": "version: 1\nservices: {web: {outliers: {interval: 5s}}}\n"})
    assert loaded.snapshot is not None
    assert snapshot_from_json(snapshot_to_json(loaded.snapshot)) == loaded.snapshot


@pytest.mark.parametrize(
    ("outliers", "addresses", "message"),
    [
        ("{interval: 5s}", 4, "`outliers` of `web` never act: it has 4 addresses, and fewer than 5 are not compared"),
        ("{interval: 5s}", 1, "`outliers` of `web` never act: it has one address, and fewer than 5 are not compared"),
        ("{stdev_factor: 2}", 5,
         "`outliers` of `web` never act: of 5 endpoints none can be 2 standard deviations below the mean"),
        ("{interval: 5s, max_ejected: 0%}", 6, "`outliers` of `web` never act: `max_ejected` is 0%"),
        ("{eject_for: 10m}", 6, "`outliers.eject_for` (10m) never holds: `max_eject_for` is 5m"),
        ("{max_ejected: 51%}", 6,
         "`outliers.max_ejected` (51%) may bring panic, in which ejected endpoints serve again"),
    ],
)  # fmt: skip
def test_what_can_never_act(outliers: str, addresses: int, message: str) -> None:
    assert web(outliers, addresses)[1] == [message]


@pytest.mark.parametrize(
    ("outliers", "addresses"),
    [
        ("{interval: 5s}", 5),
        ("{interval: 5s}", 0),  # they register: nobody knows how many there will be
        ("{stdev_factor: 1.99}", 5),
        ("{stdev_factor: 2}", 6),
        ("{max_ejected: 1%}", 6),  # one at least
        ("{max_ejected: 60%, panic_threshold: 40%}", 6),
        ("{max_ejected: 100%, panic_threshold: 0%}", 6),
    ],
)
def test_what_can_act_is_not_warned_of(outliers: str, addresses: int) -> None:
    assert web(outliers, addresses)[1] == []


def test_to_switch_it_off_for_one_service_is_no_mistake() -> None:
    text = (
        "defaults: {outliers: {interval: 5s}}\nservices: {web: {outliers: {max_ejected: 0%}, address: [10.0.0.1:80]}}"
    )
    service, problems = load(text)
    assert service.outliers == Outliers(interval_s=5.0, max_ejected=0.0) and problems == []


def test_every_wrong_value_at_once() -> None:
    text = "{stdev_factor: -1, interval: 10, eject_for: none, max_ejected: 120%, factor: 1}"
    loaded = load_texts({"mesh.yaml": f"version: 1\nservices: {{web: {{outliers: {text}}}}}\n"})
    assert [problem.code for problem in loaded.errors] == ["P0115", "P0106", "P0106", "P0115", "P0104"]
