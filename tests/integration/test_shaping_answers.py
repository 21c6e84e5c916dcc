"""What routes change or answer by themselves, as a client of HTTP/1.1, of HTTP/2 and of gRPC sees it: rewrites,
redirects, edits of headers, fixed responses, faults, canaries by header and cookie."""

from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from support.grpc_calls import call_channel
from support.mesh import Mesh, until

BOTH = pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/2"])
BODY = {"HTTP/1.1": b"y" * 100_000, "HTTP/2": b"y" * 10_000}  # httpcore hangs where a stream is reset while it sends
EDITS = {"set": {"x-set": "1", "x-twice": "1"}, "add": {"x-twice": "2"}, "remove": ["x-gone", "server"]}


class Stage:
    """One sidecar before one application, and a client of each version."""

    def __init__(self, mesh: Mesh) -> None:
        self.app = mesh.backend()
        self.web = mesh.sidecar("web", {"web": {}}, inbound=False)
        url = f"http://{self.web.outbound}"
        self.clients = {
            "HTTP/1.1": httpx.Client(base_url=url),
            "HTTP/2": httpx.Client(base_url=url, http1=False, http2=True),
        }
        self.routes: Any = None

    def policy(self, *routes: Any, **more: Any) -> None:
        if self.routes != (routes, more):
            self.routes = (routes, more)
            service = {"address": [str(self.app)], "tls": "plain", "routes": list(routes), **more}
            self.web.apply({"shop": service})
        self.app.clear()

    def ask(self, version: str, target: str = "/", method: str = "GET", **more: Any) -> httpx.Response:
        headers = httpx.Headers(more.pop("headers", None))
        headers["host"] = "shop"
        answer = self.clients[version].request(method, target, headers=headers, **more)
        assert answer.http_version == version
        return answer

    def seen(self, answer: httpx.Response) -> dict[str, Any]:
        assert answer.status_code == 200
        found: dict[str, Any] = answer.json()
        return found


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Mesh(tmp_path_factory.mktemp("answers")) as mesh:
        stage = Stage(mesh)
        yield stage
        for client in stage.clients.values():
            client.close()
        assert stage.web.crashes == 0
        until(lambda: stage.web.metric("pillion_requests_active") == 0)


@BOTH
def test_rewrites(stage: Stage, version: str) -> None:
    stage.policy(
        {"match": {"path": "/old/**"}, "rewrite": {"path": "/new/v2/**"}},
        {"match": {"path": "/root/**"}, "rewrite": {"path": "/**"}},
        {"match": {"path": "/one"}, "rewrite": {"path": "/other"}},
        {"match": {"path": "/host/**"}, "rewrite": {"host": "inner.example:8080"}},
    )
    for target, said in [
        ("/old", "/new/v2"), ("/old/", "/new/v2/"), ("/old/a%20b/c?d=/e&f", "/new/v2/a%20b/c?d=/e&f"),
        ("/root", "/"), ("/root/x?y", "/x?y"), ("/root//x.example/y", "/x.example/y"), ("/one?a=b", "/other?a=b"),
        ("/host/x", "/host/x"), ("/x/../old/y", "/new/v2/y"), ("/%6Fld/y", "/new/v2/y"),
    ]:  # fmt: skip
        seen = stage.seen(stage.ask(version, target))
        assert seen["target"] == said
        assert dict(seen["headers"])["host"] == ("inner.example:8080" if target.startswith("/host") else "shop")


@BOTH
def test_redirects(stage: Stage, version: str) -> None:
    stage.policy(
        {"match": {"path": "/away/**"}, "redirect": {"to": "https://shop.example:8443", "status": 308}},
        {"match": {"path": "/scheme/**"}, "redirect": {"to": "https://", "status": 301}},
        {"match": {"path": "/page"}, "redirect": {"to": "/other"}},
        {"match": {"path": "/query"}, "redirect": {"to": "/other?c=d"}},
        {"match": {"path": "/old/**"}, "redirect": {"to": "/new/**", "status": 307}},
        {"match": {"path": "/root/**"}, "redirect": {"to": "/**"}, "headers": {"response": {"set": {"x-set": "1"}}}},
    )
    for target, status, location in [
        ("/away/x?a=b", 308, "https://shop.example:8443/away/x?a=b"),
        ("/scheme/x?a", 301, "https://shop/scheme/x?a"),
        ("/page?a=b", 302, "/other?a=b"),
        ("/query?a=b", 302, "/other?c=d"),
        ("/old", 307, "/new"),
        ("/old/a/b?c", 307, "/new/a/b?c"),
        ("/root//evil.example/x", 302, "/evil.example/x"),
        ("/root/%0d%0aset-cookie:%20a=b", 400, None),
        ("/root/%5c%5cevil.example", 400, None),
    ]:
        answer = stage.ask(version, target)
        assert (answer.status_code, answer.headers.get("location")) == (status, location), target
        assert answer.content == b"" or status == 400
        assert (answer.headers.get("x-set") == "1") == (location == "/evil.example/x")
    assert not stage.app.requests


