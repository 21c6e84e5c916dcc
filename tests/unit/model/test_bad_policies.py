"""Bad policies and exactly what is said of them: bad_policies.txt holds each with its rendered problems."""

from pathlib import Path

import pytest
import yaml

from sidecar.model.load import load_texts
from sidecar.model.problems import CODES, Severity, render
from sidecar.model.yaml_tree import normalise

LIBYAML_ONLY = {"tab"}  # the wording of a syntax error is libyaml's


def cases() -> list[tuple[str, str, str]]:
    found = []
    content = (Path(__file__).parent / "bad_policies.txt").read_text(encoding="utf-8")
    for block in content.removeprefix("=== ").split("\n=== "):
        name, _, rest = block.partition("\n")
        text, _, says = rest.partition("--- says\n")
        found.append((name, text, says.rstrip("\n") + "\n"))
    return found


CASES = cases()


@pytest.mark.parametrize(("name", "text", "says"), CASES, ids=[name for name, _, _ in CASES])
def test_says_exactly(name: str, text: str, says: str) -> None:
    if name in LIBYAML_ONLY and not hasattr(yaml, "CSafeLoader"):
        pytest.skip("PyYAML was built without libyaml")
    loaded = load_texts({"mesh.yaml": normalise(text)})
    assert render(loaded.problems, loaded.texts) == says


@pytest.mark.parametrize(("name", "text", "says"), CASES, ids=[name for name, _, _ in CASES])
def test_errors_give_no_snapshot_and_warnings_do(name: str, text: str, says: str) -> None:
    loaded = load_texts({"mesh.yaml": normalise(text)})
    errors = [problem for problem in loaded.problems if problem.severity is Severity.ERROR]
    assert (loaded.snapshot is None) == bool(errors)
    assert name.startswith("lint:") == (not errors)


def test_there_are_many_and_they_reach_most_codes() -> None:
    assert len(CASES) >= 100
    codes = {code for code in CODES if not code.startswith("P05")}  # of scenarios: unit/simulate
    reached = {code for code in codes for _, _, says in CASES if f"[{code}]" in says}
    elsewhere = {"P0100", "P0113"}  # files that cannot be read, and several files: test_load.py
    assert codes - reached == elsewhere
