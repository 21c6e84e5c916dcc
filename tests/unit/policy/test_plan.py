"""From snapshots to plans: look-ups, subsets, precedence of the caller, and what survives a swap."""

import math
import random
from typing import Any

import pytest
from support.balancers import balancer_of

from sidecar.model.snapshot import (
    NONE,
    AuthzLevel,
    Call,
    Destination,
    EndpointSpec,
    Fallback,
    FilterUse,
    Level,
    Limits,
    Match,
    PathHandling,
    Port,
    Protocol,
    Respond,
    Retry,
    Route,
    Rule,
    Service,
    Snapshot,
    Sticky,
    Timeouts,
    Tls,
)
from sidecar.model.source import Source
from sidecar.policy.paths import judge, opaque
from sidecar.policy.plan import (
    APP_POOL_IDLE_S,
    MESH_POOL_IDLE_S,
    ClusterState,
    PlanError,
    Plans,
    Surroundings,
    compile_plans,
    tighten,
)

V = {"v1": {"version": "1"}, "v2": {"version": "2"}}
HOSTS = ("10.0.0.1", "10.0.0.2", "10.0.0.3")


class Chain:
    """As much of a chain of filters as the compiler looks at."""

    has_body_hooks = True
    on_connection = ("hook",)


def no_chain(side: str, service: Service, route: Route) -> Any:
    return None


def around(**options: Any) -> Surroundings:
    given: dict[str, Any] = {
        "own": "web",
        "trust_domain": "mesh.local",
        "apps": {},
        "sticky_key": b"k" * 32,
        "chain": no_chain,
        "stats": lambda *labels: labels,
        "balancer": balancer_of,
    }
    return Surroundings(**(given | options))


def service(name: str, *endpoints: str, versions: Any = V, **options: Any) -> Service:
    specs = tuple(EndpointSpec(host, 15006, {"version": str(n % 2 + 1)}) for n, host in enumerate(endpoints))
    options.setdefault("routes", (Route("default"),))
    return Service(name, endpoints=specs, versions=versions, **options)


def snapshot(*services: Service, **own: Any) -> Snapshot:
    own.setdefault("routes", (Route("default"),))
    web = Service("web", **own)
    return Snapshot({s.name: s for s in (web, *services)})


def compiled(shot: Snapshot, state: ClusterState | None = None, now: float = 0.0, **options: Any) -> Plans:
    return compile_plans(shot, around(**options), state if state is not None else ClusterState(), now)[0]


def plan_of(plans: Plans, host: bytes, method: bytes = b"GET", target: bytes = b"/") -> Any:
    return plans.outbound[host].table.find(method, target, [], "web")


# Look-ups


def test_hosts_of_services_and_ports():
    shop = service("shop", *HOSTS, ports=(Port("api", 80), Port("raw", 81, Protocol.TCP), Port("adm", 82)))
    plans = compiled(snapshot(shop))
    api, adm = plans.by_port["shop", "api"], plans.by_port["shop", "adm"]
    assert api is not adm and api.cluster is not adm.cluster
    hosts = {host: plan for host, plan in plans.outbound.items() if plan.name == "shop"}
    assert hosts == {
        b"shop": api,
        b"shop.mesh": api,
        b"api.shop": api,
        b"api.shop.mesh": api,
        b"adm.shop": adm,
        b"adm.shop.mesh": adm,
    }
    assert set(plans.outbound_tcp) == {("shop", "raw")}
    sni = {endpoint.sni for endpoint in adm.cluster.endpoints.values()}
    assert sni == {"adm.shop.mesh"}


def test_a_service_without_ports_has_one_for_http():
    plans = compiled(snapshot(service("shop", *HOSTS)))
    assert plans.by_port["shop", "http"] is plans.outbound[b"shop"]


def test_hosts_of_others_are_foreign_also_by_port():
    plans = compiled(
        snapshot(service("shop", ports=(Port("api", 80), Port("raw", 81, Protocol.TCP))), ports=(Port("api", 80),))
    )
    names = (b"shop", b"api.shop", b"raw.shop")
    assert plans.foreign_hosts == {host for name in names for host in (name, name + b".mesh")}


def test_endpoints_must_be_who_they_should_be():
    plans = compiled(snapshot(service("shop", *HOSTS)))
    for endpoint in plans.outbound[b"shop"].cluster.endpoints.values():
        assert endpoint.identity == "spiffe://mesh.local/service/shop" and endpoint.sni == "http.shop.mesh"


