"""Scenarios in a few lines, for tests of the simulator."""

from collections.abc import Sequence
from textwrap import dedent

from sidecar.model.problems import Sink, render
from sidecar.simulate.engine import Engine
from sidecar.simulate.reading import Read, read_text
from sidecar.simulate.results import Result, result_of

BUCKETS = 60


def read(text: str) -> Read:
    return read_text(dedent(text).lstrip("\n"), "scenario.yaml", Sink())


def codes(text: str) -> list[str]:
    """The codes of everything that is wrong, in the order of the file."""
    return [problem.code for problem in read(text).errors]


def engine(text: str, seed: int = 1, requests: int = 1_000_000) -> Engine:
    """Ready to run."""
    found = read(text)
    assert found.scenario is not None and found.snapshot is not None, render(found.problems, found.texts)
    return Engine(found.scenario, found.snapshot, seed, requests, BUCKETS)


def run(text: str, seed: int = 1, requests: int = 1_000_000) -> Result:
    ready = engine(text, seed, requests)
    ready.run()
    assert at_rest(ready)
    return result_of(ready, "inline")


def at_rest(done: Engine) -> bool:
    """Whether nothing of any request is left: every slot of every limit is given back."""
    servers = list(done.stage.servers.values())
    clusters = [cluster for server in servers if server.sidecar is not None for cluster in server.sidecar.state]
    return (
        all(server.busy == 0 and not server.queue and not server.running for server in servers)
        and all(cluster.active == 0 for cluster in clusters)
        and all(endpoint.active == 0 for cluster in clusters for endpoint in cluster.endpoints.values())
        and all(edge.in_flight == 0 for edge in done.stage.edges.values())
        and all(server.gate is None or server.gate.in_flight == server.gate.waiting == 0 for server in servers)
    )


def pair(
    reviews_policy: str = "{}",
    reviews: str = "{latency: 10ms}",
    load: str = "{from: web, to: reviews, rate: 100}",
    more: Sequence[str] = (),
    web: str = "{}",
) -> str:
    """web calls reviews; each argument in YAML's flow style."""
    lines = [
        "version: 1",
        f"policy: {{version: 1, services: {{web: {{}}, reviews: {reviews_policy}}}}}",
        f"services: {{web: {web}, reviews: {reviews}}}",
        f"load: [{load}]",
        *more,
    ]
    return "\n".join(lines) + "\n"
