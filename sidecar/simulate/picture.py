"""A result as a picture: what the scenario asks to see of it, over time, as SVG.

For pages in light and dark: colours follow the reader's scheme, and nothing is loaded from elsewhere. Must not know how
a result came about. Invariant: equal results give equal bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from .results import Result
from .scenario import Scenario

WIDTH, LEFT, RIGHT = 760, 76, 20
PANEL, GAP, TOP = 92, 34, 74
LABEL_MAX = 95
NAMED_MAX = 8
"""Lines of one panel that have a name and a colour of their own."""
_LIGHT = ("0969da", "8250df", "1a7f37", "bc4c00", "bf3989", "9a6700", "0a7ea4", "cf222e")
_DARK = ("58a6ff", "bc8cff", "3fb950", "f0883e", "f778ba", "d29922", "39c5cf", "ff7b72")


def _colours(every: Sequence[str]) -> str:
    return "".join(f".c{n}{{stroke:#{each}}}.f{n}{{fill:#{each}}}" for n, each in enumerate(every))


_STYLE = f"""
.t{{font:12px system-ui,sans-serif;fill:#24292f}}.h{{font-weight:600;font-size:13px}}.m{{fill:#6e7781}}
.g{{stroke:#d0d7de;stroke-width:1}}.o{{fill:#bc4c00;opacity:.12}}.w{{fill:#bc4c00}}
.l{{fill:none;stroke-width:2;stroke-linejoin:round}}.a{{opacity:.14}}.c8{{stroke:#8c959f}}.f8{{fill:#8c959f}}
{_colours(_LIGHT)}
@media (prefers-color-scheme:dark){{.t{{fill:#e6edf3}}.m{{fill:#8d96a0}}.g{{stroke:#30363d}}
.o{{fill:#f0883e;opacity:.18}}.w{{fill:#f0883e}}
{_colours(_DARK)}}}
"""

Values = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Panel:
    """One diagram. `labels` name the top and the bottom; `names` the lines, where they are not the runs."""

    title: str
    low: float
    top: float
    labels: tuple[str, str]
    lines: Sequence[Values]
    names: tuple[str, ...] = ()


def svg_of(scenario: Scenario, results: Sequence[Result]) -> str:
    """One run, or two in two colours."""
    duration_s = scenario.duration_s
    panels = [panel for name in scenario.picture for panel in _panels(name, results)]
    height = TOP + len(panels) * (PANEL + GAP) + 14
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(scenario.name)}</title>",
        f"<style>{_STYLE}</style>",
        *_legend(scenario, results),
    ]
    for number, panel in enumerate(panels):
        out += _draw(TOP + number * (PANEL + GAP), panel, scenario)
    for tick in range(7):
        at_s = duration_s * tick / 6
        x = _x(at_s / duration_s)
        out.append(f'<text class="t m" x="{x:.1f}" y="{height - 20}" text-anchor="middle">{at_s:g}s</text>')
    return "\n".join([*out, "</svg>", ""])


def _legend(scenario: Scenario, results: Sequence[Result]) -> list[str]:
    out = [f'<text class="t h" x="{LEFT}" y="20">{escape(scenario.name)}</text>']
    if len(results) > 1:
        out += _names(20, [result.policy for result in results])
    labels = "; ".join(dict.fromkeys(outage.label for outage in scenario.outages))
    if labels:
        shown = labels if len(labels) <= LABEL_MAX else labels[:LABEL_MAX] + "…"
        out.append(f'<text class="t w" x="{LEFT}" y="38">{escape(shown)}</text>')
    return out


def _names(y: int, names: Sequence[str]) -> list[str]:
    """What each colour stands for, to the right."""
    out = []
    x = WIDTH - RIGHT
    for number in reversed(range(min(len(names), NAMED_MAX))):
        out.append(f'<text class="t f{number}" x="{x}" y="{y}" text-anchor="end">{escape(names[number])}</text>')
        x -= 16 + 7 * len(names[number])
    return out


def _panels(name: str, results: Sequence[Result]) -> Iterator[Panel]:
    """What one word of `picture` asks for: a line for each run, or a diagram for each run."""
    every = [result.series for result in results]
    if name == "success":
        shares = [series.success for series in every]
        yield Panel("success", *_shares(shares), shares)
    elif name in ("p50", "p99"):
        times = [series.p50_s if name == "p50" else series.p99_s for series in every]
        scaled = [[None if value is None else value * 1000.0 for value in values] for values in times]
        yield Panel(f"{name}, ms", *_scale(scaled), scaled)
    elif name in ("groups", "endpoints"):
        parts = [_rates_by_name(result, name) for result in results]
        low, top, labels = _scale([line for part in parts for line in part.values()])
        for result, part in zip(results, parts, strict=True):
            title = f"attempts/s, {result.policy}" if len(results) > 1 else "attempts/s"
            yield Panel(title, low, top, labels, list(part.values()), tuple(part))
    elif name in ("requests", "attempts", "retries"):
        rates = [[value / result.width_s for value in getattr(result.series, name)] for result in results]
        yield Panel(f"{name}/s", *_scale(rates), rates)
    else:
        values = [getattr(series, name.replace("-", "_")) for series in every]
        yield Panel(name.replace("-", " "), *_scale(values), values)


def _rates_by_name(result: Result, name: str) -> dict[str, list[float | None]]:
    by_name = result.series.groups if name == "groups" else result.series.endpoints
    return {each: [value / result.width_s for value in values] for each, values in by_name}


def _shares(every: Sequence[Values]) -> tuple[float, float, tuple[str, str]]:
    """From a round share under all values to 1: what happens above 90 % should be seen."""
    lowest = min((value for values in every for value in values if value is not None), default=0.0)
    low = next((floor for floor in (0.99, 0.9, 0.5) if lowest > floor), 0.0)
    return low, 1.0, ("100%", f"{low * 100:g}%")


def _scale(every: Sequence[Values]) -> tuple[float, float, tuple[str, str]]:
    """From 0 to a round number over all values, and how to say both."""
    highest = max((value for values in every for value in values if value is not None), default=0.0)
    step = 1.0
    while True:
        for factor in (1, 2, 3, 4, 5, 6, 8):
            if highest <= step * factor:
                return 0.0, step * factor, (f"{int(step * factor)}", "0")
        step *= 10


def _x(portion: float) -> float:
    return LEFT + portion * (WIDTH - LEFT - RIGHT)


def _draw(y: int, panel: Panel, scenario: Scenario) -> list[str]:
    low, top, labels = panel.low, panel.top, panel.labels
    out = [f'<text class="t" x="{LEFT}" y="{y - 7}">{escape(panel.title)}</text>', *_names(y - 7, panel.names)]
    for outage in scenario.outages:
        left = _x(min(1.0, outage.at_s / scenario.duration_s))
        right = _x(min(1.0, outage.ends_s / scenario.duration_s))
        out.append(f'<rect class="o" x="{left:.1f}" y="{y}" width="{right - left:.1f}" height="{PANEL}"/>')
    for portion, text in ((1.0, labels[0]), (0.5, ""), (0.0, labels[1])):
        at = y + PANEL * (1 - portion)
        out.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        if text:
            out.append(f'<text class="t m" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    for number, values in enumerate(panel.lines):
        number = min(number, NAMED_MAX)
        for run in _runs(values):
            points = [
                (_x((index + 0.5) / len(values)), y + PANEL * (1 - (value - low) / (top - low))) for index, value in run
            ]
            path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
            if len(panel.lines) <= 2:
                floor = f"L{points[-1][0]:.1f} {y + PANEL}L{points[0][0]:.1f} {y + PANEL}Z"
                out.append(f'<path class="a f{number}" d="{path}{floor}"/>')
            out.append(f'<path class="l c{number}" d="{path}"/>')
    return out


def _runs(values: Values) -> list[list[tuple[int, float]]]:
    """The stretches in which there are values."""
    runs: list[list[tuple[int, float]]] = [[]]
    for index, value in enumerate(values):
        if value is not None:
            runs[-1].append((index, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
