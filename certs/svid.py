"""X.509-SVIDs: is this certificate the identity of a workload, and whose?

`check_leaf` judges the leaf that a peer presented once TLS has verified its chain; `check_ca` judges a root or an
issuing certificate. Pure: they know no clock (TLS checks the validity; `validity` tells it) and no connection.
Invariants: what is not proven right is refused with a text that says why; the cost is bounded by sizes that are checked
before anything is computed (CVE-2023-0464, CVE-2023-29409).
"""

from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from .spiffe import SCHEME, SpiffeError, SpiffeId, shown

CERTIFICATE_BYTES_MAX = 16 * 1024
RSA_BITS_MIN = 2048
RSA_BITS_MAX = 4096
RSA_EXPONENT_BITS_MAX = 33  # 65537 everywhere in practice; a long exponent only makes verification slow
SUBJECT_NAMES_MAX = 32

E = TypeVar("E", bound=x509.ExtensionType)

_CURVES = (ec.SECP256R1, ec.SECP384R1)
_HASHES = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
_KNOWN_EXTENSIONS = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.NAME_CONSTRAINTS,
    }
)


class SvidError(ValueError):
    """A certificate that is not what it must be; says why."""


@dataclass(frozen=True, slots=True)
class Validity:
    not_before: datetime
    not_after: datetime

    def problem(self, now: datetime) -> str | None:
        if now < self.not_before:
            return f"is not valid before {self.not_before:%Y-%m-%d %H:%M:%S} UTC; is the clock right?"
        if now > self.not_after:
            return f"expired on {self.not_after:%Y-%m-%d %H:%M:%S} UTC"
        return None


def parse_certificate(der: bytes) -> x509.Certificate:
    if len(der) > CERTIFICATE_BYTES_MAX:
        raise SvidError(f"the certificate is larger than {CERTIFICATE_BYTES_MAX} bytes")
    try:
        certificate = x509.load_der_x509_certificate(der)
        if certificate.version is not x509.Version.v3:
            raise SvidError("the certificate is not of X.509 version 3")
        certificate.extensions  # noqa: B018 - decoded here, so that what is malformed or repeated is refused once
    except SvidError:
        raise
    except x509.DuplicateExtension:
        raise SvidError("the certificate repeats an extension") from None
    except Exception as error:  # a parser of hostile input: whatever it says, the answer is no
        raise SvidError(f"the certificate cannot be parsed: {shown(str(error))}") from None
    return certificate


def validity(der: bytes) -> Validity:
    return validity_of(parse_certificate(der))


def validity_of(certificate: x509.Certificate) -> Validity:
    return Validity(certificate.not_valid_before_utc, certificate.not_valid_after_utc)


