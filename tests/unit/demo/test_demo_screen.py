"""The demo's table: it fits, and says what matters."""

import io
from itertools import pairwise

import pytest
from rich.console import Console

from control_plane.demo.figures import Row
from control_plane.demo.screen import COLUMNS, Screen, fitting, table

ROWS = [
    Row("customers", "web", "", 0.913, 0.913, 59.6, 0.021, 0.237, 0.0, "closed"),
    Row("web", "reviews", "all", 1.0, 0.885, 120.0, 0.018, 1.25, 3.7, "half-open"),
    Row("web", "reviews", "v2", 1.0, 0.69, 3.71, None, None, 3.7, "open"),
    Row("orders", "ratings", "", 0.0, None, 15.0, 0.002, 0.005, 0.0, "closed", denied=True),
]


def drawn(width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table(ROWS, width))
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_at_80_columns_everything_is_there() -> None:
    assert drawn(80) == [
        "source    service version effective actual  rate   p50   p99 retries breaker",
        "customers web                 91.3%  91.3%  60/s  21ms 237ms       - closed",
        "web       reviews all          100%  88.5% 120/s  18ms  1.2s   3.7/s half-open",
        "                  v2           100%  69.0% 3.7/s     -     -   3.7/s open",
        "orders    ratings            denied      -  15/s   2ms   5ms       - closed",
    ]


@pytest.mark.parametrize("width", range(40, 121))
def test_it_fits_every_terminal_and_keeps_what_matters(width: int) -> None:
    lines = drawn(width)
    assert len(lines) == len(ROWS) + 1
    assert all(len(line) <= width for line in lines)
    assert "effective" in lines[0]
    assert all("…" not in line for line in lines)


def test_columns_go_in_a_fixed_order() -> None:
    names = [column[0] for column in COLUMNS]
    kept = [fitting(width) for width in range(120, 30, -1)]
    assert kept[0] == names
    for wider, narrower in pairwise(kept):
        assert set(narrower) <= set(wider)


def told(width: int, terminal: bool) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=terminal)
    screen = Screen(console, live=False)
    screen.command("pillion get endpoints reviews")
    screen.output(["SERVICE  ADDRESS          VERSION  HEALTH", "reviews  127.0.0.1:40843  v1       healthy"])
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_what_a_command_says_keeps_its_lines() -> None:
    whole = [
        "$ pillion get endpoints reviews",
        "  SERVICE  ADDRESS          VERSION  HEALTH",
        "  reviews  127.0.0.1:40843  v1       healthy",
    ]
    assert told(80, terminal=True) == whole
    assert told(30, terminal=False) == whole  # nobody has said how wide a file may be
    assert told(30, terminal=True)[-2:] == ["  SERVICE  ADDRESS          V…", "  reviews  127.0.0.1:40843  v…"]
