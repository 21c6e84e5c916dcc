"""TLS for clients that know by SPIFFE ID who must answer: contexts, and requests for certificates.

`pinned_context` trusts the roots of one bundle and accepts one identity; `unverified_context` is for the one question
that comes before any trust (which roots are there?) and must carry nothing secret. Must not know sockets or HTTP.
Invariant: over a pinned context not a byte is written to a peer of another identity: the check is part of the handshake
of every socket and object that the context wraps, whoever wraps them.
"""

import ssl
from collections.abc import Sequence
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding

from .authority import PrivateKey
from .bundle import TrustBundle
from .files import IdentityFiles
from .spiffe import SpiffeId
from .svid import SvidError, check_leaf

CONTROL_PLANE = "pillion-control-plane"
MESH_SNI = f"api.{CONTROL_PLANE}.mesh"
JOIN_SNI = f"join.{CONTROL_PLANE}.mesh"


class WrongPeer(ssl.SSLError):
    """Somebody answered, but not whom we asked for. Nothing was sent to them."""

    def __init__(self, text: str) -> None:
        super().__init__(1, text)
        self.text = text

    def __str__(self) -> str:
        return self.text


def control_plane_id(trust_domain: str) -> str:
    """The SPIFFE ID of the control plane of a trust domain."""
    return str(SpiffeId.for_service(trust_domain, CONTROL_PLANE))


def pinned_context(
    bundle: TrustBundle, expected: str, identity: IdentityFiles | None = None, alpn: Sequence[str] = ("http/1.1",)
) -> ssl.SSLContext:
    """A client's context, TLS 1.3: the peer's chain ends in this bundle and its leaf names exactly `expected`. With an
    identity the client presents it."""
    context = _client(alpn)
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    if identity is not None:
        identity.load_chain_into(context)
    context.load_verify_locations(cadata=bundle.pem.decode("ascii"))
    context.sslobject_class, context.sslsocket_class = _pinned_classes(expected)
    return context


def unverified_context(alpn: Sequence[str] = ("http/1.1",)) -> ssl.SSLContext:
    """Trusts whoever answers. What it carries is public, and what comes is checked by other means (a fingerprint)."""
    context = _client(alpn)
    context.verify_mode = ssl.CERT_NONE
    return context


def _client(alpn: Sequence[str]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)  # a cut answer is no end of it
    context.set_alpn_protocols(list(alpn))
    return context


def _pinned_classes(expected: str) -> tuple[Any, Any]:
    """`ssl` has no hook within the handshake, but it makes its objects of the classes that a context names."""
    trust_domain = SpiffeId.parse(expected).trust_domain

    class PinnedObject(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            check_peer(self.getpeercert(binary_form=True), expected, trust_domain)

    class PinnedSocket(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            super().do_handshake(block)
            check_peer(self.getpeercert(binary_form=True), expected, trust_domain)

    return PinnedObject, PinnedSocket


def check_peer(der: bytes | None, expected: str, trust_domain: str) -> None:
    """Raises WrongPeer unless this leaf proves the expected identity."""
    if der is None:
        raise WrongPeer("the peer has presented no certificate")
    try:
        found = str(check_leaf(der, trust_domain))
    except SvidError as error:
        raise WrongPeer(f"the peer's certificate is refused: {error}") from None
    if found != expected:
        raise WrongPeer(f"expected {expected}, but {found} answered")


def root_by_fingerprint(bundle: TrustBundle, fingerprint: str) -> TrustBundle | None:
    """The bundle with only the root of this fingerprint. Who vouches for one root of an unproven bundle has not vouched
    for the others: trust nothing but this until a bundle has come over a connection that it secured."""
    roots = tuple(root for root in bundle.roots if root.fingerprint == fingerprint)
    return TrustBundle(bundle.trust_domain, roots) if roots else None


def new_csr(key: PrivateKey) -> bytes:
    """A certificate signing request (PEM). It proves possession of the key; who the workload is, the control plane
    finds out by other means, so no name stands in it."""
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, algorithm)
    return request.public_bytes(Encoding.PEM)
