"""Global rate limits with real processes: a control plane, three sidecars of one service, and a caller."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.control import ControlPlane, registered
from support.mesh import Mesh, until
from support.standin_control import Member

LIMIT_PER_S = 40
DEMAND_PER_S = {"a": 64, "b": 12, "c": 4}  # twice the limit, 80/15/5


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path) as mesh:
        yield mesh


def policy() -> dict[str, Any]:
    """Three instances that are told apart by a label, so that the test decides who is asked."""
    return {
        "reviews": {
            "versions": {name: {"labels": {"version": name}} for name in DEMAND_PER_S},
            "rate_limit": {"requests": LIMIT_PER_S, "per": "1s", "burst": 3, "scope": "global"},
            "routes": [{"match": {"headers": {"x-to": name}}, "to": {name: 100}} for name in DEMAND_PER_S],
        },
        "web": {"calls": {"reviews": {}}},
    }


def share_of(member: Member) -> float:
    limits = member.admin("/config")["global_limits"]
    assert isinstance(limits, dict)
    return float(limits["share"])


def load(web: Member, seconds: float) -> Counter[tuple[str, int]]:
    """Ask each instance as often as `DEMAND_PER_S` says; statuses by instance."""
    seen: Counter[tuple[str, int]] = Counter()

    def ask(name: str, per_s: float) -> None:
        begun = time.monotonic()
        with web.client() as client:
            for number in range(round(seconds * per_s)):
                time.sleep(max(0.0, begun + number / per_s - time.monotonic()))
                seen[name, client.get("/", headers={"x-to": name}).status] += 1

    threads = [threading.Thread(target=ask, args=item) for item in DEMAND_PER_S.items()]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return seen


def admitted_per_s(seen: Counter[tuple[str, int]], seconds: float) -> float:
    assert {status for _, status in seen} <= {200, 429}
    return sum(count for (_, status), count in seen.items() if status == 200) / seconds


@pytest.mark.long
def test_the_limit_holds_for_all_instances_together_and_without_the_control_plane(mesh: Mesh) -> None:
    control = ControlPlane(mesh)
    control.apply(policy())
    app = mesh.backend()
    members = {name: control.member("reviews", f"--label=version={name}", app=app) for name in DEMAND_PER_S}
    web = control.member("web", inbound="off")
    registered(control, "reviews", 3)
    until(lambda: all(abs(share_of(each) - 1 / 3) < 0.01 for each in members.values()), "equal shares", 20.0)

    load(web, 16.0)
    seen = load(web, 5.0)
    assert admitted_per_s(seen, 5.0) == pytest.approx(LIMIT_PER_S, rel=0.1)
    shares = {name: share_of(each) for name, each in members.items()}
    assert sum(shares.values()) <= 1.0
    assert shares["a"] == pytest.approx(1 / 30 + 0.9 * 0.80, abs=0.06)
    assert shares["c"] == pytest.approx(1 / 30 + 0.9 * 0.05, abs=0.03)
    described = json.loads(control.ok("describe", "service", "reviews", "-o", "json"))
    assert {round(each["share"], 4) for each in described["limit_shares"]} == {
        round(each, 4) for each in shares.values()
    }

    control.kill()
    until(lambda: not web.source["connected"], "the end of the connection")
    seen = load(web, 5.0)
    assert {name: share_of(each) for name, each in members.items()} == shares
    assert admitted_per_s(seen, 5.0) == pytest.approx(LIMIT_PER_S, rel=0.1)


def test_from_files_a_global_limit_is_a_local_one_and_the_log_says_so(mesh: Mesh) -> None:
    limit = {"requests": 3, "per": "1h", "algorithm": "sliding-window", "scope": "global", "key": "caller"}
    reviews = {"rate_limit": limit, "authz": {"allow": [{"from": ["web"]}]}}
    sidecar = mesh.sidecar("reviews", {"web": {}, "reviews": reviews}, app=mesh.backend(), outbound=False)
    with sidecar.mesh_client("web") as client:
        answers = [client.get("/") for _ in range(4)]
    assert [each.status for each in answers] == [200, 200, 200, 429]
    wait_s = int(answers[-1].header("retry-after") or 0)
    assert 1 <= wait_s <= 3600 * 4 // 3 + 1
    assert answers[-1].header("ratelimit") == f'"default";r=0;t={wait_s}'.encode()
    assert answers[-1].header("ratelimit-policy") == b'"default";q=3;w=3600'
    assert "needs a control plane" in sidecar.log
    assert sidecar.metric("pillion_rate_limit_share") == 1.0
