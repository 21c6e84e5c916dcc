"""`pillion store` as people run it: from embedded to etcd and back, backups beside a store that is in use."""

import json
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from support.etcd_cluster import Etcd, need_etcd
from support.mesh import PILLION
from support.store_suite import put

from control_plane.state.records import Alive, Document, Meta, Token, encode
from control_plane.store.base import Put
from control_plane.store.embedded import EmbeddedStore
from control_plane.store.open import opened


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    need_etcd()
    with Etcd(tmp_path_factory.mktemp("etcd")) as running:
        yield "etcd://" + ",".join(f"{host}:{port}" for host, port in running.hosts)


def pillion(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [*PILLION, "store", *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == code, ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
    return ran


MESH = {
    "meta": encode(Meta("m1", "mesh.local", 1.0)),
    "tokens/t1": encode(Token("join", "00" * 32, 1.0, "ann", 2.0, service="web")),
    **{
        f"policy/services/s{number}": encode(Document("mesh.yaml", number, f"s{number}: {{}}\n" * 40, "ann", 1.0, 1))
        for number in range(300)
    },
    "foreign": b"\xff\x00",
}


async def fill(path: Path) -> None:
    async with trio.open_nursery() as nursery:
        store = await EmbeddedStore.open(path, nursery)
        for key, value in MESH.items():
            await put(store, key, value)
        await store.commit([Put("alive/s1", encode(Alive("r1", 1.0)), await store.grant(60))])
        await store.aclose()


async def values(store: str) -> dict[str, bytes]:
    async with opened(store, state_dir=Path("none")) as source:
        return {key: entry.value for key, entry in (await source.read()).entries.items()}


async def test_to_etcd_and_back(tmp_path: Path, etcd: str) -> None:
    old, new = f"embedded:{tmp_path / 'old.db'}", f"embedded:{tmp_path / 'new.db'}"
    await fill(tmp_path / "old.db")
    ran = pillion("migrate", "--from", old, "--to", etcd)
    assert f"{len(MESH)} entries are in etcd at" in ran.stdout and "equal" in ran.stdout
    assert "1 entries that live by a lease" in ran.stderr and f"--store {etcd}" in ran.stderr
    assert await values(etcd) == MESH
    pillion("migrate", "--from", old, "--to", etcd)  # again: nothing to do
    async with opened(etcd, state_dir=tmp_path) as store:
        await store.commit([Put("tokens/t2", MESH["tokens/t1"])])
    refused = pillion("migrate", "--from", old, "--to", etcd, code=1)
    assert "not empty" in refused.stderr and "tokens/t2" in refused.stderr and "--force" in refused.stderr
    assert len(await values(etcd)) == len(MESH) + 1
    pillion("migrate", "--from", etcd, "--to", new)
    assert await values(new) == await values(etcd) == {**MESH, "tokens/t2": MESH["tokens/t1"]}
    ran = pillion("migrate", "--from", old, "--to", etcd, "--force")
    assert "1 other entries were removed" in ran.stdout
    assert await values(etcd) == MESH
    shown = json.loads(pillion("show", "--store", etcd, "-o", "json", code=1).stdout)
    assert shown["keys"] == len(MESH)
    assert [each["key"] for each in shown["problems"]] == ["foreign"]
    backup = tmp_path / "backup"
    pillion("backup", "--store", etcd, backup)
    other = f"embedded:{tmp_path / 'other.db'}"
    pillion("restore", "--store", other, backup)
    assert await values(other) == MESH


async def test_looking_and_backing_up_beside_a_control_plane(tmp_path: Path) -> None:
    path = tmp_path / "state" / "store.db"
    await fill(path)
    async with trio.open_nursery() as nursery:
        store = await EmbeddedStore.open(path, nursery)
        at = await put(store, "tokens/t2", b"damaged")

        def beside() -> None:
            where = ("--state-dir", path.parent)
            shown = pillion("show", *where, code=1)
            assert f"revision {at}" in shown.stdout
            assert "tokens/t2  not JSON" in shown.stdout and "foreign    not a key of pillion" in shown.stdout
            backup = tmp_path / "backup"
            assert f"{len(MESH) + 1} entries" in pillion("backup", *where, backup).stdout
            assert stat.S_IMODE(backup.stat().st_mode) == 0o600
            for arguments in (
                ("restore", *where, backup, "--force"),
                ("migrate", *where, "--from", "embedded", "--to", f"embedded:{tmp_path / 'x'}"),
            ):
                assert "in use by process" in pillion(*arguments, code=1).stderr
            assert not (tmp_path / "x").exists()

        await trio.to_thread.run_sync(beside)
        await put(store, "still", b"")
        await store.aclose()


def test_wrong_input(tmp_path: Path) -> None:
    here = ("--state-dir", tmp_path)
    for arguments, says in (
        (("show", *here), "no such store"),
        (("show", "--store", "redis://x"), "is no store; write embedded"),
        (("backup", *here, "file"), "no such store"),
        (("restore", *here, tmp_path / "none"), "No such file"),
        (("migrate", *here, "--from", "embedded", "--to", "embedded"), "the same store"),
        (("migrate", *here, "--from", "embedded", "--to", "embedded:x/"), "name of a file"),
        (("show", "--store", "etcd://127.0.0.1:1", "--etcd-user", "u"), "go together"),
    ):
        assert says in pillion(*arguments, code=1).stderr
    assert list(tmp_path.iterdir()) == []
