"""A process that commits to an embedded store and says what was acknowledged, to be killed at any moment.

It loads everything once and then forks for each round, so that a round costs milliseconds: for each line on stdin,
`PATH SEED`, a child writes to that store and prints `pid N` first, and `ack WRITER NUMBER REVISION` after each commit
that returned. Each writer W commits, again and again and together: `w/W/a` and `w/W/b` with the same NUMBER, and one
of its other keys put or deleted; by compare-and-set, so that a lost commit would show as a conflict. When the child is
dead the process prints `dead`.
"""

import os
import random
import sys
from pathlib import Path

import trio

from control_plane.store.base import Compare, Delete, Operation, Put
from control_plane.store.database import Bounds
from control_plane.store.embedded import EmbeddedStore

WRITERS = 4
BOUNDS = Bounds(history_rows_max=300)  # so that compaction is at work too


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")


async def write(store: EmbeddedStore, writer: int, chance: random.Random) -> None:
    entry = await store.get(f"w/{writer}/a")
    number, revision = (int(entry.value), entry.revision) if entry else (0, 0)
    while True:
        number += 1
        text = str(number).encode()
        key = f"w/{writer}/x{chance.randrange(5)}"
        other: Operation = Delete(key) if chance.random() < 0.3 else Put(key, text * chance.randrange(1, 3000))
        revision = await store.commit(
            [Put(f"w/{writer}/a", text), Put(f"w/{writer}/b", text), other], [Compare(f"w/{writer}/a", revision)]
        )
        say(f"ack {writer} {number} {revision}")


async def main(path: Path, seed: int) -> None:
    chance = random.Random(seed)
    async with trio.open_nursery() as nursery:
        store = await EmbeddedStore.open(path, nursery, bounds=BOUNDS)
        for writer in range(WRITERS):
            nursery.start_soon(write, store, writer, chance)


if __name__ == "__main__":
    for line in iter(sys.stdin.readline, ""):
        path, seed = line.split()
        child = os.fork()
        if not child:
            say(f"pid {os.getpid()}")
            trio.run(main, Path(path), int(seed))
        os.waitpid(child, 0)
        say("dead")