def fingerprint(der: bytes) -> str:
    """SHA-256 of the certificate, in lower-case hex."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(der)
    return digest.finalize().hex()


def check_leaf(der: bytes, trust_domain: str) -> SpiffeId:
    """The identity that this leaf certificate proves, within this trust domain; SvidError if it proves none."""
    certificate = parse_certificate(der)
    identity = spiffe_id_of(certificate)
    if identity.trust_domain != trust_domain:
        raise SvidError(f"{identity} is of another trust domain than {trust_domain}")
    _check_leaf_usage(certificate)
    check_signature_algorithm(certificate)
    check_key(certificate)
    return identity


def spiffe_id_of(certificate: x509.Certificate) -> SpiffeId:
    """The one URI name of a leaf, as a SPIFFE ID. Only a name of type URI counts: the same text in a DNS name, an
    other-name or the subject is no identity (CVE-2022-21656)."""
    uris = _uris(certificate)
    if not uris:
        raise SvidError("the certificate has no SPIFFE ID (no URI among its subject alternative names)")
    if len(uris) > 1:
        raise SvidError(f"the certificate has {len(uris)} URIs among its subject alternative names; one is allowed")
    try:
        return SpiffeId.parse(uris[0])
    except SpiffeError as error:
        raise SvidError(f"the certificate's URI is not a SPIFFE ID: {error}") from None


def _uris(certificate: x509.Certificate) -> list[str]:
    names = _extension(certificate, x509.SubjectAlternativeName)
    if names is None:
        return []
    if len(names) > SUBJECT_NAMES_MAX:
        raise SvidError(f"the certificate has more than {SUBJECT_NAMES_MAX} subject alternative names")
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _check_leaf_usage(certificate: x509.Certificate) -> None:
    _check_critical_extensions(certificate)
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        raise SvidError("the certificate is that of an authority (cA is true), not of a workload")
    usage = _extension(certificate, x509.KeyUsage)
    if usage is None:
        raise SvidError("the certificate has no key usage")
    if usage.key_cert_sign or usage.crl_sign:
        raise SvidError("the key usage of the certificate includes signing certificates or revocation lists")
    if not usage.digital_signature:
        raise SvidError("the key usage of the certificate does not include digital signatures")
    extended = _extension(certificate, x509.ExtendedKeyUsage)
    # X509-SVID, 4.4: where it is present, both must be set. A sidecar serves and calls with one certificate.
    if extended is not None and not {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH} <= set(extended):
        raise SvidError("the extended key usage of the certificate does not include both TLS server and TLS client")


def _check_critical_extensions(certificate: x509.Certificate) -> None:
    for extension in certificate.extensions:
        if extension.critical and extension.oid not in _KNOWN_EXTENSIONS:
            raise SvidError(f"the certificate has an unknown critical extension {extension.oid.dotted_string}")


def check_signature_algorithm(certificate: x509.Certificate) -> None:
    """How the certificate is signed is strong enough."""
    try:
        algorithm = certificate.signature_hash_algorithm  # None where the scheme has its own, as Ed25519
    except UnsupportedAlgorithm:
        raise SvidError("the certificate is signed by an unknown algorithm") from None
    if algorithm is not None and not isinstance(algorithm, _HASHES):
        raise SvidError(f"the certificate is signed with {algorithm.name}, which is too weak")


def check_key(certificate: x509.Certificate) -> None:
    """The public key is of a kind that is strong enough and cheap enough to use."""
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise SvidError("the certificate's public key is of an unknown kind") from None
    check_public_key(key)


def check_public_key(key: object) -> None:
    if isinstance(key, ec.EllipticCurvePublicKey):
        if not isinstance(key.curve, _CURVES):
            raise SvidError(f"the key is on curve {key.curve.name}; P-256 and P-384 are allowed")
    elif isinstance(key, rsa.RSAPublicKey):
        if not RSA_BITS_MIN <= key.key_size <= RSA_BITS_MAX:
            raise SvidError(f"the RSA key has {key.key_size} bits; {RSA_BITS_MIN} to {RSA_BITS_MAX} are allowed")
        if key.public_numbers().e.bit_length() > RSA_EXPONENT_BITS_MAX:
            raise SvidError("the RSA key has an exponent of excessive length")
    elif not isinstance(key, ed25519.Ed25519PublicKey):
        raise SvidError(f"keys of this kind ({type(key).__name__}) are not allowed; use P-256")


def check_ca(certificate: x509.Certificate, trust_domain: str) -> None:
    """This is the certificate of an authority that may issue within this trust domain."""
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        raise SvidError("the certificate is not that of an authority (cA is not true)")
    usage = _extension(certificate, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        raise SvidError("the key usage of the certificate does not include signing certificates")
    _check_critical_extensions(certificate)
    check_signature_algorithm(certificate)
    check_key(certificate)
    for uri in _uris(certificate):  # X509-SVID, 3.1: an authority's ID is its trust domain without a path
        if uri != SCHEME + trust_domain:
            raise SvidError(f"the authority is of {shown(uri)}, not of {SCHEME}{trust_domain}")


def issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """True if the issuer's name and key are those that signed the certificate. Check the issuer's key first."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
