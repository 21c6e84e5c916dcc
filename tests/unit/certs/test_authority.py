"""The authority: what it issues, when, and that Python's ssl accepts it in its strictest mode."""

import ssl
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from support.pki import Pki

from certs.authority import CLOCK_SKEW, IssueError, create_root, new_key
from certs.spiffe import SpiffeError, SpiffeId
from certs.svid import check_ca, check_leaf, issued_by

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
WEB = SpiffeId.for_service("mesh.local", "web")
DAY = timedelta(days=1)
ROOT = create_root("mesh.local", NOW)
ISSUING = ROOT.issue_authority(NOW)


def value(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> object:
    return certificate.extensions.get_extension_for_class(kind).value


def csr(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey,
) -> x509.CertificateSigningRequest:
    # It asks for much; nothing of it is given.
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://mesh.local/admin")]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    )


def test_a_leaf_names_one_spiffe_id_and_serves_and_calls() -> None:
    key = new_key()
    leaf = ISSUING.issue_to_key(key.public_key(), WEB, DAY, NOW)
    assert check_leaf(leaf.public_bytes(Encoding.DER), "mesh.local") == WEB
    assert list(value(leaf, x509.SubjectAlternativeName)) == [x509.UniformResourceIdentifier(str(WEB))]  # type: ignore[call-overload]
    assert set(value(leaf, x509.ExtendedKeyUsage)) == {  # type: ignore[call-overload]
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    assert isinstance(key.curve, ec.SECP256R1)
    assert leaf.not_valid_before_utc == NOW - CLOCK_SKEW
    assert leaf.not_valid_after_utc == NOW + DAY
    assert issued_by(leaf, ISSUING.certificate) and issued_by(ISSUING.certificate, ROOT.certificate)


def test_serial_numbers_are_random_and_long_unless_given() -> None:
    key = new_key().public_key()
    serials = {ISSUING.issue_to_key(key, WEB, DAY, NOW).serial_number for _ in range(20)}
    assert len(serials) == 20
    assert max(serial.bit_length() for serial in serials) in range(150, 160)
    assert ISSUING.issue_to_key(key, WEB, DAY, NOW, serial=7).serial_number == 7


def test_a_leaf_never_outlives_its_issuer_nor_an_issuer_its_root() -> None:
    brief = ROOT.issue_authority(NOW, timedelta(hours=1))
    leaf = brief.issue_to_key(new_key().public_key(), WEB, DAY, NOW)
    assert leaf.not_valid_after_utc == brief.certificate.not_valid_after_utc == NOW + timedelta(hours=1)
    late = ROOT.certificate.not_valid_after_utc - DAY
    assert ROOT.issue_authority(late).certificate.not_valid_after_utc == ROOT.certificate.not_valid_after_utc
    assert leaf.not_valid_before_utc >= brief.certificate.not_valid_before_utc >= ROOT.certificate.not_valid_before_utc


def test_an_expired_authority_issues_nothing() -> None:
    with pytest.raises(IssueError, match="expired on"):
        ISSUING.issue_to_key(new_key().public_key(), WEB, DAY, NOW + timedelta(days=1000))
    with pytest.raises(IssueError, match="is the clock right"):
        ISSUING.issue_to_key(new_key().public_key(), WEB, DAY, NOW - DAY)


def test_authorities_are_bounded_to_their_trust_domain_and_depth() -> None:
    for authority, depth in ((ROOT, 1), (ISSUING, 0)):
        check_ca(authority.certificate, "mesh.local")
        constraints = value(authority.certificate, x509.BasicConstraints)
        assert constraints == x509.BasicConstraints(ca=True, path_length=depth)
        names = value(authority.certificate, x509.NameConstraints)
        assert isinstance(names, x509.NameConstraints)
        assert names.permitted_subtrees == [x509.UniformResourceIdentifier("mesh.local")]
        assert names.excluded_subtrees and x509.DNSName("") in names.excluded_subtrees
    with pytest.raises(IssueError, match="outside"):
        ISSUING.issue_to_key(new_key().public_key(), SpiffeId.for_service("elsewhere.example", "web"), DAY, NOW)
    with pytest.raises(SpiffeError):
        create_root("Mesh.local", NOW)


def test_a_life_of_seconds_is_refused() -> None:
    with pytest.raises(IssueError, match="at least 5 seconds"):
        ISSUING.issue_to_key(new_key().public_key(), WEB, timedelta(seconds=4), NOW)


@pytest.mark.parametrize(
    "make", [new_key, ed25519.Ed25519PrivateKey.generate, lambda: rsa.generate_private_key(65537, 2048)]
)
def test_a_signing_request_gives_its_key_and_nothing_else(make: object) -> None:
    key = make()  # type: ignore[operator]
    leaf = ISSUING.issue(csr(key).public_bytes(Encoding.DER), WEB, DAY, NOW)
    assert leaf.public_key() == key.public_key()
    assert check_leaf(leaf.public_bytes(Encoding.DER), "mesh.local") == WEB


def test_bad_signing_requests_are_refused() -> None:
    good = csr(new_key()).public_bytes(Encoding.DER)
    for der, says in (
        (good[:-1] + bytes([good[-1] ^ 1]), "not signed by its own key|cannot be parsed"),
        (b"", "cannot be parsed"),
        (b"\x30" * 20_000, "larger than"),
        (csr(ec.generate_private_key(ec.SECP521R1())).public_bytes(Encoding.DER), "secp521r1"),  # type: ignore[arg-type]
    ):
        with pytest.raises(IssueError, match=says):
            ISSUING.issue(der, WEB, DAY, NOW)


def test_keys_of_other_kinds_may_sign() -> None:
    for key in (ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())):
        root = create_root("mesh.local", NOW, key=key)
        leaf = root.issue_authority(NOW, key=key).issue_to_key(new_key().public_key(), WEB, DAY, NOW)
        assert check_leaf(leaf.public_bytes(Encoding.DER), "mesh.local") == WEB


# Real handshakes in memory. TLS looks at the real clock, so this authority lives now.

LIVE = Pki()
UNCONSTRAINED = Pki(constrained=False)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes | None:
    """The client's certificate as the server sees it after a full handshake."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(down, up, server_hostname="http.web.mesh"),
        server.wrap_bio(up, down, server_side=True),
    ]
    waiting = set(ends)
    for _ in range(10):
        for end in ends:
            try:
                end.do_handshake()
                waiting.discard(end)
            except ssl.SSLWantReadError:
                pass
    assert not waiting
    return ends[1].getpeercert(binary_form=True)


def test_python_ssl_verifies_both_ends_in_strict_mode() -> None:
    der = handshake(LIVE.server_context("reviews"), LIVE.client_context("web"))
    assert der is not None
    assert check_leaf(der, "mesh.local") == WEB


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("other-ca", "unable to get local issuer"),
        ("expired", "has expired"),
        ("not-yet-valid", "not yet valid"),
        ("wrong-eku", "unsuitable certificate purpose"),
        ("other-trust-domain", "permitted subtree violation"),
    ],
)
def test_tls_itself_refuses_what_is_its_business(fault: str, says: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=says):
        handshake(LIVE.server_context("reviews"), LIVE.client_context("web", fault=fault))
    with pytest.raises(ssl.SSLCertVerificationError, match=says):
        handshake(LIVE.server_context("reviews", fault=fault), LIVE.client_context("web"))


def test_without_name_constraints_another_trust_domain_gets_through_tls() -> None:
    """That is why the leaf is checked after the handshake, whoever made the certificates."""
    context = UNCONSTRAINED.client_context("web", fault="other-trust-domain")
    der = handshake(UNCONSTRAINED.server_context("reviews"), context)
    assert der is not None
    with pytest.raises(ValueError, match="another trust domain"):
        check_leaf(der, "mesh.local")
