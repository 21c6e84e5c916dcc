"""Random histories of the decision modules against naive models that keep everything."""

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.model.snapshot import CircuitBreaker
from sidecar.policy.breaker import Breaker
from sidecar.policy.budget import Budget
from sidecar.policy.correlation import Correlation, Token
from sidecar.policy.ratelimit import TokenBucket

SETTINGS = settings(derandomize=True, max_examples=150, deadline=None, database=None)
STEPS = st.lists(st.tuples(st.sampled_from(["deposit", "withdraw"]), st.integers(0, 40)), max_size=120)


@SETTINGS
@given(STEPS, st.sampled_from([5.0, 20.0, 100.0]), st.integers(0, 2))
def test_budget(steps: list[tuple[str, int]], percent: float, min_per_second: int) -> None:
    """Times are in tenths of a second, so that the model's arithmetic is whole."""
    budget = Budget(percent, min_per_second, now=0.0)
    deposits: list[int] = []
    withdrawals: list[int] = []
    now = 0

    def recent(times: list[int]) -> int:
        return sum(now // 10 - time // 10 < 10 for time in times)

    for what, wait in steps:
        now += wait
        balance = min_per_second * 10 + recent(deposits) * percent / 100 - recent(withdrawals)
        assert abs(budget.balance(now / 10) - balance) < 1e-9
        if what == "deposit":
            budget.deposit(now / 10)
            deposits.append(now)
        elif budget.withdraw(now / 10):
            assert balance > 1 - 1e-6
            withdrawals.append(now)
        else:
            assert balance < 1 + 1e-6


def report(breaker: Breaker, what: str, generation: int, now: float) -> None:
    if what == "F":
        breaker.failure(generation, now, lambda: 0.5)
    elif what == "T":
        breaker.throttled(generation, now, lambda: 0.5)
    elif what == "N":
        breaker.neutral(generation, now)
    elif what == "P":
        breaker.probe_due(now)
    else:
        breaker.success(generation, now)


@SETTINGS
@given(st.lists(st.tuples(st.sampled_from("SFTNPR"), st.integers(0, 30)), max_size=150))
def test_breaker(steps: list[tuple[str, int]]) -> None:
    """Whatever happens: one probe at most, nothing sent while open, openings between open_for and 1.5 · max_open."""
    config = CircuitBreaker(consecutive_failures=3, open_for_s=1.0, max_open_s=8.0, success_rate=30.0)
    breaker = Breaker(config)
    sent: deque[int] = deque(maxlen=5)  # generations of attempts in flight, old ones among them
    now = 0.0
    opened_at = None
    probes: set[int] = set()
    for what, tenths in steps:
        now += tenths / 10
        allowed, state = breaker.allows(now), breaker.state(now)
        assert allowed == (state == "closed" or (state == "half-open" and breaker.start_probe(now, 2.0)))
        assert breaker.tripped == (state != "closed")
        if allowed:
            sent.append(breaker.generation)
            if state == "half-open":
                assert not breaker.allows(now) and not breaker.start_probe(now, 2.0)
                probes.add(breaker.generation)
        if not sent:
            continue
        generation = sent[0] if what == "R" else sent[-1]
        before, tripped = breaker.generation, breaker.tripped
        report(breaker, what, generation, now)
        assert breaker.generation - before in (0, 1)
        if tripped and not breaker.tripped:
            assert generation in probes, "only its own probe closes a breaker"
        if breaker.generation != before and what in "FT":
            opened_at = now
        if opened_at == now and breaker.state(now) == "open":
            assert not breaker.allows(now + 0.999)
            assert breaker.allows(now + 8.0 * 1.25 + 1e-6), "longer than the longest opening"


@SETTINGS
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("ELHX"), st.integers(0, 9)), max_size=100))
def test_correlation(steps: list[tuple[int, str, int]]) -> None:
    memory = Correlation()
    live: dict[int, list[Token]] = {trace: [] for trace in range(4)}
    for trace, what, number in steps:
        tokens = live[trace]
        name = str(trace)
        if what == "E":
            tokens.append(memory.enter(name, float(number), number % 3))
        elif what == "L" and tokens:
            memory.leave(tokens.pop(number % len(tokens)))
        elif what == "H" and tokens:
            memory.head_gone(tokens[number % len(tokens)])
        elif what == "X":
            memory.mark_exhausted(name)
            assert all(token.exhausted for token in tokens)
        wanted = (max(t.deadline for t in tokens), max(t.attempt for t in tokens)) if tokens else (float("inf"), 0)
        assert memory.lookup(name) == wanted
        assert memory.is_exhausted(name) == any(token.exhausted for token in tokens)
        assert len(memory) == sum(map(len, live.values()))


@SETTINGS
@given(
    st.lists(st.integers(0, 3000), max_size=200),
    st.integers(1, 50),
    st.sampled_from([0.5, 1.0, 60.0]),
    st.integers(1, 20),
)
def test_token_bucket(waits_ms: list[int], requests: int, per_s: float, burst: int) -> None:
    """In no window does more pass than burst + rate · length, and who waits as told is admitted."""
    bucket = TokenBucket(requests, per_s, burst)
    now = 1000.0
    passed: list[float] = []
    for wait_ms in waits_ms:
        now += wait_ms / 1000
        verdict = bucket.take(now)
        if verdict.allowed:
            assert verdict.retry_after_s == 0.0
            passed.append(now)
        else:
            assert verdict.remaining == 0 and verdict.retry_after_s > 0.0
            now += verdict.retry_after_s
            assert bucket.take(now).allowed
            passed.append(now)
    for first in range(0, len(passed), 7):
        for last in range(first, len(passed)):
            assert last - first + 1 <= burst + (passed[last] - passed[first]) * requests / per_s + 1e-3
