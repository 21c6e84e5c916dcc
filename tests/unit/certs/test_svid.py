"""The check of a peer's leaf: each odd certificate is refused for its own reason, at a bounded price."""

import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier
from support.pki import FAULTS, Pki

from certs.authority import create_root
from certs.svid import CERTIFICATE_BYTES_MAX, SvidError, check_ca, check_leaf, fingerprint, parse_certificate, validity

NOW = datetime(2030, 1, 1, tzinfo=UTC)
PKI = Pki(now=NOW)
WEB = "spiffe://mesh.local/service/web"
SIGNER = ec.generate_private_key(ec.SECP256R1())
BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


def usage(**on: bool) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    names += ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{name: on.get(name, False) for name in names})


def leaf(
    names: Iterable[x509.GeneralName] = (x509.UniformResourceIdentifier(WEB),),
    key: object = None,
    key_usage: x509.KeyUsage | None = None,
    extended: tuple[ObjectIdentifier, ...] | None = BOTH,
    extra: Iterable[tuple[x509.ExtensionType, bool]] = (),
    algorithm: hashes.HashAlgorithm | None = None,
    common_name: str = "x",
) -> bytes:
    """A leaf that is good but for what is asked. Signed by anyone: TLS has checked the chain by then."""
    key = key or SIGNER
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "issuer")]))
        .public_key(key.public_key())  # type: ignore[attr-defined]
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(hours=1))
        .add_extension(key_usage or usage(digital_signature=True), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if extended is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(extended), critical=False)
    for value, critical in extra:
        builder = builder.add_extension(value, critical)
    return builder.sign(SIGNER, algorithm or hashes.SHA256()).public_bytes(Encoding.DER)


def refusal(der: bytes, trust_domain: str = "mesh.local") -> str:
    with pytest.raises(SvidError) as caught:
        check_leaf(der, trust_domain)
    return str(caught.value)


def test_a_good_leaf_proves_its_identity() -> None:
    identity = check_leaf(PKI.leaf("web").der, "mesh.local")
    assert str(identity) == WEB
    assert identity.service == "web"


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("no-spiffe-id", "no SPIFFE ID"),
        ("dns-name-only", "no SPIFFE ID"),
        ("two-uris", "2 URIs"),
        ("ca-as-leaf", "cA is true"),
        ("other-trust-domain", "of another trust domain than mesh.local"),
        ("upper-case-id", "must be lower case"),
        ("wrong-eku", "extended key usage"),
        ("no-digital-signature", "digital signatures"),
        ("cert-sign-usage", "signing certificates"),
        ("encoded-path", "percent-encoding"),
    ],
)
def test_each_odd_certificate_is_refused_for_its_reason(fault: str, says: str) -> None:
    assert says in refusal(PKI.leaf("web", fault=fault).der)


@pytest.mark.parametrize("fault", ["other-ca", "expired", "not-yet-valid"])
def test_chain_and_clock_are_left_to_tls(fault: str) -> None:
    assert str(check_leaf(PKI.leaf("web", fault=fault).der, "mesh.local")) == WEB


def test_the_faults_of_the_test_authority_are_all_covered() -> None:
    assert len(FAULTS) == 13  # ten above that are refused here, three that TLS refuses


@pytest.mark.parametrize(
    "name",
    [
        x509.DNSName(WEB),
        x509.RFC822Name(WEB),
        x509.OtherName(ObjectIdentifier("1.2.3.4"), b"\x16\x1f" + WEB.encode()),
        x509.RegisteredID(ObjectIdentifier("1.2.3.4")),
        x509.DirectoryName(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, WEB)])),
    ],
)
def test_a_spiffe_id_in_a_name_of_another_type_is_no_identity(name: x509.GeneralName) -> None:
    assert "no SPIFFE ID" in refusal(leaf([name]))


def test_a_spiffe_id_as_common_name_is_no_identity() -> None:
    assert "no SPIFFE ID" in refusal(leaf([], common_name=WEB))


def test_dns_names_beside_the_one_uri_are_allowed() -> None:
    assert str(check_leaf(leaf([x509.DNSName("web.mesh"), x509.UniformResourceIdentifier(WEB)]), "mesh.local")) == WEB


@pytest.mark.parametrize("ending", ["\x00", "\x00.evil.example", "\x00/service/admin"])
def test_nul_in_the_uri_is_refused(ending: str) -> None:
    assert "control characters" in refusal(leaf([x509.UniformResourceIdentifier(WEB + ending)]))


def test_the_same_uri_twice_is_still_two() -> None:
    uri = x509.UniformResourceIdentifier(WEB)
    assert "2 URIs" in refusal(leaf([uri, uri]))


def test_a_spiffe_id_beside_another_uri_is_refused() -> None:
    names = [x509.UniformResourceIdentifier(WEB), x509.UniformResourceIdentifier("https://web.example/")]
    assert "2 URIs" in refusal(leaf(names))


