"""From an HTTP exchange to a tunnel: after a 101 both connections carry raw bytes.

Must not interpret those bytes. Invariants: a tunnel begins only after a real 101 that answers a request to upgrade;
bytes received behind either head are delivered first; the request slot is held until the tunnel ends.
"""

from functools import partial
from typing import TYPE_CHECKING

from sidecar.policy.exchange import Exchange
from sidecar.wire.http1 import Message, encode_response

from .tunnel import End, Tunnel, TunnelResult

if TYPE_CHECKING:
    from .serving import Serving
    from .upstream import Upstream
    from .world import World


def begin_tunnel(world: "World", serving: "Serving", m: Message, ex: Exchange, up: "Upstream") -> None:
    """Join the two connections of an exchange whose upstream has switched protocols."""
    down = serving.down
    extra = serving.entry.response_lines(serving, m, ex, None)
    head = encode_response(m, chunked=False, close=False, extra=extra)
    from_down, from_up = down.codec.leftover(), up.codec.leftover()
    serving.up = None
    up.serving = None

    def over(result: TunnelResult) -> None:
        world.pool.closed(up)
        ex.response_end(world.clock())
        serving.received_bytes += result.bytes_from_a
        serving.sent_bytes += result.bytes_from_b
        world.tunnels.pop(tunnel, None)
        serving.finish_tunnel(101, "ok" if result.end is End.CLEAN else f"tunnel_{result.end.value}")

    down.detach()
    down.ch.write(head)
    tunnel = Tunnel(
        down.ch,
        up.ch,
        timers=world.timers,
        idle_s=ex.plan.timeouts.idle_s,
        on_done=over,
        leftover_a=from_down,
        leftover_b=from_up,
    )
    if tunnel.on_done is not None:
        world.tunnels[tunnel] = partial(serving.entry.still_allows, serving)
