"""Lives over HTTP/2 and of gRPC calls: as `support.lives`, with HTTP/2 on either side of the sidecar, or on both.

Callers are of HTTP/1.1 or hold several streams on one connection; servers are asked by HTTP/1.1 or, where the sidecar
chooses to, by HTTP/2. Streams are reset by both, connections say GOAWAY in the middle of things, answers come in pieces
of any size, windows open late, and calls of gRPC end with statuses in trailers, or with trailers only.
"""

import math
import struct

import trio

from sidecar.model.snapshot import Port, Protocol
from sidecar.policy.exchange import RESENDS_MAX
from sidecar.wire.http2 import PEERS, STRANGERS, ErrorCode, Http2, Stream, open_codec

from .http2_caller import Asked, Http2Caller
from .lives import ALPHABET, SIZES, Life
from .memory_net import Peer

RESETS = [ErrorCode.REFUSED_STREAM, ErrorCode.CANCEL, ErrorCode.INTERNAL_ERROR, ErrorCode.NO_ERROR]
METHODS = ["GET", "GET", "GET", "HEAD", "PUT", "POST"]
SMALL = [size for size in SIZES if size < 100_000]


def message(data: bytes) -> bytes:
    """One message of a gRPC call."""
    return b"\0" + struct.pack(">I", len(data)) + data


def check(codec: Http2) -> None:
    """What a sidecar sends is well-formed; an end without an error is that of a connection on which GOAWAY was said."""
    assert codec.error is None or codec.error.code == ErrorCode.NO_ERROR, codec.error


