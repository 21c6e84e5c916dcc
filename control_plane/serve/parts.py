"""Many operations in transactions that the store takes."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from control_plane.store.base import OPERATIONS_MAX, TRANSACTION_BYTES_MAX, Operation, Put

BATCH, BATCH_BYTES_MAX = OPERATIONS_MAX // 2, TRANSACTION_BYTES_MAX // 2

AnyOperation = TypeVar("AnyOperation", Put, Operation)


def batches(operations: Sequence[AnyOperation]) -> Iterator[Sequence[AnyOperation]]:
    """In parts that each fit into a transaction, together with a compare for each key."""
    part: list[AnyOperation] = []
    size = 0
    for each in operations:
        bytes_ = 2 * len(each.key) + (len(each.value) if isinstance(each, Put) else 0)
        if part and (len(part) == BATCH or size + bytes_ > BATCH_BYTES_MAX):
            yield part
            part, size = [], 0
        part.append(each)
        size += bytes_
    if part:
        yield part
