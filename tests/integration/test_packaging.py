"""The repository as its users meet it: README, documents, package, Makefile."""

import ast
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.documents import MADE, ROOT, links, renewed, section, shell_blocks
from support.mesh import free_port, tool

from sidecar.testing import check_filter

README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("sidecar", "control_plane", "certs")
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES_OF = {"grpcio": "grpc", "protobuf": "google", "google-re2": "re2", "PyYAML": "yaml"}


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


# -- README


def test_the_readme_names_exactly_two_set_up_commands() -> None:
    blocks = shell_blocks(section(README, "Set-up"))
    assert [block.strip() for block in blocks] == ["make demo", "make test"]


@pytest.fixture
def on_free_ports() -> dict[str, str]:
    """The README's ports may be taken here; a reader would choose others too."""
    return {port: str(free_port()) for port in ("15006", "15000", "8000", "8080")}


def test_the_readmes_quick_start_runs_as_pasted(tmp_path: Path, on_free_ports: dict[str, str]) -> None:
    tool("curl")
    bash = tool("bash")
    pasted = "\n".join(shell_blocks(section(README, "Two services by hand, without a control plane")))
    for old, new in on_free_ports.items():
        pasted = re.sub(rf"\b{old}\b", new, pasted)
    pillion = tmp_path / "bin" / "pillion"
    pillion.parent.mkdir()
    run = "import sys; from control_plane.cli import main; sys.exit(main())"
    pillion.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -c "{run}" "$@"\n')
    pillion.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PILLION_")}
    environment["PATH"] = f"{pillion.parent}:{environment['PATH']}"
    environment["PILLION_INBOUND"] = f"0.0.0.0:{on_free_ports['15006']}"  # in the README it is the built-in one
    directory = tmp_path / "empty"
    directory.mkdir()
    pasted = pasted.replace("\nkill %1\nwait\n", "\nkill %1\nwait || true\n")  # -e: `wait` tells of the signal
    shell = subprocess.Popen(
        [bash, "-e", "-c", pasted],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = shell.communicate(timeout=90)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, f"{out}\n{err}"
    assert "allowed by services.reviews.authz.allow[0]" in out
    assert out.count('{"stars": 5}') == 2, f"{out}\n{err}"
    assert "HTTP/1.1 403 Forbidden" in out and "x-pillion-reason: denied" in out
    assert "no certificate, no answer" in out
    assert re.search(r"^in +reviews +http ", out, re.MULTILINE)
    assert "x-served-by: reviews" in out


# -- documents


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.name)
def test_made_parts_of_documents_are_current(path: Path) -> None:
    assert path.read_text() == renewed(path), "run: cd tests && ../.venv/bin/python -m support.documents"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    missing = [target for target in links(path.read_text()) if not (path.parent / target).exists()]
    assert missing == []


def test_every_document_is_in_the_index() -> None:
    listed = set(links((ROOT / "docs" / "README.md").read_text()))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} == listed


def _filters() -> Iterator[Any]:
    """The filters that the documents show, each with its code."""
    for path, pattern in (
        (ROOT / "README.md", r"^cat > \w+\.py <<'END'\n(.*?)^END$"),
        (ROOT / "docs" / "plugins.md", r"^```python\n(.*?)^```$"),
    ):
        for code in re.findall(pattern, path.read_text(), re.MULTILINE | re.DOTALL):
            for name in re.findall(r"^class (\w+)\((?:Async)?Filter\):", code, re.MULTILINE):
                yield pytest.param(code, name, id=f"{path.name}-{name}")


@pytest.mark.parametrize(("code", "name"), list(_filters()))
def test_filters_in_documents_keep_the_contract(code: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("shown_filter")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(code, module.__dict__)
    check_filter(module.__dict__[name])


# -- package


def test_the_metadata_is_that_of_the_project() -> None:
    project = PROJECT["project"]
    installed = importlib.metadata.metadata("pillion")
    assert installed["Version"] == project["version"]
    assert installed["Requires-Python"] == project["requires-python"]
    assert project["scripts"] == {"pillion": "control_plane.cli:main"}


def test_top_level_packages_are_these_and_typed() -> None:
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert found == set(PACKAGES)
    assert all((ROOT / package / "py.typed").exists() for package in PACKAGES)
    for path in sources():
        assert (path.parent / "__init__.py").exists(), f"{path.parent} would be missing from the package"


AWAITED = {"httpx"}  # part of the product's fixed set: exporters come with it


def test_what_is_imported_is_required_and_what_is_required_is_imported() -> None:
    imported = {name for path in sources() for name in _imports(path)}
    imported -= {*sys.stdlib_module_names, *PACKAGES}
    project = PROJECT["project"]
    named = [
        re.split(r"[<>=!~ ]", text)[0]
        for text in (
            *project["dependencies"],
            *(each for extra in project["optional-dependencies"].values() for each in extra),
        )
    ]
    assert imported == {MODULES_OF.get(name, name) for name in named} - AWAITED


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            yield node.module.partition(".")[0]


def test_names_of_test_files_are_unique() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.long
def test_a_built_package_installs_and_runs(tmp_path: Path) -> None:
    """Builds from a copy, as a user's pip would, and runs the installed command from elsewhere."""
    source = tmp_path / "source"
    keep = (*PACKAGES, "pyproject.toml", "setup.py", "README.md", "LICENSE")
    source.mkdir()
    for name in keep:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    venv = tmp_path / "venv"
    _run([sys.executable, "-m", "venv", str(venv)], tmp_path)
    _run([str(venv / "bin/python"), "-m", "pip", "install", "--quiet", str(source)], tmp_path)
    pillion = str(venv / "bin/pillion")
    assert _run([pillion, "--version"], tmp_path) == f"pillion {PROJECT['project']['version']}\n"
    _run([pillion, "ca", "init"], tmp_path)
    _run([pillion, "ca", "issue", "--service", "web"], tmp_path)
    assert "--allow-filters" in _run([pillion, "sidecar", "--help"], tmp_path)
    assert '"$schema"' in _run([pillion, "policy", "schema"], tmp_path)


def _run(command: list[str], directory: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


# -- Makefile


@pytest.mark.parametrize("target", ["demo", "test", "test-full", "compiled", "bench"])
def test_the_makefile_is_well_formed(target: str) -> None:
    make = tool("make")
    done = subprocess.run(
        [make, "--dry-run", "--no-print-directory", target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_core_tests_run_once() -> None:
    done = subprocess.run(
        [tool("make"), "--dry-run", "test-full"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.count('-m "not long"') == 1
    assert done.stdout.count('-m "long and not alone"') == 1
    assert done.stdout.count('-m "long and alone"') == 1
