"""A replica with its operator API, called without sockets.

    async with running_api(MemoryStore()) as api:
        status, answer = await api.call("GET", "/v1/services", token=api.admin)

`peer` is what our listener says of a client's certificate: `api.peer(spiffe_id, fingerprint)`.
"""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import trio

from certs.authority import bundle_of, create_root, new_key
from certs.client import new_csr
from certs.files import CaFiles
from control_plane.serve.admission import admit
from control_plane.serve.minting import first_admin_token
from control_plane.serve.operator_api import operator_app
from control_plane.serve.replica import Replica, ReplicaSettings
from control_plane.store.base import Store

NOW = datetime(2026, 1, 1, tzinfo=UTC)
EPOCH = NOW.timestamp()


def make_authority(trust_domain: str = "mesh.local", now: datetime = NOW) -> CaFiles:
    root = create_root(trust_domain, now)
    return CaFiles(trust_domain, root.certificate, root.issue_authority(now), bundle_of(root))


AUTHORITY = make_authority()


def csr(key: Any = None) -> str:
    return new_csr(key or new_key()).decode()


@dataclass
class Api:
    replica: Replica
    app: Any
    admin: str
    clock: "Clock"
    replies: list[dict[str, str]] = field(default_factory=list)  # headers of each answer

    def peer(self, spiffe_id: str, fingerprint: str) -> str:
        return f"By=spiffe://mesh.local/service/pillion-control-plane;Hash={fingerprint};URI={spiffe_id}"

    async def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        token: str | None = None,
        peer: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        raw: bytes | None = None,
        content_type: bytes = b"application/json",
    ) -> tuple[int, Any]:
        """The status and the decoded body."""
        content = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        told = [(b"host", b"join.pillion-control-plane.mesh"), *headers]
        if content or body is not None:
            told.append((b"content-type", content_type))
        if token is not None:
            told.append((b"authorization", f"Bearer {token}".encode()))
        if peer is not None:
            told.append((b"x-forwarded-client-cert", peer.encode()))
        where, _, query = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "https",
            "path": where,
            "raw_path": where.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": told,
            "server": ("join", 443),
            "client": ("unix", 0),
        }
        pending = [{"type": "http.request", "body": content, "more_body": False}]
        sent: list[Any] = []

        async def receive() -> Any:
            if pending:
                return pending.pop(0)
            await trio.sleep_forever()

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        assert sent and sent[0]["type"] == "http.response.start", sent
        reply = b"".join(each.get("body", b"") for each in sent[1:])
        self.replies.append({key.decode(): value.decode() for key, value in sent[0]["headers"]})
        return sent[0]["status"], json.loads(reply) if reply else None

    async def token(self, **body: Any) -> str:
        status, answer = await self.call("POST", "/v1/tokens", {"ttl_s": 3600, **body}, token=self.admin)
        assert status == 200, answer
        return str(answer["token"])

    async def operator(self, name: str, role: str, *teams: str) -> str:
        return await self.token(kind="operator", operator=name, role=role, teams=list(teams))

    async def join(self, service: str = "web", key: Any = None, **more: Any) -> dict[str, Any]:
        token = await self.token(kind="join", service=service)
        body = {"token": token, "csr": csr(key), "service": service, **more}
        status, answer = await self.call("POST", "/v1/join", body)
        assert status == 200, answer
        return dict(answer)

    async def apply(self, text: str, token: str | None = None, **more: Any) -> tuple[int, Any]:
        body = {"files": {"mesh.yaml": text}, **more}
        return await self.call("POST", "/v1/policy/apply", body, token=token or self.admin)


class Clock:
    """The time of day of a replica: trio's, from a fixed beginning, and what a test adds."""

    def __init__(self, start: float = EPOCH) -> None:
        self.start, self.added = start, 0.0

    def __call__(self) -> float:
        return self.start + trio.current_time() - self.began + self.added

    began = 0.0


async def _at_once(work: Callable[[], Any]) -> Any:
    await trio.lowlevel.checkpoint()
    return work()


@asynccontextmanager
async def running_api(
    store: Store,
    authority: CaFiles = AUTHORITY,
    name: str = "r1",
    leaf_ttl: timedelta = timedelta(hours=24),
    rejoin_grace: timedelta = timedelta(days=7),
    watched: Any = None,
    threads: bool = False,
) -> AsyncIterator[Api]:
    """Without threads, a test may run on virtual time."""
    clock = Clock()
    clock.began = trio.current_time()
    await admit(store, authority, name, clock(), "m1")
    settings = ReplicaSettings(
        name, "127.0.0.1:15010", "127.0.0.1:15011", "0.1", leaf_ttl=leaf_ttl, rejoin_grace=rejoin_grace
    )
    replica = Replica(store, authority, settings, epoch=clock)
    await replica.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(replica.run)
        admin = await first_admin_token(replica)
        aside: Any = trio.to_thread.run_sync if threads else _at_once
        yield Api(replica, operator_app(replica, watched, aside), admin, clock)
        nursery.cancel_scope.cancel()
