"""Two control planes over a three-member etcd, sidecars under load, and everything that happens to such a cluster.

After each fault the same must hold: not one request of the traffic has failed, no instance was lost or falsely removed,
what was acknowledged is there, and a policy applied afterwards reaches everybody. While there is no quorum, a change is
refused clearly, and what was not acknowledged may have happened or not, but never half.
"""

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
from support.etcd_cluster import Etcd, need_etcd
from support.mesh import Mesh, until
from support.standin_control import Member

pytestmark = pytest.mark.long

RATE = 100.0


def shop(number: int) -> dict[str, Any]:
    """A policy that can be told from the others by what /marker answers."""
    marker = {"name": "marker", "match": {"path": "/marker"}, "respond": {"status": 200, "body": f"policy {number}"}}
    return {
        "reviews": {"ports": {"http": {"port": 8000}}, "routes": [marker, {"name": "default"}]},
        "web": {"calls": {"reviews": {}}},
    }


class Load:
    """Requests at a steady rate through one sidecar; what was not 200."""

    def __init__(self, web: Member) -> None:
        self.web = web
        self.count = 0
        self.failures: list[str] = []
        self.ending = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        due = time.monotonic()
        client = self.web.client()
        while not self.ending:
            due = max(due + 1 / RATE, time.monotonic() - 0.1)
            time.sleep(max(0.0, due - time.monotonic()))
            self.count += 1
            try:
                answer = client.get("/")
                if answer.status != 200:
                    self.failures.append(f"{answer.status} {answer.reason}")
            except Exception as error:
                self.failures.append(repr(error))
                client.close()
                client = self.web.client()
        client.close()

    def stop(self) -> None:
        self.ending = True
        self.thread.join(20)

    def end(self) -> None:
        self.stop()
        assert not self.failures, (len(self.failures), self.count, self.failures[:5])


class Cluster:
    def __init__(self, mesh: Mesh, etcd: Etcd) -> None:
        self.mesh, self.etcd = mesh, etcd
        store = "etcd://" + ",".join(f"{host}:{port}" for host, port in etcd.hosts)
        self.one = ControlPlane(mesh, "r1", store=store)
        self.one.ok("ca", "replica", "--dir", str(self.one.state / "ca"), "--out", str(mesh.path / "ca2"))
        self.two = ControlPlane(mesh, "r2", store=store, ca=mesh.path / "ca2")
        context = json.loads(self.one.context.read_text())
        self.two.context.write_text(json.dumps(context | {"url": f"https://{self.two.addresses['join']}"}))
        self.two.context.chmod(0o600)
        self.applied = 1
        self.tokens: list[str] = []
        self.one.apply(shop(1))
        self.members = [each.member("reviews", app=mesh.backend()) for each in (self.one, self.two)]
        self.web = self.one.member("web", inbound="off")
        registered(self.one, "reviews", 2)
        until(lambda: status(self.web) == 200, "an answer")
        until(lambda: len(self.one.get("replicas")["replicas"]) == 2, "both replicas")
        self.load = Load(self.web)
        mesh.stack.callback(self.load.stop)

    def acknowledge(self, control: ControlPlane) -> bool:
        """A token; whether it was acknowledged."""
        code, out, said = control.cli("token", "create", "--service", "web", "-o", "json")
        if code == 0:
            self.tokens.append(json.loads(out)["id"])
            return True
        assert code in (1, 3) and said, (code, out, said)
        assert "Traceback" not in said
        return False

    def apply(self, control: ControlPlane, *options: str) -> tuple[int, str]:
        """A policy that nobody has seen yet."""
        self.applied += 1
        path = control.policy_file(shop(self.applied))
        code, out, said = control.cli("policy", "apply", "-f", str(path), *options)
        return code, out + said

    def sound(self, limit_s: float = 40.0) -> None:
        """Everything that must hold once the fault is over."""
        for control in (self.one, self.two):
            well(control, limit_s)
        assert self.acknowledge(self.one) and self.acknowledge(self.two)
        for control in (self.one, self.two):
            code, said = self.apply(control)
            assert code == 0, said
            until(lambda: marker(self.web) == f"policy {self.applied}", "the policy in force", 10)
            rows = control.get("sidecars")["sidecars"]
            assert len(rows) == 3 and all(each["connected"] and each["current"] for each in rows), rows
            kept = {each["id"] for each in control.get("tokens")["tokens"]}
            assert not set(self.tokens) - kept, "a token that was acknowledged is gone"
        registered(self.one, "reviews", 2)
        registered(self.two, "reviews", 2)
        rows = [row for row in self.web.admin("/clusters") if row["service"] == "reviews"]
        assert len(rows) == 2, rows
        for control in (self.one, self.two):
            assert "Traceback" not in control.log, control.log[-4000:]
            assert control.process is not None and control.process.poll() is None
        self.load.end()

    def nobody_was_removed(self) -> None:
        for control in (self.one, self.two):
            assert ": gone, was up" not in control.log and ": suspect, was up" not in control.log, control.log[-3000:]


def marker(web: Member) -> str:
    with web.client() as client:
        return client.get("/marker").body.decode()


def status(web: Member) -> int:
    with web.client() as client:
        return client.get("/").status


