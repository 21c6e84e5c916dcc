"""The same Exchange driven by a Trio task on memory streams: exact times, no socket, no real second."""

import trio
from support.memory_exchange import EVERYTHING, MemoryNetwork, at_rest, drive, make_cluster, make_exchange, make_plan

from sidecar.model.snapshot import CircuitBreaker, Retry, Timeouts
from sidecar.policy.exchange import ANSWER, RELAY, Do, Exchange
from sidecar.policy.outcome import Outcome

OK, DOWN = b"HTTP/1.1 200 x", b"HTTP/1.1 503 x"
ON_503 = frozenset({503})


Run = tuple[Do, float, MemoryNetwork, Exchange]


async def run(answers: list, retry: Retry, timeouts: Timeouts = Timeouts()) -> Run:  # noqa: B008
    network = MemoryNetwork(answers)
    started = trio.current_time()
    ex = make_exchange(make_plan(make_cluster(retry=retry), timeouts, retry), now=started, rnd=lambda: 0.5)
    do = await drive(ex, network.dial)
    assert at_rest(ex.cluster)
    return do, round(trio.current_time() - started, 6), network, ex


async def test_two_back_offs_then_success(autojump_clock):
    retry = Retry(max_retries=2, statuses=ON_503, base_s=1.0, max_s=10.0)
    do, took, network, ex = await run([DOWN, OSError(), OK], retry)
    assert do is RELAY and ex.status == 200 and took == 0.5 + 1.0
    assert [at for at, _ in network.seen] == [0.0, 0.5, 1.5]
    assert network.seen[0][1] != network.seen[1][1]
    assert ex.cluster.retries == 2 and ex.cluster.attempts == 3


async def test_try_timeouts_back_off_and_what_is_left(autojump_clock):
    retry = Retry(max_retries=5, failures=EVERYTHING, base_s=2.0, max_s=2.0)
    do, took, network, ex = await run([None] * 3, retry, Timeouts(total_s=12.0, try_s=4.0))
    assert do is ANSWER and ex.outcome is Outcome.TIMEOUT_TOTAL and took == 12.0
    assert [at for at, _ in network.seen] == [0.0, 5.0, 10.0]


async def test_slow_connections_are_within_the_try(autojump_clock):
    do, took, _, ex = await run([(9.0, OK)], Retry(), Timeouts(total_s=30.0, try_s=4.0))
    assert do is ANSWER and ex.outcome is Outcome.TIMEOUT_TRY and took == 4.0


async def test_a_connection_that_closes_without_a_word_is_a_reset(autojump_clock):
    do, took, _, ex = await run([b"", b""], Retry(base_s=1.0))
    assert do is ANSWER and ex.outcome is Outcome.UPSTREAM_RESET and took == 0.125  # max is 0.25


async def test_the_last_response_comes_now_if_waiting_is_useless(autojump_clock):
    retry = Retry(max_retries=9, statuses=ON_503, base_s=4.0, max_s=40.0)
    do, took, _, ex = await run([DOWN] * 3, retry, Timeouts(total_s=9.0))
    assert do is RELAY and ex.status == 503 and took == 6.0  # 2 + 4; another 8 would pass the 9
    assert not ex.exhausted


async def test_the_breaker_over_time(autojump_clock):
    """Fails twice, opens for 1 s; the probe fails, opens for 2 s; the next probe closes."""
    retry = Retry(max_retries=0)
    cluster = make_cluster(endpoints=1, retry=retry, breaker=CircuitBreaker(consecutive_failures=2, open_for_s=1.0))
    plan = make_plan(cluster, retry=retry)
    network = MemoryNetwork([DOWN, DOWN, DOWN, OK] + [OK] * 20)
    results = []
    for _ in range(20):  # every 250 ms
        ex = make_exchange(plan, now=trio.current_time())
        await drive(ex, network.dial)
        results.append("circuit" if ex.outcome is Outcome.CIRCUIT_OPEN else ex.status)
        await trio.sleep(0.25)
    opened_1, opened_2 = ["circuit"] * 3, ["circuit"] * 7
    assert results == [503, 503, *opened_1, 503, *opened_2, *[200] * 7]
    assert at_rest(cluster)
