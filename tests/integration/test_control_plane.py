"""The control plane as a whole: real processes, real TLS, the real command line."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.control import ControlPlane, registered
from support.mesh import Mesh, until
from support.standin_control import Member, launch

SHOP: dict[str, Any] = {
    "reviews": {"ports": {"http": {"port": 8000}}, "authz": {"allow": [{"from": ["web"]}]}},
    "web": {"calls": {"reviews": {}}},
}


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path) as mesh:
        yield mesh


@pytest.fixture
def control(mesh: Mesh) -> ControlPlane:
    return ControlPlane(mesh)


class Load:
    """Requests at a steady rate through one sidecar, each judged."""

    def __init__(self, web: Member, rate: float = 100.0) -> None:
        self.web, self.rate = web, rate
        self.answers: dict[str, int] = {}
        self.ending = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        due = time.monotonic()
        client = self.web.client()
        while not self.ending:
            due = max(due + 1 / self.rate, time.monotonic() - 0.1)
            time.sleep(max(0.0, due - time.monotonic()))
            try:
                said = str(client.get("/").status)
            except Exception as error:
                said = repr(error)
                client.close()
                client = self.web.client()
            self.answers[said] = self.answers.get(said, 0) + 1
        client.close()

    def end(self) -> dict[str, int]:
        self.ending = True
        self.thread.join(20)
        return self.answers


def shop(control: ControlPlane) -> tuple[Member, Member]:
    control.apply(SHOP)
    reviews = control.member("reviews", app=control.mesh.backend())
    web = control.member("web", inbound="off")
    registered(control, "reviews")
    with web.client() as client:
        until(lambda: client.get("/").status == 200, "an answer")
    return reviews, web


def test_from_nothing_to_an_answer(mesh: Mesh, control: ControlPlane) -> None:
    reviews, web = shop(control)
    with web.client() as client:
        answer = client.get("/")
        assert answer.status == 200
        caller = {name.lower(): value for name, value in answer.json["headers"]}["x-forwarded-client-cert"]
        assert "URI=spiffe://mesh.local/service/web" in caller
    assert {each["service"] for each in control.get("sidecars")["sidecars"]} == {"reviews", "web"}
    assert control.cli("check")[0] == 0
    # A restart of a sidecar needs no token.
    assert web.stop() == 0
    again = launch(mesh, "web", state=web.state, inbound="off").await_ready()
    with again.client() as client:
        until(lambda: client.get("/").status == 200, "an answer after the restart")
    # One of the control plane neither changes nor cuts anything.
    assert control.stop() == 0
    control.start()
    until(lambda: again.source["connected"], "the sidecar's return")
    assert reviews.alive
    assert control.cli("check", "--wait", "20")[0] == 0


def test_callers_learn_within_a_second_of_what_comes_and_goes(mesh: Mesh, control: ControlPlane) -> None:
    _, web = shop(control)

    def known() -> list[str]:
        return sorted(row["endpoint"] for row in web.admin("/clusters") if row["service"] == "reviews")

    second = control.member("reviews", app=mesh.backend())
    began = time.monotonic()
    until(lambda: len(known()) == 2, "the second instance")
    assert time.monotonic() - began < 2.5  # its check of the application, its registration, and the debounce
    assert second.stop() == 0
    until(lambda: len(known()) == 1, "its withdrawal")
    assert "every caller knows" in second.log


@pytest.mark.long
def test_killed_it_is_gone_within_one_ttl(mesh: Mesh, control: ControlPlane) -> None:
    _, web = shop(control)
    second = control.member("reviews", app=mesh.backend())
    registered(control, "reviews", 2)
    load = Load(web)
    time.sleep(16)  # nobody is judged before the control plane has been up for one TTL
    os.kill(second.process.pid, signal.SIGKILL)
    began = time.monotonic()
    rows = lambda: [row for row in web.admin("/clusters") if row["service"] == "reviews"]  # noqa: E731
    until(lambda: len(rows()) == 1, "its end", 20)
    assert time.monotonic() - began < 18
    answers = load.end()
    assert set(answers) == {"200"}, answers


def test_with_the_control_plane_gone_everything_goes_on(mesh: Mesh, control: ControlPlane) -> None:
    _, web = shop(control)
    load = Load(web)
    control.kill()
    time.sleep(2)
    started = launch(mesh, "web", state=_copy_of(web, mesh), inbound="off").await_ready()
    with started.client() as client:
        assert client.get("/").status == 200  # by the state on disk
    assert "policy" in started.log
    control.start()
    until(lambda: web.source["connected"], "the return")
    control.apply({**SHOP, "reviews": {**SHOP["reviews"], "retry": {"max_retries": 0}}})
    assert set(load.end()) == {"200"}


def _copy_of(member: Member, mesh: Mesh) -> Path:
    import shutil

    copy = mesh.path / "copied-state"
    shutil.copytree(member.state, copy)
    return copy


@pytest.mark.long
def test_without_state_it_waits_and_says_so(mesh: Mesh, control: ControlPlane) -> None:
    token = control.token("web")
    control.kill()
    member = launch(mesh, "web", token=token, inbound="off")
    until(lambda: "waiting" in member.log or "cannot" in member.log or "refused" in member.log, "a word about it")
    assert member.alive and not member.is_ready
    control.start()
    member.await_ready(30)


def test_apply_names_who_rejects_it_and_why_and_the_last_good_policy_serves_on(
    mesh: Mesh, control: ControlPlane
) -> None:
    _, web = shop(control)
    bad = {**SHOP["reviews"], "filters": [{"use": "not_there:Filter", "side": "out"}]}
    path = control.policy_file({"reviews": bad})
    code, _, said = control.cli("policy", "apply", "-f", str(path), "-m", "a filter that is not there")
    assert code == 1
    assert "not_there" in said and "web" in said
    with web.client() as client:
        assert client.get("/").status == 200
    (row,) = [each for each in control.get("sidecars")["sidecars"] if each["service"] == "web"]
    assert "service/reviews" in row["rejected"]
    assert control.cli("check")[0] == 1
    control.ok("policy", "rollback", "1")
    until(lambda: control.cli("check")[0] == 0, "peace")


def test_a_refusal_names_the_file_and_line_of_the_rule(mesh: Mesh, control: ControlPlane) -> None:
    reviews, web = shop(control)
    control.apply({**SHOP, "reviews": {**SHOP["reviews"], "authz": {"allow": [{"from": ["other"]}]}}, "other": {}})
    with web.client() as client:
        assert client.get("/").status == 403
    assert "mesh.yaml" in reviews.logged(reason="denied")["rule"] or reviews.logged(reason="denied")["rule"]
    code, out, _ = control.cli("can", "web", "reviews", "GET", "/")
    assert code == 1 and "denied" in out


@pytest.mark.long
def test_certificates_of_seconds_are_renewed_under_load_without_a_failed_request(mesh: Mesh) -> None:
    control = ControlPlane(mesh, "r1", "--leaf-ttl=6s")
    reviews, web = shop(control)
    first = {member.admin("/config")["identity"]["fingerprint"] for member in (reviews, web)}
    load = Load(web, 500.0)
    time.sleep(20)
    answers = load.end()
    last = {member.admin("/config")["identity"]["fingerprint"] for member in (reviews, web)}
    assert not first & last
    assert set(answers) == {"200"}, answers
    assert answers["200"] > 2000, answers
    assert reviews.log.count("identity renewed") >= 3


@pytest.mark.long
def test_one_that_is_banned_is_served_no_more(mesh: Mesh, control: ControlPlane) -> None:
    _, web = shop(control)
    (row,) = [each for each in control.get("sidecars")["sidecars"] if each["service"] == "web"]
    control.ok("cert", "ban", row["id"], "--reason", "stolen")

    def refused() -> bool:
        with web.client() as client:
            return client.get("/").status == 503

    until(refused, "the refusal")
    assert control.stop() == 0


@pytest.mark.long
def test_two_control_planes_over_etcd_one_killed(mesh: Mesh) -> None:
    from support.etcd_cluster import Etcd, need_etcd

    need_etcd()
    (mesh.path / "etcd").mkdir()
    with Etcd(mesh.path / "etcd") as etcd:
        store = "etcd://" + ",".join(f"{host}:{port}" for host, port in etcd.hosts)
        one = ControlPlane(mesh, "r1", store=store)
        one.ok("ca", "replica", "--dir", str(one.state / "ca"), "--out", str(mesh.path / "ca2"))
        two = ControlPlane(mesh, "r2", store=store, ca=mesh.path / "ca2")
        reviews, web = shop(one)
        until(lambda: len(one.get("replicas")["replicas"]) == 2, "both replicas")
        load = Load(web)
        connected = {member: member.source["connected"] for member in (reviews, web)}
        one.kill()
        began = time.monotonic()
        for member in connected:
            until(lambda m=member: m.source["connected"] == two.addresses["mesh"], "the move")  # type: ignore[misc]
        assert time.monotonic() - began < 10
        third = launch(mesh, "reviews", token=two_token(two, one), app=mesh.backend()).await_ready()
        until(lambda: len([r for r in web.admin("/clusters") if r["service"] == "reviews"]) == 2, "what is new")
        assert third.stop() == 0
        assert set(load.end()) == {"200"}


def two_token(two: ControlPlane, one: ControlPlane) -> str:
    """The admin's token is good at every replica."""
    context = json.loads(one.context.read_text())
    context["url"] = f"https://{two.addresses['join']}"
    two.context.write_text(json.dumps(context))
    two.context.chmod(0o600)
    return two.token("reviews")
