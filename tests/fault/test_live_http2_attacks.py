"""Attacks over HTTP/2 on live sidecars, with default settings: small in memory, quick for others, and told by name.

During each attack of one client the resident memory may grow by 16 MB, other clients see no error and no slow answer,
at most a hundred of its requests reach the application, and the limit that it hits is named in the log and in a metric.
The attackers are processes of their own (support/http2_attacks.py).
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import http2_frames as f
from support.crowded import GROWTH_BYTES_MAX, MIB, Crowded, Neighbour, crowded, patiently
from support.http2_live import Http2Client
from support.mesh import Conn, Sidecar, dial, environment, until

pytestmark = pytest.mark.alone

TESTS = Path(__file__).parents[1]
TLS_CONNECTION_BYTES = 28 * 1024
PLAIN_CONNECTION_BYTES = 8 * 1024  # an HTTP/2 codec and its windows included
REQUESTS_MAX = 100
SIDES = ["outbound", "inbound"]
HANG_S = 0.3
SECONDS_MIN = 0.4  # enough to see how others fare


def application(conn: Conn) -> None:
    """`/big` is answered with 64 MB; anything else with patience."""
    while True:
        request = conn.head_of_request()
        if request.target == b"/big":
            conn.send(f"HTTP/1.1 200 OK\r\nContent-Length: {64 * MIB}\r\n\r\n".encode())
            for _ in range(64):
                conn.send(bytes(MIB))
        else:
            time.sleep(HANG_S)
            conn.reply(200, b"done")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crowded]:
    with crowded(tmp_path_factory.mktemp("http2-attacks")) as pair:
        for connect in (lambda: dial(pair.web.outbound), lambda: pair.reviews.mesh_socket(alpn="h2")):
            for _ in range(3):  # what every first use costs is no growth
                with Http2Client(connect()).settled() as client:
                    calls = [client.ask("GET", "/warm", "quick.reviews") for _ in range(90)]
                    assert {call.response().status for call in calls} == {200}
        yield pair


@pytest.fixture(autouse=True)
def _clean(pair: Crowded) -> Iterator[None]:
    pair.fresh(application)
    yield
    for sidecar in (pair.web, pair.reviews):
        assert sidecar.alive and sidecar.crashes == 0
        until(lambda sidecar=sidecar: sidecar.metric("pillion_requests_active") == 0, limit_s=30)  # type: ignore[misc]


def attacked(pair: Crowded, side: str) -> Sidecar:
    return pair.web if side == "outbound" else pair.reviews


def limits(sidecar: Sidecar) -> dict[str, float]:
    """How often each limit was hit."""
    found: dict[str, float] = {}
    for line in sidecar.admin("/metrics").splitlines():
        if line.startswith("pillion_http2_limits_total{"):
            name = line.partition('limit="')[2].partition('"')[0]
            found[name] = found.get(name, 0) + float(line.rpartition(" ")[2])
    return found


class Attack:
    """One attacker's run, and what it cost."""

    def __init__(self, pair: Crowded, side: str, kind: str, seconds: float) -> None:
        self.pair, self.side, self.kind = pair, side, kind
        self.sidecar = attacked(pair, side)
        patiently(lambda: self._run(seconds))

    def _run(self, seconds: float) -> None:
        pair, side = self.pair, self.side
        pair.fresh(application)
        before = limits(self.sidecar)
        log = len(self.sidecar.log)
        with Neighbour(pair, self.sidecar) as neighbour:
            self.growth = 0
            process = self._start(seconds)
            began = time.monotonic()
            while process.poll() is None:
                self.growth = max(self.growth, self.sidecar.resident_bytes() - neighbour.memory)
                assert time.monotonic() - began < seconds + 30
                time.sleep(0.02)
            time.sleep(max(0.0, began + SECONDS_MIN - time.monotonic()))
            assert process.stdout is not None
            with process:
                self.told: dict[str, Any] = json.loads(process.stdout.read())
            beside = self.told["connections"] * (TLS_CONNECTION_BYTES if side == "inbound" else 0)
            neighbour.check(min(beside, 4 * MIB), percentile=True)
        assert self.growth < GROWTH_BYTES_MAX, self
        after = limits(self.sidecar)
        self.limits = {name for name, count in after.items() if count > before.get(name, 0)}
        self.log = self.sidecar.log[log:]
        self.requests = [request for request in pair.app.requests if request.target != b"/neighbour"]

    def _start(self, seconds: float) -> "subprocess.Popen[str]":
        address = self.sidecar.outbound if self.side == "outbound" else self.sidecar.inbound
        peer = [] if self.side == "outbound" else [str(self.pair.web.identity), "http.reviews.mesh"]
        return subprocess.Popen(
            [sys.executable, "-m", "support.http2_attacks", self.kind, address, str(seconds), "reviews", *peer],
            cwd=TESTS, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip

    def __repr__(self) -> str:
        reached = len(getattr(self, "requests", ()))
        return f"<{self.kind} {self.told} grown {self.growth / MIB:.1f} MB, {reached} reached the application>"


CALM, PROTOCOL, COMPRESSION, CLOSED, SIZE, FLOW = 11, 1, 9, 5, 6, 3

ENDED = {  # attack -> (the limit that it hits, the code of the GOAWAY)
    "rapid-reset": ("rapid_reset", {CALM}),
    "rapid-reset-late": ("rapid_reset", {CALM}),
    "made-reset-length": ("rapid_reset", {CALM}),
    "made-reset-trailers": ("rapid_reset", {CALM}),
    "made-reset-window": ("protocol", {PROTOCOL}),
    "made-reset-overflow": ("protocol", {FLOW}),
    "made-reset-half-closed": ("protocol", {CLOSED}),
    "malformed": ("rapid_reset", {CALM}),
    "settings": ("settings_frames", {CALM}),
    "empty-settings": ("settings_frames", {CALM}),
    "settings-entries": ("settings_entries", {CALM}),
    "ping": ("ping_frames", {CALM}),
    "priority": ("priority_frames", {CALM}),
    "window-update": ("window_update_frames", {CALM}),
    "window-update-stream": ("window_update_frames", {CALM}),
    "empty-data": ("empty_data_frames", {CALM}),
    "tiny-data": ("tiny_data_frames", {CALM}),
    "padded-data": ("tiny_data_frames", {CALM}),
    "unknown": ("unknown_frames", {CALM}),
    "goaway": ("goaway_frames", {CALM}),
    "rst-stream": ("rst_stream_frames", {CALM}),
    "continuation": ("continuation_frames", {CALM}),
    "empty-continuation": ("continuation_frames", {CALM}),
    "large-continuation": ("header_block", {CALM}),
    "hpack-bomb": ("header_section", {CALM}),
    "crumbs": ("header_section", {CALM}),
    "padded-integers": ("protocol", {COMPRESSION}),
    "largest-id": ("protocol", {PROTOCOL}),
}


def test_the_name_of_each_limit_is_logged(pair: Crowded) -> None:
    """Also when another one was hit a moment ago."""
    for kind, words in (("ping", "too many ping frames"), ("settings", "too many settings frames")):
        attack = Attack(pair, "outbound", kind, 5)
        assert f"HTTP/2: ENHANCE_YOUR_CALM: {words}" in attack.log, attack.log


QUICK = {
    "rapid-reset", "made-reset-trailers", "malformed", "ping", "settings", "tiny-data", "continuation", "hpack-bomb",
    "padded-integers", "zero-window",
}  # fmt: skip


def sides(kinds: Iterable[str]) -> list[Any]:
    """From plain clients and from peers of the mesh, which go through the same code: of those few are quick."""
    quick = {("rapid-reset", "inbound"), *((kind, "outbound") for kind in QUICK)}
    return [
        pytest.param(kind, side, marks=[] if (kind, side) in quick else [pytest.mark.long])
        for kind in kinds
        for side in SIDES
    ]


@pytest.mark.parametrize(("kind", "side"), sides(ENDED))
def test_an_attack_is_ended(pair: Crowded, kind: str, side: str) -> None:
    """Within moments, by a GOAWAY that says why."""
    limit, codes = ENDED[kind]
    attack = Attack(pair, side, kind, 5)
    # A peer passes on the cancellations of many callers.
    most = REQUESTS_MAX if side == "outbound" or not limit.startswith("rapid_reset") else 1200
    assert len(attack.requests) <= most, attack
    assert attack.limits == {limit}, (attack.limits, attack)
    assert set(attack.told["codes"]) == {f"goaway {code}" for code in codes}, attack


ENDURED = ["zero-window", "one-byte-windows", "unread", "slow-posts", "hpack-allowed", "crumbs-allowed", "table-sizes"]


@pytest.mark.parametrize(("kind", "side"), sides(ENDURED))
def test_what_is_allowed_costs_little(pair: Crowded, kind: str, side: str) -> None:
    """Nothing that breaks a rule: bounded by windows and buffers."""
    attack = Attack(pair, side, kind, 1.2)
    assert len(attack.requests) <= REQUESTS_MAX, attack
    assert not attack.limits, attack


@pytest.mark.long
@pytest.mark.parametrize("side", SIDES)
def test_connections_that_come_and_go(pair: Crowded, side: str) -> None:
    attack = Attack(pair, side, "churn@100000", 2)
    assert attack.told["connections"] > 50, attack
    assert not attack.limits, attack


@pytest.mark.long
def test_answers_that_are_not_read(pair: Crowded) -> None:
    attack = Attack(pair, "outbound", "unread-pings", 2)
    assert attack.limits == {"ping_frames"}, attack
    assert not attack.requests


AGAIN = ["rapid-reset", "made-reset-trailers", "malformed", "hpack-bomb", "large-continuation", "settings"]


@pytest.mark.long
@pytest.mark.parametrize(("kind", "side"), [("rapid-reset", "inbound"), *((kind, "outbound") for kind in AGAIN)])
def test_an_attacker_that_comes_back_at_once(pair: Crowded, kind: str, side: str) -> None:
    """Thrown out, it connects again: what a connection took is given back at once, not when the collector runs."""
    attack = Attack(pair, side, f"{kind}@100000", 3)
    assert attack.told["connections"] > 1, attack
    assert attack.limits == {ENDED[kind][0]}, attack


# -- those that do not read


def outbound1(pair: Crowded) -> Any:
    client = pair.client(receive_bytes=16384)
    client.request("GET", "/big")
    return client


def inbound1(pair: Crowded) -> Any:
    client = pair.reviews.mesh_client()
    client.request("GET", "/big")
    return client


def zero_windows(pair: Crowded, side: str) -> Any:
    """99 streams of one connection."""
    sock = dial(pair.web.outbound) if side == "outbound" else pair.reviews.mesh_socket(alpn="h2")
    asked = f.request(path=b"/big", authority=b"reviews")
    wire = f.PREFACE + f.settings({f.INITIAL_WINDOW_SIZE: 0}) + f.settings(ack=True)
    sock.sendall(wire + b"".join(f.headers(sid, asked, True) for sid in range(1, 199, 2)))
    return sock


@pytest.mark.parametrize(
    ("version", "side", "count"),
    [
        pytest.param(1, "outbound", 100, marks=pytest.mark.long),
        (2, "outbound", 3),
        pytest.param(1, "inbound", 300, marks=pytest.mark.long),
        pytest.param(2, "outbound", 10, marks=pytest.mark.long),
        pytest.param(2, "inbound", 10, marks=pytest.mark.long),
    ],
)
def test_many_that_do_not_read_share_a_budget(pair: Crowded, version: int, side: str, count: int) -> None:
    """Each asks for 64 MB. However many they are, what is held for all of them together stays small."""
    sidecar = attacked(pair, side)
    connect: Callable[[], Any] = {
        (1, "outbound"): lambda: outbound1(pair),
        (1, "inbound"): lambda: inbound1(pair),
    }.get((version, side), lambda: zero_windows(pair, side))
    before = sidecar.resident_bytes()
    clients = []
    try:
        for _ in range(count):
            clients.append(connect())
        streams = count * (99 if version == 2 else 1)
        until(lambda: sidecar.metric("pillion_requests_active") >= streams, "all requests")
        grown = 0
        for _ in range(40 if streams < 500 else 100):
            time.sleep(0.05)
            grown = max(grown, sidecar.resident_bytes() - before)
        tls = count * TLS_CONNECTION_BYTES if side == "inbound" else 0
        assert grown < GROWTH_BYTES_MAX + tls, f"{grown / MIB:.1f} MB"
        with pair.client() as client:
            assert client.get("/quick", host="quick.reviews").status == 200
    finally:
        for client in clients:
            client.close()


# -- crowds


def crowd(pair: Crowded, side: str, count: int) -> list[Any]:
    def connect(_: int) -> Any:
        if side == "outbound":
            return dial(pair.web.outbound)
        return pair.reviews.mesh_socket(alpn="h2")

    pair.mesh.client_context("web", None, "h2")
    with ThreadPoolExecutor(8 if side == "outbound" else 4) as pool:
        return list(pool.map(connect, range(count)))


GREETING = f.PREFACE + f.settings() + f.settings(ack=True)
POST = f.headers(1, f.request(b"POST", b"/attack", b"reviews"))
SLOW = {
    "half a preface": (f.PREFACE[:16], b""),
    "silent": (GREETING, b""),
    "half a frame": (GREETING + POST[:20], b""),
    "slow blocks": (GREETING + f.headers(1, f.request(authority=b"reviews"), end_headers=False), f.continuation(1)),
    "slow pings": (GREETING, f.ping()),
}


CROWDS = [
    pytest.param(kind, side, count, marks=[pytest.mark.long] if side == "inbound" or count > 300 else [])
    for kind in SLOW
    for side in SIDES
    for count in ((300, 2000) if side == "outbound" and kind in ("silent", "slow blocks") else (300,))
]


@pytest.mark.parametrize(("kind", "side", "count"), CROWDS)
def test_crowds_harm_nobody(pair: Crowded, kind: str, side: str, count: int) -> None:
    patiently(lambda: assemble(pair, kind, side, count))
    assert not pair.app.requests


def assemble(pair: Crowded, kind: str, side: str, count: int) -> None:
    first, more = SLOW[kind]
    with Neighbour(pair, attacked(pair, side)) as neighbour:
        sockets = crowd(pair, side, count)
        try:
            for sock in sockets:
                sock.sendall(first)
            for _ in range(3):
                for sock in sockets:
                    try:
                        sock.sendall(more)
                    except OSError:
                        pass
                time.sleep(0.1)
        finally:
            each = TLS_CONNECTION_BYTES if side == "inbound" else PLAIN_CONNECTION_BYTES
            try:
                neighbour.check(beside_bytes=count * each, percentile=True)
            finally:
                for sock in sockets:
                    sock.close()


@pytest.mark.long
def test_who_does_not_finish_is_let_go(pair: Crowded) -> None:
    """A preface, and a head, within ten seconds each."""
    began = time.monotonic()
    sockets = [dial(pair.web.outbound) for _ in range(3)]
    for sock, wire in zip(sockets, (f.PREFACE[:16], f.PREFACE, SLOW["slow blocks"][0]), strict=True):
        sock.sendall(wire)
    for sock in sockets:
        sock.settimeout(20)
        while sock.recv(65536):
            pass
        assert 9 < time.monotonic() - began < 13
        sock.close()
