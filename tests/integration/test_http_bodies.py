"""Large bodies through two live sidecars: streamed under back-pressure, with memory that stays flat."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.mesh import Conn, Mesh, Pair, Response, response_bytes, until

MIB = 1024 * 1024
PIECE = bytes(range(256)) * 4096  # 1 MiB
GROWTH_BYTES_MAX = 16 * MIB
FAULTS_MAX = 100  # a MiB; some hundreds where each burst gives its memory back to the kernel


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Mesh(tmp_path_factory.mktemp("bodies")) as mesh:
        yield Pair(mesh)


@pytest.fixture(autouse=True)
def _clean(pair: Pair) -> Iterator[None]:
    pair.fresh()
    yield
    assert pair.web.crashes == 0 and pair.reviews.crashes == 0


class Memory:
    """The highest resident memory of both sidecars, sampled, above what it was at the beginning."""

    def __init__(self, pair: Pair) -> None:
        self.sidecars = (pair.web, pair.reviews)
        self.before = [sidecar.resident_bytes() for sidecar in self.sidecars]
        self.highest = list(self.before)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._sample)

    def __enter__(self) -> "Memory":
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.stop.wait(0.02):
            self.highest = [
                max(high, sidecar.resident_bytes()) for high, sidecar in zip(self.highest, self.sidecars, strict=True)
            ]

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def check(self) -> None:
        growth = [high - before for high, before in zip(self.highest, self.before, strict=True)]
        assert max(growth) < GROWTH_BYTES_MAX, growth


@pytest.mark.parametrize("chunked", [False, True])
def test_a_long_body_uses_the_same_memory_again(tmp_path: Path, chunked: bool) -> None:
    """In fresh processes: what a heap has been through is what decides."""
    with Mesh(tmp_path) as mesh:
        pair = Pair(mesh)
        pair.fresh()
        pair.app.script = source
        before = [sidecar.page_faults() for sidecar in (pair.web, pair.reviews)]
        assert download(pair, 32, chunked) == 32 * MIB
        after = [sidecar.page_faults() for sidecar in (pair.web, pair.reviews)]
        assert max(b - a for a, b in zip(before, after, strict=True)) < 32 * FAULTS_MAX, (before, after)


def sink(conn: Conn) -> None:
    """Reads a counted or chunked body without keeping it, and says how long it was."""
    while True:
        request = conn.head_of_request()
        length = request.header("content-length")
        total = int(length or 0)
        if length is not None:
            conn.reader.discard(total)
        else:
            while size := int(conn.reader.until(b"\r\n"), 16):
                conn.reader.discard(size + 2)
                total += size
            conn.reader.discard(2)
        conn.reply(200, b"%d" % total)


def source(conn: Conn) -> None:
    """Sends as many MiB as the target says, chunked where it says so."""
    while True:
        target = conn.take().target.decode()
        count = int(target.split("/")[-1])
        if "chunked" in target:
            conn.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(count):
                conn.send(b"100000\r\n" + PIECE + b"\r\n")
            conn.send(b"0\r\n\r\n")
        else:
            conn.send(f"HTTP/1.1 200 OK\r\nContent-Length: {count * MIB}\r\n\r\n".encode())
            for _ in range(count):
                conn.send(PIECE)


def upload(pair: Pair, count: int, chunked: bool) -> Response:
    with pair.client() as client:
        if chunked:
            client.send(b"PUT /up HTTP/1.1\r\nHost: reviews\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(count):
                client.send(b"100000\r\n" + PIECE + b"\r\n")
            client.send(b"0\r\n\r\n")
        else:
            client.send(f"PUT /up HTTP/1.1\r\nHost: reviews\r\nContent-Length: {count * MIB}\r\n\r\n".encode())
            for _ in range(count):
                client.send(PIECE)
        return client.response("PUT")


def download(pair: Pair, count: int, chunked: bool) -> int:
    """The bytes received."""
    with pair.client() as client:
        client.request("GET", f"/{'chunked' if chunked else 'counted'}/{count}")
        response = client.response(body=False)
        assert response.status == 200
        total = 0
        if chunked:
            while size := int(client.reader.until(b"\r\n"), 16):
                client.reader.discard(size + 2)
                total += size
            client.reader.discard(2)
        else:
            total = int(response.header("content-length") or 0)
            client.reader.discard(total)
        return total


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("count", [64, pytest.param(1024, marks=pytest.mark.long)])
def test_an_upload_of_any_length_streams_in_flat_memory(pair: Pair, count: int, chunked: bool) -> None:
    pair.app.script = sink
    with Memory(pair) as memory:
        response = upload(pair, count, chunked)
    assert (response.status, response.body) == (200, b"%d" % (count * MIB))
    memory.check()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("count", [64, pytest.param(1024, marks=pytest.mark.long)])
def test_a_download_of_any_length_streams_in_flat_memory(pair: Pair, count: int, chunked: bool) -> None:
    pair.app.script = source
    with Memory(pair) as memory:
        assert download(pair, count, chunked) == count * MIB
    memory.check()


def test_the_bytes_are_the_same_at_the_other_end(pair: Pair) -> None:
    body = b"".join(number.to_bytes(4, "big") for number in range(MIB))  # 4 MiB, each word another

    def script(conn: Conn) -> None:
        while True:
            conn.reply(200, conn.take().body)

    pair.app.script = script
    with pair.client() as client:
        sender = threading.Thread(target=client.request, args=("POST", "/"), kwargs={"body": body})
        sender.start()
        assert client.response("POST").body == body
        sender.join()


def test_a_slow_reader_stops_its_source(pair: Pair) -> None:
    """The application cannot send more than what the kernel's and the sidecars' buffers hold."""
    sent = 0

    def script(conn: Conn) -> None:
        nonlocal sent
        conn.take()
        conn.send(f"HTTP/1.1 200 OK\r\nContent-Length: {256 * MIB}\r\n\r\n".encode())
        for _ in range(256 * 16):
            conn.send(PIECE[:65536])
            sent += 65536

    pair.app.script = script
    with Memory(pair) as memory, pair.client(receive_bytes=65536) as client:
        client.request("GET", "/")
        client.response(body=False)
        until(lambda: _settled(lambda: sent), "the source to stop")
        stopped_at = sent
        assert stopped_at < 32 * MIB, stopped_at
        client.reader.discard(stopped_at + 8 * MIB)  # and it goes on when the reader does
        assert sent > stopped_at
    memory.check()


def test_a_slow_application_stops_its_uploader(pair: Pair) -> None:
    go = threading.Event()

    def script(conn: Conn) -> None:
        conn.head_of_request()
        go.wait(20)
        conn.reader.discard(256 * MIB)
        conn.reply(200, b"all")

    pair.app.script = script
    sent = 0
    with Memory(pair) as memory, pair.client() as client:
        client.send(f"PUT / HTTP/1.1\r\nHost: reviews\r\nContent-Length: {256 * MIB}\r\n\r\n".encode())

        def send() -> None:
            nonlocal sent
            while sent < 256 * MIB:
                client.send(PIECE)
                sent += MIB

        sender = threading.Thread(target=send)
        sender.start()
        until(lambda: _settled(lambda: sent), "the uploader to stop")
        assert sent < 32 * MIB, sent
        go.set()
        assert client.response("PUT").body == b"all"
        sender.join()
    memory.check()


def _settled(read: Callable[[], int]) -> bool:
    before = read()
    time.sleep(0.3)
    return bool(before and read() == before)


def test_many_slow_readers_at_once_leave_the_others_quick(pair: Pair) -> None:
    def script(conn: Conn) -> None:
        while True:
            request = conn.take()
            if request.target == b"/big":
                conn.send(f"HTTP/1.1 200 OK\r\nContent-Length: {64 * MIB}\r\n\r\n".encode())
                for _ in range(64):
                    conn.send(PIECE)
            else:
                conn.reply(200, b"quick")

    pair.app.script = script
    slow = [pair.client(receive_bytes=16384) for _ in range(20)]
    try:
        for client in slow:
            client.request("GET", "/big")
        until(lambda: len(pair.app.requests) == 20)
        time.sleep(0.3)
        with pair.client() as client:
            worst = 0.0
            for _ in range(50):
                began = time.monotonic()
                assert client.get("/quick").body == b"quick"
                worst = max(worst, time.monotonic() - began)
        assert worst < 0.25, worst
    finally:
        for client in slow:
            client.close()
    until(lambda: pair.web.metric("pillion_requests_active") == 0)
    until(lambda: pair.reviews.metric("pillion_requests_active") == 0)


def test_a_body_that_breaks_off_is_never_completed_downstream(pair: Pair) -> None:
    """Whatever the framing towards the application: the caller can tell that bytes are missing."""
    breaks = {
        "counted": (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsome", Conn.close),
        "counted and reset": (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsome", Conn.reset),
        "chunked": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nsome\r\n", Conn.close),
        "chunked, in the size": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nsome\r\n1", Conn.reset),
        "chunked, malformed": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nsome\r\nzz\r\n", Conn.close),
        "trailers": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nsome\r\n0\r\nx: 1\r\n", Conn.close),
    }
    for name, (data, end) in breaks.items():

        def script(conn: Conn, data: bytes = data, end: Callable[[Conn], None] = end) -> None:
            conn.take()
            head, _, body = data.partition(b"\r\n\r\n")
            conn.send(head + b"\r\n\r\n")
            time.sleep(0.03)  # the head has gone down by then
            conn.send(body)
            time.sleep(0.03)
            end(conn)

        pair.app.script = script
        with pair.client() as client:
            client.request("GET", "/")
            response = client.response(body=False)
            assert response.status == 200
            received = b""
            clean = True
            try:
                received = client.reader.rest()
            except OSError:
                clean = False
            if response.header("content-length"):
                assert len(received) < 100, name
            else:
                assert not received.endswith(b"0\r\n\r\n"), name
            assert not clean or len(received) < 100, name
        pair.app.end_connections()


def test_an_upload_that_breaks_off_is_never_completed_upstream(pair: Pair) -> None:
    for framing, body in (("Content-Length: 100", b"some"), ("Transfer-Encoding: chunked", b"4\r\nsome\r\n")):
        for end in ("close", "reset", "malformed"):
            if (framing[0], end) == ("C", "malformed"):
                continue
            pair.fresh()
            client = pair.client()
            client.send(f"POST / HTTP/1.1\r\nHost: reviews\r\n{framing}\r\n\r\n".encode() + body)
            until(lambda: pair.app.requests, f"{framing}, {end}")
            if end == "malformed":
                client.send(b"zz\r\n")
                assert client.response("POST").status == 400
                client.close()
            else:
                getattr(client, end)()
            until(lambda: not pair.app.open, f"{framing}, {end}")
            assert pair.app.complete == [], (framing, end)


def test_an_answer_of_one_byte_at_a_time_arrives_whole(pair: Pair) -> None:
    def script(conn: Conn) -> None:
        while True:
            conn.take()
            for byte in response_bytes(200, b"drop by drop"):
                conn.send(bytes([byte]))
                time.sleep(0.0005)

    pair.app.script = script
    with pair.client() as client:
        for _ in range(2):
            client.request("GET", "/")
            assert client.response().body == b"drop by drop"


def test_a_request_of_one_byte_at_a_time_arrives_whole(pair: Pair) -> None:
    with pair.client() as client:
        for (
            byte
        ) in b"POST /x HTTP/1.1\r\nHost: reviews\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX: 1\r\n\r\n":
            client.send(bytes([byte]))
        seen = client.response("POST").json
    assert (seen["body"], seen["trailers"]) == ("abc", [["x", "1"]])
