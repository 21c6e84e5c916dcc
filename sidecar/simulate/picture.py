"""A result as a picture: success, requests in flight and open breakers over time, as SVG.

For pages in light and dark: colours follow the reader's scheme, and nothing is loaded from elsewhere. Must not know how
a result came about. Invariant: equal results give equal bytes.
"""

from collections.abc import Sequence
from html import escape

from .results import Result
from .scenario import Scenario

WIDTH, LEFT, RIGHT = 760, 76, 20
PANEL, GAP, TOP = 92, 34, 74
_STYLE = """
.t{font:12px system-ui,sans-serif;fill:#24292f}.h{font-weight:600;font-size:13px}.m{fill:#6e7781}
.g{stroke:#d0d7de;stroke-width:1}.o{fill:#bc4c00;opacity:.12}.w{fill:#bc4c00}
.l{fill:none;stroke-width:2;stroke-linejoin:round}.a{opacity:.14}
.c0{stroke:#0969da}.c1{stroke:#8250df}.f0{fill:#0969da}.f1{fill:#8250df}
@media (prefers-color-scheme:dark){.t{fill:#e6edf3}.m{fill:#8d96a0}.g{stroke:#30363d}
.o{fill:#f0883e;opacity:.18}.w{fill:#f0883e}
.c0{stroke:#58a6ff}.c1{stroke:#bc8cff}.f0{fill:#58a6ff}.f1{fill:#bc8cff}}
"""

Values = Sequence[float | None]


def svg_of(scenario: Scenario, results: Sequence[Result]) -> str:
    """One run, or two in two colours."""
    duration_s = scenario.duration_s
    flights = [result.series.in_flight for result in results]
    opened = [result.series.open_breakers for result in results]
    successes = [result.series.success for result in results]
    panels: list[tuple[str, float, float, tuple[str, str], list[Values]]] = [
        ("success", *_shares(successes), list(successes)),
        ("in flight", *_scale(flights), list(flights)),
        ("open breakers", *_scale(opened), list(opened)),
    ]
    height = TOP + len(panels) * (PANEL + GAP) + 14
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(scenario.name)}</title>",
        f"<style>{_STYLE}</style>",
        *_legend(scenario, results),
    ]
    for number, (name, low, top, labels, lines) in enumerate(panels):
        out += _panel(TOP + number * (PANEL + GAP), name, low, top, labels, lines, scenario)
    for tick in range(7):
        at_s = duration_s * tick / 6
        x = _x(at_s / duration_s)
        out.append(f'<text class="t m" x="{x:.1f}" y="{height - 20}" text-anchor="middle">{at_s:g}s</text>')
    return "\n".join([*out, "</svg>", ""])


def _legend(scenario: Scenario, results: Sequence[Result]) -> list[str]:
    out = [f'<text class="t h" x="{LEFT}" y="20">{escape(scenario.name)}</text>']
    x = WIDTH - RIGHT
    if len(results) > 1:
        for number in reversed(range(len(results))):
            name = results[number].policy
            out.append(f'<text class="t f{number}" x="{x}" y="20" text-anchor="end">{escape(name)}</text>')
            x -= 16 + 7 * len(name)
    labels = "; ".join(dict.fromkeys(outage.label for outage in scenario.outages))
    if labels:
        out.append(f'<text class="t w" x="{LEFT}" y="38">{escape(labels[:110])}</text>')
    return out


def _shares(every: Sequence[Values]) -> tuple[float, float, tuple[str, str]]:
    """From a round share under all values to 1: what happens above 90 % should be seen."""
    lowest = min((value for values in every for value in values if value is not None), default=0.0)
    low = next((floor for floor in (0.99, 0.9, 0.5) if lowest > floor), 0.0)
    return low, 1.0, ("100%", f"{low * 100:g}%")


def _scale(every: Sequence[Sequence[float]]) -> tuple[float, float, tuple[str, str]]:
    """From 0 to a round number over all values, and how to say both."""
    highest = max((max(values, default=0) for values in every), default=0)
    step = 1.0
    while True:
        for factor in (1, 2, 5):
            if highest <= step * factor:
                return 0.0, step * factor, (f"{step * factor:g}", "0")
        step *= 10


def _x(portion: float) -> float:
    return LEFT + portion * (WIDTH - LEFT - RIGHT)


def _panel(
    y: int, name: str, low: float, top: float, labels: tuple[str, str], lines: Sequence[Values], scenario: Scenario
) -> list[str]:
    out = [f'<text class="t" x="{LEFT}" y="{y - 7}">{name}</text>']
    for outage in scenario.outages:
        left = _x(min(1.0, outage.at_s / scenario.duration_s))
        right = _x(min(1.0, outage.ends_s / scenario.duration_s))
        out.append(f'<rect class="o" x="{left:.1f}" y="{y}" width="{right - left:.1f}" height="{PANEL}"/>')
    for portion, text in ((1.0, labels[0]), (0.5, ""), (0.0, labels[1])):
        at = y + PANEL * (1 - portion)
        out.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        if text:
            out.append(f'<text class="t m" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    for number, values in enumerate(lines):
        for run in _runs(values):
            points = [
                (_x((index + 0.5) / len(values)), y + PANEL * (1 - (value - low) / (top - low))) for index, value in run
            ]
            path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
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
