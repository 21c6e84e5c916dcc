"""The measurements: what is done to a mesh of simulated sidecars, and what is read from clocks and accounts meanwhile.

One `run` is one store and one size, in the order of a mesh's life: founded, joined, connected, left alone, changed, cut
off, killed. Must not know how results are shown. Invariant: a latency that somebody's missing answer would flatter is
not reported: whoever does not answer is an error of that row.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..stage import BenchError, Stage
from ..stats import percentile
from .plan import Plan
from .plant import Answered, ControlPlane, Operator, Swarm, start_control_plane

SETTLE_S = 2.0
JOINS_AT_A_TIME = 16  # in each process of the swarm
TOKENS_TTL_S = 6 * 3600
LOG_LINES = 12


@dataclass(frozen=True, slots=True)
class Pace:
    changes: int  # of each kind
    applies: int
    applies_to_all: int
    flaps: int
    idle_s: float


QUICK = Pace(changes=20, applies=10, applies_to_all=3, flaps=5, idle_s=15.0)
FULL = Pace(changes=100, applies=40, applies_to_all=10, flaps=20, idle_s=30.0)


@dataclass(slots=True)
class Result:
    """Figures by the key of their row; what went wrong, by the same."""

    figures: dict[str, float] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def failed(self, key: str, what: str) -> None:
        self.errors.setdefault(key, []).append(what[:300])


@dataclass(slots=True)
class Bench:
    """A mesh that lives, and where its figures go."""

    plan: Plan
    pace: Pace
    control_plane: ControlPlane
    operator: Operator
    swarm: Swarm
    result: Result

    def put(self, key: str, value: float) -> None:
        self.result.figures[key] = value

    def spread(self, key: str, seconds: Sequence[float]) -> None:
        """p50 and p99 of latencies, in milliseconds."""
        if seconds:
            self.put(f"{key}.p50", 1e3 * percentile(seconds, 50))
            self.put(f"{key}.p99", 1e3 * percentile(seconds, 99))

    @contextmanager
    def accounts(self, key: str) -> Iterator[None]:
        """CPU seconds of the control plane, its store and the swarm meanwhile."""
        own, store, swarm = self.control_plane.cpu_s(), self.control_plane.store_cpu_s(), self.swarm.count()["cpu_s"]
        yield
        self.put(f"{key}.cpu", self.control_plane.cpu_s() - own)
        self.put(f"{key}.store-cpu", self.control_plane.store_cpu_s() - store)
        self.put(f"{key}.swarm-cpu", self.swarm.count()["cpu_s"] - swarm)

    def note_trouble(self) -> None:
        """What the swarm met with since this was last asked."""
        self.result.notes += [f"{number} times {what}" for what, number in self.swarm.trouble().items()]
        self.swarm.ask("forget")

    def judge(self, key: str, answered: Answered, since: float, into: list[float]) -> None:
        if answered.missing:
            self.result.failed(key, f"{len(answered.missing)} sidecars have not answered: {answered.missing[:5]}")
        elif answered.times:
            into.append(answered.last - since)


def run(stage: Stage, plan: Plan, store: str, pace: Pace, processes: int) -> Result:
    control_plane = start_control_plane(stage, store)
    swarm = Swarm(stage, plan, control_plane, processes)
    result = Result()
    bench = Bench(plan, pace, control_plane, control_plane.operator(), swarm, result)
    bench.put("start", control_plane.started_s)
    for name, measure in MEASURES.items():
        print(f"  {name} …", file=sys.stderr, flush=True)
        try:
            measure(bench)
        except (BenchError, OSError) as error:
            result.failed(name, str(error))
            print(f"  {name}: {error}", file=sys.stderr)
            if name in NEEDED:
                break
    bench.note_trouble()
    if said := control_plane.process.log.read_text(errors="replace").strip():
        lines = said.splitlines()
        print(f"  the control plane has said {len(lines)} lines, the last of them:", file=sys.stderr)
        print("\n".join(f"    {line[:300]}" for line in lines[-LOG_LINES:]), file=sys.stderr)
    stage.end(list(stage.processes))
    return result


# -- a mesh comes to be


def found(bench: Bench) -> None:
    """The whole policy in one apply, and a token for each service."""
    begun = time.monotonic()
    bench.operator.apply(bench.plan.files())
    bench.put("found.apply", time.monotonic() - begun)


def join(bench: Bench) -> None:
    plan = bench.plan
    begun = time.monotonic()
    tokens = [
        bench.operator.ask(
            "POST", "/v1/tokens", {"kind": "join", "service": plan.name(each), "uses": None, "ttl_s": TOKENS_TTL_S}
        )["token"]
        for each in range(plan.sizes.services)
    ]
    bench.put("tokens.rate", len(tokens) / (time.monotonic() - begun))
    with bench.accounts("join"):
        begun = time.monotonic()
        found = bench.swarm.ask("join", tokens=tokens, parallel=JOINS_AT_A_TIME, within_s=600.0)
        seconds = time.monotonic() - begun
    failed = {what: number for each in found for what, number in each["failed"].items()}
    if failed:
        raise BenchError(f"joins failed: {failed}")
    bench.put("join.rate", plan.sizes.sidecars / seconds)
    bench.spread("join", [one for each in found for one in each["took"]])
    bench.put("join.cpu-each", 1e3 * bench.result.figures["join.cpu"] / plan.sizes.sidecars)


def connect(bench: Bench) -> None:
    """All at once, holding nothing: each is sent everything that it uses."""
    before = bench.swarm.count()
    with bench.accounts("connect"):
        begun = time.monotonic()
        bench.swarm.ask("connect")
        _, last = bench.swarm.synced()
    bench.put("connect", last - begun)
    after = bench.swarm.count()
    bench.put("connect.bytes", (after["push_bytes"] - before["push_bytes"]) / bench.plan.sizes.sidecars / 1e3)


def register(bench: Bench) -> None:
    """All at once: until all know of all."""
    with bench.accounts("register"):
        begun = time.monotonic()
        for each in bench.swarm.ask("register"):
            if each["failed"]:
                raise BenchError(f"registrations failed: {each['failed']}")
        _, last = bench.swarm.synced()
    bench.put("register", last - begun)


def idle(bench: Bench) -> None:
    time.sleep(SETTLE_S)
    before = bench.swarm.count()
    with bench.accounts("idle"):
        begun = time.monotonic()
        time.sleep(bench.pace.idle_s)
        seconds = time.monotonic() - begun
    after = bench.swarm.count()
    for key in ("cpu", "store-cpu", "swarm-cpu"):
        bench.put(f"idle.{key}", 100 * bench.result.figures[f"idle.{key}"] / seconds)
    bench.put("idle.heartbeats", (after["heartbeats"] - before["heartbeats"]) / seconds)
    bench.put("memory", bench.control_plane.process.memory().resident / 1e6)
    if after["pushes"] != before["pushes"]:
        bench.result.failed("idle", f"{after['pushes'] - before['pushes']:g} pushes although nothing changed")


# -- changes


def endpoint_changes(bench: Bench) -> None:
    """A registration goes, comes back, turns unhealthy, and healthy again: until the last of its users has answered."""
    plan = bench.plan
    ordinary = list(plan.ordinary())
    steps = (("withdraw", "absent"), ("register", "up"), ("unhealthy", "down"), ("healthy", "up"))
    took: dict[str, list[float]] = {what: [] for what, _ in steps}
    with bench.accounts("changes"):
        for turn in range(bench.pace.changes):
            service = ordinary[turn * 7 % len(ordinary)]
            sidecar = plan.providers(service)[0]
            for what, state in steps:
                done = bench.swarm.watch(
                    f"endpoints/{plan.name(service)}", plan.users[service], plan.address_of(sidecar), state
                )
                change = bench.swarm.change(sidecar, what)
                bench.judge(f"change.{what}", done(), change["at"], took[what])
                if what == "withdraw" and not acknowledged(change):
                    bench.result.failed("change.withdraw", "the control plane did not say that all have acknowledged")
    for what, seconds in took.items():
        bench.spread(f"change.{what}", seconds)
    everything = [one for each in took.values() for one in each]
    bench.spread("change", everything)
    if everything:
        bench.put("changes.cpu-each", 1e3 * bench.result.figures["changes.cpu"] / len(everything))


def acknowledged(withdrawal: dict[str, Any]) -> bool:
    """Whether the control plane says that all who held the endpoint know that it has gone."""
    return bool(json.loads(withdrawal["body"])["acknowledged"])


def flaps(bench: Bench) -> None:
    """What one endpoint that flaps costs in bytes, by how many use its service."""
    plan = bench.plan
    named = {"ordinary": next(plan.ordinary()), "tenth": 1, "all": 2}
    for name, service in named.items():
        if service >= plan.sizes.services:
            continue
        sidecar = plan.providers(service)[0]
        before = bench.swarm.count()
        took: list[float] = []
        for turn in range(bench.pace.flaps):
            what, state = (("unhealthy", "down"), ("healthy", "up"))[turn % 2]
            done = bench.swarm.watch(
                f"endpoints/{plan.name(service)}", plan.users[service], plan.address_of(sidecar), state
            )
            change = bench.swarm.change(sidecar, what)
            bench.judge(f"flap.{name}", done(), change["at"], took)
        after = bench.swarm.count()
        pushes = after["pushes"] - before["pushes"]
        bench.put(f"flap.{name}.users", len(plan.users[service]))
        bench.put(f"flap.{name}.told", pushes / bench.pace.flaps)
        bench.put(f"flap.{name}.bytes", (after["push_bytes"] - before["push_bytes"]) / bench.pace.flaps / 1e3)
        bench.put(f"flap.{name}.each", (after["push_bytes"] - before["push_bytes"]) / max(1.0, pushes))
        bench.spread(f"flap.{name}", took)
        if bench.pace.flaps % 2:
            bench.swarm.change(sidecar, "healthy")
        time.sleep(0.5)


def rollout(bench: Bench) -> None:
    """A tenth of all instances withdraw at once, and come back at once."""
    sidecars = list(bench.plan.ordinary())[: max(1, bench.plan.sizes.sidecars // 10)]
    for what in ("withdraw", "register"):
        with bench.accounts(f"rollout.{what}"):
            begun = time.monotonic()
            answers = [bench.swarm.begin_change(each, what) for each in sidecars]
            found = [answer() for answer in answers]
            if what == "withdraw":
                unsure = [each for each in found if not acknowledged(each)]
                if unsure:
                    bench.result.failed("rollout.withdraw", f"{len(unsure)} of {len(found)} were not acknowledged")
            _, last = bench.swarm.synced()
        bench.put(f"rollout.{what}", max(last, *(each["answered"] for each in found)) - begun)


def policy_changes(bench: Bench) -> None:
    """One service's policy, then the defaults of all: until the last sidecar concerned has answered."""
    plan, swarm, operator = bench.plan, bench.swarm, bench.operator
    ordinary = list(plan.ordinary())
    one: list[float] = []
    answered: list[float] = []
    with bench.accounts("apply"):
        for turn in range(bench.pace.applies):
            service = ordinary[turn * 11 % len(ordinary)]
            concerned = sorted({*plan.users[service], *plan.providers(service)})
            done = swarm.watch(f"service/{plan.name(service)}", concerned)
            begun = time.monotonic()
            operator.apply({f"one-{service}.yaml": plan.file([service], timeout_ms=6000 + turn)})
            answered.append(time.monotonic() - begun)
            bench.judge("apply", done(), begun, one)
    bench.spread("apply", one)
    bench.spread("apply.answer", answered)
    bench.put("apply.cpu-each", 1e3 * bench.result.figures["apply.cpu"] / bench.pace.applies)
    everyone: list[float] = []
    before = swarm.count()
    with bench.accounts("apply-all"):
        for turn in range(bench.pace.applies_to_all):
            done = swarm.watch("service/*", range(plan.sizes.sidecars), limit_s=60.0)
            begun = time.monotonic()
            operator.apply({"defaults.yaml": plan.defaults(idle_s=61 + turn)})
            bench.judge("apply-all", done(), begun, everyone)
            time.sleep(0.5)
    after = swarm.count()
    bench.spread("apply-all", everyone)
    for key in ("cpu", "store-cpu", "swarm-cpu"):
        bench.put(f"apply-all.{key}", bench.result.figures[f"apply-all.{key}"] / bench.pace.applies_to_all)
    bench.put("apply-all.bytes", (after["push_bytes"] - before["push_bytes"]) / bench.pace.applies_to_all / 1e6)


