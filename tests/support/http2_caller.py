"""An HTTP/2 client for the network in memory, on one of our own codecs: what it receives is kept by stream.

caller = Http2Caller(net)                       # plain, with prior knowledge; `service="web"`: of a mesh peer
first = caller.ask("/x")
…
assert caller.settle() and first.status == 200 and first.body == b"ok"
"""

import math
from typing import Any

from sidecar.proxy.downstream import Downstream
from sidecar.proxy.entries import Inbound
from sidecar.proxy.http2_down import Http2Downstream
from sidecar.wire.http2 import STRANGERS, Fields, Http2, Http2Limits, Stream, open_codec

from .memory_net import TRUST_DOMAIN, Net, Peer, fingerprint_of


class Asked:
    """One request of the caller's and what has come of its answer."""

    def __init__(self, caller: "Http2Caller", stream: Stream) -> None:
        self.caller, self.stream = caller, stream
        self.body = b""

    @property
    def status(self) -> int:
        return self.stream.m.status if self.stream.m is not None else 0

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.stream.m.headers) if self.stream.m is not None else {}

    @property
    def trailers(self) -> Fields:
        return self.stream.m.trailers if self.stream.m is not None else []

    @property
    def done(self) -> bool:
        return self.stream.ended

    @property
    def error(self) -> int | None:
        return self.stream.error

    @property
    def reason(self) -> bytes:
        found = self.headers.get(b"x-pillion-reason")
        if found is None and self.stream.m is not None:
            found = self.stream.m.reason
        return found or b""

    def send(self, data: bytes = b"", end: bool = False) -> None:
        self.caller.codec.send(self.stream, data, end)
        self.caller.flush()

    def trail(self, fields: Fields) -> None:
        self.caller.codec.trail(self.stream, fields)
        self.caller.flush()

    def reset(self, code: int = 8) -> None:
        self.caller.codec.reset(self.stream, code)
        self.caller.flush()


class Http2Caller:
    """`reads`: whether it gives windows back as bytes come; a test may turn it off, for all streams or one."""

    def __init__(
        self,
        net: Net,
        service: str | None = None,
        *,
        limits: Http2Limits = STRANGERS,
        window: float = math.inf,
        engine: str = "auto",
        greet: bool = True,
    ) -> None:
        self.net = net
        self.reads = True
        self.unread: set[Asked] = set()
        self.peer = Peer(net, window=window)
        self.codec: Http2 = open_codec(False, limits, engine=engine)
        self.asked: list[Asked] = []
        down: Any
        if service is None:
            down = Downstream(net.world, net.explicit, "", "10.1.1.1")
        elif not service:
            down = Downstream(net.world, Inbound(net.world, "http", ""), "", "10.1.1.1")
        else:
            identity = f"spiffe://{TRUST_DOMAIN}/service/{service}"
            entry = Inbound(net.world, "http", identity, fingerprint_of(identity))
            down = Http2Downstream(net.world, entry, identity, "10.1.1.1")
        net.call(down.begin, self.peer)
        if greet:
            self.flush()

    @property
    def down(self) -> Any:
        """The sidecar's end."""
        (down,) = self.net.world.downstreams
        return down

    def fields(self, path: str, host: str, method: str, extra: Fields) -> Fields:
        return [
            (b":method", method.encode()), (b":scheme", b"http"), (b":path", path.encode()),
            (b":authority", host.encode()), *extra,
        ]  # fmt: skip

    def ask(
        self,
        path: str = "/",
        host: str = "shop",
        method: str = "GET",
        extra: Fields = [],  # noqa: B006
        body: bytes | None = None,
        end: bool = True,
    ) -> Asked:
        """Begin a request. With `body` and without `end` more may be sent."""
        stream = Stream(method=method.encode())
        asked = Asked(self, stream)
        stream.owner = asked
        self.codec.request(stream, self.fields(path, host, method, extra), end and body is None)
        if body is not None:
            self.codec.send(stream, body, end)
        self.asked.append(asked)
        self.flush()
        return asked

    def connect(self, path: str = "/socket", host: str = "shop", extra: Fields = []) -> Asked:  # noqa: B006
        """An extended CONNECT for WebSocket."""
        stream = Stream(method=b"CONNECT")
        asked = Asked(self, stream)
        fields = self.fields(path, host, "CONNECT", [(b":protocol", b"websocket"), *extra])
        fields.sort(key=lambda field: field[0][:1] != b":")
        self.codec.request(stream, fields, False)
        self.asked.append(asked)
        self.flush()
        return asked

    def flush(self) -> None:
        """Send what the codec has."""
        data = self.codec.to_send()
        if data:
            self.peer.send(data)
        self.settle()

    def settle(self) -> bool:
        """Take what has come, and answer it, until nothing more comes."""
        while True:
            data = self.peer.read()
            if data:
                self.codec.receive(data, 0.0)
            self.codec.take_news()
            for asked in self.asked:
                m = asked.stream.m
                if m is not None and m.body:
                    asked.body += m.take()
                if self.reads and asked not in self.unread:
                    self.codec.consumed(asked.stream)
            out = self.codec.to_send()
            if out:
                self.peer.send(out)
            if not data and not out:
                return True
