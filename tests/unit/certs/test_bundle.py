from datetime import UTC, datetime

import pytest
from support.pki import Pki

from certs.authority import bundle_of, certificate_pem, create_root
from certs.bundle import ROOTS_MAX, BundleError, TrustBundle

NOW = datetime(2030, 1, 1, tzinfo=UTC)
PKI = Pki(now=NOW)
FIRST, SECOND = create_root("mesh.local", NOW), create_root("mesh.local", NOW)


def refusal(pem: bytes, trust_domain: str = "mesh.local") -> str:
    with pytest.raises(BundleError) as caught:
        TrustBundle.parse(trust_domain, pem)
    return str(caught.value)


def test_roots_are_read_in_order_and_each_once() -> None:
    pem = certificate_pem([FIRST.certificate, SECOND.certificate, FIRST.certificate])
    bundle = TrustBundle.parse("mesh.local", pem)
    assert len(bundle.roots) == 2
    assert bundle == bundle_of(FIRST, SECOND)
    assert TrustBundle.parse("mesh.local", bundle.pem) == bundle


def test_the_difference_names_what_was_added_and_what_was_lost() -> None:
    old, new = bundle_of(FIRST), bundle_of(SECOND)
    difference = old.diff(new)
    assert difference.added == new.roots
    assert difference.lost == old.roots
    assert not old.diff(old)
    assert not bundle_of(FIRST, SECOND).diff(bundle_of(SECOND, FIRST))
    assert bundle_of(FIRST).diff(bundle_of(FIRST, SECOND)).lost == ()
    with pytest.raises(ValueError, match="two trust domains"):
        old.diff(bundle_of(create_root("elsewhere.example", NOW)))


def test_a_private_key_in_a_bundle_is_an_alarm() -> None:
    leaf = PKI.leaf("web")
    text = refusal(certificate_pem([FIRST.certificate]) + leaf.key_pem)
    assert "private key" in text and "replace that key" in text


def test_what_is_no_root_is_refused_with_its_line() -> None:
    assert "cA is not true" in refusal(PKI.leaf("web").cert_pem)
    assert "not a root" in refusal(certificate_pem(PKI.issuing.chain))
    assert "of 'spiffe://mesh.local'" in refusal(certificate_pem([FIRST.certificate]), "elsewhere.example")
    pem = certificate_pem([FIRST.certificate])
    line = pem.count(b"\n") + 1
    assert refusal(pem + certificate_pem(PKI.issuing.chain)).startswith(f"line {line}: ")


def test_empty_cut_and_oversized_bundles_are_refused() -> None:
    assert "holds no certificate" in refusal(b"")
    assert "holds no certificate" in refusal(b"# nothing\n")
    pem = certificate_pem([FIRST.certificate])
    assert "no END" in refusal(pem[:-30])
    assert "more than" in refusal(pem * (ROOTS_MAX + 1))
    assert "larger than" in refusal(b"#" * 300_000)
    assert "not 'X509 CRL'" in refusal(pem.replace(b"CERTIFICATE", b"X509 CRL"))
