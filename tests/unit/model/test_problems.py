from sidecar.model.problems import (
    PROBLEMS_MAX,
    Problem,
    Severity,
    Sink,
    problem_to_json,
    render,
    strict,
    suggest,
)
from sidecar.model.source import Source


def problem(line: int, column: int, length: int = 1, **more: str) -> Problem:
    return Problem("P0106", Severity.ERROR, "wrong", Source("f.yaml", line, column), length, **more)


def test_the_gutter_is_as_wide_as_the_number() -> None:
    text = "\n".join(f"key{number}: value" for number in range(1, 120))
    assert render([problem(101, 9, 5, label="here", help="do this")], {"f.yaml": text}) == (
        "error[P0106]: wrong\n   --> f.yaml:101:9\n101 | key101: value\n    |         ^^^^^ here\n    = help: do this\n"
    )


def test_a_long_line_shows_the_part_around_the_place() -> None:
    text = "x" * 500 + "BAD" + "y" * 500
    shown = render([problem(1, 501, 3)], {"f.yaml": text}).splitlines()
    assert len(shown[2]) <= 170
    assert shown[2][shown[3].index("^") :].startswith("BAD")
    assert shown[2][4:7] == "..." and shown[2].endswith("...")


def test_tabs_keep_the_underline_in_place() -> None:
    shown = render([problem(1, 3, 1)], {"f.yaml": "\t\tx"}).splitlines()
    assert shown[3] == "  | \t\t^"


def test_places_beyond_the_text_do_not_raise() -> None:
    assert render([problem(9, 9)], {"f.yaml": "a"}).startswith("error[P0106]: wrong\n --> f.yaml:9:9\n")
    assert "^" in render([problem(1, 99, 99)], {"f.yaml": "a"})
    assert "^" in render([problem(1, 1, 0)], {"f.yaml": ""})


def test_nothing_from_the_file_reaches_the_terminal_raw() -> None:
    shown = render([problem(1, 1, label="\x1b[2J")], {"f.yaml": "a\x1b[31m\x07"})
    assert "\x1b" not in shown and "\x07" not in shown


def test_colour_only_where_asked() -> None:
    assert "\x1b[1;31m" in render([problem(1, 1)], {"f.yaml": "a"}, color=True)
    assert "\x1b" not in render([problem(1, 1)], {"f.yaml": "a"})


def test_length_0_underlines_the_word() -> None:
    assert render([problem(1, 4, 0)], {"f.yaml": "a: max_retries: 2"}).splitlines()[3] == "  |    ^^^^^^^^^^^"


def test_a_sink_sorts_and_is_bounded() -> None:
    sink = Sink()
    sink.warning("P0305", "later", Source("b", 1, 1))
    sink.error("P0106", "first", Source("a", 2, 1))
    sink.error("P0106", "first", Source("a", 2, 1))
    assert [each.message for each in sink.problems()] == ["first", "later"]
    for line in range(PROBLEMS_MAX * 2):
        sink.error("P0106", "x", Source("c", line, 1))
    assert len(sink.problems()) == PROBLEMS_MAX
    assert sink.dropped == PROBLEMS_MAX + 2
    assert sink.failed


def test_suggestions_are_bounded() -> None:
    sink = Sink()
    assert sink.suggest("timout", ["timeout"]) == 'did you mean "timeout"?'
    for _ in range(PROBLEMS_MAX):
        sink.suggest("timout", ["timeout"])
    assert sink.suggest("timout", ["timeout"]) == ""
    assert suggest("x" * 10_000, ["x"]) == ""


def test_strict_and_json() -> None:
    warning = Problem("P0305", Severity.WARNING, "m", Source("f", 1, 2), 3, "l", "h")
    (error,) = strict([warning])
    assert problem_to_json(error) == {
        "code": "P0305", "severity": "error", "message": "m", "file": "f", "line": 1, "column": 2, "length": 3,
        "label": "l", "help": "h",
    }  # fmt: skip
