"""TLS contexts, and whose identity the peer at the other end has proven.

Between sidecars: TLS 1.3 only, certificates on both sides, no session tickets (CVE-2025-23419: nothing outlives the
policy and the bundle it was admitted under), one key-exchange group. Towards ordinary servers: TLS 1.2 or later,
system roots, host names checked.
Must not know files (certs.files reads and checks them) or connections. Invariants: contexts are replaced as a whole,
never changed after their first handshake; a peer's identity comes from its certificate alone, and is asked for after
the handshake, before any application byte is read or written.
"""

import ssl
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from certs.files import IdentityFiles
from certs.svid import SvidError, check_leaf, fingerprint

# Both ends are ours; one group means no retry, and no costly one for a stranger to ask for. OpenSSL keeps the keys of
# the exchange for as long as the connection lives: 3.5 KB less with this one than with P-256.
GROUP = "X25519"
PROOFS_MAX = 1024
HTTP1, HTTP2, TCP = "http/1.1", "h2", "pillion-tcp"
_TRUNCATED = "UNEXPECTED_EOF_WHILE_READING"  # what Python before 3.11.4 says in place of SSLEOFError


class PeerRejected(Exception):
    """TLS worked, but the peer is not whom we want to talk to; says why."""


class MeshSocket(ssl.SSLSocket):
    """A server-side socket that remembers the name the client asked for."""

    sni = ""


SniCheck = Callable[[str], bool]
BanCheck = Callable[[str, str], bool]
"""Whether this identity, or this certificate (SHA-256 of the leaf in hex), is banned."""


@dataclass(frozen=True, slots=True)
class Proof:
    """Whom a certificate has proven the peer to be, and by which one (SHA-256 of the leaf in hex)."""

    identity: str
    fingerprint: str


NOBODY = Proof("", "")


def nobody_banned(identity: str, fingerprint: str) -> bool:
    return False


