"""From an HTTP exchange to a tunnel: after a 101 both sides carry raw bytes, a connection or a stream of HTTP/2 each.

Must not interpret those bytes. Invariants: a tunnel begins only after a real 101 (or the 2xx that stands for it over
HTTP/2) that answers a request to upgrade; bytes received behind either head are delivered first; the request slot is
held until the tunnel ends.
"""

from functools import partial
from typing import TYPE_CHECKING

from sidecar.policy.exchange import Exchange
from sidecar.policy.outcome import Failure
from sidecar.wire.http1 import Message, ProtocolError
from sidecar.wire.websocket import WEBSOCKET, accepted

from .tunnel import AnyChannel, End, Tunnel, TunnelResult
from .upstream import Upstream

if TYPE_CHECKING:
    from .pool import Up
    from .serving import Serving
    from .world import World


def begin_tunnel(world: "World", serving: "Serving", m: Message, ex: Exchange, up: "Up", now: float) -> None:
    """Join the two sides of an exchange whose upstream has switched protocols."""
    request = serving.m
    if m.upgrade != request.upgrade:  # one was asked for, and the route allows no other (RFC 9110, section 7.8)
        world.note_bad_response(serving, ProtocolError(502, "the server has switched to another protocol"))
        serving.upstream_failed(Failure.BROKEN, False)
        return
    if request.extended and request.upgrade == WEBSOCKET and not accepted(request, m):
        # The key is ours, so nobody else can notice (RFC 6455, section 4.1).
        world.note_bad_response(serving, ProtocolError(502, "the answer to the WebSocket key is missing or wrong"))
        serving.upstream_failed(Failure.BROKEN, False)
        return
    ex.response_head(101, now)
    extra = serving.entry.response_fields(serving, m, ex, None)
    serving.up = None
    far: AnyChannel
    plain = up if isinstance(up, Upstream) else None
    if isinstance(up, Upstream):
        far, from_up = up.ch, up.codec.leftover()
        up.serving = None
    else:
        far, from_up = up.switch(), b""

    meters = serving.entry.meters
    meters.tcp_tunnels_total.inc()
    meters.tcp_tunnels.value += 1

    def over(result: TunnelResult) -> None:
        meters.tcp_tunnels.value -= 1
        if plain is not None:
            world.pool.closed(plain)
        ex.response_end(world.clock())
        serving.received_bytes += result.bytes_from_a
        serving.sent_bytes += result.bytes_from_b
        world.tunnels.pop(tunnel, None)
        serving.finish_tunnel(101, "ok" if result.end is End.CLEAN else f"tunnel_{result.end.value}")

    near, from_down = serving.down.switch(m, extra)
    tunnel = Tunnel(
        near,
        far,
        timers=world.timers,
        idle_s=ex.plan.timeouts.idle_s,
        on_done=over,
        leftover_a=from_down,
        leftover_b=from_up,
    )
    if tunnel.on_done is not None:
        world.tunnels[tunnel] = partial(serving.entry.still_allows, serving)
