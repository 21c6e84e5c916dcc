"""A balancer of somebody's own can lose its order, never a request."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from sidecar.api import Balancer, Endpoint
from sidecar.model.snapshot import Balancing, Service
from sidecar.model.source import Source
from sidecar.plugins.finding import PluginError, available
from sidecar.plugins.guard import Guard
from sidecar.plugins.least_request import LeastRequest
from sidecar.plugins.loader import BALANCERS, Loader
from sidecar.testing import make_endpoints

# mypy: disable-error-code="no-untyped-def"

PLACE = Source("mesh.yaml", 3, 5)


class Moody(Balancer):
    """Does what `config` says."""

    def arrange(self, endpoints):
        if self.config == "arrange":
            raise RuntimeError("arrange")
        return self.pick

    def pick(self, candidates, key, now, rnd):
        if self.config == "pick":
            raise RuntimeError("pick")
        return {"none": None, "stranger": object()}.get(self.config, candidates[-1])

    def began(self, endpoint: Endpoint, now: float) -> None:
        raise RuntimeError("began")

    def ended(self, endpoint: Endpoint, result: Any, latency_s: float, now: float) -> None:
        raise RuntimeError("ended")

    def describe(self, endpoint: Endpoint, now: float) -> Mapping[str, Any]:
        if self.config == "pick":
            raise RuntimeError("describe")
        return {"list": [1], "number": 2.5}


def guarded(mood: str, candidates: Sequence[Any]) -> tuple[Any, list[str]]:
    said: list[str] = []
    pick = Guard(Moody(mood), said.append).arrange(tuple(candidates))
    return pick(candidates, None, 0.0, lambda: 0.0), said


@pytest.mark.parametrize(
    ("mood", "says"), [("arrange", "arrange raised"), ("pick", "pick raised"), ("stranger", "not a candidate")]
)
def test_mistakes_are_reported_and_somebody_serves(mood, says) -> None:
    endpoints = make_endpoints(3)
    picked, said = guarded(mood, endpoints)
    assert picked is endpoints[0] and len(said) == 1 and says in said[0]


def test_what_is_right_stays_as_it_is() -> None:
    endpoints = make_endpoints(3)
    assert guarded("fine", endpoints) == (endpoints[2], [])
    assert guarded("none", endpoints) == (None, [])


def test_hooks_that_raise_are_reported() -> None:
    said: list[str] = []
    guard, (endpoint,) = Guard(Moody("pick"), said.append), make_endpoints(1)
    guard.began(endpoint, 0.0)
    guard.ended(endpoint, "success", 0.1, 0.0)
    assert guard.describe(endpoint, 0.0) == {}
    assert [text.split()[0] for text in said] == ["began", "ended", "describe"]
    assert Guard(Moody("x"), said.append).describe(endpoint, 0.0) == {"list": "[1]", "number": 2.5}


# -- finding


def service(name: str, config: dict[str, object] | None = None) -> Service:
    return Service("shop", balance=name, balancing=Balancing(config=config or {}, source=PLACE))


def error_of(name: str, config: dict[str, object] | None = None, allow: Sequence[str] = ()) -> str:
    with pytest.raises(PluginError) as caught:
        Loader(allow).balancer(service(name, config)).make(lambda text: None)
    assert caught.value.source is PLACE
    return caught.value.text


def test_built_ins_are_not_guarded_and_say_what_they_want() -> None:
    loader = Loader()
    found = {name: loader.balancer(service(name)) for name in available(BALANCERS)}
    assert sorted(found) == ["least-request", "maglev", "peak-ewma", "random", "ring-hash", "round-robin"]
    made = {name: each.make(lambda text: None) for name, each in found.items()}
    assert isinstance(made["least-request"].balancer, LeastRequest)
    assert {name for name, each in made.items() if each.keyed} == {"maglev", "ring-hash"}
    assert {name for name, each in made.items() if each.told} == {"peak-ewma"}


def test_one_of_your_own_is_guarded_and_needs_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "my_balancers", sys.modules[__name__])
    made = Loader(["my_balancers"]).balancer(service("my_balancers:Moody")).make(lambda text: None)
    assert isinstance(made.balancer, Guard) and made.told and not made.keyed
    assert 'balancer "my_balancers:Moody" is not allowed here' in error_of("my_balancers:Moody")
    assert "must be a class that derives from sidecar.api.Balancer" in error_of(
        "my_balancers:Guard.arrange", allow=["my_balancers"]
    )
    assert "picks nobody" in error_of("my_balancers:Balancer", allow=["my_balancers"])
    assert "a balancer never waits" in error_of("my_balancers:Waits", allow=["my_balancers"])


class Waits(Balancer):
    async def pick(self, candidates, key, now, rnd):  # type: ignore[override]
        return candidates[0]


def test_what_is_wrong_is_said() -> None:
    assert 'no balancer "cheapest" is installed' in error_of("cheapest")
    assert "balance.with.decay: unknown key" in error_of("peak-ewma", {"decay": 1})
    assert "balance.with.bounded_load_percent: must be a number" in error_of("maglev", {"bounded_load_percent": "x"})
