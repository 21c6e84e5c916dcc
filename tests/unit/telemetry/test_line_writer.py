"""The writing thread, on real pipes and files: whatever the reader does, nothing waits and every loss is counted.

The thread is real, so these tests wait for what happens (a read, the thread's end), never for time to pass."""

import fcntl
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.telemetry.writer import LineWriter, Sink, SinkError


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    for fd in (reading, writing):
        try:
            os.close(fd)
        except OSError:
            pass


def drain(fd: int) -> bytes:
    """Everything up to the end of the pipe; the writing end must be closed."""
    parts = []
    while part := os.read(fd, 65_536):
        parts.append(part)
    return b"".join(parts)


def line(number: int) -> bytes:
    return b"line %d\n" % number


def test_lines_arrive_in_order(pipe: tuple[int, int]) -> None:
    writer = LineWriter(Sink(pipe[1]), line, name="t")
    for number in range(3000):
        writer.put(number)
    assert writer.close(10)
    os.close(pipe[1])
    assert drain(pipe[0]) == b"".join(map(line, range(3000)))
    assert (writer.dropped, writer.lost) == (0, 0)


def test_a_line_comes_without_waiting_for_the_end(pipe: tuple[int, int]) -> None:
    writer = LineWriter(Sink(pipe[1]), line, name="t", linger_s=0.001)
    for number in range(20):  # each time the thread has gone to sleep
        writer.put(number)
        assert os.read(pipe[0], 100) == line(number)
    assert writer.close()


def test_a_full_pipe_that_nobody_reads_neither_blocks_nor_hangs_the_end(pipe: tuple[int, int]) -> None:
    writer: LineWriter[bytes] = LineWriter(Sink(pipe[1]), bytes, name="t", queue_max=100)
    sent = 0
    while not writer.dropped:  # fills the pipe (64 KiB), then the queue
        writer.put(b"x" * 4095 + b"\n")
        sent += 1
    begun = time.monotonic()
    assert not writer.close(0.2)
    assert time.monotonic() - begun < 1
    assert not writer._thread.is_alive()
    os.close(pipe[1])
    assert drain(pipe[0]).count(b"\n") + writer.dropped + writer.lost == sent
    writer.put(b"after the end")
    assert writer.dropped


def test_writing_goes_on_when_the_reader_comes_back(pipe: tuple[int, int]) -> None:
    writer: LineWriter[bytes] = LineWriter(
        Sink(pipe[1]), bytes, name="t", queue_max=50, note=lambda n: b"%d dropped\n" % n
    )
    put = 0
    while writer.dropped < 3:
        writer.put(b"x" * 1000 + b"\n")
        put += 1
    received = bytearray()
    while b"dropped" not in received:
        received += os.read(pipe[0], 65_536)
        if not writer.queue:
            writer.put(b"more\n")
            put += 1
    assert writer.close(10)
    os.close(pipe[1])
    received += drain(pipe[0])
    kept = [each for each in received.splitlines() if not each.endswith(b"dropped")]
    noted = sum(int(each.split()[0]) for each in received.splitlines() if each.endswith(b"dropped"))
    assert len(kept) + writer.dropped == put
    assert noted == writer.dropped


