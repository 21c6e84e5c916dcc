"""Endpoints keep their state over a change of policy."""

from sidecar.model.snapshot import EndpointSpec, Tls
from sidecar.policy.endpoint import Endpoint, endpoint_key


def test_a_new_endpoint_has_the_spec_s_fields_and_a_clean_state() -> None:
    spec = EndpointSpec("10.0.3.7", 8443, labels={"version": "1"}, weight=3, tls=Tls.ORIGINATE, identity="spiffe://a/b")
    endpoint = Endpoint(spec)
    assert (endpoint.host, endpoint.port, endpoint.address) == ("10.0.3.7", 8443, ("10.0.3.7", 8443))
    assert endpoint.key == "10.0.3.7:8443"
    assert (endpoint.labels, endpoint.weight) == ({"version": "1"}, 3)
    assert (endpoint.tls, endpoint.identity) == (Tls.ORIGINATE, "spiffe://a/b")
    assert (endpoint.active, endpoint.successes, endpoint.failures, endpoint.idle) == (0, 0, 0, [])
    assert endpoint.healthy and not endpoint.breaker.tripped


def test_the_key_of_an_ipv6_address_has_brackets() -> None:
    assert endpoint_key("::1", 80) == "[::1]:80"
    assert endpoint_key("unix:/run/app.sock", 0) == "unix:/run/app.sock"


def test_a_placeholder_has_neither_a_port_nor_a_path():
    assert Endpoint(EndpointSpec("127.0.0.1", 0)).placeholder
    assert not Endpoint(EndpointSpec("127.0.0.1", 80)).placeholder
    assert not Endpoint(EndpointSpec("unix:/run/app.sock", 0)).placeholder


def test_update_keeps_state() -> None:
    endpoint = Endpoint(EndpointSpec("a", 1))
    endpoint.active, endpoint.successes = 4, 9
    endpoint.idle.append("connection")
    breaker = endpoint.breaker
    endpoint.update(EndpointSpec("a", 1, labels={"version": "2"}, weight=5, identity="spiffe://a/b"))
    assert (endpoint.labels, endpoint.weight, endpoint.identity) == ({"version": "2"}, 5, "spiffe://a/b")
    assert (endpoint.active, endpoint.successes, endpoint.idle) == (4, 9, ["connection"])
    assert endpoint.breaker is breaker