def test_versions_become_subsets():
    routes = (
        Route("write", Match(methods=frozenset({"POST"})), (Destination("v2"),)),
        Route("default", destinations=(Destination("v1", 90), Destination("v2", 10))),
    )
    plans = compiled(snapshot(service("shop", *HOSTS, routes=routes)))
    write, default = plan_of(plans, b"shop", b"POST"), plan_of(plans, b"shop")
    assert [e.host for e in write.subset.endpoints] == ["10.0.0.2"]
    assert default.subset is None
    chosen = {d.version: [e.host for e in d.subset.endpoints] for d in default.destinations.items}
    assert chosen == {"v1": ["10.0.0.1", "10.0.0.3"], "v2": ["10.0.0.2"]}
    cluster = plans.outbound[b"shop"].cluster
    assert write.subset.endpoints[0] in cluster.endpoints.values()  # shared, not copied
    assert set(default.stats) == {"", "v1", "v2"}


@pytest.mark.parametrize("balance", ["round-robin", "least-request"])
def test_the_balancer_is_the_services(balance):
    plans = compiled(snapshot(service("shop", *HOSTS, balance=balance)))
    kind = type(plan_of(plans, b"shop").cluster.balancer).__name__
    assert kind == {"round-robin": "RoundRobin", "least-request": "LeastRequest"}[balance]


def test_actions_of_a_route():
    route = Route("default", sticky=Sticky("c", 60.0), respond=Respond(404), upgrade=frozenset({"websocket"}))
    plan = plan_of(compiled(snapshot(service("shop", *HOSTS, routes=(route,)))), b"shop")
    assert plan.sticky is not None and plan.respond.status == 404 and plan.upgrade == {b"websocket"}


def test_fallbacks():
    routes = (
        Route("a", Match(path="/a"), fallback=Fallback(version="v2")),
        Route("b", Match(path="/b"), fallback=Fallback(service="spare")),
        Route("default", fallback=Fallback(respond=Respond(503, "later"))),
    )
    plans = compiled(snapshot(service("shop", *HOSTS, routes=routes), service("spare", "10.9.9.9")))
    version, other, fixed = (plan_of(plans, b"shop", target=t).fallback for t in (b"/a", b"/b", b"/c"))
    assert version.cluster is plans.outbound[b"shop"].cluster
    assert [e.host for e in version.subset.endpoints] == ["10.0.0.2"]
    assert other.cluster is plans.outbound[b"spare"].cluster
    assert [e.host for e in other.subset.endpoints] == ["10.9.9.9"]
    assert fixed.subset is None and fixed.respond.body == "later"


def test_paths_are_read_strictly_where_rules_ask_for_them():
    by_path = Rule("r", paths=("/x",))
    services = [
        service("plain"),
        service("routed", routes=(Route("x", Match(path="/x")), Route("default"))),
        service("ruled", routes=(Route("default", authz=(AuthzLevel(Level.SERVICE, allow=(by_path,)),)),)),
        service("all", routes=(Route("default", Match(path="/**")),)),
        service("said", ports=(Port("http", 0, path_handling=PathHandling.STRICT),)),
    ]
    plans = compiled(snapshot(*services))
    read = {s.name: plans.outbound[s.name.encode()].read for s in services}
    assert read == {"plain": opaque, "routed": judge, "ruled": judge, "all": opaque, "said": judge}


# The caller tightens


@pytest.mark.parametrize("name", ["total_s", "try_s", "idle_s", "body_s", "connect_s"])
def test_a_caller_may_shorten_but_not_lengthen(name):
    timeouts = Timeouts(total_s=10.0, try_s=10.0, idle_s=10.0, body_s=10.0, connect_s=10.0)
    shorter, _ = tighten(timeouts, Retry(), Call("shop", **{name: 3.0}))
    longer, _ = tighten(timeouts, Retry(), Call("shop", **{name: 30.0}))
    assert getattr(shorter, name) == 3.0 and getattr(longer, name) == 10.0


def test_a_caller_may_retry_less_but_not_more():
    for asked, got in ((0, 0), (1, 1), (9, 2), (None, 2)):
        assert tighten(Timeouts(), Retry(max_retries=2), Call("shop", max_retries=asked))[1].max_retries == got
    assert tighten(Timeouts(), Retry(), None) == (Timeouts(), Retry())


