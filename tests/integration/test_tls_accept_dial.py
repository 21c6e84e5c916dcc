"""serve_listener and Dialler against each other and against wrong peers, over loopback with real TLS."""

import os
import resource
import socket
import ssl
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from support.pki import FAULTS, Pki
from support.tlskit import identity_files, read_all, send_all, until

from certs.files import load_identity
from sidecar.proxy.accept import Accepted, AcceptLimits, Gate, serve_listener
from sidecar.proxy.bind import BindError, bind_listener, port_holder, raise_nofile
from sidecar.proxy.connect import DialError, Dialler, OtherProtocol, WrongPeer
from sidecar.proxy.tls import HTTP1, TCP, Identity, PeerRejected, client_context, originate_context

LIMITS = AcceptLimits()
WEB, REVIEWS = "spiffe://mesh.local/service/web", "spiffe://mesh.local/service/reviews"


@dataclass
class Mesh:
    pki: Pki
    web: Identity
    reviews: Identity


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Mesh:
    pki, tmp_path = Pki(constrained=False), tmp_path_factory.mktemp("identities")
    return Mesh(
        pki,
        Identity(identity_files(pki, tmp_path, "web")),
        Identity(identity_files(pki, tmp_path, "reviews"), sni=lambda name: name in ("", "8000.reviews.mesh")),
    )


@dataclass
class Door:
    address: tuple[str, int]
    gate: Gate
    accepted: list[Accepted] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    reports: list[str] = field(default_factory=list)


@asynccontextmanager
async def serving(
    identity: Identity | None, limits: AcceptLimits = LIMITS, *, permissive=False, host="127.0.0.1", bans=frozenset()
):
    listener = bind_listener(host, 0)
    door = Door(listener.getsockname()[:2], Gate(limits))
    try:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(
                    lambda: serve_listener(
                        listener,
                        door.accepted.append,
                        call=lambda fn, *args: fn(*args),
                        tls=identity,
                        permissive=lambda: permissive,
                        gate=door.gate,
                        banned=lambda peer, fingerprint: peer in bans or fingerprint in bans,
                        on_refused=lambda address, reason: door.refused.append(reason),
                        report=door.reports.append,
                    )
                )
                yield door
                nursery.cancel_scope.cancel()
    finally:
        listener.close()
        for accepted in door.accepted:
            accepted.sock.close()


def dial(
    mesh: Mesh, address, *, timeout_s=5.0, expect=REVIEWS, sni="8000.reviews.mesh", alpn=HTTP1, context=None, bans=()
):
    contexts = mesh.web.current
    chosen = context or {HTTP1: contexts.client_http, TCP: contexts.client_tcp}[alpn]
    return Dialler(banned=lambda peer, fingerprint: peer in bans or fingerprint in bans).dial(
        address, timeout_s=timeout_s, tls_context=chosen, server_hostname=sni, expect_identity=expect, alpn=alpn
    )


async def test_both_ends_know_each_other(mesh: Mesh):
    async with serving(mesh.reviews) as door:
        dialled = await dial(mesh, door.address, alpn=TCP)
        await until(lambda: door.accepted)
        accepted = door.accepted[0]
        assert (dialled.peer, dialled.alpn) == (REVIEWS, TCP)
        assert (accepted.peer, accepted.sni, accepted.alpn) == (WEB, "8000.reviews.mesh", TCP)
        assert accepted.address == dialled.sock.getsockname()
        assert dialled.sock.version() == accepted.sock.version() == "TLSv1.3"
        assert accepted.sock.shared_ciphers()
        for sock in (dialled.sock, accepted.sock):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert not sock.getblocking()
        dialled.sock.close()
        assert not door.gate.count
        assert not door.gate.hosts


