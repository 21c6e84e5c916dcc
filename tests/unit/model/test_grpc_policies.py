"""What a policy says of gRPC: protocols, the deadline of calls, matches, statuses to retry, health."""

import pytest

from sidecar.model.canonical import snapshot_from_json, snapshot_to_json
from sidecar.model.load import Loaded, load_texts
from sidecar.model.snapshot import NONE, Health, Match, Protocol, Service


def load(text: str) -> Loaded:
    return load_texts({"mesh.yaml": f"version: 1\n{text}\n"})


def web(service: str, levels: str = "") -> Service:
    loaded = load(f"services: {{web: {service}}}\n{levels}")
    assert loaded.snapshot is not None, loaded.problems
    assert snapshot_from_json(snapshot_to_json(loaded.snapshot)) == loaded.snapshot
    return loaded.snapshot.services["web"]


def codes(text: str) -> list[str]:
    return [problem.code for problem in load(text).problems]


def test_protocols() -> None:
    numbers = ", ".join(f"p{n}: {{port: {n}, protocol: {each}}}" for n, each in enumerate(("http2", "grpc", "tcp"), 1))
    ports = web(f"{{ports: {{p0: {{port: 80}}, {numbers}}}}}").ports
    assert [port.protocol for port in ports] == [Protocol.HTTP, Protocol.HTTP2, Protocol.GRPC, Protocol.TCP]
    assert [port.protocol.is_http for port in ports] == [True, True, True, False]
    assert [port.protocol.is_http2 for port in ports] == [False, True, True, False]


@pytest.mark.parametrize(
    ("service", "levels", "total_s", "of_grpc_s"),
    [
        ("{}", "", 15, NONE),
        ("{timeout: {total: 2s}}", "", 2, 2),
        ("{timeout: {total: 15s}}", "", 15, 15),  # the built-in value, but stated
        ("{timeout: {total: none}}", "", NONE, NONE),
        ("{timeout: {total: null}}", "defaults: {timeout: {total: 1s}}", 15, NONE),
        ("{}", "defaults: {timeout: {total: 3s}}", 3, 3),
        ("{}", "enforced: {timeout: {total: {max: 30s}}}", 15, 30),
        ("{}", "enforced: {timeout: {total: {max: 5s}}}", 5, 5),
        ("{}", "enforced: {timeout: {total: {min: 20s}}}", 20, NONE),
        ("{timeout: {try: 1s}}", "", 15, NONE),
    ],
)
def test_the_total_of_calls_is_what_is_stated(service: str, levels: str, total_s: float, of_grpc_s: float) -> None:
    timeouts = web(service, levels).routes[0].timeouts
    assert (timeouts.total_s, timeouts.of_grpc_s) == (total_s, of_grpc_s)


def test_a_caller_may_limit_calls_that_have_no_limit() -> None:
    text = "services: {web: {calls: {shop: {timeout: {total: 1m}}}}, shop: {ports: {api: {port: 1, protocol: %s}}}}"
    assert codes(text % "grpc") == []
    assert codes(text % "http") == ["P0308"]


@pytest.mark.parametrize(
    ("grpc", "path"),
    [
        ("{service: shop.v1.Cart, method: AddItem}", "/shop.v1.Cart/AddItem"),
        ("{service: Cart}", "/Cart/*"),
        ("{method: AddItem}", "/*/AddItem"),
    ],
)
def test_a_match_of_a_service_or_method_is_one_of_its_path(grpc: str, path: str) -> None:
    routes = web(f"{{routes: [{{match: {{grpc: {grpc}, headers: {{x-a: b}}}}}}]}}").routes
    assert routes[0].match.path == path and routes[0].match.headers
    assert routes[1].match == Match()


def test_statuses_to_retry() -> None:
    retry = (
        web("{retry: {when: [unavailable, resource-exhausted, reset, 503, cancelled, unauthenticated]}}")
        .routes[0]
        .retry
    )
    assert retry.grpc == {14, 8, 1, 16} and retry.statuses == {503} and retry.failures == {"reset"}
    assert web("{}").routes[0].retry.grpc == frozenset()


def test_every_status_but_unavailable_is_warned_of_once() -> None:
    assert codes("services: {web: {retry: {when: [unavailable]}, routes: [{match: {path: /a}}, {}]}}") == []
    assert codes("services: {web: {retry: {when: [aborted]}, routes: [{match: {path: /a}}, {}]}}") == ["P0303"]
    assert codes("services: {web: {retry: {when: [aborted], max_retries: 0}}}") == ["P0305"]


@pytest.mark.parametrize(
    ("service", "levels", "health"),
    [
        ("{health: {grpc: true}}", "", Health(grpc="")),
        ("{health: {grpc: shop.v1.Cart, interval: 1s}}", "", Health(grpc="shop.v1.Cart", interval_s=1.0)),
        ("{health: {grpc: true}}", "defaults: {health: {http: /up}}", Health(grpc="")),
        ("{health: {http: /up}}", "defaults: {health: {grpc: true}}", Health(http="/up")),
        ("{health: {tcp: true}}", "defaults: {health: {grpc: true}}", Health()),
        ("{health: {grpc: null}}", "defaults: {health: {grpc: true}}", Health()),
    ],
)
def test_health(service: str, levels: str, health: Health) -> None:
    assert web(service, levels).health == health


def test_a_check_by_http_needs_a_port_that_speaks_it() -> None:
    text = "services: {web: {ports: {api: {port: 1, protocol: grpc}}, health: {http: /up}}}"
    assert codes(text) == ["P0305"]
    snapshot = load(text).snapshot
    assert snapshot is not None and snapshot.services["web"].health == Health()
