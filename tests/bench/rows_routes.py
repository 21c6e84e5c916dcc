"""Whether it matters how many routes a service has: look-ups alone, and requests through one plain hop."""

import json
import subprocess
import sys
from dataclasses import replace

from . import load, policy
from .context import Context, Starts, in_turn
from .stage import BenchError
from .table import OURS, Bar, Group, Row

COUNTS = (10, 100, 1000, 10_000)
ENDS = (COUNTS[0], COUNTS[-1])
CONNECTIONS = 32
FLAT = 1.25  # more than what a larger table costs by falling out of the processor's caches
LIMIT_S = 120


def routes(context: Context) -> list[Group]:
    groups = []
    if context.wants("routes.lookup"):
        groups.append(_lookups(context))
    if context.wants("routes.live"):
        groups.append(_live(context))
    return groups


def _routes(count: int) -> str:
    return f"{count:,} routes".replace(",", "\N{NO-BREAK SPACE}")


def _lookups(context: Context) -> Group:
    rows = {str(count): Row(f"routes.lookup.{count}", f"a look-up, {_routes(count)}", "µs", 2) for count in COUNTS}
    rows["regex"] = Row("routes.lookup.regex", "a look-up, 100 routes that are regular expressions", "µs", 2)
    flat = Row("routes.lookup.flat", f"{_routes(ENDS[1])} ÷ {ENDS[0]}", "", 2, bars=(Bar(FLAT),))
    for number in range(context.pace.rounds):
        try:
            found = _lookup()
        except load.MISHAPS as error:
            context.failed([*rows.values(), flat], OURS, error)
            continue
        for key, row in rows.items():
            row.add(OURS, found[key])
        flat.add(OURS, found[str(ENDS[1])] / found[str(ENDS[0])])
        context.say(f"routes.lookup round {number + 1}: {', '.join(f'{key}: {found[key]:.2f} µs' for key in rows)}")
    note = "In one process, without a proxy: the first, the middle and the last path, and one that no route names. \
Half of the routes are exact paths, half have all below a path. Regular expressions are tried one after another."
    return Group("Look-up of a route", [*rows.values(), flat], note)


def _lookup() -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.lookup", *map(str, COUNTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    if done.returncode:
        raise BenchError(f"the look-ups failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _live(context: Context) -> Group:
    backend, pace = context.backend, context.pace
    rows = {
        count: Row(f"routes.live.{count}", f"CPU a request, {_routes(count)}", "µs", rivals=("Envoy",))
        for count in ENDS
    }
    flat = Row("routes.live.flat", f"{_routes(ENDS[1])} ÷ {ENDS[0]}", "", 2, bars=(Bar(FLAT),))
    starts: Starts = {}
    for count in ENDS:
        some = context.hops((OURS, "Envoy"), backend.port, policy.many_paths(count))
        starts |= {f"{name} {count}": start for name, start in some.items()}
    with context.together(starts, []) as targets:
        for number in range(pace.rounds):
            found: dict[str, float] = {}
            for each in in_turn(list(targets), number):
                name, _, count = each.rpartition(" ")
                row = rows[int(count)]
                asked = policy.many_paths(int(count))[-1].replace("/**", "/reviews/7")
                try:
                    target = replace(targets[each], path=asked)
                    window = load.closed_loop(context.stage, target, backend, CONNECTIONS, pace.warm_s, pace.window_s)
                except load.MISHAPS as error:
                    context.failed([row], name, error)
                    continue
                found[each] = window.cpu_us_per_request
                row.add(name, window.cpu_us_per_request, window.errors)
                context.say(f"{row.key} round {number + 1}: {name} {window.cpu_us_per_request:.1f} µs")
            for name in (OURS, "Envoy"):
                few, many = (found.get(f"{name} {count}") for count in ENDS)
                if few and many:
                    flat.add(name, many / few)
    note = f"One plain hop, {CONNECTIONS} connections that ask for the last path."
    return Group("Requests among many routes", [*rows.values(), flat], note)