def well(control: ControlPlane, limit_s: float) -> None:
    deadline, said = time.monotonic() + limit_s, ""
    while time.monotonic() < deadline:
        code, said, _ = control.cli("check")
        if code == 0:
            return
        time.sleep(0.2)
    raise AssertionError(said + control.log[-3000:])


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path) as mesh:
        yield mesh


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    need_etcd()
    (tmp_path / "etcd").mkdir()
    with Etcd(tmp_path / "etcd", members=3) as etcd:
        yield etcd


@pytest.fixture
def cluster(mesh: Mesh, etcd: Etcd) -> Cluster:
    return Cluster(mesh, etcd)


def test_a_member_is_killed_and_another_frozen(cluster: Cluster) -> None:
    leader = cluster.etcd.leader()
    leader.kill()
    until(lambda: cluster.acknowledge(cluster.one), "a change by the others", 20)
    until(lambda: cluster.apply(cluster.two)[0] == 0, "a policy by the others", 20)
    leader.start()
    cluster.etcd.wait()
    frozen = cluster.etcd.leader()
    frozen.freeze()
    until(lambda: cluster.acknowledge(cluster.one), "a change by the others", 20)
    until(lambda: cluster.apply(cluster.two)[0] == 0, "a policy by the others", 20)
    frozen.thaw()
    cluster.sound()
    cluster.nobody_was_removed()


@pytest.mark.parametrize(
    ("how", "for_s"),
    [("killed", 5.0), *(pytest.param(how, 20.0, marks=pytest.mark.long) for how in ("killed", "frozen"))],
)
def test_the_quorum_is_lost(cluster: Cluster, how: str, for_s: float) -> None:
    gone = cluster.etcd.members[:2]
    for member in gone:
        member.kill() if how == "killed" else member.freeze()
    began = time.monotonic()
    # A change is refused, clearly, and soon.
    code, said = cluster.apply(cluster.one)
    assert code in (1, 3) and "store" in said and time.monotonic() - began < 20, (code, said)
    assert "Traceback" not in said
    cluster.acknowledge(cluster.two)
    code, out, _ = cluster.one.cli("check")
    assert code == 1 and "takes no changes" in out, out
    # What is known can be read, and whoever comes back is told it.
    assert cluster.one.cli("get", "services")[0] == 0
    time.sleep(max(0.0, for_s - (time.monotonic() - began)))
    for member in gone:
        member.start() if how == "killed" else member.thaw()
    cluster.etcd.wait()
    cluster.sound()
    cluster.nobody_was_removed()


@pytest.mark.long
def test_compaction_while_a_control_plane_stands_still(cluster: Cluster) -> None:
    assert cluster.one.process is not None
    os.kill(cluster.one.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    until(lambda: cluster.web.source["connected"] == cluster.two.addresses["mesh"], "the move", 40)
    for _ in range(5):
        assert cluster.acknowledge(cluster.two)
    code, said = cluster.apply(cluster.two, "--no-wait")
    assert code == 0, said
    revision = json.loads(cluster.etcd.ctl("get", "x", "-w", "json").stdout)["header"]["revision"]
    cluster.etcd.ctl("compact", str(revision), "--physical=true")
    time.sleep(max(0.0, 20 - (time.monotonic() - began)))
    os.kill(cluster.one.process.pid, signal.SIGCONT)
    cluster.sound()  # the lease of an instance may end before its sidecar has moved; the other serves meanwhile


@pytest.mark.long
def test_all_of_etcd_is_started_again(cluster: Cluster) -> None:
    for member in cluster.etcd.members:
        member.kill()
    time.sleep(20)  # all leases run out meanwhile, as far as anybody can tell
    for member in cluster.etcd.members:
        member.start()
    cluster.etcd.wait()
    cluster.sound()
    cluster.nobody_was_removed()


@pytest.mark.long
def test_both_control_planes_stand_still(cluster: Cluster) -> None:
    """All leases end, since nobody renews them. Whoever goes on first must not take that for the sidecars' end."""
    for control in (cluster.one, cluster.two):
        assert control.process is not None
        os.kill(control.process.pid, signal.SIGSTOP)
    time.sleep(25)
    for control in (cluster.one, cluster.two):
        assert control.process is not None
        os.kill(control.process.pid, signal.SIGCONT)
    cluster.sound()


@pytest.mark.long
def test_a_full_etcd(mesh: Mesh, tmp_path: Path) -> None:
    need_etcd()
    (tmp_path / "etcd").mkdir()
    with Etcd(tmp_path / "etcd", members=3, arguments=["--quota-backend-bytes", str(16 * 1024 * 1024)]) as etcd:
        cluster = Cluster(mesh, etcd)
        for number in range(60):
            if etcd.ctl("put", f"/filler/{number}", check=False, stdin=b"x" * 1_000_000).returncode:
                break
        until(lambda: not cluster.acknowledge(cluster.one), "the refusal", 20)
        code, said = cluster.apply(cluster.two)
        assert code in (1, 3) and "etcdctl defrag" in said and "alarm disarm" in said, (code, said)
        code, out, _ = cluster.one.cli("check")
        assert code == 1 and "is full" in out and "etcdctl" in out, out
        time.sleep(20)  # longer than a lease lives
        etcd.ctl("del", "--prefix", "/filler/")
        revision = json.loads(etcd.ctl("get", "x", "-w", "json").stdout)["header"]["revision"]
        etcd.ctl("compact", str(revision), "--physical=true")
        for member in etcd.members:
            etcd.ctl("--command-timeout=20s", "defrag", member=member)
        etcd.ctl("alarm", "disarm")
        cluster.sound()
        cluster.nobody_was_removed()
