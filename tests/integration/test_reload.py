"""Policies and identities that change on disk while requests run: nothing is lost, nothing bad is taken."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from support.mesh import Client, Conn, Mesh, Pair, Sidecar, connect, free_port, until
from support.pki import Leaf, Pki

from certs.authority import bundle_of
from certs.files import write_identity


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Mesh(tmp_path_factory.mktemp("reload")) as mesh:
        yield Pair(mesh, services={"admin": {}})


class Load:
    """Requests on four connections until told to stop; `answers` counts statuses and exceptions."""

    def __init__(self, pair: Pair, connections: int = 4) -> None:
        self.answers: Counter[object] = Counter()
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(pair, number)) for number in range(connections)]

    def _run(self, pair: Pair, number: int) -> None:
        try:
            while not self.stop.is_set():
                with pair.client() as client:
                    for count in range(20):
                        answer = client.get("/") if count % 2 else client.post("/", b"x" * 5000)
                        self.answers[answer.status, answer.reason] += 1
        except Exception as exc:
            self.answers[repr(exc)] += 1

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()

    def check(self) -> None:
        assert set(self.answers) == {(200, "")}, self.answers
        assert self.answers[200, ""] > 50


def renewals(sidecar: Sidecar) -> int:
    return sidecar.log.count("identity renewed")


def ended(client: Client) -> bool:
    """Whether the connection has ended; reads on."""
    try:
        return client.sock.recv(65536) == b""
    except OSError:
        return True


def write(sidecar: Sidecar, leaf: Leaf, *authorities: Pki, signalled: bool = True) -> None:
    """Put an identity in place, trusting these authorities, and wait until it is in force; without a signal the sidecar
    notices by itself, within a second or so."""
    bundle = bundle_of(*(pki.root for pki in authorities))
    before = renewals(sidecar)
    write_identity(sidecar.identity, leaf.chain, leaf.key, bundle)  # type: ignore[arg-type]
    if signalled:
        sidecar.process.send_signal(signal.SIGHUP)
    until(lambda: renewals(sidecar) > before, f"the new identity\n{sidecar.log}")


# -- identities


def test_certificates_are_renewed_under_load_without_a_failed_request(pair: Pair) -> None:
    pki = pair.mesh.pki
    with Load(pair) as load:
        for sidecar, service in ((pair.web, "web"), (pair.reviews, "reviews")):
            old = sidecar.admin("/config")["identity"]["fingerprint"]
            write(sidecar, pki.leaf(service), pki, signalled=False)
            assert sidecar.admin("/config")["identity"]["fingerprint"] != old
            time.sleep(0.2)
    load.check()


def test_a_root_is_rotated_under_load_without_a_failed_request(pair: Pair) -> None:
    """Trust both, issue from the new one, distrust the old one; and back."""
    old = pair.mesh.pki
    new = Pki()
    sidecars = ((pair.web, "web"), (pair.reviews, "reviews"))
    with Load(pair) as load:
        for before, after in ((old, new), (new, old)):
            for sidecar, service in sidecars:
                write(sidecar, before.leaf(service), before, after)
            for sidecar, service in sidecars:
                write(sidecar, after.leaf(service), before, after)
            for sidecar, service in sidecars:
                write(sidecar, after.leaf(service), after)
    load.check()


@pytest.mark.long
def test_a_root_that_is_removed_ends_the_connections_within_five_seconds(tmp_path: Path) -> None:
    """Idle and busy ones, on both sides; nothing is left that was let in by the old root."""
    with Mesh(tmp_path) as mesh:
        pair = Pair(mesh)
        new = Pki()

        def endless(conn: Conn) -> None:
            conn.take()
            conn.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while True:
                conn.send(b"1\r\nx\r\n")
                time.sleep(0.05)

        with pair.reviews.mesh_client() as idle, pair.reviews.mesh_client() as busy, pair.client() as relayed:
            assert idle.get("/").status == 200
            pair.app.script = endless
            pair.app.end_connections()
            for client in (busy, relayed):
                client.request("GET", "/")
                assert client.response(body=False).status == 200
            time.sleep(0.2)
            began = time.monotonic()
            write(pair.reviews, new.leaf("reviews"), new)
            until(lambda: pair.reviews.connections("in", "down") == 0, "their end", 8)
            assert time.monotonic() - began < 5.5  # the file is looked at once a second
            for client in (idle, busy, relayed):
                until(partial(ended, client), "its end", 2)
        with pytest.raises(OSError):
            Client(pair.reviews.mesh_socket()).get("/")
        until(lambda: not pair.app.open, "the end of the work upstream")


def test_a_root_that_the_caller_removes_ends_its_upstream_connections(tmp_path: Path) -> None:
    with Mesh(tmp_path) as mesh:
        pair = Pair(mesh)
        new = Pki()
        go = threading.Event()

        def slow(conn: Conn) -> None:
            while True:
                request = conn.take()
                if request.target == b"/slow":
                    go.wait(10)
                conn.reply(200, request.target)

        pair.app.script = slow
        with pair.client() as first, pair.client() as second:
            first.request("GET", "/slow")
            assert second.get("/quick").status == 200
            assert pair.web.metric("pillion_upstream_connections", service="reviews") == 2
            write(pair.web, new.leaf("web"), new)
            until(lambda: pair.web.metric("pillion_upstream_connections", service="reviews") <= 1)  # the idle one
            go.set()
            assert first.response().body == b"/slow"  # what was under way may finish
            until(lambda: pair.web.metric("pillion_upstream_connections", service="reviews") == 0, "the end", 6)
            response = first.get("/after")
            assert (response.status, response.reason) == (503, "connect_failed")


def test_an_identity_that_cannot_be_used_changes_nothing_and_is_said(pair: Pair) -> None:
    sidecar, pki = pair.reviews, pair.mesh.pki
    fingerprint = sidecar.admin("/config")["identity"]["fingerprint"]
    other = pki.leaf("admin")
    mine, second = pki.leaf("reviews"), pki.leaf("reviews")
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: write_identity(sidecar.identity, other.chain, other.key, pki.bundle), "refused"),  # type: ignore[arg-type]
        (lambda: (sidecar.identity / "cert.pem").write_text("nonsense"), "cert.pem"),
        (lambda: write_identity(sidecar.identity, mine.chain, second.key, pki.bundle), "key"),  # type: ignore[arg-type]
    ]
    for change, word in cases:
        logged = len(sidecar.log)
        change()
        until(lambda: word in sidecar.log[logged:], word)  # noqa: B023
        assert sidecar.admin("/config")["identity"]["fingerprint"] == fingerprint
        with pair.client() as client:
            assert client.get("/").status == 200
        assert "PRIVATE KEY" not in sidecar.log
    write(sidecar, mine, pki)
    (sidecar.identity / "key.pem").chmod(0o644)
    (sidecar.identity / "key.pem").write_bytes((sidecar.identity / "key.pem").read_bytes())
    until(lambda: "chmod 600" in sidecar.log)
    (sidecar.identity / "key.pem").chmod(0o600)
    assert sidecar.alive


# -- policies


def test_a_changed_file_is_taken_without_a_signal(pair: Pair) -> None:
    reloads = pair.web.reloads()
    pair.web.write({"late": {"routes": [{"respond": {"status": 418, "body": "teapot"}}]}})
    until(lambda: pair.web.reloads() == reloads + 1)
    with pair.client() as client:
        response = client.get("/", host="late")
        assert (response.status, response.body) == (418, b"teapot")


def test_policies_change_under_load_without_a_failed_request(pair: Pair) -> None:
    with Load(pair) as load:
        for number in range(6):
            routes = [{"name": f"r{number}", "timeout": {"total": f"{number + 5}s"}}]
            reviews = {**pair.web.services["reviews"], "routes": routes, "limits": {"connections": 50 + number}}
            pair.web.apply({"reviews": reviews})
            pair.reviews.apply({"reviews": {**pair.reviews.services["reviews"], "routes": routes}})
    load.check()


def test_an_endpoint_that_leaves_and_comes_back_costs_no_request(pair: Pair) -> None:
    twin = pair.mesh.sidecar(
        "reviews", {"web": {}, "reviews": {"ports": {"http": {"port": 80}}}}, app=pair.app, outbound=False
    )
    with Load(pair) as load:
        for addresses in ([twin.inbound], [pair.reviews.inbound, twin.inbound], [pair.reviews.inbound]):
            pair.web.apply({"reviews": {**pair.web.services["reviews"], "address": addresses}})
            time.sleep(0.15)
    load.check()
    pools = {each["endpoint"] for each in pair.web.admin("/clusters") if each["service"] == "reviews"}
    assert pools == {pair.reviews.inbound}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version: 1\nservices:\n  web: {}\n  reviews: {adress: []}\n", ["mesh.yaml:4:13", "adress", "address"]),
        ("version: 1\nservices: {web: {}\n", ["mesh.yaml:"]),
        ("version: 1\nservices: {reviews: {}}\n", ["web"]),
        ("", ["mesh.yaml"]),
        ("version: 1\nservices:\n  web: {filters: [{use: 'os:system'}]}\n", ["mesh.yaml:3", "os:system"]),
    ],
)
def test_a_bad_policy_changes_nothing_and_says_why(pair: Pair, text: str, words: list[str]) -> None:
    sidecar = pair.web
    revision = sidecar.admin("/config")["policy"]["revision"]
    failed = sidecar.metric("pillion_policy_reloads_total", result="failed")
    logged = len(sidecar.log)
    sidecar.policy_file.write_text(text)
    try:
        sidecar.process.send_signal(signal.SIGHUP)
        until(lambda: sidecar.metric("pillion_policy_reloads_total", result="failed") > failed)
        until(lambda: all(word in sidecar.log[logged:] for word in words), f"{words} in\n{sidecar.log[logged:]}")
        assert "the old one" in sidecar.log[logged:]
        assert sidecar.admin("/config")["policy"]["revision"] == revision
        with pair.client() as client:
            assert client.get("/").status == 200
    finally:
        sidecar.apply()


def test_a_policy_file_that_goes_away_changes_nothing(pair: Pair) -> None:
    sidecar = pair.web
    failed = sidecar.metric("pillion_policy_reloads_total", result="failed")
    sidecar.policy_file.unlink()
    try:
        until(lambda: sidecar.metric("pillion_policy_reloads_total", result="failed") > failed)
        with pair.client() as client:
            assert client.get("/").status == 200
    finally:
        sidecar.apply()


def test_local_ports_come_and_go_with_the_policy(pair: Pair) -> None:
    first, second = free_port(), free_port()
    pair.web.apply({"web": {"calls": {"reviews": {"local_port": first}}}})
    with connect(("127.0.0.1", first)) as kept:
        assert kept.get("/", host="x").status == 200
        pair.web.apply({"web": {"calls": {"reviews": {"local_port": second}}}})
        with connect(("127.0.0.1", second)) as client:
            assert client.get("/", host="x").status == 200
        with pytest.raises(ConnectionRefusedError):
            connect(("127.0.0.1", first))
    pair.web.apply({"web": {}})


def test_a_local_port_that_is_taken_refuses_the_policy_and_names_the_holder(pair: Pair) -> None:
    taken = pair.mesh.backend()
    sidecar = pair.web
    port = taken.address[1]
    failed = sidecar.metric("pillion_policy_reloads_total", result="failed")
    logged = len(sidecar.log)
    sidecar.write({"web": {"calls": {"reviews": {"local_port": port}}}, "never": {}})
    sidecar.process.send_signal(signal.SIGHUP)
    until(lambda: sidecar.metric("pillion_policy_reloads_total", result="failed") > failed)
    until(lambda: f"(pid {os.getpid()})" in sidecar.log[logged:], sidecar.log[logged:])
    assert str(port) in sidecar.log[logged:]
    assert "never" not in sidecar.admin("/config")["policy"]["services"]
    del sidecar.services["never"]
    sidecar.apply({"web": {}})


def test_a_removed_service_is_not_served_any_more_but_what_runs_finishes(pair: Pair) -> None:
    go = threading.Event()

    def slow(conn: Conn) -> None:
        conn.take()
        go.wait(10)
        conn.reply(200, b"finished")

    app = pair.mesh.backend(slow)
    pair.web.apply({"brief": {"address": [str(app)], "tls": "plain"}})
    with pair.client() as client:
        client.request("GET", "/", host="brief")
        until(lambda: app.requests)
        del pair.web.services["brief"]
        pair.web.apply()
        go.set()
        assert client.response().body == b"finished"
        assert client.get("/", host="brief").reason == "no_route"


def test_authorization_that_changes_holds_from_the_next_request_of_an_open_connection(pair: Pair) -> None:
    reviews = dict(pair.reviews.services["reviews"])
    with pair.client() as client:
        assert client.get("/").status == 200
        pair.reviews.apply({"reviews": {**reviews, "authz": {"deny": [{"from": ["web"]}]}}})
        response = client.get("/")
        assert (response.status, response.reason) == (403, "denied")
        pair.reviews.apply({"reviews": reviews})
        assert client.get("/").status == 200


def test_a_sighup_reopens_the_access_log(pair: Pair) -> None:
    moved = pair.web.access_file.with_name("moved.jsonl")
    pair.web.access_file.rename(moved)
    pair.web.apply()
    with pair.client() as client:
        client.get("/after-the-rotation")
    assert pair.web.logged(path="/after-the-rotation")
    assert "/after-the-rotation" not in moved.read_text()


@pytest.mark.long
def test_an_instance_that_ends_under_load_costs_no_request(pair: Pair) -> None:
    twin = pair.mesh.sidecar(
        "reviews", {"web": {}, "reviews": {"ports": {"http": {"port": 80}}}}, app=pair.app, outbound=False
    )
    pair.web.apply({"reviews": {**pair.web.services["reviews"], "address": [pair.reviews.inbound, twin.inbound]}})
    with Load(pair) as load:
        until(lambda: twin.connections("in", "down") >= 1)
        assert twin.stop() == 0
    load.check()
    pair.web.apply({"reviews": {**pair.web.services["reviews"], "address": [pair.reviews.inbound]}})


def test_nothing_is_left_behind(pair: Pair) -> None:
    for sidecar in (pair.web, pair.reviews):
        assert sidecar.crashes == 0
        until(lambda sidecar=sidecar: sidecar.metric("pillion_requests_active") == 0)  # type: ignore[misc]