def test_calls_apply_to_http_and_tcp():
    ports = (Port("api", 80), Port("raw", 81, Protocol.TCP))
    calls = {"shop": Call("shop", total_s=2.0, idle_s=7.0, connect_s=0.5)}
    plans = compiled(snapshot(service("shop", *HOSTS, ports=ports), calls=calls))
    assert plan_of(plans, b"shop").timeouts.total_s == 2.0
    assert plans.outbound_tcp["shop", "raw"].timeouts.idle_tcp_s == 7.0


# Local ports


def test_local_ports():
    ports = (Port("api", 80), Port("raw", 81, Protocol.TCP))
    calls = {"shop": Call("shop", port="raw", local_port=9101), "bare": Call("bare", local_port=9102), "no": Call("no")}
    plans = compiled(snapshot(service("shop", *HOSTS, ports=ports), service("bare"), service("no"), calls=calls))
    raw, bare = plans.local_ports
    assert (raw.number, raw.port, raw.http) == (9101, "raw", None)
    assert raw.tcp is plans.outbound_tcp["shop", "raw"]
    assert bare.http is plans.outbound[b"bare"] and bare.tcp is None


# The inbound side


def test_inbound_plans_leave_the_callers_policies_to_the_caller():
    route = Route("default", timeouts=Timeouts(total_s=1.0, try_s=1.0, idle_s=9.0), retry=Retry(max_retries=5))
    ports = (Port("api", 8000), Port("raw", 9000, Protocol.TCP))
    plans = compiled(snapshot(routes=(route,), ports=ports, limits=Limits(requests=1)))
    api, raw = plans.inbound["api"], plans.inbound["raw"]
    assert api.http is not None and api.tcp is None and raw.tcp is not None and raw.http is None
    plan = api.http.table.find(b"GET", b"/", [], None)
    assert plan is not None and plan.timeouts.total_s == plan.timeouts.try_s == math.inf
    assert plan.timeouts.idle_s == 9.0 and plan.retry.max_retries == 0
    (app,) = api.http.cluster.endpoints.values()
    assert app.address == ("127.0.0.1", 8000) and app.tls is Tls.PLAIN
    assert api.http.cluster.limits.requests > 1_000_000 and api.http.cluster.pool_idle_s == APP_POOL_IDLE_S
    for _ in range(1000):
        app.breaker.failure(0, 0.0, lambda: 0.0)
    assert app.breaker.allows(0.0)  # the application has one endpoint: leaving it alone helps nobody


def test_where_the_application_listens():
    shot = snapshot(ports=(Port("api", 8000), Port("adm", 8001)))
    plans = compiled(shot, apps={"": ("127.0.0.1", 3000), "adm": ("::1", 3001)})
    addresses = {n: next(iter(p.http.cluster.endpoints.values())).address for n, p in plans.inbound.items() if p.http}
    assert addresses == {"api": ("127.0.0.1", 3000), "adm": ("::1", 3001)}


def test_filters_of_both_sides():
    made = []

    def chain(side: str, of: Service, route: Route) -> Any:
        made.append((side, of.name, route.name))
        return Chain() if route.filters else None

    filtered = Route("default", filters=(FilterUse("f"),))
    plans = compiled(snapshot(service("shop", *HOSTS, routes=(filtered,)), routes=(filtered,)), chain=chain)
    assert set(made) == {("out", "shop", "default"), ("out", "web", "default"), ("in", "web", "default")}
    assert plan_of(plans, b"shop").body_hooks and len(plans.chains) == 3 and len(plans.connection_hooks) == 1


# What cannot be served


def test_an_own_service_that_is_not_there():
    with pytest.raises(PlanError, match='"web" is not in the policy \\(known: shop\\)'):
        compiled(Snapshot({"shop": service("shop")}))


