"""Clusters: what survives a change of endpoints, what must be closed."""

from sidecar.model.snapshot import CircuitBreaker, EndpointSpec, Limits, Retry, Tls
from sidecar.policy.cluster import ANY_METHOD, Cluster, Destination, RoutePlan, Subset, retry_methods, version_of

BREAKER = CircuitBreaker()


def make() -> Cluster:
    return Cluster("reviews", "out", Limits(), Retry(), 0.0)


def spec(host: str = "10.0.0.1", **options) -> EndpointSpec:
    return EndpointSpec(host, 80, **options)


def test_an_endpoint_keeps_its_state_while_its_address_stays():
    cluster = make()
    assert cluster.update([spec(), spec("10.0.0.2")], BREAKER, {}, "spiffe://t/service/reviews", "s") == []
    first, second = cluster.endpoints.values()
    first.active, first.breaker.failures = 3, 2
    stale = cluster.update([spec("10.0.0.3"), spec(weight=5)], CircuitBreaker(3), {}, "spiffe://t/service/reviews", "s")
    assert stale == [second]
    third, again = cluster.endpoints.values()
    assert again is first and again.active == 3 and again.breaker.failures == 2 and again.weight == 5
    assert again.breaker.config.consecutive_failures == 3
    assert third.active == 0


def test_the_identity_is_the_services_unless_stated_and_a_new_one_makes_connections_stale():
    cluster = make()
    cluster.update([spec(), spec("10.0.0.2", identity="spiffe://t/other")], BREAKER, {}, "spiffe://t/a", "s")
    first, second = cluster.endpoints.values()
    assert (first.identity, second.identity) == ("spiffe://t/a", "spiffe://t/other")
    specs = [spec(), spec("10.0.0.2", identity="spiffe://t/other")]
    assert cluster.update(specs, BREAKER, {}, "spiffe://t/b", "s") == [first]
    assert first.identity == "spiffe://t/b" and list(cluster.endpoints.values()) == [first, second]


def test_health_alone_changes_nothing_else():
    cluster = make()
    assert cluster.update([spec(), spec("10.0.0.2", healthy=False)], BREAKER, {}, "a", "s") == []
    first, second = cluster.endpoints.values()
    assert first.healthy and not second.healthy
    first.active, first.successes, first.idle, first.breaker.failures = 3, 9, ["connection"], 2
    assert cluster.update([spec(healthy=False), spec("10.0.0.2")], BREAKER, {}, "a", "s") == []
    assert list(cluster.endpoints.values()) == [first, second]
    assert not first.healthy and second.healthy
    assert (first.active, first.successes, first.idle, first.breaker.failures) == (3, 9, ["connection"], 2)


def test_another_kind_of_tls_is_another_endpoint():
    cluster = make()
    cluster.update([spec(tls=Tls.PLAIN)], BREAKER, {}, "", "")
    (plain,) = cluster.endpoints.values()
    assert cluster.update([spec()], BREAKER, {}, "", "") == [plain]
    (mesh,) = cluster.endpoints.values()
    assert mesh is not plain and mesh.mesh and not plain.mesh


def test_an_address_stated_twice_is_one_endpoint():
    cluster = make()
    cluster.update([spec(), spec(weight=7)], BREAKER, {}, "", "")
    (endpoint,) = cluster.endpoints.values()
    endpoint.active = 1
    assert cluster.update([spec(), spec()], BREAKER, {}, "", "") == []
    assert list(cluster.endpoints.values()) == [endpoint] and endpoint.active == 1


def test_versions_by_labels_the_first_that_fits():
    versions = {"any": {}, "v1": {"version": "1"}, "v1-eu": {"version": "1", "zone": "eu"}}
    assert version_of({"version": "1", "zone": "eu"}, versions) == "v1"
    assert version_of({"version": "2"}, versions) == ""  # a version without labels selects nothing by them


def test_breaker_changes_reach_whoever_listens_at_the_moment():
    cluster = make()
    cluster.update([spec()], CircuitBreaker(consecutive_failures=1), {}, "", "")
    (endpoint,) = cluster.endpoints.values()
    heard = []
    cluster.breaker_events = lambda which, text: heard.append((which, text.partition(" ")[0]))
    endpoint.breaker.failure(0, 0.0, lambda: 0.0)
    assert heard == [(endpoint, "open")]


def test_methods_that_may_be_repeated():
    assert b"GET" in retry_methods(Retry()) and b"POST" not in retry_methods(Retry())
    assert retry_methods(Retry(methods=frozenset({"any"}))) is ANY_METHOD and b"POST" in ANY_METHOD
    assert set(retry_methods(Retry(methods=frozenset({"POST"})))) == {b"POST"}  # type: ignore[call-overload]


def test_a_plan_with_one_destination_needs_no_choice():
    cluster = make()
    plan = RoutePlan("r", "reviews")
    one = Destination(None, Subset("", ()))
    from sidecar.model.snapshot import Timeouts

    plan.bind(cluster, Timeouts(), Retry(), [(one, 100)])
    assert plan.subset is one.subset
    plan.bind(cluster, Timeouts(), Retry(), [(one, 50), (Destination("v", Subset("v", ())), 50)])
    assert plan.subset is None
