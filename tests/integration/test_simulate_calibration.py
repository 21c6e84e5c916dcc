"""The simulator against the real thing: one scenario, rehearsed and then played on sockets.

A real sidecar calls two Python servers that fail now and then, one of them most of the time for a while. What callers
get, what the servers receive and how often breakers open must agree within the tolerances below: four times what chance
alone does to a run of this length (standard deviations 0.015, 0.003 and 1.1 over two hundred seeds), and a little for
real time.
"""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.mesh import Backend, Closed, Conn, Mesh

from sidecar.simulate.engine import Engine
from sidecar.simulate.reading import read_text
from sidecar.simulate.results import result_of

RATE, DURATION_S = 120, 8.0
ERRS_FROM_S, ERRS_FOR_S = 2.0, 4.0
WORK_S = 0.005
ERRS, ERRS_BADLY = 0.1, 0.75
THREADS = 12
SUCCESS_TOLERANCE = 0.06
AMPLIFICATION_TOLERANCE = 0.015
OPENINGS_TOLERANCE = 5  # of fifteen
SEEDS = range(1, 21)

SCENARIO = """
version: 1
policy:
  version: 1
  services:
    web: {{}}
    reviews:
      address: ["{well}", "{ill}"]
      tls: plain
      balance: {{policy: round-robin}}
      timeout: {{total: 2s, try: 1s}}
      retry: {{max_retries: 1, when: [connect-error, 503], base: 5ms, budget: {{percent: 6%, min_per_second: 0}}}}
      circuit_breaker: {{consecutive_failures: 4, open_for: 100ms, max_open: 200ms}}
services:
  web: {{}}
  reviews: {{latency: {work_ms}ms, errors: {{rate: {errs}%, statuses: [503]}}}}
load: [{{from: web, to: reviews, rate: {rate}, arrivals: even}}]
duration: {duration}s
outages:
  - {{at: {at}s, for: {lasts}s, service: reviews, endpoint: "{ill}", errors: {{rate: {errs_badly}%, statuses: [503]}}}}
"""


def rehearse(text: str) -> tuple[float, float, float]:
    """Success, amplification and openings, on average over some seeds."""
    found = read_text(text, "scenario.yaml")
    assert found.scenario is not None and found.snapshot is not None, found.problems
    success = amplification = openings = 0.0
    for seed in SEEDS:
        engine = Engine(found.scenario, found.snapshot, seed, 1_000_000, 8)
        engine.run()
        result = result_of(engine, "inline")
        success += result.edges[0].effective
        amplification += result.worst_amplification
        openings += result.openings
    count = len(SEEDS)
    return success / count, amplification / count, openings / count


def application(errs: Callable[[], bool]) -> Callable[[Conn], None]:
    def script(conn: Conn) -> None:
        while True:
            conn.take()
            failed = errs()
            time.sleep(WORK_S)
            conn.reply(503 if failed else 200)

    return script


def play(mesh: Mesh, document: str, began: list[float]) -> tuple[int, int, float]:
    """The same load on sockets: requests, how many of them went well, openings."""
    import yaml

    policy = yaml.safe_load(document)["policy"]["services"]
    web = mesh.sidecar("web", policy, inbound=False)
    total = int(RATE * DURATION_S)
    turn, statuses = iter(range(total)), []
    lock = threading.Lock()
    began[0] = time.monotonic() + 0.2

    def caller() -> None:
        with web.client() as client:
            while True:
                with lock:
                    number = next(turn, None)
                if number is None:
                    return
                time.sleep(max(0.0, began[0] + (number + 0.5) / RATE - time.monotonic()))
                try:
                    status = client.get("/").status
                except (Closed, OSError):
                    status = 0
                statuses.append(status)

    threads = [threading.Thread(target=caller, daemon=True) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert len(statuses) == total and 0 not in statuses
    return total, statuses.count(200), web.metric("pillion_breaker_openings_total")


def test_a_rehearsal_says_what_the_sidecar_does(tmp_path: Path) -> None:
    began = [0.0]
    rnd = random.Random(1)

    def errs_badly() -> bool:
        at_s = time.monotonic() - began[0]
        return rnd.random() < (ERRS_BADLY if ERRS_FROM_S <= at_s < ERRS_FROM_S + ERRS_FOR_S else ERRS)

    with Mesh(tmp_path) as mesh:
        well: Backend = mesh.backend(application(lambda: rnd.random() < ERRS))
        ill: Backend = mesh.backend(application(errs_badly))
        text = SCENARIO.format(
            well=well,
            ill=ill,
            work_ms=WORK_S * 1000,
            rate=RATE,
            duration=DURATION_S,
            at=ERRS_FROM_S,
            lasts=ERRS_FOR_S,
            errs=ERRS * 100,
            errs_badly=ERRS_BADLY * 100,
        )
        total, good, openings = play(mesh, text, began)
        attempts = len(well.complete) + len(ill.complete)
    success, amplification, expected_openings = rehearse(text)
    rehearsed = f"rehearsed {success:.4f} {amplification:.4f} {expected_openings:.1f}"
    told = f"{rehearsed}; real {good / total:.4f} {attempts / total:.4f} {openings:.0f}"
    assert good / total == pytest.approx(success, abs=SUCCESS_TOLERANCE), told
    assert attempts / total == pytest.approx(amplification, abs=AMPLIFICATION_TOLERANCE), told
    assert openings == pytest.approx(expected_openings, abs=OPENINGS_TOLERANCE), told
    assert success < 0.97 and amplification > 1.03 and expected_openings > 10.0, told  # there is something to agree on
    print(told)
