"""The story of the demo: seven steps, each with something that changes, a wait for what it brings about, and checks.

Must not know how it is shown (a Teller) nor how processes run. Invariants: every wait is for a condition and has a
deadline; a step that does not hold says why and the next one begins all the same; every figure comes from the sidecars
or the applications. The checks' margins are six standard deviations or more at the number of requests that is waited
for, so that none fails by chance.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import trio

from .control import TRUST_DOMAIN, CommandError, shown
from .figures import Counts, Sample, difference
from .load import Load
from .mesh import FILTER_MODULE, VERSIONS, WAYS, Instance, Mesh, StartError
from .policy import CANARY, DENIAL, FILTER, RETRIES, Edit, EditError, PolicyDirectory

REQUESTS = 300  # to reviews, in a step that is about shares
SEEN = 30  # of what is either so or not
IN_FORCE_S = 10.0
WAIT_S = 40.0
SETTLE_S = 0.3  # so that what was in flight under the old policy has ended

TTL_S = 15.0  # of a registration, after the last heartbeat
LATE_S = 5.0  # what a busy machine may take on top, for the news to reach every caller
JOINED_S = 2.0  # from a registration to the first call

HEALTHY, SICK = "v1", "v2"
TRACED = ["customers", "web", "orders", "ratings"]  # the way of a call that is denied


@dataclass
class Result:
    """What happened in one step."""

    step: str
    holds: bool = True
    problems: list[str] = field(default_factory=list)
    policy_file: str = ""
    policy_changes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    seconds: float = 0.0
    requests: int = 0  # of the customers
    reviews: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    window: Sample | None = None  # all figures of the step

    def check(self, holds: bool, problem: str) -> None:
        if not holds:
            self.holds = False
            self.problems.append(problem)

    def as_data(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "window"}


class Teller(Protocol):
    """Who shows the story."""

    def step(self, number: int, of: int, title: str, text: str) -> None: ...
    def changed(self, path: str, lines: list[str]) -> None: ...
    def command(self, text: str) -> None: ...
    def output(self, lines: list[str]) -> None: ...
    def look(self, text: str) -> None: ...
    def result(self, result: Result) -> None: ...


class Story:
    """Tell it with `await story.tell()`; `results`, `identities`, `denied`, `filter`, `killed` and `joined` are
    what came out."""

    def __init__(self, mesh: Mesh, load: Load, teller: Teller, pause_s: float) -> None:
        self.mesh, self.load, self.teller, self.pause_s = mesh, load, teller, pause_s
        self.policy: PolicyDirectory = mesh.policy
        self.results: list[Result] = []
        self.identities: list[dict[str, Any]] = []
        self.denied: dict[str, Any] = {}
        self.filter: dict[str, Any] = {}
        self.killed: dict[str, Any] = {}
        self.joined: dict[str, Any] = {}
        self._effective_before = 1.0
        self._share_before = 1.0

    @property
    def failed(self) -> list[str]:
        return [result.step for result in self.results if not result.holds]

    async def tell(self) -> None:
        steps: list[tuple[str, str, str, Callable[[Result], Awaitable[None]]]] = [
            (
                "baseline",
                "a release that is not well",
                "web asks reviews. 30 % of the calls go to v2, a new release that fails 3 of 10.\n"
                "Every call passes two sidecars, over mutual TLS.",
                self._baseline,
            ),
            (
                "retry",
                "a retry policy",
                "No code is touched: reviews gets a retry policy. The command that applies it\n"
                "ends once every sidecar has accepted it.",
                self._retry,
            ),
            (
                "canary",
                "fewer calls to the sick release",
                "Retries hide the fault, and cost attempts. So v2 gets 10 % of the calls.",
                self._canary,
            ),
            (
                "denied",
                "a call that is refused",
                "orders may no longer ask ratings. Who calls is told by certificates.",
                self._denied_call,
            ),
            (
                "filter",
                "a filter in Python, while it runs",
                "Some lines of Python, permitted by the sidecars' --allow-filters shop_filters.",
                self._filter_step,
            ),
            (
                "killed",
                "an instance is killed",
                "An instance of reviews v1 and its sidecar are killed: kill -9, no farewell.\n"
                "Retries and circuit breakers hide it until its registration lapses: after\n"
                "15 s without a heartbeat. Its callers know a moment later.",
                self._kill_step,
            ),
            (
                "joined",
                "a new instance joins",
                "All that a new one needs is a token: it gets a certificate and registers.",
                self._join_step,
            ),
        ]
        for number, (name, title, text, act) in enumerate(steps, 1):
            result = Result(name)
            began, requests = trio.current_time(), self.load.heard.requests
            self.teller.step(number, len(steps), title, text)
            unanswered = self.load.heard.answers[0]
            try:
                await act(result)
            except (StartError, EditError, CommandError) as error:
                result.check(False, str(error))
            unanswered = self.load.heard.answers[0] - unanswered
            result.check(not unanswered, f"{unanswered} requests got no answer: {[*self.load.heard.problems][-1:]}")
            result.seconds = round(trio.current_time() - began, 1)
            result.requests = self.load.heard.requests - requests
            self.results.append(result)
            self.teller.result(result)
            await trio.sleep(self.pause_s)

    # -- the steps

    async def _baseline(self, result: Result) -> None:
        self.teller.look(f"reviews {SICK}: effective and actual are the same, some 70 %")
        before = await self._mark()
        window = await self._measure(before, result, REQUESTS)
        healthy, sick, total = self._versions(window)
        _within(result, "v1 actual", healthy.actual, 0.99, 1.0)
        _within(result, f"{SICK} actual", sick.actual, 0.58, 0.82)
        _within(result, "effective", total.effective, 0.80, 0.97)
        self._effective_before = total.effective or 0.0
        self._share_before = _share(sick, total)
        await self._check_identities(result)
        result.said.append(f"reviews: effective {_percent(total.effective)}, {SICK} answers {_percent(sick.actual)}")
        result.said.append(
            f"mTLS: {len(self.identities)} hops, each caller seen by its SPIFFE ID (spiffe://{TRUST_DOMAIN}/…)"
        )

    async def _retry(self, result: Result) -> None:
        await self._edit(result, RETRIES, "retry what fails")
        self.teller.look(f"reviews {SICK}: effective rises to 100 %, actual stays; retries are counted")
        window = await self._measure(await self._mark(), result, REQUESTS)
        _, sick, total = self._versions(window)
        _within(result, "effective", total.effective, max(0.97, self._effective_before), 1.0)
        _within(result, f"{SICK} actual", sick.actual, 0.58, 0.82)
        result.check(total.retries > 0, "no retry was made")
        result.said.append(
            f"reviews: effective {_percent(self._effective_before)} → {_percent(total.effective)}, "
            f"while {SICK} still answers {_percent(sick.actual)}; {total.retries:.0f} retries"
        )

    async def _canary(self, result: Result) -> None:
        await self._edit(result, CANARY, "less of v2")
        self.teller.look(f"reviews {SICK}: its rate falls to a third, and retries with it")
        window = await self._measure(await self._mark(), result, REQUESTS)
        _, sick, total = self._versions(window)
        share = _share(sick, total)
        _within(result, f"share of {SICK}", share, 0.01, 0.22)
        _within(result, "effective", total.effective, 0.97, 1.0)
        result.reviews["share_before"] = round(self._share_before, 3)
        result.said.append(f"{SICK} gets {_percent(share)} of the calls instead of {_percent(self._share_before)}")

    async def _denied_call(self, result: Result) -> None:
        heard = self.load.heard
        result.check(heard.stars["orders", True] > 0, "orders got no stars before it was denied them")
        ratings = self._instance("ratings")
        offset = self.mesh.log_size(ratings)
        await self._edit(result, DENIAL, "ratings are not for orders")
        self.teller.look("orders → ratings is denied, reviews → ratings goes on")
        before, mark = heard.refusals.copy(), await self._mark()

        def seen() -> int:
            return heard.refusals["orders", 403, "denied"] - before["orders", 403, "denied"]

        enough = await _until(lambda: seen() >= SEEN)
        result.check(enough, f"orders was refused {seen()} times, not {SEEN}")
        window = await self._measure(mark, result, 0)
        reviews = window.total("reviews", "ratings")
        _within(result, "effective of reviews → ratings", reviews.effective, 0.99, 1.0)
        found = await _until(lambda: self._find_denial(ratings, offset))
        result.check(found, "the access log of ratings has no record of the denied call")
        if found:
            result.check(
                self.denied.get("caller") == f"spiffe://{TRUST_DOMAIN}/service/orders",
                "the denied caller is not orders",
            )
            result.check("ratings.yaml" in self.denied.get("rule", ""), "the record does not name the rule's file")
            result.said.append(
                f"denied: {self.denied.get('method')} {self.denied.get('path')} by {self.denied.get('caller')}"
            )
            result.said.append(
                f"status {self.denied.get('status')}, reason {self.denied.get('reason')}, rule {self._rule()}"
            )

            traced = await _until(lambda: self._traced() == TRACED)
            result.check(traced, f"the trace of the denied call is in the logs of {self._traced()}, not of {TRACED}")
            result.said.append(f"its trace id stands in the access logs of {', '.join(TRACED)}")
            self.denied["traced_through"] = self._traced()

    def _traced(self) -> list[str]:
        """Whose sidecars logged the denied call's trace: the services pass `traceparent` on."""
        wanted = self.denied.get("trace_id")
        return [
            each.service
            for each in self.mesh.instances
            if any(record.get("trace_id") == wanted for record in self.mesh.records(each))
        ]

    def _find_denial(self, ratings: Instance, offset: int) -> bool:
        for record in self.mesh.records(ratings, offset):
            if record.get("reason") == "denied":
                self.denied = record
                return True
        return False

    def _rule(self) -> str:
        return str(self.denied.get("rule", "")).replace(f"{self.policy.path}/", "")

    async def _filter_step(self, result: Result) -> None:
        heard = self.load.heard
        result.check(not any(tenant for _, _, tenant in heard.tenants), "a tenant was told before the filter was there")
        source = _filter_source()
        (self.mesh.filters / f"{FILTER_MODULE}.py").write_text(source)
        self.teller.changed(f"filters/{FILTER_MODULE}.py", ["+" + line for line in _essence(source)])
        await self._edit(result, FILTER, "tell reviews who asks")
        self.teller.look("nothing changes but what reviews is told: the header x-tenant")
        mark = await self._mark()
        versions = VERSIONS["reviews"]
        for version in versions:
            enough = await _until(lambda v=version: heard.tenants["reviews", v, "web"] >= SEEN)  # type: ignore[misc]
            result.check(enough, f"reviews {version} was not told x-tenant: web {SEEN} times")
        enough = await _until(lambda: heard.filtered["reviews"] >= SEEN)
        result.check(enough, "web did not see the header x-filtered-by in the answers of reviews")
        wrong = {tenant for service, _, tenant in heard.tenants if service == "reviews"} - {"", "web"}
        result.check(not wrong, f"reviews was told {wrong}")
        count = sum(heard.tenants["reviews", version, "web"] for version in versions)
        await self._measure(mark, result, 0)
        self.filter = {
            "use": f"{FILTER_MODULE}:AddTenant",
            "header": "x-tenant",
            "value": "web" if count else None,
            "seen_by": "reviews",
            "seen_requests": count,
            "response_header": "x-filtered-by",
            "seen_responses": heard.filtered["reviews"],
        }
        result.said.append(f"reviews saw x-tenant: web in {count} requests")

    async def _kill_step(self, result: Result) -> None:
        mesh = self.mesh
        web = self._instance("web")
        victim = mesh.of("reviews", HEALTHY)[-1]
        await self._get_endpoints(result)
        self.teller.look(f"effective stays at 100 % while {victim.address} is still known")
        before = await self._mark()
        await trio.sleep(SETTLE_S)
        answers, began = self.load.heard.answers.copy(), trio.current_time()
        self.teller.command(f"kill -9 {' '.join(str(child.process.pid) for child in victim.processes)}")
        mesh.kill(victim)

        async def known() -> bool:
            return victim.address in await self._called(web)

        forgotten = await _until_not(known, TTL_S + LATE_S)
        seconds = trio.current_time() - began
        result.check(forgotten, f"web still calls {victim.address} {seconds:.1f} s after it was killed")
        listed = await self._get_endpoints(result)
        result.check(not _lists(listed, victim), f"pillion get endpoints still lists {victim.address}")
        answers = self.load.heard.answers - answers
        failed = answers.total() - answers[200]
        window = await self._measure(before, result, 0)
        healthy, sick, total = self._versions(window)
        # Three retries of a release that fails 3 of 10 leave 1 of 100 calls of it; nothing else may fail.
        lost, tired = healthy.requests - healthy.good, sick.requests - sick.good
        result.check(lost == 0, f"{lost:.0f} calls of {HEALTHY} failed")
        result.check(failed <= tired, f"customers saw {failed} failures, of which {SICK} explains {tired:.0f}")
        _within(result, "effective", total.effective, 0.98, 1.0)
        self.killed = {
            "instance": victim.name,
            "address": victim.address,
            "ttl_s": TTL_S,
            "gone_after_s": round(seconds, 1),
            "requests": answers.total(),
            "failed": failed,
            "failed_by_v2": int(tired),
            "failed_by_v1": int(lost),
            "attempts_failed_by_v1": int(healthy.attempts_bad),
            "endpoints_listed": len(listed),
        }
        if forgotten:
            result.said.append(f"{victim.address} was gone for the control plane and for web after {seconds:.1f} s")
        result.said.append(
            f"{healthy.attempts_bad:.0f} attempts at {HEALTHY} failed and were made again elsewhere; "
            f"{lost:.0f} calls failed"
        )

    async def _join_step(self, result: Result) -> None:
        mesh = self.mesh
        web = self._instance("web")
        before = await self._mark()

        def show(text: str) -> None:
            result.commands.append(text)
            self.teller.command(text)

        joined = await mesh.add("reviews", HEALTHY, show)
        self.teller.look(f"reviews {HEALTHY} is called at {joined.address} too")
        registered_s = called_s = None
        if await _until_so(lambda: mesh.is_registered(joined)):
            registered_s = trio.current_time()

        async def called() -> bool:
            return (await self._called(web)).get(joined.address, 0) > 0

        if await _until_so(called):
            called_s = trio.current_time()
        result.check(registered_s is not None, f"{joined.address} has not registered")
        result.check(called_s is not None, f"web does not call {joined.address}")
        listed = await self._get_endpoints(result)
        result.check(_lists(listed, joined), f"pillion get endpoints does not list {joined.address}")
        window = await self._measure(before, result, SEEN)
        healthy, _, _ = self._versions(window)
        result.check(healthy.requests == healthy.good, f"calls of {HEALTHY} failed")
        self.joined = {"instance": joined.name, "address": joined.address, "endpoints_listed": len(listed)}
        if registered_s is not None and called_s is not None:
            seconds = called_s - registered_s
            result.check(seconds <= JOINED_S, f"the first call came {seconds:.1f} s after the registration")
            self.joined["first_call_after_s"] = round(seconds, 2)
            result.said.append(f"{joined.address} was called {seconds:.1f} s after it had registered")

    # -- parts of steps

    async def _called(self, caller: Instance) -> dict[str, int]:
        """The instances of reviews that a caller knows, and how often it has called each with success."""
        return {
            row["endpoint"]: row["successes"] for row in await self.mesh.clusters(caller) if row["service"] == "reviews"
        }

    async def _get_endpoints(self, result: Result) -> list[str]:
        """Show what the control plane knows of reviews; a line for each endpoint."""
        args = ("get", "endpoints", "reviews")
        result.commands.append(shown(*args))
        self.teller.command(shown(*args))
        lines = (await self.mesh.control.ask(*args)).out.splitlines()
        self.teller.output(lines)
        return lines[1:]  # without the headings

    async def _edit(self, result: Result, edit: Edit, message: str) -> None:
        """Edit a file and apply it; every sidecar has accepted it then."""
        lines = self.policy.edit(edit)
        result.policy_file, result.policy_changes = edit.file, lines
        file = f"policy/{edit.file}"
        self.teller.changed(file, lines)
        args = ("policy", "apply", "-f", file, "-m", message)
        result.commands.append(shown(*args))
        self.teller.command(shown(*args))
        said = (await self.mesh.control.ask(*args)).said.splitlines()
        outcome = next((number for number, line in enumerate(said) if line.startswith("change ")), 0)
        self.teller.output(said[outcome:])  # the difference before that has been shown
        await trio.sleep(SETTLE_S)

    async def _mark(self) -> Sample:
        with trio.move_on_after(IN_FORCE_S):
            while True:
                sample = await self.mesh.sample()
                if sample is not None:
                    return sample
                await trio.sleep(0.1)
        raise StartError(self.mesh.problem)

    async def _measure(self, before: Sample, result: Result, requests: int) -> Sample:
        """What has happened since, once web has asked reviews so many times."""
        window = difference(await self._mark(), before)
        with trio.move_on_after(WAIT_S):
            while window.total("web", "reviews").requests < requests:
                await trio.sleep(0.2)
                window = difference(await self._mark(), before)
        total = window.total("web", "reviews")
        result.check(total.requests >= requests, f"only {total.requests:.0f} of {requests} requests in {WAIT_S:g} s")
        result.window = window
        healthy, sick, total = self._versions(window)
        result.reviews = _figures(total) | {"v1": _figures(healthy), SICK: _figures(sick)}
        return window

    def _versions(self, window: Sample) -> tuple[Counts, Counts, Counts]:
        return (
            window.of("web", "reviews", "v1"),
            window.of("web", "reviews", SICK),
            window.total("web", "reviews"),
        )

    async def _check_identities(self, result: Result) -> None:
        """On every hop the caller's identity, as the application saw it and as the callee's access log has it."""
        heard = self.load.heard
        for caller, callee in WAYS:
            identity = f"spiffe://{TRUST_DOMAIN}/service/{caller}"

            def seen(callee: str = callee, identity: str = identity) -> bool:
                return heard.callers[callee, identity] > 0

            def logged(callee: str = callee, identity: str = identity) -> bool:
                return any(
                    record.get("side") == "in" and record.get("caller") == identity
                    for each in self.mesh.instances
                    if each.service == callee
                    for record in self.mesh.records(each)
                )

            hop = {
                "from": caller,
                "to": callee,
                "identity": identity,
                "seen_by_application": await _until(seen),
                "in_access_log": await _until(logged),
            }
            self.identities.append(hop)
            for where in ("seen_by_application", "in_access_log"):
                result.check(bool(hop[where]), f"{caller} → {callee}: the identity {identity} is not {where}")
        unknown = {(service, identity) for service, identity in heard.callers if not identity}
        result.check(not unknown, f"requests without an identity reached {sorted(unknown)}")

    def _instance(self, service: str) -> Instance:
        return next(each for each in self.mesh.instances if each.service == service)

    def report(self) -> dict[str, Any]:
        """Everything that happened, as JSON data."""
        return {
            "ok": not self.failed and len(self.results) > 0,
            "failed": self.failed,
            "requests": self.load.heard.requests,
            "answers": {str(status): count for status, count in sorted(self.load.heard.answers.items())},
            "steps": [result.as_data() for result in self.results],
            "identities": self.identities,
            "denied": self.denied,
            "filter": self.filter,
            "killed": self.killed,
            "joined": self.joined,
        }


