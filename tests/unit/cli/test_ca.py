"""`pillion ca`, from the arguments to the files and what is printed."""

import json
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from certs.files import load_ca, load_identity
from control_plane.cli import ca, main


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PILLION_CA_DIR", raising=False)


def test_two_commands_make_an_identity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ca", "init"]) == 0
    out = capsys.readouterr().out
    assert "mesh.local" in out and "pillion-ca/root.pem" in out
    assert main(["ca", "issue", "--service", "web"]) == 0
    out = capsys.readouterr().out
    assert "spiffe://mesh.local/service/web" in out and "identities/web/key.pem" in out
    identity = load_identity(tmp_path / "identities" / "web")
    assert str(identity.spiffe_id) == "spiffe://mesh.local/service/web"
    assert timedelta(hours=23) < identity.not_after - datetime.now(UTC) <= timedelta(hours=24)
    for path in (*tmp_path.rglob("*.key"), *tmp_path.rglob("key.pem")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_everything_can_be_chosen(tmp_path: Path) -> None:
    assert main(["ca", "init", "--dir", "a/ca", "--trust-domain", "prod.example"]) == 0
    assert main(["ca", "issue", "--service", "web", "--dir", "a/ca", "--out", "b/web", "--ttl", "10m"]) == 0
    identity = load_identity(tmp_path / "b" / "web")
    assert str(identity.spiffe_id) == "spiffe://prod.example/service/web"
    assert identity.not_after - datetime.now(UTC) <= timedelta(minutes=10)


def test_the_environment_names_the_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PILLION_CA_DIR", str(tmp_path / "elsewhere"))
    assert main(["ca", "init"]) == 0
    assert load_ca(tmp_path / "elsewhere")


def test_an_authority_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["ca", "init"])
    before = (tmp_path / "pillion-ca" / "root.pem").read_bytes()
    capsys.readouterr()
    assert main(["ca", "init"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "pillion-ca is already there" in err
    assert (tmp_path / "pillion-ca" / "root.pem").read_bytes() == before


def test_issuing_again_renews_but_never_takes_another_services_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["ca", "init"])
    assert main(["ca", "issue", "--service", "web", "--out", "id"]) == 0
    first = load_identity(tmp_path / "id").fingerprint
    assert main(["ca", "issue", "--service", "web", "--out", "id"]) == 0
    second = load_identity(tmp_path / "id").fingerprint
    assert first != second
    capsys.readouterr()
    assert main(["ca", "issue", "--service", "reviews", "--out", "id"]) == 1
    assert "holds the identity spiffe://mesh.local/service/web" in capsys.readouterr().err
    assert load_identity(tmp_path / "id").fingerprint == second


def test_renewing_the_issuing_authority_keeps_what_was_issued(tmp_path: Path) -> None:
    main(["ca", "init"])
    main(["ca", "issue", "--service", "web"])
    before = load_ca(tmp_path / "pillion-ca").issuing.certificate
    (tmp_path / "pillion-ca" / "issuing.pem").write_text("damaged")  # as after a crash between two files
    assert main(["ca", "renew"]) == 0
    assert load_ca(tmp_path / "pillion-ca").issuing.certificate != before
    assert load_identity(tmp_path / "identities" / "web")
    (tmp_path / "pillion-ca" / "root.key").unlink()
    assert main(["ca", "renew"]) == 1


def test_a_life_beyond_the_issuers_is_cut_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    main(["ca", "init"])
    assert main(["ca", "issue", "--service", "web", "--ttl", "5000d"]) == 0
    assert "Shorter than asked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["ca", "issue", "--service", "web"], 1, "pillion ca init --dir pillion-ca"),
        (["ca", "issue", "--service", "Web"], 2, "use a-z"),
        (["ca", "issue", "--service", "web", "--ttl", "24"], 2, "such as 90s, 30m, 24h or 7d"),
        (["ca", "issue", "--service", "web", "--ttl", "-1h"], 2, "not a duration"),
        (["ca", "init", "--trust-domain", "Mesh.Local"], 2, "must be lower case"),
        (["ca", "init", "--dir", "/proc/none/ca"], 1, "cannot write"),
        (["ca", "show", "none"], 1, "no such directory"),
    ],
)
def test_bad_input_is_told(args: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == code
    out, err = capsys.readouterr()
    assert out == "" and says in err


def test_a_ttl_of_too_few_seconds_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    main(["ca", "init"])
    assert main(["ca", "issue", "--service", "web", "--ttl", "4s"]) == 1
    assert "at least 5 seconds" in capsys.readouterr().err


def test_show_tells_authorities_and_identities(capsys: pytest.CaptureFixture[str]) -> None:
    main(["ca", "init"])
    main(["ca", "issue", "--service", "web"])
    capsys.readouterr()
    assert main(["ca", "show"]) == 0
    out = capsys.readouterr().out
    assert "root key      here" in out and "issuing       spiffe://mesh.local" in out
    assert main(["ca", "show", "identities/web", "-o", "json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["spiffe_id"] == "spiffe://mesh.local/service/web"
    assert [certificate["role"] for certificate in facts["certificates"]] == ["leaf", "issuing", "root"]
    assert all(len(certificate["fingerprint_sha256"]) == 64 for certificate in facts["certificates"])


def test_show_tells_what_has_expired_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["ca", "init"])
    main(["ca", "issue", "--service", "web"])
    later = datetime.now(UTC) + timedelta(days=2)
    monkeypatch.setattr(ca, "_now", lambda: later)
    capsys.readouterr()
    assert main(["ca", "show", "identities/web"]) == 1
    out, err = capsys.readouterr()
    assert "spiffe://mesh.local/service/web" in out and "The leaf certificate expired" in err
    monkeypatch.setattr(ca, "_now", lambda: later + timedelta(days=720))
    assert main(["ca", "show"]) == 0
    assert "The issuing certificate expires in" in capsys.readouterr().err


def test_show_refuses_a_key_that_others_may_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["ca", "init"])
    (tmp_path / "pillion-ca" / "issuing.key").chmod(0o644)
    assert main(["ca", "show"]) == 1
    assert "chmod 600 pillion-ca/issuing.key" in capsys.readouterr().err


def test_an_issuing_authority_for_a_further_replica(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["ca", "init"])
    assert main(["ca", "replica", "--out", "there/r2"]) == 0
    out, err = capsys.readouterr()
    assert "there/r2/issuing.pem" in out and "secret of that replica alone" in err
    first, second = load_ca(tmp_path / "pillion-ca"), load_ca(tmp_path / "there" / "r2")
    assert second.bundle == first.bundle and second.root == first.root
    assert second.issuing.certificate != first.issuing.certificate
    assert sorted(path.name for path in (tmp_path / "there" / "r2").iterdir()) == [
        "bundle.pem", "issuing.key", "issuing.pem", "root.pem", "trust-domain",
    ]  # fmt: skip
    assert stat.S_IMODE((tmp_path / "there" / "r2" / "issuing.key").stat().st_mode) == 0o600
    assert main(["ca", "issue", "--service", "web", "--dir", "there/r2"]) == 0  # what it issues is of the same root
    assert load_identity(tmp_path / "identities" / "web").bundle == first.bundle


def test_a_replica_is_made_once_and_only_with_the_roots_key(capsys: pytest.CaptureFixture[str]) -> None:
    main(["ca", "init"])
    main(["ca", "replica", "--out", "r2"])
    assert main(["ca", "replica", "--out", "r2"]) == 1
    assert "r2 is already there" in capsys.readouterr().err
    assert main(["ca", "replica", "--dir", "r2", "--out", "r3"]) == 1
    assert "does not hold the root's key" in capsys.readouterr().err
    assert main(["ca", "replica", "--dir", "absent", "--out", "r3"]) == 1
    assert "no such directory" in capsys.readouterr().err
