"""Balancing from snapshots to plans: keys, zones, pins, and what survives a swap."""

from typing import Any

import pytest
from support.balancers import balancer_of

from sidecar.model.snapshot import (
    Balancing,
    Destination,
    EndpointSpec,
    Port,
    Protocol,
    Route,
    Service,
    Snapshot,
    Sticky,
)
from sidecar.model.source import Source
from sidecar.policy.hashing import hash64
from sidecar.policy.plan import ClusterState, PlanError, Plans, Surroundings, compile_plans

# mypy: disable-error-code="no-untyped-def"

HOSTS = ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4")
PLACE = Source("mesh.yaml", 3, 5)
V = {"v1": {"version": "1"}, "v2": {"version": "2"}}


class Plant:
    """A sidecar's compiler with its state."""

    def __init__(self, zone: str = "") -> None:
        self.state = ClusterState()
        self.said: list[tuple[str, str]] = []
        self.made: dict[Any, Any] = {}
        self.zone = zone

    def balancer(self, service: Service) -> Any:
        return self.made.setdefault((service.name, service.balance), balancer_of(service))

    def compile(self, *endpoints: Any, now: float = 0.0, **options: Any) -> Plans:
        specs = tuple(
            EndpointSpec(each, 1, {"version": str(n % 2 + 1)}) if isinstance(each, str) else each
            for n, each in enumerate(endpoints)
        )
        options.setdefault("routes", (Route("default"),))
        shop = Service("shop", endpoints=specs, versions=V, **options)
        around = Surroundings(
            own="web",
            trust_domain="mesh.local",
            apps={},
            sticky_key=b"k" * 32,
            chain=lambda side, service, route: None,
            stats=lambda *labels: labels,
            balancer=self.balancer,
            zone=self.zone,
            on_panic=lambda cluster, text: self.said.append((cluster.name, text)),
        )
        services = {"web": Service("web", routes=(Route("default"),)), "shop": shop}
        return compile_plans(Snapshot(services), around, self.state, now)[0]


def route(plans: Plans) -> Any:
    return plans.outbound[b"shop"].table.find(b"GET", b"/", [], "web")


def test_only_hashing_balancers_have_a_key():
    by = Balancing(by="header:x-user")
    plan = route(Plant().compile(*HOSTS, balance="maglev", balancing=by))
    assert plan.key_of([(b"x-user", b"7")], "web", "") == hash64(b"7")
    assert route(Plant().compile(*HOSTS, balancing=by)).key_of is None
    tcp = {"ports": (Port("raw", 1, Protocol.TCP),), "balance": "ring-hash", "balancing": Balancing(by="address")}
    assert Plant().compile(*HOSTS, **tcp).outbound_tcp["shop", "raw"].key_of((), "", "1.2.3.4") == hash64(b"1.2.3.4")


def test_a_hashing_balancer_without_a_key_is_refused_with_its_place():
    with pytest.raises(PlanError) as caught:
        Plant().compile(*HOSTS, balance="maglev", balancing=Balancing(source=PLACE))
    assert caught.value.problems[0][0] is PLACE and "chooses by a key" in caught.value.problems[0][1]


def test_subsets_are_kept_while_nothing_about_them_changes_and_shared_by_routes():
    plant = Plant()
    routes = (Route("a", destinations=(Destination("v1"),)), Route("default"))
    kept = route(plant.compile(*HOSTS, routes=routes)).subset
    assert route(plant.compile(*HOSTS, routes=routes)).subset is kept  # another policy, the same endpoints
    assert route(plant.compile(*HOSTS[:3])).subset is not kept
    again = route(plant.compile(*HOSTS)).subset
    assert route(plant.compile(*HOSTS, balance="round-robin")).subset is not again
    assert set(next(iter(c for c in plant.state if c.name == "shop")).subsets) <= {"", "v1", "v2"}


def test_what_was_learnt_is_kept_as_long_as_the_balancer():
    plant = Plant()
    cluster = plant.compile(*HOSTS, balance="peak-ewma").outbound[b"shop"].cluster
    assert cluster.feedback is cluster.balancer is not None
    endpoint = next(iter(cluster.endpoints.values()))
    cluster.balancer.ended(endpoint, "success", 0.5, 0.0)
    plant.compile(*HOSTS[:2], balance="peak-ewma")
    assert cluster.balancer.describe(endpoint, 0.0) == {"ewma_ms": 500.0}
    plant.compile(*HOSTS[:2])
    assert endpoint.memo is None and cluster.feedback is None


def test_zones_are_preferred_unless_ignored():
    specs = [EndpointSpec(host, 1, zone="ab"[n % 2]) for n, host in enumerate(HOSTS)]
    assert len(route(Plant("a").compile(*specs)).subset._levels) == 1
    for zone, balancing in (("a", Balancing(zone="ignore")), ("", Balancing()), ("c", Balancing())):
        assert route(Plant(zone).compile(*specs, balancing=balancing)).subset._levels == []


def test_an_endpoint_that_appears_starts_slowly():
    plant, slow = Plant(), Balancing(slow_start_s=10.0)
    plant.compile(*HOSTS[:2], balancing=slow)
    plan = route(plant.compile(*HOSTS[:3], balancing=slow, now=100.0))
    assert [endpoint.weight for endpoint in plan.subset.endpoints] == [1, 1, 0.1]
    for _ in range(3):
        plan.subset.pick(106.0, (), lambda: 0.5)
    assert plan.subset.endpoints[2].weight == 0.6


def test_panic_is_said_when_it_begins_and_when_it_ends():
    plant = Plant()
    sick = [EndpointSpec(host, 1, healthy=False) for host in HOSTS]
    plant.compile(*HOSTS)
    cluster = plant.compile(*HOSTS[:1], *sick[1:]).outbound[b"shop"].cluster
    assert cluster.panic is True
    plant.compile(*HOSTS[:1], *sick[1:3])
    plant.compile(*HOSTS[:2], *sick[2:])
    assert plant.said == [
        ("shop", "panic: 1 of 4 endpoints are healthy, under 50%: health is not asked any more"),
        ("shop", "panic is over: 2 of 4 endpoints are healthy"),
    ]
    plant.compile(*sick, balancing=Balancing(panic_threshold=0.0))
    assert len(plant.said) == 2


def test_a_cookie_names_an_endpoint_and_its_place_among_the_versions():
    destinations = (Destination("v1", 90), Destination("v2", 10))
    routes = (Route("default", destinations=destinations, sticky=Sticky("c", 60.0, "endpoint")),)
    plan = route(Plant().compile(*HOSTS, routes=routes))
    assert plan.sticky.by_endpoint and len(plan.pinned) == 4
    for endpoint, subset in plan.pinned.values():
        assert plan.pinned[plan.sticky.token(endpoint.key)] == (endpoint, subset)
        assert subset.name == endpoint.version and endpoint in subset.endpoints
    versions = route(
        Plant().compile(*HOSTS, routes=(Route("default", destinations=destinations, sticky=Sticky("c", 60.0)),))
    )
    assert versions.pinned == {} and not versions.sticky.by_endpoint
