"""The operator API over the embedded store: what operators do, from a token to a rollback."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from support.operators import Api, csr, running_api

from control_plane.serve.hub import Stream
from control_plane.state.records import CHANGES, REPLICAS, SERVICES, Document, encode
from control_plane.store.base import Put
from control_plane.store.open import open_store

MESH = """\
version: 1
defaults:
  timeout: {total: 10s}
services:
  # the front door
  web:
    owners: [team-web]
    ports: {http: {port: 8000}}
    calls: {reviews: {}}
  reviews:
    owners: [team-reviews]
    ports: {api: {port: 9000}}
    versions:
      v1: {labels: {version: "1"}}
"""


@asynccontextmanager
async def opened(path: Path, **more: Any) -> AsyncIterator[Api]:
    async with trio.open_nursery() as nursery:
        store = await open_store("embedded", nursery, state_dir=path)
        async with running_api(store, threads=True, **more) as api:
            yield api
        await store.aclose()


def only(reviews: str) -> str:
    return f"version: 1\nservices:\n  reviews:\n    owners: [team-reviews]\n{reviews}"


async def test_from_a_policy_to_its_rollback(tmp_path: Path) -> None:
    async with opened(tmp_path) as api:
        status, planned = await api.apply(MESH, dry_run=True)
        assert status == 200 and planned["change"] is None and planned["dry_run"]
        assert [each["document"] for each in planned["diff"]] == ["defaults", "services/reviews", "services/web"]
        assert (await api.call("GET", "/v1/policy", token=api.admin))[1]["documents"] == []

        status, done = await api.apply(MESH, base=planned["revision"], message="the first one")
        assert status == 200 and done["change"] == 1 and done["diff"] == planned["diff"]
        status, again = await api.apply(MESH)
        assert status == 200 and again["change"] is None and again["diff"] == []
        assert again["revision"] <= done["revision"]

        _, policy = await api.call("GET", "/v1/policy", token=api.admin)
        by_name = {each["name"]: each for each in policy["documents"]}
        assert by_name["services/web"]["text"].startswith("  # the front door\n  web:\n")
        assert (by_name["services/web"]["file"], by_name["services/web"]["author"]) == ("mesh.yaml", "admin")

        status, service = await api.call("GET", "/v1/services/reviews", token=api.admin)
        assert status == 200
        assert [each["service"] for each in service["callers"]] == ["web"]
        assert service["document"]["change"] == 1
        total = next(each for each in service["policy"] if each["key"] == "timeout.total")
        assert total == {
            "key": "timeout.total",
            "value": "10s",
            "level": "defaults",
            "source": "mesh.yaml:3",
            "overrode": [{"value": "15s", "level": "built-in", "source": ""}],
        }

        assert (await api.apply(only("    timeout: {total: 5s}\n")))[1]["change"] == 2
        status, back = await api.call("POST", "/v1/policy/rollback", {"to": 1, "message": "oops"}, token=api.admin)
        assert status == 200 and back["change"] == 3
        assert [each["document"] for each in back["diff"]] == ["services/reviews"]
        _, history = await api.call("GET", "/v1/policy/changes", token=api.admin)
        told = [(each["change"], each["source"], each["message"], each["documents"]) for each in history["changes"]]
        assert told == [
            (1, "apply", "the first one", ["defaults", "services/reviews", "services/web"]),
            (2, "apply", "", ["services/reviews"]),
            (3, "rollback", "oops", ["services/reviews"]),
        ]
        _, change = await api.call("GET", "/v1/policy/changes/2", token=api.admin)
        assert "5s" in change["after"]["services/reviews"]["text"]
        assert "5s" not in change["before"]["services/reviews"]["text"]
        status, answer = await api.call("POST", "/v1/policy/rollback", {"to": 9}, token=api.admin)
        assert status == 404 and "no change 9" in answer["error"]["message"]
        assert (await api.call("GET", "/v1/policy/changes/9", token=api.admin))[0] == 404

        _, audit = await api.call("GET", "/v1/audit?limit=2", token=api.admin)
        assert [(each["who"], each["action"]) for each in audit["audit"]] == [
            ("admin", "apply policy"),
            ("admin", "rollback to change 1"),
        ]


async def test_a_policy_that_is_not_valid_changes_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as api:
        status, answer = await api.apply("version: 1\nservices:\n  web: {routes: [{to: v9}]}\n")
        error = answer["error"]
        assert (status, error["code"]) == (422, "policy_invalid")
        (problem,) = [each for each in error["details"]["problems"] if each["severity"] == "error"]
        assert (problem["file"], problem["line"]) == ("mesh.yaml", 3) and "v9" in problem["message"]
        assert "mesh.yaml" in error["details"]["texts"]
        assert (await api.call("GET", "/v1/policy", token=api.admin))[1]["documents"] == []


async def test_two_who_change_the_same_at_the_same_time(tmp_path: Path) -> None:
    async with opened(tmp_path) as api:
        _, first = await api.apply(MESH)
        base = first["revision"]
        assert (await api.apply(only("    timeout: {total: 5s}\n"), base=base))[0] == 200
        status, answer = await api.apply(only("    timeout: {total: 6s}\n"), base=base)
        error = answer["error"]
        assert (status, error["code"]) == (409, "conflict")
        (clash,) = error["details"]["documents"]
        assert clash["document"] == "services/reviews" and clash["author"] == "admin" and clash["change"] == 2
        assert "6s" in clash["yours"] and "5s" in clash["theirs"]
        # Another document at the same base is no conflict.
        text = "version: 1\nservices:\n  web:\n    owners: [team-web]\n    timeout: {total: 7s}\n"
        assert (await api.apply(text, base=base))[0] == 200


async def test_many_at_once_are_applied_one_after_the_other(tmp_path: Path) -> None:
    async with opened(tmp_path) as api:
        found: list[Any] = []

        async def apply(number: int) -> None:
            found.append(await api.apply(f"version: 1\nservices:\n  s{number}: {{}}\n"))

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(apply, number)
        assert all(status == 200 for status, _ in found), found
        assert sorted(answer["change"] for _, answer in found) == list(range(1, 9))
        _, services = await api.call("GET", "/v1/services", token=api.admin)
        assert [each["name"] for each in services["services"]] == [f"s{number}" for number in range(8)]


async def test_another_replica_that_was_quicker_is_seen(tmp_path: Path) -> None:
    """A commit that runs into one that our state does not know yet is planned again."""
    async with opened(tmp_path) as api:
        await api.apply(MESH)
        replica = api.replica
        commit, tries = replica.commit, 0

        async def late(operations: Any, compares: Any = ()) -> int:
            nonlocal tries
            tries += 1
            if tries == 1:
                from control_plane.state.records import Change, change_key

                document = Document("mesh.yaml", 5, "  other: {}\n", "bea", replica.now(), 2)
                change = Change("bea", replica.now(), "", {"services/other": None}, {"services/other": document})
                await replica.store.commit(
                    [Put(change_key(2), encode(change)), Put(SERVICES + "other", encode(document))]
                )
            return await commit(operations, compares)

        replica.commit = late  # type: ignore[method-assign]
        status, answer = await api.apply(only("    timeout: {total: 5s}\n"))
        assert status == 200 and answer["change"] == 3 and tries >= 2
        assert sorted(replica.state.table(CHANGES)) == ["0000000001", "0000000002", "0000000003"]


async def test_who_may_apply_what(tmp_path: Path) -> None:
    async with opened(tmp_path) as api:
        await api.apply(MESH)
        viewer = await api.operator("vic", "viewer", "team-reviews")
        ana = await api.operator("ana", "operator", "team-reviews")

        async def refused(text: str, token: str, **more: Any) -> str:
            status, answer = await api.apply(text, token, **more)
            assert (status, answer["error"]["code"]) == (403, "not_allowed"), answer
            return str(answer["error"]["message"])

        good = only("    timeout: {total: 5s}\n")
        assert "needs an operator" in await refused(good, viewer)
        assert (await api.apply(good, viewer, dry_run=True))[0] == 200
        assert (await api.apply(good, ana))[0] == 200
        assert "owned by team-web" in await refused("version: 1\nservices:\n  web: {owners: [team-web]}\n", ana)
        changed = "version: 1\nservices:\n  reviews: {owners: [team-reviews, team-web]}\n"
        assert "owners of reviews change" in await refused(changed, ana)
        assert "nobody owns it" in await refused("version: 1\nservices:\n  new: {owners: [team-reviews]}\n", ana)
        assert "every service" in await refused("version: 1\ndefaults: {timeout: {total: 1s}}\n", ana)
        assert "every service" in await refused("version: 1\nenforced: {mtls: strict}\n", ana)
        assert "owned by team-web" in await refused(good, ana, prune=True)
        assert "owned by team-web" in await refused(good, ana, prune=True, dry_run=True)
        status, _ = await api.call("POST", "/v1/policy/rollback", {"to": 0}, token=ana)
        assert status == 403
        assert (await api.call("POST", "/v1/policy/rollback", {"to": 1}, token=ana))[0] == 200


class Folder:
    def file_of(self, document: str) -> str | None:
        return "policy/web.yaml" if document == "services/web" else None


async def test_what_a_watched_folder_names_is_changed_there(tmp_path: Path) -> None:
    async with opened(tmp_path, watched=Folder()) as api:
        status, answer = await api.apply(MESH)
        assert (status, answer["error"]["code"]) == (409, "watched_folder")
        assert "policy/web.yaml" in answer["error"]["message"]
        assert (await api.apply("version: 1\nservices:\n  reviews: {}\n"))[0] == 200


async def test_what_the_folder_of_another_replica_brings_is_changed_there(tmp_path: Path) -> None:
    async with opened(tmp_path) as api:
        replica = api.replica
        document = Document("web.yaml", 3, "  web: {}\n", "folder:/etc/policy", replica.now(), 1)
        await replica.commit([Put(SERVICES + "web", encode(document))])
        assert (await api.apply(MESH, dry_run=True))[0] == 200, "nobody follows that folder any more"
        other = replace(replica.state.get(REPLICAS, "r1"), folder="/etc/policy")
        await replica.commit([Put(REPLICAS + "r2", encode(other))])
        status, answer = await api.apply(MESH)
        assert (status, answer["error"]["code"]) == (409, "watched_folder")
        assert "/etc/policy/web.yaml" in answer["error"]["message"]


async def connect(api: Api, service: str) -> Stream:
    joined = await api.join(service)
    replica = api.replica
    stream = Stream(joined["sidecar"], service, "0.1", False, set(), {}, replica.now(), trio.current_time())
    replica.hub.open(stream)
    return stream


async def test_the_status_waits_for_every_sidecar(tmp_path: Path) -> None:
    async with opened(tmp_path) as api:
        web, reviews = await connect(api, "web"), await connect(api, "reviews")
        _, done = await api.apply(MESH)
        path = f"/v1/policy/status?revision={done['revision']}"
        _, status = await api.call("GET", path, token=api.admin)
        assert (status["connected"], status["accepted"], len(status["waiting"])) == (2, 0, 2)
        answers: list[Any] = []

        async def wait() -> None:
            answers.append(await api.call("GET", f"{path}&wait_s=20", token=api.admin))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(0.05)
            web.policy = done["revision"]
            reviews.policy, reviews.rejected = done["revision"], {"service/reviews": "no such filter"}
        (code, status) = answers[0]
        assert code == 200
        assert (status["connected"], status["accepted"], status["waiting"]) == (2, 1, [])
        assert status["rejected"] == [
            {"sidecar": reviews.id, "service": "reviews", "resources": {"service/reviews": "no such filter"}}
        ]
        _, sidecars = await api.call("GET", "/v1/sidecars", token=api.admin)
        assert {each["id"]: (each["connected"], each["current"]) for each in sidecars["sidecars"]} == {
            web.id: (True, True),
            reviews.id: (True, False),
        }
        with trio.fail_after(5):
            _, status = await api.call("GET", f"/v1/policy/status?revision={10**9}&wait_s=0.1", token=api.admin)
        assert len(status["waiting"]) == 2


async def test_a_large_policy_holds_nobody_up(tmp_path: Path) -> None:
    async with opened(tmp_path) as api:
        text = "version: 1\nservices:\n" + "".join(
            f"  s{number}: {{timeout: {{total: 5s}}}}\n" for number in range(400)
        )
        longest = 0.0

        async def beat() -> None:
            nonlocal longest
            while True:
                began = trio.current_time()
                await trio.sleep(0.01)
                longest = max(longest, trio.current_time() - began)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(beat)
            status, answer = await api.apply(text)
            assert status == 200, answer
            nursery.cancel_scope.cancel()
        assert len(answer["diff"]) == 400
        assert longest < 2.0


@pytest.mark.parametrize("kind", ["join", "operator"])
async def test_a_secret_is_told_once(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    from certs.tokens import parse_token

    async with opened(tmp_path) as api:
        text = await (api.token(kind="join", service="web") if kind == "join" else api.operator("ana", "viewer"))
        secret = parse_token(text).secret
        if kind == "join":
            await api.call("POST", "/v1/join", {"token": text, "csr": csr(), "service": "web"})
        else:
            await api.call("GET", "/v1/whoami", token=text)
        for path in ("/v1/tokens", "/v1/audit", "/v1/certs", "/v1/check"):
            _, answer = await api.call("GET", path, token=api.admin)
            assert secret not in str(answer)
        assert secret not in caplog.text
        assert secret.encode() not in b"".join(
            entry.value for entry in (await api.replica.store.read()).entries.values()
        )
