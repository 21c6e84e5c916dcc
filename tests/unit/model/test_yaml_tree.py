import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.model import yaml_tree
from sidecar.model.problems import Sink
from sidecar.model.source import Source
from sidecar.model.yaml_tree import BYTES_MAX, DEPTH_MAX, List, Map, Node, Scalar, normalise, read_yaml, resolve_plain


def read(text: str) -> tuple[Node | None, list[str]]:
    sink = Sink()
    node = read_yaml(normalise(text), "f", sink)
    return node, [f"{each.code} {each.source.line}:{each.source.column}" for each in sink.problems()]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"), ("no", "no"), ("yes", "yes"), ("off", "off"), ("y", "y"), ("TRUE", True), ("False", False),
        ("tRue", "tRue"), ("null", None), ("~", None), ("nULL", "nULL"), ("0", 0), ("-12", -12), ("+3", 3),
        ("010", 10), ("0o17", 15), ("0x1F", 31), ("1_000", "1_000"), ("0b11", "0b11"), ("1.10", 1.1), (".5", 0.5),
        ("1.", 1.0), ("1e3", 1000.0), (".inf", math.inf), ("-.INF", -math.inf), ("10:30", "10:30"),
        ("2001-01-01", "2001-01-01"), ("10s", "10s"), ("20%", "20%"), ("=", "="), ("1e", "1e"), ("-", "-"), (".", "."),
    ],
)  # fmt: skip
def test_core_schema(text: str, value: object) -> None:
    got = resolve_plain(text)
    assert got == value and type(got) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(resolve_plain(".nan"))  # type: ignore[arg-type]


def test_nodes_know_their_places() -> None:
    node, problems = read("a: 1\nb:\n  - x\n  - {c: 'on'}\n")
    assert problems == []
    assert isinstance(node, Map) and list(node.entries) == ["a", "b"]
    key, items = node.entries["b"]
    assert key.source == Source("f", 2, 1)
    assert isinstance(items, List)
    inner = items.items[1]
    assert isinstance(inner, Map) and (inner.source, inner.length) == (Source("f", 4, 5), 9)
    _, value = inner.entries["c"]
    assert value == Scalar(Source("f", 4, 9), 4, "on", "on")


def test_quoted_scalars_are_strings() -> None:
    node, _ = read("[\"1\", '2', 3, |\n  4\n]\n".replace("|\n  4\n", '"4"'))
    assert isinstance(node, List)
    assert [item.value for item in node.items if isinstance(item, Scalar)] == ["1", "2", 3, "4"]


def test_keys_are_text_and_compared_as_text() -> None:
    node, problems = read("1: a\n01: b\n'1': c\n")
    assert isinstance(node, Map) and list(node.entries) == ["1", "01"]
    assert problems == ["P0103 3:1"]


def test_every_forbidden_feature_is_reported_at_once() -> None:
    _, problems = read("a: &x 1\nb: *x\nc: !!str 1\n<<: {}\n? [q]\n: 1\n")
    assert problems == ["P0102 1:4", "P0102 2:4", "P0102 3:4", "P0102 4:1", "P0102 5:3"]


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "\n\n"])
def test_empty(text: str) -> None:
    node, problems = read(text)
    assert problems == [] and (node is None or (isinstance(node, Scalar) and node.value is None))


def test_line_breaks_and_byte_order_mark() -> None:
    node, problems = read("\ufeffa: 1\r\nb: 2\rc: 3\n")
    assert problems == []
    assert isinstance(node, Map)
    assert [value.source.line for _, value in node.entries.values()] == [1, 2, 3]


@pytest.mark.parametrize("char", ["\0", "\x1b", "\x7f", "\x85", "\u2028", "\u202e", "\ufeff", "\ufffe", "\ud800"])
def test_characters_that_deceive(char: str) -> None:
    node, problems = read(f"a: 1\nb: x{char}y\n")
    assert node is None and problems == ["P0101 2:5"]


@pytest.mark.parametrize("text", ["a: [1\n", "a: 'x\n", "a: b: c\n", "{a: 1", "a:\n- b\nc\n", "@x", "a: *", "[a]: : :"])
def test_syntax_errors_have_a_place(text: str) -> None:
    _, problems = read(text)
    assert len(problems) >= 1 and all(not each.endswith(" 0:0") for each in problems)


def test_depth_is_bounded() -> None:
    _, problems = read("[" * DEPTH_MAX + "]" * DEPTH_MAX)
    assert problems == []
    for opening in ("[", "{a: ", "[{a: "):
        _, problems = read(opening * 50_000)
        assert [each.partition(" ")[0] for each in problems] == ["P0114"]
    _, problems = read("\n".join(" " * depth + "a:" for depth in range(2000)))
    assert problems == [f"P0114 {DEPTH_MAX + 1}:{DEPTH_MAX + 1}"] or problems[0].startswith("P0114")


def test_nodes_and_size_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_tree, "NODES_MAX", 1000)
    _, problems = read("[" + "a," * 2000 + "]")
    assert problems == ["P0114 1:2000"]
    _, problems = read("#" * (BYTES_MAX + 1))
    assert problems == ["P0114 0:0"]


def test_a_bomb_of_aliases_stays_small() -> None:
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    _, problems = read("\n".join(lines))
    assert len(problems) == 200  # PROBLEMS_MAX: the rest is counted


def test_half_a_surrogate_pair() -> None:
    _, problems = read('a: "\\ud800"')
    assert [each.partition(" ")[0] for each in problems] == ["P0101"]


def test_the_loader_of_pure_python_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a: 1\nb: [on, {c: 'x'}]\nd: |\n  e\n  f\ng: {}\n"
    fast = read(text)
    monkeypatch.setattr(yaml_tree, "_LOADER", yaml.SafeLoader)
    assert read(text) == fast
    assert [each.partition(" ")[0] for each in read('a: "\\ud800"')[1]] == ["P0101"]
    assert [each.partition(" ")[0] for each in read("[" * 50_000)[1]] == ["P0114"]


def test_long_numbers() -> None:
    _, problems = read("a: " + "9" * 5000)
    assert problems == ["P0115 1:4"]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab:{}[]-,#&*!|>'\"%@`\n \t?~<=0.1"), max_size=60))
def test_never_raises(text: str) -> None:
    read(text)
