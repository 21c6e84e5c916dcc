"""A control plane with its embedded store, killed at random moments while everything is being changed.

Somebody applies policies, somebody makes tokens, somebody joins and registers, each as fast as it is answered; then the
process gets SIGKILL. Whatever had been acknowledged must be there after the start, whole; what was on its way may be
there or not. The moments come from a seed.
"""

import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.control import ControlPlane
from support.mesh import Closed, Mesh
from support.rogue import Rogue, ask, join_client

Json = Any


class Acknowledged:
    """What the control plane has said yes to."""

    def __init__(self) -> None:
        self.changes: dict[int, int] = {}  # number of the change -> of the policy
        self.sent = 0  # the newest policy that was asked for
        self.tokens: set[str] = set()
        self.revoked: set[str] = set()
        self.sidecars: set[str] = set()
        self.ports: dict[str, int] = {}  # of the registration, by sidecar
        self.ports_sent: dict[str, int] = {}


class Writers:
    def __init__(self, control: ControlPlane, seen: Acknowledged, join_token: str) -> None:
        self.control, self.seen, self.join_token = control, seen, join_token
        self.bearer = "Bearer " + (control.state / "admin-token").read_text().strip()
        self.problems: list[str] = []
        self.ending = False
        works = (self._apply, self._make_tokens, self._register)
        self.threads = [threading.Thread(target=self._run, args=(work,), daemon=True) for work in works]
        for thread in self.threads:
            thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            while not self.ending:
                work()
        except (OSError, Closed):
            pass  # it was killed
        except Exception as error:
            self.problems.append(repr(error))

    def end(self) -> None:
        self.ending = True
        for thread in self.threads:
            thread.join(20)
        assert not self.problems, self.problems

    def _apply(self) -> None:
        with join_client(self.control) as client:
            while not self.ending:
                self.seen.sent += 1
                number = self.seen.sent
                policy = {"version": 1, "services": {
                    name: {"timeout": {"total": f"{number}s"}} for name in ("reviews", "web", "third")}}  # fmt: skip
                body = {"files": {"mesh.yaml": json.dumps(policy)}, "base": None, "message": f"number {number}"}
                status, answer = ask(client, "POST", "/v1/policy/apply", body, authorization=self.bearer)
                assert status == 200, answer
                self.seen.changes[answer["change"]] = number

    def _make_tokens(self) -> None:
        with join_client(self.control) as client:
            for number in itertools.count(1):
                body = {"kind": "join", "service": "web", "uses": 1, "ttl_s": 3600}
                status, answer = ask(client, "POST", "/v1/tokens", body, authorization=self.bearer)
                assert status == 200, answer
                self.seen.tokens.add(answer["id"])
                if number % 5 == 0:
                    gone = answer["id"]
                    self.seen.tokens.discard(gone)
                    status, answer = ask(client, "DELETE", f"/v1/tokens/{gone}", authorization=self.bearer)
                    assert status == 200, answer
                    self.seen.revoked.add(gone)

    def _register(self) -> None:
        rogue = Rogue(self.control, "web", self.join_token)
        self.seen.sidecars.add(rogue.id)
        for port in range(1000, 1005):
            self.seen.ports_sent[rogue.id] = port
            status, answer = rogue.post("/v1/register", {"host": "127.0.0.1", "port": port})
            if status == 429:
                break
            assert status == 200, answer
            self.seen.ports[rogue.id] = port


def check(control: ControlPlane, seen: Acknowledged) -> None:
    with join_client(control) as client:
        bearer = "Bearer " + (control.state / "admin-token").read_text().strip()

        def get(path: str) -> Json:
            status, answer = ask(client, "GET", path, authorization=bearer)
            assert status == 200, answer
            return answer

        tokens = {each["id"] for each in get("/v1/tokens")["tokens"]}
        assert not seen.tokens - tokens, "tokens that were acknowledged are gone"
        assert not seen.revoked & tokens, "tokens that were revoked are back"
        sidecars = {each["id"] for each in get("/v1/sidecars")["sidecars"]}
        assert not seen.sidecars - sidecars, "sidecars that joined are gone"
        ports = {each["sidecar"]: int(each["address"].rpartition(":")[2]) for each in get("/v1/endpoints")["endpoints"]
                 if each.get("sidecar")}  # fmt: skip
        for id, port in seen.ports.items():
            assert ports.get(id) in (port, seen.ports_sent[id]), (id, port, ports.get(id))
        changes = {each["change"]: each for each in get("/v1/policy/changes")["changes"]}
        for change, number in list(seen.changes.items())[-50:]:
            assert changes[change]["message"] == f"number {number}", changes[change]
        documents = {each["name"]: each["text"] for each in get("/v1/policy")["documents"]}
        last = max(seen.changes.values(), default=0)
        inside = {name: int(text.split('"total": "')[1].split("s")[0]) for name, text in documents.items()}
        if last:
            assert len(set(inside.values())) == 1, f"half of a change: {inside}"
            assert last <= inside["services/web"] <= seen.sent
        seen.sent = max(seen.sent, last)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path) as mesh:
        yield mesh


@pytest.mark.long
@pytest.mark.parametrize(("rounds", "seed"), [(2, 1), *(pytest.param(5, n, marks=pytest.mark.long) for n in (2, 3))])
def test_killed_while_everything_changes(mesh: Mesh, rounds: int, seed: int) -> None:
    chance = random.Random(seed)
    control = ControlPlane(mesh)
    join_token = control.token("web", "--uses", "10000")
    seen = Acknowledged()
    for _ in range(rounds):
        seen.ports.clear()  # these live by leases that nobody renews here
        writers = Writers(control, seen, join_token)
        before = len(seen.tokens)
        time.sleep(chance.uniform(0.3, 3.0))
        control.kill()
        writers.end()
        assert len(seen.tokens) > before, "nothing was going on"
        control.start()
        check(control, seen)
        assert "Traceback" not in control.log
    print(f"{len(seen.changes)} policies, {len(seen.tokens)} tokens, {len(seen.sidecars)} sidecars acknowledged")
    code, out, _ = control.cli("store", "show", "--state-dir", str(control.state), "-o", "json")
    assert code == 0 and not json.loads(out)["problems"]
