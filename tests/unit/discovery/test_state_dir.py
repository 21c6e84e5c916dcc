"""The state directory: modes, locks, damage, and lives that end in the middle of a replacement."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.pki import Pki

from certs.files import IdentityFiles, load_identity
from sidecar.discovery.state_dir import Damaged, Membership, Saved, StateDir, StateError, default_directory

MEMBER = Membership("id-1", "web", "mesh.local", ("10.0.0.1:15010",), ("10.0.0.1:15011",), 1000.0)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateDir]:
    state = StateDir.open(tmp_path / "state")
    yield state
    state.close()


@pytest.fixture(scope="module")
def pki() -> Pki:
    return Pki()


def identity(pki: Pki, tmp_path: Path, service: str = "web") -> IdentityFiles:
    return load_identity(pki.identity(tmp_path, service))


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_new_one_is_ours_alone_and_empty(tmp_path: Path) -> None:
    state = StateDir.open(tmp_path / "a" / "state")
    assert mode(state.path) == 0o700
    assert state.membership() is None and state.identity() is None and state.snapshot() == (None, "")
    state.close()


def test_one_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    StateDir.open(tmp_path / "state").close()
    assert mode(tmp_path / "state") == 0o700


def test_everything_comes_back(state: StateDir, pki: Pki, tmp_path: Path) -> None:
    saved = Saved(12.0, 7, {"service/web": ("v1", {"name": "web"})})
    held = identity(pki, tmp_path)
    state.write_membership(MEMBER)
    state.write_identity(held)
    state.write_snapshot(saved)
    assert (state.membership(), state.identity(), state.snapshot()) == (MEMBER, held, (saved, ""))
    files = [path for path in state.path.rglob("*") if path.is_file()]
    assert len(files) == 6 and all(mode(path) == 0o600 for path in files)
    assert all(mode(path) == 0o700 for path in state.path.rglob("*") if path.is_dir())


def test_two_sidecars_never_share_one(state: StateDir) -> None:
    with pytest.raises(StateError, match=rf"in use by another sidecar \(process {os.getpid()}\)"):
        StateDir.open(state.path)
    state.close()
    StateDir.open(state.path).close()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"format": 2}',
        b'{"format": 1}',
        b'{"format": 1, "sidecar": 1, "service": "a", "trust_domain": "b", "mesh": [], "join": [], "issued": 0}',
        b'{"format": 1, "sidecar": "1", "service": "a", "trust_domain": "b", "mesh": [1], "join": [], "issued": 0}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_membership_is_told(state: StateDir, content: bytes) -> None:
    state.write_membership(MEMBER)
    (state.path / "sidecar.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"sidecar\.json is damaged"):
        state.membership()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"format": 1}', b'{"format": 1, "at": 0, "policy": 0, "resources": {"a": 1}}', b"\xff"],
)
def test_a_damaged_snapshot_is_set_aside(state: StateDir, content: bytes) -> None:
    path = state.path / "snapshot.json"
    path.write_bytes(content)
    path.chmod(0o600)
    found, problem = state.snapshot()
    assert found is None and "damaged" in problem
    assert not path.exists() and (state.path / "snapshot.json.damaged").read_bytes() == content
    assert state.snapshot() == (None, "")


def test_a_key_that_others_can_read_is_refused_with_the_remedy(state: StateDir, pki: Pki, tmp_path: Path) -> None:
    state.write_identity(identity(pki, tmp_path))
    key = state.identity_directory / "key.pem"
    key.chmod(0o644)
    with pytest.raises(StateError, match=f"chmod 600 {key}") as caught:
        state.identity()
    assert not isinstance(caught.value, Damaged)


def test_a_damaged_identity_is_told(state: StateDir, pki: Pki, tmp_path: Path) -> None:
    state.write_identity(identity(pki, tmp_path))
    (state.identity_directory / "cert.pem").write_bytes(b"-----BEGIN CERTIFICATE-----\n")
    with pytest.raises(Damaged, match=r"cert\.pem"):
        state.identity()


def test_an_expired_identity_is_read_all_the_same(state: StateDir, pki: Pki, tmp_path: Path) -> None:
    leaf = pki.leaf("web", fault="expired")
    pki.write(state.identity_directory, leaf)
    found = state.identity()
    assert found is not None and str(found.spiffe_id) == "spiffe://mesh.local/service/web"


@pytest.mark.parametrize("ended", ["while writing", "before the second rename", "before the removal"])
def test_a_life_that_ended_in_the_middle_of_a_replacement(tmp_path: Path, pki: Pki, ended: str) -> None:
    old, new = identity(pki, tmp_path / "old"), identity(pki, tmp_path / "new")
    state = StateDir.open(tmp_path / "state")
    state.write_identity(old)
    path = state.path
    following = path / "identity.next"
    following.mkdir(mode=0o700)
    for name, content in (("bundle.pem", new.bundle_pem), ("key.pem", new.key_pem), ("cert.pem", new.cert_pem)):
        (following / name).write_bytes(content)
        (following / name).chmod(0o600)
        if ended == "while writing":
            break
    if ended != "while writing":
        (path / "identity").rename(path / "identity.old")
    if ended == "before the removal":
        following.rename(path / "identity")
    state.close()
    again = StateDir.open(path)
    assert again.identity() == (old if ended == "while writing" else new)
    assert not (path / "identity.next").exists() and not (path / "identity.old").exists()
    again.close()


def test_what_is_set_aside_is_kept_for_people(state: StateDir, pki: Pki, tmp_path: Path) -> None:
    state.write_membership(MEMBER)
    state.write_identity(identity(pki, tmp_path))
    aside = state.set_aside()
    assert state.membership() is None and state.identity() is None
    assert (aside / "sidecar.json").exists() and (aside / "identity" / "key.pem").exists()


def test_a_disk_that_is_full_is_told(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    state.write_membership(MEMBER)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateError, match=r"snapshot\.json cannot be written: No space left on device"):
        state.write_snapshot(Saved(0.0))
    with pytest.raises(StateError, match="No space left on device"):
        state.write_membership(MEMBER)
    monkeypatch.undo()
    assert state.membership() == MEMBER
    assert sorted(path.name for path in state.path.iterdir()) == ["lock", "sidecar.json"]


def test_not_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be used"):
        StateDir.open(tmp_path / "file")
    with pytest.raises(StateError, match="cannot be used"):
        StateDir.open(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"STATE_DIRECTORY": "/var/lib/pillion", "HOME": "/root"}, "/var/lib/pillion"),
        ({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b"}, "/var/lib/a"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/root"}, "/x/pillion/sidecar/web"),
        ({"HOME": "/home/me"}, "/home/me/.local/state/pillion/sidecar/web"),
    ],
)
def test_where_it_is_unless_somebody_says_otherwise(environment: dict[str, str], found: str) -> None:
    assert default_directory("web", environment) == Path(found)


def test_the_files_are_json_that_people_can_read(state: StateDir) -> None:
    state.write_membership(MEMBER)
    assert json.loads((state.path / "sidecar.json").read_text())["sidecar"] == "id-1"
