"""The pages that explain a mechanism: examples are valid; pictures and numbers are what the command gives.

To bring pictures and numbers up to date: `cd tests && ../.venv/bin/python -m support.rehearsals`.
"""

import re
from pathlib import Path

import pytest
from support import rehearsals

from sidecar.model.load import load_texts
from sidecar.model.problems import Severity

CHEAP = "weights.yaml"
RUNS = [(page, command) for page in rehearsals.pages() for command in rehearsals.commands(page)]
EXAMPLES = [
    pytest.param(text, id=f"{page.stem}-{number}")
    for page in sorted(rehearsals.DOCS.glob("*.md"))
    for number, text in enumerate(re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL), 1)
    if text.startswith("version: 1\n") and "\nload:" not in text
]


@pytest.mark.parametrize(
    ("page", "command"),
    [
        pytest.param(page, command, id=f"{page.stem}-{index}", marks=() if CHEAP in command else pytest.mark.long)
        for index, (page, command) in enumerate(RUNS)
    ],
)
def test_what_a_page_shows_is_what_the_command_gives(page: Path, command: str) -> None:
    printed, pictures = rehearsals.rehearse(command)
    shown = rehearsals.shown(page, command)
    assert shown in ("", printed)
    for name, picture in pictures.items():
        assert (rehearsals.DOCS / "pictures" / name).read_bytes() == picture


def test_every_picture_has_a_command() -> None:
    drawn = {name for _, command in RUNS for name in re.findall(r"--svg docs/pictures/(\S+)", command)}
    kept = {path.name for path in (rehearsals.DOCS / "pictures").iterdir()}
    assert drawn == kept == rehearsals.used_pictures()


@pytest.mark.parametrize("text", EXAMPLES)
def test_the_policies_in_the_documents_are_valid(text: str) -> None:
    loaded = load_texts({"mesh.yaml": text})
    assert [problem.message for problem in loaded.problems if problem.severity is Severity.ERROR] == []
