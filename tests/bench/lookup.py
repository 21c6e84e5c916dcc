"""How long pillion looks for a route, in tables of different sizes: in one process, without a proxy around it.

Run as `python -m tests.bench.lookup ROUTES…`; prints a line of JSON: for each number of routes the microseconds of CPU
of a look-up, and for a table of regular expressions, which must be tried one after another.
"""

import gc
import json
import sys
import time
from collections.abc import Sequence

from sidecar.model.snapshot import Match, ValueMatch
from sidecar.policy.routing import RouteTable

from .policy import BETA_HEADER, BETA_PATH, many_paths

BATCH_S = 0.03
BATCHES = 7
REGEXES = 100
HEADERS = [(b"host", b"reviews"), (b"user-agent", b"bench"), (b"accept", b"*/*"), (b"x-request-id", b"0")]


def table(paths: Sequence[str]) -> RouteTable[int]:
    """The routes of the live rows: one that asks for a path and a header, one for each path, one for the rest."""
    beta = Match(path=f"{BETA_PATH}/**", headers=((BETA_HEADER, ValueMatch("exact", "1")),))
    routes = [beta, *(Match(path=path) for path in paths), Match()]
    return RouteTable((match, number) for number, match in enumerate(routes))


def regexes(count: int) -> RouteTable[int]:
    return RouteTable((Match(path_regex=f"/v[0-9]+/area-{number}/.*"), number) for number in range(count))


def targets(paths: Sequence[str]) -> list[bytes]:
    """The first, the middle and the last of the paths, and one that only the last route takes."""
    some = [paths[0], paths[len(paths) // 2], paths[-1], "/nobody/has/this"]
    return [path.replace("/**", "/reviews/7").encode() + b"?page=2" for path in some]


def cost_us(routes: RouteTable[int], asked: Sequence[bytes]) -> float:
    """The least of some batches: what disturbs a batch only adds to it."""
    found, rounds = routes.find, 100
    best = float("inf")
    for _ in range(BATCHES):
        done, begun = 0, time.process_time()
        while (now := time.process_time()) - begun < BATCH_S:
            for _ in range(rounds):
                for target in asked:
                    found(b"GET", target, HEADERS, None)
            done += rounds * len(asked)
        best = min(best, (now - begun) / done)
    return 1e6 * best


def main(arguments: list[str]) -> None:
    gc.disable()
    found = {}
    for count in map(int, arguments):
        paths = many_paths(count)
        found[str(count)] = cost_us(table(paths), targets(paths))
    found["regex"] = cost_us(regexes(REGEXES), [b"/v1/area-%d/x" % (REGEXES - 1)])
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
