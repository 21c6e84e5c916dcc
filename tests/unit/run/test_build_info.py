"""What is said of the build is what runs, and what is compiled has none of what mypyc gets wrong without a word."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar import build_info
from sidecar.policy import exchange
from sidecar.proxy import reactor
from sidecar.wire import http1

ROOT = Path(__file__).resolve().parents[3]


def test_it_is_what_runs() -> None:
    suffixes = {Path(module.__file__ or "").suffix for module in (exchange, reactor, http1)}
    assert suffixes == ({".so"} if build_info.build() is build_info.COMPILED else {".py"})


def compiled_sources() -> list[Path]:
    """Those that setup.py lists."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    listed: dict[str, str] = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODULES"
    )
    return [ROOT / folder / f"{name}.py" for folder, names in listed.items() for name in names.split()]


def caught(function: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(function):
        if isinstance(node, ast.ExceptHandler) and node.name and node.type:
            yield node.name, ast.unparse(node.type)


def native(node: ast.stmt) -> bool:
    if not isinstance(node, ast.ClassDef):
        return False
    return not any(ast.unparse(base).split("[")[0] in ("Protocol", "NamedTuple") for base in node.bases)


@pytest.mark.parametrize("path", compiled_sources(), ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_what_is_compiled_can_be(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kinds: dict[str, set[str]] = {}
            for name, kind in caught(node):
                kinds.setdefault(name, set()).add(kind)
            twice = [name for name, found in kinds.items() if len(found) > 1]
            assert not twice, (
                f"{node.name}: one name for exceptions of two types takes only those of the first: {twice}"
            )
    for cls in tree.body:
        if native(cls):
            assert isinstance(cls, ast.ClassDef)
            check(cls)


def check(cls: ast.ClassDef) -> None:
    bases = {ast.unparse(base).split("[")[0] for base in cls.bases}
    assert not bases & {"deque", "Enum"} or not methods(cls), (
        f"{cls.name}: this base, with methods, must not be compiled"
    )
    exception = any(base.endswith(("Error", "Exception")) for base in bases)
    for statement in cls.body:
        value: Any = getattr(statement, "value", None)
        if not isinstance(statement, ast.Assign) or ast.unparse(statement.targets[0]) == "__slots__":
            continue
        assert len(statement.targets) == 1, f"{cls.name}: one assignment for each class attribute"
        assert not exception and "dict" not in bases, f"{cls.name}: attributes of such a class are set in __init__"
        assert not isinstance(value, ast.Name), f"{cls.name}: write a method that calls the other one"


def methods(cls: ast.ClassDef) -> list[str]:
    return [node.name for node in cls.body if isinstance(node, ast.FunctionDef)]
