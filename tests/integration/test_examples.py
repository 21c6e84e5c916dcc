"""What stands in examples/ and in the quick start works as it stands there."""

import re
import shutil
from pathlib import Path

import pytest
from support.pages import replacer, run_page

from sidecar.model.load import load_policy

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
QUICKSTART = ROOT / "docs" / "quickstart.md"
PORTS = ("15001", "15006", "15020", "15030", "8000", "8001")
QUICKSTART_S = 120.0

UP_PORTS = "--listen-mesh 127.0.0.1:0 --listen-join 127.0.0.1:0"

POLICIES = sorted(path for path in EXAMPLES.rglob("*.yaml") if path.parent.name not in ("deploy", "scenarios"))


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_the_policies_are_valid_and_without_a_warning(path: Path) -> None:
    loaded = load_policy([path])
    assert loaded.problems == ()
    assert loaded.snapshot is not None


def test_the_quick_start_does_what_it_says(tmp_path: Path) -> None:
    ports = replacer(PORTS)

    def adapt(text: str) -> str:
        return ports(re.sub(r"^pillion up\b", f"pillion up {UP_PORTS}", text, flags=re.MULTILINE))

    work = tmp_path / "work"
    shutil.copytree(EXAMPLES, work / "examples")
    services = work / "examples" / "two-services"
    for path in services.iterdir():
        if path.is_file():
            path.write_text(adapt(path.read_text()))
    run_page(QUICKSTART, work, tmp_path, adapt, blocks_min=8, limit_s=QUICKSTART_S)
    assert {path.name for path in services.iterdir()} == {"mesh.yaml", "reviews.py"}
