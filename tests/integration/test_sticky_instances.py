"""Sticky cookies over the instances of a calling service that joined a control plane."""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.control import ControlPlane
from support.mesh import Conn, Mesh, Script, until
from support.standin_control import Control, Member, endpoint, join, launch, service

from sidecar.policy.sticky import Sticky

SCOPE = "reviews"
NAME = "pillion_endpoint"
FAR = 1e10  # seconds since the epoch


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path) as mesh:
        yield mesh


def name_of(number: int) -> Script:
    def script(conn: Conn) -> None:
        while True:
            conn.take()
            conn.reply(200, b"%d" % number)

    return script


def policy(mesh: Mesh, count: int = 4) -> dict[str, Any]:
    addresses = [str(mesh.backend(name_of(number))) for number in range(count)]
    return {
        SCOPE: {"tls": "plain", "address": addresses, "routes": [{"sticky": {"level": "endpoint"}}]},
        "web": {"calls": {SCOPE: {}}},
        "shop": {"calls": {SCOPE: {}}},
    }


def ask(member: Member, cookie: str = "") -> tuple[bytes, str]:
    """Who served, and the cookie that came with it: none where the one that was sent is honoured."""
    with member.client() as client:
        response = client.get("/", headers={"cookie": cookie} if cookie else {})
    assert response.status == 200
    return response.body, (response.header("set-cookie") or b"").decode().partition(";")[0]


def honoured(member: Member, served_by: bytes, cookie: str) -> bool:
    """Twice: where it is not, the same endpoint may serve by chance, but there is a new cookie."""
    return all(ask(member, cookie) == (served_by, "") for _ in range(2))


def resources(member: Member) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((member.state / "snapshot.json").read_text())["resources"]
    return held


def keys(member: Member) -> list[str]:
    until(lambda: (member.state / "snapshot.json").exists() and "cookies" in resources(member), "the keys on disk")
    return [each["key"] for each in resources(member)["cookies"][1]["keys"]]


def forged(key: bytes, member: Member) -> list[str]:
    """What somebody can make who knows a key, and how everything else is done."""
    sticky = Sticky(NAME, 3600.0, key, SCOPE, by_endpoint=True)
    return [
        sticky.issue(sticky.token(each["endpoint"]), FAR).decode().partition(";")[0]
        for each in member.admin("/clusters")
        if each["service"] == SCOPE
    ]


@pytest.mark.long
def test_instances_of_one_service_honour_one_anothers_cookies(mesh: Mesh) -> None:
    control = ControlPlane(mesh)
    control.apply(policy(mesh))
    one, two, shop = (control.member(name, inbound="off") for name in ("web", "web", "shop"))
    served_by, cookie = ask(one)
    assert cookie.startswith(f"{NAME}=")
    assert honoured(two, served_by, cookie), "of the first, by the second"
    assert not honoured(shop, served_by, cookie) and not honoured(one, *ask(shop)), "of another service"

    # What another service has does not help it to make one.
    assert keys(one) == keys(two) and len(keys(one)) == 1 and keys(shop) != keys(one)
    assert not any(honoured(two, served_by, each) for each in forged(bytes.fromhex(keys(shop)[0]), two))
    assert any(honoured(two, served_by, each) for each in forged(bytes.fromhex(keys(one)[0]), two)), "forging works"

    # A second life without a control plane: by what is in the state directory.
    assert (two.state / "snapshot.json").stat().st_mode & 0o777 == 0o600
    assert two.stop() == 0 and control.stop() == 0
    again = launch(mesh, "web", state=two.state, inbound="off").await_ready()
    assert honoured(again, served_by, cookie) and honoured(one, *ask(again))

    # The key stays the same over a restart of the control plane, and is replaced by an operator.
    control.start()
    until(lambda: again.source["connected"] and one.source["connected"], "the connections")
    assert honoured(again, served_by, cookie)
    before = keys(one)
    control.ok("cert", "rotate-cookies", "--keep", "1h")
    for member in (one, again):
        until(lambda member=member: keys(member) != before, "another key")
        assert keys(member)[1:] == before and honoured(member, served_by, cookie), "the former one is honoured"
    assert honoured(again, *ask(one))
    control.ok("cert", "rotate-cookies", "--keep", "0s")
    until(lambda: len(keys(again)) == 1, "a key without a former one")
    until(lambda: not honoured(again, served_by, cookie), "the end of cookies made before")

    said = "".join((control.log, one.log, again.log, shop.log, json.dumps(one.admin("/config"))))
    said += control.ok("audit") + control.cli("check")[1]
    assert "rotate cookies" in said and "Traceback" not in said
    assert not any(key in said for key in (*before, *keys(one), *keys(shop)))