async def test_no_session_ticket_is_ever_given(mesh: Mesh):
    async with serving(mesh.reviews) as door:
        dialled = await dial(mesh, door.address)
        await until(lambda: door.accepted)
        await send_all(door.accepted[0].sock, b"x")
        assert await read_all(dialled.sock, 1) == b"x"
        assert dialled.sock.session is None or not dialled.sock.session.has_ticket
        dialled.sock.close()


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_caller_with_a_wrong_certificate_never_gets_in(mesh: Mesh, fault: str):
    context = mesh.pki.client_context("web", fault=fault)
    context.set_alpn_protocols([HTTP1])
    async with serving(mesh.reviews) as door:
        try:
            dialled = await dial(mesh, door.address, context=context)
        except DialError:
            pass
        else:  # with TLS 1.3 the client is done before the server has judged it
            with pytest.raises(OSError):
                await read_all(dialled.sock)
            dialled.sock.close()
        await until(lambda: door.refused)
        assert door.accepted == []
        assert "certificate" in door.refused[0], door.refused


async def test_a_caller_without_a_certificate_never_gets_in(mesh: Mesh):
    async with serving(mesh.reviews) as door:
        dialled = await dial(mesh, door.address, context=mesh.pki.client_context(None), alpn=None)
        with pytest.raises(ssl.SSLError):
            await read_all(dialled.sock)
        dialled.sock.close()
        assert door.accepted == []
        assert "certificate" in door.refused[0]


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_callee_with_a_wrong_certificate_hears_no_byte(mesh: Mesh, fault: str):
    await check_callee_refused(mesh, mesh.pki.server_context("reviews", fault=fault), "certificate")


async def test_a_callee_in_another_services_name_hears_no_byte(mesh: Mesh):
    await check_callee_refused(mesh, mesh.pki.server_context("ratings"), "expected spiffe://mesh.local/service/reviews")


async def check_callee_refused(mesh: Mesh, context: ssl.SSLContext, reason: str) -> None:
    context.set_alpn_protocols([HTTP1])
    heard: list[bytes] = []

    async def callee(stream: trio.SocketStream) -> None:
        tls = trio.SSLStream(stream, context, server_side=True)
        try:
            async for data in tls:
                heard.append(data)
        except trio.BrokenResourceError:
            pass

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, callee, 0)
        address = listeners[0].socket.getsockname()[:2]
        with pytest.raises(WrongPeer, match=reason) as caught:
            await dial(mesh, ("127.0.0.1", address[1]))
        assert isinstance(caught.value, PeerRejected)
        await trio.sleep(0.02)
        nursery.cancel_scope.cancel()
    assert heard == []


async def test_a_callee_that_does_not_speak_the_alpn_is_refused(mesh: Mesh):
    context = client_context(mesh.web.current.identity, ["h3"])
    async with serving(mesh.reviews) as door:
        with pytest.raises(OtherProtocol, match="expected ALPN h3, but the peer chose none"):
            await dial(mesh, door.address, context=context, alpn="h3")


async def test_an_unknown_sni_is_refused_in_the_handshake(mesh: Mesh):
    async with serving(mesh.reviews) as door:
        with pytest.raises(DialError, match="unrecognized name"):
            await dial(mesh, door.address, sni="9000.other.mesh")
        await until(lambda: door.refused)
        assert door.accepted == []


async def test_a_server_name_that_is_no_text_is_refused_without_a_word_on_stderr(mesh: Mesh):
    """Python decodes it as ASCII and prints a traceback of its own: a stranger could fill the log, or block us."""
    async with serving(mesh.reviews) as door:
        dialled = await Dialler().dial(door.address, timeout_s=5)
        hello = client_hello(mesh)
        assert b"8000.reviews.mesh" in hello
        await send_all(dialled.sock, hello.replace(b"8000.reviews.mesh", b"8000.\xff\xfeviews.mesh"))
        await until(lambda: door.refused)
        assert door.refused == ["TLS: callback failed"]
        dialled.sock.close()


async def test_tls_1_2_is_refused(mesh: Mesh):
    context = mesh.pki.client_context("web")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with serving(mesh.reviews) as door:
        with pytest.raises(DialError, match="protocol version"):
            await dial(mesh, door.address, context=context)


async def test_a_replaced_identity_serves_the_next_connection_and_leaves_the_others(mesh: Mesh, tmp_path: Path):
    directory = mesh.pki.identity(tmp_path, "reviews")
    identity = Identity(load_identity(directory))
    async with serving(identity) as door:
        first = await dial(mesh, door.address)
        mesh.pki.write(directory, mesh.pki.leaf("reviews"))
        identity.replace(load_identity(directory))
        second = await dial(mesh, door.address)
        await until(lambda: len(door.accepted) == 2)
        assert first.sock.getpeercert(True) != second.sock.getpeercert(True)
        await send_all(first.sock, b"still here")
        assert await read_all(door.accepted[0].sock, 10) == b"still here"
        first.sock.close()
        second.sock.close()


