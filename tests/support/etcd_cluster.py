"""Real etcd servers for tests: one member or several, with TLS, passwords, small quotas; frozen, killed and cut off.

    with Etcd(tmp_path, members=3, links=True) as etcd:
        etcd.hosts                      # ((host, port), …) for EtcdStore.open
        etcd.members[0].kill()          # SIGKILL; .start() again on the same data
        etcd.members[0].freeze()        # SIGSTOP; .thaw()
        etcd.cut_off(etcd.members[0])   # from the other members, not from clients (needs links=True); .join_again()

Blocks. Where there is no `etcd`, `need_etcd()` skips, or fails under CI. Every process that was started here is ended.
"""

import contextlib
import os
import selectors
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from support.mesh import free_ports, missing

START_S = 30.0


def need_etcd() -> None:
    absent = [name for name in ("etcd", "etcdctl") if shutil.which(name) is None]
    if absent:
        missing(f"{' and '.join(absent)} (apt-get install etcd-server etcd-client)")


class Certificates:
    """An authority with a server's and clients' certificates, as PEM files in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"tests {folder.name}")])
        self._certificate = self._issue(self._name, self._key, ca=True)
        self.ca = self._write("ca.pem", self._certificate.public_bytes(Encoding.PEM))

    def issue(
        self, name: str, addresses: Iterable[str] = ("127.0.0.1",), *, expired: bool = False
    ) -> tuple[Path, Path]:
        """(certificate, key)"""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._issue(subject, key, ca=False, addresses=addresses, expired=expired)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return self._write(f"{name}.pem", certificate.public_bytes(Encoding.PEM)), self._write(f"{name}.key", pem)

    def _issue(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        *,
        ca: bool,
        addresses: Iterable[str] = (),
        expired: bool = False,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=2))
            .not_valid_after(now - timedelta(days=1) if expired else now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        names = [x509.IPAddress(ip_address(address)) for address in addresses]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def _write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        path.chmod(0o600)
        return path


class Member:
    def __init__(self, name: str, folder: Path, arguments: list[str], client_port: int) -> None:
        self.name = name
        self.folder = folder
        self.host = ("127.0.0.1", client_port)
        self._arguments = arguments
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self.folder / f"{self.name}.log").read_text(errors="replace")

    def start(self) -> None:
        assert self.process is None
        with (self.folder / f"{self.name}.log").open("ab") as log:
            command = ["etcd", "--name", self.name, "--data-dir", str(self.folder / self.name), *self._arguments]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


class Etcd:
    """`tls` makes clients use TLS; `client_certificates` demands theirs. `arguments`: further flags of etcd."""

    def __init__(
        self,
        folder: Path,
        *,
        members: int = 1,
        tls: Certificates | None = None,
        client_certificates: bool = False,
        links: bool = False,
        arguments: Iterable[str] = (),
    ) -> None:
        self.folder = folder
        self.tls = tls
        self._client_certificates = client_certificates
        self.user = ""
        ports = free_ports(3 * members)
        scheme = "http" if tls is None else "https"
        peers = {f"m{n}": ports[n] for n in range(members)}
        inside = {f"m{n}": ports[members + n] if links else ports[n] for n in range(members)}
        self.members = []
        for n, (name, port) in enumerate(peers.items()):
            client = f"{scheme}://127.0.0.1:{ports[2 * members + n]}"
            flags = [
                *("--listen-client-urls", client, "--advertise-client-urls", client),
                *("--listen-peer-urls", f"http://127.0.0.1:{inside[name]}"),
                *("--initial-advertise-peer-urls", f"http://127.0.0.1:{port}"),
                *("--initial-cluster", ",".join(f"{each}=http://127.0.0.1:{at}" for each, at in peers.items())),
                *("--initial-cluster-state", "new", "--log-level", "warn", "--logger", "zap"),
                *arguments,
            ]
            if tls is not None:
                certificate, key = tls.issue(f"server-{name}")
                flags += ["--cert-file", str(certificate), "--key-file", str(key)]
                if client_certificates:
                    flags += ["--client-cert-auth", "--trusted-ca-file", str(tls.ca)]
            self.members.append(Member(name, folder, flags, ports[2 * members + n]))
        self._links = Links({name: (port, inside[name]) for name, port in peers.items()}, self) if links else None

    @property
    def hosts(self) -> tuple[tuple[str, int], ...]:
        return tuple(member.host for member in self.members)

    def __enter__(self) -> "Etcd":
        if self._links is not None:
            self._links.start()
        try:
            for member in self.members:
                member.start()
            self.wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self.members:
            member.kill()
        if self._links is not None:
            self._links.stop()

    def wait(self, *members: Member) -> None:
        """Until these answer a linearizable read; all of them unless named."""
        end = time.monotonic() + START_S
        for member in members or tuple(self.members):
            while self.ctl("get", "x", member=member, check=False).returncode:
                assert member.process is not None and member.process.poll() is None, member.log[-2000:]
                assert time.monotonic() < end, member.log[-2000:]
                time.sleep(0.05)

    def ctl(
        self, *arguments: str, member: Member | None = None, check: bool = True, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        """etcdctl"""
        host, port = (member or self.members[0]).host
        flags = ["--endpoints", f"{host}:{port}", "--command-timeout", "3s", "--dial-timeout", "2s"]
        if self.tls is not None:
            flags += ["--cacert", str(self.tls.ca)]
            if self._client_certificates:
                certificate, key = self.tls.issue("etcdctl")
                flags += ["--cert", str(certificate), "--key", str(key)]
        if self.user:
            flags += ["--user", self.user]
        command = ["etcdctl", *flags, *arguments]
        environment = {**os.environ, "ETCDCTL_API": "3"}
        done = subprocess.run(command, input=stdin, capture_output=True, env=environment)
        if check:
            assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.decode()}"
        return done

    def leader(self) -> Member:
        for member in self.members:
            if member.process is not None:
                fields = self.ctl("endpoint", "status", "-w", "simple", member=member).stdout.decode().split(", ")
                if fields[4] == "true":
                    return member
        raise AssertionError("no leader")

    def passwords(self, user: str, password: str, prefix: str) -> None:
        """From now on a user is needed; this one may only use that prefix, root (password "root") everything."""
        self.ctl("user", "add", "root:root")
        self.ctl("user", "grant-role", "root", "root")
        self.ctl("user", "add", f"{user}:{password}")
        self.ctl("role", "add", "pillion")
        self.ctl("role", "grant-permission", "pillion", "--prefix=true", "readwrite", prefix)
        self.ctl("user", "grant-role", user, "pillion")
        self.ctl("auth", "enable")
        self.user = "root:root"

    def cut_off(self, member: Member) -> None:
        assert self._links is not None
        self._links.cut(member.name)

    def join_again(self) -> None:
        assert self._links is not None
        self._links.cut(None)


class Links:
    """What members say to each other goes through here, in one thread; it can be cut. Who connects is found by the
    process that has the socket, since they all come from one address."""

    def __init__(self, ports: dict[str, tuple[int, int]], etcd: Etcd) -> None:
        self._ports = ports  # name -> (as told to the others, where the member really listens)
        self._etcd = etcd
        self._selector = selectors.DefaultSelector()
        self._pairs: dict[socket.socket, tuple[socket.socket, str, str]] = {}
        self._cut: str | None = None
        self._wish: str | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="links", daemon=True)

    def start(self) -> None:
        for name, (port, _) in self._ports.items():
            listener = socket.create_server(("127.0.0.1", port))
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ, name)
        self._thread.start()

    def stop(self) -> None:
        self._stopped = True
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self._selector.close()

    def cut(self, name: str | None) -> None:
        self._wish = name
        while self._cut != name:
            time.sleep(0.01)

    def _run(self) -> None:
        while not self._stopped:
            for key, _ in self._selector.select(0.05):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if key.data is not None:
                    self._accept(sock, key.data)
                elif sock in self._pairs:
                    self._forward(sock)
            if self._wish != self._cut:
                for sock, (_, source, target) in list(self._pairs.items()):
                    if self._wish in (source, target):
                        self._close(sock)
                self._cut = self._wish

    def _accept(self, listener: socket.socket, target: str) -> None:
        sock, address = listener.accept()
        source = self._source(address[1])
        if self._cut is not None and self._cut in (source, target):
            sock.close()
            return
        try:
            other = socket.create_connection(("127.0.0.1", self._ports[target][1]), 1)
        except OSError:
            sock.close()
            return
        for one, two in ((sock, other), (other, sock)):
            one.settimeout(5)
            self._pairs[one] = (two, source, target)
            self._selector.register(one, selectors.EVENT_READ)

    def _forward(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(65536)
            if data:
                self._pairs[sock][0].sendall(data)
                return
        except OSError:
            pass
        self._close(sock)

    def _close(self, sock: socket.socket) -> None:
        pair = self._pairs.get(sock)
        if pair is not None:
            for each in (sock, pair[0]):
                del self._pairs[each]
                self._selector.unregister(each)
                each.close()

    def _source(self, port: int) -> str:
        """The member that connects from this port."""
        inode = ""
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) == port:
                inode = fields[9]
        for member in self._etcd.members:
            if member.process is None:
                continue
            with contextlib.suppress(OSError):
                for entry in Path(f"/proc/{member.process.pid}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        if entry.readlink().name == f"socket:[{inode}]":
                            return member.name
        return ""
