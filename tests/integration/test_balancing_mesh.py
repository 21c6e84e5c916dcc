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


def test_a_cookie_that_this_sidecar_has_not_made_so_chooses_nothing(web: Sidecar, backends: list[Backend]) -> None:
    """Changed, cut, of another service, or made up: it is disregarded, and a new one given."""
    sticky = {"routes": [{"sticky": {"level": "endpoint"}}], "address": [str(backend) for backend in backends]}
    versions = {
        "address": [{"at": str(backends[0]), "labels": {"version": "1"}}, {"at": str(backends[1])}],
        "versions": {"v1": {"labels": {"version": "1"}}},
        "routes": [{"to": "v1", "sticky": {"level": "endpoint", "cookie": "pillion_endpoint"}}],
    }
    web.apply({"stall": {"tls": "plain", **sticky}, "booth": {"tls": "plain", **versions}})
    apply(web, backends, **sticky)
    name = "pillion_endpoint="

    def given(host: str, cookie: str = "") -> tuple[bytes, str]:
        with web.client() as client:
            response = client.get("/", host=host, headers={"cookie": cookie} if cookie else {})
        return response.body, (response.header("set-cookie") or b"").decode().partition(";")[0].removeprefix(name)

    served_by, value = given("shop")
    assert given("shop", name + value) == (served_by, ""), "the one that was made is kept"
    middle = len(value) // 2
    swapped = "A" if value[middle] != "A" else "B"
    wrong = [
        value[:middle] + swapped + value[middle + 1 :],
        value[:-1],
        value + "A",
        given("stall")[1],
        given("booth")[1],
        "127.0.0.1:80",
        str(backends[3]),
        "",
    ]
    for each in wrong:
        found, fresh = given("shop", name + each)
        assert fresh and fresh != each, each
        assert given("shop", name + fresh) == (found, "")
    assert given("shop", f"{name}{wrong[0]}; {name}{value}") == (served_by, ""), (
        "a forged one does not hide the true one"
    )


def test_what_a_level_cannot_carry_spills_over(mesh: Mesh, web: Sidecar, backends: list[Backend]) -> None:
    """Two of four are open: 1.4 · 50 % of the traffic stays, 30 % goes to the standby."""
    ill = [mesh.backend(_erring) for _ in range(2)]
    standby = mesh.backend(name_of(9))
    addresses = [str(each) for each in (*ill, *backends[:2])]
    web.apply({
        "shop": {
            "address": [*({"at": each} for each in addresses), {"at": str(standby), "priority": 1}],
            "tls": "plain",
            "balance": {"policy": "random", "zone": "ignore"},
            "retry": {"max_retries": 0},
            "circuit_breaker": {"consecutive_failures": 1, "open_for": "60s", "max_open": "60s"},
        }
    })  # fmt: skip
    with web.client() as client:
        until(
            lambda: client.get("/", host="shop") and sum(row["breaker"] == "open" for row in rows(web)) == 2,
            "two open breakers",
        )
    seen = served(web, 600)
    assert set(seen) == {b"0", b"1", b"9"}
    assert 0.3 * 600 - 4 * 11.2 < seen[b"9"] < 0.3 * 600 + 4 * 11.2, seen  # four standard deviations
    assert web.metric("pillion_spilled_picks_total", service="shop") >= seen[b"9"]


def _erring(conn: Conn) -> None:
    while True:
        conn.take()
        conn.reply(500)
