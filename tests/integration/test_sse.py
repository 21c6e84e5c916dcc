"""Server-sent events and other answers that never end: event by event, over either version, as long as they last."""

import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import open_page
from support.crowded import Slow
from support.http2_live import Cut, Exchange, Http2Client, caller, serve
from support.mesh import Mesh, free_port, until
from support.renewal import renew

EVENTS = 12
EVERY_S = 0.02
DELAY_S = 0.05
HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
ACCEPT = [("accept", "text/event-stream")]
PORTS = {"http": {"port": 80}, "two": {"port": 81, "protocol": "http2"}}
HOSTS = {1: "reviews", 2: "two.reviews"}


def combinations(*core: tuple[int, int]) -> list[Any]:
    """Of the versions of the caller and of the application. What is not named takes long."""
    return [
        pytest.param(down, up, marks=[] if (down, up) in core else [pytest.mark.long])
        for down in (1, 2)
        for up in (1, 2)
    ]


TRANSLATED = combinations((1, 2), (2, 1))
UPWARDS = combinations((1, 2))


class Live:
    """`reviews` with a port of each version, behind two sidecars."""

    def __init__(self, mesh: Mesh, **policy: Any) -> None:
        self.mesh = mesh
        self.written: list[float] = []
        self.step = threading.Semaphore(0)
        self.ends: list[str] = []
        apps = {name: mesh.backend(serve(version, self.handle)) for version, name in ((1, "http"), (2, "two"))}
        self.policy = {"ports": PORTS, **policy}
        self.reviews = mesh.sidecar("reviews", {"web": {}, "reviews": self.policy}, app=apps, outbound=False)
        self.web = mesh.sidecar("web", {"web": {}, "reviews": self.at(**policy)}, inbound=False)

    def at(self, **policy: Any) -> dict[str, Any]:
        return {"ports": PORTS, "address": [self.reviews.inbound], **policy}

    def push(self, **policy: Any) -> None:
        """Another policy for both."""
        self.reviews.apply({"reviews": {"ports": PORTS, **policy}})
        self.web.apply({"reviews": self.at(**policy)})

    def handle(self, exchange: Exchange) -> None:
        """`/events/N/MS`: N events, so many milliseconds apart, or each when the test steps on where MS is `step`.
        `/events/N/MS/silence`: then nothing more."""
        _, _, count, gap_ms, *silence = exchange.path.split("/")
        exchange.read()
        exchange.begin(200, HEADERS)
        try:
            for number in range(int(count)):
                assert gap_ms != "step" or self.step.acquire(timeout=15)
                self.written.append(time.monotonic())
                exchange.piece(event(number))
                if gap_ms != "step":
                    time.sleep(int(gap_ms) / 1000)
            if silence and exchange.gone():
                raise Cut(None)
            exchange.end()
        except Exception as exc:
            self.ends.append(repr(exc))
            raise Cut(None) from exc
        self.ends.append("")


def event(number: int) -> bytes:
    return b"id: %05d\ndata: {}\n\n" % number


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with Mesh(tmp_path_factory.mktemp("sse")) as mesh:
        yield Live(mesh)


@pytest.fixture(autouse=True)
def _clean(live: Live) -> Iterator[None]:
    live.written.clear()
    live.ends.clear()
    yield
    for sidecar in (live.web, live.reviews):
        assert sidecar.crashes == 0
        until(lambda sidecar=sidecar: sidecar.metric("pillion_requests_active") == 0)  # type: ignore[misc]


class Source:
    """A client that notes when each event came."""

    def __init__(self, live: Live, down: int, up: int, count: int, gap_ms: int | str, then: str = "") -> None:
        self.client = caller(down, live.web.outbound)
        self.call = self.client.open("GET", f"/events/{count}/{gap_ms}{then}", HOSTS[up], ACCEPT)
        self.came: list[float] = []

    def read(self, count: int, limit_s: float = 15.0) -> list[float]:
        """That many more events; when they came."""
        size = len(event(0))
        for _ in range(count):
            number = len(self.came)
            if isinstance(self.client, Http2Client):
                data = self.call.first((number + 1) * size, limit_s)[-size:]
            else:
                data = self.call.first(size, limit_s)
            self.came.append(time.monotonic())
            assert data == event(number)
        return self.came

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()


def patiently(run: Callable[[], None]) -> None:
    """What delays events does so every time; a machine that is busy with something else does not."""
    for _ in range(2):
        try:
            return run()
        except Slow:
            time.sleep(0.5)
    run()


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("down", [1, 2])
def test_each_event_arrives_before_the_next_is_written(live: Live, down: int, up: int) -> None:
    with Source(live, down, up, 10, "step") as source:
        for _ in range(10):
            live.step.release()
            source.read(1)
        assert len(live.written) == 10


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("down", [1, 2])
def test_each_event_arrives_when_it_is_written(live: Live, down: int, up: int) -> None:
    def run() -> None:
        live.written.clear()
        with Source(live, down, up, EVENTS, int(EVERY_S * 1000)) as source:
            assert source.call.head().header("content-type") == b"text/event-stream"
            came = source.read(EVENTS)
        delays = [seen - written for seen, written in zip(came, live.written, strict=True)]
        if statistics.median(delays) > DELAY_S / 2 or sorted(delays)[-2] > DELAY_S:
            raise Slow(delays)

    patiently(run)


