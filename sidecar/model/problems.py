"""What is wrong with a policy: coded, positioned problems, collected all at once, and how they are shown.

Every problem carries a stable code (the table below; docs/policy.md explains each), the place, what to underline and
what to do. Must not know what the values mean. Invariant: a Sink never holds more than PROBLEMS_MAX problems.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from itertools import islice
from typing import Protocol

from .records import record
from .source import Source

PROBLEMS_MAX = 200
"""A hostile file could hold a problem in each of its nodes; what lies beyond is counted, not kept."""

_LINE_CHARS_MAX = 160
_CANDIDATES_MAX = 500
_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_WORD = re.compile(r"[\w./-]+")

CODES: Mapping[str, str] = {
    "P0100": "The file cannot be read.",
    "P0101": "The file is not valid YAML.",
    "P0102": "A YAML feature that policy files do not allow (directive, tag, anchor, alias, merge key, ...).",
    "P0103": "A key stands twice in one map.",
    "P0104": "An unknown key.",
    "P0105": "A value of the wrong type.",
    "P0106": "A malformed value.",
    "P0107": "An unknown version.",
    "P0108": "An unknown service or port.",
    "P0109": "A required key is missing.",
    "P0110": "The weights of a route do not sum to 100.",
    "P0111": "Two settings that contradict each other.",
    "P0112": "A rule that nothing would enforce.",
    "P0113": "A service, `defaults` or `enforced` is defined twice.",
    "P0114": "The policy is too large, too deep, or holds too many nodes.",
    "P0115": "A number outside its range.",
    "P0116": "A name or local port is used twice.",
    "P0117": "Services fall back to each other in a circle.",
    "P0201": "A port's protocol that is not supported yet.",
    "P0212": "`detect_timeout` is not supported yet.",
    "P0301": "A route that can never be reached.",
    "P0302": "The tries together may take longer than `timeout.total`.",
    "P0303": "Retries of requests that are not safe to repeat.",
    "P0305": "A setting that can never act.",
    "P0306": "Retries at more than one hop of a call path.",
    "P0307": "A rule names a service that the policy does not know.",
    "P0308": "A caller's setting that would loosen what the service says.",
    "P0309": "Some endpoints of the service have no sidecar to enforce its rules.",
    "P0310": "Copies of requests that may change something.",
    "P0501": "A scenario names what neither it nor its policy has.",
    "P0502": "Settings of a scenario that contradict each other, or say nothing.",
    "P0503": "A moment of a scenario that is out of order or outside the run.",
    "P0504": "Services of a scenario call each other in a circle.",
    "P0505": "A service of a scenario that serves no requests.",
}


class Severity(Enum):
    ERROR = "error"
    WARNING = "warning"


class Positioned(Protocol):
    """Anything that stands somewhere in a file, such as a node of the YAML tree."""

    @property
    def source(self) -> Source: ...
    @property
    def length(self) -> int: ...


@record(frozen=True, slots=True)
class Problem:
    """`label` stands beside the underline, `help` says what to do; length 0 underlines the word that stands there."""

    code: str
    severity: Severity
    message: str
    source: Source
    length: int = 1
    label: str = ""
    help: str = ""


class Sink:
    """Collects problems; one that was reported already at the same place is not reported again."""

    def __init__(self) -> None:
        self._problems: dict[tuple[str, Source, str], Problem] = {}
        self._suggestions = 0
        self.dropped = 0
        self.failed = False

    def error(self, code: str, message: str, at: Positioned | Source, label: str = "", help: str = "") -> None:
        self.failed = True
        self._add(code, Severity.ERROR, message, at, label, help)

    def warning(self, code: str, message: str, at: Positioned | Source, label: str = "", help: str = "") -> None:
        self._add(code, Severity.WARNING, message, at, label, help)

    def _add(self, code: str, severity: Severity, message: str, at: Positioned | Source, label: str, help: str) -> None:
        assert code in CODES, code
        source, length = (at, 0) if isinstance(at, Source) else (at.source, at.length)
        key = (code, source, message)
        if key in self._problems:
            return
        if len(self._problems) >= PROBLEMS_MAX:
            self.dropped += 1
            return
        self._problems[key] = Problem(code, severity, message, source, length, label, help)

    def suggest(self, word: str, known: Iterable[str]) -> str:
        """As the function `suggest`, while it is worth its time: a hostile file could ask for millions."""
        self._suggestions += 1
        return suggest(word, known) if self._suggestions <= PROBLEMS_MAX else ""

    def problems(self) -> tuple[Problem, ...]:
        """In the order of the files."""
        return tuple(sorted(self._problems.values(), key=lambda problem: (problem.source, problem.code)))


def strict(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """The same problems with every warning an error."""
    return tuple(replace(problem, severity=Severity.ERROR) for problem in problems)


def problem_to_json(problem: Problem) -> dict[str, object]:
    return {
        "code": problem.code,
        "severity": problem.severity.value,
        "message": problem.message,
        "file": problem.source.file,
        "line": problem.source.line,
        "column": problem.source.column,
        "length": problem.length,
        "label": problem.label,
        "help": problem.help,
    }


def one_line(text: str) -> str:
    """A text from a file, made safe to show on a terminal."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


