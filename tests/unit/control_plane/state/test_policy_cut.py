"""Cutting a policy file: each document with its exact lines, which alone say what they say in the file."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.policies import policies

from control_plane.state.policy import cut
from control_plane.state.policy.cut import WHOLE_BYTES_MAX, Fragment
from sidecar.model.documents import decode_file, decode_piece, documents_of
from sidecar.model.problems import Sink
from sidecar.model.yaml_tree import normalise

ROOT = Path(__file__).parents[4]
FILES = [*sorted((ROOT / "examples").rglob("*mesh*.yaml")), ROOT / "tests/unit/model/example.yaml"]


def pieces(text: str) -> dict[str, Fragment]:
    sink = Sink()
    found = dict(cut(text, "mesh.yaml", sink))
    assert not sink.failed, sink.problems()
    stand_alone(text, found)
    return found


def stand_alone(text: str, found: dict[str, Fragment]) -> None:
    block = decode_file(text, "mesh.yaml", Sink())
    assert block is not None
    stated = documents_of(block)
    assert found.keys() == stated.keys()
    for name, piece in found.items():
        assert piece.stated == stated[name]
        if not piece.whole:
            sink = Sink()
            assert decode_piece(name, piece.text, "mesh.yaml", piece.line, sink) == stated[name]
            assert sink.problems() == ()


def test_comments_stay_with_what_they_are_about() -> None:
    text = """\
# The shop.

version: 1
# Everybody.
defaults:
  mtls: strict
  # no more

services:
  # The pages.
  # Do not touch.
  web:
    calls:
      api: {}     # slow
    # web ends here

  # Lone comment.

# Not far enough to the right.
  api: {}

# Nobody may
enforced:
  mtls: strict
# The end.
"""
    found = pieces(text)
    assert {name: (each.line, each.text) for name, each in found.items()} == {
        "defaults": (4, "# Everybody.\ndefaults:\n  mtls: strict\n  # no more\n"),
        "services/web": (
            10,
            "  # The pages.\n  # Do not touch.\n  web:\n    calls:\n      api: {}     # slow\n"
            "    # web ends here\n\n  # Lone comment.\n",
        ),
        "services/api": (19, "# Not far enough to the right.\n  api: {}\n"),
        "enforced": (22, "# Nobody may\nenforced:\n  mtls: strict\n# The end.\n"),
    }


def test_a_quoted_text_is_no_comment() -> None:
    text = 'version: 1\nservices:\n  a:\n    rate_limit: {requests: 1, key: "\n  # x"}\n  b: {}\n'
    text = text.replace('key: "\n  # x"', 'key: none}\n    authz: {deny: [{message: "one\n  # two"}]')
    found = pieces(text)
    assert found["services/b"].text == "  b: {}\n"
    assert found["services/a"].text.endswith('# two"}]}\n')


def test_a_block_scalar_is_no_comment() -> None:
    text = (
        "version: 1\nservices:\n  a:\n    routes:\n      - respond:\n          status: 200\n          body: |\n"
        "            one\n            # two\n\n  # of b\n  b:\n  c:\n"
    )
    found = pieces(text)
    assert found["services/b"].text == "  # of b\n  b:\n"
    assert "# two" in found["services/a"].text


@pytest.mark.parametrize(
    "text",
    [
        "version: 1\nservices: {a: {}, b: {mtls: strict}}\n",
        "{version: 1, defaults: {mtls: strict}, services: {a: {owners: [x,\n  # who\n  y]}}}",
        json.dumps({"version": 1, "enforced": {"mtls": "strict"}, "services": {"a": {}, "b": {"calls": {"a": {}}}}}),
        json.dumps({"version": 1, "services": {"a": {"owners": ["x"]}, "b": {}}}, indent=2),
        "version: 1\nservices: {\n  # of a\n  a: {}, b: { }\n}\n",
        "services: {a: {}}\n---\n".removesuffix("---\n") + "version: 1",
        "---\nversion: 1\nservices:\n    a: {}\n...\n",
    ],
)
def test_brackets(text: str) -> None:
    assert not any(each.whole for each in pieces(text).values())


@pytest.mark.parametrize(
    "text",
    ["version: 1\nservices: {a, b}\n", "version: 1\n? services\n: {a: {}}\n", '{"version":1,"services":{"a":{}}}'],
)
def test_what_cannot_be_cut_is_whole(text: str) -> None:
    found = pieces(text)
    if '"a":{' not in text and "? " not in text:
        assert all(each.whole and each.text == text for each in found.values())
    assert found["services/a"].stated.key.source.line == found["services/a"].line


def test_whole_files_have_a_bound() -> None:
    names = ", ".join(f"a{index}" for index in range(1500))
    text = f"version: 1\nservices: {{{names}}}\n"
    assert len(text) * 1500 > WHOLE_BYTES_MAX
    sink = Sink()
    assert cut(text, "mesh.yaml", sink) == {}
    assert [each.code for each in sink.problems()] == ["P0114"]


def test_a_file_with_errors_gives_nothing() -> None:
    sink = Sink()
    assert cut("version: 1\nservices: {a: {x: 1}}\n", "mesh.yaml", sink) == {}
    assert sink.failed
    assert cut("version: 1\nservices: {a: {}}\n", "mesh.yaml", sink).keys() == {"services/a"}
    assert sink.failed


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_examples(path: Path) -> None:
    found = pieces(normalise(path.read_text()))
    assert found
    assert not any(each.whole for each in found.values())


def test_all_lines_of_services_are_in_some_piece() -> None:
    text = normalise((ROOT / "examples/mesh.yaml").read_text())
    found = pieces(text)
    lines = [line for each in found.values() for line in each.text.splitlines() if line.strip()]
    rest = [line for line in text.splitlines() if line.strip() and line not in lines]
    assert all(line.startswith(("#", "version:", "services:")) for line in rest)


def styled(data: Any, style: bool | None, indent: int) -> str:
    data = json.loads(json.dumps(data))
    return yaml.safe_dump(data, allow_unicode=True, default_flow_style=style, indent=indent, width=1_000_000)


@settings(max_examples=100, deadline=None)
@given(policies(), st.sampled_from((False, None, True)), st.integers(2, 4), st.data())
def test_generated_policies(data: Any, style: bool | None, indent: int, draw: st.DataObject) -> None:
    lines = styled(data, style, indent).splitlines(keepends=True)
    for _ in range(draw.draw(st.integers(0, 6))):
        at = draw.draw(st.integers(0, len(lines) - (style is True)))
        lines.insert(at, draw.draw(st.sampled_from(("# note\n", "  # note\n", "        # far\n", "\n", "   \n"))))
    if draw.draw(st.booleans()):
        lines[-1] = lines[-1].rstrip("\n")
    text = "".join(lines)
    found = pieces(text)
    if style is not True:
        assert not any(each.whole for each in found.values())


@settings(max_examples=100, deadline=None)
@given(policies(), st.integers(0, 200), st.sampled_from("{}[]:,#\n '\"|>-?a"))
def test_nothing_ends_in_an_exception(data: Any, at: int, mark: str) -> None:
    text = styled(data, None, 2)
    at = min(at, len(text))
    text = text[:at] + mark + text[at:]
    sink = Sink()
    found = dict(cut(text, "mesh.yaml", sink))
    if not sink.failed:
        stand_alone(text, found)
    else:
        assert found == {}