async def _until(condition: Callable[[], bool], within_s: float = WAIT_S) -> bool:
    with trio.move_on_after(within_s):
        while not condition():  # noqa: ASYNC110 - files and counters tell of no event
            await trio.sleep(0.1)
        return True
    return False


async def _until_so(condition: Callable[[], Awaitable[bool]], within_s: float = WAIT_S) -> bool:
    with trio.move_on_after(within_s):
        while not await condition():  # noqa: ASYNC110 - a sidecar's admin tells of no event
            await trio.sleep(0.05)
        return True
    return False


async def _until_not(condition: Callable[[], Awaitable[bool]], within_s: float) -> bool:
    async def over() -> bool:
        return not await condition()

    return await _until_so(over, within_s)


def _lists(lines: list[str], instance: Instance) -> bool:
    return any(instance.address in line.split() for line in lines)


def _within(result: Result, what: str, value: float | None, low: float, high: float) -> None:
    result.check(
        value is not None and low <= value <= high,
        f"{what} is {_percent(value)}, expected {_percent(low)} to {_percent(high)}",
    )


def _share(part: Counts, total: Counts) -> float:
    return part.requests / total.requests if total.requests else 0.0


def _figures(counts: Counts) -> dict[str, Any]:
    return {
        "requests": int(counts.requests),
        "effective": _rounded(counts.effective),
        "attempts": int(counts.attempts),
        "actual": _rounded(counts.actual),
        "retries": int(max(counts.retries, min(counts.attempts - counts.requests, counts.attempts_bad), 0)),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _percent(value: float | None) -> str:
    return "nothing" if value is None else f"{value * 100:.3g} %"


def _filter_source() -> str:
    return Path(__file__).with_name(f"{FILTER_MODULE}.py").read_text()


def _essence(source: str) -> list[str]:
    """The class alone: imports and settings are for whoever opens the file."""
    lines = source.rstrip().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("class AddTenant"))
    return lines[begin:]
