"""`pillion up` as a newcomer uses it: what it prints is what is typed next, exactly as it stands there."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.mesh import free_port, tool, until

from control_plane.cli.program import program

WAIT_S = 30.0
COMMAND_S = 60.0


class Machine:
    """A user with a home of their own: terminals in which commands are typed, and what runs in them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.home, self.work, bin = path / "home", path / "work", path / "bin"
        for each in (self.home, self.work, bin):
            each.mkdir()
        script = bin / "pillion"
        script.write_text(f"#!{sys.executable} -P\nimport sys\nfrom control_plane.cli import main\nsys.exit(main())\n")
        script.chmod(0o755)
        unwanted = ("PILLION_", "XDG_", "http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "FORCE_COLOR")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
        self.variables = kept | {"HOME": str(self.home), "PATH": f"{bin}:{os.environ['PATH']}"}
        self.terminals: list[Terminal] = []
        self.mesh, self.join = free_port(), free_port()

    def open(self, command: str) -> "Terminal":
        """Type a command that goes on."""
        terminal = Terminal(self, command, len(self.terminals))
        self.terminals.append(terminal)
        return terminal

    def type(self, command: str) -> tuple[int, str, str]:
        """Type a command that ends: exit code, stdout, stderr."""
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.work, env=self.variables, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=COMMAND_S,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    def ok(self, command: str) -> str:
        code, out, said = self.type(command)
        assert code == 0, f"{command}: {code}\n{out}{said}"
        return out

    def up(self, *options: str, own_ports: bool = True) -> "Terminal":
        listen = (f"--listen-mesh=127.0.0.1:{self.mesh}", f"--listen-join=127.0.0.1:{self.join}") if own_ports else ()
        terminal = self.open(" ".join(["pillion", "up", *listen, *options]))
        terminal.says("amiss")
        return terminal

    def has(self, pattern: str) -> None:
        until(lambda: re.search(pattern, self.type("pillion get services")[1]), pattern, WAIT_S)


class Terminal:
    def __init__(self, machine: Machine, command: str, number: int) -> None:
        self.log = machine.path / f"terminal-{number}"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"], cwd=machine.work, env=machine.variables, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    @property
    def text(self) -> str:
        return self.log.read_text()

    def says(self, text: str) -> None:
        try:
            until(lambda: text in self.text or self.process.poll() is not None, repr(text), WAIT_S)
        finally:
            assert text in self.text, f"no {text!r} in:\n{self.text}"

    def next(self) -> list[str]:
        """The commands that `up` says to type."""
        return re.findall(r"^  (\S.*)$", self.text.partition("Next, in other terminals:")[2], re.MULTILINE)

    def ctrl_c(self) -> int:
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(WAIT_S)

    def close(self) -> None:
        """Whatever is left in it ends."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(WAIT_S)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    for terminal in reversed(machine.terminals):
        terminal.close()


def test_what_is_printed_is_all_that_it_takes(machine: Machine) -> None:
    tool("curl")
    machine.variables |= {name: str(machine.path / name) for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME")}
    (machine.work / "a-file-of-web").touch()
    up = machine.up()
    ports = {"8000": str(free_port()), "8001": str(free_port())}
    commands = [re.sub("8000|8001", lambda found: ports[found[0]], command) for command in up.next()]
    run_web, call, get_services = commands

    web = machine.open(run_web)
    web.says("registered as web")
    assert "a-file-of-web" in machine.ok(call)
    assert re.search(r"web .* 1/1 ", machine.ok(get_services))
    assert "1 of 1 healthy" in machine.ok("pillion describe service web")
    assert "all is well" in machine.ok("pillion check --wait 20")

    # An application that calls others finds the mesh in its environment, and its caller's name is told.
    inner = "curl -s -x http://$PILLION_OUTBOUND http://web/; pillion get sidecars -o json"
    said = machine.ok(f"pillion run shop --port {ports['8001']} -- sh -c '{inner}'")
    assert "a-file-of-web" in said
    (known,) = [each for each in json.loads(said[said.index("{") :])["sidecars"] if each["service"] == "web"]

    # Nothing is where it should not be, and secrets are the user's alone.
    assert not any(machine.home.iterdir())
    context = machine.path / "XDG_CONFIG_HOME" / "pillion" / "context.json"
    assert context.stat().st_mode & 0o777 == 0o600
    assert (machine.path / "XDG_STATE_HOME" / "pillion" / "up").stat().st_mode & 0o777 == 0o700

    # While it is down, services go on; when it is back, they are too, as who they were.
    assert up.ctrl_c() == 0
    assert machine.type("pillion get services")[0] == 3
    assert "a-file-of-web" in machine.ok(call)
    machine.up()
    machine.has(r"web .* 1/1 ")
    sidecars = json.loads(machine.ok("pillion get sidecars -o json"))["sidecars"]
    assert [each["id"] for each in sidecars if each["service"] == "web"] == [known["id"]]
    assert web.ctrl_c() in (0, 130)
    machine.has(r"web .* 0/0 ")


@pytest.mark.long
def test_what_is_in_the_way_is_named_and_left_alone(machine: Machine) -> None:
    first = machine.up()
    state = machine.home / ".local" / "state" / "pillion" / "up"
    context = machine.home / ".config" / "pillion" / "context.json"
    before = context.read_text()

    code, _, said = machine.type("pillion up")
    assert code == 2
    assert f"running already on {state} (process {first.process.pid})" in said
    assert "--state-dir" in said.partition("start another beside it: ")[2]

    code, _, said = machine.type(f"pillion up --state-dir other --listen-mesh 127.0.0.1:{machine.mesh}")
    assert code == 2
    assert f"127.0.0.1:{machine.mesh} is in use" in said and "--listen-mesh" in said

    # Another mesh beside the first: commands still ask the first, and it is said how to ask this one.
    second = machine.up("--state-dir other", "--listen-mesh 127.0.0.1:0", "--listen-join 127.0.0.1:0", own_ports=False)
    assert f"{context} leads to another mesh" in second.text
    assert context.read_text() == before
    export, *_, get_services = second.next()
    assert machine.type(f"{export}; {get_services}")[0] == 0
    assert second.ctrl_c() == 0
    assert machine.type(f"{export}; {get_services}")[0] == 3

    second = machine.up(
        "--state-dir other", "--listen-mesh 127.0.0.1:0", "--listen-join 127.0.0.1:0", "--force", own_ports=False
    )
    assert "another mesh" not in second.text
    assert second.ctrl_c() == 0
    assert machine.type("pillion get services")[0] == 3


def test_a_damaged_context_is_left_alone_and_a_removed_state_begins_anew(machine: Machine) -> None:
    context = machine.home / ".config" / "pillion" / "context.json"
    context.parent.mkdir(parents=True)
    context.write_text("{")
    context.chmod(0o600)
    up = machine.up()
    assert f"{context} is not JSON" in up.text
    assert context.read_text() == "{"
    assert machine.type(f"{up.next()[0]}; pillion get services")[0] == 0
    assert up.ctrl_c() == 0

    context.unlink()
    assert machine.up().ctrl_c() == 0
    shutil.rmtree(machine.home / ".local")
    machine.up()  # another authority at the same address: the context of the first leads nowhere any more
    machine.ok("pillion get services")


@pytest.mark.long
def test_a_folder_of_policy_is_followed(machine: Machine) -> None:
    folder = machine.work / "policy"
    folder.mkdir()
    text = "version: 1\nservices:\n  shop: {}\n  till: {}\n  web: {authz: {allow: [{from: [till]}]}}\n"
    (folder / "mesh.yaml").write_text(text)
    up = machine.up("--policy-dir policy")
    assert "policy, followed" in up.text
    until(lambda: "services/web" in machine.type("pillion get policies")[1], "the folder's policy", WAIT_S)
    assert machine.type("pillion can shop web GET /")[0] == 1
    (folder / "mesh.yaml").write_text(text.replace("till]", "till, shop]"))
    until(lambda: machine.type("pillion can shop web GET /")[0] == 0, "the change", WAIT_S)
    code, _, said = machine.type("pillion policy apply -f policy/mesh.yaml")
    assert code == 1 and "mesh.yaml" in said
    code, _, said = machine.type("pillion up --policy-dir nowhere")
    assert code == 2 and "nowhere" in said


def test_a_port_that_somebody_else_has(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        code, _, said = machine.type(f"pillion up --listen-mesh 127.0.0.1:0 --listen-join 127.0.0.1:{port}")
    assert code == 2
    assert f"127.0.0.1:{port} is in use" in said and "--listen-join" in said


def test_commands_are_printed_as_they_can_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "pillion"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    beside = Path(sys.executable).with_name("pillion")
    assert program() == (str(beside) if beside.exists() else "pillion")
    if beside.exists():
        monkeypatch.setenv("PATH", str(beside.parent))
        assert program() == "pillion"