class Far:
    """The server's end of one HTTP/2 connection: its streams answer by themselves, what they say goes out in order."""

    def __init__(self, life: "Http2Life", peer: Peer) -> None:
        self.life, self.peer = life, peer
        between = peer.alpn == "h2" and peer.endpoint is not None and peer.endpoint.mesh
        self.codec: Http2 = open_codec(True, PEERS if between else STRANGERS, between_sidecars=between)
        self.begun: set[int] = set()
        self.over = False

    def flush(self) -> None:
        """All there is, as one read or as several."""
        data = self.codec.to_send()
        while data and not self.over:
            cut = self.life.rnd.randrange(1, len(data) + 1) if self.life.rnd.random() < 0.2 else len(data)
            self.peer.send(data[:cut])
            data = data[cut:]

    def end(self, how: str) -> None:
        self.over = True
        self.peer.reset() if how == "reset" else self.peer.close()

    async def serve(self) -> None:
        rnd = self.life.rnd
        self.flush()
        async with trio.open_nursery() as nursery:
            while not self.over:
                data = await self.peer.some()
                if not data or rnd.random() < 0.01:
                    self.end(rnd.choice(["close", "reset"]))
                    break
                if self.peer.window < 1e8:
                    self.peer.accept(rnd.choice([1_000, 100_000]))
                self.codec.receive(data, trio.current_time())
                check(self.codec)
                for stream in self.codec.take_news():
                    if stream.m is not None and stream.sid not in self.begun:
                        self.begun.add(stream.sid)
                        nursery.start_soon(self.answer, stream)
                self.flush()
            nursery.cancel_scope.cancel()

    async def answer(self, stream: Stream) -> None:
        rnd, once = self.life.rnd, self.life.once
        assert stream.m is not None
        seen = once.see(stream.m)
        await self.read(stream)
        what = rnd.random()
        if self.over or stream.error is not None:
            return
        if what < 0.06:
            code = rnd.choice(RESETS)
            if code == ErrorCode.REFUSED_STREAM:
                once.unseen(seen)
            self.codec.reset(stream, code)
            return self.flush()
        if what < 0.08:
            return self.end(rnd.choice(["close", "reset"]))  # with all its neighbours
        if what < 0.11:
            await trio.sleep(100.0)  # stalls
        if what < 0.15:
            self.codec.goaway()
            self.flush()
        if what < 0.4:
            await trio.sleep(rnd.uniform(0.0, 0.6))
        if self.is_call(stream):
            await self.answer_call(stream)
        else:
            await self.answer_request(stream, seen)

    def is_call(self, stream: Stream) -> bool:
        return stream.m is not None and (b"content-type", b"application/grpc") in stream.m.headers

    async def read(self, stream: Stream) -> None:
        """Most read the whole request before they answer."""
        rnd = self.life.rnd
        body = b""
        while stream.m is not None and not self.over and stream.error is None:
            body += stream.m.take()
            self.codec.consumed(stream)
            self.flush()
            if stream.m.done or rnd.random() < 0.05:
                break
            await trio.sleep(0.01)
        payload = body[5:] if self.is_call(stream) else body
        assert payload == ALPHABET[: len(payload)], "a body was damaged"

    async def answer_request(self, stream: Stream, seen: bytes) -> None:
        rnd = self.life.rnd
        body = ALPHABET[: rnd.choice(SMALL)]
        status = rnd.choice([200] * 8 + [503, 503, 500, 429, 404])
        fields = [(b":status", b"%d" % status)]
        if rnd.random() < 0.5:
            fields.append((b"content-length", b"%d" % len(body)))
        if rnd.random() < 0.1:
            fields.append((b"x-pillion-reason", rnd.choice([b"draining", b"overflow"])))
            self.life.once.unseen(seen)
        if stream.method == b"HEAD" or (stream.m is not None and stream.m.method == b"HEAD"):
            self.codec.respond(stream, fields, True)
            return self.flush()
        self.codec.respond(stream, fields, not body)
        await self.say(stream, body, [])

    async def answer_call(self, stream: Stream) -> None:
        rnd = self.life.rnd
        status = rnd.choice([b"0"] * 6 + [b"14", b"14", b"13", b"8", b"5"])
        last = [(b"grpc-status", status)]
        head = [(b":status", b"200"), (b"content-type", b"application/grpc")]
        if rnd.random() < 0.3:
            self.codec.respond(stream, head + last, True)  # trailers only
            return self.flush()
        self.codec.respond(stream, head, False)
        self.flush()
        if rnd.random() < 0.3:
            await trio.sleep(rnd.uniform(0.0, 0.3))
        body = message(ALPHABET[: rnd.choice(SMALL)]) if rnd.random() < 0.7 else b""
        await self.say(stream, body, last)

    async def say(self, stream: Stream, body: bytes, trailers: list[tuple[bytes, bytes]]) -> None:
        """A body in pieces; some are never finished."""
        rnd = self.life.rnd
        while body and not self.over:
            cut = rnd.randrange(1, len(body) + 1) if rnd.random() < 0.4 else len(body)
            data, body = body[:cut], body[cut:]
            self.codec.send(stream, data, not body and not trailers)
            self.flush()
            if body and rnd.random() < 0.2:
                await trio.sleep(rnd.uniform(0.0, 0.3))
            if body and rnd.random() < 0.05:
                self.codec.reset(stream, rnd.choice(RESETS))
                return self.flush()
        if trailers and not self.over:
            self.codec.trail(stream, trailers)
            self.flush()


