"""One process of the swarm: `python -m tests.bench.control.swarm`, told by lines of JSON what its sidecars shall do.

Each line is a command with an id, and each gets one line of answer when it is done:
`join`, `connect`, `register`, `change`, `watch`, `synced`, `drop`, `count`, `forget`, `stop`. Times are of the
monotonic clock, which all processes of a machine share.
"""

import json
import os
import resource
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from .loop import IN, Loop
from .plan import Plan, Sizes
from .sidecar import Shared, Simulated

TRIES, AGAIN_S = 10, 1.0  # of a registration that the store does not take just now
QUIET_S = 1.0  # in which nothing is pushed any more


class Watch:
    """Waits until each of some sidecars has answered for a resource that is as it should be."""

    def __init__(self, resource: str, host: str, state: str, waiting: set[int]) -> None:
        self.resource, self.host, self.state, self.waiting = resource, host, state, waiting
        self.answered: list[tuple[int, float]] = []


class Swarm:
    def __init__(self, loop: Loop, settings: dict[str, Any], folder: Path) -> None:
        self.loop = loop
        self.plan = plan = Plan(Sizes(**settings["sizes"]))
        self.shared = Shared(
            loop,
            folder,
            settings["trust"],
            tuple(settings["mesh"]),
            tuple(settings["join"]),
            self.acked,
            self.told,
        )
        self.mine = {
            number: Simulated(
                self.shared,
                number,
                plan.name(plan.service_of(number)),
                plan.address_of(number),
                [plan.name(each) for each in plan.asked_by(number)],
                [plan.name(each) for each in plan.called_by(plan.service_of(number))],
            )
            for number in range(settings["first"], plan.sizes.sidecars, settings["of"])
        }
        self.watches: dict[int, Watch] = {}
        self.lost: dict[str, int] = {}

    def acked(self, sidecar: Simulated, at: float, changed: frozenset[str], policy: int) -> None:
        for number, watch in list(self.watches.items()):
            if sidecar.number not in watch.waiting:
                continue
            name = watch.resource.replace("*", sidecar.service)
            if name in changed and (not watch.host or sidecar.sees(name, watch.host) == watch.state):
                watch.waiting.discard(sidecar.number)
                watch.answered.append((sidecar.number, at))
                if not watch.waiting:
                    del self.watches[number]
                    say({"id": number, "answered": watch.answered, "missing": []})

    def told(self, sidecar: Simulated, reason: str) -> None:
        reason = reason[:120]
        if reason in self.lost or len(self.lost) < 30:
            self.lost[reason] = self.lost.get(reason, 0) + 1

    # -- commands

    def obey(self, command: dict[str, Any]) -> None:
        number = command.pop("id")
        method: Callable[..., None] = getattr(self, "do_" + command.pop("do"))
        method(number, **command)

    def do_join(self, number: int, tokens: list[str], parallel: int) -> None:
        waiting = deque(self.mine.values())
        begun = monotonic()
        took: list[float] = []
        failed: dict[str, int] = {}
        left = len(waiting)

        def next_one() -> None:
            if not waiting:
                return
            sidecar = waiting.popleft()
            since = monotonic()

            def done(problem: str) -> None:
                nonlocal left
                left -= 1
                if problem:
                    failed[problem] = failed.get(problem, 0) + 1
                else:
                    took.append(monotonic() - since)
                if not left:
                    say({"id": number, "seconds": monotonic() - begun, "took": sorted(took), "failed": failed})
                next_one()

            sidecar.join_with(tokens[self.plan.service_of(sidecar.number)], done)

        for _ in range(parallel):
            next_one()

    def do_connect(self, number: int) -> None:
        for sidecar in self.mine.values():
            sidecar.connect()
        say({"id": number})

    def do_register(self, number: int) -> None:
        """All of them."""
        left = len(self.mine)
        failed: dict[str, int] = {}

        def ask(sidecar: Simulated, tries_left: int) -> None:
            def answered(status: int, body: bytes) -> None:
                nonlocal left
                if status in (0, 503) and tries_left:  # as a real one does
                    self.shared.counters.complain(f"POST /v1/register: {status}, tried again")
                    self.loop.after(AGAIN_S, lambda: ask(sidecar, tries_left - 1))
                    return
                left -= 1
                if status != 200:
                    text = f"{status} {body[:100]!r}"
                    failed[text] = failed.get(text, 0) + 1
                if not left:
                    say({"id": number, "failed": failed})

            sidecar.register(answered)

        for sidecar in self.mine.values():
            ask(sidecar, TRIES)

    def do_change(self, number: int, sidecar: int, what: str) -> None:
        def answered(status: int, body: bytes) -> None:
            say({"id": number, "at": begun, "answered": monotonic(), "status": status, "body": body.decode()[:300]})

        one = self.mine[sidecar]
        begun = monotonic()
        if what == "register":
            one.register(answered)
        elif what == "withdraw":
            one.withdraw(answered)
        else:
            one.set_health(what == "healthy", answered)

    def do_watch(self, number: int, resource: str, sidecars: list[int], host: str, state: str, limit_s: float) -> None:
        """Two answers: one when it is armed, one when all have answered (or not, within `limit_s`)."""
        watch = Watch(resource, host, state, {each for each in sidecars if each in self.mine})

        def late() -> None:
            if self.watches.pop(number, None) is not None:
                say({"id": number, "answered": watch.answered, "missing": sorted(watch.waiting)})

        say({"id": number})
        if watch.waiting:
            self.watches[number] = watch
            self.loop.after(limit_s, late)
        else:
            say({"id": number, "answered": [], "missing": []})

    def do_synced(self, number: int, limit_s: float) -> None:
        """When all have a stream, and have answered whatever came; and nothing more has come for QUIET_S."""
        begun = monotonic()

        def look() -> None:
            now = monotonic()
            out = [each.number for each in self.mine.values() if not each.in_sync_at]
            last = max((each.in_sync_at for each in self.mine.values()), default=0.0)
            if (not out and now - max(last, begun) > QUIET_S) or now - begun > limit_s:
                hellos = sorted(each.hello_at for each in self.mine.values())
                say({"id": number, "last": last, "hellos": hellos, "out": out[:20], "out_count": len(out)})
            else:
                self.loop.after(0.05, look)

        look()

    def do_drop(self, number: int) -> None:
        at = monotonic()
        for sidecar in self.mine.values():
            sidecar.drop()
        say({"id": number, "at": at})

    def do_count(self, number: int) -> None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        say(
            {
                "id": number,
                "cpu_s": usage.ru_utime + usage.ru_stime,
                "lost_for": self.lost,
                **asdict(self.shared.counters),
            }
        )

    def do_forget(self, number: int) -> None:
        """What went wrong so far."""
        self.lost.clear()
        self.shared.counters.trouble.clear()
        say({"id": number})

    def do_stop(self, number: int) -> None:
        for sidecar in self.mine.values():
            sidecar.stop()
        self.loop.running = False
        say({"id": number})


def say(data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(data, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    settings = json.loads(sys.stdin.readline())
    loop = Loop()
    with TemporaryDirectory(prefix="pillion-swarm-") as folder:
        swarm = Swarm(loop, settings, Path(folder))
        held = b""

        def readable(_: int) -> None:
            nonlocal held
            data = os.read(0, 1 << 20)
            if not data:
                loop.running = False
                return
            *lines, held = (held + data).split(b"\n")
            for line in lines:
                swarm.obey(json.loads(line))

        loop.add(0, IN, readable)
        say({"ready": len(swarm.mine)})
        loop.run()


if __name__ == "__main__":
    main()
