"""`python -m tests.bench.control`: what a control plane costs, and how quickly it tells a mesh what has changed.

A benchmark, never a timed test: a missed bar does not fail. Exit codes: 0 measured; 1 something went wrong, so that
some rows cannot be trusted; 2 something is missing, or wrong usage; 130 interrupted.
"""

import argparse
import json
import os
import platform
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from ..stage import PILLION, BenchError, Stage, Tool
from . import report
from .measures import FULL, QUICK, run
from .plan import CALLED, USED, Plan, Sizes

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "bench-results"
PAGE = ROOT / "docs" / "performance.md"
QUIET_LOAD = 0.3
ETCD = Tool("etcd", "apt-get install --no-install-recommends etcd-server")


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    os.chdir(ROOT)  # the swarm is run as a module
    try:
        if options.source:
            data = json.loads(options.source.read_text())
            columns, facts = report.from_json(data), data["facts"]
        else:
            columns, facts = measure(options)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted; nothing is left running", file=sys.stderr)
        return 130
    about = about_lines(facts)
    print(report.terminal(columns, about))
    if not options.source:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"control-{datetime.now(UTC).strftime('%Y%m%dT%H%M%SZ')}.json"
        path.write_text(json.dumps(report.as_json(columns, facts), indent=1, ensure_ascii=False) + "\n")
        print(f"JSON: {path.relative_to(ROOT)}")
    if options.write_docs:
        PAGE.write_text(report.replace_between_marks(PAGE.read_text(), report.markdown(columns, about)))
        print(f"The tables in {PAGE.relative_to(ROOT)} have been replaced.")
    return 1 if any(column.errors for column in columns) else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.control", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="fewer changes, and no smaller meshes for the slope")
    parser.add_argument("--store", choices=("embedded", "etcd", "both"), default="both")
    parser.add_argument("--sidecars", type=int, default=1000, metavar="N")
    parser.add_argument("--services", type=int, default=1000, metavar="N")
    parser.add_argument("--endpoints", type=int, default=10_000, metavar="N")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="processes of the swarm [2]")
    parser.add_argument("--write-docs", action="store_true", help="replace the tables in docs/performance.md")
    parser.add_argument("--from", dest="source", type=Path, metavar="JSON", help="show an earlier run, measure nothing")
    options = parser.parse_args(arguments)
    try:
        options.sizes = Sizes(options.sidecars, options.services, options.endpoints)
    except ValueError as error:
        parser.error(str(error))
    return options


def measure(options: argparse.Namespace) -> tuple[list[report.Column], dict[str, Any]]:
    stores = ("embedded", "etcd") if options.store == "both" else (options.store,)
    needed = [PILLION, *([ETCD] if "etcd" in stores else [])]
    tools = {tool.name: tool.find() for tool in needed}
    missing = [f"  {tool.name}: {tool.install}" for tool in needed if tools[tool.name] is None]
    if missing:
        raise BenchError("\n".join(["these programs are needed and missing; install them with", *missing]))
    facts = find_facts(options)
    if facts["load_average"] > QUIET_LOAD:
        print(f"bench: {busy_words(facts)}", file=sys.stderr)
    whole: Sizes = options.sizes
    sizes = [whole]
    if not options.quick:
        sizes = [
            Sizes(whole.sidecars // part, max(1, whole.services // part), whole.endpoints // part) for part in (4, 2, 1)
        ]
    begun = time.monotonic()
    columns = []
    for store in stores:
        for size in sizes:
            print(f"{store}, {size.sidecars} sidecars …", file=sys.stderr, flush=True)
            with Stage({name: path for name, path in tools.items() if path}) as stage:
                result = run(stage, Plan(size), store, QUICK if options.quick else FULL, options.processes)
            columns.append(report.Column(store, size.sidecars, result.figures, result.errors, result.notes))
    facts["seconds"] = round(time.monotonic() - begun)
    return columns, facts


def find_facts(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "quick": options.quick,
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "sidecars": options.sidecars,
        "services": options.services,
        "endpoints": options.endpoints,
        "processes": options.processes,
    }


def about_lines(facts: dict[str, Any]) -> list[str]:
    registered = facts["sidecars"]
    lines = [
        f"{facts['date']}, {facts['cores']} cores of {facts['cpu']}, Linux {facts['kernel']}, Python {facts['python']}",
        f"{'quick run, ' if facts['quick'] else ''}in all: {facts['seconds']} s; the largest mesh: {facts['sidecars']} "
        f"sidecars, {facts['services']} services, {facts['endpoints']} endpoints, of which {registered} are registered "
        f"by their sidecars and {facts['endpoints'] - registered} are addresses of the policy; each sidecar uses about "
        f"{USED} services, {CALLED} of them declared under `calls`",
        f"columns: the store, and how many sidecars; smaller meshes have services and endpoints in proportion; "
        f"the swarm is {facts['processes']} processes on the same cores",
    ]
    if facts["load_average"] > QUIET_LOAD:
        lines.append(busy_words(facts))
    return lines


def busy_words(facts: dict[str, Any]) -> str:
    return f"the machine was not quiet (load average {facts['load_average']:.1f} at the start): trust little"


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