# -- everyone at once


def reconnect(bench: Bench) -> None:
    """All connections are lost and made anew at once, the control plane living on."""
    with bench.accounts("reconnect"):
        at = min(each["at"] for each in bench.swarm.ask("drop"))
        hello, last = bench.swarm.synced()
    bench.put("reconnect", max(hello, last) - at)
    bench.put("memory.after-reconnect", bench.control_plane.process.memory().resident / 1e6)


def restart(bench: Bench) -> None:
    """The control plane is killed, and started again over the same state."""
    bench.note_trouble()
    healthy = _healthy_endpoints(bench)
    bench.control_plane.kill()
    begun = time.monotonic()
    bench.put("restart.ready", bench.control_plane.start())
    bench.swarm.ask("forget")  # that nobody listened for a moment is what was wanted
    hello, last = bench.swarm.synced()
    bench.put("restart", max(hello, last) - begun)
    bench.put("restart.cpu", bench.control_plane.cpu_s())
    bench.put("memory.peak", bench.control_plane.process.memory().peak / 1e6)
    bench.operator = bench.control_plane.operator()
    # One lease later nobody must be missing: each has sent its heartbeat to the new one by now.
    time.sleep(20.0)
    left = _healthy_endpoints(bench)
    if left != healthy:
        bench.result.failed("restart", f"{healthy} endpoints before, {left} after one lease")
    bench.put("memory.after-restart", bench.control_plane.process.memory().resident / 1e6)


def _healthy_endpoints(bench: Bench) -> int:
    services = bench.operator.ask("GET", "/v1/services")["services"]
    return sum(each["healthy"] for each in services)


MEASURES: dict[str, Callable[[Bench], None]] = {
    "found": found,
    "join": join,
    "connect": connect,
    "register": register,
    "idle": idle,
    "endpoint changes": endpoint_changes,
    "flaps": flaps,
    "rollout": rollout,
    "policy": policy_changes,
    "reconnect": reconnect,
    "restart": restart,
}
NEEDED = ("found", "join", "connect", "register")  # without these nothing else can be measured
