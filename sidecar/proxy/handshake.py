"""A TLS handshake on a non-blocking socket, step by step.

A step may cost a millisecond of CPU and blocks the thread. `Turn` lets one step through in each pass of Trio's
scheduler, however many handshakes there are, so that the reactor has its turn between any two of them.
Must not know who connects to whom. Invariant: nothing of the application's is read.
"""

import ssl

import trio


class Turn:
    """One costly step a scheduler pass, in order of arrival. Share one among all handshakes of the process."""

    def __init__(self) -> None:
        self._lock = trio.Lock()

    async def step(self, sock: ssl.SSLSocket) -> None:
        async with self._lock:
            # Whoever is next becomes runnable when this lock is released: in the next pass, not in this one.
            await trio.lowlevel.cancel_shielded_checkpoint()
            sock.do_handshake()


async def handshake(sock: ssl.SSLSocket, turn: Turn) -> None:
    """Raises OSError (SSLError is one) where the peer or the network fails. Bound it with a cancel scope."""
    while True:
        try:
            await turn.step(sock)
            return
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(sock)
        except ssl.SSLWantWriteError:
            await trio.lowlevel.wait_writable(sock)
