"""Replay buffers: the bytes of a request body that are kept so that the request can be sent again.

Each holds up to 64 KiB; together they hold up to 8 MiB. A body that does not fit is simply not replayable. Must not
know requests or connections. Invariants: a buffer is whole or lost, never a part; what a buffer takes from the pool it
gives back exactly once.
"""

BUFFER_BYTES_MAX = 64 * 1024
POOL_BYTES_MAX = 8 * 1024 * 1024


class ReplayPool:
    """What all replay buffers of a sidecar hold together. `refused` counts bodies that found it full."""

    __slots__ = ("bytes_held", "bytes_max", "refused")

    def __init__(self, total_bytes_max: int = POOL_BYTES_MAX) -> None:
        self.bytes_max = total_bytes_max
        self.bytes_held = 0
        self.refused = 0

    def buffer(self, bytes_max: int = BUFFER_BYTES_MAX) -> "ReplayBuffer":
        return ReplayBuffer(self, bytes_max)


class ReplayBuffer:
    """One body. `chunks` are its bytes so far in order; `lost`: a byte was discarded, the body cannot be sent again."""

    __slots__ = ("_pool", "bytes_held", "bytes_max", "chunks", "lost")

    def __init__(self, pool: ReplayPool, bytes_max: int = BUFFER_BYTES_MAX) -> None:
        self._pool = pool
        self.bytes_max = bytes_max
        self.bytes_held = 0
        self.chunks: list[bytes] = []
        self.lost = False

    @property
    def room(self) -> int:
        """How many bytes may still come without losing the buffer: while nothing has been sent, reading stops there."""
        if self.lost:
            return 0
        return min(self.bytes_max - self.bytes_held, self._pool.bytes_max - self._pool.bytes_held)

    def add(self, data: bytes) -> bool:
        """Keeps `data`. False: it does not fit, and the whole buffer has been given up."""
        if self.lost:
            return False
        size = len(data)
        pool = self._pool
        full = pool.bytes_held + size > pool.bytes_max
        if full or self.bytes_held + size > self.bytes_max:
            if full:
                pool.refused += 1
            self.release()
            return False
        pool.bytes_held += size
        self.bytes_held += size
        self.chunks.append(data)
        return True

    def release(self) -> None:
        """Gives everything back: the request has been answered, or will not be sent again. Any number of times."""
        self._pool.bytes_held -= self.bytes_held
        self.bytes_held = 0
        self.chunks = []
        self.lost = True