@BOTH
def test_edits_of_headers(stage: Stage, version: str) -> None:
    def script(conn: Any) -> None:
        while True:
            conn.take()
            conn.reply(200, b"", [("server", "secret"), ("x-gone", "1"), ("x-twice", "0"), ("x-set", "0")])

    stage.policy({"headers": {"request": EDITS, "response": EDITS}})
    usual, stage.app.script = stage.app.script, script
    stage.app.end_connections()
    try:
        answer = stage.ask(version, headers={"x-gone": "1", "X-Set": "0", "x-twice": "0"})
    finally:
        stage.app.script = usual
        stage.app.end_connections()
    assert answer.headers.get_list("x-twice") == ["1", "2"] and answer.headers["x-set"] == "1"
    assert "x-gone" not in answer.headers and "server" not in answer.headers
    (request,) = stage.app.requests
    assert request.all("x-twice") == [b"1", b"2"] and request.all("x-set") == [b"1"] and not request.all("x-gone")


@BOTH
def test_fixed_responses(stage: Stage, version: str) -> None:
    stage.policy(
        {"match": {"path": "/json"}, "respond": {"status": 200, "body": '{"a": "ü"}'},
         "headers": {"response": {"set": {"content-type": "application/json", "cache-control": "no-store"}}}},
        {"match": {"path": "/none"}, "respond": {"status": 204}},
        {"match": {"path": "/empty"}, "respond": {"status": 404}},
        {"respond": {"status": 503, "body": "closed\nfor today"},
         "headers": {"response": {"add": {"retry-after": "9"}}}},
    )  # fmt: skip
    answer = stage.ask(version, "/json")
    assert answer.json() == {"a": "ü"} and answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    answer = stage.ask(version, "/none")
    assert answer.status_code == 204 and not answer.content and "content-type" not in answer.headers
    answer = stage.ask(version, "/empty")
    assert answer.status_code == 404 and answer.headers["content-length"] == "0"
    for method in ("GET", "POST", "DELETE"):
        answer = stage.ask(version, "/x", method, content=BODY[version] if method == "POST" else None)
        assert (answer.status_code, answer.text) == (503, "closed\nfor today")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8" and answer.headers["retry-after"] == "9"
        assert "x-pillion-reason" not in answer.headers
    answer = stage.ask(version, "/x", "HEAD")
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (503, b"", "16")
    assert not stage.app.requests


def test_fixed_responses_and_redirects_to_a_grpc_caller(stage: Stage) -> None:
    stage.policy(
        {"match": {"grpc": {"service": "test.Gone"}}, "respond": {"status": 404, "body": "it has\nmoved"},
         "headers": {"response": {"set": {"x-where": "elsewhere"}}}},
        {"match": {"grpc": {"service": "test.Moved"}}, "redirect": {"to": "https://x.example"}},
        {"match": {"grpc": {"service": "test.Late"}},
         "fault": {"delay": {"fixed": "5s"}}, "timeout": {"total": "300ms"}},
        {"fault": {"abort": {"status": 429}}},
        ports={"grpc": {"port": 80, "protocol": "grpc"}},
    )  # fmt: skip
    for name, code, details in [
        ("Gone", grpc.StatusCode.UNIMPLEMENTED, "it has moved"),
        ("Moved", grpc.StatusCode.UNKNOWN, "302 Found"),
        ("Late", grpc.StatusCode.DEADLINE_EXCEEDED, "the service did not answer in time"),
        ("Other", grpc.StatusCode.UNAVAILABLE, "this fault was injected by policy"),
    ]:
        with call_channel(stage.web.outbound, "shop") as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/test.{name}/Do")(b"", timeout=10)
        assert (caught.value.code(), caught.value.details()) == (code, details)  # type: ignore[attr-defined]
        fields = dict(caught.value.initial_metadata() or ()) | dict(caught.value.trailing_metadata() or ())  # type: ignore[attr-defined]
        assert (fields.get("x-where") == "elsewhere") == (name == "Gone")
    stage.policy()