async def test_the_fingerprint_is_that_of_the_peers_leaf(mesh: Mesh):
    async with serving(mesh.reviews) as door:
        dialled = await dial(mesh, door.address)
        await until(lambda: door.accepted)
        assert door.accepted[0].fingerprint == mesh.web.current.identity.fingerprint
        assert dialled.fingerprint == mesh.reviews.current.identity.fingerprint
        dialled.sock.close()


@pytest.mark.parametrize("by", ["identity", "certificate"])
async def test_a_banned_caller_is_refused(mesh: Mesh, by: str):
    banned = {"identity": WEB, "certificate": mesh.web.current.identity.fingerprint}[by]
    async with serving(mesh.reviews, bans={banned}) as door:
        dialled = await dial(mesh, door.address)  # TLS 1.3: the client has finished before it is judged
        await until(lambda: door.refused)
        assert not door.accepted and door.refused[0].startswith(f"the peer is banned: {WEB}, certificate ")
        with suppress(OSError):
            assert await read_all(dialled.sock) == b""
        dialled.sock.close()


@pytest.mark.parametrize("by", ["identity", "certificate"])
async def test_a_banned_callee_is_not_spoken_to(mesh: Mesh, by: str):
    banned = {"identity": REVIEWS, "certificate": mesh.reviews.current.identity.fingerprint}[by]
    async with serving(mesh.reviews) as door:
        with pytest.raises(WrongPeer, match=f"the peer is banned: {REVIEWS}"):
            await dial(mesh, door.address, bans={banned})
        await until(lambda: door.accepted)
        with pytest.raises(ssl.SSLEOFError):  # and nothing before it
            await read_all(door.accepted[0].sock)


async def test_a_certificate_that_need_not_be_shown_must_be_good_if_it_is(mesh: Mesh, tmp_path: Path):
    identity = Identity(identity_files(mesh.pki, tmp_path, "reviews"), client_auth=ssl.CERT_OPTIONAL, alpn=(HTTP1,))
    async with serving(identity) as door:
        for caller, fault, peer in (("web", None, WEB), (None, None, "")):
            context = mesh.pki.client_context(caller, fault=fault)
            dialled = await dial(mesh, door.address, context=context, alpn=None)
            await until(lambda: door.accepted)
            accepted = door.accepted.pop()
            assert accepted.peer == peer and len(accepted.fingerprint) == (64 if peer else 0)
            accepted.sock.close()
            dialled.sock.close()
        for fault in FAULTS:
            with suppress(OSError, DialError):
                (
                    await dial(mesh, door.address, context=mesh.pki.client_context("web", fault=fault), alpn=None)
                ).sock.close()
            await until(lambda: door.refused)
            assert not door.accepted, fault
            door.refused.clear()


