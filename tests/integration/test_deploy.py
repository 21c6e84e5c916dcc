"""The files in examples/deploy fit the programs: units that systemd accepts, options and files that exist."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from support.mesh import tool

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))


def options_of(verb: str) -> set[str]:
    """The long options of `pillion VERB`."""
    from control_plane.command import control_plane
    from sidecar.command import sidecar

    commands: dict[str, click.Command] = {"control-plane": control_plane, "sidecar": sidecar}
    return {name for param in commands[verb].params for name in param.opts if name.startswith("--")}


def check_options(arguments: list[str]) -> None:
    """`arguments` begin with a verb of pillion."""
    known = options_of(arguments[0])
    used = [argument.partition("=")[0] for argument in arguments[1:] if argument.startswith("--")]
    assert used
    assert set(used) <= known, f"{arguments[0]} does not have {set(used) - known}"


def test_there_are_units() -> None:
    assert [path.name for path in UNITS] == ["pillion-control-plane.service", "pillion-sidecar@.service"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    tool("systemd-analyze")
    program = tmp_path / "pillion"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    path = tmp_path / unit.name.replace("@.", "@reviews.")
    path.write_text(unit.read_text().replace("/opt/pillion/bin/pillion", str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def settings_of(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().replace("\\\n", " ").splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_the_unit_uses_options_that_exist(unit: Path) -> None:
    (command,) = settings_of(unit)["ExecStart"]
    program, *arguments = shlex.split(command)
    assert program == "/opt/pillion/bin/pillion"
    check_options(arguments)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_the_unit_leaves_the_program_time_to_end(unit: Path) -> None:
    settings = settings_of(unit)
    draining_s = 25 if "sidecar" in unit.name else 10
    assert int(settings["TimeoutStopSec"][0]) > draining_s
    assert settings["Type"] == ["notify"]


def test_only_what_says_that_it_lives_is_watched() -> None:
    for unit in UNITS:
        source = "sidecar/app.py" if "sidecar" in unit.name else "control_plane/app.py"
        watched = "WatchdogSec" in settings_of(unit)
        assert not watched or "WATCHDOG=1" in (ROOT / source).read_text()


def test_a_control_plane_tells_systemd_how_it_is(tmp_path: Path) -> None:
    """Ready, alive, ending; as the unit starts it, with what systemd puts into the environment."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(path))
        told.settimeout(30)
        process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-c", "import sys; from control_plane.cli import main; sys.exit(main())"),
                *("control-plane", "--state-dir", str(tmp_path / "state")),
                *("--listen-mesh", "127.0.0.1:0", "--listen-join", "127.0.0.1:0"),
            ],
            env=os.environ | {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "400000"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            assert told.recv(4096).startswith(b"READY=1\n")
            assert told.recv(4096) == b"WATCHDOG=1"
            assert told.recv(4096) == b"WATCHDOG=1"
            process.send_signal(signal.SIGTERM)
            while (word := told.recv(4096)) == b"WATCHDOG=1":
                pass
            assert word == b"STOPPING=1"
            _, said = process.communicate(timeout=10)
        finally:
            process.kill()
            process.communicate()
    assert process.returncode == 0, said.decode()


# -- containers


def dockerfile() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def test_the_dockerfile_copies_what_is_there_and_all_that_is_needed() -> None:
    copied = [
        source
        for word, rest in dockerfile()
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert all((ROOT / source).exists() for source in copied)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    project = (ROOT / "pyproject.toml").read_text()
    assert packages <= set(copied)
    assert {"pyproject.toml", "README.md", "LICENSE"} <= set(copied)
    assert 'etcd = ["etcd3' in project  # the extra that it installs


def test_the_dockerfile_starts_a_control_plane_as_an_ordinary_user() -> None:
    import json

    steps = dict(dockerfile())
    assert json.loads(steps["ENTRYPOINT"]) == ["pillion"]
    check_options(json.loads(steps["CMD"]))
    assert steps["USER"] == "pillion"
    assert steps["STOPSIGNAL"] == "SIGTERM"


def compose() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return data


@pytest.mark.parametrize("name", ["control-plane", "web-sidecar"])
def test_compose_uses_options_that_exist(name: str) -> None:
    service = compose()["services"][name]
    check_options(service["command"])
    assert service["image"] == "pillion"
    limit_s = int(service["stop_grace_period"].removesuffix("s"))
    assert limit_s > (25 if "sidecar" in name else 10)


def test_compose_names_only_what_it_declares() -> None:
    data = compose()
    services = data["services"]
    for name, service in services.items():
        assert set(service.get("depends_on", ())) <= services.keys(), name
        assert set(service.get("networks", ())) <= data["networks"].keys(), name
        assert set(service.get("secrets", ())) <= data["secrets"].keys(), name
        assert {each.split(":")[0] for each in service.get("volumes", ())} <= data["volumes"].keys(), name
        mode = service.get("network_mode", "")
        assert not mode or mode.removeprefix("service:") in services


def test_compose_keeps_the_state_where_the_image_lets_it() -> None:
    (volume,) = [rest for word, rest in dockerfile() if word == "VOLUME"]
    for name in ("control-plane", "web-sidecar"):
        service = compose()["services"][name]
        assert f"--state-dir={volume}" in service["command"]
        assert [each.split(":")[1] for each in service["volumes"]] == [volume]


def test_the_token_is_where_the_sidecar_looks_for_it() -> None:
    service = compose()["services"]["web-sidecar"]
    (secret,) = service["secrets"]
    assert f"--token-file=/run/secrets/{secret}" in service["command"]


@pytest.mark.parametrize("verb", ["control-plane", "sidecar"])
def test_variables_in_the_documents_exist(verb: str) -> None:
    prefix = "PILLION_CONTROL_PLANE_" if verb == "control-plane" else "PILLION_"
    known = {prefix + name[2:].replace("-", "_").upper() for name in options_of(verb)}
    others = {"PILLION_TOKEN", "PILLION_URL", "PILLION_CONTEXT", "PILLION_CONTROL_PLANE"}
    for page in (ROOT / "docs" / "install.md", *UNITS, DEPLOY / "compose.yaml"):
        found = set(re.findall(r"PILLION_[A-Z_]*[A-Z]", page.read_text()))
        mine = {name for name in found if name.startswith("PILLION_CONTROL_PLANE_") == (verb == "control-plane")}
        assert mine - others <= known, page.name


def test_the_python_of_the_image_is_one_that_is_supported() -> None:
    images = [rest.split()[0] for word, rest in dockerfile() if word == "FROM"]
    assert len(set(images)) == 1
    major, minor = images[0].removeprefix("python:").removesuffix("-slim").split(".")
    assert (int(major), int(minor)) >= (3, 11)
    assert sys.version_info >= (3, 11)