def test_all_problems_at_once_with_their_places():
    bad = Route("bad", Match(path_regex="("), source=Source("p.yaml", 4, 2))
    shot = snapshot(
        service("shop", routes=(bad, Route("default"))),
        calls={
            "gone": Call("gone", source=Source("p.yaml", 7, 3)),
            "shop": Call("shop", port="adm", source=Source("p.yaml", 8, 3)),
        },
    )

    def chain(side: str, of: Service, route: Route) -> Any:
        if of.name == "web":
            raise PlanError([(Source("p.yaml", 9, 1), "no such filter")])

    with pytest.raises(PlanError) as caught:
        compiled(shot, chain=chain)
    text = [f"{source}: {problem}" for source, problem in caught.value.problems]
    assert len(text) == 5  # the filter fails on both sides
    for part in ('p.yaml:4: route "bad" of "shop"', 'p.yaml:7: calls names an unknown service "gone"'):
        assert any(line.startswith(part) for line in text), text
    assert any('"shop" has no port "adm" (it has: http)' in line for line in text)


def state_of(state: ClusterState) -> Any:
    return {
        key: (id(c), c.limits, c.budget.percent, [(id(e), e.weight, e.identity) for e in c.endpoints.values()])
        for key, c in state.clusters.items()
    }


def test_a_refused_snapshot_changes_nothing():
    state = ClusterState()
    compiled(snapshot(service("shop", *HOSTS)), state)
    before = state_of(state)
    with pytest.raises(PlanError):
        compiled(
            snapshot(
                service("shop", "10.0.0.9", limits=Limits(requests=1)), service("more"), calls={"gone": Call("gone")}
            ),
            state,
        )
    assert state_of(state) == before


# Swaps


def test_breakers_budgets_and_pools_survive_a_swap():
    state = ClusterState()
    compiled(snapshot(service("shop", *HOSTS)), state)
    cluster = state.clusters["out", "shop", "http"]
    endpoint = next(iter(cluster.endpoints.values()))
    endpoint.breaker.failures = 5
    endpoint.idle.append("a connection")
    for _ in range(10):
        assert cluster.budget.withdraw(0.0)
    new = service("shop", HOSTS[0], HOSTS[2], limits=Limits(requests=9), pool_idle_s=7.0)
    plans, stale = compile_plans(snapshot(new), around(), state, 1.0)
    assert state.clusters["out", "shop", "http"] is cluster is plans.outbound[b"shop"].cluster
    assert [e.host for e in stale] == ["10.0.0.2"]
    assert endpoint in cluster.endpoints.values() and endpoint.breaker.failures == 5 and endpoint.idle
    assert cluster.limits.requests == 9 and cluster.pool_idle_s == 7.0
    assert not cluster.budget.withdraw(1.0)


def test_the_budget_is_one_for_all_ports_of_a_service():
    state = ClusterState()
    compiled(snapshot(service("shop", *HOSTS, ports=(Port("b", 2),))), state)
    plans = compiled(snapshot(service("shop", *HOSTS, ports=(Port("a", 1), Port("b", 2))), service("other")), state)
    a, b, other = (plans.outbound[host].cluster for host in (b"a.shop", b"b.shop", b"other"))
    assert a.budget is b.budget and a.budget is not other.budget
    assert state.clusters["in", "web", "http"].budget is not plans.outbound[b"web"].cluster.budget


def test_what_leaves_is_reported_stale():
    state = ClusterState()
    shot = snapshot(service("shop", *HOSTS), ports=(Port("api", 1), Port("adm", 2)))
    compiled(shot, state)
    _, stale = compile_plans(snapshot(ports=(Port("api", 1),)), around(), state, 1.0)
    assert sorted(e.host for e in stale) == [*HOSTS, "127.0.0.1"]
    assert set(state.clusters) == {("out", "web", "api"), ("in", "web", "api")}


def test_an_application_that_moves_is_stale():
    state = ClusterState()
    compiled(snapshot(), state, apps={"": ("127.0.0.1", 1)})
    _, stale = compile_plans(snapshot(), around(apps={"": ("127.0.0.1", 2)}), state, 0.0)
    assert [e.port for e in stale] == [1]


def test_a_request_keeps_the_plan_it_was_matched_with():
    state = ClusterState()
    old = plan_of(compiled(snapshot(service("shop", *HOSTS)), state), b"shop")
    compiled(snapshot(service("shop", HOSTS[0], routes=(Route("default", timeouts=Timeouts(total_s=1.0)),))), state)
    assert old.timeouts.total_s == 15.0 and len(old.subset.endpoints) == 3


def test_pools_idle_as_the_service_says():
    plans = compiled(snapshot(service("a"), service("b", pool_idle_s=2.0)))
    assert plans.outbound[b"a"].cluster.pool_idle_s == MESH_POOL_IDLE_S
    assert plans.outbound[b"b"].cluster.pool_idle_s == 2.0