@pytest.mark.long
def test_every_replica_over_one_etcd_tells_the_same_key_which_outlives_certificates(mesh: Mesh) -> None:
    from support.etcd_cluster import Etcd, need_etcd

    need_etcd()
    (mesh.path / "etcd").mkdir()
    with Etcd(mesh.path / "etcd") as etcd:
        store = "etcd://" + ",".join(f"{host}:{port}" for host, port in etcd.hosts)
        first = ControlPlane(mesh, "r1", "--leaf-ttl=8s", store=store)
        first.apply(policy(mesh))
        one = first.member("web", inbound="off")
        served_by, cookie = ask(one)
        token = first.token("web")
        first.ok("ca", "replica", "--dir", str(first.state / "ca"), "--out", str(mesh.path / "ca2"))
        second = ControlPlane(mesh, "r2", store=store, ca=mesh.path / "ca2")
        until(lambda: len(first.get("replicas")["replicas"]) == 2, "both replicas")
        until(lambda: "identity renewed" in one.log, "another certificate and private key", 15.0)
        assert honoured(one, served_by, cookie) and one.stop() == 0
        first.kill()
        options = [f"--control-plane={second.addresses['join']}"]
        two = launch(mesh, "web", *options, token=token, inbound="off").await_ready()
        again = launch(mesh, "web", *options, state=one.state, inbound="off").await_ready()
        assert honoured(two, served_by, cookie) and honoured(again, served_by, cookie)
        assert keys(two) == keys(again)


@pytest.mark.long
def test_a_damaged_secret_is_named_and_costs_nobody_anything(mesh: Mesh) -> None:
    control = ControlPlane(mesh)
    control.apply(policy(mesh))
    one = control.member("web", inbound="off")
    served_by, cookie = ask(one)
    keys(one)
    assert control.stop() == 0
    kept = mesh.path / "kept.backup"
    assert "entries" in control.ok("store", "backup", str(kept), f"--state-dir={control.state}")
    assert kept.stat().st_mode & 0o777 == 0o600
    damage(kept, '{"format":1,"secrets":[{"secret":"beef","until":0.0}],"changed":1.0}')
    control.ok("store", "restore", str(kept), f"--state-dir={control.state}", "--force")

    control.start()
    until(lambda: one.source["connected"], "the connection")
    code, said, _ = control.cli("check")
    assert code == 1 and "record cookies" in said and "beef" not in said + control.log
    two = control.member("web", inbound="off")
    assert honoured(one, served_by, cookie), "it keeps what it was told"
    assert not honoured(two, served_by, cookie) and honoured(two, *ask(two)), "by its own key"
    of_its_own = ask(two)
    control.ok("cert", "rotate-cookies")
    until(lambda: honoured(one, *ask(two)), "one key for both")
    assert honoured(two, *of_its_own), "made before it was told"
    assert "record cookies" not in control.cli("check")[1]


def damage(backup: Path, text: str) -> None:
    """Put another value in place of the secret's, as its owner could."""
    *lines, _ = backup.read_bytes().splitlines(keepends=True)
    assert any(json.loads(line).get("key") == "cookies" for line in lines)
    lines = [
        json.dumps({"key": "cookies", "text": text}).encode() + b"\n"
        if json.loads(line).get("key") == "cookies"
        else line
        for line in lines
    ]
    tail = {"end": len(lines) - 1, "sha256": hashlib.sha256(b"".join(lines)).hexdigest()}
    backup.write_bytes(b"".join(lines) + json.dumps(tail).encode() + b"\n")


def test_a_key_that_was_told_is_kept_by_a_control_plane_that_does_not_know_it(mesh: Mesh) -> None:
    """It is older, say: what it does not know it takes back."""
    backends = [endpoint(str(mesh.backend(name_of(number))), tls="plain") for number in range(4)]
    routes = [{"name": "default", "sticky": {"cookie": NAME, "ttl_s": 60.0, "level": "endpoint"}}]
    with Control(mesh.pki) as control:
        held = {"service/web": service("web"), f"service/{SCOPE}": service(SCOPE, routes=routes)}
        control.hold({**held, f"endpoints/{SCOPE}": backends, "names": [SCOPE, "web"]})
        web = join(mesh, control, "web", inbound="off")
        before = ask(web)
        assert honoured(web, *before), "by its own key, where nobody tells one"
        control.change({"cookies": {"keys": [{"key": "ab" * 32}]}})
        until(lambda: keys(web) == ["ab" * 32], "the key on disk")
        assert honoured(web, *before), "made before it was told"
        told = ask(web)
        sticky = Sticky(NAME, 60.0, bytes.fromhex("ab" * 32), SCOPE, by_endpoint=True)
        assert sticky.read(told[1].encode(), time.time()) and not sticky.read(before[1].encode(), time.time())
        control.change({"cookies": None})
        until(lambda: len(control.acks) >= 3, "the answer")
        assert honoured(web, *told) and ask(web)[1] != before[1]
        control.change({"cookies": {"keys": [{"key": "geheim"}]}})
        until(lambda: control.acks[-1][1], "a refusal")
        assert control.acks[-1][1] == {"cookies": "a key of cookies is 64 digits of lower-case hex"}
        assert honoured(web, *told) and "geheim" not in web.log
