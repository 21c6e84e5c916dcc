"""Runs what a page of the documentation says, as it stands there.

The blocks of shell run in one bash, in a directory and with a HOME of their own, with free ports in place of those on
the page; what a block of text right below says must appear in its output, in that order (`…` stands for anything).
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from support.mesh import environment, free_ports, tool

BLOCK = re.compile(r"```sh\n(.*?)```\n(?:```text\n(.*?)```\n)?", re.DOTALL)


def replacer(ports: Sequence[str]) -> Callable[[str], str]:
    """Puts free ports in place of these."""
    found = dict(zip(ports, map(str, free_ports(len(ports))), strict=True))
    numbers = re.compile(r"\b(" + "|".join(found) + r")\b")
    return lambda text: numbers.sub(lambda port: found[port[0]], text)


def run_page(page: Path, work: Path, home: Path, adapt: Callable[[str], str], blocks_min: int, limit_s: float) -> None:
    """`adapt` changes what cannot be as it stands, such as ports."""
    tool("curl")
    blocks = [(adapt(shell), adapt(text)) for shell, text in BLOCK.findall(page.read_text())]
    assert len(blocks) >= blocks_min
    script = "set -eo pipefail\n" + "\n".join(
        f"{shell}\necho '=== end of block {number}'" for number, (shell, _) in enumerate(blocks)
    )
    programs = home / "bin"
    programs.mkdir()
    program = programs / "pillion"  # this installation's, in whatever way the tests themselves were started
    program.write_text(f"#!{sys.executable} -P\nimport sys\nfrom control_plane.cli import main\nsys.exit(main())\n")
    program.chmod(0o755)
    usual = {name: value for name, value in environment().items() if not name.startswith(("XDG_", "STATE_DIRECTORY"))}
    output = home / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=work,
            env=usual | {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
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
        for line in expected.splitlines():
            found = re.search(".*".join(re.escape(piece) for piece in line.split("…")), part)
            assert found, f"no {line!r} in block {number}:\n{part}"
            part = part[found.end() :]
