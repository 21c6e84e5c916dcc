"""Exchanges on hand-made clusters, and a twenty-line Trio driver for them on memory streams in virtual time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import trio
import trio.testing

from sidecar.model.snapshot import CircuitBreaker, EndpointSpec, Limits, Retry, Timeouts, Tls
from sidecar.policy.cluster import Cluster, Destination, RoutePlan, Subset
from sidecar.policy.endpoint import Endpoint
from sidecar.policy.exchange import OFF, RELAY, SEND, WAIT, Do, Exchange
from sidecar.policy.outcome import Failure

from .balancers import LEAST_REQUEST

WHOLE = Timeouts(total_s=15.0, try_s=OFF)
EVERYTHING = frozenset({"connect-error", "refused-stream", "reset", "timeout"})


def make_cluster(
    name: str = "reviews",
    endpoints: int = 2,
    *,
    breaker: CircuitBreaker = CircuitBreaker(),  # noqa: B008
    limits: Limits = Limits(),  # noqa: B008
    retry: Retry = Retry(),  # noqa: B008
    labels: Sequence[Mapping[str, str]] = (),
) -> Cluster:
    cluster = Cluster(name, "out", limits, retry, 0.0)
    specs = [
        EndpointSpec(f"10.0.0.{n + 1}", 80, labels=labels[n] if labels else {}, tls=Tls.PLAIN) for n in range(endpoints)
    ]
    cluster.update(specs, breaker, {}, "", "")
    return cluster


def endpoints_of(cluster: Cluster) -> tuple[Endpoint, ...]:
    return tuple(cluster.endpoints.values())


def make_plan(cluster: Cluster, timeouts: Timeouts = WHOLE, retry: Retry = Retry()) -> RoutePlan:  # noqa: B008
    plan = RoutePlan("default", cluster.name)
    subset = Subset("", endpoints_of(cluster), LEAST_REQUEST)
    plan.bind(cluster, timeouts, retry, [(Destination(None, subset), 100)])
    cluster.budget.configure(retry.budget.percent, retry.budget.min_per_second)
    return plan


def make_exchange(
    plan: RoutePlan, method: bytes = b"GET", now: float = 0.0, rnd: Callable[[], float] = lambda: 0.0, **options: Any
) -> Exchange:
    assert plan.subset is not None
    return Exchange(plan, plan.subset, method, now, rnd, **options)


def at_rest(cluster: Cluster) -> bool:
    """Whether nothing of any request is left."""
    return cluster.active == 0 and all(endpoint.active == 0 for endpoint in cluster.endpoints.values())


Dial = Callable[[Endpoint], Any]


async def drive(ex: Exchange, dial: Dial, request: bytes = b"GET / HTTP/1.1\r\n\r\n") -> Do:
    """What the reactor's driver does, for a request without a body: obey, and report what happened."""
    now = trio.current_time
    do = ex.begin(now())
    while True:
        if do is WAIT:
            await trio.sleep_until(ex.due)
            do = ex.deadline(now())
        elif do is SEND:
            with trio.move_on_at(ex.due):
                try:
                    stream = await dial(ex.endpoint)  # type: ignore[arg-type]
                    await stream.send_all(request)
                    head = await stream.receive_some()
                except OSError:
                    do = ex.failed(Failure.CONNECT, now())
                    continue
                do = ex.response_head(int(head.split()[1]), now()) if head else ex.failed(Failure.RESET, now())
                continue
            do = ex.deadline(now())
        else:
            if do is RELAY:
                ex.response_end(now())
            return do


class MemoryNetwork:
    """Each dial takes the next answer: bytes at once, (delay_s, bytes), an exception, b"" for a connection that is
    closed at once, None for one that never answers. `seen` are (time, host) of the dials."""

    def __init__(self, answers: Sequence[Any]) -> None:
        self.left = list(answers)
        self.seen: list[tuple[float, str]] = []
        self.open: list[Any] = []

    async def dial(self, endpoint: Endpoint) -> Any:
        answer = self.left.pop(0)
        self.seen.append((round(trio.current_time(), 6), endpoint.host))
        if isinstance(answer, tuple):
            await trio.sleep(answer[0])
            answer = answer[1]
        if isinstance(answer, Exception):
            raise answer
        near, far = trio.testing.memory_stream_pair()
        self.open.append(far)
        if answer:
            await far.send_all(answer)
        elif answer is not None:
            far.send_stream.close()
        return near
