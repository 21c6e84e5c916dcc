"""The command line towards a control plane: authentication both ways, and every way in which that fails."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.pki import Pki
from support.standin_operator import StandIn, error

from certs.tokens import make_token
from control_plane.cli import main
from control_plane.cli.target import Context, load_context, save_context

SERVICES = {
    "revision": 12,
    "services": [
        {"name": "reviews", "ports": [{"name": "api", "number": 8000, "protocol": "http"}], "endpoints": 3,
         "healthy": 2, "versions": ["v1", "v2"], "mtls": "strict", "owners": ["team-reviews"],
         "policy": "mesh.yaml:12", "callers": 2},
        {"name": "web", "ports": [], "endpoints": 0, "healthy": 0, "versions": [], "mtls": "strict", "owners": [],
         "policy": None, "callers": 0},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def pki() -> Pki:
    return Pki()


@pytest.fixture
def server(pki: Pki) -> Iterator[StandIn]:
    with StandIn(pki) as server:
        server.answer("GET", "/v1/services", SERVICES)
        yield server


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("PILLION_URL", "PILLION_TOKEN", "PILLION_TOKEN_FILE", "PILLION_POLICY"):
        monkeypatch.delenv(name, raising=False)
    context = tmp_path / "config" / "context.json"
    monkeypatch.setenv("PILLION_CONTEXT", str(context))
    monkeypatch.chdir(tmp_path)
    return context


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(list(args))
    out, err = capsys.readouterr()
    return code, out, err


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_a_token_is_enough(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "get", "services", "--token", server.token())
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "SERVICE  PORTS          HEALTHY  VERSIONS  MTLS    CALLERS",
        "reviews  api:8000/http  2/3      v1,v2     strict  2",
        "web      -              0/0      -         strict  0",
    ]
    asked = [(path, "authorization" in headers) for _, path, headers, _ in server.requests]
    assert asked == [("/v1/ca", False), ("/v1/services", True)]  # nothing secret before the server has proved itself


@pytest.mark.parametrize("output", ["wide", "json", "yaml", "name"])
def test_every_form_of_a_list(server: StandIn, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "get", "services", "-o", output, "--token", server.token())
    assert (code, err) == (0, "") and "reviews" in out
    if output == "json":
        assert json.loads(out) == SERVICES
    if output == "name":
        assert out == "reviews\nweb\n"
    if output == "wide":
        assert "team-reviews" in out and "mesh.yaml:12" in out


def test_one_of_a_list_and_one_that_is_not_there(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "get", "service", "web", "revews", "-o", "name", "--token", server.token())
    assert (code, out) == (1, "web\n")
    assert err == "Error: unknown service 'revews'; did you mean \"reviews\"?\n"


def test_an_empty_list_says_what_to_do(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer("GET", "/v1/sidecars", {"revision": 1, "sidecars": []})
    code, out, err = run(capsys, "get", "sidecars", "--token", server.token())
    assert (code, out) == (0, "") and "pillion token create --service NAME" in err


def test_nobody_there(pki: Pki, capsys: pytest.CaptureFixture[str]) -> None:
    addresses = [f"127.0.0.1:{closed_port()}" for _ in range(2)]
    token = make_token("operator", "t", "s", addresses, pki.bundle.roots[0].fingerprint, pki.trust_domain)
    code, out, err = run(capsys, "get", "services", "--token", token)
    assert (code, out) == (3, "")
    assert all(f"https://{address}: connection refused" in err for address in addresses)
    assert "Next: pillion check" in err and token not in err


def test_the_second_address_answers(server: StandIn, pki: Pki, capsys: pytest.CaptureFixture[str]) -> None:
    token = server.token("operator", f"127.0.0.1:{closed_port()}", server.address)
    assert run(capsys, "get", "services", "-o", "name", "--token", token) == (0, "reviews\nweb\n", "")


def test_another_mesh_answers_at_that_address(server: StandIn, pki: Pki, capsys: pytest.CaptureFixture[str]) -> None:
    token = make_token("operator", "t", "s", [server.address], "ab" * 32, pki.trust_domain)
    code, out, err = run(capsys, "get", "services", "--token", token)
    assert (code, out) == (3, "") and "another control plane answers there" in err and "log in again" in err
    assert [path for _, path, _, _ in server.requests] == ["/v1/ca"]


@pytest.mark.parametrize(
    ("service", "fault", "says"),
    [
        (
            "web",
            None,
            "expected spiffe://mesh.local/service/pillion-control-plane, but spiffe://mesh.local/service/web",
        ),
        ("pillion-control-plane", "other-ca", "its certificate is refused"),
        ("pillion-control-plane", "expired", "is the clock of this machine right?"),
    ],
)
def test_an_impostor_is_told_nothing(
    pki: Pki, service: str, fault: str | None, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with StandIn(pki, service, fault) as impostor:
        code, out, err = run(capsys, "get", "services", "--token", impostor.token())
    assert (code, out) == (3, "") and says in err
    assert all("authorization" not in headers for _, _, headers, _ in impostor.requests)


def test_what_answers_is_no_tls_server(pki: Pki, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        token = make_token("operator", "t", "s", [address], pki.bundle.roots[0].fingerprint, pki.trust_domain)
        code, _, err = run(capsys, "get", "services", "--token", token)
        thread.join()
    assert code == 3 and "no TLS 1.3 there" in err


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [(400, "invalid", 2), (401, "token_expired", 1), (403, "not_allowed", 1), (404, "not_found", 1),
     (409, "conflict", 4), (409, "watched_folder", 1), (503, "store_unavailable", 3)],
)  # fmt: skip
def test_a_no_is_shown_with_what_to_do(
    server: StandIn, status: int, code: str, exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer("GET", "/v1/services", (status, error(code, "this cannot be", "do that")))
    assert run(capsys, "get", "services", "--token", server.token()) == (
        exit_code,
        "",
        "Error: this cannot be\n  help: do that\n",
    )


@pytest.mark.parametrize("answer", [b"", b"<html>", b"[1]", b'{"error": 7}'])
def test_an_answer_that_is_not_understood(server: StandIn, answer: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer("GET", "/v1/services", (500, answer))
    code, out, err = run(capsys, "get", "services", "--token", server.token())
    assert (code, out) == (1, "") and "is not understood (status 500)" in err


def test_a_change_whose_answer_is_lost_is_not_sent_again(
    server: StandIn, pki: Pki, capsys: pytest.CaptureFixture[str]
) -> None:
    def hang_up(request: object) -> object:
        raise ConnectionResetError

    server.answer("POST", "/v1/tokens", hang_up)
    with StandIn(pki) as second:
        token = server.token("operator", server.address, second.address)
        code, out, err = run(capsys, "token", "create", "--service", "web", "--token", token)
    assert (code, out) == (3, "") and "may or may not have been done" in err
    assert len(server.asked("POST", "/v1/tokens")) == 1 and not second.asked("POST", "/v1/tokens")


def test_login_stores_what_it_has_tried(
    server: StandIn, nothing_configured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "token"
    file.write_text(server.token())
    file.chmod(0o600)
    code, out, err = run(capsys, "login", "--token-file", str(file))
    assert (code, out) == (0, "") and "as mia, admin of team-reviews" in err and server.token() not in err
    assert load_context(nothing_configured) == Context(
        server.url, server.pki.bundle.roots[0].fingerprint, "mesh.local", server.token()
    )
    assert run(capsys, "get", "services", "-o", "name") == (0, "reviews\nweb\n", "")
    code, _, err = run(capsys, "logout")
    assert code == 0 and "logged out" in err and not nothing_configured.exists()
    code, _, err = run(capsys, "logout")
    assert code == 0 and "nobody is logged in" in err


def test_login_that_fails_leaves_the_context_alone(
    server: StandIn, nothing_configured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_context(nothing_configured, Context(server.url, token=server.token()))
    before = nothing_configured.read_bytes()
    server.answer("GET", "/v1/whoami", (401, error("token_revoked", "the token was revoked")))
    code, _, err = run(capsys, "login", "--token", server.token())
    assert code == 1 and "revoked" in err and nothing_configured.read_bytes() == before


def test_login_with_a_certificate(
    server: StandIn, pki: Pki, nothing_configured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cryptography import x509

    from certs.authority import LEAF_TTL, certificate_pem
    from certs.spiffe import SpiffeId

    def issue(request: tuple[str, str, dict[str, str], dict[str, str]]) -> object:
        csr = x509.load_pem_x509_csr(request[3]["csr"].encode())
        spiffe_id = SpiffeId.parse("spiffe://mesh.local/operator/mia/t1")
        leaf = pki.issuing.issue_to_key(csr.public_key(), spiffe_id, LEAF_TTL, pki.now)  # type: ignore[arg-type]
        return {
            "certificate": certificate_pem([leaf, *pki.issuing.chain]).decode(),
            "bundle": pki.bundle.pem.decode(),
        }

    server.answer("POST", "/v1/login", issue)
    code, _, err = run(capsys, "login", "--cert", "--token", server.token())
    assert code == 0 and "good for 23h" in err
    key = nothing_configured.parent / "operator" / "key.pem"
    assert key.stat().st_mode & 0o777 == 0o600 and server.token() not in nothing_configured.read_text()
    server.requests.clear()
    assert run(capsys, "get", "services", "-o", "name") == (0, "reviews\nweb\n", "")
    assert [(path, "authorization" in headers) for _, path, headers, _ in server.requests] == [("/v1/services", False)]
    assert run(capsys, "logout")[0] == 0
    assert not key.exists()


def test_watching_prints_changes_and_outlives_the_server(pki: Pki, capsys: pytest.CaptureFixture[str]) -> None:
    from control_plane.cli import listing
    from control_plane.cli.get import SERVICES as LISTING
    from control_plane.cli.remote import Remote
    from control_plane.cli.target import Asked, resolve

    rounds = iter([SERVICES, {"services": SERVICES["services"][:1]}, None, {"services": SERVICES["services"]}, "end"])

    def answer(request: object) -> object:
        found = next(rounds)
        if found == "end":
            raise KeyboardInterrupt
        return found

    class Scripted(Remote):
        def get(self, path: str, *args: object, **kwargs: object) -> object:
            found = answer(path)
            if found is None:
                raise self._unreachable([("x:1", "connection refused")])
            return found

    token = make_token("operator", "t", "s", ["x:1"], pki.bundle.roots[0].fingerprint, pki.trust_domain)
    remote = Scripted(resolve(Asked(token=token), {}))
    before, listing.WATCH_INTERVAL_S = listing.WATCH_INTERVAL_S, 0.0
    try:
        with pytest.raises(KeyboardInterrupt):
            listing.show(remote, LISTING, "name", watch=True)
    finally:
        listing.WATCH_INTERVAL_S = before
    out, err = capsys.readouterr()
    assert out == "reviews\nweb\n- web\n+ web\n"
    assert "cannot be reached" in err and "answers again" in err


def test_reading_a_slow_trickle_ends(pki: Pki, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that sends a byte now and then keeps nobody for ever."""
    from control_plane.cli.remote import Remote
    from control_plane.cli.target import Asked, resolve

    stop = threading.Event()

    class Trickle(StandIn):
        def _find(self, request: object) -> tuple[int, object]:
            status, data = super()._find(request)  # type: ignore[arg-type]
            if "services" in request[1]:  # type: ignore[index]
                stop.wait(5)
            return status, data

    with Trickle(pki) as server:
        began = time.monotonic()
        with Remote(resolve(Asked(token=server.token()), {}), timeout_s=0.3) as remote:
            from control_plane.cli.remote import Unreachable

            with pytest.raises(Unreachable, match="no answer in time"):
                remote.get("/v1/services")
        assert time.monotonic() - began < 3
        stop.set()


