"""Three services in a row, each an application process with its sidecar, mutual TLS between: deadlines, attempt
numbers and cancellation from end to end, over HTTP/1.1 and as gRPC. The applications pass `traceparent` on and know
nothing else of the mesh."""

import json
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from grpc import RpcError, StatusCode
from support.grpc_calls import call_channel, reason
from support.mesh import Mesh, Sidecar, until

APP = Path(__file__).parent.parent / "support" / "chain_app.py"
HOPS = ("first", "second", "third")
PORTS = {"http": {"port": 80}, "grpc": {"port": 81, "protocol": "grpc"}}
DEFAULTS = {
    "retry": {"max_retries": 2, "when": [503, "unavailable"], "base": "1ms", "max": "2ms",
              "budget": {"percent": "100%", "min_per_second": 100}},
    "circuit_breaker": {"consecutive_failures": 10_000},
}  # fmt: skip
Event = dict[str, Any]


class App:
    """One application process, and what it has told."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(APP)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.told: queue.Queue[Event] = queue.Queue()

    def listen(self) -> dict[str, str]:
        """Where it listens; from now on it is heard."""
        assert self.process.stdout is not None
        http, grpc = self.process.stdout.readline().split()
        threading.Thread(target=self._read, daemon=True).start()
        return {"http": f"127.0.0.1:{http}", "grpc": f"127.0.0.1:{grpc}"}

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.told.put(json.loads(line))

    def say(self, **what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def next(self, event: str) -> Event:
        found = self.told.get(timeout=10)
        assert found["event"] == event, found
        return found

    def ended(self) -> Event:
        """How its next request ends."""
        found = self.told.get(timeout=10)
        while found["event"] == "begun":
            found = self.told.get(timeout=10)
        return found

    def heard(self) -> list[str]:
        """Everything that it has told since, all of it over."""
        events = []
        while not self.told.empty():
            events.append(self.told.get()["event"])
        return events

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


class Chain:
    """`web` has a sidecar and is the test itself."""

    def __init__(self, mesh: Mesh) -> None:
        self.apps = {name: App() for name in HOPS}
        for app in self.apps.values():
            mesh.stack.callback(app.stop)
        self.sidecars: dict[str, Sidecar] = {}
        after: dict[str, Any] = {}
        for name in reversed(HOPS):
            own = {name: {"ports": PORTS}}
            callers = {"web" if name == "first" else HOPS[HOPS.index(name) - 1]: {}}
            app = self.apps[name].listen()
            self.sidecars[name] = mesh.sidecar(name, {**own, **after, **callers}, app=app, defaults=DEFAULTS)
            after = {name: {"ports": PORTS, "address": [self.sidecars[name].inbound]}}
        self.web = mesh.sidecar("web", {"web": {}, **after}, inbound=False, defaults=DEFAULTS)
        for name, following in zip(HOPS, (*HOPS[1:], ""), strict=True):
            self.apps[name].say(name=name, outbound=self.sidecars[name].outbound, following=following)

    def begun(self) -> list[Event]:
        return [self.apps[name].next("begun") for name in HOPS]

    def calls(self) -> list[int]:
        """How often each application was called for a request that is over."""
        for sidecar in self.sidecars.values():
            until(lambda: sidecar.metric("pillion_requests_active") == 0)  # noqa: B023
        return [Counter(self.apps[name].heard())["begun"] for name in HOPS]


class Call:
    """A request of `web` to the first."""

    status: int
    reason: str

    def leave(self) -> None:
        """The caller's connection ends."""
        raise NotImplementedError

    def wait(self) -> None:
        """For the answer."""
        raise NotImplementedError


class HttpCall(Call):
    def __init__(self, chain: Chain, script: str, deadline_s: float | None = None) -> None:
        told = {} if deadline_s is None else {"x-request-deadline-ms": str(int(deadline_s * 1000))}
        self.client = chain.web.client()
        self.client.request("GET", "/", "first", headers={"x-script": script, **told})

    def leave(self) -> None:
        self.client.close()

    def wait(self) -> None:
        response = self.client.response()
        self.status, self.reason = response.status, response.reason


class GrpcCall(Call):
    def __init__(self, chain: Chain, script: str, deadline_s: float | None = None) -> None:
        self.channel = call_channel(chain.web.outbound, "grpc.first")
        # grpcio stops at its own deadline, before it has heard what the mesh says: so what is told is a field here
        told = () if deadline_s is None else (("x-request-deadline-ms", str(int(deadline_s * 1000))),)
        ask = self.channel.unary_unary("/chain.App/Ask")
        self.call = ask.future(b"", metadata=(("x-script", script), *told), timeout=30)

    def leave(self) -> None:
        self.channel.close()

    def wait(self) -> None:
        statuses = {StatusCode.OK: 200, StatusCode.UNAVAILABLE: 503, StatusCode.DEADLINE_EXCEEDED: 504}
        try:
            self.call.result(timeout=15)
            self.status, self.reason = 200, ""
        except RpcError as error:
            self.status, self.reason = statuses[error.code()], reason(error)


Kind = type[HttpCall] | type[GrpcCall]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    with Mesh(tmp_path_factory.mktemp("chain")) as mesh:
        yield Chain(mesh)


