"""Failure detection on real sockets: the success rate that opens a breaker, and outliers: one bad endpoint of six is
ejected, comes back, and panic overrules it. What happened is in log, metrics, `/clusters` and `/events`."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.control import ControlPlane
from support.mesh import Backend, Conn, Mesh, Sidecar, until

pytestmark = pytest.mark.long

OUTLIERS = {"interval": "1s", "eject_for": "2s", "max_eject_for": "2s"}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    with Mesh(tmp_path_factory.mktemp("outliers")) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def web(mesh: Mesh) -> Iterator[Sidecar]:
    sidecar = mesh.sidecar("web", {"web": {}}, inbound=False)
    yield sidecar
    assert sidecar.crashes == 0


class Shop:
    """Six endpoints, the first of which errs while `bad` is set."""

    def __init__(self, mesh: Mesh, web: Sidecar) -> None:
        self.web = web
        self.bad = True
        self.backends: list[Backend] = [mesh.backend(self._script(number)) for number in range(6)]
        self.seen: Counter[int] = Counter()

    def _script(self, number: int) -> Any:
        def script(conn: Conn) -> None:
            while True:
                conn.take()
                self.seen[number] += 1
                conn.reply(500 if self.bad and not number else 200)

        return script

    def apply(self, **policy: Any) -> None:
        service = {
            "address": [str(backend) for backend in self.backends],
            "tls": "plain",
            "balance": {"policy": "round-robin"},
            "retry": {"max_retries": 0},
            "circuit_breaker": {"consecutive_failures": 1_000_000},
            **policy,
        }
        self.web.apply({"shop": service})

    def row(self, number: int = 0) -> dict[str, Any]:
        rows: list[dict[str, Any]] = [row for row in self.web.admin("/clusters") if row["service"] == "shop"]
        return rows[number]


@contextmanager
def load(web: Sidecar) -> Iterator[None]:
    """As much as three clients can ask."""
    stop = threading.Event()

    def ask() -> None:
        with web.client() as client:
            while not stop.is_set():
                client.get("/", host="shop")

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_ejected_back_and_panic(mesh: Mesh, web: Sidecar) -> None:
    shop = Shop(mesh, web)
    shop.apply(outliers=OUTLIERS)
    with load(web):
        until(lambda: shop.row()["ejected_s"] is not None, limit_s=15)
    row = shop.row()
    assert 0.0 <= row["ejected_s"] <= 2.0 and row["healthy"] is True
    assert " outlier ejected: success rate 0.0% of " in row["events"][0]
    assert row["events"][0].endswith("; for 2s (1st time)")
    assert web.metric("pillion_outlier_ejections_total", service="shop") == 1
    assert web.metric("pillion_outlier_ejected", service="shop") == 1
    until(lambda: "outlier of shop at " in web.log)

    shop.seen.clear()
    with web.client() as client:
        statuses = Counter(client.get("/", host="shop").status for _ in range(60))
    assert statuses == {200: 60} and not shop.seen[0]

    shop.bad = False  # and no traffic: it comes back all the same
    until(lambda: shop.row()["ejected_s"] is None, limit_s=4)
    assert "returned: its ejection is over" in shop.row()["events"][0]
    assert web.metric("pillion_outlier_ejected", service="shop") == 0
    shop.seen.clear()
    with web.client() as client:
        for _ in range(60):
            client.get("/", host="shop")
    assert shop.seen[0] == 10

    shop.bad = True
    shop.apply(outliers={**OUTLIERS, "eject_for": "60s", "max_eject_for": "60s", "panic_threshold": "90%"})
    with load(web):
        until(lambda: shop.row()["ejected_s"] is not None, limit_s=15)
        assert shop.row()["service_panic"] is True
        before = shop.seen[0]
        until(lambda: shop.seen[0] > before + 10)  # in panic it serves
    said = [each["event"] for each in web.admin("/events") if each["kind"] == "panic"]
    assert said[0].startswith("panic: 5 of 6 endpoints are healthy (1 ejected), under 90%")

    shop.apply()  # no outliers any more
    assert shop.row()["ejected_s"] is None and shop.row()["service_panic"] is False
    assert "the policy ejects no outliers any more" in shop.row()["events"][0]


def test_a_low_success_rate_opens_the_breaker(mesh: Mesh, web: Sidecar) -> None:
    """2 of 5 are 40 %, under 60 %; 2 of 4 were too few to say anything."""
    answers = [200, 500, 200, 500, 429, 200]

    def script(conn: Conn) -> None:
        while True:
            conn.take()
            conn.reply(answers.pop(0))

    app = mesh.backend(script)
    breaker = {"consecutive_failures": 1000, "success_rate": "60%", "open_for": "60s", "max_open": "60s"}
    web.apply(
        {"shop": {"address": [str(app)], "tls": "plain", "retry": {"max_retries": 0}, "circuit_breaker": breaker}}
    )
    with web.client() as client:
        statuses = [client.get("/", host="shop").status for _ in range(7)]
    assert statuses == [200, 500, 200, 500, 429, 503, 503]
    (row,) = [row for row in web.admin("/clusters") if row["service"] == "shop"]
    assert row["breaker"] == "open" and row["successes"] == 2 and row["failures"] == 2
    assert row["events"][0].endswith(": success rate 40% of 5 requests in 10 s")
    assert web.admin("/events")[0]["event"].endswith(": success rate 40% of 5 requests in 10 s")


def test_the_evidence_of_consecutive_failures(mesh: Mesh, web: Sidecar) -> None:
    def script(conn: Conn) -> None:
        while True:
            conn.take()
            conn.reply(503)

    app = mesh.backend(script)
    web.apply({"shop": {"address": [str(app)], "tls": "plain", "retry": {"max_retries": 0}}})
    with web.client() as client:
        reasons = [client.get("/", host="shop").reason for _ in range(8)]
    assert reasons[-1] == "circuit_open" and "circuit_open" not in reasons[:7]
    text = ": 7 consecutive failures, the last 503"
    (row,) = [row for row in web.admin("/clusters") if row["service"] == "shop"]
    assert row["events"][0].endswith(text)
    until(lambda: text in web.log)


def test_what_a_caller_avoids_is_seen_from_the_control_plane(tmp_path: Path) -> None:
    with Mesh(tmp_path) as mesh:
        control = ControlPlane(mesh)
        bad, *good = [mesh.backend(_always(500 if not number else 200)) for number in range(6)]
        shop = {
            "address": [str(backend) for backend in (bad, *good)],
            "tls": "plain",
            "balance": {"policy": "round-robin"},
            "retry": {"max_retries": 0},
            "circuit_breaker": {"consecutive_failures": 1_000_000},
            "outliers": {"interval": "1s", "eject_for": "60s"},
        }
        control.apply({"shop": shop, "web": {}}, "-m", "the shop")
        web = control.member("web", "--inbound=off")
        with load(web):
            until(lambda: web.metric("pillion_outlier_ejected", service="shop") == 1, limit_s=15)
        page = until(lambda: "Avoided" in (page := control.ok("describe", "service", "shop")) and page, limit_s=20)
        assert "ejected for web" in page
        line = next(line for line in page[page.index("Avoided") :].splitlines() if line.strip().startswith(str(bad)))
        assert " web " in line and " outlier ejected: success rate " in line


def _always(status: int) -> Any:
    def script(conn: Conn) -> None:
        while True:
            conn.take()
            conn.reply(status)

    return script
