"""Contexts that pin an identity: checked within the handshake, before a byte of the client's is sent."""

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from support.pki import Pki

from certs.authority import new_key
from certs.client import (
    WrongPeer,
    control_plane_id,
    new_csr,
    pinned_context,
    root_by_fingerprint,
    unverified_context,
)
from certs.files import load_identity

CONTROL = "pillion-control-plane"


@pytest.fixture(scope="module")
def pki() -> Pki:
    return Pki()


class Pair:
    """Both ends of TLS in memory."""

    def __init__(self, client: ssl.SSLContext, server: ssl.SSLContext) -> None:
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = client.wrap_bio(down, up, server_hostname="api.pillion-control-plane.mesh")
        self.server = server.wrap_bio(up, down, server_side=True)

    def shake(self) -> None:
        done = set()
        for _ in range(10):
            for end in (self.client, self.server):
                if end not in done:
                    try:
                        end.do_handshake()
                        done.add(end)
                    except ssl.SSLWantReadError:
                        pass
        assert len(done) == 2


def server(pki: Pki, service: str, ask: bool = False, fault: str | None = None) -> ssl.SSLContext:
    context = pki.server_context(service, fault=fault)
    context.verify_mode = ssl.CERT_REQUIRED if ask else ssl.CERT_NONE
    return context


def test_the_expected_identity_is_talked_to(pki: Pki) -> None:
    pair = Pair(pinned_context(pki.bundle, control_plane_id("mesh.local")), server(pki, CONTROL))
    pair.shake()
    pair.client.write(b"secret")
    assert pair.server.read(10) == b"secret"


def test_a_client_with_an_identity_presents_it(pki: Pki, tmp_path: Path) -> None:
    identity = load_identity(pki.identity(tmp_path, "web"))
    pair = Pair(pinned_context(pki.bundle, control_plane_id("mesh.local"), identity), server(pki, CONTROL, ask=True))
    pair.shake()
    assert pair.server.getpeercert(binary_form=True) is not None


def test_another_service_of_the_mesh_is_refused_within_the_handshake(pki: Pki) -> None:
    pair = Pair(pinned_context(pki.bundle, control_plane_id("mesh.local")), server(pki, "web"))
    with pytest.raises(WrongPeer, match="service/web answered"):
        pair.shake()


@pytest.mark.parametrize("fault", ["other-ca", "expired", "not-yet-valid"])
def test_a_certificate_that_does_not_verify(pki: Pki, fault: str) -> None:
    pair = Pair(pinned_context(pki.bundle, control_plane_id("mesh.local")), server(pki, CONTROL, fault=fault))
    with pytest.raises(ssl.SSLCertVerificationError):
        pair.shake()


@pytest.mark.parametrize("fault", ["no-spiffe-id", "two-uris", "wrong-eku", "dns-name-only"])
def test_a_leaf_that_proves_nothing(pki: Pki, fault: str) -> None:
    pair = Pair(pinned_context(pki.bundle, control_plane_id("mesh.local")), server(pki, CONTROL, fault=fault))
    with pytest.raises(ssl.SSLError):
        pair.shake()


def test_sockets_are_checked_too(pki: Pki) -> None:
    context = pinned_context(pki.bundle, control_plane_id("mesh.local"))
    assert issubclass(context.sslsocket_class, ssl.SSLSocket)  # type: ignore[arg-type]
    assert "do_handshake" in vars(context.sslsocket_class)


def test_the_unverified_one_takes_anybody(pki: Pki) -> None:
    Pair(unverified_context(), server(pki, "web", fault="other-ca")).shake()


def test_the_root_of_a_fingerprint_and_no_other(pki: Pki) -> None:
    from certs.authority import bundle_of

    both = bundle_of(pki.root, pki.other.root)
    only = root_by_fingerprint(both, pki.bundle.roots[0].fingerprint)
    assert only == pki.bundle
    assert root_by_fingerprint(both, "0" * 64) is None


def test_a_signing_request_proves_its_key_and_names_nobody() -> None:
    key = new_key()
    request = x509.load_pem_x509_csr(new_csr(key))
    assert request.is_signature_valid and request.public_key() == key.public_key()
    assert not list(request.subject) and not list(request.extensions)
