"""Files of authorities and identities: whole or not at all, private, and checked as a set."""

import os
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from support.pki import Pki

from certs.authority import certificate_pem, create_root
from certs.files import (
    IdentityError,
    changed,
    load_ca,
    load_identity,
    load_root,
    read_key,
    write_atomic,
    write_ca,
    write_identity,
)

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)
PKI = Pki(now=NOW)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refusal(directory: Path, now: datetime = NOW) -> IdentityError:
    with pytest.raises(IdentityError) as caught:
        load_identity(directory, now)
    return caught.value


def test_an_identity_is_read_back(tmp_path: Path) -> None:
    directory = PKI.identity(tmp_path, "web")
    identity = load_identity(directory, NOW)
    assert str(identity.spiffe_id) == "spiffe://mesh.local/service/web"
    assert identity.trust_domain == "mesh.local"
    assert identity.not_after == NOW + timedelta(hours=24)
    assert identity.cert_pem == (directory / "cert.pem").read_bytes()
    assert identity.bundle == PKI.bundle
    assert len(identity.fingerprint) == 64
    assert mode(directory) == 0o700
    assert [mode(directory / name) for name in ("key.pem", "cert.pem", "bundle.pem")] == [0o600, 0o644, 0o644]
    assert sorted(path.name for path in directory.iterdir()) == ["bundle.pem", "cert.pem", "key.pem"]


def test_the_key_is_not_in_the_repr(tmp_path: Path) -> None:
    identity = load_identity(PKI.identity(tmp_path, "web"), NOW)
    assert "PRIVATE" not in repr(identity) and "service/web" in repr(identity)


def test_an_identity_goes_into_a_tls_context_without_touching_the_disk(tmp_path: Path) -> None:
    directory = PKI.identity(tmp_path, "web")
    identity = load_identity(directory, NOW)
    for path in directory.iterdir():
        path.unlink()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    before = os.listdir("/proc/self/fd")
    identity.load_into(context)
    assert os.listdir("/proc/self/fd") == before
    assert len(context.get_ca_certs()) == 1


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660, 0o644, 0o666])
def test_a_key_that_others_may_read_is_refused_with_the_cure(tmp_path: Path, bits: int) -> None:
    directory = PKI.identity(tmp_path, "web")
    key = directory / "key.pem"
    key.chmod(bits)
    error = refusal(directory)
    assert f"chmod 600 {key}" in str(error) and f"{bits:04o}" in str(error)
    assert not error.transient


def test_a_key_behind_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    directory = PKI.identity(tmp_path, "web")
    (directory / "key.pem").rename(tmp_path / "real.pem")
    (directory / "key.pem").symlink_to(tmp_path / "real.pem")
    assert "symbolic link" in str(refusal(directory))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_key_of_another_user_is_refused_with_the_cure(tmp_path: Path) -> None:
    directory = PKI.identity(tmp_path, "web")
    os.chown(directory / "key.pem", 12345, -1)
    assert f"chown 0 {directory / 'key.pem'}" in str(refusal(directory))


def test_a_fifo_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    directory = PKI.identity(tmp_path, "web")
    (directory / "key.pem").unlink()
    os.mkfifo(directory / "key.pem", 0o600)
    assert "not a regular file" in str(refusal(directory))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("other-ca", "does not lead to a root"),
        ("no-spiffe-id", "no SPIFFE ID"),
        ("two-uris", "2 URIs"),
        ("expired", "the certificate expired on 2030-01-01 10:00:00 UTC"),
        ("not-yet-valid", "is not valid before 2030-01-01 15:00:00 UTC; is the clock right?"),
        ("ca-as-leaf", "cA is true"),
        ("other-trust-domain", "the authority is of 'spiffe://mesh.local'"),
        ("upper-case-id", "must be lower case"),
        ("wrong-eku", "extended key usage"),
    ],
)
def test_each_odd_identity_is_refused_for_its_reason(tmp_path: Path, fault: str, says: str) -> None:
    directory = PKI.identity(tmp_path, "web", fault=fault)
    message = str(refusal(directory))
    assert says in message and str(directory) in message


def test_a_missing_directory_and_missing_files_are_told(tmp_path: Path) -> None:
    assert "pillion ca issue" in str(refusal(tmp_path / "none"))
    for name in ("cert.pem", "key.pem", "bundle.pem"):
        directory = PKI.identity(tmp_path, "web")
        (directory / name).unlink()
        error = refusal(directory)
        assert f"{directory / name}: no such file" in str(error) and error.transient


