"""Which control plane, and as whom: the order of flags, environment and context file, and what is refused."""

import json
from pathlib import Path

import click
import pytest
from support.pki import Pki

from certs.tokens import make_token
from control_plane.cli.target import (
    Asked,
    BadTarget,
    Context,
    NotConfigured,
    address_of,
    context_path,
    load_context,
    resolve,
    save_context,
)

FINGERPRINT = "ab" * 32


def token(*addresses: str, kind: str = "operator", id: str = "t1") -> str:
    return make_token(kind, id, "s3cret", addresses or ("cp:15011",), FINGERPRINT, "mesh.local")


@pytest.fixture
def context(tmp_path: Path) -> Path:
    path = tmp_path / "context.json"
    save_context(path, Context("https://ctx:15011", FINGERPRINT, "mesh.local", token("ctx:15011", "other:15011")))
    return path


def environ(path: Path, **more: str) -> dict[str, str]:
    return {"PILLION_CONTEXT": str(path), **more}


def test_the_context_file_alone_is_enough(context: Path) -> None:
    target = resolve(Asked(), environ(context))
    assert target.addresses == ("ctx:15011", "other:15011")  # its own first, then whatever else the token names
    assert (target.trust_domain, target.fingerprint, target.whom) == ("mesh.local", FINGERPRINT, str(context))


def test_what_stands_nearer_wins(context: Path, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(token("file:1") + "\n")
    file.chmod(0o600)
    env = environ(context, PILLION_TOKEN=token("env:2"), PILLION_TOKEN_FILE=str(file))
    assert resolve(Asked(token=token("flag:3")), env).addresses == ("flag:3",)
    assert resolve(Asked(token_file=file), env).addresses == ("file:1",)
    assert resolve(Asked(), env).addresses == ("env:2",)
    assert resolve(Asked(), environ(context, PILLION_TOKEN_FILE=str(file))).addresses == ("file:1",)
    assert resolve(Asked(url="https://there"), env).addresses == ("there:15011",)
    assert resolve(Asked(), env | {"PILLION_URL": "there:9"}).addresses == ("there:9",)
    assert resolve(Asked(url="a:1"), env | {"PILLION_URL": "b:2"}).addresses == ("a:1",)


def test_a_certificate_stands_for_a_token(tmp_path: Path, context: Path) -> None:
    pki = Pki()
    directory = pki.identity(tmp_path, "web")
    target = resolve(Asked(url="cp:1", cert=directory), environ(tmp_path / "none"))
    assert target.token is None and target.identity is not None and target.trust_domain == pki.trust_domain
    target = resolve(Asked(cert=directory), environ(context))
    assert target.addresses == ("ctx:15011",)  # where to go, a certificate does not say
    with pytest.raises(NotConfigured, match="nothing says where"):
        resolve(Asked(cert=directory), environ(tmp_path / "none"))
    with pytest.raises(BadTarget, match="no such directory"):
        resolve(Asked(url="cp:1", cert=tmp_path / "absent"), environ(tmp_path / "none"))


def test_nothing_known_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotConfigured) as caught:
        resolve(Asked(), environ(tmp_path / "none"))
    assert caught.value.exit_code == 3
    assert "pillion up" in caught.value.message and "pillion login" in caught.value.message
    with pytest.raises(NotConfigured, match="nothing says who you are"):
        resolve(Asked(url="cp:1"), environ(tmp_path / "none"))


def test_two_answers_to_one_question_are_refused(context: Path, tmp_path: Path) -> None:
    with pytest.raises(BadTarget, match="--token and --cert both say who you are"):
        resolve(Asked(token=token(), cert=tmp_path), environ(context))


def test_tokens_that_cannot_be_used(tmp_path: Path, context: Path) -> None:
    env = environ(context)
    with pytest.raises(BadTarget, match="join token"):
        resolve(Asked(token=token(kind="join")), env)
    with pytest.raises(BadTarget, match="damaged"):
        resolve(Asked(token=token()[:-3]), env)
    with pytest.raises(BadTarget, match="no such file"):
        resolve(Asked(token_file=tmp_path / "absent"), env)
    for content, says in (("", "is empty"), ("x" * 100_000, "more than")):
        file = tmp_path / "token"
        file.write_text(content)
        file.chmod(0o600)
        with pytest.raises(BadTarget, match=says):
            resolve(Asked(token_file=file), env)


