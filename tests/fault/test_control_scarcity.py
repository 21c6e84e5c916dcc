"""A full disk under the control plane or a sidecar, and clocks that are wrong by minutes.

The disk is a small tmpfs (which needs root), filled by a file that a test can take away again. Clocks are those of real
processes under libfaketime. What must hold: a clear message, nothing that was acknowledged is lost, what is known is
served, and all goes on as soon as there is room, or the time is right.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.control import ControlPlane, registered
from support.mesh import Mesh, missing, until
from support.rogue import Rogue
from support.standin_control import Member, launch

pytestmark = pytest.mark.long

SHOP: dict[str, Any] = {
    "reviews": {"ports": {"http": {"port": 8000}}, "authz": {"allow": [{"from": ["web"]}]}},
    "web": {"calls": {"reviews": {}}},
}


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path) as mesh:
        yield mesh


class Disk:
    """A small disk of its own."""

    def __init__(self, mesh: Mesh, path: Path, size: str = "6m") -> None:
        if os.geteuid() != 0:
            missing("root, to mount a small disk,")
        self.path, self.filler = path, path / "filler"
        path.mkdir(mode=0o700)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "none", str(path)])
        if done.returncode:
            missing("leave to mount a tmpfs")
        mesh.stack.callback(subprocess.run, ["umount", "-l", str(path)])

    def fill(self) -> None:
        """Not a byte is left."""
        with self.filler.open("ab", buffering=0) as file:
            for size in (65536, 4096, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError:
                    pass

    def empty(self) -> None:
        self.filler.unlink()


def shop(control: ControlPlane) -> tuple[Member, Member]:
    control.apply(SHOP)
    reviews = control.member("reviews", app=control.mesh.backend())
    web = control.member("web", inbound="off")
    registered(control, "reviews")
    until(lambda: status(web) == 200, "an answer")
    return reviews, web


def status(web: Member) -> int:
    with web.client() as client:
        return client.get("/").status


@pytest.mark.root
def test_a_full_disk_under_the_control_plane(mesh: Mesh) -> None:
    control = ControlPlane(mesh, start=False)
    disk = Disk(mesh, control.state)
    control.start()
    control.log_in()
    _, web = shop(control)
    disk.fill()
    # Changes are refused, and say why; nobody is told that something was done that was not.
    refused = 0
    for _ in range(400):  # what SQLite has set aside takes a few
        code, out, said = control.cli("token", "create", "--service", "web")
        if code:
            refused += 1
            assert code != 2 and ("full" in said or "takes no more" in said) and "room" in said, (code, said)
            assert "pil_" not in out
            if refused == 3:
                break
    assert refused == 3
    path = control.policy_file({"reviews": {"timeout": {"total": "9s"}}})
    code, _, said = control.cli("policy", "apply", "-f", str(path))
    assert code in (1, 3) and ("full" in said or "takes no more" in said), (code, said)
    # Reads go on, and so does traffic; `check` names it.
    assert status(web) == 200
    assert "9s" not in control.ok("explain", "reviews")
    code, out, _ = control.cli("check")
    assert code == 1 and ("full" in out or "takes no" in out), out
    time.sleep(16)  # longer than a lease lives: nobody is judged by a store that takes nothing
    assert status(web) == 200
    # Killed and started again on the full disk: it starts and serves, or ends with the reason.
    assert "Traceback" not in control.log, control.log[-3000:]
    disk.empty()
    until(lambda: control.cli("check")[0] == 0, "recovery", 30)
    assert parses(control.token("web"))
    control.apply({"reviews": SHOP["reviews"] | {"timeout": {"total": "9s"}}})
    assert "9s" in control.ok("explain", "reviews")
    rows = control.get("endpoints")
    assert len(rows if isinstance(rows, list) else rows["endpoints"]) == 1
    assert status(web) == 200


def parses(text: str) -> bool:
    return text.startswith("pil_j_")


@pytest.mark.root
def test_a_start_on_a_full_disk(mesh: Mesh) -> None:
    control = ControlPlane(mesh, start=False)
    disk = Disk(mesh, control.state)
    control.start()
    control.log_in()
    token = control.token("web")
    control.kill()
    disk.fill()
    process = subprocess.Popen(
        control.command(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    try:
        process.wait(10)
        said = process.stderr.read().decode()
        assert process.returncode == 2 and "Traceback" not in said, said
        assert "full" in said.lower() or "no space" in said.lower() or "takes no more" in said, said
    except subprocess.TimeoutExpired:
        process.kill()  # it serves what it has: as good
        process.wait()
    finally:
        process.stderr.close()
    disk.empty()
    control.start()
    assert Rogue(control, "web", token).id, "the token that was acknowledged is there"


@pytest.mark.root
@pytest.mark.long
def test_a_full_disk_under_a_sidecar(mesh: Mesh) -> None:
    control = ControlPlane(mesh, "r1", "--leaf-ttl=20s")
    shop_reviews, _ = shop(control)
    folder = mesh.path / "small"
    disk = Disk(mesh, folder, "1m")
    web = launch(mesh, "web", token=control.token("web"), state=folder / "state", inbound="off").await_ready()
    until(lambda: status(web) == 200, "an answer")
    disk.fill()
    control.apply(SHOP | {"web": {"calls": {"reviews": {}}, "timeout": {"total": "9s"}}})
    first = web.admin("/config")["identity"]["fingerprint"]
    until(lambda: "No space left" in web.log or "no space" in web.log.lower(), "a word about the disk", 30)
    until(lambda: web.admin("/config")["identity"]["fingerprint"] != first, "a renewal all the same", 30)
    assert status(web) == 200 and "Traceback" not in web.log
    # What is on the disk is whole: the files are replaced whole or not at all.
    disk.empty()
    second = web.admin("/config")["identity"]["fingerprint"]
    until(lambda: web.admin("/config")["identity"]["fingerprint"] != second, "another renewal", 30)
    assert web.stop() == 0
    again = launch(mesh, "web", state=folder / "state", inbound="off").await_ready()
    assert status(again) == 200
    assert shop_reviews.alive
    # Without any room at the very beginning: it says so and ends.
    third = Disk(mesh, mesh.path / "tiny", "64k")
    third.fill()
    late = launch(mesh, "web", token=control.token("web"), state=third.path / "state", inbound="off")
    assert late.process.wait(20) == 2
    assert "No space left" in late.log and "Traceback" not in late.log, late.log


# -- clocks


def skewed(monkeypatch: pytest.MonkeyPatch, offset: str) -> None:
    """Processes that are started now have another time of day (their monotonic clock is right)."""
    library = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)
    if library is None or shutil.which("faketime") is None:
        missing("libfaketime (apt-get install faketime)")
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("FAKETIME", offset)
    monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")


@pytest.mark.parametrize("offset", ["+10m", "-10m"])
def test_a_sidecar_whose_clock_is_wrong(mesh: Mesh, monkeypatch: pytest.MonkeyPatch, offset: str) -> None:
    control = ControlPlane(mesh)
    _, web = shop(control)
    token = control.token("web")
    with monkeypatch.context() as patch:
        skewed(patch, offset)
        member = launch(mesh, "web", token=token, inbound="off")
    member.says("clock")
    assert "Traceback" not in member.log
    if offset == "+10m":  # what was issued is valid there, and what others have too
        member.await_ready()
        until(lambda: status(member) == 200, "an answer")
    else:
        assert "ahead" in member.log or "behind" in member.log or "not yet valid" in member.log, member.log
    assert status(web) == 200


def test_a_sidecar_behind_by_less_than_the_margin(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    control = ControlPlane(mesh)
    shop(control)
    token = control.token("web")
    with monkeypatch.context() as patch:
        skewed(patch, "-90s")
        member = launch(mesh, "web", token=token, inbound="off").await_ready()
    until(lambda: status(member) == 200, "an answer")


@pytest.mark.long
def test_a_control_plane_whose_clock_is_behind(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes back with another time of day: nobody is lost, and what is wrong is said."""
    control = ControlPlane(mesh, start=False)
    with monkeypatch.context() as patch:  # its authority, and what that issues, are older than the clock is wrong
        skewed(patch, "-1h")
        control.start()
    control.log_in()
    reviews, web = shop(control)
    token = control.token("web", "--ttl", "3h")
    assert control.stop() == 0
    with monkeypatch.context() as patch:
        skewed(patch, "-10m")
        control.start()
    until(lambda: web.source["connected"] and reviews.source["connected"], "the sidecars", 20)
    time.sleep(17)  # more than one TTL: nobody is judged by the time of day
    assert status(web) == 200
    registered(control, "reviews")
    code, out, _ = control.cli("check")
    assert code == 1 and "clock" in out, out
    assert Rogue(control, "web", token).id, "a token is good still"
    assert "Traceback" not in control.log
    assert control.stop() == 0
    control.start()
    until(lambda: web.source["connected"], "the return", 30)
    assert status(web) == 200
    registered(control, "reviews")


def test_a_control_plane_whose_clock_is_ahead(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own certificate is of the future: nobody can believe it, and each says so; what runs, runs on."""
    control = ControlPlane(mesh)
    reviews, web = shop(control)
    assert control.stop() == 0
    with monkeypatch.context() as patch:
        skewed(patch, "+10m")
        control.start()
    until(lambda: "not yet valid" in web.source["problem"] and "clock" in web.source["problem"], "the reason")
    code, _, said = control.cli("check")
    assert code != 0 and "clock" in said + _, (said, _)
    assert status(web) == 200
    assert control.stop() == 0
    control.start()
    until(lambda: web.source["connected"] and reviews.source["connected"], "the return", 30)
    until(lambda: control.cli("check")[0] == 0, "peace", 20)
    assert status(web) == 200


def test_a_control_plane_older_than_its_authority(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    control = ControlPlane(mesh)
    assert control.stop() == 0
    skewed(monkeypatch, "-10m")
    done = subprocess.run(control.command(), stdin=subprocess.DEVNULL, capture_output=True, timeout=20)
    said = done.stderr.decode()
    assert done.returncode == 2 and "is the clock right?" in said and "Traceback" not in said, said
