"""Addresses, certificates and passwords that are wrong: each ends in a text that says so, and nothing on stderr."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from support.etcd_cluster import Certificates, Etcd, free_ports, need_etcd
from support.store_suite import collect, put

from control_plane.store.base import StoreError, StoreRefused, StoreUnavailable
from control_plane.store.etcd import EtcdStore
from control_plane.store.etcd_package import grpc, rpc
from control_plane.store.open import EtcdOptions

Host = tuple[str, int]

pytestmark = pytest.mark.long


async def attempt(options: EtcdOptions, *hosts: Host, timeout_s: float = 5) -> str:
    """Opens it and uses it a little; "" or the error's kind and text."""
    async with trio.open_nursery() as nursery:
        try:
            store = await EtcdStore.open(hosts, options, nursery, timeout_s=timeout_s)
            try:
                at = await put(store, "a")
                async with store.watch("", at) as batches:
                    await collect(batches, await put(store, "b"))
                await store.read()
                assert await store.keep_alive([await store.grant(10)]) == frozenset()
            finally:
                await store.aclose()
        except StoreError as error:
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.fixture(autouse=True)
def nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert capfd.readouterr().err == ""


@contextmanager
def server(answer: bytes) -> Iterator[Host]:
    """Takes what comes and answers this."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock:
                    sock.settimeout(2)
                    try:
                        sock.recv(1024)
                        sock.sendall(answer)
                        while sock.recv(1024):
                            pass
                    except OSError:
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.strip()


def test_loading_leaves_the_process_as_it_was() -> None:
    """Whoever imported protobuf before, and without a word on stderr."""
    code = """
import os
before = dict(os.environ)
import google.protobuf.message
import control_plane.store.etcd
assert dict(os.environ) == before
from control_plane.store.etcd_package import grpc, rpc
# A call that fails in C
channel = grpc.secure_channel("127.0.0.1:1", grpc.ssl_channel_credentials(b"nonsense"))
try:
    rpc.MaintenanceStub(channel).Status(rpc.StatusRequest(), timeout=5)
except grpc.RpcError as exc:
    print(exc.code().name)
"""
    assert run_python(code) == "UNAVAILABLE"


def test_without_the_package() -> None:
    code = """
import sys
from control_plane.store.base import StoreRefused
sys.modules["grpc"] = None
try:
    import control_plane.store.etcd
except StoreRefused as exc:
    print(exc)