def test_a_message_never_holds_the_token(tmp_path: Path) -> None:
    text = token()
    for bad in (text[:-3], text + " x", text.replace("pil_o", "pil_j")):
        with pytest.raises(click.ClickException) as caught:
            resolve(Asked(token=bad), environ(tmp_path / "none"))
        assert text[8:30] not in caught.value.format_message()
    assert text not in repr(resolve(Asked(token=text), environ(tmp_path / "none")))
    assert text not in repr(Context(token=text))


def test_files_that_others_can_read_are_refused(context: Path, tmp_path: Path) -> None:
    context.chmod(0o644)
    with pytest.raises(BadTarget, match=r"can be read by others \(mode 0644\); run: chmod 600"):
        resolve(Asked(), environ(context))
    with pytest.raises(BadTarget, match="is not a file"):
        resolve(Asked(token_file=tmp_path), environ(context))


@pytest.mark.parametrize("content", ["", "[]", '{"url": 1}', "{", "\0"])
def test_a_damaged_context_says_so(tmp_path: Path, content: str) -> None:
    path = tmp_path / "context.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(BadTarget, match="pillion login"):
        load_context(path)


def test_a_context_of_a_newer_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "context.json"
    path.write_text(json.dumps({"url": "https://a:1", "token": token(), "colour": "blue"}))
    path.chmod(0o600)
    assert load_context(path) == Context(url="https://a:1", token=token())


def test_a_stored_context_is_its_owners_alone(context: Path) -> None:
    assert context.stat().st_mode & 0o777 == 0o600
    assert set(json.loads(context.read_text())) == {"url", "fingerprint", "trust_domain", "token"}


def test_where_the_context_file_is() -> None:
    assert context_path({"PILLION_CONTEXT": "/a/b"}) == Path("/a/b")
    assert context_path({"XDG_CONFIG_HOME": "/x", "HOME": "/h"}) == Path("/x/pillion/context.json")
    assert context_path({"HOME": "/h"}) == Path("/h/.config/pillion/context.json")


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://cp:9000", "cp:9000"),
        ("https://cp/", "cp:15011"),
        ("cp:9000", "cp:9000"),
        ("10.0.0.1", "10.0.0.1:15011"),
        ("https://[::1]:9", "[::1]:9"),
        ("[::1]", "[::1]:15011"),
    ],
)
def test_addresses(url: str, address: str) -> None:
    assert address_of(url, "--url") == address


@pytest.mark.parametrize(
    "url",
    [
        "http://cp:1",
        "https://",
        "https://a:b",
        "https://me@cp",
        "https://cp/v1",
        "ftp://cp",
        "https://cp?x=1",
        "",
        "[::1",
    ],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(BadTarget):
        address_of(url, "--url")


def test_a_context_that_is_not_needed_is_not_in_the_way(context: Path) -> None:
    context.chmod(0o644)
    assert resolve(Asked(token=token("flag:3")), environ(context)).addresses == ("flag:3",)


def test_a_token_file_that_others_can_read_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "token"
    file.write_text(token("cp:1"))
    file.chmod(0o444)  # as containers have their secrets
    assert resolve(Asked(token_file=file), environ(tmp_path / "none")).addresses == ("cp:1",)
    out, err = capsys.readouterr()
    assert out == "" and "can be read by others (mode 0444); run: chmod 600" in err


def test_a_sidecars_token_in_the_environment_is_not_ours(context: Path, tmp_path: Path) -> None:
    joining = token("cp:1", kind="join")
    assert resolve(Asked(), environ(context, PILLION_TOKEN=joining)).whom == str(context)
    with pytest.raises(BadTarget, match="join token"):
        resolve(Asked(), environ(tmp_path / "none", PILLION_TOKEN=joining))
