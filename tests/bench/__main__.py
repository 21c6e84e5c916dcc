"""`python -m tests.bench`: measure pillion and its peers side by side, and say where it falls short.

A benchmark, never a timed test: a missed bar does not fail. Exit codes: 0 measured; 1 requests failed, so that some
rows cannot be trusted; 2 something is missing, or wrong usage; 130 interrupted.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from . import backends, contenders, table
from .context import FULL, QUICK, Context, Pace
from .rows import SECTIONS
from .stage import BenchError, Stage, find_tools

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench-results"
PAGE = ROOT / "docs" / "performance.md"
QUIET_LOAD = 0.3
NAMES = {"envoy": "Envoy", "haproxy": "HAProxy", "caddy": "Caddy", "mitmdump": "mitmproxy"}
VERSIONS = {
    "pillion": ["--version"],
    "envoy": ["--version"],
    "haproxy": ["-v"],
    "nginx": ["-v"],
    "wrk": ["--version"],
    "h2load": ["--version"],
    "caddy": ["version"],
    "mitmdump": ["--version"],
}


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    os.chdir(ROOT)  # the helpers are run as modules
    try:
        if options.source:
            data = json.loads(options.source.read_text())
            groups, facts = table.from_json(data), data["facts"]
        else:
            groups, facts = measure(options)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted; nothing is left running", file=sys.stderr)
        return 130
    about = about_lines(facts)
    print(table.terminal(groups, about))
    if not options.source:
        print(f"JSON: {save(table.as_json(groups, facts))}")
    if options.write_docs:
        PAGE.write_text(table.replace_between_marks(PAGE.read_text(), table.markdown(groups, about)))
        print(f"The tables in {PAGE.relative_to(ROOT)} have been replaced.")
    return 1 if any(row.errors for group in groups for row in group.rows) else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under 10 minutes, for a first look")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds of everything [5; quick: 2]")
    parser.add_argument(
        "--rows",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help=f"only these sections or rows of them, such as mesh-cpu.32. Sections: {', '.join(SECTIONS)}",
    )
    parser.add_argument("--write-docs", action="store_true", help="replace the tables in docs/performance.md")
    parser.add_argument("--from", dest="source", type=Path, metavar="JSON", help="show an earlier run, measure nothing")
    options = parser.parse_args(arguments)
    for key in options.rows:
        if key.partition(".")[0] not in SECTIONS:
            parser.error(f"--rows {key}: there is no such section; there are {', '.join(SECTIONS)}")
    if options.rows and options.write_docs:
        parser.error("--write-docs with --rows would drop the tables of all other rows; leave one of them out")
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def measure(options: argparse.Namespace) -> tuple[list[table.Group], dict[str, Any]]:
    pace: Pace = QUICK if options.quick else FULL
    if options.rounds:
        pace = pace.with_rounds(options.rounds)
    tools = find_tools()
    facts = {"command": command_line(options), **find_facts(tools, pace, quick=options.quick)}
    if facts["load_average"] > QUIET_LOAD:
        print(f"bench: {busy_words(facts)}", file=sys.stderr)
    begun = time.monotonic()
    groups: list[table.Group] = []
    with Stage(tools) as stage:
        identities = contenders.Identities.make(stage.directory / "identities")
        context = Context(stage, backends.backend(stage), identities, pace, tuple(options.rows))
        for name, section in SECTIONS.items():
            if context.wants(name):
                print(f"{name} …", file=sys.stderr, flush=True)
                for group in section(context):
                    group.rows = [row for row in group.rows if context.wants(row.key)]
                    groups += [group] if group.rows else []
        facts["trouble"] = context.trouble
        facts["skipped"] = context.skipped
    facts["seconds"] = round(time.monotonic() - begun)
    if not any(row.series for group in groups for row in group.rows):
        raise BenchError(f"--rows {' '.join(options.rows)}: no such row, or nothing of it could be measured")
    return groups, facts


def find_facts(tools: dict[str, str], pace: Pace, *, quick: bool) -> dict[str, Any]:
    """What the figures depend on."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "quick": quick,
        "rounds": pace.rounds,
        "window_s": pace.window_s,
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "versions": {name: version_of(tools[name], flags) for name, flags in VERSIONS.items() if name in tools},
    }


def version_of(program: str, flags: list[str]) -> str:
    """The first thing in what a program prints that looks like a version."""
    done = subprocess.run([program, *flags], capture_output=True, text=True, check=False, timeout=20)
    words = (done.stdout + done.stderr).replace("/", " ").replace(",", " ").split()
    found = (word for word in words if word.lstrip("v")[:1].isdigit() and word.count(".") >= 2)
    return next(found, words[-1] if words else "?").lstrip("v")


def about_lines(facts: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{NAMES.get(name, name)} {found}" for name, found in facts["versions"].items())
    lines = [
        f"made by `{facts.get('command', 'make bench')}`",
        f"{facts['date']}, {facts['cores']} cores of {facts['cpu']}, Linux {facts['kernel']}, "
        f"Python {facts['python']}, {versions}",
        f"{'quick run, ' if facts['quick'] else ''}rounds: {facts['rounds']}, windows: {facts['window_s']:g} s, "
        f"in all: {facts['seconds']} s; cells: median (smallest{table.TO}greatest); ratios are taken within each round",
    ]
    if facts["load_average"] > QUIET_LOAD:
        lines.append(busy_words(facts))
    lines += [f"not measured: {what} (install: {how})" for what, how in facts.get("skipped", {}).items()]
    return lines


def command_line(options: argparse.Namespace) -> str:
    """The command that makes these figures."""
    words = [
        *(["--quick"] if options.quick else []),
        *(["--rounds", str(options.rounds)] if options.rounds else []),
        *(["--rows", *options.rows] if options.rows else []),
    ]
    return f'make bench ARGS="{" ".join(words)}"' if words else "make bench"


def busy_words(facts: dict[str, Any]) -> str:
    return f"the machine was not quiet (load average {facts['load_average']:.1f} at the start): trust ratios only"


def save(data: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{datetime.now(UTC).strftime('%Y%m%dT%H%M%SZ')}.json"
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    return path.relative_to(ROOT)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