def test_many_sources_at_once(live: Live) -> None:
    """More than go over connections of their own between the sidecars."""

    def run() -> None:
        live.written.clear()
        sources = [Source(live, 1 + number % 2, 1 + number // 2 % 2, 10, 50) for number in range(12)]
        for source in sources:
            assert source.call.head().status == 200
        latest = [0.0] * 12
        for number in range(10):
            for index, source in enumerate(sources):
                latest[index] = source.read(1)[number]
        for source in sources:
            source.client.close()
        assert len(live.written) == 120
        delays = sorted(
            seen - written for seen, written in zip(sorted(latest), sorted(live.written)[-12:], strict=True)
        )
        if delays[6] > DELAY_S:
            raise Slow(delays)

    patiently(run)


@pytest.mark.parametrize("down", [1, 2])
def test_a_source_that_ends_is_ended_cleanly(live: Live, down: int) -> None:
    with Source(live, down, 1, 3, 1) as source:
        source.read(3)
        response = source.call.response()
        assert response.body in (b"", b"".join(event(number) for number in range(3)))


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("down", [1, 2])
def test_a_listener_that_leaves_ends_the_source(live: Live, down: int, up: int) -> None:
    with Source(live, down, up, 1000, 10) as source:
        source.read(3)
    until(lambda: live.ends and live.ends[0], "the source to notice")


@pytest.mark.parametrize(("down", "up"), TRANSLATED)
def test_what_changes_meanwhile_does_not_cut_it(live: Live, down: int, up: int) -> None:
    """A policy that still allows it, and new certificates on both sides."""
    with Source(live, down, up, 10_000, 5) as source:
        source.read(3)
        live.push(timeout={"total": "300ms", "idle": "10s"})
        source.read(3)
        for sidecar in (live.reviews, live.web):
            renew(sidecar)
            source.read(3)
        source.read(70)  # the new total holds for it as little as for new ones
        with Source(live, down, up, 10_000, 5) as other:
            other.read(70)
        live.push()
        source.read(10)


def test_authorization_that_ends_holds_for_the_next_request(live: Live) -> None:
    with Source(live, 2, 1, 10_000, 5) as source:
        source.read(3)
        live.push(authz={"deny": [{"paths": ["/events/**"]}]})
        try:
            with Source(live, 2, 1, 1, 1) as other:
                assert other.call.response().status == 403
        finally:
            live.push()


@pytest.mark.parametrize(("down", "up"), UPWARDS)
def test_silence_is_held_to_the_idle_timeout_and_nothing_else(live: Live, down: int, up: int) -> None:
    live.push(timeout={"total": "300ms", "try": "300ms", "idle": "600ms"})
    try:
        with Source(live, down, up, 10, 150) as steady:
            steady.read(5)
        with Source(live, down, up, 1, 0, "/silence") as silent:
            silent.read(1)
            began = time.monotonic()
            with pytest.raises(Cut):
                silent.read(1)
            assert 0.4 < time.monotonic() - began < 4
        until(lambda: len(live.ends) == 2 and all(live.ends), "both sources to notice")
    finally:
        live.push()


# -- a real browser

PAGE = b"""<!doctype html><title>events</title><script>
const seen = [];
const source = new EventSource("/events/20/100");
source.onmessage = (event) => {
  seen.push([event.lastEventId, performance.timeOrigin + performance.now()]);
  if (seen.length == 20) {
    source.close();
    fetch("/report", {method: "POST", body: JSON.stringify(seen)});
  }
};
source.onerror = () => fetch("/report", {method: "POST", body: JSON.stringify(["error", seen])});
</script>"""


@pytest.mark.long
def test_a_browser_hears_each_event_at_once(live: Live, tmp_path: Path) -> None:
    port = free_port()
    reports: list[Any] = []
    written: dict[str, float] = {}

    def handle(exchange: Exchange) -> None:
        if exchange.path == "/":
            exchange.read()
            exchange.reply(200, PAGE, [(b"content-type", b"text/html")])
        elif exchange.path == "/report":
            reports.append(json.loads(exchange.read()))
            exchange.reply(200)
        elif exchange.path.startswith("/events"):
            exchange.read()
            exchange.begin(200, HEADERS)
            for number in range(20):
                written[f"{number:05}"] = time.time() * 1000
                exchange.piece(event(number))
                time.sleep(0.1)
            time.sleep(5)
            exchange.end()
        else:
            exchange.read()
            exchange.reply(404)

    app = live.mesh.backend(serve(1, handle))
    services = {
        "web": {"calls": {"page": {"local_port": port}}},
        "page": {"ports": {"http": {"port": 80}}, "address": [str(app)], "tls": "plain"},
    }
    live.mesh.sidecar("web", services, inbound=False)
    with open_page(f"http://127.0.0.1:{port}/", tmp_path):
        until(lambda: reports, "the browser's report", limit_s=60)
    (seen,) = reports
    assert [number for number, _ in seen] == [f"{number:05}" for number in range(20)]
    delays = sorted(came - written[number] for number, came in seen)
    assert delays[18] < 50 and delays[10] < 25, delays
