"""Balancing from a policy file to real sockets: who is asked, what `/clusters` and the metrics show."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.mesh import Backend, Conn, Mesh, Sidecar, until

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Mesh(tmp_path_factory.mktemp("balancing")) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def web(mesh: Mesh) -> Iterator[Sidecar]:
    options = ("--zone", "eu-1a", "--allow-filters", "balancer_cheapest", "--filter-path", str(EXAMPLES))
    sidecar = mesh.sidecar("web", {"web": {}}, options=options, inbound=False)
    yield sidecar
    assert sidecar.crashes == 0


def name_of(number: int) -> Any:
    def script(conn: Conn) -> None:
        while True:
            conn.take()
            conn.reply(200, b"%d" % number)

    return script


@pytest.fixture(scope="module")
def backends(mesh: Mesh) -> list[Backend]:
    return [mesh.backend(name_of(number)) for number in range(4)]


def apply(web: Sidecar, backends: list[Backend], places: Any = ({}, {}, {}, {}), **policy: Any) -> None:
    addresses = [{"at": str(backend), **place} for backend, place in zip(backends, places, strict=True)]
    web.apply({"shop": {"address": addresses, "tls": "plain", **policy}})


def served(web: Sidecar, count: int, **headers: str) -> Counter[bytes]:
    """Who answers requests that come one after the other."""
    with web.client() as client:
        return Counter(client.get("/", host="shop", headers=headers).body for _ in range(count))


def rows(web: Sidecar) -> list[dict[str, Any]]:
    return [row for row in web.admin("/clusters") if row["service"] == "shop"]


def test_hashing_by_a_header(web: Sidecar, backends: list[Backend]) -> None:
    for policy in ("maglev", "ring-hash"):
        apply(web, backends, balance={"policy": policy, "by": "header:x-user"})
        homes = [served(web, 5, **{"x-user": f"user-{n}"}) for n in range(12)]
        assert all(len(home) == 1 for home in homes) and len({next(iter(home)) for home in homes}) > 1
        assert len(served(web, 40)) > 1


def test_zones_priorities_and_weights_are_shown_and_heeded(web: Sidecar, backends: list[Backend]) -> None:
    places = ({"zone": "eu-1a"}, {"zone": "eu-1a", "weight": 3}, {"zone": "eu-1b"}, {"zone": "eu-1a", "priority": 1})
    apply(web, backends, places, balance={"policy": "peak-ewma"})
    assert set(served(web, 40)) <= {b"0", b"1"}
    shown = [(row["zone"], row["priority"], row["weight"], row["service_panic"]) for row in rows(web)]
    assert shown == [("eu-1a", 0, 1, False), ("eu-1a", 0, 3, False), ("eu-1b", 0, 1, False), ("eu-1a", 1, 1, False)]
    assert all(0.0 < row["balancer"]["ewma_ms"] <= 30.0 for row in rows(web)[:2])
    assert web.metric("pillion_zone_picks_total", service="shop") >= 40
    apply(web, backends, places, balance={"policy": "random", "zone": "ignore"})
    assert set(served(web, 60)) == {b"0", b"1", b"2"}


def test_a_balancer_of_your_own(web: Sidecar, backends: list[Backend]) -> None:
    places = [{"labels": {"price": str(price)}} for price in (3, 1, 2, 3)]
    apply(web, backends, places, balance={"policy": "balancer_cheapest:Cheapest"})
    assert set(served(web, 20)) == {b"1"}


def test_a_mistake_of_it_costs_no_request(web: Sidecar, backends: list[Backend]) -> None:
    places = [{"labels": {"price": "cheap"}}] * 4
    apply(web, backends, places, balance={"policy": "balancer_cheapest:Cheapest"})
    assert sum(served(web, 20).values()) == 20
    assert web.metric("pillion_balancer_errors_total", service="shop") == 20
    assert "could not convert string to float" in web.log


def test_what_cannot_be_loaded_is_refused_and_changes_nothing(web: Sidecar, backends: list[Backend]) -> None:
    apply(web, backends, balance={"policy": "round-robin"})
    failed = web.reloads("failed")
    for balance, says in (
        ({"policy": "os:system"}, "is not allowed here"),
        ({"policy": "peak-ewma", "with": {"decay": 1}}, "balance.with.decay: unknown key"),
    ):
        addresses = [str(backend) for backend in backends]
        web.write({"shop": {"address": addresses, "tls": "plain", "balance": balance}})
        failed = until(lambda before=failed: web.reloads("failed") > before and web.reloads("failed"))
        until(lambda says=says: says in web.log)  # written by a thread of its own
    assert served(web, 40) == dict.fromkeys((b"0", b"1", b"2", b"3"), 10)


def test_a_client_stays_with_its_endpoint(web: Sidecar, backends: list[Backend]) -> None:
    apply(web, backends, routes=[{"sticky": {"level": "endpoint"}}])
    with web.client() as client:
        first = client.get("/", host="shop")
    cookie = (first.header("set-cookie") or b"").decode()
    assert cookie.startswith("pillion_endpoint=") and "127.0.0.1" not in cookie
    assert served(web, 20, cookie=cookie.partition(";")[0]) == {first.body: 20}