@BOTH
def test_faults_where_a_header_asks_for_them(stage: Stage, version: str) -> None:
    stage.policy(
        {"match": {"headers": {"x-chaos": {"present": True}}}, "retry": {"max_retries": 3, "when": [503, "5xx"]},
         "fault": {"delay": {"fixed": "50ms"}, "abort": {"status": 503}}},
        {},
        circuit_breaker={"consecutive_failures": 1},
    )  # fmt: skip
    before = stage.web.metric("pillion_retries_total", service="shop")
    for _ in range(3):
        answer = stage.ask(version, headers={"x-chaos": "1"})
        assert (answer.status_code, answer.headers["x-pillion-reason"]) == (503, "fault_injected")
        assert answer.elapsed.total_seconds() >= 0.05
        assert stage.ask(version).status_code == 200
    assert len(stage.app.requests) == 3 and stage.web.metric("pillion_retries_total", service="shop") == before


@BOTH
def test_a_delay_ends_with_the_total_time(stage: Stage, version: str) -> None:
    stage.policy({"fault": {"delay": {"fixed": "5s"}}, "timeout": {"total": "200ms"}})
    for body in (None, BODY[version]):
        answer = stage.ask(version, method="POST" if body else "GET", content=body)
        assert (answer.status_code, answer.headers["x-pillion-reason"]) == (504, "timeout_total")
        assert 0.2 <= answer.elapsed.total_seconds() < 2
    assert not stage.app.requests


@BOTH
def test_canaries_by_header_and_cookie(stage: Stage, version: str) -> None:
    stage.policy(
        {"match": {"cookies": {"canary": "always", "group": {"regex": "b[0-9]"}}}, "rewrite": {"path": "/cookies"}},
        {"match": {"cookies": {"seen": {"present": True}}}, "rewrite": {"path": "/seen"}},
        {"match": {"headers": {"x-beta": {"prefix": "y"}}}, "rewrite": {"path": "/header"}},
    )
    for headers, said in [
        ([("cookie", "canary=always; group=b7")], "/cookies"),
        ([("cookie", "canary=always"), ("x", "y"), ("cookie", 'a=b; group="b7"')], "/cookies"),
        ([("cookie", "canary=always; group=b77")], "/"),
        ([("cookie", "CANARY=always; group=b7")], "/"),
        ([("cookie", "canary=never; canary=always; group=b7")], "/cookies"),
        ([("cookie", "seen=")], "/seen"),
        ([("cookie", "unseen=1; x=seen")], "/"),
        ([("x-beta", "yes")], "/header"),
        ([("X-Beta", "no")], "/"),
        ([("x-beta", "no"), ("x-beta", "yes")], "/header"),
    ]:
        assert stage.seen(stage.ask(version, headers=headers))["target"] == said, headers


def test_the_command_line_knows_which_route_a_cookie_leads_to(stage: Stage) -> None:
    policy = stage.web.mesh.path / "cookies.yaml"
    policy.write_text(
        "version: 1\nservices:\n  web:\n  shop:\n    routes:\n"
        "      - {name: canary, match: {cookies: {canary: always}}, mirror: {service: web, percent: 5%}}\n"
    )
    for cookie, route in [("a=b; canary=always", "canary"), ("canary=never", "default")]:
        ask = ("policy", "can", "-f", str(policy), "web", "shop", "GET", "/", "--header", f"Cookie: {cookie}")
        code, said, _ = stage.web.mesh.run(*ask)
        assert code == 0 and f"route:  {route}" in said
    code, said, _ = stage.web.mesh.run("policy", "explain", "-f", str(policy), "shop", "--route", "canary")
    assert code == 0 and "cookie canary=always" in said and "{service: web, percent: 5%}" in said


def test_protected_headers_are_refused_all_at_once(stage: Stage) -> None:
    names = ["host", "Content-Length", "x-pillion-mirror", "x_forwarded_for", "traceparent", "connection"]
    policy = stage.web.mesh.path / "bad.yaml"
    edits = "".join(f"      - headers: {{request: {{set: {{{name}: x}}}}}}\n" for name in names)
    policy.write_text(f"version: 1\nservices:\n  web:\n    routes:\n{edits}")
    code, _, said = stage.web.mesh.run("policy", "check", str(policy))
    assert code == 2 and said.count("error[P0106]") == len(names)
    for number, name in enumerate(names):
        assert f'"{name}" cannot be edited' in said and f"bad.yaml:{5 + number}:" in said