class Http2Life(Life):
    """`calls` counts the answers of gRPC."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.calls = 0
        self.resends_max = RESENDS_MAX
        self.protocols = {
            name: self.rnd.choice([Protocol.HTTP, Protocol.HTTP2, Protocol.GRPC]) for name in self.budgets
        }
        self.multiplex_from = self.rnd.choice([1.0, 2.0, math.inf])
        self.engine = self.rnd.choice(["ngh2", "ngh2", "h2"])

    def ports(self, name: str) -> tuple[Port, ...]:
        return (Port("http", 80, self.protocols[name]),)

    async def run(self, seed: int) -> None:
        await super().run(seed)
        assert self.net.world.heads.bytes_held == 0

    async def server(self, peer: Peer) -> None:
        if peer.alpn == "h2":
            await Far(self, peer).serve()
        else:
            await super().server(peer)

    async def caller(self) -> None:
        if self.rnd.random() < 0.3:
            return await super().caller()
        rnd = self.rnd
        caller = Http2Caller(self.net, window=rnd.choice([math.inf, math.inf, 30_000]), engine=self.engine)
        with trio.move_on_after(rnd.choice([0.3, 30.0, 30.0, 30.0])):  # some lose patience
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.listen, caller, nursery)
                async with trio.open_nursery() as asking:
                    for _ in range(rnd.randrange(1, 5)):
                        asking.start_soon(self.stream, caller)
                nursery.cancel_scope.cancel()
        caller.peer.reset() if rnd.random() < 0.3 else caller.peer.close()

    async def listen(self, caller: Http2Caller, nursery: trio.Nursery) -> None:
        """Take what comes, now and then late."""
        peer = caller.peer
        while peer.ended is None:
            if not peer.got:
                peer.arrived = trio.Event()
                await peer.arrived.wait()
            if self.rnd.random() < 0.1:
                await trio.sleep(self.rnd.uniform(0.0, 0.2))
            if peer.window < 1e8:
                peer.accept(50_000)
            caller.settle()
            check(caller.codec)
        nursery.cancel_scope.cancel()

    async def stream(self, caller: Http2Caller) -> None:
        rnd = self.rnd
        for _ in range(rnd.randrange(1, 4)):
            await trio.sleep(rnd.uniform(0.0, 0.5))
            if caller.codec.room <= 0:
                return
            grpc = rnd.random() < 0.4
            asked = self.ask_call(caller) if grpc else self.ask_request(caller)
            body = b""
            if not asked.stream.answered:
                body = ALPHABET[: rnd.choice(SMALL)]
                await self.upload(asked, message(body) if grpc else body)
            while not asked.done and asked.error is None:
                await trio.sleep(0.02)
                if rnd.random() < 0.005:
                    return asked.reset()
            self.check_answer(asked, grpc)

    def ask_request(self, caller: Http2Caller) -> Asked:
        method = self.rnd.choice(METHODS)
        path, host = self.rnd.choice(["/", "/again"]), self.rnd.choice(["shop", "shop", "spare"])
        cookie = [(b"cookie", b"stay=" + self.rnd.choice(self.cookies))] if self.rnd.random() < 0.3 else []
        extra = [self.once.ask(method == "POST"), *cookie]
        return caller.ask(path, host, method, extra=extra, end=method not in ("PUT", "POST"))

    def ask_call(self, caller: Http2Caller) -> Asked:
        fields = [(b"content-type", b"application/grpc"), (b"te", b"trailers"), self.once.ask(True)]
        if self.rnd.random() < 0.5:
            fields.append((b"grpc-timeout", b"%dm" % self.rnd.choice([1, 200, 2000])))
        return caller.ask("/again", self.rnd.choice(["shop", "spare"]), "POST", extra=fields, end=False)

    async def upload(self, asked: Asked, body: bytes) -> None:
        rnd = self.rnd
        while True:
            cut = rnd.randrange(len(body) + 1) if rnd.random() < 0.3 else len(body)
            data, body = body[:cut], body[cut:]
            asked.send(data, not body)
            if not body or asked.error is not None:
                return
            await trio.sleep(rnd.uniform(0.0, 0.2))
            if rnd.random() < 0.03:
                return asked.reset()

    def check_answer(self, asked: Asked, grpc: bool) -> None:
        if asked.error is not None:
            return
        self.answers += 1
        self.keep([value for name, value in asked.headers.items() if name == b"set-cookie"])
        if grpc:
            self.calls += 1
            status = dict(asked.trailers).get(b"grpc-status", asked.headers.get(b"grpc-status"))
            assert status is not None or asked.status != 200, "a call without a status"
        if not asked.reason:
            body = asked.body[5:] if grpc else asked.body
            assert body == ALPHABET[: len(body)] or body.startswith(b"{"), "a response was damaged"
