"""Deadline, attempt and exhaustion across the application."""

import math

from sidecar.policy.correlation import Correlation


def test_one_in_flight_is_inherited_until_it_ends() -> None:
    memory = Correlation()
    token = memory.enter(b"t", 12.5, 1)
    assert memory.lookup(b"t") == (12.5, 1) and b"t" in memory
    assert memory.lookup(b"other") == (math.inf, 0) and b"other" not in memory
    memory.leave(token)
    assert memory.lookup(b"t") == (math.inf, 0) and b"t" not in memory
    assert len(memory) == 0


def test_with_several_in_flight_the_latest_deadline_and_the_highest_attempt_hold() -> None:
    memory = Correlation()
    first = memory.enter("t", 10.0, 2)
    second = memory.enter("t", 30.0, 0)
    third = memory.enter("t", 20.0, 1)
    assert memory.lookup("t") == (30.0, 2)
    memory.leave(first)
    assert memory.lookup("t") == (30.0, 1)
    memory.leave(second)
    assert memory.lookup("t") == (20.0, 1)
    memory.leave(third)
    assert memory.lookup("t") == (math.inf, 0)
    assert len(memory) == 0


def test_they_may_end_in_any_order_and_more_than_once() -> None:
    for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
        memory = Correlation()
        tokens = [memory.enter("t", float(n), n) for n in range(3)]
        left = {0, 1, 2}
        for index in order:
            memory.leave(tokens[index])
            memory.leave(tokens[index])
            left.discard(index)
            assert memory.lookup("t") == ((float(max(left)), max(left)) if left else (math.inf, 0))
        assert len(memory) == 0


def test_the_deadline_goes_with_the_response_head_and_the_attempt_stays() -> None:
    memory = Correlation()
    token = memory.enter(b"t", 10.0, 1)
    memory.head_gone(token)
    assert memory.lookup(b"t") == (math.inf, 1)


def test_exhaustion_marks_every_request_in_flight_and_ends_with_it() -> None:
    memory = Correlation()
    first, second = memory.enter("t", 1.0, 0), memory.enter("t", 1.0, 0)
    assert not memory.is_exhausted("t")
    memory.mark_exhausted("t")
    assert memory.is_exhausted("t") and first.exhausted and second.exhausted
    later = memory.enter("t", 1.0, 0)
    memory.leave(first)
    memory.leave(second)
    assert not memory.is_exhausted("t") and not later.exhausted
    memory.mark_exhausted("nobody")
    assert not memory.is_exhausted("nobody")


def test_what_does_not_fit_is_not_inherited() -> None:
    memory = Correlation(entries_max=2)
    tokens = [memory.enter(str(n), 1.0, n) for n in range(3)]
    assert len(memory) == 2 and memory.dropped == 1
    assert memory.lookup("2") == (math.inf, 0)
    for token in tokens:
        memory.leave(token)
    assert len(memory) == 0
    memory.enter("3", 1.0, 3)
    assert memory.lookup("3") == (1.0, 3)


def test_one_trace_id_cannot_fill_the_memory() -> None:
    memory = Correlation()
    tokens = [memory.enter("t", 1.0, 0) for _ in range(1000)]
    assert len(memory) == 64 and memory.dropped == 936
    for token in reversed(tokens):
        memory.leave(token)
    assert len(memory) == 0 and memory.lookup("t") == (math.inf, 0)
