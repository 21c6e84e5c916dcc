"""A non-blocking byte channel on the reactor: plain or TLS, a write buffer, read interest as back-pressure.

Knows sockets and the quirks of OpenSSL; must not know HTTP, policy or tunnels. Its owner hears `received`, `drained`,
`ended` (only where it set `half_close`) and `lost`.
Invariants: `lost` comes at most once in a channel's life, after everything that was readable has been given to
`received`, never after `close` and never from inside the owner's own call of `write`; a cut stream (reset, TLS without
close_notify, bytes of ours thrown away) is never made to look like a clean end, to neither side; buffered bytes are
bounded by what the owner writes after `write` has said False.
"""

import errno
import select
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from .reactor import ERR, HUP, IN, OUT, RDHUP, Reactor
from .timers import Timer

HIGH_BYTES, LOW_BYTES = 256 * 1024, 64 * 1024
RECORD_BYTES = 16384  # RFC 8446, 5.1: a record never holds more; reading that much leaves nothing inside OpenSSL
BURST_READS = 16  # records of one connection in one turn, so that a bulk stream cannot starve the others
READ_BYTES, READ_BULK_BYTES = 64 * 1024, 256 * 1024  # plain: one read a turn, larger while a stream fills it
TIGHT_BYTES, HELD_BYTES = 2 << 20, 4 << 20  # for all peers that do not read: from the first on less for each (`share`)
WIDE_BYTES_MAX = 2 << 20  # what windows of HTTP/2 requests may have in all, beyond those that they begin with
SMALL_BYTES = 4096  # buffered writes below this are gathered: a memoryview each would outweigh them
LINGER_BYTES, LINGER_S = 4 << 20, 1.0  # about what the kernel's buffers hold of an upload in full flight
RESET = struct.pack("ii", 1, 0)

BLOCKED = (BlockingIOError, InterruptedError, ssl.SSLWantReadError)

Data = bytes | memoryview


def share(held_bytes: int) -> int:
    """What may be held for one peer while so much is held for all: a part of what is left, so that the sum comes to
    about HELD_BYTES however many do not read (as switches share their buffers: Choudhury and Hahne, 1998)."""
    return max(SMALL_BYTES, HELD_BYTES - held_bytes >> 5)


class Owner(Protocol):
    """What a channel tells. `lost(None)` is the peer's clean end; `ended` is the same where half-close is wanted."""

    def received(self, data: bytes) -> None: ...
    def drained(self) -> None: ...
    def ended(self) -> None: ...
    def lost(self, exc: Exception | None) -> None: ...


class _Nobody:
    """The owner of a closed channel: the real one is let go at once, not by the garbage collector."""

    def received(self, data: bytes) -> None: ...
    def drained(self) -> None: ...
    def ended(self) -> None: ...
    def lost(self, exc: Exception | None) -> None: ...


NOBODY = _Nobody()
NOTHING: deque[memoryview | bytearray] = deque(maxlen=0)  # to write: an empty deque of its own has 600 bytes


