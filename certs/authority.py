"""The certificate authority of a trust domain: a root, issuing authorities under it, and leaves for workloads.

Pure: `now`, keys and serial numbers are arguments (keys and serials default to fresh ones of `cryptography`'s own
secure source); no files. Invariants: a leaf names one SPIFFE ID and nothing else; no certificate outlives its issuer;
an authority can vouch for its own trust domain only (URI name constraint) and for no DNS name or address at all, so
that its root is harmless even in a system's trust store.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_network

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .bundle import TrustBundle
from .pem import CERTIFICATE, write_blocks
from .spiffe import SCHEME, SpiffeId, check_trust_domain
from .svid import SvidError, check_public_key, validity_of

ROOT_TTL = timedelta(days=3650)
ISSUING_TTL = timedelta(days=730)
LEAF_TTL = timedelta(hours=24)
LEAF_TTL_MIN = timedelta(seconds=5)
CLOCK_SKEW = timedelta(minutes=2)  # how far a peer's clock may be behind
CSR_BYTES_MAX = 16 * 1024

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey


class IssueError(ValueError):
    """A certificate that cannot be issued; says why."""


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def certificate_pem(certificates: Iterable[x509.Certificate]) -> bytes:
    return write_blocks(CERTIFICATE, (certificate.public_bytes(Encoding.DER) for certificate in certificates))


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate that may sign others, its private key, and the certificates between it and its root."""

    trust_domain: str
    certificate: x509.Certificate
    key: PrivateKey
    parents: tuple[x509.Certificate, ...] = ()  # the nearest first, without the root

    @property
    def chain(self) -> tuple[x509.Certificate, ...]:
        """What a leaf carries along so that a peer can reach the root; empty for the root itself."""
        if self.certificate.subject == self.certificate.issuer:
            return ()
        return (self.certificate, *self.parents)

    def issue(
        self,
        csr_der: bytes,
        spiffe_id: SpiffeId,
        ttl: timedelta,
        now: datetime,
        serial: int | None = None,
    ) -> x509.Certificate:
        """A leaf for the key of a certificate signing request.

        The request proves possession of the key; all else in it is ignored: who the workload is, the caller has
        found out by other means.
        """
        if len(csr_der) > CSR_BYTES_MAX:
            raise IssueError(f"the signing request is larger than {CSR_BYTES_MAX} bytes")
        try:
            request = x509.load_der_x509_csr(csr_der)
            key = request.public_key()
            check_public_key(key)  # before its signature is computed: an oversized key costs time
            proven = request.is_signature_valid
        except SvidError as error:
            raise IssueError(f"signing request: {error}") from None
        except Exception as error:  # a parser of hostile input
            raise IssueError(f"the signing request cannot be parsed: {error}") from None
        if not proven:
            raise IssueError("the signing request is not signed by its own key")
        assert isinstance(key, PublicKey)
        return self.issue_to_key(key, spiffe_id, ttl, now, serial)

    def issue_to_key(
        self,
        key: PublicKey,
        spiffe_id: SpiffeId,
        ttl: timedelta,
        now: datetime,
        serial: int | None = None,
    ) -> x509.Certificate:
        """A leaf for a key that the caller knows to be the workload's. Ends with its issuer if that ends sooner."""
        if spiffe_id.trust_domain != self.trust_domain:
            raise IssueError(f"{spiffe_id} is outside this authority's trust domain {self.trust_domain}")
        if ttl < LEAF_TTL_MIN:
            raise IssueError(f"a certificate must live for at least {LEAF_TTL_MIN.seconds} seconds")
        not_before, not_after = self._period(now, ttl)
        builder = _builder(_subject("pillion workload"), self.certificate.subject, key, not_before, not_after, serial)
        builder = (
            builder.add_extension(x509.SubjectAlternativeName([_uri(str(spiffe_id))]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(_authority_key_id(self.certificate), critical=False)
        )
        return builder.sign(self.key, _hash_for(self.key))

    def issue_authority(
        self,
        now: datetime,
        ttl: timedelta = ISSUING_TTL,
        key: PrivateKey | None = None,
        serial: int | None = None,
    ) -> "Authority":
        """An issuing authority under this one; it can issue leaves and no further authorities."""
        key = key or new_key()
        not_before, not_after = self._period(now, ttl)
        serial = serial or x509.random_serial_number()
        builder = _builder(
            _subject("pillion issuing authority", serial),
            self.certificate.subject,
            key.public_key(),
            not_before,
            not_after,
            serial,
        )
        builder = _as_authority(builder, self.trust_domain, path_length=0)
        builder = builder.add_extension(_authority_key_id(self.certificate), critical=False)
        return Authority(self.trust_domain, builder.sign(self.key, _hash_for(self.key)), key, self.chain)

    def _period(self, now: datetime, ttl: timedelta) -> tuple[datetime, datetime]:
        own = validity_of(self.certificate)
        problem = own.problem(now)
        if problem:
            raise IssueError(f"the authority's certificate {problem}")
        return max(now - CLOCK_SKEW, own.not_before), min(now + ttl, own.not_after)


def create_root(
    trust_domain: str,
    now: datetime,
    ttl: timedelta = ROOT_TTL,
    key: PrivateKey | None = None,
    serial: int | None = None,
) -> Authority:
    """A new root of a trust domain. Its key need only be at hand to sign issuing authorities."""
    check_trust_domain(trust_domain)
    key = key or new_key()
    serial = serial or x509.random_serial_number()
    name = _subject("pillion root authority", serial)
    builder = _builder(name, name, key.public_key(), now - CLOCK_SKEW, now + ttl, serial)
    builder = _as_authority(builder, trust_domain, path_length=1)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False
    )
    return Authority(trust_domain, builder.sign(key, _hash_for(key)), key)


def bundle_of(*roots: Authority) -> TrustBundle:
    """The trust bundle that holds these roots."""
    return TrustBundle.parse(roots[0].trust_domain, certificate_pem(root.certificate for root in roots))


def _subject(common_name: str, serial: int | None = None) -> x509.Name:
    """No workload is named here, so that nothing can be taken for an identity. Authorities differ by a serial
    number, or chains would be built through the wrong one while they are rotated."""
    attributes = [
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "pillion"),
        x509.NameAttribute(NameOID.COMMON_NAME, common_name),
    ]
    if serial is not None:
        attributes.append(x509.NameAttribute(NameOID.SERIAL_NUMBER, f"{serial:x}"[:16]))
    return x509.Name(attributes)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: PublicKey,
    not_before: datetime,
    not_after: datetime,
    serial: int | None,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial or x509.random_serial_number())  # 159 random bits
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _as_authority(builder: x509.CertificateBuilder, trust_domain: str, path_length: int) -> x509.CertificateBuilder:
    nothing_else = [
        x509.DNSName(""),
        x509.IPAddress(ip_network("0.0.0.0/0")),
        x509.IPAddress(ip_network("::/0")),
    ]
    return (
        builder.add_extension(x509.SubjectAlternativeName([_uri(SCHEME + trust_domain)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.NameConstraints([_uri(trust_domain)], nothing_else), critical=True)
    )


def _uri(text: str) -> x509.UniformResourceIdentifier:
    return x509.UniformResourceIdentifier(text)


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_key_id(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    own = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _hash_for(key: PrivateKey) -> hashes.SHA256 | None:
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