"""
    assert "pip install 'pillion[etcd]'" in run_python(code)


async def test_nothing_listens() -> None:
    (port,) = free_ports(1)
    text = await attempt(EtcdOptions(), ("127.0.0.1", port), timeout_s=0.5)
    assert text == (
        f"StoreUnavailable: etcd is not available: 127.0.0.1:{port}: connection refused: nothing listens there"
    )


async def test_no_such_name() -> None:
    text = await attempt(EtcdOptions(), ("no-such-host.invalid", 2379), timeout_s=0.5)
    assert text.startswith("StoreUnavailable: etcd is not available: no-such-host.invalid:2379: its name cannot be ")


async def test_an_http_server() -> None:
    with server(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n") as host:
        text = await attempt(EtcdOptions(), host)
        assert text.startswith("StoreRefused: ") and "an HTTP/1 server answers there, not etcd" in text
        text = await attempt(EtcdOptions(), host, ("127.0.0.1", free_ports(1)[0]), timeout_s=0.5)
        assert text.startswith("StoreUnavailable: ") and "an HTTP/1 server" in text and "connection refused" in text


async def test_something_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        text = await attempt(EtcdOptions(), listener.getsockname(), timeout_s=0.2)
    assert text.startswith("StoreUnavailable: ") and text.endswith("no answer in time")


@pytest.mark.parametrize(("version", "fine"), [("3.3.27", False), ("2.3.8", False), ("3.10.0-rc.1", True)])
async def test_an_old_etcd(version: str, fine: bool) -> None:
    class Maintenance(rpc.MaintenanceServicer):  # type: ignore[misc]
        def Status(self, request: object, context: object) -> object:
            return rpc.StatusResponse(version=version)

    with ThreadPoolExecutor(2) as threads:
        fake = grpc.server(threads)
        rpc.add_MaintenanceServicer_to_server(Maintenance(), fake)
        host = ("127.0.0.1", fake.add_insecure_port("127.0.0.1:0"))
        fake.start()
        text = await attempt(EtcdOptions(), host)
        fake.stop(None).wait()
    if fine:  # it has nothing but its version
        assert text.startswith("StoreRefused: the server there is no etcd 3")
    else:
        assert text.startswith(f"StoreRefused: 127.0.0.1:{host[1]} runs etcd {version}; pillion needs 3.4 or later")


async def test_plain_etcd_with_a_ca(tmp_path: Path) -> None:
    need_etcd()
    with Etcd(tmp_path) as etcd:
        text = await attempt(EtcdOptions(cacert=Certificates(tmp_path / "ca").ca), *etcd.hosts)
        assert text.startswith("StoreRefused: ") and "it speaks without TLS, and a CA certificate was given" in text
        # A password where nobody asks for one is no error, as in etcd's own clients.
        assert await attempt(EtcdOptions(user="somebody", password="secret"), *etcd.hosts) == ""
        member = etcd.members[0]
        member.freeze()
        text = await attempt(EtcdOptions(), *etcd.hosts, timeout_s=0.3)
        assert text.startswith("StoreUnavailable: ") and text.endswith("no answer in time")
        member.thaw()


async def test_tls_and_passwords(tmp_path: Path) -> None:
    need_etcd()
    proper = Certificates(tmp_path / "proper")
    other = Certificates(tmp_path / "other")
    token = f"jwt,{_jwt_keys(tmp_path)},sign-method=RS256,ttl=1s"
    with Etcd(tmp_path, tls=proper, arguments=["--auth-token", token]) as etcd:
        (host,) = etcd.hosts
        good = EtcdOptions(cacert=proper.ca, prefix="pillion/")
        assert await attempt(good, host) == ""
        text = await attempt(EtcdOptions(), host)
        assert text.startswith("StoreRefused: ") and "it speaks TLS, and no CA certificate was given" in text
        text = await attempt(EtcdOptions(cacert=other.ca), host)
        assert text.startswith("StoreRefused: ") and f"of an unknown CA, not of {other.ca}" in text
        text = await attempt(good, ("localhost", host[1]))
        assert text.startswith("StoreRefused: ") and "its certificate is for another name than localhost" in text
        text = await attempt(EtcdOptions(cacert=tmp_path / "none.pem"), host)
        assert text.startswith("StoreRefused: ") and "none.pem: No such file" in text

        etcd.passwords("pillion", "secret", "pillion/")
        text = await attempt(good, host)
        assert text == "StoreRefused: etcd demands a user and a password, and none was given"
        for user, password in (("pillion", "wrong-password"), ("nobody", "secret")):
            text = await attempt(EtcdOptions(cacert=proper.ca, user=user, password=password), host)
            assert text == f"StoreRefused: etcd does not accept the password of user '{user}', or has no such user"
        text = await attempt(EtcdOptions(proper.ca, user="pillion", password="secret", prefix="other/"), host)
        assert text.startswith("StoreRefused: etcd does not let user 'pillion' read and write under other/: etcdctl")
        right = EtcdOptions(proper.ca, user="pillion", password="secret", prefix="pillion/")
        assert await attempt(right, host) == ""

        async with trio.open_nursery() as nursery:  # a token lives for a second; then we sign in again, unasked
            store = await EtcdStore.open([host], right, nursery)
            at = await put(store, "a")
            async with store.watch("", at) as batches:
                assert "secret" not in store.description and "user pillion" in store.description
                await trio.sleep(1.6)
                last = await put(store, "b")
                await collect(batches, last)
            await trio.sleep(1.6)
            async with store.watch("", at) as batches:
                await collect(batches, last)
            await store.keep_alive([await store.grant(5)])
            # rights that are taken away while we run
            etcd.ctl("user", "revoke-role", "pillion", "pillion")
            with pytest.raises(StoreRefused, match="does not let user 'pillion'"):
                await put(store, "c")
            async with store.watch("", at) as batches:
                with pytest.raises(StoreRefused, match="does not let"), trio.fail_after(5):
                    await anext(batches)
            await store.aclose()


async def test_client_certificates(tmp_path: Path) -> None:
    need_etcd()
    proper = Certificates(tmp_path / "proper")
    cert, key = proper.issue("pillion", ())
    old_cert, old_key = proper.issue("old", (), expired=True)
    foreign_cert, foreign_key = Certificates(tmp_path / "other").issue("pillion", ())
    with Etcd(tmp_path, tls=proper, client_certificates=True) as etcd:
        assert await attempt(EtcdOptions(proper.ca, cert, key), *etcd.hosts) == ""
        text = await attempt(EtcdOptions(proper.ca), *etcd.hosts)
        assert text.startswith("StoreRefused: ") and "it demands a client certificate, and none was given" in text
        for wrong in ((foreign_cert, foreign_key), (old_cert, old_key)):
            text = await attempt(EtcdOptions(proper.ca, *wrong), *etcd.hosts)
            assert text.startswith("StoreRefused: ") and f"does not accept our client certificate {wrong[0]}" in text
        text = await attempt(EtcdOptions(proper.ca, cert, foreign_key), *etcd.hosts)
        assert text.startswith("StoreRefused: ") and f"cannot use the client certificate {cert}" in text
        with pytest.raises(StoreRefused, match="needs the CA"):
            await EtcdStore.open(etcd.hosts, EtcdOptions(None, cert, key), None)  # type: ignore[arg-type]


@pytest.mark.long
async def test_certificates_that_are_replaced(tmp_path: Path) -> None:
    """While we run: a new authority, a new certificate of the server, in the same files."""
    need_etcd()
    proper = Certificates(tmp_path / "proper")
    with Etcd(tmp_path, tls=proper) as etcd:
        async with trio.open_nursery() as nursery:
            store = await EtcdStore.open(etcd.hosts, EtcdOptions(proper.ca), nursery)
            at = await put(store, "a")
            async with store.watch("", at) as batches:
                etcd.members[0].kill()
                renewed = Certificates(tmp_path / "renewed")
                for path in (renewed.ca, *renewed.issue("server-m0")):
                    path.replace(proper.folder / path.name)
                etcd.members[0].start()
                etcd.wait()
                last = await put(store, "b")
                with trio.fail_after(15):
                    await collect(batches, last)
            await store.aclose()


async def test_one_good_member_is_enough(tmp_path: Path) -> None:
    need_etcd()
    with Etcd(tmp_path) as etcd, server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as odd:
        assert await attempt(EtcdOptions(), odd, ("127.0.0.1", free_ports(1)[0]), *etcd.hosts) == ""
        async with trio.open_nursery() as nursery:
            store = await EtcdStore.open(etcd.hosts, EtcdOptions(), nursery, timeout_s=1)
            etcd.members[0].kill()
            with pytest.raises(StoreUnavailable, match="connection refused"):
                await store.read()
            await store.aclose()


def _jwt_keys(folder: Path) -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private, public = folder / "jwt.key", folder / "jwt.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return f"pub-key={public},priv-key={private}"
