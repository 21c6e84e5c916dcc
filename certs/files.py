"""Certificates, keys and bundles on disk: the edge of this package towards the file system.

Two layouts. A CA directory: root.pem, root.key, issuing.pem, issuing.key, bundle.pem, trust-domain. An identity
directory: cert.pem (the leaf, then its issuing chain), key.pem, bundle.pem.

Must not know who uses an identity. Invariants: a file is replaced whole or not at all (temporary file, fsync, rename);
a private key is never on disk with a mode other than 0600, and one that others could read or replace is refused with
the command that puts it right; what is read is checked as a set (the key fits, the chain reaches the bundle, nothing
has expired) before anyone sees it. A set that is caught half-written is told apart: `IdentityError.transient`.
"""

import os
import secrets
import ssl
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from .authority import Authority, PrivateKey, certificate_pem, key_pem
from .bundle import BUNDLE_BYTES_MAX, BundleError, TrustBundle
from .pem import CERTIFICATE, PemError, read_blocks
from .spiffe import SpiffeError, SpiffeId, check_trust_domain
from .svid import (
    SvidError,
    check_ca,
    check_leaf,
    check_public_key,
    fingerprint,
    issued_by,
    parse_certificate,
    spiffe_id_of,
    validity_of,
)

CERT, KEY, BUNDLE = "cert.pem", "key.pem", "bundle.pem"
ROOT_CERT, ROOT_KEY = "root.pem", "root.key"
ISSUING_CERT, ISSUING_KEY = "issuing.pem", "issuing.key"
TRUST_DOMAIN = "trust-domain"

CHAIN_BYTES_MAX = 64 * 1024
CHAIN_LENGTH_MAX = 4  # leaf, two issuing authorities, and a root that need not be there
KEY_BYTES_MAX = 16 * 1024


class IdentityError(Exception):
    """Files that cannot be used, with the reason and what to do. `transient`: they look half-replaced; read again."""

    def __init__(self, text: str, *, transient: bool = False) -> None:
        super().__init__(text)
        self.transient = transient


@dataclass(frozen=True, slots=True)
class IdentityFiles:
    """One workload's identity, checked as a whole. The key is kept out of repr()."""

    cert_pem: bytes  # leaf and issuing chain
    key_pem: bytes
    bundle_pem: bytes
    spiffe_id: SpiffeId
    trust_domain: str
    not_before: datetime
    not_after: datetime  # of the certificate of the chain that ends first
    fingerprint: str  # SHA-256 of the leaf, hex
    bundle: TrustBundle

    def __repr__(self) -> str:
        return f"IdentityFiles({self.spiffe_id}, {self.fingerprint[:16]}, until {self.not_after:%Y-%m-%dT%H:%M:%SZ})"

    def load_into(self, context: ssl.SSLContext) -> None:
        """Give a TLS context this very certificate, key and bundle.

        `ssl` loads keys from paths only. They go through an anonymous file in memory, so that what was checked is what
        is used, whatever has happened on disk since, and the key is written nowhere.
        """
        self.load_chain_into(context)
        context.load_verify_locations(cadata=self.bundle_pem.decode("ascii"))

    def load_chain_into(self, context: ssl.SSLContext) -> None:
        """The certificate and key alone."""
        with _memory_file(self.key_pem + self.cert_pem) as path:
            context.load_cert_chain(path)