async def test_unix_sockets(tmp_path: Path):
    path = tmp_path / "app.sock"
    address = f"unix:{path}", 0
    with pytest.raises(DialError, match=f"unix:{path}: No such file"):
        await Dialler().dial(address, timeout_s=1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        with pytest.raises(DialError, match=f"unix:{path}: Connection refused"):
            await Dialler().dial(address, timeout_s=1)
        listener.listen(0)
        dialled = await Dialler(mark=1).dial(address, timeout_s=1)
        assert not dialled.sock.getblocking() and (dialled.peer, dialled.alpn) == ("", None)
        conn, _ = listener.accept()
        await send_all(dialled.sock, b"hello")
        assert conn.recv(9) == b"hello"
        conn.close()
        dialled.sock.close()


async def test_a_unix_socket_whose_queue_is_full_is_waited_for(tmp_path: Path):
    path = tmp_path / "app.sock"
    address = f"unix:{path}", 0
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        first = await Dialler().dial(address, timeout_s=1)
        with pytest.raises(DialError, match=r"no connection within 0\.1 s"):
            await Dialler().dial(address, timeout_s=0.1)
        second: list[Any] = []
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:

                async def again() -> None:
                    second.append(await Dialler().dial(address, timeout_s=4))

                nursery.start_soon(again)
                await trio.sleep(0.05)
                assert not second
                listener.accept()[0].close()
        for dialled in (first, *second):
            dialled.sock.close()


async def test_permissive_lets_plain_callers_in_beside(mesh: Mesh):
    async with serving(mesh.reviews, permissive=True) as door:
        plain = await Dialler().dial(door.address, timeout_s=5)
        await send_all(plain.sock, b"GET / HTTP/1.1\r\n\r\n")
        mutual = await dial(mesh, door.address)
        await until(lambda: len(door.accepted) == 2)
        assert sorted(accepted.peer for accepted in door.accepted) == ["", WEB]
        unproven = next(accepted for accepted in door.accepted if not accepted.peer)
        assert await read_all(unproven.sock, 3) != b""  # the byte that was looked at is still there
        plain.sock.close()
        mutual.sock.close()


async def test_plain_bytes_on_a_strict_listener_are_refused(mesh: Mesh):
    async with serving(mesh.reviews) as door:
        plain = await Dialler().dial(door.address, timeout_s=5)
        await send_all(plain.sock, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await until(lambda: door.refused)
        assert door.accepted == []
        assert door.refused[0].startswith("TLS: ")
        plain.sock.close()


async def test_silent_clients_cannot_lock_out_the_one_that_speaks(mesh: Mesh):
    limits = AcceptLimits(waiting_per_address=8, waiting=16)
    async with serving(mesh.reviews, limits) as door:
        silent = [(await Dialler().dial(door.address, timeout_s=5)).sock for _ in range(30)]
        await until(lambda: len(door.refused) == 22)  # the oldest gave way
        assert door.gate.count == 8
        dialled = await dial(mesh, door.address, timeout_s=0.5)
        await until(lambda: door.accepted)
        assert not dialled.sock.close()
        for sock in silent:
            sock.close()


async def test_clients_that_stop_in_the_handshake_give_up_their_slots(mesh: Mesh):
    limits = AcceptLimits(handshakes=2, handshakes_per_address=2, stall_s=0.02)
    async with serving(mesh.reviews, limits) as door:
        halves = []
        for _ in range(6):
            sock = (await Dialler().dial(door.address, timeout_s=5)).sock
            await send_all(sock, client_hello(mesh))
            halves.append(sock)
        dialled = await dial(mesh, door.address, timeout_s=1)
        await until(lambda: door.accepted)
        assert any("middle of the handshake" in reason for reason in door.refused)
        dialled.sock.close()
        for sock in halves:
            sock.close()


def client_hello(mesh: Mesh) -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = mesh.web.current.client_http.wrap_bio(incoming, outgoing, server_hostname="8000.reviews.mesh")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


async def test_a_handshake_has_a_time_limit(mesh: Mesh):
    async with serving(mesh.reviews, AcceptLimits(handshake_s=0.05)) as door:
        dialled = await Dialler().dial(door.address, timeout_s=5)
        await until(lambda: door.refused)
        assert door.refused == ["no complete handshake in time"]
        assert await read_all(dialled.sock) == b""
        dialled.sock.close()


async def test_a_handshake_storm_leaves_the_scheduler_its_turns(mesh: Mesh):
    """However many handshakes: between any two steps every other runnable task has its turn."""
    async with serving(mesh.reviews) as door:
        passes = 0
        at: list[int] = []

        async def others() -> None:
            nonlocal passes
            while True:
                passes += 1
                await trio.lowlevel.checkpoint()

        step = door.gate.turn.step

        async def counted(sock: Any) -> None:
            try:
                await step(sock)
            finally:
                at.append(passes)

        door.gate.turn.step = counted  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(others)
            async with trio.open_nursery() as callers:
                for _ in range(40):
                    callers.start_soon(storm_one, mesh, door)
            nursery.cancel_scope.cancel()
        assert len(door.accepted) == 40
        assert len(at) >= 80  # two steps each
        assert len(set(at)) == len(at)  # never two in one pass


async def storm_one(mesh: Mesh, door: Door) -> None:
    dialled = await dial(mesh, door.address)
    await until(lambda: any(a.address == dialled.sock.getsockname() for a in door.accepted))
    dialled.sock.close()


async def test_running_out_of_descriptors_pauses_and_recovers():
    async with serving(None) as door:
        clients = [socket.socket() for _ in range(3)]
        for client in clients:
            client.setblocking(False)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        spare = os.open(os.devnull, os.O_RDONLY)
        hogs = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, limits[1]))
        try:
            with suppress(OSError):
                while True:
                    hogs.append(os.dup(spare))
            for client in clients[:2]:
                with pytest.raises(BlockingIOError):
                    client.connect(door.address)
            await until(lambda: door.reports)
            assert "open files" in door.reports[0]
            await trio.sleep(0.15)
            assert door.accepted == []
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for fd in (spare, *hogs):
                os.close(fd)
        with pytest.raises(BlockingIOError):
            clients[2].connect(door.address)
        await until(lambda: any(a.address == clients[2].getsockname() for a in door.accepted))
        assert len(door.reports) == 1
        for client in clients:
            client.close()


