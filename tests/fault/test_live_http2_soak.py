"""HTTP/2 for as many requests as minutes of traffic have, all in some seconds: what they took is given back.

Callers of both sidecars open many streams, read slowly or not at all, cancel, break off and come back, while the policy
is replaced, connections grow too old, and a sidecar is drained in the end. Then nothing may be left: no request, no
connection, no slot of a limit, no descriptor, no memory.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import http2_frames as f
from support.http2_live import Call2, Cut, Exchange, Http2Client, serve
from support.mesh import Closed, Mesh, Sidecar, dial, until

MIB = 1024 * 1024
SECONDS = {"ngh2": (5.0, 10.0), "h2": (3.0, 4.0)}  # to warm up, and to watch
WORKERS = 6
STREAMS = 12  # of each connection, at once
REQUESTS, CONNECTIONS = 200, 64  # the limits, which are never to be hit
GROWTH_BYTES_MAX = 5 * MIB
PLAIN, TWO = "reviews", "two.reviews"


def application(exchange: Exchange) -> None:
    """Speaks either version; the path says what it does."""
    kind = exchange.path.lstrip("/")
    if kind == "early":
        exchange.reply(413, b"no more")
        return
    body = exchange.read()
    if kind == "big":
        exchange.begin(200)
        for _ in range(8):
            exchange.piece(bytes(65536))
        exchange.end([(b"x-sum", b"1")])
    elif kind == "hang":
        exchange.gone()
    elif kind == "cut":
        exchange.begin(200)
        exchange.piece(b"some")
        exchange.cut()
    else:
        exchange.inform(103, [(b"link", b"</a>")])
        exchange.reply(200, body or b"small")


class Traffic:
    """Workers, each with its own chance, until told to stop."""

    def __init__(self, connect: list[Callable[[], Any]]) -> None:
        self.connect = connect
        self.over = threading.Event()
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.threads = [threading.Thread(target=self._work, args=(seed,), daemon=True) for seed in range(WORKERS)]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(20)
            assert not thread.is_alive()

    def _work(self, seed: int) -> None:
        rnd = random.Random(seed)
        while not self.over.is_set():
            try:
                self._connection(rnd)
            except (Closed, Cut, OSError) as exc:
                self.done[type(exc).__name__] += 1  # a connection that was drained meanwhile
            except Exception as exc:
                self.wrong.append(repr(exc))
                return

    def _connection(self, rnd: random.Random) -> None:
        """One caller, a few rounds of streams, one of several ends."""
        unread = rnd.random() < 0.2
        client = Http2Client(rnd.choice(self.connect)(), {f.INITIAL_WINDOW_SIZE: 1000} if unread else None)
        with client:
            for _ in range(rnd.randrange(1, 6)):
                if client.wire.goaway is not None:
                    self.done["drained"] += 1
                    break
                calls = [self._open(client, rnd) for _ in range(rnd.randrange(1, STREAMS))]
                for kind, call in calls:
                    self._finish(kind, call, client, rnd)
            end = rnd.random()
            if end < 0.3:
                client.abort()
            elif end < 0.6:
                client.wire.send(f.goaway(0))
                self.done["goaway"] += client.ended()

    def _open(self, client: Http2Client, rnd: random.Random) -> tuple[str, Call2]:
        kind = rnd.choice(["small"] * 4 + ["echo", "echo", "big", "hang", "cut", "early"])
        host = rnd.choice([PLAIN, TWO])
        if kind == "echo":
            call = client.open("POST", "/echo", host, end=False)
            call.send(b"x" * rnd.choice([1, 1000, 20000]))
            call.end([(b"x-sum", b"1")] if rnd.random() < 0.5 else ())
        elif kind == "early":
            call = client.open("POST", "/early", host, [("content-length", "1000000")], end=False)
        else:
            call = client.open("GET", f"/{kind}", host)
        return kind, call

    def _finish(self, kind: str, call: Call2, client: Http2Client, rnd: random.Random) -> None:
        self.done[kind] += 1
        if kind == "hang" or rnd.random() < 0.1:
            call.cancel()
        elif kind == "cut":
            try:  # a reset may overtake the head of HTTP/1.1
                if call.response().reason != "upstream_reset":
                    self.wrong.append("what was cut came to a clean end")
            except Cut as exc:
                if exc.code in (0, 8):
                    self.wrong.append(f"what was cut ended with the code {exc.code}")
        elif kind == "big" and rnd.random() < 0.5:
            call.first(500)
            call.cancel()
        else:
            response = call.response()
            if response.status != (413 if kind == "early" else 200) and client.wire.goaway is None:
                self.wrong.append(f"{kind}: {response}")


class Soak:
    def __init__(self, mesh: Mesh, engine: str) -> None:
        self.engine = engine
        self.apps = {version: mesh.backend(serve(version, application)) for version in (1, 2)}
        ports = {"http": {"port": 80}, "two": {"port": 81, "protocol": "http2"}}
        self.service: dict[str, Any] = {
            "ports": ports,
            "circuit_breaker": {"consecutive_failures": 1_000_000},
            "retry": {"max_retries": 0},
            "limits": {"connections": CONNECTIONS, "requests": REQUESTS, "pending": REQUESTS},
            "max_connection_age": "3s",
        }
        options = [f"--http2-engine={engine}"]
        self.reviews = mesh.sidecar(
            "reviews",
            {"web": {}, "reviews": self.service},
            app={"http": self.apps[1], "two": self.apps[2]},
            outbound=False,
            options=options,
        )
        self.web = mesh.sidecar("web", {"web": {}, "reviews": self.at(self.reviews)}, inbound=False, options=options)
        self.sidecars = (self.web, self.reviews)

    def at(self, reviews: Sidecar, **more: Any) -> dict[str, Any]:
        return {**self.service, "address": [reviews.inbound], **more}

    def run(self, seconds: float) -> Counter[str]:
        """Traffic, and a new policy now and then."""
        traffic = Traffic([lambda: dial(self.web.outbound), lambda: self.reviews.mesh_socket(alpn="h2")])
        ends = time.monotonic() + seconds
        number = 0
        while time.monotonic() < ends:
            number += 1
            time.sleep(1)
            self.web.apply({"reviews": self.at(self.reviews, timeout={"total": f"{20 + number}s"})})
            self.reviews.apply({"reviews": {**self.service, "timeout": {"total": f"{20 + number}s"}}})
        traffic.stop()
        assert not traffic.wrong, traffic.wrong
        return traffic.done

    def rest(self) -> None:
        """Nothing is under way any more."""
        for sidecar in self.sidecars:
            until(lambda: sidecar.metric("pillion_requests_active") == 0, "the end of all requests")  # noqa: B023
            assert sidecar.alive and sidecar.crashes == 0, sidecar.log
            assert "Traceback" not in sidecar.log
        until(lambda: self.web.connections("out", "down") == 0, "the end of the callers' connections")
        for app in self.apps.values():
            app.end_connections()
        until(lambda: self.reviews.connections("in", "up") == 0, "the end of the application's connections")
        until(
            lambda: self.reviews.connections("in", "down") == self.web.connections("out", "up"), "no other connection"
        )


@pytest.fixture(params=["ngh2", "h2"])
def soak(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Soak]:
    with Mesh(tmp_path) as mesh:
        yield Soak(mesh, request.param)


@pytest.mark.long
def test_what_traffic_takes_is_given_back(soak: Soak) -> None:
    warm, long = SECONDS[soak.engine]
    soak.run(warm)
    soak.rest()
    before = [(sidecar.resident_bytes(), sidecar.descriptors()) for sidecar in soak.sidecars]
    done = soak.run(long)
    assert min(done[kind] for kind in ("small", "echo", "big", "hang", "cut", "early", "goaway")) > 5, done
    soak.rest()
    for sidecar, (memory, descriptors) in zip(soak.sidecars, before, strict=True):
        assert sidecar.resident_bytes() - memory < GROWTH_BYTES_MAX
        assert sidecar.descriptors() <= descriptors + 8  # between the sidecars some stay
    every_slot_is_free(soak)
    drained(soak)


def every_slot_is_free(soak: Soak) -> None:
    """As many requests as the limit allows are let in, and one more is not."""
    clients = [Http2Client(dial(soak.web.outbound)).settled() for _ in range(3)]
    calls = [clients[number % 3].open("GET", "/hang", PLAIN) for number in range(REQUESTS)]
    until(lambda: soak.web.metric("pillion_requests_active", side="out") == REQUESTS, "all of them to be let in")
    response = clients[0].get("/small", PLAIN)
    assert (response.status, response.reason) == (503, "overflow")
    assert not any(call.half.sections for call in calls)
    for client in clients:
        client.abort()
    soak.rest()
    with Http2Client(dial(soak.web.outbound)) as client:
        assert client.get("/small", PLAIN).status == 200


def drained(soak: Soak) -> None:
    """The one before the application ends in order while requests are on their way, and none of them is lost."""
    with Http2Client(dial(soak.web.outbound)).settled() as client:
        calls = [client.ask("POST", "/echo", TWO, body=b"%d" % number) for number in range(20)]
        soak.reviews.process.terminate()
        assert [call.response().body for call in calls] == [b"%d" % number for number in range(20)]
    assert soak.reviews.process.wait(30) == 0
    until(lambda: soak.web.connections("out", "up") == 0, "the end of the connections between the sidecars")
