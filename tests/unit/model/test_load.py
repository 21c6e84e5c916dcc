import os
import threading
from pathlib import Path

import pytest

from sidecar.model import load
from sidecar.model.load import Loaded, load_policy
from sidecar.model.problems import render

GOOD = "version: 1\nservices: {web: {}}\n"


def said(loaded: Loaded) -> list[str]:
    return [f"{each.code} {Path(each.source.file).name}:{each.source.line} {each.message}" for each in loaded.problems]


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(GOOD)
    loaded = load_policy([path])
    assert loaded.problems == () and loaded.snapshot is not None
    assert list(loaded.snapshot.services) == ["web"]
    assert loaded.snapshot.services["web"].source.file == str(path)
    assert loaded.texts == {str(path): GOOD}


def test_the_revision_follows_the_content(tmp_path: Path) -> None:
    def revision(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        snapshot = load_policy([tmp_path / name]).snapshot
        assert snapshot is not None
        return snapshot.revision

    assert revision("a.yaml", GOOD) == revision("b.yaml", GOOD)
    assert revision("a.yaml", GOOD) != revision("a.yaml", GOOD + "# more\n")


def test_a_folder_is_one_policy(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("version: 1\nservices: {web: {calls: {api: {}}}}\n")
    (tmp_path / "a.yml").write_text("version: 1\nservices: {api: {}}\ndefaults: {mtls: off}\n")
    (tmp_path / ".hidden.yaml").write_text("nonsense: [")
    (tmp_path / "README.md").write_text("not a policy")
    (tmp_path / "sub").mkdir()
    loaded = load_policy([tmp_path])
    assert loaded.problems == () and loaded.snapshot is not None
    assert list(loaded.snapshot.services) == ["api", "web"]
    assert loaded.snapshot.services["web"].mtls.value == "off"


def test_what_may_stand_once_names_both_places(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("version: 1\nservices:\n  web: {}\ndefaults: {}\nenforced: {}\n")
    (tmp_path / "b.yaml").write_text("version: 1\nservices:\n  web: {}\ndefaults: {}\nenforced: {}\n")
    loaded = load_policy([tmp_path])
    assert said(loaded) == [
        'P0113 b.yaml:3 the service "web" is defined twice',
        "P0113 b.yaml:4 `defaults` is stated twice",
        "P0113 b.yaml:5 `enforced` is stated twice",
    ]
    assert loaded.problems[0].label == f"first here: {tmp_path}/a.yaml:3"


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(GOOD)
    (tmp_path / "link.yaml").symlink_to(path)
    assert load_policy([path, tmp_path, path]).problems == ()


def test_problems_of_all_files_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("version: 1\nservices: {web: {x: 1}}\n")
    (tmp_path / "b.yaml").write_text("version: 1\nservices: {\n")
    (tmp_path / "c.yaml").write_bytes(b"version: 1\nservices: {api: \xff}\n")
    loaded = load_policy([tmp_path, tmp_path / "none.yaml"])
    assert loaded.snapshot is None
    assert [each.split(" ")[:2] for each in said(loaded)] == [
        ["P0104", "a.yaml:2"],
        ["P0101", "b.yaml:3"],
        ["P0101", "c.yaml:2"],
        ["P0100", "none.yaml:0"],
    ]
    assert loaded.problems[2].source.column == 17


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    loaded = load_policy([path])
    assert render(loaded.problems, loaded.texts) == (
        f"error[P0100]: cannot read the file: No such file or directory\n --> {path}\n"
    )


def test_an_empty_folder(tmp_path: Path) -> None:
    assert said(load_policy([tmp_path])) == [f"P0100 {tmp_path.name}:0 no policy files in this folder"]


def test_no_files() -> None:
    assert said(load_policy([])) == ["P0100 :0 no policy file is named"]


def test_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").symlink_to(tmp_path / "b.yaml")
    (tmp_path / "b.yaml").symlink_to(tmp_path / "a.yaml")
    assert [each.split(":")[0] for each in said(load_policy([tmp_path / "a.yaml"]))] == ["P0100 a.yaml"]
    assert len(load_policy([tmp_path]).problems) == 2


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.yaml")
    results: list[Loaded] = []
    thread = threading.Thread(target=lambda: results.append(load_policy([tmp_path / "a.yaml", tmp_path])), daemon=True)
    thread.start()
    thread.join(10)
    assert said(results[0]) == ["P0100 a.yaml:0 not a regular file but a FIFO"]


def test_other_things_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "dir.yaml").mkdir()
    assert said(load_policy([tmp_path])) == ["P0100 dir.yaml:0 not a regular file but a folder"]
    assert said(load_policy([Path("/dev/zero")])) == ["P0100 zero:0 not a regular file but a device or socket"]
    assert load_policy([Path("a\0b")]).snapshot is None


def test_an_unreadable_file() -> None:
    """A regular file whose first byte nobody can read, root included."""
    assert said(load_policy([Path("/proc/self/mem")])) == ["P0100 mem:0 cannot read the file: Input/output error"]


def test_a_huge_file(tmp_path: Path) -> None:
    with (tmp_path / "a.yaml").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    assert said(load_policy([tmp_path])) == ["P0114 a.yaml:0 the file holds more than 4 MB"]


def test_a_huge_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / f"{name}.yaml").write_text(f"version: 1\nservices: {{{name}: {{}}}}\n")
    monkeypatch.setattr(load, "FILES_MAX", 2)
    assert said(load_policy([tmp_path])) == ["P0114 c.yaml:0 more than 2 policy files"]
    monkeypatch.setattr(load, "FILES_MAX", 3)
    monkeypatch.setattr(load, "TOTAL_BYTES_MAX", 60)
    assert [each.split(" ")[0] for each in said(load_policy([tmp_path]))] == ["P0114"]
