"""`pillion policy apply` and its kin, `explain`, `can` and `describe`, towards a scripted control plane."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.pki import Pki
from support.standin_operator import StandIn, error

from control_plane.cli import main
from sidecar.model.canonical import snapshot_to_json
from sidecar.model.load import load_policy, load_texts
from sidecar.model.problems import problem_to_json, render

POLICY = """\
version: 1
services:
  reviews:
    ports: {api: {port: 8000}}
    authz: {default: deny, allow: [{from: [web], methods: [GET]}]}
  web:
    calls: {reviews: {}}
"""


@pytest.fixture(scope="module")
def pki() -> Pki:
    return Pki()


@pytest.fixture
def server(pki: Pki, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PILLION_POLICY", raising=False)
    monkeypatch.delenv("PILLION_URL", raising=False)
    monkeypatch.setenv("PILLION_CONTEXT", str(tmp_path / "none"))
    (tmp_path / "mesh.yaml").write_text(POLICY)
    with StandIn(pki) as server:
        monkeypatch.setenv("PILLION_TOKEN", server.token())
        yield server


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(list(args))
    out, err = capsys.readouterr()
    return code, out, err


DIFF = [{"document": "services/reviews", "before": "  reviews: {}\n", "after": "  reviews:\n    ports: {}\n"}]


def planned(request: Any) -> dict[str, Any]:
    dry = request[3]["dry_run"]
    return {"change": None if dry else 7, "revision": 130 if dry else 131, "diff": DIFF, "problems": [], "dry_run": dry}


def status(**more: Any) -> dict[str, Any]:
    return {"revision": 131, "connected": 2, "accepted": 2, "rejected": [], "waiting": []} | more


def test_apply_shows_its_diff_and_that_all_have_accepted(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer("POST", "/v1/policy/apply", planned)
    server.answer("GET", "/v1/policy/status", status())
    code, out, err = run(capsys, "policy", "apply", "-m", "ports")
    assert (code, out) == (0, "")
    assert err == (
        "--- services/reviews, applied\n+++ services/reviews, yours\n@@ -1 +1,2 @@\n-  reviews: {}\n+  reviews:\n"
        "+    ports: {}\n\n"
        "change 7: 1 changed\n"
        "accepted by all 2 sidecars\n"
    )
    dry, real = server.asked("POST", "/v1/policy/apply")
    body = {"files": {"mesh.yaml": POLICY}, "prune": False, "message": "ports"}
    assert dry == body | {"base": None, "dry_run": True}
    assert real == body | {"base": 130, "dry_run": False}  # what was shown is what is done, or a conflict


def test_a_dry_run_changes_nothing(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer("POST", "/v1/policy/apply", planned)
    code, _, err = run(capsys, "policy", "apply", "--dry-run", "--prune", "-f", "mesh.yaml")
    assert code == 0 and "dry run, nothing was applied: 1 changed" in err
    (body,) = server.asked("POST", "/v1/policy/apply")
    assert body["dry_run"] and body["prune"]


def test_nothing_to_change(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer("POST", "/v1/policy/apply", lambda request: planned(request) | {"diff": []})
    code, _, err = run(capsys, "policy", "apply")
    assert code == 0 and "nothing to change" in err and len(server.asked("POST", "/v1/policy/apply")) == 1


def test_who_rejected_it_and_who_has_not_answered(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer("POST", "/v1/policy/apply", planned)
    rejected = [{"sidecar": "s1", "service": "web", "resources": {"service/web": "filter my.f:F is not allowed here"}}]
    waiting = [{"sidecar": "s2", "service": "reviews"}]
    server.answer("GET", "/v1/policy/status", status(connected=3, accepted=1, rejected=rejected, waiting=waiting))
    code, out, err = run(capsys, "policy", "apply", "--timeout", "0.2", "-o", "json")
    assert code == 1
    assert "accepted by 1 of 3 sidecars\nrejected by web (s1):\n  service/web  filter my.f:F is not allowed" in err
    assert "no answer from reviews (s2)\n" in err and "pillion policy rollback" in err
    assert json.loads(out)["status"]["waiting"] == waiting


def test_not_waiting(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer("POST", "/v1/policy/apply", planned)
    assert run(capsys, "policy", "apply", "--no-wait")[0] == 0
    assert not server.asked("GET", "/v1/policy/status")


def test_an_invalid_policy_is_shown_as_check_shows_it(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mesh.yaml").write_text(POLICY.replace("calls: {reviews: {}}", "calls: {revews: {}}"))
    loaded = load_policy([Path("mesh.yaml")])
    details = {"problems": [problem_to_json(each) for each in loaded.problems], "texts": {}}
    server.answer("POST", "/v1/policy/apply", (422, error("policy_invalid", "not valid", "", details)))
    code, out, err = run(capsys, "policy", "apply")
    by_check = run(capsys, "policy", "check")
    assert (code, out, err) == by_check
    assert render(loaded.problems, loaded.texts).rstrip() in err and code == 2


def test_a_file_that_cannot_be_read_is_not_sent(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "policy", "apply", "-f", "absent.yaml")
    assert code == 2 and "error[P0100]" in err and not server.requests


def test_a_conflict_is_a_diff_of_theirs_against_ours(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    clash = {
        "document": "services/reviews",
        "base": "a\n",
        "theirs": "b\n",
        "yours": "c\n",
        "author": "jo",
        "change": 6,
    }
    server.answer(
        "POST", "/v1/policy/apply", (409, error("conflict", "changed meanwhile", "merge it", {"documents": [clash]}))
    )
    code, _, err = run(capsys, "policy", "apply", "--base", "120")
    assert code == 4
    assert "--- services/reviews, theirs (change 6 by jo)\n+++ services/reviews, yours\n@@ -1 +1 @@\n-b\n+c\n" in err
    assert err.endswith("Error: changed meanwhile\n  help: merge it\n")
    assert server.asked("POST", "/v1/policy/apply")[0]["base"] == 120


def test_what_is_not_allowed_is_listed(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    refusals = {"defaults": "defaults needs an admin", "services/web": "web is of another team"}
    told = error("not_allowed", "; ".join(refusals.values()), "", {"documents": refusals})
    server.answer("POST", "/v1/policy/apply", (403, told))
    code, _, err = run(capsys, "policy", "apply")
    assert code == 1 and err.endswith("nothing was changed:\n  defaults needs an admin\n  web is of another team\n")


def test_a_policy_that_is_too_large_is_not_sent(
    server: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "policies"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.yaml").write_text("#" * 3_000_000)
    code, _, err = run(capsys, "policy", "apply", "-f", str(folder))
    assert code == 2 and "apply them in parts" in err and not server.requests


def test_apply_from_stdin(server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import io

    server.answer("POST", "/v1/policy/apply", planned)
    monkeypatch.setattr("sys.stdin", io.StringIO(POLICY))
    assert run(capsys, "policy", "apply", "-f", "-", "--dry-run")[0] == 0
    assert server.asked("POST", "/v1/policy/apply")[0]["files"] == {"stdin": POLICY}


def test_rollback(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer("POST", "/v1/policy/rollback", planned)
    server.answer("GET", "/v1/policy/status", status(connected=0, accepted=0))
    code, _, err = run(capsys, "policy", "rollback", "3", "-m", "oops")
    assert code == 0 and "+++ services/reviews, as after change 3" in err and "no sidecar is connected" in err
    assert server.asked("POST", "/v1/policy/rollback") == [{"to": 3, "message": "oops", "dry_run": False}]


def document(text: str, change: int = 1, name: str = "services/web") -> dict[str, Any]:
    return {"name": name, "file": "mesh.yaml", "line": 3, "text": text, "change": change, "author": "mia",
            "applied": 0.0, "whole": False}  # fmt: skip


def with_history(server: StandIn) -> None:
    before, after = document("  web: {}\n"), document("  web:\n    mtls: strict\n", 2)
    changes = [
        {
            "change": number,
            "author": "mia",
            "at": 1000.0,
            "message": "why",
            "source": "apply",
            "documents": ["services/web"],
        }
        for number in (1, 2)
    ]
    server.answer("GET", "/v1/policy/changes", {"changes": changes})
    one = {"before": {"services/web": None}, "after": {"services/web": before}}
    two = {"before": {"services/web": before}, "after": {"services/web": after}}
    server.answer("GET", "/v1/policy/changes/1", changes[0] | one)
    server.answer("GET", "/v1/policy/changes/2", changes[1] | two)


def test_history(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    with_history(server)
    code, out, _ = run(capsys, "policy", "history")
    assert code == 0 and out.splitlines()[0].split() == ["CHANGE", "WHEN", "AUTHOR", "BY", "DOCUMENTS", "MESSAGE"]
    assert "mia" in out.splitlines()[1]


@pytest.mark.parametrize(
    ("args", "code", "shows"),
    [
        (("1", "2"), 1, "-  web: {}\n+  web:\n+    mtls: strict\n"),
        (("1",), 1, "+++ services/web, applied now"),
        (("2", "1"), 1, "-  web:\n-    mtls: strict\n+  web: {}\n"),
        (("0", "2"), 1, "--- (nothing)\n"),
        (("2",), 0, ""),
    ],
)
def test_diff_between_changes(
    server: StandIn, args: tuple[str, ...], code: int, shows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with_history(server)
    found, out, _ = run(capsys, "policy", "diff", *args)
    assert found == code and shows in out


def test_diff_of_files(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer("POST", "/v1/policy/apply", planned)
    code, out, err = run(capsys, "policy", "diff")
    assert code == 1 and "+    ports: {}\n" in out and err == ""
    assert server.asked("POST", "/v1/policy/apply")[0]["dry_run"] is True
    assert run(capsys, "policy", "diff", "1", "-f", "mesh.yaml")[0] == 2
    with_history(server)
    assert run(capsys, "policy", "diff", "9")[0] == 2


def test_get_prints_a_policy_again(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [document("  web:\n    mtls: strict\n"), document("defaults:\n  mtls: strict\n", 1, "defaults")]
    server.answer("GET", "/v1/policy", {"revision": 9, "documents": documents})
    code, out, err = run(capsys, "policy", "get")
    assert code == 0 and load_texts({"x": out}).snapshot is not None and "--base 9" in err
    code, out, _ = run(capsys, "policy", "get", "web", "-o", "name")
    assert (code, out) == (0, "services/web\n")
    code, out, err = run(capsys, "policy", "get", "wep")
    assert (code, out) == (1, "") and 'did you mean "web"?' in err


def test_explain_and_can_ask_the_control_plane(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = load_texts({"mesh.yaml": POLICY}).snapshot
    assert snapshot is not None
    server.answer("GET", "/v1/policy/snapshot", snapshot_to_json(snapshot))
    for args in (
        ("can", "web", "reviews", "GET", "/x"),
        ("can", "web", "reviews", "POST", "/x"),
        ("explain", "reviews"),
    ):
        remote = run(capsys, *args)
        assert remote == run(capsys, "policy", *args)
        assert remote == run(capsys, *args, "-f", "mesh.yaml")
    assert len(server.asked("GET", "/v1/policy/snapshot")) == 3  # with -f nobody is asked
    server.answer("GET", "/v1/policy/snapshot", {"format": 99})
    code, _, err = run(capsys, "explain", "reviews")
    assert code == 1 and "is its version newer than this one's?" in err


DESCRIBED = {
    "name": "reviews", "revision": 5, "mtls": "strict", "owners": ["team-reviews"], "problem": None,
    "concurrency": "8 at a time, 100 wait up to 1s; vip > default",
    "ports": [{"name": "api", "number": 8000, "protocol": "http"}],
    "versions": [
        {"name": "v1", "labels": {"version": "1"}, "endpoints": 1}, {"name": "v2", "labels": {}, "endpoints": 0},
    ],
    "endpoints": [
        {"service": "reviews", "address": "10.0.0.1:15006", "sidecar": "s1", "version": "v1", "labels": {"a": "1"},
         "weight": 1, "state": "up", "healthy": False, "reason": "GET /healthz: 503",
         "breakers": [{"caller": "web", "state": "open"}], "certificate_not_after": 4e9,
         "evidence": [{"caller": "web", "text": "12:00 breaker open for 1.2 s: 7 consecutive failures"}]},
    ],
    "routes": [
        {"name": "default", "match": "*", "to": "every endpoint", "tries": "2 x none in 15s", "source": "built-in"},
    ],
    "policy": [{"key": "timeout.total", "value": "10s", "level": "defaults", "source": "mesh.yaml:3",
                "overrode": [{"value": "15s", "level": "built-in", "source": ""}]}],
    "document": {"file": "mesh.yaml", "line": 12, "author": "mia", "applied": 1.0, "change": 4},
    "callers": [{"service": "web", "requests_per_s": 10.0, "failures_per_s": 1.0}], "callees": [],
}  # fmt: skip


def test_describe_a_service(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer("GET", "/v1/services/reviews", DESCRIBED)
    code, out, err = run(capsys, "describe", "service", "reviews")
    assert (code, err) == (0, "")
    for shown in (
        "reviews\n  ports        api:8000/http\n",
        "  concurrency  8 at a time, 100 wait up to 1s; vip > default\n",
        "0 of 1 healthy",
        "mesh.yaml:12, change 4 by mia, ",
        "10.0.0.1:15006  v1       unhealthy  open for web",
        "GET /healthz: 503",
        "  10.0.0.1:15006  web     12:00 breaker open for 1.2 s: 7 consecutive failures",
        "  web     10.0        1.0         90.0%",
        "  timeout.total  10s    defaults  mesh.yaml:3  15s (built-in)",
    ):
        assert shown in out
    assert "Callees" not in out and "\x1b" not in out
    assert json.loads(run(capsys, "describe", "service", "reviews", "-o", "json")[1]) == DESCRIBED


def test_describe_what_is_not_there(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer("GET", "/v1/services", {"services": [{"name": "reviews"}]})
    server.answer("GET", "/v1/services/revews", (404, error("unknown_service", 'there is no service "revews"')))
    code, out, err = run(capsys, "describe", "service", "revews")
    assert (code, out) == (1, "") and 'did you mean "reviews"?' in err


def test_a_token_alone_is_on_stdout(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer("POST", "/v1/tokens", {"id": "t9", "token": "pil_j_abc", "expires": 4e9})
    code, out, err = run(capsys, "token", "create", "--service", "web", "--uses", "any", "--ttl", "10m")
    assert (code, out) == (0, "pil_j_abc\n") and "t9" in err and "any number of sidecars" in err
    run(capsys, "token", "create", "--operator", "jo", "--role", "operator", "--team", "a", "--team", "b")
    assert server.asked("POST", "/v1/tokens") == [
        {"kind": "join", "service": "web", "uses": None, "ttl_s": 600},
        {"kind": "operator", "operator": "jo", "role": "operator", "teams": ["a", "b"], "ttl_s": 30 * 86400},
    ]


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("--service", "a", "--operator", "b"),
        ("--service", "a", "--role", "admin"),
        ("--service", "a", "--uses", "0"),
        ("--service", "a", "--ttl", "5"),
        ("--operator", "a"),
        ("--operator", "a", "--role", "king"),
        ("--operator", "a", "--role", "admin", "--uses", "2"),
    ],
)
def test_tokens_that_make_no_sense(server: StandIn, args: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "token", "create", *args)
    assert (code, out) == (2, "") and not server.requests


def test_bans(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    held = [{"id": "b1", "kind": "sidecar", "value": "s1", "by": "mia", "at": 0.0, "reason": ""}]
    server.answer("GET", "/v1/bans", {"bans": held})
    server.answer("POST", "/v1/bans", {"id": "b2"})
    server.answer("DELETE", "/v1/bans/b1", {})
    for subject in ("s1", "AB" * 32, "spiffe://mesh.local/service/web"):
        assert run(capsys, "cert", "ban", subject, "--reason", "lost")[0] == 0
    assert [(each["kind"], each["value"]) for each in server.asked("POST", "/v1/bans")] == [
        ("sidecar", "s1"),
        ("certificate", "ab" * 32),
        ("identity", "spiffe://mesh.local/service/web"),
    ]
    for subject in ("s1", "b1"):
        assert run(capsys, "cert", "unban", subject)[0] == 0
    assert run(capsys, "cert", "unban", "nobody", "b1")[0] == 1
    assert "s1" in run(capsys, "cert", "bans")[1]