@contextmanager
def _memory_file(content: bytes) -> Iterator[str]:
    descriptor = os.memfd_create("pillion-identity", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


# Writing


def write_atomic(path: Path, content: bytes, mode: int) -> None:
    """Replace a file whole: a reader, or a crash, sees the old content or the new."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_ca(directory: Path, root: Authority, issuing: Authority) -> None:
    """A new CA directory, whole or not at all. An existing one is never touched: FileExistsError."""
    _write_authority(directory, root.certificate, root.key, issuing, certificate_pem([root.certificate]))


def write_issuing(directory: Path, root: x509.Certificate, issuing: Authority, bundle: TrustBundle) -> None:
    """The same for an issuing authority whose root's key stays elsewhere, with the bundle that holds that root."""
    _write_authority(directory, root, None, issuing, bundle.pem)


def _write_authority(
    directory: Path, root: x509.Certificate, root_key: PrivateKey | None, issuing: Authority, bundle_pem: bytes
) -> None:
    if directory.is_symlink() or (directory.exists() and (not directory.is_dir() or any(directory.iterdir()))):
        raise FileExistsError(f"{directory} is already there")
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = directory.with_name(f".{directory.name}.{secrets.token_hex(8)}")
    draft.mkdir(mode=0o700)
    try:
        write_atomic(draft / TRUST_DOMAIN, f"{issuing.trust_domain}\n".encode(), 0o644)
        if root_key is not None:
            write_atomic(draft / ROOT_KEY, key_pem(root_key), 0o600)
        write_atomic(draft / ROOT_CERT, certificate_pem([root]), 0o644)
        write_atomic(draft / ISSUING_KEY, key_pem(issuing.key), 0o600)
        write_atomic(draft / ISSUING_CERT, certificate_pem(issuing.chain), 0o644)
        write_atomic(draft / BUNDLE, bundle_pem, 0o644)
        draft.rename(directory)  # onto nothing or onto an empty directory; onto anything else it fails
    except BaseException:
        for path in draft.iterdir():
            path.unlink()
        draft.rmdir()
        raise
    _sync_directory(directory.parent)


def write_identity(
    directory: Path, chain: list[x509.Certificate], key: PrivateKey, bundle: TrustBundle
) -> tuple[Path, ...]:
    """Write or replace an identity. The bundle goes first, so that a new root is trusted before it is used."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    paths = directory / BUNDLE, directory / KEY, directory / CERT
    write_atomic(paths[0], bundle.pem, 0o644)
    write_atomic(paths[1], key_pem(key), 0o600)
    write_atomic(paths[2], certificate_pem(chain), 0o644)
    return paths


# Reading


def read_limited(path: Path, bytes_max: int, *, secret: bool = False) -> bytes:
    """The content of a regular file of bounded size; a secret must be nobody else's to read or replace."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not hold us up
    if secret and path.is_symlink():
        raise IdentityError(f"{path} is a symbolic link; a private key must be a file of its own. Name the real one")
    try:
        descriptor = os.open(path, flags | (os.O_NOFOLLOW if secret else 0))
    except FileNotFoundError:
        raise IdentityError(f"{path}: no such file", transient=True) from None
    except OSError as error:
        raise IdentityError(f"{path}: {error.strerror}") from None
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise IdentityError(f"{path} is not a regular file")
        if secret:
            _check_secret(path, status)
        content = file.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise IdentityError(f"{path} is larger than {bytes_max} bytes")
    return content


def _check_secret(path: Path, status: os.stat_result) -> None:
    user = os.geteuid()
    if status.st_uid not in (user, 0):
        raise IdentityError(
            f"{path} belongs to user id {status.st_uid}, but this process runs as user id {user}; "
            f"run: chown {user} {path}"
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise IdentityError(f"{path} can be read or changed by others (mode {mode:04o}); run: chmod 600 {path}")


def read_key(path: Path) -> PrivateKey:
    return _parse_key(path, read_limited(path, KEY_BYTES_MAX, secret=True))


def _parse_key(path: Path, content: bytes) -> PrivateKey:
    try:
        blocks = read_blocks(content, KEY_BYTES_MAX, blocks_max=2)
    except PemError as error:
        raise IdentityError(f"{path}: {error}") from None
    if any(block.label == "ENCRYPTED PRIVATE KEY" for block in blocks):
        raise IdentityError(f"{path}: the private key is encrypted, and there is nobody to ask for its passphrase")
    if sum(block.label.endswith("PRIVATE KEY") for block in blocks) != 1:
        raise IdentityError(f"{path}: one private key is needed (a block 'BEGIN PRIVATE KEY')")
    try:
        key = load_pem_private_key(content, password=None)
        check_public_key(key.public_key())
    except SvidError as error:
        raise IdentityError(f"{path}: {error}") from None
    except Exception:  # whatever a parser says of a damaged key; its text could quote the key
        raise IdentityError(f"{path}: the private key cannot be read; is the file damaged?") from None
    assert isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey)
    return key


def _parse_chain(path: Path, content: bytes) -> list[x509.Certificate]:
    try:
        blocks = read_blocks(content, CHAIN_BYTES_MAX, CHAIN_LENGTH_MAX)
    except PemError as error:
        raise IdentityError(f"{path}: {error}") from None
    if not blocks:
        raise IdentityError(f"{path} holds no certificate")
    chain: list[x509.Certificate] = []
    for block in blocks:
        if block.label != CERTIFICATE:
            raise IdentityError(f"{path}, line {block.line}: only certificates belong here, not {block.label!r}")
        try:
            chain.append(parse_certificate(block.der))
        except SvidError as error:
            raise IdentityError(f"{path}, line {block.line}: {error}") from None
    return chain


def read_chain(path: Path) -> list[x509.Certificate]:
    return _parse_chain(path, read_limited(path, CHAIN_BYTES_MAX))


def read_bundle(path: Path, trust_domain: str) -> TrustBundle:
    return _parse_bundle(path, read_limited(path, BUNDLE_BYTES_MAX), trust_domain)


def _parse_bundle(path: Path, content: bytes, trust_domain: str) -> TrustBundle:
    try:
        return TrustBundle.parse(trust_domain, content)
    except BundleError as error:
        raise IdentityError(f"{path}: {error}") from None


@dataclass(frozen=True, slots=True)
class CaFiles:
    """What a CA directory holds. The root's key may have been taken away, into a safe; issuing does not need it."""

    trust_domain: str
    root: x509.Certificate
    issuing: Authority
    bundle: TrustBundle


def load_ca(directory: Path) -> CaFiles:
    """The issuing authority of a CA directory, checked."""
    trust_domain, bundle = _read_trust(directory)
    chain = read_chain(directory / ISSUING_CERT)
    key = read_key(directory / ISSUING_KEY)
    if chain[0].public_key() != key.public_key():
        raise IdentityError(f"{directory / ISSUING_KEY} is not the key of {directory / ISSUING_CERT}")
    root = _check_chain(directory / ISSUING_CERT, chain, bundle, authorities=chain)
    return CaFiles(trust_domain, root, Authority(trust_domain, chain[0], key, tuple(chain[1:])), bundle)


def load_root(directory: Path) -> Authority:
    """The root of a CA directory with its key, to sign issuing authorities; the present one need not be sound."""
    trust_domain, bundle = _read_trust(directory)
    key = read_key(directory / ROOT_KEY)
    for root in bundle.roots:
        certificate = parse_certificate(root.der)
        if certificate.public_key() == key.public_key():
            return Authority(trust_domain, certificate, key)
    raise IdentityError(f"{directory / ROOT_KEY} is not the key of a root in {directory / BUNDLE}")


def _read_trust(directory: Path) -> tuple[str, TrustBundle]:
    if not directory.is_dir():
        raise IdentityError(f"{directory}: no such directory; make one with: pillion ca init --dir {directory}")
    try:
        name = read_limited(directory / TRUST_DOMAIN, 1024).decode("ascii", "replace").strip()
        trust_domain = check_trust_domain(name)
    except SpiffeError as error:
        raise IdentityError(f"{directory / TRUST_DOMAIN}: {error}") from None
    return trust_domain, read_bundle(directory / BUNDLE, trust_domain)


def _check_chain(
    path: Path, chain: list[x509.Certificate], bundle: TrustBundle, authorities: list[x509.Certificate]
) -> x509.Certificate:
    """Each certificate is issued by the next, the last by a root of the bundle; returns that root."""
    try:
        for authority in authorities:
            check_ca(authority, bundle.trust_domain)
    except SvidError as error:
        raise IdentityError(f"{path}, in the issuing chain: {error}") from None
    for number, (certificate, issuer) in enumerate(pairwise(chain), 1):
        if not issued_by(certificate, issuer):
            raise IdentityError(
                f"{path}: certificate {number} is not issued by certificate {number + 1}; "
                "the order is the leaf, then what issued it, and so on",
                transient=True,
            )
    roots = [parse_certificate(root.der) for root in bundle.roots]
    for root in roots:
        if chain[-1] == root or issued_by(chain[-1], root):
            return root
    raise IdentityError(
        f"{path} does not lead to a root of {path.parent / BUNDLE}; they are of different authorities, "
        "or the issuing certificate is missing from the file",
        transient=True,
    )


def load_identity(directory: Path, now: datetime | None = None) -> IdentityFiles:
    """The identity in a directory, checked as a set; IdentityError says what is wrong and what to do."""
    now = now or datetime.now(UTC)
    if not directory.is_dir():
        raise IdentityError(
            f"{directory}: no such directory; make one with: pillion ca issue --service NAME --out {directory}"
        )
    cert_path, key_path, bundle_path = directory / CERT, directory / KEY, directory / BUNDLE
    before = stat_identity(directory)
    cert_content = read_limited(cert_path, CHAIN_BYTES_MAX)
    key_content = read_limited(key_path, KEY_BYTES_MAX, secret=True)
    bundle_content = read_limited(bundle_path, BUNDLE_BYTES_MAX)
    if stat_identity(directory) != before:
        raise IdentityError(f"{directory} is being replaced; it will be read again", transient=True)

    return parse_identity(cert_content, key_content, bundle_content, now, directory)


def parse_identity(
    cert_content: bytes, key_content: bytes, bundle_content: bytes, now: datetime, directory: Path
) -> IdentityFiles:
    """The same of three contents, which belong (or will) into this directory."""
    cert_path, key_path, bundle_path = directory / CERT, directory / KEY, directory / BUNDLE
    chain = _parse_chain(cert_path, cert_content)
    key = _parse_key(key_path, key_content)
    leaf_der = read_blocks(cert_content, CHAIN_BYTES_MAX, CHAIN_LENGTH_MAX)[0].der
    try:
        spiffe_id = check_leaf(leaf_der, spiffe_id_of(chain[0]).trust_domain)
    except SvidError as error:
        raise IdentityError(f"{cert_path}: {error}") from None
    bundle = _parse_bundle(bundle_path, bundle_content, spiffe_id.trust_domain)
    if chain[0].public_key() != key.public_key():
        raise IdentityError(
            f"{key_path} is not the key of {cert_path}; replace both from one issuance "
            f"(pillion ca issue --service {spiffe_id.service or 'NAME'} --out {directory})",
            transient=True,
        )
    root = _check_chain(cert_path, chain, bundle, authorities=chain[1:])
    periods = [validity_of(certificate) for certificate in (*chain, root)]
    for certificate, period in zip((*chain, root), periods, strict=True):
        problem = period.problem(now)
        if problem:
            what = f"{cert_path}: the certificate" if certificate is chain[0] else f"{cert_path}: its issuer"
            raise IdentityError(f"{what} {problem}")
    return IdentityFiles(
        cert_pem=certificate_pem(chain),
        key_pem=key_pem(key),
        bundle_pem=bundle.pem,
        spiffe_id=spiffe_id,
        trust_domain=spiffe_id.trust_domain,
        not_before=max(period.not_before for period in periods),
        not_after=min(period.not_after for period in periods),
        fingerprint=fingerprint(leaf_der),
        bundle=bundle,
    )


# Noticing changes

Stat = tuple[tuple[int, ...] | None, ...]
"""What is compared of the three files of an identity; None for one that is absent."""


def stat_identity(directory: Path) -> Stat:
    return tuple(_stat(directory / name) for name in (CERT, KEY, BUNDLE))


def _stat(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def changed(directory: Path, previous: Stat | None) -> Stat | None:
    """For a poller: the new state of the files if it differs from the previous one, else None.

    After a change call `load_identity`; where that fails with a `transient` error, keep the previous Stat and come
    back: the rest of the set is on its way. Any other error stays until the files change again.
    """
    current = stat_identity(directory)
    return None if current == previous else current