# check


def test_check_when_nothing_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check")
    assert (code, err) == (3, "")
    assert "✗ a control plane is known here" in out and "remedy  pillion up starts one" in out


def test_check_when_nothing_runs(pki: Pki, server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    token = server.token("operator", f"127.0.0.1:{closed_port()}")
    code, out, _ = run(capsys, "check", "--token", token)
    assert code == 3 and "connection refused" in out and "start it: pillion up" in out
    code, out, _ = run(capsys, "check", "-o", "json", "--token", token)
    report = json.loads(out)
    assert code == 3 and (report["ok"], report["reached"]) == (False, False)
    assert [each["ok"] for each in report["checks"] if each["category"] == "control plane"] == [False]


def test_check_shows_what_the_control_plane_found(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    checks = [
        {"category": "store", "name": "the store answers", "ok": True, "cause": "", "remedy": ""},
        {"category": "sidecars", "name": "all sidecars have the policy", "ok": False,
         "cause": "web (s1) rejected service/reviews", "remedy": "pillion get sidecars"},
    ]  # fmt: skip
    server.answer("GET", "/v1/check", {"ok": False, "checks": checks})
    code, out, _ = run(capsys, "check", "--url", server.url, "--token", server.token())
    assert code == 1
    assert "store\n  ✓ the store answers\n" in out
    assert "  ✗ all sidecars have the policy\n      cause   web (s1) rejected service/reviews\n" in out
    assert out.endswith("1 thing wrong, 1 warning\n")  # the token was a flag
    server.answer("GET", "/v1/check", {"ok": True, "checks": checks[:1]})
    assert run(capsys, "check", "--token", server.token())[0] == 0


def test_check_waits_until_all_is_well(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {"category": "store", "name": "the store answers", "ok": False, "cause": "gone", "remedy": "start it"}
    answers = iter([[bad], []])
    server.answer("GET", "/v1/check", lambda request: {"ok": True, "checks": next(answers)})
    code, out, err = run(capsys, "check", "--wait", "20", "--token", server.token())
    assert code == 0 and "waiting" in err and "the store answers" in err and out.endswith("all is well, 1 warning\n")


def test_check_sees_a_clock_that_is_off(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from control_plane.cli import check as module

    ahead = SimpleNamespace(time=lambda: time.time() + 300, monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr(module, "time", ahead)
    code, out, _ = run(capsys, "check", "--token", server.token())
    assert code == 1 and ("it is 5m ahead of it" in out or "it is 5m 1s ahead of it" in out)


def test_check_with_a_token_that_was_revoked(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer("GET", "/v1/whoami", (401, error("token_unknown", "the token was revoked", "log in again")))
    code, out, _ = run(capsys, "check", "--token", server.token())
    assert code == 1 and "✗ it takes our word for who we are" in out and "remedy  log in again" in out


def test_completion_of_services(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PILLION_TOKEN", server.token())
    monkeypatch.setenv("_PILLION_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "pillion describe service r")
    monkeypatch.setenv("COMP_CWORD", "3")
    with pytest.raises(SystemExit):
        main([])
    assert capsys.readouterr() == ("plain,reviews\n", "")
