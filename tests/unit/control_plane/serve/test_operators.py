"""Who may ask the operator API, over a store in memory."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.serialization import Encoding
from support.memory_store import MemoryStore
from support.operators import AUTHORITY, Api, csr, running_api

from certs.pem import read_blocks
from certs.svid import check_leaf, fingerprint, parse_certificate, validity_of
from certs.tokens import make_token, parse_token
from control_plane.serve.http import ApiError
from control_plane.serve.operations import ANYBODY, OPERATIONS
from control_plane.serve.throttle import DELAY_S_MAX, WAITING_MAX, Throttle

WEB = "spiffe://mesh.local/service/web"


@pytest.fixture
async def api() -> AsyncIterator[Api]:
    async with running_api(MemoryStore()) as api:
        yield api


async def whoami(api: Api, **asked: Any) -> tuple[int, str]:
    status, answer = await api.call("GET", "/v1/whoami", **asked)
    return status, answer["name"] if status == 200 else answer["error"]["code"]


async def test_by_a_token(api: Api) -> None:
    ana = await api.operator("ana", "operator", "team-a", "team-b")
    _, answer = await api.call("GET", "/v1/whoami", token=ana)
    assert (answer["name"], answer["role"], answer["teams"]) == ("ana", "operator", ["team-a", "team-b"])
    assert await whoami(api) == (401, "unauthenticated")
    assert await whoami(api, token=ana[:-1]) == (401, "token_damaged")
    assert await whoami(api, token="") == (401, "unauthenticated")
    assert await whoami(api, headers=((b"authorization", b"Basic YTpi"),)) == (401, "unauthenticated")
    twice = ((b"authorization", b"Bearer x"), (b"Authorization", f"Bearer {ana}".encode()))
    assert await whoami(api, headers=twice) == (401, "unauthenticated")
    assert await whoami(api, token=await api.token(kind="join", service="web")) == (403, "token_wrong_kind")
    root = AUTHORITY.bundle.roots[0].fingerprint
    forged = make_token("operator", parse_token(ana).id, "guess", ["h:1"], root, "mesh.local")
    assert await whoami(api, token=forged) == (401, "token_forged")
    api.clock.added += 3601
    assert await whoami(api, token=ana) == (401, "token_expired")


async def test_by_a_certificate_that_stands_for_the_token(api: Api) -> None:
    ana = await api.operator("ana", "operator", "team-a")
    id = parse_token(ana).id
    status, answer = await api.call("POST", "/v1/login", {"csr": csr()}, token=ana)
    assert status == 200 and answer["spiffe_id"] == f"spiffe://mesh.local/operator/ana/{id}"
    leaf = parse_certificate(read_blocks(answer["certificate"].encode(), 10**6, 8)[0].der)
    der = leaf.public_bytes(Encoding.DER)
    assert str(check_leaf(der, "mesh.local")) == answer["spiffe_id"]
    assert validity_of(leaf).not_after.timestamp() <= api.clock() + 3600, "not longer than the token"
    peer = api.peer(answer["spiffe_id"], fingerprint(der))
    assert await whoami(api, peer=peer) == (200, "ana")
    assert await whoami(api, peer=api.peer(f"spiffe://mesh.local/operator/bea/{id}", "0" * 64)) == (
        401,
        "token_unknown",
    )
    assert await whoami(api, peer=api.peer("spiffe://mesh.local/operator/ana", "0" * 64)) == (403, "not_an_operator")
    assert await whoami(api, peer=api.peer(WEB, "0" * 64)) == (403, "not_an_operator")
    assert await whoami(api, peer="By=x") == (401, "no_certificate")
    assert await whoami(api, peer=api.peer(WEB, "0" * 64), token=ana) == (200, "ana"), "the token says who"
    status, answer = await api.call(
        "POST", "/v1/bans", {"kind": "certificate", "value": fingerprint(der)}, token=api.admin
    )
    assert await whoami(api, peer=peer) == (403, "banned")
    await api.call("DELETE", f"/v1/bans/{answer['id']}", token=api.admin)
    assert await whoami(api, peer=peer) == (200, "ana")
    await api.call("DELETE", f"/v1/tokens/{id}", token=api.admin)
    assert await whoami(api, peer=peer) == (401, "token_unknown")


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.name)
async def test_nobody_gets_more_than_is_theirs(api: Api, operation: Any) -> None:
    path = operation.path.format(id="x", name="web", number=1)
    status, answer = await api.call(operation.method, path, {} if operation.body else None)
    if operation.access == ANYBODY:
        assert status in (200, 400)
        return
    assert (status, answer["error"]["code"]) == (401, "unauthenticated")
    viewer = await api.operator("vic", "viewer")
    status, _ = await api.call(operation.method, path, {} if operation.body else None, token=viewer)
    assert status != 401
    if operation.access != "viewer":
        assert status == 403
    if operation.method == "GET":
        assert status in (200, 404)


async def test_tokens_by_role(api: Api) -> None:
    ana = await api.operator("ana", "operator", "team-a")
    await api.apply("version: 1\nservices:\n  web: {owners: [team-a]}\n  other: {owners: [team-b]}\n")

    async def create(token: str, **body: Any) -> int:
        return (await api.call("POST", "/v1/tokens", {"ttl_s": 60, **body}, token=token))[0]

    assert await create(ana, kind="join", service="web") == 200
    assert await create(ana, kind="join", service="other") == 403
    assert await create(ana, kind="join", service="new") == 403
    assert await create(ana, kind="operator", operator="bea", role="viewer") == 403
    assert await create(api.admin, kind="operator", operator="bea", role="emperor") == 400
    assert await create(api.admin, kind="operator", operator="a/b", role="viewer") == 400
    assert await create(api.admin, kind="join", service="Web") == 400
    assert await create(api.admin, kind="join", service="web", ttl_s=0) == 400
    assert await create(api.admin, kind="join", service="web", uses=0) == 400
    _, tokens = await api.call("GET", "/v1/tokens", token=ana)
    mine = next(each["id"] for each in tokens["tokens"] if each["service"] == "web")
    admins = next(each["id"] for each in tokens["tokens"] if each["role"] == "admin")
    assert (await api.call("DELETE", f"/v1/tokens/{admins}", token=ana))[0] == 403
    assert (await api.call("DELETE", f"/v1/tokens/{mine}", token=ana))[0] == 200
    assert (await api.call("DELETE", f"/v1/tokens/{mine}", token=ana))[0] == 404
    assert (await api.call("DELETE", f"/v1/tokens/{parse_token(ana).id}", token=ana))[0] == 200
    assert await whoami(api, token=ana) == (401, "token_unknown")


async def test_bans(api: Api) -> None:
    async def ban(kind: str, value: str) -> tuple[int, Any]:
        return await api.call("POST", "/v1/bans", {"kind": kind, "value": value, "reason": "lost"}, token=api.admin)

    joined = await api.join("web")
    status, first = await ban("sidecar", joined["sidecar"])
    assert status == 200 and (await ban("sidecar", joined["sidecar"]))[1] == first
    _, bans = await api.call("GET", "/v1/bans", token=api.admin)
    (row,) = bans["bans"]
    assert (row["kind"], row["value"], row["by"], row["reason"]) == ("sidecar", joined["sidecar"], "admin", "lost")
    _, certs = await api.call("GET", "/v1/certs", token=api.admin)
    assert certs["certs"][0]["banned"] is True
    assert (await ban("sidecar", "nobody"))[0] == 404
    assert (await ban("identity", "web"))[0] == 400
    assert (await ban("identity", "spiffe://other.example/service/web"))[0] == 400
    assert (await ban("identity", "spiffe://mesh.local/service/pillion-control-plane"))[0] == 409
    assert (await ban("certificate", "AB" * 32))[0] == 400
    assert (await api.call("DELETE", f"/v1/bans/{row['id']}", token=api.admin))[0] == 200
    assert (await api.call("DELETE", f"/v1/bans/{row['id']}", token=api.admin))[0] == 404


async def test_what_a_browser_can_be_made_to_send(api: Api) -> None:
    for kind in (b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x", b""):
        status, answer = await api.call(
            "POST", "/v1/bans", {"kind": "sidecar", "value": "x"}, token=api.admin, content_type=kind
        )
        assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")


async def test_unknown_paths_and_methods(api: Api) -> None:
    for path in ("/", "/v1", "/v1/", "/v2/services", "/v1/services/", "/v1/services/a/b", "/healthz/"):
        status, answer = await api.call("GET", path, token=api.admin)
        assert status == 404 and answer["error"]["code"] == "not_found", path
    status, answer = await api.call("PUT", "/v1/tokens", token=api.admin)
    assert (status, answer["error"]["code"]) == (405, "method_not_allowed")
    assert api.replies[-1]["allow"] == "GET, POST"


async def test_a_body_that_is_too_large(api: Api) -> None:
    body = {"token": "x" * 70_000, "csr": "x", "service": "web"}
    status, answer = await api.call("POST", "/v1/join", body)
    assert (status, answer["error"]["code"]) == (413, "too_large")


async def test_an_error_of_ours_is_not_told(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise RuntimeError("a secret of ours")

    api.replica.join_addresses = broken  # type: ignore[assignment,method-assign]
    status, answer = await api.call(
        "POST", "/v1/tokens", {"kind": "join", "service": "web", "ttl_s": 9}, token=api.admin
    )
    assert (status, answer["error"]["code"]) == (500, "internal") and "secret" not in str(answer)
    assert "a secret of ours" in caplog.text


async def test_failures_are_slowed_and_good_ones_are_not(api: Api, autojump_clock: Any) -> None:
    async with trio.open_nursery() as nursery:
        began = trio.current_time()
        ends: list[float] = []

        async def fail() -> None:
            assert (await whoami(api))[0] == 401
            ends.append(trio.current_time() - began)

        for _ in range(50):
            nursery.start_soon(fail)
        await trio.testing.wait_all_tasks_blocked()
        assert await whoami(api, token=api.admin) == (200, "admin")
        assert trio.current_time() == began
    assert sorted(ends).count(0.0) == 20 and max(ends) == pytest.approx(DELAY_S_MAX)
    await trio.sleep(60)
    began = trio.current_time()
    assert (await whoami(api))[0] == 401 and trio.current_time() == began, "it is forgotten"


async def test_what_waits_is_bounded(autojump_clock: Any) -> None:
    throttle = Throttle(burst=0.0, per_s=0.0)
    async with trio.open_nursery() as nursery:
        for _ in range(WAITING_MAX):
            nursery.start_soon(throttle.failed)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ApiError) as caught:
            await throttle.failed()
        assert caught.value.status == 429
    assert throttle.waiting == 0
