"""Deadlines that cost a warm exchange one attribute write.

A Timer's `due` may be moved later, or switched off, by assignment alone: its entry in the heap is looked at again only
when its old time comes. Only an earlier time pushes. One task sleeps in one movable cancel scope.
Must not know what a deadline is for. The clock is an argument, so virtual time works throughout.
Invariants: a timer fires at most once for each `set`, never before its `due`; a closed timer holds no reference to its
owner; entries that can no longer fire are at most half of the heap (or `COMPACT_MIN`).
"""

import heapq
import math
from collections.abc import Callable
from itertools import count
from typing import Any

import trio

OFF = math.inf
COMPACT_MIN = 64
FIRES_PER_TURN = 64  # expired timers that fire before the rest of Trio has its turn

_ids = count()


class Timer:
    """One deadline of one owner. Assign `due` to move it later or to OFF; use `set` where it may become earlier."""

    __slots__ = ("due", "fire", "listed", "timers")

    def __init__(self, timers: "Timers", fire: Callable[[], object]) -> None:
        self.timers = timers
        self.fire: Callable[[], object] | None = fire
        self.due = OFF
        self.listed = OFF  # the time of this timer's valid entry in the heap

    def set(self, due: float) -> None:
        self.due = due
        if due < self.listed:
            self.timers.push(self, due)

    def off(self) -> None:
        self.due = OFF

    def close(self) -> None:
        """For good. The heap keeps this small object until its entry's time or the next compaction, the owner not."""
        self.due = OFF
        if self.fire is not None:
            self.fire = None
            if self.listed != OFF:
                self.listed = OFF
                self.timers.buried()


class Timers:
    """`clock` gives seconds; `call` runs a callback with exceptions contained (Reactor.call, or a plain lambda)."""

    def __init__(self, clock: Callable[[], float], call: Callable[..., Any]) -> None:
        self.clock = clock
        self.call = call
        self.heap: list[tuple[float, int, Timer]] = []
        self.dead = 0  # entries of the heap that are not their timer's valid one
        self.scope: trio.CancelScope | None = None

    def push(self, timer: Timer, due: float) -> None:
        if timer.fire is None:
            raise RuntimeError("a closed timer cannot be set")
        if timer.listed != OFF:
            self.dead += 1  # superseded by the entry below
        timer.listed = due
        heapq.heappush(self.heap, (due, next(_ids), timer))
        if self.dead * 2 > len(self.heap):
            self._compact()
        if self.scope is not None and due <= self.heap[0][0]:  # not "is it this timer's": that may be a dead entry
            self.scope.deadline = trio.current_time() + due - self.clock()

    def buried(self) -> None:
        """One more valid entry has died with its timer."""
        self.dead += 1
        if self.dead * 2 > len(self.heap):
            self._compact()

    def _compact(self) -> None:
        if len(self.heap) <= COMPACT_MIN:
            return
        self.heap[:] = [entry for entry in self.heap if entry[0] == entry[2].listed]
        heapq.heapify(self.heap)
        self.dead = 0

    def fire_due(self) -> bool:
        """Fire what is due, at most FIRES_PER_TURN of it; True when more may be due."""
        heap, now = self.heap, self.clock()
        for _ in range(FIRES_PER_TURN):
            if not heap or heap[0][0] > now:
                return False
            at, _id, timer = heapq.heappop(heap)
            if at != timer.listed:
                self.dead -= 1
                continue
            timer.listed = OFF
            if timer.due <= now:
                timer.due = OFF
                if timer.fire is not None:
                    self.call(timer.fire)
            elif timer.due != OFF:
                self.push(timer, timer.due)
        return True

    async def run(self) -> None:
        while True:
            if self.fire_due():
                await trio.lowlevel.checkpoint()
                continue
            wait = self.heap[0][0] - self.clock() if self.heap else OFF
            with trio.CancelScope(deadline=trio.current_time() + wait) as self.scope:
                await trio.sleep_forever()
            self.scope = None