@pytest.fixture(params=[HttpCall, GrpcCall], ids=["http", "grpc"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param  # type: ignore[no-any-return]


@contextmanager
def calling(chain: Chain, kind: Kind, script: str, deadline_s: float | None = None) -> Iterator[Call]:
    """A call, and nothing of it left behind."""
    chain.calls()
    call = kind(chain, script, deadline_s)
    try:
        yield call
    finally:
        call.leave()


# Leaving


@pytest.mark.parametrize("work_ms", [(50, 150), (150, 0)], ids=["slow", "quick"])
def test_all_three_stop_within_100_ms_of_the_clients_disconnect(
    chain: Chain, kind: Kind, work_ms: tuple[int, int]
) -> None:
    """From the close to the moment when each application's own request ends; the best of three, since the machine may
    be busy. The client's own end right behind a plain request would be read as "no more requests", so it waits; that
    the applications have just asked, and end their connections as suddenly, makes no difference."""
    best: list[float] = []
    for _ in range(3):
        with calling(chain, kind, f"first={work_ms[0]}ms;second={work_ms[1]}ms;third=hang") as call:
            chain.begun()
            left = time.monotonic()
            call.leave()
            gone = [chain.apps[name].next("caller_gone")["at"] - left for name in HOPS]
        best = gone if not best or max(gone) < max(best) else best
        if max(best) < 0.1:
            break
    assert max(best) < 0.1, best
    for sidecar in (chain.web, *chain.sidecars.values()):
        sidecar.logged(reason="caller_gone")
        until(lambda: sidecar.metric("pillion_requests_active") == 0)  # noqa: B023


# Deadlines


def test_the_deadline_shrinks_hop_by_hop_to_one_moment(chain: Chain, kind: Kind) -> None:
    """Each application works a while before it asks the next, and each sidecar says what is left: the last one is
    stopped at the moment that the first caller has named, though nobody but the sidecars knows of it."""
    budget_s, work_s = 0.4, 0.05
    with calling(chain, kind, "first=50ms;second=50ms;third=hang", budget_s) as call:
        began = time.monotonic()
        begun = chain.begun()
        call.wait()
        took_s = time.monotonic() - began
        ends = [chain.apps[name].ended() for name in HOPS]
    assert (call.status, call.reason) == (504, "timeout_total"), "by a sidecar, not by an application"
    assert budget_s - 0.1 < took_s < budget_s + 0.3
    assert len({trace_of(each) for each in begun}) == 1
    waits = [each["at"] - begun[0]["at"] for each in begun]
    assert waits[1] >= work_s and waits[2] >= 2 * work_s
    assert ends[2]["event"] == "caller_gone" and ends[2]["at"] - began < budget_s + 0.3
    if kind is GrpcCall:
        left = [each["left_s"] for each in begun]
        for hop, left_s in enumerate(left):
            assert 0.0 < left_s <= budget_s + 0.005 - hop * work_s, left
        moments = [each["at"] + each["left_s"] for each in begun]
        assert max(moments) - min(moments) < 0.05, moments
    # Not one of them waited for the 15 s of its own policy, nor longer than was left when it asked.
    for hop, name in enumerate(HOPS[:2], 1):
        line = chain.sidecars[name].logged(side="out", trace_id=trace_of(begun[0]))
        assert line["reason"] in ("timeout_total", "caller_gone"), line
        assert line["duration_ms"] < (budget_s - hop * work_s) * 1000 + 50


def trace_of(begun: Event) -> str:
    return str(begun["traceparent"][3:35])


def test_a_shorter_deadline_in_the_middle_is_told_there_and_is_the_applications_answer_above(chain: Chain) -> None:
    second = chain.sidecars["second"]
    plain = second.services["third"]
    second.apply({"third": {**plain, "timeout": {"total": "150ms"}}})
    try:
        with calling(chain, HttpCall, "third=hang") as call:
            trace_id = trace_of(chain.begun()[0])
            call.wait()
    finally:
        second.apply({"third": plain})
    assert (call.status, call.reason) == (504, "")
    line = second.logged(side="out", service="third", trace_id=trace_id)
    assert (line["status"], line["reason"], line["attempts"]) == (504, "timeout_total", 1), line
    above = chain.sidecars["first"].logged(side="out", service="second", trace_id=trace_id)
    assert (above["status"], above["reason"], above["attempts"]) == (504, "ok", 1), above


def test_nothing_left_is_answered_at_once_and_asks_nobody(chain: Chain, kind: Kind) -> None:
    with calling(chain, kind, "", 0.0) as call:
        call.wait()
    assert (call.status, call.reason) == (504, "timeout_total")
    assert chain.calls() == [0, 0, 0]


# Attempts


def test_the_layer_that_is_next_to_a_failure_retries_it_and_no_other(chain: Chain, kind: Kind) -> None:
    """What it gave up is marked, from sidecar to sidecar across the applications: two retries at each of three layers
    are three attempts and not 27."""
    with calling(chain, kind, "third=503") as call:
        call.wait()
    assert call.status == 503
    assert chain.calls() == [1, 1, 3]


def test_a_retry_that_helps_is_seen_by_nobody_above(chain: Chain, kind: Kind) -> None:
    with calling(chain, kind, "third=503,503,go") as call:
        call.wait()
    assert call.status == 200
    assert chain.calls() == [1, 1, 3]


def test_below_a_retry_nothing_is_retried_that_an_application_has_seen(chain: Chain, kind: Kind) -> None:
    """The first one fails by itself and is asked again, as attempt 1 and 2; the number goes with the trace to the third
    layer, which leaves retrying to the first: attempts of all layers add up to 1 + 2."""
    with calling(chain, kind, "first=503,go;third=503") as call:
        call.wait()
    assert call.status == 503
    assert chain.calls() == [3, 2, 2]


def test_without_the_trace_the_layers_multiply(chain: Chain) -> None:
    with calling(chain, HttpCall, "lost=;third=503") as call:
        call.wait()
    assert call.status == 503
    assert chain.calls() == [3, 9, 27]
