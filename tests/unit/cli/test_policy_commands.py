import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from control_plane.cli import main

POLICY = """\
version: 1
defaults:
  timeout: {total: 10s, try: 3s}
  authz: {default: deny}
services:
  web:
    calls:
      reviews: {port: api, local_port: 9101, timeout: {total: 5s, try: 2s}, retry: {max_retries: 0}}
  admin: {}
  reviews:
    ports: {api: {port: 8000}, raw: {port: 9000, protocol: tcp}}
    versions:
      v1: {labels: {version: "1"}}
      v2: {labels: {version: "2"}}
    authz:
      allow:
        - {from: [web], methods: [GET]}
        - {from: [admin]}
      deny:
        - {paths: [/private/**], message: not for anybody}
        - {headers: {x-tenant: blocked}}
    routes:
      - name: beta
        match: {headers: {x-beta: "1"}}
        to: v2
        authz: {deny: [{methods: [DELETE]}]}
      - name: canary
        to: {v1: 90, v2: 10}
        timeout: {try: 1s}
  open:
    mtls: permissive
    authz: {default: mesh}
  audited:
    authz: {mode: audit}
enforced:
  timeout: {total: {max: 30s}}
"""


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good policy as ./mesh.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PILLION_POLICY", raising=False)
    path = tmp_path / "mesh.yaml"
    path.write_text(POLICY)
    return path


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(["policy", *args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_check_good(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "check") == (0, "", "valid: 5 services in 1 file\n")
    code, out, err = run(capsys, "check", "-o", "json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["valid"] is True and report["problems"] == [] and report["revision"].startswith("sha256:")


def test_check_bad(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy.write_text(POLICY.replace("v2: 10", "v3: 10").replace("total: 10s", "total: 10"))
    code, out, err = run(capsys, "check", "mesh.yaml")
    assert (code, out) == (2, "")
    assert err == (
        "error[P0106]: `defaults.timeout.total` needs a unit\n"
        " --> mesh.yaml:3:20\n"
        "3 |   timeout: {total: 10, try: 3s}\n"
        "  |                    ^^\n"
        "  = help: write 10s or 10ms\n"
        "\n"
        'error[P0107]: unknown version "v3"\n'
        "  --> mesh.yaml:28:22\n"
        "28 |         to: {v1: 90, v3: 10}\n"
        "   |                      ^^ declared: v1, v2 (mesh.yaml:13)\n"
        '   = help: did you mean "v2"?\n'
        "\n"
        "2 errors\n"
    )
    code, out, err = run(capsys, "check", "-o", "json")
    report = json.loads(out)
    assert (code, err, report["valid"], report["revision"]) == (2, "", False, None)
    assert [problem["code"] for problem in report["problems"]] == ["P0106", "P0107"]


def test_check_warnings(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy.write_text("version: 1\nservices: {web: {limits: {connections: 9, requests: 1}}}\n")
    code, _, err = run(capsys, "check")
    assert code == 0 and err.startswith("warning[P0305]") and err.endswith("1 warning\nvalid: 1 service in 1 file\n")
    code, _, err = run(capsys, "check", "--strict")
    assert code == 2 and err.startswith("error[P0305]") and err.endswith("1 error\n")


def test_check_a_missing_file(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "check", "none.yaml")
    assert code == 2
    assert err.startswith("error[P0100]: cannot read the file: No such file or directory\n --> none.yaml\n")


def test_the_files_come_from_the_environment(
    policy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a.yaml").write_text("version: 1\nservices: {a: {}}\n")
    Path("b.yaml").write_text("version: 1\nservices: {b: {}}\n")
    monkeypatch.setenv("PILLION_POLICY", "a.yaml:b.yaml")
    assert run(capsys, "show", "-o", "name") == (0, "a\nb\n", "")
    assert run(capsys, "show", "-o", "name", "-f", "a.yaml") == (0, "a\n", "")


def test_show(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "show")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["SERVICE", "PORTS", "VERSIONS", "ROUTES", "MTLS", "AUTHORIZATION", "CALLS"]
    assert [line.split()[0] for line in lines[1:]] == ["admin", "audited", "open", "reviews", "web"]
    assert "api:8000/http,raw:9000/tcp  v1,v2     2       strict      2 allow, 2 deny" in lines[4]
    assert run(capsys, "show", "-o", "wide")[1].splitlines()[4].endswith("mesh.yaml:10")


def test_show_one(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "show", "reviews")
    assert out.startswith("reviews (mesh.yaml:10)\n")
    assert "canary  *         v1 90%, v2 10%  2 x 1s in 10s  mesh.yaml:27" in out


def test_show_data(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(run(capsys, "show", "-o", "json")[1])
    assert list(data) == ["format", "revision", "services", "origins"]
    assert yaml.safe_load(run(capsys, "show", "-o", "yaml")[1]) == data
    assert "*id" not in run(capsys, "show", "-o", "yaml")[1]
    assert json.loads(run(capsys, "show", "web", "-o", "json")[1])["calls"]["reviews"]["local_port"] == 9101


def test_show_of_a_bad_policy(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy.write_text("version: 1\nservices: {web: {x: 1}}\n")
    code, out, err = run(capsys, "show")
    assert (code, out) == (2, "") and "error[P0104]" in err


def test_unknown_names(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["show", "reviws"], ["explain", "reviws"], ["can", "web", "reviws", "GET", "/"]):
        code, out, err = run(capsys, *args)
        assert (code, out) == (2, "") and 'did you mean "reviews"?' in err
    code, _, err = run(capsys, "explain", "reviews", "--route", "canari")
    assert code == 2 and 'did you mean "canary"?' in err
    assert run(capsys, "can", "nobody", "reviews", "GET", "/")[0] == 2
    code, _, err = run(capsys, "can", "web", "reviews", "GET", "/", "--port", "9")
    assert code == 2 and "known: api (8000), raw (9000)" in err


def row(out: str, setting: str) -> list[str]:
    line = next(line for line in out.splitlines() if line.split("  ")[0] == setting)
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_explain(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "explain", "reviews", "--route", "canary")
    assert (code, err) == (0, "")
    assert out.startswith("reviews, route canary: * -> v1 90%, v2 10% (mesh.yaml:27)\n")
    assert row(out, "timeout.try") == [
        "timeout.try", "1s", "route", "mesh.yaml:29", "3s (defaults, mesh.yaml:3), none (built-in)",
    ]  # fmt: skip
    assert row(out, "timeout.connect") == ["timeout.connect", "5s", "built-in", "-"]
    assert row(out, "to") == ["to", "{v1: 90, v2: 10}", "route", "mesh.yaml:28"]
    assert row(out, "authz.default") == ["authz.default", "deny", "defaults", "mesh.yaml:4"]
    assert row(out, "authz.allow") == ["authz.allow", "from web GET", "service", "mesh.yaml:17"]


def test_explain_a_service(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "explain", "reviews")
    assert row(out, "timeout.try")[1:3] == ["3s", "defaults"]
    assert out.endswith("routes: beta, canary (--route NAME shows what each overrides)\n")


def test_explain_for_a_caller(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "explain", "reviews", "--route", "canary", "--caller", "web")
    assert row(out, "timeout.total") == [
        "timeout.total", "5s", "caller", "mesh.yaml:8", "10s (defaults, mesh.yaml:3), 15s (built-in)",
    ]  # fmt: skip
    assert row(out, "timeout.try")[1:3] == ["1s", "route"]  # 2s would loosen
    assert row(out, "retry.max_retries")[1:3] == ["0", "caller"]
    _, out, _ = run(capsys, "explain", "reviews", "--caller", "admin")
    assert row(out, "timeout.total")[1:3] == ["10s", "defaults"]


def test_explain_as_data(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(run(capsys, "explain", "reviews", "--route", "beta", "-o", "json")[1])
    assert data["settings"]["timeout.total"]["level"] == "defaults"
    assert [level["level"] for level in data["authz"]] == ["defaults", "service", "route"]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ("web reviews GET /reviews/7", 0, "services.reviews.authz.allow[0] mesh.yaml:17 canary"),
        ("web reviews POST /reviews/7", 1, "no allow rule matches mesh.yaml:15"),
        ("admin reviews POST /reviews/7", 0, "services.reviews.authz.allow[1]"),
        ("open reviews GET /", 1, "no allow rule matches"),
        ("admin reviews GET /private/x", 1, "services.reviews.authz.deny[0] mesh.yaml:20 not for anybody"),
        ("admin reviews GET /a/../private/x", 1, "services.reviews.authz.deny[0]"),
        ("admin reviews GET /%70rivate", 1, "services.reviews.authz.deny[0]"),
        ("admin reviews GET //private/x", 1, "services.reviews.authz.deny[0]"),
        ("admin reviews GET /a%2Fb", 1, "bad request (400): the path contains"),
        ("admin reviews GET /x --header X-Tenant:blocked", 1, "services.reviews.authz.deny[1]"),
        ("admin reviews DELETE /x", 0, "canary"),
        ("admin reviews DELETE /x --header x-beta:1", 1, "services.reviews.routes.beta.authz.deny[0] beta"),
        ("admin reviews --port raw", 1, "services.reviews.authz.deny[0]"),
        ("web web GET /", 1, "default deny of defaults mesh.yaml:4"),
        ("web open GET /", 0, "default mesh of service"),
        ("web open GET / --plain", 0, "default mesh of service"),
        ("web reviews GET / --plain", 1, "mtls is strict"),
        ("web audited GET /", 0, "audit: would refuse"),
        ("spiffe://mesh.local/service/web reviews GET /", 0, "services.reviews.authz.allow[0]"),
        ("spiffe://other.mesh/service/web reviews GET /", 1, "no allow rule matches"),
        ("web reviews GET / --trust-domain other.mesh", 0, "services.reviews.authz.allow[0]"),
    ],
)
def test_can(policy: Path, capsys: pytest.CaptureFixture[str], args: str, code: int, words: str) -> None:
    got, out, err = run(capsys, "can", *args.split())
    assert (got, err) == (code, "")
    assert out.startswith("allowed: " if code == 0 else "denied: ")
    said = " ".join(out.split())
    for word in words.split():
        assert word in said
    data = json.loads(run(capsys, "can", *args.split(), "-o", "json")[1])
    assert data["allowed"] is (code == 0)


def test_can_shows_every_rule(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "can", "web", "reviews", "POST", "/", "--trace")
    assert "services.reviews.authz.allow[1] does not name the caller (mesh.yaml:18)" in out


def test_can_needs_a_request_for_http(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "can", "web", "reviews")
    assert code == 2 and "METHOD and PATH are needed" in err
    code, _, err = run(capsys, "can", "web", "reviews", "GET", "/", "--header", "nonsense")
    assert code == 2 and "is not NAME:VALUE" in err


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "schema")
    assert (code, err) == (0, "")
    assert json.loads(out)["properties"]["version"]["type"] == "integer"


@pytest.mark.parametrize("args", [["check"], ["can", "web", "reviews", "GET", "/"], ["schema"], ["explain", "web"]])
def test_the_data_path_is_not_loaded(policy: Path, args: list[str]) -> None:
    """So that each verb starts at once."""
    script = (
        "import sys; from control_plane.cli import main; main(sys.argv[1:]); "
        "slow = {'trio', 'cryptography', 'httpx', 'rich', 'sidecar.proxy', 'sidecar.app'} & set(sys.modules); "
        "sys.exit(f'loaded: {slow}' if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script, "policy", *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_colour_where_it_is_not_a_terminal(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy.write_text("version: 2\n")
    assert "\x1b" not in run(capsys, "check")[2]


@pytest.mark.parametrize(("variable", "colour"), [("", True), ("1", False)])
def test_colour_on_a_terminal(
    policy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, variable: str, colour: bool
) -> None:
    policy.write_text("version: 2\n")
    monkeypatch.setenv("NO_COLOR", variable)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert ("\x1b" in run(capsys, "check")[2]) is colour
