"""A cluster of etcd as one thing to call: failing over between its members, signed in, in TLS.

Unary calls are gRPC futures whose end wakes the task that waits, so they take no thread; what blocks (streams, reading
files, diagnosis) runs in worker threads with a limiter of its own. Must not know what is stored.
Invariants: what reads, or may be done twice, is tried on every member until the time is up; what changes something is
sent again only where it cannot have happened (one that was not confirmed may even happen later, when a frozen member
goes on); every error that leaves here is a StoreError, or Rejected for the caller
that knows what it asked for; the password and the token are in no text.
"""

import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any

import trio

from control_plane.store.base import StoreFull, StoreRefused, StoreUnavailable
from control_plane.store.etcd_diagnosis import Finding, TlsFiles, diagnose
from control_plane.store.etcd_faults import REMEDY_FULL, Fault, Rejected, in_words, judge, refusal
from control_plane.store.etcd_package import etcd3, grpc, rpc
from control_plane.store.open import EtcdOptions

TIMEOUT_S = 5.0  # of a call, all members together
PROVEN_S = 2.0  # a member that answered so lately is given a change without asking first whether it lives
PROBE_S = 1.0
PAUSE_S, PAUSE_MAX_S = 0.05, 0.5  # between two rounds through all members
DIAGNOSIS_S = 1.0
DIAGNOSIS_KEPT_S = 5.0
THREADS_MAX = 32
WATCHES_MAX = 256  # each holds a thread all its life
RECEIVED_BYTES_MAX = 160 * 1024 * 1024  # a conflict can bring 128 values of 1 MiB
VERSION_MIN = (3, 4)

_CHANNEL_OPTIONS = {
    "grpc.max_receive_message_length": RECEIVED_BYTES_MAX,
    "grpc.max_send_message_length": RECEIVED_BYTES_MAX,  # etcd has a limit of its own, and tells it
    # A member that is frozen or cut off keeps its connections: pings find out. etcd ends a connection that pings more
    # often than every 5 s, or while no call is open.
    "grpc.keepalive_time_ms": 10_000,
    "grpc.keepalive_timeout_ms": 5_000,
    "grpc.keepalive_permit_without_calls": 0,
    "grpc.http2.max_pings_without_data": 0,
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 1000,  # this is the time that a connection may take, too
    "grpc.max_reconnect_backoff_ms": 2000,
    "grpc.use_local_subchannel_pool": 1,  # two stores of one process share no connection
    "grpc.enable_http_proxy": 0,
    "grpc.enable_retries": 0,  # what may be sent twice is decided here
}

Invoke = Callable[["Member", Sequence[tuple[str, str]], float], Awaitable[Any]]


class _Failed(Exception):
    """This member did not do it."""

    def __init__(self, reason: str, sure: bool) -> None:
        super().__init__(reason)
        self.sure = sure  # that nothing happened