def test_a_reader_that_goes_away_costs_lines_only(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    writer = LineWriter(Sink(pipe[1]), line, name="t")
    for number in range(10):
        writer.put(number)
    assert not writer.close()
    assert writer.lost == 10


def test_a_closed_descriptor_costs_lines_only() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    sink = Sink(writing)
    os.close(writing)
    writer = LineWriter(sink, line, name="t")
    writer.put(1)
    assert not writer.close()
    assert writer.lost == 1


def test_a_descriptor_that_somebody_made_non_blocking_is_waited_for(pipe: tuple[int, int]) -> None:
    flags = fcntl.fcntl(pipe[1], fcntl.F_GETFL)
    fcntl.fcntl(pipe[1], fcntl.F_SETFL, flags | os.O_NONBLOCK)
    writer: LineWriter[bytes] = LineWriter(Sink(pipe[1]), bytes, name="t")
    long = b"y" * 20_000 + b"\n"
    parts: list[bytes] = []
    reader = threading.Thread(target=lambda: parts.append(drain(pipe[0])))
    reader.start()
    for _ in range(20):
        writer.put(long)
    assert writer.close(10)
    os.close(pipe[1])
    reader.join()
    assert parts[0] == long * 20


def test_an_item_that_cannot_be_rendered_is_one_line_less(pipe: tuple[int, int]) -> None:
    writer: LineWriter[int] = LineWriter(Sink(pipe[1]), lambda n: b"%d\n" % (1 // n), name="t")
    for number in (1, 0, 1):
        writer.put(number)
    assert not writer.close()
    os.close(pipe[1])
    assert drain(pipe[0]) == b"1\n1\n"
    assert writer.lost == 1


def test_a_file_is_appended_to_and_reopened(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    path.write_bytes(b"before\n")
    writer = LineWriter(Sink(str(path)), line, name="t")
    writer.put(1)
    while path.read_bytes() != b"before\nline 1\n":
        pass
    path.rename(tmp_path / "access.log.1")
    writer.reopen()
    while not path.exists():
        pass
    writer.put(2)
    assert writer.close()
    assert path.read_bytes() == b"line 2\n"
    assert stat.S_IMODE(path.stat().st_mode) & 0o007 == 0


def test_a_file_is_reopened_though_the_queue_never_empties(tmp_path: Path) -> None:
    path = tmp_path / "log"
    writer: LineWriter[bytes] = LineWriter(Sink(str(path)), bytes, name="t", queue_max=100)
    path.rename(tmp_path / "log.1")
    writer.reopen()
    put = 0
    while not path.exists():
        writer.put(b"x" * 1000 + b"\n")
        put += 1
    assert writer.close(10)
    written = sum(file.read_bytes().count(b"\n") for file in tmp_path.iterdir())
    assert written + writer.dropped == put


def test_a_reopening_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    writer = LineWriter(Sink(str(folder / "log")), line, name="t")
    folder.rename(tmp_path / "moved")
    writer.reopen()
    while not writer.lost:
        pass
    writer.put(1)
    writer.close()
    assert (tmp_path / "moved" / "log").read_bytes() == b"line 1\n"


def test_a_line_that_was_cut_by_a_failure_does_not_spoil_the_next_one() -> None:
    reading, writing = os.pipe()
    writer: LineWriter[bytes] = LineWriter(Sink(writing), bytes, name="t")
    assert writer.close()
    real, results = os.write, [3, None]

    def write(fd: int, data: bytes) -> int:
        result = results.pop(0) if results else -1
        if result is None:
            raise OSError(28, "No space left on device")
        return real(fd, data[:result] if result >= 0 else data)

    writer._give_up_s = float("inf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", write)
        writer._write([b"first\n", b"second\n"])
        writer._write([b"third\n"])
        writer._write([b"fourth\n"])
    os.close(writing)
    assert drain(reading) == b"fir\nthird\nfourth\n"
    assert writer.lost == 2
    os.close(reading)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(SinkError, match=r"cannot open .*/no/such/file for writing: No such file"):
        Sink(str(tmp_path / "no/such/file"))


def test_a_fifo_that_nobody_reads_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SinkError, match="No such device"):
        Sink(str(tmp_path / "fifo"))


def test_a_process_whose_output_nobody_reads_ends_in_time() -> None:
    program = (
        "import sys\n"
        "from sidecar.telemetry.writer import LineWriter, Sink\n"
        "writer = LineWriter(Sink(1), bytes, name='t')\n"
        "while not writer.dropped: writer.put(b'x' * 1000 + b'\\n')\n"
        "sys.exit(3 if not writer.close(0.2) else 0)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.wait(20) == 3
        assert process.stdout is not None
        assert process.stdout.read(5) == b"xxxxx"
