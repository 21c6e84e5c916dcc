"""The watched folder: what it takes, when, and what it does about content that cannot be taken."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import trio
from support.policy_shelf import Shelf

from control_plane.serve.folder import RETRY_S, Folder, Read
from control_plane.store.base import StoreUnavailable

GOOD = "version: 1\nservices:\n  {}: {{}}\n"


async def at_once(read: Callable[[], Read]) -> Read:
    """Not in a thread: virtual time does not wait for those."""
    return read()


class Taker:
    """What a control plane does with the files, on a shelf."""

    def __init__(self, path: Path) -> None:
        self.shelf = Shelf()
        self.path = path
        self.taken: list[dict[str, str]] = []
        self.down = False

    async def apply(self, files: Mapping[str, str]) -> None:
        self.taken.append(dict(files))
        if self.down:
            raise StoreUnavailable("gone")
        author = f"folder:{self.path}"
        self.shelf.apply(files, author=author, prune_author=author, source="folder")

    def brought(self, document: str) -> str | None:
        held = self.shelf.policy.documents.get(document)
        return held.record.file if held is not None and held.record.author == f"folder:{self.path}" else None

    def folder(self) -> Folder:
        return Folder(self.path, self.apply, self.brought, at_once)

    @property
    def names(self) -> list[str]:
        return [name.removeprefix("services/") for name in self.shelf.texts()]


async def test_it_follows(tmp_path: Path, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    (tmp_path / "a.yaml").write_text(GOOD.format("a"))
    (tmp_path / "b.yml").write_text(GOOD.format("b"))
    taker = Taker(tmp_path)
    taker.shelf.apply({"mine.yaml": GOOD.format("mine")})
    folder = taker.folder()
    nursery.start_soon(folder.run)
    await trio.sleep(0.5)
    assert taker.names == ["a", "b", "mine"]
    assert folder.file_of("services/a") == str(tmp_path / "a.yaml")
    assert folder.file_of("services/mine") is None
    await trio.sleep(10)
    assert len(taker.taken) == 1
    (tmp_path / "b.yml").write_text(GOOD.format("c"))
    await trio.sleep(3)
    assert taker.names == ["a", "c", "mine"]
    assert folder.file_of("services/b") is None
    (tmp_path / "b.yml").unlink()
    await trio.sleep(3)
    assert taker.names == ["a", "mine"]
    record = taker.shelf.policy.documents["services/a"].record
    assert (record.file, record.author) == ("a.yaml", f"folder:{tmp_path}")


async def test_content_that_still_changes_is_waited_for(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    taker = Taker(tmp_path)
    (tmp_path / "a.yaml").write_text(GOOD.format("a"))
    nursery.start_soon(taker.folder().run)
    await trio.sleep(0.5)
    for number in range(5):
        (tmp_path / "a.yaml").write_text("#" * number + "\n" + GOOD.format("b"))
        await trio.sleep(1)
    assert taker.names == ["a"]
    await trio.sleep(2)
    assert taker.names == ["b"] and len(taker.taken) == 2


async def test_errors_change_nothing_and_are_told_once(
    tmp_path: Path,
    autojump_clock: trio.testing.MockClock,
    nursery: trio.Nursery,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    taker = Taker(tmp_path)
    (tmp_path / "a.yaml").write_text(GOOD.format("a"))
    folder = taker.folder()
    nursery.start_soon(folder.run)
    await trio.sleep(0.5)
    (tmp_path / "a.yaml").write_text("version: 1\nservices:\n  a: {calls: {nobody: {}}}\n")
    await trio.sleep(10 * RETRY_S)
    assert taker.names == ["a"] and "calls" not in taker.shelf.texts()["services/a"]
    assert folder.file_of("services/a") == str(tmp_path / "a.yaml")
    assert "a.yaml:3:15" in folder.problem
    told = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert len([each for each in told if "is not taken" in each]) == 1
    assert 5 < len(taker.taken) < 15
    taker.shelf.apply({"n.yaml": GOOD.format("nobody")})  # somebody else brings what was missing
    await trio.sleep(2 * RETRY_S)
    assert "calls" in taker.shelf.texts()["services/a"] and folder.problem == ""
    assert "is in force again" in caplog.text


@pytest.mark.parametrize("what", ["gone", "empty", "binary"])
async def test_a_folder_that_cannot_be_read_removes_nothing(
    what: str, tmp_path: Path, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    path = tmp_path / "policy"
    path.mkdir()
    (path / "a.yaml").write_text(GOOD.format("a"))
    taker = Taker(path)
    folder = taker.folder()
    nursery.start_soon(folder.run)
    await trio.sleep(0.5)
    if what == "gone":
        path.rename(tmp_path / "elsewhere")
    elif what == "empty":
        (path / "a.yaml").unlink()
    else:
        (path / "a.yaml").write_bytes(b"\xff\xfe")
    await trio.sleep(5)
    assert taker.names == ["a"] and "P010" in folder.problem
    assert folder.file_of("services/a") is not None
    if what == "gone":
        (tmp_path / "elsewhere").rename(path)
        await trio.sleep(5)
        assert folder.problem == ""


async def test_the_store_comes_back(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    (tmp_path / "a.yaml").write_text(GOOD.format("a"))
    taker = Taker(tmp_path)
    taker.down = True
    nursery.start_soon(taker.folder().run)
    await trio.sleep(5)
    assert taker.names == []
    taker.down = False
    await trio.sleep(2)
    assert taker.names == ["a"]


async def test_it_continues_after_a_restart(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    (tmp_path / "a.yaml").write_text(GOOD.format("a"))
    (tmp_path / "b.yaml").write_text(GOOD.format("b"))
    taker = Taker(tmp_path)
    with trio.move_on_after(1):
        await taker.folder().run()
    (tmp_path / "b.yaml").unlink()
    again = taker.folder()
    assert again.file_of("services/b") == str(tmp_path / "b.yaml")
    nursery.start_soon(again.run)
    await trio.sleep(1)
    assert taker.names == ["a"]
    assert again.file_of("services/b") is None


async def test_one_file_will_do(tmp_path: Path, autojump_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(GOOD.format("a"))
    taker = Taker(path)
    folder = taker.folder()
    nursery.start_soon(folder.run)
    await trio.sleep(1)
    assert folder.file_of("services/a") == str(path)