def clip(text: str, chars_max: int = 60) -> str:
    """A value as a message quotes it."""
    text = one_line(text.replace("\n", " "))
    return text if len(text) <= chars_max else text[: chars_max - 3] + "..."


def suggest(word: str, known: Iterable[str]) -> str:
    """'did you mean "…"?', or nothing where no known word is near."""
    import difflib  # only when something is wrong

    if len(word) > 80:
        return ""
    candidates = [each for each in islice(known, _CANDIDATES_MAX) if len(each) <= 80]
    near = difflib.get_close_matches(word.lower(), candidates, n=1, cutoff=0.5)
    return f'did you mean "{near[0]}"?' if near else ""


def render(problems: Sequence[Problem], texts: Mapping[str, str], color: bool = False) -> str:
    """Every problem with its line, as a compiler shows it; ends with a line break unless there is nothing to show."""
    lines: dict[str, list[str]] = {}
    blocks = []
    for problem in problems:
        file = problem.source.file
        if file not in lines:
            lines[file] = texts.get(file, "").split("\n")
        blocks.append(_render_one(problem, lines[file], color))
    return "\n".join(blocks)


def _render_one(problem: Problem, lines: Sequence[str], color: bool) -> str:
    def paint(text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if color else text

    accent = "1;31" if problem.severity is Severity.ERROR else "1;33"
    source = problem.source
    head = paint(f"{problem.severity.value}[{problem.code}]", accent)
    out = [f"{head}: {paint(one_line(problem.message), '1')}"]
    number = str(source.line)
    gutter = " " * len(number)
    has_line = 1 <= source.line <= len(lines)
    if source.file:
        place = f"{source.file}:{source.line}:{source.column}" if source.line else source.file
        out.append(f"{gutter}{paint('-->', '1;34')} {one_line(place)}")
    if has_line:
        line, column, length = _window(one_line(lines[source.line - 1]), source.column, problem.length)
        # Tabs are copied so that the underline stands below its text however wide the terminal makes them.
        indent = "".join("\t" if char == "\t" else " " for char in line[: column - 1])
        mark = paint("^" * length + (f" {one_line(problem.label)}" if problem.label else ""), accent)
        out.append(f"{paint(f'{number} |', '1;34')} {line}".rstrip())
        out.append(f"{paint(f'{gutter} |', '1;34')} {indent}{mark}")
    elif problem.label:
        out.append(f"{gutter} {paint('|', '1;34')} {one_line(problem.label)}")
    if problem.help:
        out.append(f"{gutter} {paint('=', '1;34')} help: {one_line(problem.help)}")
    return "\n".join(out) + "\n"


def _window(line: str, column: int, length: int) -> tuple[str, int, int]:
    """The part of a long line that holds the place, with the place's column in it and the length of its underline."""
    column = max(1, min(column, len(line) + 1))
    if not length:
        word = _WORD.match(line, column - 1)
        length = word.end() - word.start() if word else 1
    start = 0
    if len(line) > _LINE_CHARS_MAX and column > _LINE_CHARS_MAX // 2:
        start = column - 1 - _LINE_CHARS_MAX // 2
    part = line[start : start + _LINE_CHARS_MAX]
    column -= start
    if start:
        part = "..." + part[3:]
    if start + _LINE_CHARS_MAX < len(line):
        part = part[:-3] + "..."
    return part, column, max(1, min(length, len(part) - column + 1))
