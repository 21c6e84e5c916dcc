"""What routes say becomes uses of the built-in filters."""

from sidecar.model.snapshot import Fault, FilterUse, HeaderEdit, RateLimit, Route
from sidecar.model.source import Source
from sidecar.plugins.builtin import BUILT_INS, uses
from sidecar.plugins.loader import Loader

FULL = Route(
    "r",
    rate_limit=RateLimit(100, 1.0, 50, "caller", Source("mesh.yaml", 3)),
    fault=Fault(2.0, 50.0, 503, 10.0, Source("mesh.yaml", 4)),
    request_headers=HeaderEdit(set=(("x-a", "1"),), remove=("x-b",)),
    response_headers=HeaderEdit(add=(("x-c", "2"),)),
    filters=(FilterUse("mine", side="in"), FilterUse("theirs", side="out")),
    source=Source("mesh.yaml", 2),
)


def test_each_side_has_its_own_in_order() -> None:
    assert [use.use for use in uses(FULL, "in")] == ["rate-limit", "mine"]
    assert [use.use for use in uses(FULL, "out")] == ["fault-delay", "fault-abort", "headers", "theirs"]
    assert uses(Route("bare"), "in") == uses(Route("bare"), "out") == ()


def test_they_carry_the_route_s_values_and_places() -> None:
    (limit, _), (delay, abort, headers, _) = uses(FULL, "in"), uses(FULL, "out")
    assert limit.config == {"requests": 100, "per_s": 1.0, "burst": 50, "key": "caller",
                            "algorithm": "token-bucket", "scope": "local"}  # fmt: skip
    assert delay.config == {"delay_s": 2.0, "percent": 50.0}
    assert abort.config == {"status": 503, "percent": 10.0}
    assert headers.config == {
        "request": {"set": {"x-a": "1"}, "add": {}, "remove": ["x-b"]},
        "response": {"set": {}, "add": {"x-c": "2"}, "remove": []},
    }
    assert [use.source.line for use in (limit, delay, abort, headers)] == [3, 4, 4, 2]


def test_a_part_that_never_acts_is_left_out() -> None:
    assert uses(Route("r", fault=Fault(delay_s=1.0, delay_percent=0.0)), "out") == ()
    assert [use.use for use in uses(Route("r", fault=Fault(abort_status=500)), "out")] == ["fault-abort"]


def test_all_of_them_load_and_accept_what_uses_gives() -> None:
    loader = Loader()
    for use in (*uses(FULL, "in")[:1], *uses(FULL, "out")[:3]):
        loader.prepare(use).make()
    assert len(BUILT_INS) == 4


def test_a_limit_that_two_routes_inherit_has_one_key() -> None:
    other = Route("other", rate_limit=FULL.rate_limit)
    loader = Loader()
    assert loader.prepare(uses(FULL, "in")[0]).key == loader.prepare(uses(other, "in")[0]).key
