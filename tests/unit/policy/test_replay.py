"""Replay buffers: whole or lost, and never more than the pool."""

from sidecar.policy.replay import BUFFER_BYTES_MAX, POOL_BYTES_MAX, ReplayPool


def test_a_buffer_keeps_up_to_64_kib() -> None:
    buffer = ReplayPool().buffer()
    assert buffer.room == BUFFER_BYTES_MAX == 65_536
    assert buffer.add(b"x" * 65_535) and buffer.room == 1
    assert buffer.add(b"y") and buffer.room == 0
    assert b"".join(buffer.chunks) == b"x" * 65_535 + b"y"
    assert not buffer.lost


def test_one_byte_more_loses_all_of_it_and_gives_it_back() -> None:
    pool = ReplayPool()
    buffer = pool.buffer()
    assert buffer.add(b"x" * 65_536)
    assert pool.bytes_held == 65_536
    assert not buffer.add(b"y")
    assert buffer.lost and buffer.chunks == [] and buffer.room == 0
    assert pool.bytes_held == 0 and pool.refused == 0
    assert not buffer.add(b"z")
    assert pool.bytes_held == 0


def test_all_buffers_share_8_mib() -> None:
    pool = ReplayPool()
    assert pool.bytes_max == POOL_BYTES_MAX == 8 * 1024 * 1024
    buffers = [pool.buffer() for _ in range(129)]
    assert [b.add(b"x" * 65_536) for b in buffers] == [True] * 128 + [False]
    assert pool.refused == 1 and buffers[-1].lost
    buffers[0].release()
    late = pool.buffer()
    assert late.room == 65_536 and late.add(b"x" * 65_536)


def test_room_is_also_bounded_by_the_pool() -> None:
    pool = ReplayPool(total_bytes_max=100)
    first, second = pool.buffer(), pool.buffer()
    assert first.add(b"x" * 60)
    assert second.room == 40


def test_release_is_idempotent() -> None:
    pool = ReplayPool()
    buffer = pool.buffer()
    assert buffer.add(b"abc")
    buffer.release()
    buffer.release()
    assert pool.bytes_held == 0 and buffer.lost
