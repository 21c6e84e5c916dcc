"""The queue of a connection that pipelines a lot: parsed requests weigh some fifty times their bytes.

Whoever takes the last one has more read, out of what is still raw. Must not know how. Never compiled: a subclass of
`deque` cannot be.
"""

from collections import deque
from collections.abc import Callable, Iterable

from .http1_message import Message


class Backlog(deque[Message]):
    """`read_on` fills it again."""

    __slots__ = ("_read_on",)

    def __init__(self, read_on: Callable[[], None], messages: Iterable[Message]) -> None:
        super().__init__(messages)
        self._read_on = read_on

    def popleft(self) -> Message:
        m = super().popleft()
        if not self:
            self._read_on()
        return m
