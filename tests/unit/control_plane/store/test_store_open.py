"""What people write after --store, and the options of etcd."""

import sys
from pathlib import Path

import pytest
import trio

from control_plane.store.base import Put, StoreError, StoreRefused
from control_plane.store.embedded import EmbeddedStore
from control_plane.store.open import (
    ETCD_PREFIX,
    EmbeddedAddress,
    EtcdAddress,
    EtcdOptions,
    etcd_options,
    open_store,
    opened,
    parse_store,
)

STATE = Path("/var/lib/pillion")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("embedded", "/var/lib/pillion/store.db"),
        ("embedded:/srv/mesh.db", "/srv/mesh.db"),
        ("embedded:mesh.db", "mesh.db"),
        ("embedded:a:b", "a:b"),
    ],
)
def test_embedded(text: str, path: str) -> None:
    assert parse_store(text, STATE) == EmbeddedAddress(Path(path))


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("etcd://localhost:2379", [("localhost", 2379)]),
        ("etcd://etcd-1.example", [("etcd-1.example", 2379)]),
        ("etcd://10.0.0.1:1,10.0.0.2:65535", [("10.0.0.1", 1), ("10.0.0.2", 65535)]),
        ("etcd://a:1, b:2", [("a", 1), ("b", 2)]),
        ("etcd://a:1,etcd://b:2", [("a", 1), ("b", 2)]),
        ("etcd://a:1/", [("a", 1)]),
        ("etcd://[::1]:2380,[fd00::2]", [("::1", 2380), ("fd00::2", 2379)]),
    ],
)
def test_etcd(text: str, hosts: list[tuple[str, int]]) -> None:
    assert parse_store(text, STATE) == EtcdAddress(tuple(hosts))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "write embedded"),
        ("etcd", "write embedded"),
        ("etcd:", "write embedded"),
        ("etcd:localhost:2379", "write embedded"),
        ("consul://x:1", "write embedded"),
        ("/var/lib/store.db", "write embedded, embedded:PATH or etcd://"),
        ("http://localhost:2379", "write etcd://HOST:PORT"),
        ("etcds://localhost", "--etcd-cacert"),
        ("embedded:", "name of a file"),
        ("embedded:/var/lib/", "name of a file"),
        ("etcd://", "no address"),
        ("etcd://a:1,,b:2", "no address"),
        ("etcd://a b:1", "no address"),
        ("etcd://näme:1", "no address"),
        ("etcd://a:port", "no port"),
        ("etcd://a:", "no port"),
        ("etcd://a:0", "no port"),
        ("etcd://a:65536", "no port"),
        ("etcd://a:²", "no port"),
        ("etcd://::1:2379", "in brackets"),
        ("etcd://[::1", "write [::1]:2379"),
        ("etcd://[::1]x:1", "write [::1]:2379"),
        ("etcd://[nonsense]:1", "write [::1]:2379"),
        ("etcd://a:1,a:1", "twice"),
        ("etcd://a:1/prefix", "--etcd-prefix"),
        ("etcd://a:1?tls", "--etcd-prefix"),
        ("etcd://" + ",".join(f"h{number}" for number in range(17)), "at most 16"),
    ],
)
def test_what_is_not_understood(text: str, says: str) -> None:
    with pytest.raises(StoreError) as caught:
        parse_store(text, STATE)
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["etcd://root:secret@host:1", "redis://root:secret@host", "https://root:secret@host"])
def test_no_password_is_repeated(text: str) -> None:
    with pytest.raises(StoreError) as caught:
        parse_store(text, STATE)
    assert "secret" not in str(caught.value)


def test_options_of_etcd(tmp_path: Path) -> None:
    assert etcd_options() == EtcdOptions() == EtcdOptions(prefix=ETCD_PREFIX)
    files = {name: tmp_path / name for name in ("cacert", "cert", "key", "password_file")}
    for file in files.values():
        file.write_text("hidden-word\n")
    options = etcd_options(**files, user="pillion", prefix="mesh/")
    assert options == EtcdOptions(
        files["cacert"], files["cert"], files["key"], "pillion", password="hidden-word", prefix="mesh/"
    )
    assert "hidden-word" not in repr(options)


def test_options_that_do_not_fit_together(tmp_path: Path) -> None:
    file, empty, binary = tmp_path / "file", tmp_path / "empty", tmp_path / "binary"
    file.write_text("x")
    empty.touch()
    binary.write_bytes(b"\xff")
    for options, says in (
        ({"cert": file}, "go together"),
        ({"key": file}, "go together"),
        ({"cert": file, "key": file}, "needs --etcd-cacert"),
        ({"user": "u"}, "go together"),
        ({"password_file": file}, "go together"),
        ({"cacert": tmp_path / "none"}, "No such file"),
        ({"cacert": tmp_path}, "Is a directory"),
        ({"user": "u", "password_file": tmp_path / "none"}, "No such file"),
        ({"user": "u", "password_file": empty}, "is empty"),
        ({"user": "u", "password_file": binary}, "not text"),
        ({"prefix": "pillion"}, "ends in a slash"),
        ({"prefix": "a b/"}, "ends in a slash"),
    ):
        with pytest.raises(StoreError, match=says):
            etcd_options(**options)  # type: ignore[arg-type]


async def test_opening_the_embedded_one(tmp_path: Path) -> None:
    async with opened("embedded", state_dir=tmp_path / "state") as store:
        assert isinstance(store, EmbeddedStore)
        await store.commit([Put("a", b"1")])
    async with opened("embedded", state_dir=tmp_path / "state", read_only=True) as store:
        assert set((await store.read()).entries) == {"a"}
        assert store.description == f"embedded:{tmp_path / 'state' / 'store.db'}"


async def test_errors_come_out_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(StoreRefused, match="no such store"):
        async with opened("embedded", state_dir=tmp_path, read_only=True):
            pass
    with pytest.raises(StoreError, match="options of etcd"):
        async with opened("embedded", state_dir=tmp_path, etcd=EtcdOptions(user="u", password="p")):
            pass
    with pytest.raises(KeyError):
        async with opened("embedded", state_dir=tmp_path):
            raise KeyError("the body's own")


async def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith(("control_plane.store.etcd", "etcd3")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Without("etcd3"), *sys.meta_path])
    async with trio.open_nursery() as nursery:
        with pytest.raises(StoreRefused, match=r"etcd3.*pip install .pillion\[etcd\]"):
            await open_store("etcd://localhost:1", nursery, state_dir=STATE)


class _Without:
    """An installation that lacks a package."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