def test_a_missing_key_usage_is_refused() -> None:
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(SIGNER.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(WEB)]), critical=True)
    )
    der = builder.sign(SIGNER, hashes.SHA256()).public_bytes(Encoding.DER)
    assert "no key usage" in refusal(der)


@pytest.mark.parametrize("one", [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
def test_an_extended_usage_that_is_there_must_name_both(one: ObjectIdentifier) -> None:
    assert "extended key usage" in refusal(leaf(extended=(one,)))
    assert "extended key usage" in refusal(leaf(extended=(ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)))


def test_an_extended_usage_may_be_absent() -> None:
    assert check_leaf(leaf(extended=None), "mesh.local")


def test_unknown_critical_extensions_are_refused() -> None:
    unknown = x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4.5"), b"\x05\x00")
    assert "1.2.3.4.5" in refusal(leaf(extra=[(unknown, True)]))
    assert check_leaf(leaf(extra=[(unknown, False)]), "mesh.local")


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
)
def test_keys_of_other_sane_kinds_are_allowed(key: object) -> None:
    assert check_leaf(leaf(key=key), "mesh.local")


class OfNumbers:
    """A key of which only the public numbers exist: making a real one of that size would take minutes."""

    def __init__(self, modulus_bits: int, exponent: int = 65537) -> None:
        self._key = rsa.RSAPublicNumbers(exponent, (1 << modulus_bits) - 1).public_key()

    def public_key(self) -> rsa.RSAPublicKey:
        return self._key


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (OfNumbers(1024), "1024 bits"),
        (OfNumbers(8192), "8192 bits"),
        (OfNumbers(16384), "16384 bits"),
        (OfNumbers(2048, (1 << 1025) + 1), "exponent"),
        (ec.generate_private_key(ec.SECP521R1()), "secp521r1"),
        (ec.generate_private_key(ec.SECP256K1()), "secp256k1"),
    ],
)
def test_weak_and_costly_keys_are_refused(key: object, says: str) -> None:
    assert says in refusal(leaf(key=key))


def test_an_excess_of_names_is_refused() -> None:
    names = [x509.DNSName(f"n{number}.mesh") for number in range(33)]
    assert "more than 32" in refusal(leaf([*names, x509.UniformResourceIdentifier(WEB)]))


@pytest.mark.parametrize("der", [b"", b"\x30", b"\x30\x80" * 1000, b"not a certificate", b"\x00" * 100])
def test_what_is_no_certificate_is_refused(der: bytes) -> None:
    assert "cannot be parsed" in refusal(der)


def test_a_certificate_that_is_too_large_is_refused_unparsed() -> None:
    assert "larger than" in refusal(b"\x30" * (CERTIFICATE_BYTES_MAX + 1))


def test_a_damaged_certificate_never_passes_nor_raises_anything_else() -> None:
    good = PKI.leaf("web").der
    for position in range(0, len(good), 7):
        damaged = bytearray(good)
        damaged[position] ^= 0x55
        try:
            check_leaf(bytes(damaged), "mesh.local")
        except SvidError:
            pass
        # Damage to the signature or the key is for TLS to find; no other exception may come out.


def test_the_costliest_certificates_stay_within_50_ms_of_cpu() -> None:
    many = [x509.UniformResourceIdentifier(f"spiffe://m/{number}") for number in range(700)]
    worst = [
        leaf(key=OfNumbers(16384)),
        leaf(key=OfNumbers(4096, (1 << 4000) + 1)),
        leaf(many),
        leaf([x509.UniformResourceIdentifier("spiffe://mesh.local/" + "a/" * 5000)]),
        leaf(extra=[(x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\x30\x80" * 7000), False)]),
    ]
    for der in worst:
        begun = time.process_time()
        with pytest.raises(SvidError):
            check_leaf(der, "elsewhere")
        assert time.process_time() - begun < 0.05


def test_validity_is_told_and_put_into_words() -> None:
    period = validity(PKI.leaf("web", ttl=timedelta(minutes=5)).der)
    assert (period.not_before, period.not_after) == (NOW - timedelta(minutes=2), NOW + timedelta(minutes=5))
    assert period.problem(NOW) is None
    assert "expired on 2030-01-01 00:05:00 UTC" in (period.problem(NOW + timedelta(hours=1)) or "")
    assert "not valid before 2029-12-31 23:58:00 UTC" in (period.problem(NOW - timedelta(hours=1)) or "")


def test_the_fingerprint_is_that_of_other_tools() -> None:
    der = PKI.leaf("web").der
    assert fingerprint(der) == x509.load_der_x509_certificate(der).fingerprint(hashes.SHA256()).hex()


def test_authorities_are_checked_for_their_trust_domain() -> None:
    root = create_root("mesh.local", NOW).certificate
    check_ca(root, "mesh.local")
    with pytest.raises(SvidError, match=r"spiffe://mesh\.local"):
        check_ca(root, "elsewhere.example")
    with pytest.raises(SvidError, match="cA is not true"):
        check_ca(parse_certificate(PKI.leaf("web").der), "mesh.local")
