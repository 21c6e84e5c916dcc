"""The circuit breaker of one endpoint, as one caller sees it.

    closed ──(failures)──> open ──(time)──> half-open ──(probe succeeds)──> closed
                            ^                   │
                            └──(probe fails, or is past its limit: twice as long)

Steps that time alone causes are taken when somebody asks; they carry the moment at which they were due, so the numbers
are exact however late the question comes. Must not know requests, statuses or connections: the exchange says
"success", "failure", "throttled" or "neutral".
Invariants: while closed `tripped` is False, and that is the only thing the hot path tests; each opening begins a new
generation, and what an attempt of an older generation reports is ignored; in half-open at most one probe is under way.
"""

from collections.abc import Callable

from sidecar.model.snapshot import CircuitBreaker

PROBE_LIMIT_S = 5.0
JITTER = 0.5  # an opening lasts up to this share longer
_BUCKETS = 10
_REQUESTS_MIN = 5  # below that a success rate says nothing
BEATEN_MIN = 7  # in a row, where fewer consecutive failures open: a hedge is no proof of a failure


class Breaker:
    """`tripped` and `generation` are read on the hot path; `failures` counts consecutive ones; `on_change`, where set,
    is told every change of state with its evidence."""

    __slots__ = (
        "_answers",
        "_beaten",
        "_open_s",
        "_open_until",
        "_probe_ends",
        "_rate",
        "_rnd",
        "config",
        "failures",
        "generation",
        "on_change",
        "tripped",
    )

    def __init__(self, config: CircuitBreaker, on_change: Callable[[str], None] | None = None) -> None:
        self.config = config
        self.on_change = on_change
        self.tripped = False
        self.generation = 0
        self.failures = 0
        self._beaten = self._answers = 0  # attempts beaten since the endpoint had given so many answers
        self._open_s = 0.0  # the present opening, without jitter; 0 while closed
        self._open_until = 0.0
        self._probe_ends: float | None = None  # None: no probe under way
        self._rnd: Callable[[], float] | None = None  # the last one given: a lapsed probe has nobody to bring one
        self._rate = _Rate() if config.success_rate is not None else None

    def configure(self, config: CircuitBreaker) -> None:
        """New limits; state, counters and the present opening stay."""
        self.config = config
        if config.success_rate is None:
            self._rate = None
        elif self._rate is None:
            self._rate = _Rate()

    # -- questions
    def allows(self, now: float) -> bool:
        """Whether a request may be sent: closed, or half-open without a probe under way."""
        if not self.tripped:
            return True
        if self._probe_ends is not None and not self._lapse(now):
            return False
        return now >= self._open_until

    def state(self, now: float) -> str:
        """closed, open or half-open."""
        if not self.tripped:
            return "closed"
        if self._probe_ends is not None and not self._lapse(now):
            return "half-open"
        return "half-open" if now >= self._open_until else "open"

    def probe_due(self, now: float) -> bool:
        """Re-opens if the probe under way is past its limit; True where it was."""
        return self._probe_ends is not None and self._lapse(now)

    # -- what happened
    def start_probe(self, now: float, limit_s: float) -> bool:
        """An endpoint that `allows` was picked. True: this request is the probe, to be judged within
        min(limit_s, 5 s), where `limit_s` is the try timeout."""
        if not self.tripped or not self.allows(now):
            return False
        self._probe_ends = now + min(limit_s, PROBE_LIMIT_S)
        self._tell("half-open: one request probes")
        return True

    def success(self, generation: int, now: float) -> None:
        if generation != self.generation:
            return
        if self.tripped:
            if self._judge(now):
                self._close()
            return
        self.failures = 0
        if self._rate is not None:
            self._rate.add(True, now)
            self._judge_rate(now)

    def failure(self, generation: int, now: float, rnd: Callable[[], float], what: str = "") -> None:
        """`what`: what failed, in a word, for the evidence."""
        if generation != self.generation:
            return
        self._rnd = rnd
        if self.tripped:
            if self._judge(now):
                self._open(now, f"the probe failed: {what}" if what else "the probe failed")
            return
        self.failures += 1
        if self._rate is not None:
            self._rate.add(False, now)
        if self.failures >= self.config.consecutive_failures:
            self._open(now, f"{self.failures} consecutive failures" + (f", the last {what}" if what else ""))
        else:
            self._judge_rate(now)

    def throttled(self, generation: int, now: float, rnd: Callable[[], float]) -> None:
        """429 or RESOURCE_EXHAUSTED: says nothing of consecutive failures, but the endpoint is not well either."""
        if generation != self.generation:
            return
        self._rnd = rnd
        if self.tripped:
            if self._judge(now):
                self._open(now, "the probe was throttled")
        elif self._rate is not None:
            self._rate.add(False, now)
            self._judge_rate(now)

    def beaten(self, generation: int, now: float, rnd: Callable[[], float], answers: int) -> None:
        """A hedge, sent later to another endpoint, has answered first. `answers`: the good ones that this endpoint has
        given so far. Without one in between it may hang, which nobody would learn where hedges hide it."""
        if generation != self.generation:
            return
        self._rnd = rnd
        if self.tripped:
            if self._judge(now):
                self._open(now, "the probe failed: a hedge was faster")
            return
        if answers != self._answers:
            self._answers, self._beaten = answers, 0
        self._beaten += 1
        if self._beaten >= max(self.config.consecutive_failures, BEATEN_MIN):
            found, self._beaten = self._beaten, 0
            self._open(now, f"hedges were faster {found} times in a row")

    def neutral(self, generation: int, now: float) -> None:
        """Nothing was learnt, for example because the caller went away: an abandoned probe makes room for another."""
        if generation == self.generation and self._judge(now):
            self._tell("half-open: the probe was abandoned")

    # -- steps
    def _judge(self, now: float) -> bool:
        """Ends the probe under way; False where there is none, or where time has already judged it."""
        if self._probe_ends is None or self._lapse(now):
            return False
        self._probe_ends = None
        return True

    def _lapse(self, now: float) -> bool:
        """Whether the probe under way is past its limit: then the breaker has been open again since that moment."""
        ends = self._probe_ends
        assert ends is not None
        if now < ends:
            return False
        self._probe_ends = None
        self._open(ends, "the probe was not answered in time")
        return True

    def _open(self, since: float, evidence: str) -> None:
        config = self.config
        again = self._open_s * 2.0 if self.tripped else config.open_for_s
        self._open_s = min(again, config.max_open_s)
        assert self._rnd is not None
        lasts_s = self._open_s * (1.0 + JITTER * self._rnd())
        self._open_until = since + lasts_s
        self.tripped = True
        self.generation += 1
        self._tell(f"open for {lasts_s:.3f} s: {evidence}")

    def _close(self) -> None:
        self.tripped = False
        self.failures = 0
        self._open_s = self._open_until = 0.0
        if self._rate is not None:
            self._rate = _Rate()
        self._tell("closed: the probe succeeded")

    def _judge_rate(self, now: float) -> None:
        rate, floor = self._rate, self.config.success_rate
        if rate is None or floor is None:
            return
        total = rate.successes + rate.failures
        # Under 100 % there was a failure in the window, and it has left its `rnd`.
        if total >= _REQUESTS_MIN and rate.failures and rate.successes * 100.0 < floor * total:
            self._open(now, f"success rate {rate.successes * 100.0 / total:.0f}% of {total} requests in 10 s")

    def _tell(self, text: str) -> None:
        if self.on_change is not None:
            self.on_change(text)


class _Rate:
    """Successes and failures of the last ten seconds, in ten one-second buckets."""

    __slots__ = ("_buckets", "_second", "failures", "successes")

    def __init__(self) -> None:
        self._buckets = [[0, 0] for _ in range(_BUCKETS)]
        self._second = 0
        self.successes = 0
        self.failures = 0

    def add(self, good: bool, now: float) -> None:
        second = int(now)
        if second > self._second:
            for stale in range(max(self._second + 1, second - _BUCKETS + 1), second + 1):
                bucket = self._buckets[stale % _BUCKETS]
                self.successes -= bucket[0]
                self.failures -= bucket[1]
                bucket[0] = bucket[1] = 0
            self._second = second
        bucket = self._buckets[self._second % _BUCKETS]
        if good:
            bucket[0] += 1
            self.successes += 1
        else:
            bucket[1] += 1
            self.failures += 1