def server_context(
    identity: IdentityFiles,
    alpn: Sequence[str],
    *,
    sni: SniCheck | None = None,
    client_auth: ssl.VerifyMode = ssl.CERT_REQUIRED,
) -> ssl.SSLContext:
    """The inbound side. `sni` is asked for the name of each ClientHello ("" for none); False refuses the handshake
    with unrecognized_name. `client_auth=CERT_OPTIONAL` is for listeners whose clients may have no certificate yet."""
    mute_garbled_names()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sslsocket_class = MeshSocket
    _mesh(context, identity, alpn)
    context.num_tickets = 0
    context.verify_mode = client_auth

    def asked_for(sock: ssl.SSLSocket | ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> int | None:
        name = (name or "").lower().removesuffix(".")
        if isinstance(sock, MeshSocket):
            sock.sni = name
        try:
            admitted = sni is None or sni(name)
        except Exception:
            return ssl.ALERT_DESCRIPTION_INTERNAL_ERROR
        return None if admitted else ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME

    context.sni_callback = asked_for
    return context


def mute_garbled_names() -> None:
    """Once a process: a ClientHello whose server name is not ASCII fails inside Python's ssl, which refuses it but also
    prints a traceback. Strangers must not write to our stderr; everything else goes on to the hook that was there."""
    before = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if not (unraisable.exc_type is UnicodeDecodeError and isinstance(unraisable.object, bytes)):
            before(unraisable)

    if getattr(before, "__qualname__", "") != hook.__qualname__:
        sys.unraisablehook = hook


def client_context(identity: IdentityFiles, alpn: Sequence[str]) -> ssl.SSLContext:
    """The outbound side of the mesh. Who answers is checked by SPIFFE ID (`peer_identity`), not by host name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    _mesh(context, identity, alpn)
    return context


def _mesh(context: ssl.SSLContext, identity: IdentityFiles, alpn: Sequence[str]) -> None:
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    tell_truncation(context)
    try:
        context.set_ecdh_curve(GROUP)
    except (ValueError, ssl.SSLError):
        pass  # OpenSSL 1.1.1 cannot choose it alone, FIPS 140 forbids it: its own list then, X25519 first if allowed
    context.set_alpn_protocols(list(alpn))
    identity.load_into(context)


def originate_context(alpn: Sequence[str] = (HTTP1,), *, cafile: str | None = None) -> ssl.SSLContext:
    """For an ordinary TLS server outside the mesh: system roots (or `cafile`), host name checked."""
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=cafile)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    context.set_alpn_protocols(list(alpn))
    tell_truncation(context)
    return context


def tell_truncation(context: ssl.SSLContext) -> None:
    """An end without close_notify is a failure, never a clean end. Python before 3.11.4, which Debian 12 has, asks
    OpenSSL 3 to hide the difference (CPython issue 95494)."""
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)  # absent where OpenSSL is 1.1.1


def peer_identity(sock: ssl.SSLSocket, trust_domain: str, banned: BanCheck = nobody_banned) -> Proof:
    """Whom the peer has proven to be; NOBODY where it has no certificate and need not have one. Call it right after
    the handshake."""
    der = sock.getpeercert(binary_form=True)
    if der is None:
        if sock.context.verify_mode is ssl.CERT_OPTIONAL:
            return NOBODY
        raise PeerRejected("the peer has presented no certificate")
    try:
        proof = _proof_of(der, trust_domain)
    except SvidError as exc:
        raise PeerRejected(f"the peer's certificate is refused: {exc}") from None
    if banned(proof.identity, proof.fingerprint):
        raise PeerRejected(f"the peer is banned: {proof.identity}, certificate {proof.fingerprint}")
    return proof


@lru_cache(PROOFS_MAX)
def _proof_of(der: bytes, trust_domain: str) -> Proof:
    """What the certificate itself says, whose signatures and times OpenSSL has judged: worked out once, and one object
    for all connections of a peer. Raises SvidError."""
    return Proof(str(check_leaf(der, trust_domain)), fingerprint(der))


def why(exc: BaseException) -> str:
    """One line on why a handshake or a connection has failed, without OpenSSL's source positions."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the peer's certificate does not verify: {exc.verify_message}"
    if isinstance(exc, ssl.SSLEOFError) or (isinstance(exc, ssl.SSLError) and exc.reason == _TRUNCATED):
        return "the peer has closed the connection within TLS"
    if isinstance(exc, ssl.SSLError):
        return f"TLS: {(exc.reason or str(exc)).replace('_', ' ').lower()}"
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return str(exc) or type(exc).__name__


@dataclass(frozen=True, slots=True)
class Contexts:
    """What one version of our identity gives: taken once per connection, used whole."""

    identity: IdentityFiles
    server: ssl.SSLContext
    client_http: ssl.SSLContext
    client_http2: ssl.SSLContext
    client_tcp: ssl.SSLContext

    def client(self, alpn: str) -> ssl.SSLContext:
        """The outbound side, offering this protocol."""
        return {HTTP1: self.client_http, HTTP2: self.client_http2}.get(alpn, self.client_tcp)

    @property
    def spiffe_id(self) -> str:
        return str(self.identity.spiffe_id)

    @property
    def trust_domain(self) -> str:
        return self.identity.trust_domain


class Identity:
    """Holds the present contexts. `replace` builds all of them before it swaps one attribute, so that a connection
    sees the old or the new ones, and a certificate that cannot be used changes nothing."""

    def __init__(
        self,
        identity: IdentityFiles,
        *,
        sni: SniCheck | None = None,
        alpn: Sequence[str] = (HTTP2, HTTP1, TCP),
        client_auth: ssl.VerifyMode = ssl.CERT_REQUIRED,
    ) -> None:
        """`alpn` and `client_auth` are the inbound side's."""
        self.sni, self.alpn, self.client_auth = sni, tuple(alpn), client_auth
        self.current = self._build(identity)

    def replace(self, identity: IdentityFiles) -> None:
        self.current = self._build(identity)

    def _build(self, identity: IdentityFiles) -> Contexts:
        return Contexts(
            identity,
            server_context(identity, self.alpn, sni=self.sni, client_auth=self.client_auth),
            client_context(identity, (HTTP1,)),
            client_context(identity, (HTTP2,)),
            client_context(identity, (TCP,)),
        )
