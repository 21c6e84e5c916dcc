"""The embedded store's process is killed at random moments: nothing acknowledged is lost."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest
from support.store_writer import BOUNDS, WRITERS

from control_plane.store.base import Compacted
from control_plane.store.database import SHIFT, Database

KILLS = 40
KILLS_LONG = 1000


@dataclass
class Acknowledged:
    """What the writers were told, over all rounds."""

    revision: int = 0
    numbers: dict[int, tuple[int, int]] = field(default_factory=dict)  # by writer: its last number, and the revision
    count: int = 0
    found: dict[int, int] = field(default_factory=dict)  # by writer: the number that the last check found

    def take(self, line: str) -> None:
        writer, number, revision = (int(part) for part in line.split()[1:])
        last = self.numbers.get(writer, (0, 0))
        assert number > last[0] and revision > last[1]
        self.numbers[writer] = (number, revision)
        self.revision = max(self.revision, revision)
        self.count += 1


class Writer:
    def __init__(self) -> None:
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.store_writer"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def round(self, path: Path, chance: random.Random, acknowledged: Acknowledged) -> None:
        """Write, be killed, and take every acknowledgement that was said before that."""
        sent, said = self.process.stdin, self.process.stdout
        assert sent and said
        sent.write(f"{path} {chance.randrange(10**6)}\n")
        kind, number = said.readline().split()
        assert kind == "pid"
        for _ in range(chance.choice((0, 0, 1, 5, 20, 60))):
            acknowledged.take(_line(said))
        time.sleep(chance.random() * 0.004)  # at any point of the commits that follow
        os.kill(int(number), signal.SIGKILL)
        while (line := _line(said)) != "dead":
            acknowledged.take(line)

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


def _line(said: IO[str]) -> str:
    line = said.readline()
    assert line, "the writer ended by itself"
    return line.rstrip("\n")


@pytest.fixture
def writer() -> Iterator[Writer]:
    writer = Writer()
    yield writer
    writer.close()


def check(path: Path, acknowledged: Acknowledged) -> int:
    """The store is whole and has all that was acknowledged; its revision."""
    database = Database(path, BOUNDS)
    try:
        view = database.read("")
        assert view.revision == database.revision >= acknowledged.revision
        for writer in range(WRITERS):
            number, revision = acknowledged.numbers.get(writer, (0, 0))
            pair = [view.entries.get(f"w/{writer}/{name}") for name in "ab"]
            if not pair[0] or not pair[1]:
                assert pair == [None, None] and not number
                continue
            assert pair[0].value == pair[1].value and pair[0].revision == pair[1].revision  # never half of it
            assert int(pair[0].value) >= number and pair[0].revision >= revision
            found = int(pair[0].value)
            # Each writer has one commit under way when it is killed: that one may have happened.
            assert acknowledged.found.get(writer, 0) <= found <= max(number, acknowledged.found.get(writer, 0)) + 1
            acknowledged.found[writer] = found
        _check_history(database)
    finally:
        database.close()
    return view.revision


def _check_history(database: Database) -> None:
    """It is whole from the compacted revision on, and leads to what is there now."""
    with pytest.raises(Compacted):
        database.changes("", database.compacted - 2, database.revision, 1, 1)
    reached, events = database.changes("", database.compacted - 1, database.revision, 10**6, 10**9)
    assert reached == database.revision
    revisions = [row >> SHIFT for (row,) in database._connection.execute("SELECT id FROM history ORDER BY id")]
    assert sorted(set(revisions)) == list(range(max(2, database.compacted), database.revision + 1))
    entries = database.read("").entries
    last = {event.key: event.entry for event in events}
    assert {key: entries.get(key) for key in last} == last


def run(writer: Writer, path: Path, kills: int, seed: int) -> Acknowledged:
    chance = random.Random(seed)
    acknowledged = Acknowledged()
    revision = 0
    for _ in range(kills):
        writer.round(path, chance, acknowledged)
        if path.exists() or acknowledged.count:  # else it was killed before it made the file
            now = check(path, acknowledged)
            assert now >= revision
            revision = now
    return acknowledged


def test_killed_at_random(writer: Writer, tmp_path: Path) -> None:
    acknowledged = run(writer, tmp_path / "store.db", KILLS, seed=1)
    assert acknowledged.count > KILLS


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 6))
def test_killed_at_random_many_times(writer: Writer, tmp_path: Path, seed: int) -> None:
    run(writer, tmp_path / "store.db", KILLS_LONG // 4, seed)


def test_a_log_that_was_cut_off_loses_only_its_end(writer: Writer, tmp_path: Path) -> None:
    """As a power failure leaves it: the tail of the write-ahead log is missing or nonsense. What is left is a state
    that was there once, as a whole."""
    chance = random.Random(9)
    path = tmp_path / "store.db"
    acknowledged = Acknowledged()
    for _ in range(6):
        writer.round(path, chance, acknowledged)
    log = path.with_name("store.db-wal")
    data = log.read_bytes()
    revisions = []
    for number in range(12):
        copy = tmp_path / str(number) / "store.db"
        copy.parent.mkdir()
        shutil.copy(path, copy)
        cut = chance.randrange(len(data))
        rest = chance.choice((b"", bytes(len(data) - cut), chance.randbytes(len(data) - cut)))
        copy.with_name("store.db-wal").write_bytes(data[:cut] + rest)
        database = Database(copy, BOUNDS)
        try:
            view = database.read("")
            assert view.revision == database.revision
            for each in range(WRITERS):
                pair = {view.entries[key].value for key in (f"w/{each}/a", f"w/{each}/b") if key in view.entries}
                assert len(pair) <= 1
            _check_history(database)
        finally:
            database.close()
        revisions.append(view.revision)
    assert len(set(revisions)) > 3
    assert max(revisions) <= check(path, acknowledged)