class Member:
    """One address, its connection, and what is known of it."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.client: Any = None
        self.answered_at = -math.inf
        self.reason = "not tried yet"
        self.unreached = False  # the last call did not get as far as etcd
        self.finding: Finding | None = None
        self.diagnosed_at = -math.inf

    def failed(self, code: str, details: str) -> None:
        self.reason = in_words(code, details)
        self.unreached = "etcdserver" not in details
        self.answered_at = -math.inf


class Cluster:
    def __init__(self, hosts: Sequence[tuple[str, int]], options: EtcdOptions, timeout_s: float = TIMEOUT_S) -> None:
        if not hosts:
            raise ValueError("no etcd host given")
        self.members = [Member(host, port) for host, port in hosts]
        self.timeout_s = timeout_s
        self.limiter = trio.CapacityLimiter(THREADS_MAX)
        self.watch_limiter = trio.CapacityLimiter(WATCHES_MAX)
        self.closed = False
        self._options = options
        self._tls: TlsFiles | None = None
        if options.cacert is not None:
            cert, key = (None if path is None else str(path) for path in (options.cert, options.key))
            self._tls = TlsFiles(str(options.cacert), cert, key)
        elif options.cert is not None or options.key is not None:
            raise StoreRefused("a client certificate of etcd needs the CA of the servers too (cacert)")
        self._first = 0  # the member that answered last
        self._token: str | None = None
        self._signing_in = trio.Lock()
        self._making = trio.Lock()
        self._diagnosing = trio.Lock()

    @property
    def names(self) -> str:
        return ", ".join(member.name for member in self.members)

    @property
    def secured(self) -> bool:
        return self._tls is not None

    async def check(self) -> None:
        """At the start: the files are good, one member answers, and it is new enough."""
        if self._tls is not None:
            try:
                await self.in_thread(self._tls.context)
            except ValueError as exc:
                raise StoreRefused(f"etcd: {exc}") from None
        status, member = await self.call_where(lambda client: client.maintenancestub.Status, rpc.StatusRequest())
        found = [int(part) if part.isdigit() else 0 for part in status.version.split(".")[:2]]
        if tuple(found) < VERSION_MIN:
            raise StoreRefused(f"{member.name} runs etcd {status.version}; pillion needs 3.4 or later: upgrade it")

    # -- calls

    async def call(self, method: Callable[[Any], Any], request: Any, *, change: bool = False) -> Any:
        """`method` picks the stub's method from a client. `change`: doing it twice would be wrong."""
        answer, _ = await self.call_where(method, request, change=change)
        return answer

    async def call_where(
        self, method: Callable[[Any], Any], request: Any, *, change: bool = False
    ) -> tuple[Any, Member]:
        """The answer, and who gave it."""

        async def invoke(member: Member, metadata: Sequence[tuple[str, str]], timeout_s: float) -> Any:
            return await _unary(method(member.client), request, metadata, timeout_s)

        return await self._anywhere(invoke, change)

    async def call_streamed(self, method: Callable[[Any], Any], requests: Sequence[Any]) -> list[Any]:
        """Many requests and as many answers over one stream; safe to repeat."""

        async def invoke(member: Member, metadata: Sequence[tuple[str, str]], timeout_s: float) -> list[Any]:
            call = method(member.client)(iter(requests), timeout=timeout_s, metadata=metadata)
            try:
                answers: list[Any] = await self.in_thread(list, call)
            finally:
                call.cancel()
            if len(answers) != len(requests):
                member.failed("UNKNOWN", "the stream ended early")
                raise _Failed(member.reason, sure=False)
            return answers

        answers, _ = await self._anywhere(invoke, change=False)
        return answers  # type: ignore[no-any-return]

    async def _anywhere(self, invoke: Invoke, change: bool) -> tuple[Any, Member]:
        deadline = trio.current_time() + self.timeout_s
        pause = PAUSE_S
        while True:
            for member in self.members[self._first :] + self.members[: self._first]:
                left = deadline - trio.current_time()
                if left <= 0:
                    break
                try:
                    answer = await self._at(member, invoke, change, left)
                except _Failed as exc:
                    self.blame(member)
                    if not exc.sure and change:
                        raise StoreUnavailable(
                            f"etcd at {member.name} did not confirm ({exc}): it may or may not have happened"
                        ) from None
                else:
                    self._first = self.members.index(member)
                    return answer, member
            await self._raise_if_refused()
            if trio.current_time() + pause >= deadline:
                raise StoreUnavailable(await self._unavailable())
            await trio.sleep(pause)
            pause = min(2 * pause, PAUSE_MAX_S)

    async def _at(self, member: Member, invoke: Invoke, change: bool, left_s: float) -> Any:
        """One call to one member; signs in again once, where the token is not good any more."""
        if not change and len(self.members) > 1:
            left_s = min(left_s, max(PROBE_S, left_s / 2))
        began = trio.current_time()
        if change and began - member.answered_at > PROVEN_S:
            await self._probe(member, min(left_s, PROBE_S))
        for again in (False, True):
            try:
                token = await self._signed_in(member, left_s)
                answer = await self._attempt(member, invoke, left_s, token)
            except Rejected as exc:
                if exc.fault is not Fault.TOKEN:
                    raise
                if not self._options.user:
                    text = refusal("UNAUTHENTICATED", exc.details, self._options.user, self._options.prefix)
                    raise StoreRefused(text) from None
                self.forget(token)
                if again:  # it lags behind the member that gave the token, or tokens live for moments only
                    member.failed("UNAUTHENTICATED", exc.details)
                    raise _Failed(member.reason, sure=True) from None
            else:
                return answer
        raise AssertionError

    async def _probe(self, member: Member, timeout_s: float) -> None:
        """Does it answer at all? Asked before a change is given to a member that was not heard of lately: a change
        that gets no answer is one of which nobody knows whether it happened."""

        async def status(member: Member, meta: Sequence[tuple[str, str]], timeout_s: float) -> None:
            await _unary(member.client.maintenancestub.Status, rpc.StatusRequest(), meta, timeout_s)

        try:
            await self._attempt(member, status, timeout_s)
        except _Failed as exc:
            raise _Failed(str(exc), sure=True) from None
        except (Rejected, StoreRefused):
            pass  # it does

    async def _attempt(self, member: Member, invoke: Invoke, timeout_s: float, token: str | None = None) -> Any:
        """Raises _Failed, Rejected or StoreError."""
        await self.connect(member)
        try:
            # The deadline is gRPC's own; this one is for what never gets there.
            with trio.fail_after(timeout_s + 1):
                answer = await invoke(member, metadata(token), timeout_s)
        except grpc.RpcError as exc:
            raise self.failure(member, exc) from None
        except ValueError as exc:  # gRPC's way to say that the channel is closed
            if "closed channel" not in str(exc):
                raise
            member.failed("UNAVAILABLE", "the connection is made anew")
            raise self._closed_or(_Failed(member.reason, sure=True)) from None
        except trio.TooSlowError:
            member.failed("DEADLINE_EXCEEDED", "")
            raise _Failed(member.reason, sure=False) from None
        member.answered_at = trio.current_time()
        member.unreached, member.finding = False, None
        return answer

    def failure(self, member: Member, exc: Any) -> Exception:
        """What an RpcError means: a _Failed, Rejected or StoreError."""
        code, details = exc.code().name, exc.details() or ""
        fault = judge(code, details)
        if fault in (Fault.UNSENT, Fault.UNSURE):
            member.failed(code, details)
            return self._closed_or(_Failed(member.reason, sure=fault is Fault.UNSENT))
        if fault is Fault.REFUSED:
            return StoreRefused(refusal(code, details, self._options.user, self._options.prefix))
        if fault is Fault.FULL:
            return StoreFull(REMEDY_FULL)
        return Rejected(fault, details)

    def _closed_or(self, exc: Exception) -> Exception:
        return StoreUnavailable("the store is closed") if self.closed else exc

    def blame(self, member: Member) -> None:
        """The next call begins with another member."""
        if self.members[self._first] is member:
            self._first = (self._first + 1) % len(self.members)
        member.answered_at = -math.inf

    # -- connections

    async def connect(self, member: Member) -> None:
        """No checkpoint follows once it is connected."""
        if member.client is not None and not self.closed:
            return
        async with self._making:
            if member.client is None and not self.closed:
                tls = self._tls
                make = partial(
                    etcd3.Etcd3Client,
                    host=f"[{member.host}]" if ":" in member.host else member.host,
                    port=member.port,
                    ca_cert=tls and tls.cacert,
                    cert_cert=tls and tls.cert,
                    cert_key=tls and tls.key,
                    grpc_options=list(_CHANNEL_OPTIONS.items()),
                )
                try:
                    member.client = await self.in_thread(make)
                except OSError as exc:
                    raise StoreRefused(f"etcd: cannot read {exc.filename}: {exc.strerror}") from None
        if self.closed:
            raise StoreUnavailable("the store is closed")

    async def token(self, member: Member) -> str | None:
        """For a stream that the caller opens itself; `metadata` takes it."""
        try:
            return await self._signed_in(member, self.timeout_s)
        except _Failed as exc:
            raise StoreUnavailable(f"etcd at {member.name}: {exc}") from None

    def forget(self, token: str | None) -> None:
        if self._token == token:
            self._token = None

    async def _signed_in(self, member: Member, timeout_s: float) -> str | None:
        if not self._options.user:
            return None
        async with self._signing_in:
            if self._token is None:
                try:
                    self._token = await self._attempt(member, self._sign_in, timeout_s)
                except _Failed as exc:  # what was wanted was not even asked for
                    raise _Failed(str(exc), sure=True) from None
            return self._token or None

    async def _sign_in(self, member: Member, meta: Sequence[tuple[str, str]], timeout_s: float) -> str:
        request = rpc.AuthenticateRequest(name=self._options.user, password=self._options.password)
        stub = rpc.AuthStub(member.client.channel)
        try:
            answer = await _unary(stub.Authenticate, request, meta, timeout_s)
        except grpc.RpcError as exc:
            # As etcd's own client does: a password that nobody asks for is no error.
            if "authentication is not enabled" in (exc.details() or ""):
                return ""
            raise
        return str(answer.token)

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await trio.to_thread.run_sync(function, *arguments, limiter=self.limiter, abandon_on_cancel=True)

    async def aclose(self) -> None:
        self.closed = True
        clients = [member.client for member in self.members if member.client is not None]
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_close, clients)

    # -- why it fails

    async def _raise_if_refused(self) -> None:
        """All members were tried and none served: where not one of them ever will, say so at once."""
        if not all(member.unreached for member in self.members):
            return
        await self._diagnose()
        findings = [member.finding for member in self.members]
        if all(finding is not None and finding.refused for finding in findings):
            raise StoreRefused(self._texts())

    async def _unavailable(self) -> str:
        await self._diagnose()
        return f"etcd is not available: {self._texts()}"

    def _texts(self) -> str:
        """What is the matter with each, those with the same trouble together."""
        by_reason: dict[str, list[str]] = {}
        for member in self.members:
            by_reason.setdefault(member.finding.text if member.finding else member.reason, []).append(member.name)
        return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())

    async def _diagnose(self) -> None:
        """gRPC says little of why there is no connection: look for ourselves."""
        async with self._diagnosing:
            now = trio.current_time()
            async with trio.open_nursery() as nursery:
                for member in self.members:
                    if not member.unreached:
                        member.finding = None
                    elif now - member.diagnosed_at > DIAGNOSIS_KEPT_S:
                        nursery.start_soon(self._diagnose_one, member)

    async def _diagnose_one(self, member: Member) -> None:
        member.finding = await self.in_thread(diagnose, member.host, member.port, self._tls, DIAGNOSIS_S)
        member.diagnosed_at = trio.current_time()
        if member.finding is None and "handshake" in member.reason.lower() and member.client is not None:
            # With the files as they are now it works: they were replaced since gRPC read them.
            client, member.client = member.client, None
            await self.in_thread(client.close)


def metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """`hasleader`: a member that was cut off from the others says so instead of waiting."""
    leader = ("hasleader", "true")
    return (leader, ("token", token)) if token else (leader,)


async def _unary(method: Any, request: Any, meta: Iterable[tuple[str, str]], timeout_s: float) -> Any:
    """Raises grpc.RpcError. Cancelling ends the call."""
    ended = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def tell(_: object) -> None:  # in a thread of gRPC
        try:
            token.run_sync_soon(ended.set)
        except trio.RunFinishedError:
            pass

    call = method.future(request, timeout=timeout_s, metadata=tuple(meta))
    try:
        call.add_done_callback(tell)
        await ended.wait()
    finally:
        call.cancel()  # nothing happens where it has ended
    try:
        return call.result()
    except grpc.FutureCancelledError:  # by the end of its channel
        raise StoreUnavailable("the store is closed") from None


def _close(clients: Sequence[Any]) -> None:
    for client in clients:
        client.close()