class Channel:
    """`sock` is a connected non-blocking socket or SSLSocket after its handshake (`suppress_ragged_eofs=False`).
    Make it, and call it, only in the reactor's own callbacks or through `Reactor.call`.
    `watch_hangup`: a peer that goes away is `lost` even while paused (what it sent before is then given up)."""

    __slots__ = (
        "_after_flush", "_broken", "_discard_left", "_ending", "_fault", "_full", "_hooked", "_linger_s", "_mask",
        "_poll", "_read_bytes", "_read_wants_write", "_recv", "_send", "_tail", "_timer", "_write_wants_read", "eof",
        "fd", "fingerprint", "half_close", "notify_empty", "open", "out", "out_bytes", "owner", "peer", "reactor",
        "reading", "sock", "tls", "watch_hangup",
    )  # fmt: skip

    def __init__(
        self,
        reactor: Reactor,
        sock: Any,
        owner: Owner,
        watch_hangup: bool,
        *,
        peer: str = "",
        fingerprint: str = "",
    ) -> None:
        """`peer` and `fingerprint`: whom the other end has proven to be, and by which certificate."""
        self.reactor = reactor
        self.sock = sock
        self.owner: Owner = owner
        self.watch_hangup = watch_hangup
        self.peer = peer
        self.fingerprint = fingerprint
        self.fd: int = sock.fileno()
        self.tls = hasattr(sock, "pending")
        self._recv: Callable[[int], bytes] = sock.recv
        self._send: Callable[[Data], int] = sock.send
        inner = getattr(sock, "_sslobj", None)
        if inner is not None:
            # Past SSLSocket's two Python frames a call, worth some percent of a warm request. They only tell ragged
            # ends from others, which `suppress_ragged_eofs=False` switches off.
            self._recv, self._send = inner.read, inner.write
        self._read_bytes = RECORD_BYTES if self.tls else READ_BYTES
        self.out: deque[memoryview | bytearray] = NOTHING
        self.out_bytes = 0
        self.open = self.reading = True
        self.half_close = False
        self.eof = False  # the peer's clean end has been told by `ended`
        self.notify_empty = False  # `drained` also when the buffer becomes empty
        self._tail: Exception | bool = False  # what came behind the last burst: an error, or True for a clean end
        self._fault: Exception | None = None  # why writing has failed
        self._broken = self._ending = False
        self._full = False  # `write` has said so
        self._read_wants_write = self._write_wants_read = False
        self._after_flush: Callable[[], None] | None = None
        self._discard_left = 0
        self._timer: Timer | None = None
        self._linger_s = LINGER_S
        self._mask = IN
        self._poll: select.poll | None = None
        self._hooked = True
        reactor.add(self.fd, self, IN)
        if self.tls and sock.pending():  # decrypted by the handshake: epoll will never tell
            reactor.soon.append(self._read)

    # -- events from the reactor
    def ready(self, events: int) -> None:
        retry_read = False
        if self._write_wants_read and events & (IN | HUP | ERR):
            self._write_wants_read = False
            self._flush()
        if events & OUT:
            if self._read_wants_write:
                self._read_wants_write, retry_read = False, True
                self._interest()
            if self.out:
                self._flush()
        if not self.open:
            return
        if self.reading:
            if retry_read or events & ~OUT:
                self._read()
        elif events & (ERR | HUP | RDHUP):
            self._hung_up(events)

    def crashed(self, exc: Exception) -> None:
        """Our own failure. Reset, so that what was being sent does not look complete."""
        if self.open:
            owner = self.owner
            self.cut()
            owner.lost(exc)

    # -- for the owner
    def write(self, data: Data) -> bool:
        """False when the buffer is over its high mark: stop the source until `drained`. After a failure bytes are
        dropped without a word here; `lost` comes from the read side, so that an early answer is still read."""
        if self.out:
            if not self._ending:
                self._append(data)
                return self._has_room()
        elif self.open and not self._broken and not self._ending and data:
            try:
                sent = self._send(data)
            except (BlockingIOError, ssl.SSLWantWriteError):
                sent = 0
            except ssl.SSLWantReadError:
                sent, self._write_wants_read = 0, True
            except OSError as exc:
                self._write_failed(exc)
                return True
            size = len(data)
            if sent == size:
                return True
            # After WANT_WRITE OpenSSL insists on the same bytes again (the buffer may move, the content may not).
            self.out = deque((memoryview(data)[sent:],))
            self.out_bytes = size - sent
            self.reactor.held_bytes += size - sent
            if sent and not self._write_wants_read:  # TLS writes one record a call: go on with the next
                self._flush(telling=False)
            self._interest()
            return self._has_room()
        if self._ending and self.open:
            raise RuntimeError("write after end()")
        return True

    def _has_room(self) -> bool:
        """Whether the buffer is below its high mark."""
        held = self.reactor.held_bytes
        if self.out_bytes < (HIGH_BYTES if held < TIGHT_BYTES else share(held)):
            return True
        self._full = True
        return False

    def pause(self) -> None:
        if self.reading:
            self.reading = False
            self._interest()

    def resume(self) -> None:
        if not self.reading and self.open and not self.eof:
            self.reading = True
            self._interest()
            if self._tail is not False or (self.tls and self.sock.pending()):
                self.reactor.soon.append(self._read)  # of these epoll does not tell

    def end(self) -> None:
        """Half-close our side once the buffer has gone. TLS has no safe half-close (wire/tcp_frames.py says why)."""
        if self.tls:
            raise RuntimeError("a TLS channel cannot be half-closed; frame the stream instead")
        if self.open and not self._ending:
            self._ending = True
            if not self.out:
                self._send_fin()

    def close(self) -> None:
        """At once and silently. Bytes of ours that have not left make it a cut, which must not look like an end."""
        if self.open:
            if self.out:
                self.cut()
                return
            if self.tls and not self._broken:
                try:
                    self.sock.unwrap()  # sends close_notify; does not wait for the peer's
                except (OSError, ValueError):
                    pass
            self._dismiss()

    def abort(self) -> None:
        """Reset: the peer sees a broken stream, and what it has not read yet may be gone."""
        if self.open:
            try:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            except OSError:
                pass
            self._dismiss()

    def cut(self) -> None:
        """The peer sees a broken stream, after what has left: TLS tells truncation, a plain socket needs a reset."""
        if self.tls:
            if self.open:
                self._dismiss()
        else:
            self.abort()

    def close_when_flushed(self) -> None:
        """Silent like `close`. The owner's timer must bound it: a peer that does not read keeps it open."""
        if self.out:
            self._after_flush = self.close
        else:
            self.close()

    def linger_close(self, timeout_s: float = LINGER_S) -> None:
        """The end of an answer to a peer that may still be sending. Closing with unread bytes sends a reset, which
        may destroy our answer on its way (RFC 9112, 9.6): flush (bounded by the owner's timer), half-close, discard
        what comes for `timeout_s` at most, close. The owner hears nothing more but one `lost` at the end."""
        if not self.open or self._discard_left:
            return
        self._discard_left = LINGER_BYTES
        self._timer = Timer(self.reactor.timers, self._linger_over)
        self._linger_s = timeout_s
        self.notify_empty = self.eof = False
        self._tail = False
        self.reading = True
        self._interest()
        if self.out:
            self._after_flush = self._linger_flushed
        else:
            self._linger_flushed()

    def unread(self) -> bool:
        """Is there anything to read (data or end) before this idle connection is used again?"""
        if not self.open or self.eof or self._broken or self._tail is not False:
            return True
        if self.tls and self.sock.pending():
            return True
        poll = self._poll
        if poll is None:  # a quarter of the cost of a peek, whose usual answer is an exception
            poll = self._poll = select.poll()
            poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(0))

    # -- reading
    def _read(self) -> None:
        if not (self.open and self.reading):
            return
        if self._discard_left:
            self._discard()
            return
        if self._tail is not False:
            self._finish_read()
            return
        size, held = self._read_bytes, self.reactor.held_bytes
        if held >= TIGHT_BYTES and not self.tls:  # of a record OpenSSL holds what is not read
            size = min(size, share(held))
        try:
            data = self._recv(size)
            if len(data) == size:
                data = self._read_more(data)
        except BLOCKED:
            return
        except ssl.SSLWantWriteError:
            self._read_wants_write = True
            self._interest()
            return
        except ssl.SSLZeroReturnError:
            data = b""
        except OSError as exc:  # SSLError is one
            self._lost(exc)
            return
        if not data:
            self._tail = True
            self._finish_read()
            return
        if not self.tls and len(data) < READ_BYTES // 2:
            self._read_bytes = READ_BYTES
        self.owner.received(data)
        self._after_received()

    def _read_more(self, data: bytes) -> bytes:
        """A full read: a bulk stream. What stands behind the data (`_tail`) is told only after it; OpenSSL tells it
        once, and epoll not at all."""
        if self.reactor.held_bytes >= TIGHT_BYTES:
            if self.tls and self.sock.pending():  # of these epoll does not tell
                self.reactor.soon.append(self._read)
            return data
        if not self.tls:
            self._read_bytes = READ_BULK_BYTES
            return data
        parts = [data]
        try:
            for _ in range(BURST_READS - 1):
                data = self._recv(RECORD_BYTES)
                parts.append(data)
                if len(data) < RECORD_BYTES:
                    self._tail = not data
                    break
        except BLOCKED:
            pass
        except ssl.SSLWantWriteError:
            self._read_wants_write = True
            self._interest()
        except ssl.SSLZeroReturnError:
            self._tail = True
        except OSError as exc:
            self._tail = exc.with_traceback(None)  # whose frames would keep this channel, and its callers, alive
        return b"".join(parts)

    def _after_received(self) -> None:
        """The owner may have paused, or closed, meanwhile."""
        if self._tail is not False and self.open and self.reading:
            self._finish_read()

    def _finish_read(self) -> None:
        """The peer's stream is over: by an error, a reset that only writing has noticed, or cleanly."""
        tail = self._tail
        if isinstance(tail, Exception):
            self._lost(tail)
        elif self._fault is not None and not self.tls:
            self._lost(self._fault)
        elif self.half_close and not self._broken:
            self.eof, self.reading, self._tail = True, False, False
            self._interest()
            self.owner.ended()
        else:
            self._lost(None)

    def _hung_up(self, events: int) -> None:
        """A hang-up or an error while nothing is read."""
        if self._discard_left or ((events & ERR or self.tls) if self.eof else self.watch_hangup):
            self._lost(ConnectionResetError("the peer has gone away"))
        else:
            # It cannot be masked, so unhook or it spins. What is unread stays for resume(); a failing write reports.
            self._hooked = False
            self.reactor.hush(self.fd)

    # -- writing
    def _append(self, data: Data) -> None:
        size = len(data)
        if size >= SMALL_BYTES:
            self.out.append(memoryview(data))
        else:
            last = self.out[-1]
            if type(last) is bytearray and len(last) < RECORD_BYTES:
                last += data
            else:
                self.out.append(bytearray(data))
        self.out_bytes += size
        self.reactor.held_bytes += size

    def _flush(self, telling: bool = True) -> None:
        out, before = self.out, self.out_bytes
        try:
            while out:
                chunk = out[0]
                if type(chunk) is bytearray:
                    out[0] = chunk = memoryview(chunk)  # tried once it must not grow any more
                sent = self._send(chunk)  # type: ignore[arg-type]
                self.out_bytes -= sent
                self.reactor.held_bytes -= sent
                if sent == len(chunk):
                    out.popleft()
                else:
                    out[0] = chunk[sent:]
        except (BlockingIOError, ssl.SSLWantWriteError):
            pass
        except ssl.SSLWantReadError:
            self._write_wants_read = True
        except OSError as exc:
            self._write_failed(exc)
            return
        if not out:
            self.out = NOTHING
            if self._ending:
                self._send_fin()
            if self._after_flush is not None:
                then, self._after_flush = self._after_flush, None
                then()
                if not self.open:
                    return
        self._interest()
        low = LOW_BYTES if self.reactor.held_bytes < TIGHT_BYTES else SMALL_BYTES
        room = self.out_bytes <= low and (self._full or before > low)
        if telling and (room or (self.notify_empty and before and not self.out_bytes)):
            self._full = False
            self.owner.drained()

    def _drop_out(self) -> None:
        self.out = NOTHING
        self.reactor.held_bytes -= self.out_bytes
        self.out_bytes = 0

    def _send_fin(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as exc:
            self._write_failed(exc)

    def _write_failed(self, exc: OSError) -> None:
        """A response may still be readable (an early 413, say), so the read side reports the loss, after that. On a
        plain socket the failed write has used up the reset: the next read would look like a clean end. EPIPE after
        the peer's own FIN is none."""
        self._drop_out()
        self._broken = True
        if self._fault is None and (self.tls or exc.errno != errno.EPIPE):
            self._fault = exc.with_traceback(None)
        self.reactor.soon.append(self._report_failure)

    def _report_failure(self) -> None:
        if not self.open:
            return
        if self._after_flush is not None:  # there was nothing left but to flush
            if self._discard_left:
                self._lost(self._fault or BrokenPipeError("write failed"))
            else:
                self.abort()
        elif self.reading:
            self._interest()
            self._read()
            if self.open and self.reading and self.tls:
                # OpenSSL may have failed by itself, with a peer that stays silent.
                self._lost(self._fault or BrokenPipeError("write failed"))
        elif not self.watch_hangup and not self.eof:
            pass  # paused: what is unread is still wanted, resume() finds the end behind it
        else:
            self._lost(self._fault or BrokenPipeError("write failed"))

    # -- ends
    def _discard(self) -> None:
        """Lingering: raw bytes, even of TLS; nobody will read them."""
        try:
            got = len(socket.socket.recv(self.sock, READ_BYTES))
        except BLOCKED:
            return
        except OSError as exc:
            self._lost(exc)
            return
        self._discard_left = max(self._discard_left - got, 1)
        if got and self._discard_left > 1:
            return
        if self.out:  # nothing more is read, but our answer is still under way
            self.reading = False
            self._interest()
        else:
            self._linger_over()

    def _linger_flushed(self) -> None:
        try:
            if self.tls:
                try:
                    self.sock.unwrap()
                except (OSError, ValueError):
                    pass  # the peer's data is in the way; close_notify has gone out first
            socket.socket.shutdown(self.sock, socket.SHUT_WR)
        except OSError:
            pass  # the peer has gone
        if self.reading and self._timer is not None:
            self._timer.set(self.reactor.clock() + self._linger_s)
        else:
            self.reactor.soon.append(self._linger_over)

    def _linger_over(self) -> None:
        if self.open:
            owner = self.owner
            self._dismiss()
            owner.lost(None)

    def _lost(self, exc: Exception | None) -> None:
        if self.open:
            owner = self.owner
            if exc is None:
                self.close()
            else:
                self._dismiss()
            owner.lost(exc)

    def _dismiss(self) -> None:
        self.open = self.reading = False
        self._drop_out()
        self.owner = NOBODY
        self._after_flush = None
        if self._timer is not None:
            self._timer.close()
        self.reactor.forget(self.fd)
        if self.reactor.closed:
            self.sock.close()
        else:
            self.reactor.doomed.append(self.sock)

    def _interest(self) -> None:
        if not self.open:
            return
        if self.reading:
            mask = IN
        elif self.watch_hangup and (self.tls or not self.half_close):
            mask = RDHUP  # a plain peer that half-closes sends the same FIN as one that goes away
        else:
            mask = 0
        if self._read_wants_write:
            mask |= OUT
        if self.out:
            mask |= IN if self._write_wants_read else OUT
        if not self._hooked:
            self._hooked = True
            self._mask = mask
            self.reactor.unhush(self.fd, mask)
        elif mask != self._mask:
            self._mask = mask
            self.reactor.change(self.fd, mask)
