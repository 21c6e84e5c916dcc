"""What a run leaves behind: counts and times of every edge of the call graph, and the changes of every breaker.

Written on the hot path, so plain lists and arrays; read only when the run is over. Must not know policy. Invariant: a
request is counted in `started` once, and in `ended` once when it is over.
"""

from array import array
from collections.abc import Iterable

GOOD_BELOW = 500  # an answer under this is a good one, but for 429
TOO_MANY = 429


def is_good(status: int) -> bool:
    return 0 < status < GOOD_BELOW and status != TOO_MANY


class Edge:
    """Requests of one service to another; `root`: of a load, rather than of an application at work. Lists are by bucket
    of time, the last for what comes after the load; `begun_s`, `took_s` and `good` are by request, in the order in
    which they ended."""

    __slots__ = (
        "attempts",
        "beaten",
        "begun_s",
        "bucket_attempts",
        "bucket_ended",
        "bucket_good",
        "bucket_peak",
        "bucket_retries",
        "bucket_started",
        "caller",
        "first",
        "good",
        "good_attempts",
        "hedges",
        "in_flight",
        "outcomes",
        "root",
        "shed",
        "started",
        "statuses",
        "to",
        "took_s",
    )  # fmt: skip

    def __init__(self, caller: str, to: str, root: bool, buckets: int) -> None:
        self.caller, self.to, self.root = caller, to, root
        self.begun_s, self.took_s, self.good = array("d"), array("d"), bytearray()
        self.started = self.first = self.attempts = self.good_attempts = self.in_flight = 0
        self.beaten = 0  # attempts that another one has made needless
        self.shed = 0  # attempts that the callee's sidecar had no room for
        self.hedges: dict[str, int] = {}  # by what has become of them, or why there was none
        self.outcomes: dict[str, int] = {}
        self.statuses: dict[int, int] = {}
        self.bucket_started, self.bucket_ended, self.bucket_good, self.bucket_attempts, self.bucket_peak = (
            [0] * (buckets + 1) for _ in range(5)
        )
        self.bucket_retries = [0] * (buckets + 1)

    @property
    def name(self) -> str:
        return f"{self.caller} → {self.to}"

    @property
    def ended(self) -> int:
        return len(self.good)

    def begin(self, bucket: int, first: bool) -> None:
        self.started += 1
        if first:
            self.first += 1
        self.bucket_started[bucket] += 1
        self.in_flight += 1
        if self.in_flight > self.bucket_peak[bucket]:
            self.bucket_peak[bucket] = self.in_flight

    def end(self, bucket: int, begun_s: float, now: float, status: int, reason: str) -> None:
        self.in_flight -= 1
        good = is_good(status)
        self.begun_s.append(begun_s)
        self.took_s.append(now - begun_s)
        self.good.append(good)
        self.bucket_ended[bucket] += 1
        if good:
            self.bucket_good[bucket] += 1
        outcomes, statuses = self.outcomes, self.statuses
        outcomes[reason] = outcomes.get(reason, 0) + 1
        statuses[status] = statuses.get(status, 0) + 1

    def hedged(self, result: str) -> None:
        self.hedges[result] = self.hedges.get(result, 0) + 1

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self.in_flight -= 1
        self.outcomes["caller_gone"] = self.outcomes.get("caller_gone", 0) + 1

    def carry(self, bucket: int) -> None:
        """A bucket begins: what is in flight is its peak so far."""
        if self.in_flight > self.bucket_peak[bucket]:
            self.bucket_peak[bucket] = self.in_flight

    # -- when the run is over

    def within(self, after_s: float, before_s: float | None) -> tuple[list[float], int]:
        """The latencies of the requests that began then, and how many of them went well."""
        if after_s <= 0.0 and before_s is None:
            return sorted(self.took_s), sum(self.good)
        chosen = [
            (took, good)
            for begun, took, good in zip(self.begun_s, self.took_s, self.good, strict=True)
            if begun >= after_s and (before_s is None or begun < before_s)
        ]
        return sorted(took for took, _ in chosen), sum(good for _, good in chosen)


def percentile(ordered: list[float], share: float) -> float:
    """The smallest value that this share of all does not exceed (nearest rank); 0 of none."""
    if not ordered:
        return 0.0
    rank = -int(-share * len(ordered) // 1)  # the ceiling
    return ordered[max(0, min(len(ordered), rank) - 1)]


class Change:
    """What `caller` (a sidecar) thinks of `endpoint` has changed: a breaker, an ejection; or panic, then `endpoint` is
    the service. `text` holds the evidence."""

    __slots__ = ("at_s", "caller", "endpoint", "service", "state", "text")

    def __init__(self, at_s: float, caller: str, service: str, endpoint: str, text: str) -> None:
        self.at_s, self.caller, self.service, self.endpoint, self.text = at_s, caller, service, endpoint, text
        self.state = text.partition(" ")[0].rstrip(":")


EJECTED = ("ejected", "returned")
OUTLIERS = (*EJECTED, "spared")


def open_spans(
    changes: Iterable[Change], ends_s: float, begins: str = "open", ends: str = "closed"
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """When the breaker of (caller, endpoint) was not closed; or, by other words, when something else was so."""
    spans: dict[tuple[str, str], list[tuple[float, float]]] = {}
    since: dict[tuple[str, str], float] = {}
    for change in changes:
        key = (change.caller, change.endpoint)
        if change.state == begins:
            since.setdefault(key, change.at_s)
        elif change.state in (ends, "gone") and key in since:
            spans.setdefault(key, []).append((since.pop(key), change.at_s))
    for key, begun in since.items():
        spans.setdefault(key, []).append((begun, ends_s))
    return spans


def share_open(spans: Iterable[tuple[float, float]], width_s: float, buckets: int) -> list[float]:
    """How much of each bucket of time these spans cover, added up."""
    found = [0.0] * buckets
    for begin, end in spans:
        index = int(begin / width_s)
        while index < buckets and index * width_s < end:
            low, high = max(begin, index * width_s), min(end, (index + 1) * width_s)
            found[index] += max(0.0, high - low) / width_s
            index += 1
    return found
