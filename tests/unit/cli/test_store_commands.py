"""`pillion store`, from the arguments to the files and what is printed."""

import json
from pathlib import Path

import pytest
import trio

from control_plane.cli import main
from control_plane.state.records import Meta, Token, encode
from control_plane.store.base import Put
from control_plane.store.open import opened

STATE = Path("pillion-control-plane")


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("STORE", "STATE_DIR", "ETCD_CACERT", "ETCD_CERT", "ETCD_KEY", "ETCD_USER", "ETCD_PREFIX"):
        monkeypatch.delenv(f"PILLION_CONTROL_PLANE_{name}", raising=False)


def fill(store: str = "embedded", **more: bytes) -> None:
    async def work() -> None:
        async with opened(store, state_dir=STATE) as opened_store:
            token = Token("join", "00" * 32, 1.0, "ann", 2.0, service="web")
            records = {"meta": encode(Meta("m1", "mesh.local", 1.0)), "tokens/t1": encode(token), **more}
            await opened_store.commit([Put(key, value) for key, value in records.items()])

    trio.run(work)


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    fill()
    assert main(["store", "show"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("embedded:pillion-control-plane/store.db\nrevision 2, 2 keys, ")
    assert [line.split()[:2] for line in out.splitlines()[3:]] == [["KIND", "KEYS"], ["meta", "1"], ["tokens/", "1"]]


def test_show_names_what_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    fill(**{"tokens/t2": b'{"format": 99}', "sidecars/s1": b'{"format": 1}', "x": b""})
    assert main(["store", "show", "-o", "json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    problems = {each["key"]: each["reason"] for each in facts["problems"]}
    assert set(problems) == {"tokens/t2", "sidecars/s1", "x"}
    assert "newer pillion" in problems["tokens/t2"] and problems["x"] == "not a key of pillion"
    assert facts["keys"] == 5 == sum(each["keys"] for each in facts["kinds"])
    assert facts["bytes"] == sum(each["bytes"] for each in facts["kinds"])
    assert main(["store", "show"]) == 1
    assert "Cannot be read, and is skipped:" in capsys.readouterr().out


def test_backup_and_restore(capsys: pytest.CaptureFixture[str]) -> None:
    fill()
    assert main(["store", "backup", "mesh.backup"]) == 0
    assert capsys.readouterr().out == (
        "2 entries of embedded:pillion-control-plane/store.db at revision 2 in mesh.backup\n"
    )
    fill(more=b"")
    assert main(["store", "restore", "mesh.backup"]) == 1
    assert "1 of its keys" in (err := capsys.readouterr().err) and "--force" in err
    assert main(["store", "restore", "mesh.backup", "--force"]) == 0
    assert "1 other entries were removed from it" in capsys.readouterr().out
    assert main(["store", "show", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["keys"] == 2


def test_the_environment_of_the_control_plane_holds_here_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill("embedded:elsewhere/mesh.db")
    monkeypatch.setenv("PILLION_CONTROL_PLANE_STORE", "embedded:elsewhere/mesh.db")
    assert main(["store", "show"]) == 0
    assert capsys.readouterr().out.startswith("embedded:elsewhere/mesh.db\n")


def test_migrate(capsys: pytest.CaptureFixture[str]) -> None:
    fill()
    arguments = ["store", "migrate", "--from", "embedded", "--to", "embedded:new.db"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out == "2 entries are in embedded:new.db; both were read again and are equal\n"
    assert err == "Next: pillion control-plane --store embedded:new.db\n"
    assert main(arguments) == 0  # again
    assert main(["store", "migrate", "--from", "embedded:new.db", "--to", "embedded:./new.db"]) == 1
    assert "the same store" in capsys.readouterr().err


def test_nothing_to_migrate_makes_no_store(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["store", "migrate", "--from", "embedded:none.db", "--to", "embedded:new.db"]) == 1
    assert "none.db: there is no such store" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
