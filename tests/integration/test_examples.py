"""What stands in examples/ and in the quick start works as it stands there.

The blocks of shell of the quick start run in one bash, in a copy of examples/, with free ports in place of those there;
what a block of text says below must appear in their output, in that order (`…` stands for anything).
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sidecar.model.load import load_policy

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
QUICKSTART = ROOT / "docs" / "quickstart.md"
PORTS = ("15001", "15006", "15020", "15030", "8000", "8001")
QUICKSTART_S = 120.0

UP_PORTS = "--listen-mesh 127.0.0.1:0 --listen-join 127.0.0.1:0"

BLOCK = re.compile(r"```sh\n(.*?)```\n(?:```text\n(.*?)```\n)?", re.DOTALL)


POLICIES = sorted(path for path in EXAMPLES.rglob("*.yaml") if path.parent.name != "deploy")


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_the_policies_are_valid_and_without_a_warning(path: Path) -> None:
    loaded = load_policy([path])
    assert loaded.problems == ()
    assert loaded.snapshot is not None


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def with_ports(text: str, ports: dict[str, str]) -> str:
    text = re.sub(r"^pillion up\b", f"pillion up {UP_PORTS}", text, flags=re.MULTILINE)
    return re.sub(r"\b(" + "|".join(ports) + r")\b", lambda found: ports[found[0]], text)


def commands_of(directory: Path) -> dict[str, str]:
    """PATH with this installation's `pillion`, in whatever way the tests themselves were started."""
    program = directory / "pillion"
    program.write_text(f"#!{sys.executable} -P\nimport sys\nfrom control_plane.cli import main\nsys.exit(main())\n")
    program.chmod(0o755)
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


def test_the_quick_start_does_what_it_says(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("curl is missing, and CI=true does not allow to skip")
        pytest.skip("curl is not installed")
    ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    for path in (tmp_path / "examples" / "two-services").iterdir():
        if path.is_file():
            path.write_text(with_ports(path.read_text(), ports))
    blocks = BLOCK.findall(QUICKSTART.read_text())
    assert len(blocks) >= 8
    script = "set -eo pipefail\n" + "\n".join(
        f"{with_ports(shell, ports)}\necho '=== end of block {number}'" for number, (shell, _) in enumerate(blocks)
    )
    unwanted = ("PILLION_", "XDG_", "http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    output = tmp_path / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=tmp_path,
            env=environment
            | commands_of(bin_directory)
            | {"HOME": str(tmp_path)},  # where `pillion up` keeps its state
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(QUICKSTART_S)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # what a block that failed has left
            except ProcessLookupError:
                pass
            process.wait()
    said = output.read_text()
    assert code == 0, said
    rest = said
    for number, (_, expected) in enumerate(blocks):
        part, mark, rest = rest.partition(f"=== end of block {number}\n")
        assert mark, said
        for line in with_ports(expected, ports).splitlines():
            pattern = ".*".join(re.escape(piece) for piece in line.split("…"))
            found = re.search(pattern, part)
            assert found, f"no {line!r} in block {number}:\n{part}"
            part = part[found.end() :]
    left = {path.name for path in (tmp_path / "examples" / "two-services").iterdir()}
    assert left == {"mesh.yaml", "reviews.py"}
