"""A certificate authority in memory for tests, and certificates that are wrong in one named way each.

    pki = Pki()
    directory = pki.identity(tmp_path, "web")              # an identity directory, as `pillion ca issue` writes it
    odd = pki.identity(tmp_path, "web", fault="no-spiffe-id")
    context = pki.client_context("web")                    # an ssl.SSLContext that presents web's certificate

Faults: see FAULTS. `other-ca` has the same trust domain but another root; its directory still holds the bundle of the
proper one, so that only the peer refuses it.
"""

import os
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from certs.authority import LEAF_TTL, Authority, bundle_of, certificate_pem, create_root, key_pem, new_key
from certs.bundle import TrustBundle
from certs.files import write_identity
from certs.spiffe import SpiffeId
from sidecar.proxy.tls import tell_truncation

TRUST_DOMAIN = "mesh.local"

FAULTS = (
    "other-ca",
    "no-spiffe-id",
    "two-uris",
    "expired",
    "not-yet-valid",
    "ca-as-leaf",
    "other-trust-domain",
    "upper-case-id",
    "wrong-eku",
    "dns-name-only",
    "no-digital-signature",
    "cert-sign-usage",
    "encoded-path",
)


@dataclass(frozen=True)
class Leaf:
    chain: list[x509.Certificate]  # the leaf first
    key: object
    spiffe_id: str

    @property
    def der(self) -> bytes:
        return self.chain[0].public_bytes(Encoding.DER)

    @property
    def cert_pem(self) -> bytes:
        return certificate_pem(self.chain)

    @property
    def key_pem(self) -> bytes:
        return key_pem(self.key)  # type: ignore[arg-type]


def without_constraints(authority: Authority, signer: Authority) -> Authority:
    """The same authority, signed anew without its name constraints."""
    certificate = authority.certificate
    builder = (
        x509.CertificateBuilder()
        .subject_name(certificate.subject)
        .issuer_name(certificate.issuer)
        .public_key(certificate.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(certificate.not_valid_before_utc)
        .not_valid_after(certificate.not_valid_after_utc)
    )
    for extension in certificate.extensions:
        if not isinstance(extension.value, x509.NameConstraints):
            builder = builder.add_extension(extension.value, extension.critical)
    plain = builder.sign(signer.key, hashes.SHA256())  # type: ignore[arg-type]
    return Authority(authority.trust_domain, plain, authority.key)


@dataclass
class Pki:
    """One trust domain: a root and an issuing authority under it. `now` is real unless given, since TLS looks at the
    real clock."""

    trust_domain: str = TRUST_DOMAIN
    constrained: bool = True  # False: without name constraints, so that TLS lets an ID of another trust domain through
    now: datetime = field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))

    def __post_init__(self) -> None:
        # Born yesterday, or an expired leaf could not have had a valid issuer.
        self.root: Authority = create_root(self.trust_domain, self.now - timedelta(days=1))
        if not self.constrained:
            self.root = without_constraints(self.root, self.root)
        self.issuing: Authority = self.root.issue_authority(self.now - timedelta(days=1))
        self._other: Pki | None = None

    @property
    def bundle(self) -> TrustBundle:
        return bundle_of(self.root)

    @property
    def other(self) -> "Pki":
        """Another authority that claims the same trust domain."""
        if self._other is None:
            self._other = Pki(self.trust_domain, self.constrained, self.now)
        return self._other

    def leaf(self, service: str, *, fault: str | None = None, ttl: timedelta = LEAF_TTL) -> Leaf:
        """A leaf for a service, good or wrong in the way that `fault` names."""
        spiffe_id = SpiffeId.for_service(self.trust_domain, service)
        if fault is None:
            key = new_key()
            certificate = self.issuing.issue_to_key(key.public_key(), spiffe_id, ttl, self.now)
            return Leaf([certificate, *self.issuing.chain], key, str(spiffe_id))
        if fault == "other-ca":
            return self.other.leaf(service, ttl=ttl)
        assert fault in FAULTS, f"unknown fault {fault!r}; one of {', '.join(FAULTS)}"
        return self._odd_leaf(spiffe_id, fault, ttl)

    def _odd_leaf(self, spiffe_id: SpiffeId, fault: str, ttl: timedelta) -> Leaf:
        text = str(spiffe_id)
        uris = {
            "no-spiffe-id": [],
            "dns-name-only": [],
            "two-uris": [text, text + "-too"],
            "other-trust-domain": [text.replace(self.trust_domain, "elsewhere.example")],
            "upper-case-id": [text.replace(self.trust_domain, self.trust_domain.upper())],
            "encoded-path": [text.replace("/service/", "/s%65rvice/")],
        }.get(fault, [text])
        start = {"expired": -timedelta(hours=3), "not-yet-valid": timedelta(hours=3)}.get(fault, -timedelta(minutes=2))
        end = start + timedelta(hours=1) if fault == "expired" else start + ttl
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        if fault == "wrong-eku":
            purposes = [ExtendedKeyUsageOID.EMAIL_PROTECTION]
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
        if fault == "dns-name-only":
            names = [x509.RFC822Name("web@mesh.local")]
        # Name constraints would already fail some of these in TLS; the check of the leaf must stand without them.
        issuer = self.issuing
        if fault in ("other-trust-domain", "upper-case-id"):
            issuer = without_constraints(self.issuing, self.root)
        key = new_key()
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pillion workload")]))
            .issuer_name(issuer.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.now + start)
            .not_valid_after(self.now + end)
            .add_extension(x509.BasicConstraints(ca=fault == "ca-as-leaf", path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=fault != "no-digital-signature",
                    content_commitment=False,
                    key_encipherment=fault == "no-digital-signature",
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=fault in ("ca-as-leaf", "cert-sign-usage"),
                    crl_sign=False,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(issuer.key, hashes.SHA256())
        return Leaf([certificate, *issuer.chain], key, uris[0] if uris else "")

    def identity(self, tmp_path: Path, service: str, *, fault: str | None = None, ttl: timedelta = LEAF_TTL) -> Path:
        """An identity directory for a service below `tmp_path`; the bundle in it is always this authority's."""
        directory = tmp_path / "identities" / (service if fault is None else f"{service}-{fault}")
        self.write(directory, self.leaf(service, fault=fault, ttl=ttl))
        return directory

    def write(self, directory: Path, leaf: Leaf) -> None:
        """Write, or replace in place, the files of an identity directory."""
        write_identity(directory, leaf.chain, leaf.key, self.bundle)  # type: ignore[arg-type]

    def server_context(self, service: str, *, fault: str | None = None) -> ssl.SSLContext:
        """A TLS server that asks for a certificate of this authority."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        return self._fitted(context, self.leaf(service, fault=fault))

    def client_context(self, service: str | None, *, fault: str | None = None) -> ssl.SSLContext:
        """A TLS client that presents a service's certificate (none for None) and trusts this authority."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        return self._fitted(context, None if service is None else self.leaf(service, fault=fault))

    def _fitted(self, context: ssl.SSLContext, leaf: Leaf | None) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
        tell_truncation(context)
        context.load_verify_locations(cadata=self.bundle.pem.decode())
        if leaf is not None:
            descriptor = os.memfd_create("pki")
            try:
                os.write(descriptor, leaf.key_pem + leaf.cert_pem)
                context.load_cert_chain(f"/proc/self/fd/{descriptor}")
            finally:
                os.close(descriptor)
        return context