async def test_a_listener_that_is_closed_while_it_accepts_is_no_error():
    """Its owner closes it in the very pass in which callers arrive: whoever came first stays, nothing is raised."""
    listener = bind_listener("127.0.0.1", 0)
    callers = [socket.create_connection(listener.getsockname()) for _ in range(2)]
    accepted: list[Accepted] = []

    def ends(one: Accepted) -> None:
        accepted.append(one)
        listener.close()

    with trio.fail_after(5):
        await serve_listener(listener, ends, call=lambda fn, *args: fn(*args))
        await serve_listener(listener, ends, call=lambda fn, *args: fn(*args))
    assert len(accepted) == 1
    for sock in (*callers, accepted[0].sock):
        sock.close()


async def test_ipv6_listens_and_dials():
    try:
        door_open = serving(None, host="::1")
        async with door_open as door:
            dialled = await Dialler().dial(("::1", door.address[1]), timeout_s=5)
            await until(lambda: door.accepted)
            assert door.accepted[0].address[0] == "::1"
            dialled.sock.close()
    except BindError:
        pytest.skip("this machine has no IPv6")


async def test_names_are_resolved_and_kept_for_a_moment():
    async with serving(None) as door:
        dialler = Dialler()
        for _ in range(2):
            dialled = await dialler.dial(("localhost", door.address[1]), timeout_s=5)
            dialled.sock.close()
        assert list(dialler.resolver.cache) == [("localhost", door.address[1])]
        with pytest.raises(DialError, match=r"nowhere\.invalid cannot be resolved"):
            await dialler.dial(("nowhere.invalid", 80), timeout_s=20)


async def test_dial_errors_say_where_and_why(mesh: Mesh):
    with bind_listener("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(DialError, match=f"127.0.0.1 port {port}: no connection within 0.05 s"):
            await dial(mesh, ("127.0.0.1", port), timeout_s=0.05)
    with pytest.raises(DialError, match=f"127.0.0.1 port {port}: Connection refused"):
        await dial(mesh, ("127.0.0.1", port))


async def test_a_cancelled_dial_leaves_no_socket(mesh: Mesh):
    with bind_listener("127.0.0.1", 0) as listener:
        before = set(os.listdir("/proc/self/fd"))
        with trio.move_on_after(0.05):
            await dial(mesh, listener.getsockname())
        assert len(set(os.listdir("/proc/self/fd")) - before) == 0


async def test_originate_checks_the_host_name():
    assert originate_context().check_hostname
    assert originate_context().verify_mode is ssl.CERT_REQUIRED


def test_a_port_in_use_names_its_holder():
    with bind_listener("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(
            BindError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .* in use by .*\(pid {os.getpid()}\)"
        ):
            bind_listener("127.0.0.1", port)
    assert port_holder(port) is None


def test_other_bind_errors_are_clear():
    with pytest.raises(BindError, match="not an address of this machine"):
        bind_listener("192.0.2.1", 0)
    with pytest.raises(BindError, match="not an IP address"):
        bind_listener("reviews", 80)


def test_raise_nofile_reaches_the_hard_limit():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        assert raise_nofile() == before
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
