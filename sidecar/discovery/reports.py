"""What a sidecar tells of the traffic that it sees: whom its service calls, which endpoints it avoids, and why.

Reads the clusters of the data path, which count for ever, and gives what came since the last time. Must not know where
it goes. Invariant: what is told is never negative; an endpoint that left between two readings takes its uncounted
failures with it.
"""

from collections.abc import Iterator, Mapping

from sidecar.policy.cluster import Cluster
from sidecar.policy.endpoint import Endpoint

Clusters = Mapping[tuple[str, str, str], Cluster]
Key = tuple[str, str, str]

EDGES_MAX = 1000
BREAKERS_MAX = 200
EVIDENCE_MAX = 50
EVIDENCE_CHARS_MAX = 250


class Edges:
    """Requests and failures by callee, since the last reading. A retried attempt is no request; a failure that a retry
    made good is none either."""

    def __init__(self) -> None:
        self._seen: dict[Key, tuple[int, int, int]] = {}

    def take(self, clusters: Clusters) -> list[tuple[str, int, int]]:
        found: dict[str, list[int]] = {}
        seen: dict[Key, tuple[int, int, int]] = {}
        for key, cluster in clusters.items():
            side, service, _ = key
            if side != "out":
                continue
            again = cluster.retries + cluster.resends
            now = (cluster.attempts - again, again, sum(each.failures for each in cluster.endpoints.values()))
            seen[key] = now
            before = self._seen.get(key, (0, 0, 0))
            requests = max(0, now[0] - before[0])
            failures = min(max(0, now[2] - before[2] - (now[1] - before[1])), requests)
            if requests:
                edge = found.setdefault(service, [0, 0])
                edge[0] += requests
                edge[1] += failures
        self._seen = seen
        most = sorted(found.items(), key=lambda item: -item[1][0])[:EDGES_MAX]
        return [(service, requests, failures) for service, (requests, failures) in sorted(most)]


def breakers(clusters: Clusters, now: float) -> list[tuple[str, str, str]]:
    """Callee, endpoint and state of each breaker that is not closed; "ejected" of each outlier."""
    found = []
    for service, endpoint in _avoided(clusters):
        if endpoint.breaker.tripped:
            found.append((service, endpoint.key, endpoint.breaker.state(now)))
        if endpoint.ejected:
            found.append((service, endpoint.key, "ejected"))
    return found[:BREAKERS_MAX]


def evidence(clusters: Clusters) -> list[tuple[str, str, str]]:
    """Callee, endpoint and what happened last to each of these."""
    return [
        (service, endpoint.key, endpoint.events[0][:EVIDENCE_CHARS_MAX])
        for service, endpoint in _avoided(clusters)
        if endpoint.events
    ][:EVIDENCE_MAX]


def _avoided(clusters: Clusters) -> Iterator[tuple[str, Endpoint]]:
    for (side, service, _), cluster in clusters.items():
        if side == "out":
            for endpoint in cluster.endpoints.values():
                if endpoint.breaker.tripped or endpoint.ejected:
                    yield service, endpoint
