"""The operator API, fuzzed from its own OpenAPI document: only declared statuses, only declared shapes, never a 500,
never a hang, whatever is sent."""

import json
from typing import Any

import jsonschema
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.memory_store import MemoryStore
from support.openapi_requests import Asked, operations, requests
from support.operators import AUTHORITY, Api, csr, running_api

from certs.authority import new_key
from control_plane.serve.openapi import document

DOCUMENT = document("0.1")
OPERATIONS = operations(DOCUMENT)
KEY = new_key()
POLICY = "version: 1\nservices:\n  web: {owners: [team-web], calls: {reviews: {}}}\n  reviews: {}\n"
SAMPLES: dict[str, Any] = {
    "service": ["web", "reviews", "nobody"],
    "name": ["web", "reviews", "nobody"],
    "csr": [csr(KEY)],
    "files/key": ["mesh.yaml"],
    "files/value": [POLICY, "version: 1\ndefaults: {timeout: {total: 3s}}\n", "version: 2\n", "- {", "\0"],
    "base": [0, 1, 3],
    "to": [0, 1, 2],
    "number": [1, 2],
    "kind": ["join", "operator", "sidecar", "identity", "certificate"],
    "value": ["spiffe://mesh.local/service/web", "a" * 64, "web-1"],
    "role": ["viewer", "operator", "admin"],
    "revision": [0, 1, 10],
}
QUICK = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@pytest.fixture(autouse=True)
def _no_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is applied is in force at once: there are hundreds of control planes to start."""
    monkeypatch.setattr("control_plane.serve.replica.QUIET_S", 0.0)


def check_answer(operation: Any, status: int, answer: Any, headers: dict[str, str]) -> None:
    declared = operation["responses"].get(str(status))
    assert declared is not None, (status, answer)
    if "$ref" in declared:
        declared = DOCUMENT["components"]["responses"]["Error"]
        schema: Any = DOCUMENT["components"]["schemas"]["Error"]
        assert answer["error"]["message"], answer
    else:
        schema = declared["content"]["application/json"]["schema"]
    assert headers["content-type"] == "application/json"
    jsonschema.validate(answer, schema, jsonschema.Draft202012Validator)
    assert status != 401 or "www-authenticate" in headers
    assert status not in (429, 503) or "retry-after" in headers


async def prepared(api: Api) -> dict[str, Any]:
    """Things that are there to be found."""
    await api.apply(POLICY)
    token = await api.token(kind="join", service="web", uses=None)
    body = {"token": token, "csr": csr(KEY), "service": "web"}
    _, joined = await api.call("POST", "/v1/join", body)
    await api.call("POST", "/v1/bans", {"kind": "certificate", "value": "a" * 64}, token=api.admin)
    _, tokens = await api.call("GET", "/v1/tokens", token=api.admin)
    _, bans = await api.call("GET", "/v1/bans", token=api.admin)
    ids = [each["id"] for each in (*tokens["tokens"], *bans["bans"])]
    return {"token": token, "certificate": joined["certificate"], "sidecar": joined["sidecar"], "ids": ids}


def placed(asked: Asked, found: dict[str, Any]) -> Asked:
    """With what is there now in the place of what stands for it."""
    body = asked.body
    if isinstance(body, dict):
        body = dict(body)
        for key in ("token", "certificate"):
            if isinstance(body.get(key), str) and len(body[key]) % 2 == 0:
                body[key] = found[key]
        if body.get("value") == "web-1":
            body["value"] = found["sidecar"]
    path = asked.path.replace("/nobody", f"/{found['ids'][0]}").replace("/web", f"/{found['ids'][-1]}")
    return Asked(asked.method, path if "/tokens/" in path or "/bans/" in path else asked.path, body, asked.has_body)


@pytest.mark.parametrize(
    ("method", "path", "operation"), OPERATIONS, ids=[each[2]["operationId"] for each in OPERATIONS]
)
def test_whatever_is_asked(method: str, path: str, operation: Any) -> None:
    samples = SAMPLES | {"id": ["nobody", "web"], "token": ["", "pil_j_x"], "certificate": ["x", "xx"]}

    @QUICK
    @given(st.lists(requests(method, path, operation, samples), min_size=1, max_size=8))
    def fuzz(all_asked: list[Asked]) -> None:
        async def run() -> None:
            with trio.fail_after(60):
                async with running_api(MemoryStore(), AUTHORITY) as api:
                    found = await prepared(api)
                    for asked in all_asked:
                        one = placed(asked, found)
                        with trio.fail_after(10):
                            body = one.body if one.has_body else None
                            raw = json.dumps(body).encode() if one.has_body else None
                            status, answer = await api.call(one.method, one.path, raw=raw, body=body, token=api.admin)
                        if status in (401, 403) and api.admin and "tokens" in path:
                            return  # it has revoked its own token
                        check_answer(operation, status, answer, api.replies[-1])

        trio.run(run)

    fuzz()


@QUICK
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "X"]),
    path=st.sampled_from([each[1] for each in OPERATIONS]) | st.text(max_size=30).map(lambda text: "/" + text),
    raw=st.binary(max_size=60)
    | st.sampled_from(
        [b"[" * 100_000, b'{"a":NaN}', b'"\\ud800"', b'{"csr":"\\udfff"}', b"1" * 10_000, b'{"a":1,"a":2}']
    ),
    kind=st.sampled_from([b"application/json", b"application/json; charset=utf-8", b"text/plain", b""]),
    token=st.none() | st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), max_size=40),
    peer=st.none() | st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), max_size=40),
)
def test_nonsense_is_answered(method: str, path: str, raw: bytes, kind: bytes, token: Any, peer: Any) -> None:
    async def run() -> None:
        async with running_api(MemoryStore(), AUTHORITY) as api:
            with trio.fail_after(10):
                status, answer = await api.call(method, path, raw=raw, content_type=kind, token=token, peer=peer)
            if status != 200:
                assert 400 <= status < 500, answer
                jsonschema.validate(answer, DOCUMENT["components"]["schemas"]["Error"], jsonschema.Draft202012Validator)

    trio.run(run)


def test_the_document_says_what_it_is() -> None:
    assert DOCUMENT["openapi"] == "3.1.0"
    names = [each[2]["operationId"] for each in OPERATIONS]
    assert len(set(names)) == len(names)
    for _, path, operation in OPERATIONS:
        assert path.startswith("/v1/") or path == "/healthz"
        for response in operation["responses"].values():
            schema = response.get("content", {}).get("application/json", {}).get("schema", {})
            jsonschema.Draft202012Validator.check_schema(schema)
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
        jsonschema.Draft202012Validator.check_schema(body)