def test_damaged_files_are_told(tmp_path: Path) -> None:
    directory = PKI.identity(tmp_path, "web")
    cases = [
        ("cert.pem", b"", "holds no certificate"),
        ("cert.pem", (directory / "cert.pem").read_bytes()[:-40], "no END"),
        ("cert.pem", (directory / "key.pem").read_bytes(), "only certificates belong here"),
        ("cert.pem", b"x" * 100_000, "larger than"),
        ("cert.pem", b"-----BEGIN CERTIFICATE-----\nAAEC\n-----END CERTIFICATE-----\n", "cannot be parsed"),
        ("key.pem", b"", "one private key is needed"),
        ("key.pem", b"-----BEGIN PRIVATE KEY-----\nAAEC\n-----END PRIVATE KEY-----\n", "is the file damaged?"),
        ("bundle.pem", b"", "holds no certificate"),
        ("bundle.pem", (directory / "key.pem").read_bytes(), "private key"),
    ]
    for name, content, says in cases:
        PKI.identity(tmp_path, "web")
        write_atomic(directory / name, content, 0o600)
        message = str(refusal(directory))
        assert says in message and str(directory / name) in message


def test_encrypted_and_weak_keys_are_refused(tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    path = tmp_path / "key.pem"
    write_atomic(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")), 0o600)
    with pytest.raises(IdentityError, match="encrypted"):
        read_key(path)


def test_a_leaf_without_its_issuing_certificate_is_refused(tmp_path: Path) -> None:
    directory = PKI.identity(tmp_path, "web")
    leaf = PKI.leaf("web")
    write_identity(directory, leaf.chain[:1], leaf.key, PKI.bundle)  # type: ignore[arg-type]
    assert "issuing certificate is missing" in str(refusal(directory))


def test_an_expired_issuer_is_told_apart_from_an_expired_leaf(tmp_path: Path) -> None:
    old = Pki(now=NOW)
    old.issuing = old.root.issue_authority(NOW - timedelta(hours=1), timedelta(hours=2))
    directory = old.identity(tmp_path, "web")
    assert load_identity(directory, NOW).not_after == NOW + timedelta(hours=1)
    assert "expired" in str(refusal(directory, NOW + timedelta(hours=2)))


def test_a_set_caught_half_written_is_transient(tmp_path: Path) -> None:
    directory = PKI.identity(tmp_path, "web")
    newer = PKI.leaf("web")
    write_atomic(directory / "cert.pem", newer.cert_pem, 0o644)
    error = refusal(directory)
    assert error.transient and "is not the key of" in str(error)
    write_atomic(directory / "key.pem", newer.key_pem, 0o600)
    assert load_identity(directory, NOW)


def test_a_change_of_any_file_is_noticed_once(tmp_path: Path) -> None:
    directory = PKI.identity(tmp_path, "web")
    state = changed(directory, None)
    assert state is not None
    assert changed(directory, state) is None
    for name in ("cert.pem", "key.pem", "bundle.pem"):
        write_atomic(directory / name, (directory / name).read_bytes(), 0o600)
        newer = changed(directory, state)
        assert newer is not None and newer != state
        state = newer
        assert changed(directory, state) is None
    (directory / "key.pem").unlink()
    assert changed(directory, state) is not None
    assert changed(tmp_path / "none", None) == (None, None, None)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old", 0o600)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new", 0o600)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_authority_is_read_back_and_issues(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "ca"
    write_ca(directory, PKI.root, PKI.issuing)
    assert mode(directory) == 0o700
    assert {path.name: mode(path) for path in directory.iterdir()} == {
        "root.pem": 0o644,
        "root.key": 0o600,
        "issuing.pem": 0o644,
        "issuing.key": 0o600,
        "bundle.pem": 0o644,
        "trust-domain": 0o644,
    }
    files = load_ca(directory)
    assert (files.trust_domain, files.root, files.bundle) == ("mesh.local", PKI.root.certificate, PKI.bundle)
    assert load_root(directory).certificate == PKI.root.certificate
    (directory / "root.key").unlink()  # taken offline
    assert load_ca(directory).issuing.certificate == PKI.issuing.certificate


def test_an_authority_is_never_overwritten(tmp_path: Path) -> None:
    write_ca(tmp_path / "ca", PKI.root, PKI.issuing)
    for path in (tmp_path / "ca", tmp_path / "ca" / "root.pem"):
        with pytest.raises(FileExistsError):
            write_ca(path, PKI.other.root, PKI.other.issuing)
    (tmp_path / "empty").mkdir()
    write_ca(tmp_path / "empty", PKI.root, PKI.issuing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca", "empty"]


def test_a_mixed_up_authority_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "ca"
    write_ca(directory, PKI.root, PKI.issuing)
    foreign = create_root("mesh.local", NOW)
    write_atomic(directory / "bundle.pem", certificate_pem([foreign.certificate]), 0o644)
    with pytest.raises(IdentityError, match="does not lead to a root"):
        load_ca(directory)
    with pytest.raises(IdentityError, match="not the key of a root"):
        load_root(directory)
    write_atomic(directory / "trust-domain", b"Mesh.Local\n", 0o644)
    with pytest.raises(IdentityError, match="must be lower case"):
        load_ca(directory)
    with pytest.raises(IdentityError, match="pillion ca init"):
        load_ca(tmp_path / "none")
