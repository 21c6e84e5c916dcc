"""Original destinations against a snapshot: whose they are, and what is refused."""

import pytest

from sidecar.intercept.destinations import Conflict, DestinationMap, Target, Way, canonical, join
from sidecar.model.snapshot import EndpointSpec, Port, Protocol, Service, Snapshot

API = Port("api", 8000)
DATA = Port("data", 6379, Protocol.TCP)
ARRIVED = ("127.0.0.1", 15001)


def service(name: str, ports: tuple[Port, ...], *at: tuple[str, int]) -> Service:
    return Service(name, ports=ports, endpoints=tuple(EndpointSpec(host, port) for host, port in at))


def mapped(*services: Service, own: str | None = None, **resolved: tuple[str, ...]) -> DestinationMap:
    return DestinationMap(Snapshot({one.name: one for one in services}), own, resolved)


REVIEWS = service("reviews", (API, DATA), ("10.0.0.2", 15006), ("fd00::2", 15006))


@pytest.mark.parametrize("host", ["10.0.0.2", "fd00::2", "FD00:0:0::2", "::ffff:10.0.0.2"])
def test_an_application_port_means_that_port_of_the_service(host: str) -> None:
    found = mapped(REVIEWS)
    assert found.find(host, 8000) == Target("reviews", API)
    assert found.find(host, 6379) == Target("reviews", DATA)
    assert found.find(host, 8001) is None
    assert found.find("10.0.0.3", 8000) is None


def test_the_endpoints_own_port_means_the_first_port() -> None:
    assert mapped(REVIEWS).find("10.0.0.2", 15006) == Target("reviews", API)
    same = mapped(service("redis", (API, DATA), ("10.0.0.2", 6379)))
    assert same.find("10.0.0.2", 6379) == Target("redis", DATA)


def test_decisions() -> None:
    found = mapped(REVIEWS)
    http = found.outbound(("10.0.0.2", 8000), ARRIVED)
    assert (http.way, http.target, http.original) == (Way.HTTP, Target("reviews", API), ("10.0.0.2", 8000))
    assert found.outbound(("fd00::2", 6379), ("::1", 15001)).way is Way.TCP
    unknown = found.outbound(("192.0.2.1", 443), ARRIVED)
    assert (unknown.way, unknown.original) == (Way.PASSTHROUGH, ("192.0.2.1", 443))
    strict = found.outbound(("fd00::9", 443), ARRIVED, strict=True)
    assert (strict.way, strict.reason) == (Way.REFUSED, "unknown destination [fd00::9]:443")


@pytest.mark.parametrize("original", [None, ARRIVED])
def test_a_connection_that_nobody_redirected_is_a_loop(original: tuple[str, int] | None) -> None:
    for strict in (False, True):
        decision = mapped(REVIEWS).outbound(original, ARRIVED, strict)
        assert decision.way is Way.LOOP
        assert "the sidecar itself (127.0.0.1:15001)" in decision.reason
    assert mapped(REVIEWS, own="reviews").inbound(original, ARRIVED).way is Way.LOOP


def test_what_two_services_claim_is_given_to_neither() -> None:
    other = service("ratings", (Port("main", 8000),), ("10.0.0.2", 15007))
    found = mapped(REVIEWS, other)
    assert found.find("10.0.0.2", 8000) is None
    decision = found.outbound(("10.0.0.2", 8000), ARRIVED)
    assert decision.way is Way.REFUSED
    assert decision.reason == "ambiguous destination: 10.0.0.2:8000 is claimed by reviews/api and ratings/main"
    assert found.conflicts == (
        Conflict(("10.0.0.2", 8000), (Target("reviews", API), Target("ratings", Port("main", 8000)))),
    )
    # Each sidecar's own port stays clear.
    assert found.find("10.0.0.2", 15007) == Target("ratings", Port("main", 8000))


def test_a_stated_endpoint_beats_an_inferred_one() -> None:
    at_8000 = service("plain", (Port("main", 9000),), ("10.0.0.2", 8000))
    found = mapped(REVIEWS, at_8000)
    assert found.find("10.0.0.2", 8000) == Target("plain", Port("main", 9000))
    assert not found.conflicts


def test_two_endpoints_of_one_service_at_one_address_do_not_conflict() -> None:
    found = mapped(service("reviews", (API,), ("10.0.0.2", 8443), ("10.0.0.2", 8444)))
    assert found.find("10.0.0.2", 8000) == Target("reviews", API)
    assert found.find("10.0.0.2", 8444) == Target("reviews", API)
    assert not found.conflicts and len(found) == 3


def test_names_are_resolved_by_others() -> None:
    named = service("payments", (API,), ("payments.internal", 8443))
    assert mapped(named).unresolved == ("payments.internal",)
    found = DestinationMap(Snapshot({"payments": named}), None, {"payments.internal": ("192.0.2.7", "2001:DB8::7")})
    assert found.unresolved == ()
    assert found.find("192.0.2.7", 8000) == Target("payments", API)
    assert found.find("2001:db8::7", 8443) == Target("payments", API)


def test_a_service_without_ports_or_endpoints_claims_nothing() -> None:
    assert len(mapped(service("admin", ()), service("none", (), ("10.0.0.9", 1)), service("far", (API,)))) == 0


def test_inbound_is_for_the_own_services_declared_ports() -> None:
    found = mapped(REVIEWS, own="reviews")
    arrived = ("10.0.0.2", 15006)
    assert found.inbound(("10.0.0.2", 8000), arrived).target == Target("reviews", API)
    assert found.inbound(("10.0.0.2", 6379), arrived).way is Way.TCP
    refused = found.inbound(("10.0.0.2", 9), arrived)
    assert (refused.way, refused.reason) == (Way.REFUSED, "port 9 is not a declared port of reviews")
    assert mapped(REVIEWS, own="gone").inbound(("10.0.0.2", 8000), arrived).way is Way.REFUSED


def test_one_spelling_for_one_address() -> None:
    assert canonical("fe80::1%eth0") == "fe80::1"
    assert canonical("::FFFF:192.0.2.1") == "192.0.2.1"
    assert join(("::1", 80)) == "[::1]:80"
    with pytest.raises(ValueError):
        canonical("localhost")
