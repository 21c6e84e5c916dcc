"""Rehearsals in the documents: what `pillion simulate` prints and draws there, by the command that stands above it.

A block of a page that begins with `$ pillion simulate` is run as it stands, in a shell, from the root of the repository
as it were: `examples` is there, and what goes to `docs/pictures` is compared with what lies there. A block without
output shows none.

    python -m support.rehearsals [PAGE]…        (in tests/) brings both up to date, of these pages or of all
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_BLOCK = re.compile(r"^```console\n\$ (pillion simulate [^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """The documents that show a rehearsal."""
    return [path for path in sorted(DOCS.glob("*.md")) if _BLOCK.search(path.read_text(encoding="utf-8"))]


def commands(page: Path) -> list[str]:
    return [found[1] for found in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


def shown(page: Path, command: str) -> str:
    """What the page says that the command prints."""
    return next(found[2] for found in _BLOCK.finditer(page.read_text(encoding="utf-8")) if found[1] == command)


def rehearse(command: str) -> tuple[str, dict[str, bytes]]:
    """What the command prints, and its pictures by name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "examples").symlink_to(ROOT / "examples")
        pictures = folder / "docs" / "pictures"
        pictures.mkdir(parents=True)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=folder,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode not in (0, 1):
            raise RuntimeError(f"{command}: {done.stderr}")
        return done.stdout, {each.name: each.read_bytes() for each in sorted(pictures.iterdir())}


def renew(names: list[str]) -> None:
    """Write what the commands print and draw into the pages."""
    for page in [each for each in pages() if not names or each.name in names]:
        for command in commands(page):
            renew_block(page, command)


def renew_block(page: Path, command: str) -> None:
    """One of them. Nothing is written that is not another."""
    printed, pictures = rehearse(command)
    for name, picture in pictures.items():
        (DOCS / "pictures" / name).write_bytes(picture)
    head = f"```console\n$ {command}\n"
    before, _, rest = page.read_text(encoding="utf-8").partition(head)
    old, fence, after = rest.partition("```\n")
    if old not in ("", printed):
        page.write_text(f"{before}{head}{printed}{fence}{after}", encoding="utf-8")


def renew_reference() -> None:
    """The tables of keys in docs/simulate.md."""
    from sidecar.simulate.reference import reference

    page = DOCS / "simulate.md"
    before, mark, rest = page.read_text(encoding="utf-8").partition("<!-- reference: made from the declarations -->\n")
    end = rest[rest.index("<!-- end of reference -->") :]
    page.write_text(f"{before}{mark}{reference().rstrip()}\n{end}", encoding="utf-8")


def used_pictures() -> set[str]:
    """The pictures that the documents show."""
    pattern = re.compile(r"\]\(pictures/([^)]+\.svg)\)")
    return {name for path in DOCS.glob("*.md") for name in pattern.findall(path.read_text(encoding="utf-8"))}


if __name__ == "__main__":
    renew(sys.argv[1:])
