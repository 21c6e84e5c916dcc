"""`hedge` in the policy file: how it is inherited, what is shown of it, what is warned of."""

import pytest

from sidecar.model.load import Loaded, load_texts
from sidecar.model.snapshot import NONE, Level, Service
from sidecar.model.summary import tries_text


def load(text: str) -> Loaded:
    loaded = load_texts({"mesh.yaml": f"version: 1\n{text}"})
    assert loaded.snapshot is not None, loaded.problems
    return loaded


def web(defaults: str = "{}", service: str = "{}", enforced: str = "{}") -> Service:
    loaded = load(f"defaults: {defaults}\nservices:\n  web: {service}\nenforced: {enforced}\n")
    assert loaded.snapshot is not None
    return loaded.snapshot.services["web"]


def after(**levels: str) -> list[float]:
    return [route.hedge_after_s for route in web(**levels).routes]


def test_it_is_off_until_stated_and_inherited_as_retry_is() -> None:
    assert after() == [NONE]
    assert after(defaults="{hedge: {after: 1s}}") == [1.0]
    assert after(defaults="{hedge: {after: 1s}}", service="{hedge: {after: 50ms}}") == [0.05]
    routes = "{match: {path: /a}, hedge: {after: 20ms}}, {match: {path: /b}, hedge: {after: none}}"
    assert after(service=f"{{hedge: {{after: 50ms}}, routes: [{routes}]}}") == [0.02, NONE, 0.05]
    assert after(service="{hedge: {after: 50ms}}", enforced="{hedge: {after: none}}") == [NONE]
    assert after(service="{hedge: {after: 5ms}}", enforced="{hedge: {after: {min: 20ms}}}") == [0.02]
    assert after(defaults="{hedge: {after: 1s}}", service="{hedge: {after: null}}") == [NONE]
    assert after(defaults="{hedge: {after: 1s}}", service="{hedge: null}") == [NONE]


def test_where_it_comes_from_is_kept() -> None:
    route = web(defaults="{hedge: {after: 1s}}", service="{hedge: {after: 50ms}}").routes[0]
    origin = route.provenance["hedge.after"]
    assert (origin.value, origin.level) == ("50ms", Level.SERVICE)
    assert [(each.value, each.level) for each in origin.overrode] == [("1s", Level.DEFAULTS), ("none", Level.BUILT_IN)]
    assert tries_text(route) == "2 x none in 15s, hedged after 50ms"
    assert tries_text(web().routes[0]) == "2 x none in 15s"


@pytest.mark.parametrize(
    ("text", "warns"),
    [
        ("services: {web: {hedge: {after: 50ms}}}", False),
        ("services: {web: {hedge: {after: 20s}}}", False),  # a gRPC call has no built-in total
        ("services: {web: {hedge: {after: 20s}, timeout: {total: 20s}}}", True),
        ("services: {web: {hedge: {after: 50ms}, address: ['a:1', 'b:1']}}", False),
        ("services: {web: {hedge: {after: 50ms}, address: ['a:1']}}", True),
        ("defaults: {hedge: {after: 50ms}}\nservices: {web: {address: ['a:1']}}", False),  # it may act on others
        ("services: {web: {hedge: {after: 50ms}, routes: [{match: {methods: [PUT]}}]}}", False),  # on the other route
        ("services: {web: {routes: [{match: {methods: [PUT]}, hedge: {after: 50ms}}]}}", True),
        ("services: {web: {routes: [{match: {methods: [PUT, GET]}, hedge: {after: 50ms}}]}}", False),
        (
            "services: {web: {routes: [{match: {methods: [PUT]}, hedge: {after: 50ms}, retry: {methods: [PUT]}}]}}",
            False,
        ),
    ],
)
def test_what_can_never_act_is_warned_of(text: str, warns: bool) -> None:
    found = [problem for problem in load(text).problems if problem.code == "P0305"]
    assert bool(found) is warns and all("`hedge" in problem.message for problem in found)