def test_breaker_events_name_their_cluster():
    heard = []
    plans = compiled(snapshot(service("shop", HOSTS[0])), on_breaker=lambda c, e, text: heard.append((c.name, e.host)))
    (endpoint,) = plans.outbound[b"shop"].cluster.endpoints.values()
    for _ in range(7):
        endpoint.breaker.failure(0, 0.0, lambda: 0.0)
    assert heard == [("shop", "10.0.0.1")]


@pytest.mark.parametrize("seed", range(40))
def test_random_histories_never_lose_a_count(seed):
    """Requests come and go on endpoints of old and new plans while snapshots change: nothing is lost or doubled."""
    rnd = random.Random(seed)
    state = ClusterState()
    flights: list[tuple[Any, Any]] = []
    plans = compiled(snapshot(), state)
    for step in range(60):
        what = rnd.random()
        if what < 0.3:
            hosts = [host for host in (*HOSTS, "10.0.0.4") if rnd.random() < 0.6]
            names = [name for name in ("a", "b") if rnd.random() < 0.8]
            ports = rnd.choice([(), (Port("api", 1),), (Port("api", 1), Port("adm", 2))])
            tls = rnd.choice([Tls.MESH, Tls.MESH, Tls.PLAIN])
            services = [
                Service(n, ports, tuple(EndpointSpec(h, 1, tls=tls) for h in hosts), routes=(Route("default"),))
                for n in names
            ]
            own = rnd.choice([{}, {"calls": {"gone": Call("gone")}}])
            before = state_of(state)
            held = {endpoint for cluster in state for endpoint in cluster.endpoints.values()}
            try:
                plans, stale = compile_plans(snapshot(*services, **own), around(), state, float(step))
            except PlanError:
                assert state_of(state) == before
            else:
                kept = {endpoint for cluster in state for endpoint in cluster.endpoints.values()}
                assert len(stale) == len(set(stale))
                assert held - kept == set(stale)  # exactly those that left
        elif what < 0.7 and plans.outbound:
            host = rnd.choice(sorted(plans.outbound))
            plan = plan_of(plans, host)
            endpoint = plan.subset.pick(0.0, (), rnd.random)
            if endpoint is not None:
                endpoint.active += 1
                plan.cluster.active += 1
                flights.append((plan.cluster, endpoint))
        elif flights:
            cluster, endpoint = flights.pop(rnd.randrange(len(flights)))
            cluster.active -= 1
            endpoint.active -= 1
        for cluster in state:
            assert cluster.active == sum(c is cluster for c, _ in flights)
            for endpoint in cluster.endpoints.values():
                assert endpoint.active == sum(e is endpoint for _, e in flights)
    for cluster, endpoint in flights:
        cluster.active -= 1
        endpoint.active -= 1
        assert cluster.active >= 0 and endpoint.active >= 0


def test_max_connection_age_is_the_own_services():
    assert compiled(snapshot(max_connection_age_s=60.0)).max_connection_age_s == 60.0
    assert compiled(snapshot()).max_connection_age_s == NONE


def test_ports_that_speak_http2_say_so_at_their_endpoints():
    ports = (Port("web", 80), Port("api", 81, Protocol.GRPC), Port("new", 82, Protocol.HTTP2))
    state = ClusterState()
    plans = compiled(snapshot(service("shop", "10.0.0.1:443", ports=ports), ports=ports), state)
    spoken = {
        (side, name, port): [endpoint.http2 for endpoint in cluster.endpoints.values()]
        for (side, name, port), cluster in state.clusters.items()
    }
    for side, name in (("in", "web"), ("out", "shop")):
        assert [spoken[side, name, port.name] for port in ports] == [[False], [True], [True]]
    assert set(plans.inbound) == {"web", "api", "new"} and plans.outbound[b"api.shop"].port == "api"


def test_the_total_of_calls_may_be_shortened_too():
    shop = service("shop", routes=(Route("default", timeouts=Timeouts()),))
    plans = compiled(snapshot(shop, calls={"shop": Call("shop", total_s=3.0)}))
    timeouts = plan_of(plans, b"shop").timeouts
    assert (timeouts.total_s, timeouts.of_grpc_s) == (3.0, 3.0)
    assert plan_of(compiled(snapshot(shop)), b"shop").timeouts.of_grpc_s == NONE
