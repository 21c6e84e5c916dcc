"""The command line towards a real control plane with real sidecars."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.control import ControlPlane, registered
from support.mesh import PILLION, Mesh, environment, until

SHOP: dict[str, Any] = {
    "reviews": {
        "ports": {"http": {"port": 8000}},
        "owners": ["team-reviews"],
        "authz": {"allow": [{"from": ["web"], "methods": ["GET"]}]},
    },
    "web": {"calls": {"reviews": {}}},
}


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path) as mesh:
        yield mesh


@pytest.fixture
def control(mesh: Mesh) -> ControlPlane:
    return ControlPlane(mesh)


def as_operator(control: ControlPlane, name: str, role: str, *teams: str) -> list[str]:
    """The flags of an operator of their own."""
    options = [word for team in teams for word in ("--team", team)]
    file = control.mesh.path / f"token-{name}"
    file.write_text(control.ok("token", "create", "--operator", name, "--role", role, *options))
    file.chmod(0o600)
    return ["--token-file", str(file)]


def test_a_mesh_is_looked_at(mesh: Mesh, control: ControlPlane) -> None:
    control.apply(SHOP, "-m", "the shop")
    control.member("reviews", app=mesh.backend())
    web = control.member("web", "--inbound=off")
    registered(control, "reviews")
    client = web.client()

    def called() -> bool:
        return all(client.get("/", host="reviews").status == 200 for _ in range(20))

    assert called()
    assert control.ok("get", "services", "-o", "name") == "reviews\nweb\n"
    row = next(line for line in control.ok("get", "services").splitlines() if line.startswith("reviews"))
    assert row.split()[1:3] == ["http:8000/http", "1/1"]
    sidecars = control.get("sidecars")["sidecars"]
    assert {each["service"] for each in sidecars} == {"reviews", "web"} and all(each["connected"] for each in sidecars)
    page = control.ok("describe", "service", "reviews")
    assert "1 of 1 healthy" in page and "change 1 by admin" in page and "in 23h" in page
    until(lambda: called() and "100.0%" in control.ok("edges"), "the edge is seen", 30)
    edges = json.loads(control.ok("edges", "-o", "json"))["edges"]
    assert [(each["caller"], each["callee"]) for each in edges] == [("web", "reviews")]
    client.close()
    certificates = json.loads(control.ok("cert", "ls", "-o", "json"))
    assert {each["service"] for each in certificates["certs"]} == {"reviews", "web"}

    assert control.cli("can", "web", "reviews", "GET", "/x")[0] == 0
    code, out, _ = control.cli("can", "web", "reviews", "POST", "/x")
    assert code == 1 and out.startswith("denied")
    assert "mesh.yaml" in control.ok("explain", "reviews")

    code, out, said = control.cli("check", "--wait", "20")
    assert code == 0, out + said
    assert "✓ the clock agrees with the control plane's" in out and "all is well" in out


@pytest.mark.long
def test_policy_from_the_first_change_to_a_rollback(mesh: Mesh, control: ControlPlane) -> None:
    control.member("web", "--inbound=off")
    file = control.policy_file(SHOP)
    code, out, said = control.cli("policy", "apply", "-f", str(file), "-m", "first")
    assert (code, out) == (0, "") and "change 1: 2 added" in said and "accepted by the one sidecar" in said
    assert "nothing to change" in control.cli("policy", "apply", "-f", str(file))[2]
    base = str(json.loads(control.ok("policy", "get", "-o", "json"))["revision"])

    changed = json.loads(json.dumps(SHOP))
    changed["reviews"]["timeout"] = {"total": "7s"}
    file = control.policy_file(changed)
    assert control.cli("policy", "diff", "-f", str(file))[0] == 1
    code, _, said = control.cli("policy", "apply", "-f", str(file), "-m", "quicker")
    assert code == 0 and "7s" in said and "change 2: 1 changed" in said
    assert "7s" in control.ok("explain", "reviews")

    # Somebody who began before that change.
    changed["reviews"]["timeout"] = {"total": "9s"}
    file = control.policy_file(changed)
    code, _, said = control.cli("policy", "apply", "-f", str(file), "--base", base)
    assert code == 4 and "theirs (change 2 by admin)" in said and "7s" in said and "9s" in said

    code, out, _ = control.cli("policy", "diff", "1", "2")
    assert code == 1 and "7s" in out
    code, _, said = control.cli("policy", "rollback", "1", "-m", "oops")
    assert code == 0 and "accepted by the one sidecar" in said
    assert control.cli("policy", "diff", "1")[0] == 0
    history = json.loads(control.ok("policy", "history", "-o", "json"))["changes"]
    assert [(each["change"], each["source"]) for each in history] == [(1, "apply"), (2, "apply"), (3, "rollback")]
    got = control.mesh.path / "got.yaml"
    got.write_text(control.ok("policy", "get"))
    assert control.cli("policy", "check", str(got))[0] == 0
    assert "prune" not in control.cli("policy", "apply", "-f", str(got), "--dry-run")[2]
    code, _, said = control.cli("policy", "apply", "-f", str(control.policy_file({"web": {}})), "--prune", "--no-wait")
    assert code == 0 and "1 removed" in said


def test_an_invalid_policy_changes_nothing(mesh: Mesh, control: ControlPlane) -> None:
    file = control.policy_file({"web": {"calls": {"revews": {}}}, "reviews": {}})
    code, out, said = control.cli("policy", "apply", "-f", str(file))
    checked = control.cli("policy", "check", str(file))
    assert (code, out) == (2, "") and said == checked[2] and 'did you mean "reviews"?' in said
    assert control.ok("get", "policies", "-o", "name") == ""


def test_a_sidecar_that_rejects_is_named(mesh: Mesh, control: ControlPlane) -> None:
    control.apply({"web": {}})
    control.member("web", app=mesh.backend())
    file = control.policy_file({"web": {"ports": {"http": {"port": 8000}}, "filters": [{"use": "no.such:Filter"}]}})
    code, _, said = control.cli("policy", "apply", "-f", str(file))
    assert code == 1 and "rejected by web (" in said and "service/web" in said and "no.such" in said
    assert control.cli("check")[0] == 1
    rows = control.get("sidecars")["sidecars"]
    assert "service/web" in rows[0]["rejected"]


@pytest.mark.long
def test_roles_and_the_audit_log(mesh: Mesh, control: ControlPlane) -> None:
    control.apply(SHOP)
    viewer = as_operator(control, "vi", "viewer")
    mia = as_operator(control, "mia", "operator", "team-reviews")
    jo = as_operator(control, "jo", "operator", "team-else")
    changed = {"reviews": SHOP["reviews"] | {"timeout": {"total": "7s"}}}
    file = str(control.policy_file(changed))
    assert control.cli("get", "services", *viewer)[0] == 0
    assert control.cli("policy", "apply", "-f", file, "--dry-run", *viewer)[0] == 0
    for who in (viewer, jo):
        code, _, said = control.cli("policy", "apply", "-f", file, *who)
        assert code == 1 and "Error: " in said
    assert control.cli("policy", "apply", "-f", file, *mia)[0] == 0
    assert control.cli("cert", "ban", "spiffe://mesh.local/service/web", *mia)[0] == 1
    records = json.loads(control.ok("audit", "-o", "json"))["audit"]
    assert [each["who"] for each in records if each["action"] == "apply policy"] == ["admin", "mia"]
    token = next(each for each in control.get("tokens")["tokens"] if each["operator"] == "mia")
    control.ok("token", "revoke", token["id"])
    code, _, said = control.cli("get", "services", *mia)
    assert code == 1 and "Error: " in said


def test_a_certificate_instead_of_a_token(mesh: Mesh, control: ControlPlane) -> None:
    before = control.context.read_text()
    control.ok("login", "--cert", "--token-file", str(control.state / "admin-token"))
    assert json.loads(control.context.read_text()).get("token", "") == ""
    control.ok("get", "services")
    identity = control.context.parent / "operator"
    assert (identity / "key.pem").stat().st_mode & 0o777 == 0o600
    control.ok("get", "services", "--url", control.addresses["join"], "--cert", str(identity))
    control.ok("logout")
    assert not identity.exists() and control.cli("get", "services")[0] == 3
    control.context.write_text(before)
    control.context.chmod(0o600)


@pytest.mark.long
def test_a_ban_and_its_end(mesh: Mesh, control: ControlPlane) -> None:
    control.apply(SHOP)
    control.member("reviews", app=mesh.backend())
    registered(control, "reviews")
    (row,) = control.get("sidecars")["sidecars"]
    control.ok("cert", "ban", row["id"], "--reason", "lost")
    assert "lost" in control.ok("cert", "bans")
    until(lambda: not control.get("sidecars")["sidecars"][0]["connected"], "the banned one is gone", 20)
    assert json.loads(control.ok("cert", "ls", "-o", "json"))["certs"][0]["banned"] is True
    control.ok("cert", "unban", row["id"])
    assert control.ok("cert", "bans", "-o", "name") == ""


@pytest.mark.long
def test_watching_until_ctrl_c(mesh: Mesh, control: ControlPlane) -> None:
    variables = environment() | {"PILLION_CONTEXT": str(control.context)}
    watch = subprocess.Popen(
        [*PILLION, "get", "services", "--watch", "-o", "name"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables, cwd=mesh.path,
    )  # fmt: skip
    try:
        assert watch.stdout is not None
        control.apply({"web": {}}, "--no-wait")
        assert watch.stdout.readline().strip() in (b"web", b"+ web")
        control.apply({"web": {}, "reviews": {}}, "--no-wait")
        assert watch.stdout.readline() == b"+ reviews\n"
        watch.send_signal(signal.SIGINT)
        out, err = watch.communicate(timeout=20)
        assert (watch.returncode, out, b"Traceback" in err) == (130, b"", False)
    finally:
        watch.kill()
        watch.communicate()


def test_asking_loads_no_more_than_it_needs(mesh: Mesh, control: ControlPlane) -> None:
    """What makes a start slow is imports; so this counts them rather than milliseconds."""
    heavy = {"trio", "httpx", "h2", "rich", "yaml", "re2", "etcd3", "hypercorn", "starlette", "sidecar.proxy"}
    program = (
        "import sys\nfrom control_plane.cli import main\ncode = main(['get', 'services'])\n"
        f"print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr)\nsys.exit(code)"
    )
    variables = {**os.environ, "PILLION_CONTEXT": str(control.context)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, env=variables, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "[]")


def test_the_control_plane_goes_away(mesh: Mesh, control: ControlPlane) -> None:
    assert control.stop() == 0
    for verb in (("get", "services"), ("policy", "history"), ("explain", "web")):
        code, out, said = control.cli(*verb)
        assert (code, out) == (3, "") and "connection refused" in said and "Next: pillion check" in said
    code, out, _ = control.cli("check")
    assert code == 3 and "✗ https://127.0.0.1" in out
    control.start()
    assert control.cli("check", "--wait", "20")[0] == 0
