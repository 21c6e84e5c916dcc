"""The operator API: the ASGI application behind the join and operator listener.

Takes each request through the same steps: who asks, may they, is it what the declaration says; then its handler, and an
answer of one form. Must not know what an operation does. Invariants: nothing that comes in reaches a handler
undecoded; no answer but those that are declared; an error of ours is 500 without its reason, and in the log.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from control_plane.state.access import Who, lacks_role
from control_plane.store.base import Conflict, StoreError

from . import operator_policy as policy
from . import operator_tokens as tokens
from . import operator_views as views
from .calling import Aside, Call, Shared, Watched
from .checks import check
from .http import ApiError, Receive, Scope, Send, header, of_store, read_json, read_query, send_error, send_json
from .joins import bundle_pem
from .openapi import document
from .operations import ANYBODY, OPERATIONS, Operation
from .operators import Proven, authenticate
from .replica import Replica
from .shapes import Shape, ShapeError, Text

log = logging.getLogger(__name__)

Json = Any
Handler = Callable[[Call], Awaitable[Json]]

NOBODY = Proven(Who("", ""), 0.0)
FAILURES = (401,)


async def _health(call: Call) -> Json:
    return {"ok": True}


async def _openapi(call: Call) -> Json:
    return document(call.replica.settings.version)


async def _ca(call: Call) -> Json:
    meta = call.replica.state.meta
    assert meta is not None
    return {"trust_domain": meta.trust_domain, "bundle": bundle_pem(call.replica)}


HANDLERS: Mapping[str, Handler] = {
    "health": _health,
    "openapi": _openapi,
    "ca": _ca,
    "join": tokens.join_mesh,
    "rejoin": tokens.rejoin_mesh,
    "login": tokens.log_in,
    "whoami": tokens.whoami,
    "tokens": tokens.tokens,
    "create_token": tokens.create_token,
    "delete_token": tokens.delete_token,
    "services": views.services,
    "service": views.service,
    "endpoints": views.endpoints,
    "sidecars": views.sidecars,
    "edges": views.edges,
    "certs": views.certs,
    "bans": tokens.bans,
    "ban": tokens.ban,
    "unban": tokens.unban,
    "rotate_cookies": tokens.rotate_cookies,
    "audit": views.audit,
    "replicas": views.replicas,
    "policy": policy.policy,
    "snapshot": policy.snapshot,
    "apply": policy.apply,
    "rollback": policy.rollback,
    "changes": policy.changes,
    "change": policy.change,
    "status": policy.status,
    "check": check,
}


def operator_app(replica: Replica, watched: Watched | None = None, aside: Aside = trio.to_thread.run_sync) -> Starlette:
    """The application. `watched`: the folder of policy files that this control plane follows."""
    shared = Shared(replica, watched=watched, aside=aside)
    routes: list[Route] = []
    for path in dict.fromkeys(each.path for each in OPERATIONS):
        verbs = {each.method: _Endpoint(each, shared) for each in OPERATIONS if each.path == path}
        routes.append(Route(path, _Verbs(verbs)))
    app = Starlette(routes=routes, exception_handlers={HTTPException: _plain_error})
    app.router.redirect_slashes = False
    return app


async def _plain_error(request: Request, error: Exception) -> Response:
    """What the router itself answers."""
    assert isinstance(error, HTTPException)
    told = ApiError(error.status_code, "not_found", f"there is no {request.url.path[:100]}", "GET /v1/openapi.json")
    return JSONResponse(told.to_json(), error.status_code)


class _Verbs:
    """One path: its operations by method."""

    def __init__(self, verbs: "Mapping[str, _Endpoint]") -> None:
        self._verbs = verbs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._verbs.get(scope["method"])
        if endpoint is not None:
            await endpoint(scope, receive, send)
            return
        allowed = ", ".join(self._verbs)
        error = ApiError(405, "method_not_allowed", f"{scope['path'][:100]} takes {allowed} only")
        await send_json(send, 405, error.to_json(), [(b"allow", allowed.encode())])


class _Endpoint:
    """One operation."""

    def __init__(self, operation: Operation, shared: Shared) -> None:
        self._operation, self._shared = operation, shared
        self._handler = HANDLERS[operation.name]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._answer(scope, receive)
        except ConnectionError:
            return  # the caller has gone
        except ApiError as error:
            await send_error(send, await self._slowed(error))
        except Conflict:
            text = "somebody else changed the same at the same time, nothing was changed"
            await send_error(send, ApiError(409, "conflict", text, "look, and try again"))
        except StoreError as error:
            await send_error(send, of_store(error))
        except Exception:
            log.exception("%s %s failed", self._operation.method, self._operation.path)
            text = "the control plane made a mistake; its log says more"
            await send_error(send, ApiError(500, "internal", text))
        else:
            await send_json(send, 200, answer)

    async def _slowed(self, error: ApiError) -> ApiError:
        if error.status in (401, 403):
            log.info("%s %s refused: %s: %.300s", self._operation.method, self._operation.path, error.code, error)
        if error.status in FAILURES:
            try:
                await self._shared.throttle.failed()
            except ApiError as crowded:
                return crowded
        return error

    async def _answer(self, scope: Scope, receive: Receive) -> Json:
        operation, replica = self._operation, self._shared.replica
        proven = NOBODY
        if operation.access != ANYBODY:
            proven = authenticate(replica, scope)
            refusal = lacks_role(proven.who, operation.access, f"{operation.method} {operation.path}")
            if refusal is not None:
                raise ApiError(403, "not_allowed", refusal)
        try:
            path = {name: _read_text(shape, scope["path_params"][name], name) for name, shape in
                    operation.parameters.items()}  # fmt: skip
        except ShapeError as error:
            raise ApiError(404, "not_found", f"there is no such thing: {error}") from None
        try:
            query = self._query(scope)
            body = await self._body(scope, receive)
        except ShapeError as error:
            raise ApiError(400, "invalid", str(error), "GET /v1/openapi.json says what may be asked") from None
        return await self._handler(Call(self._shared, proven.who, proven.expires, body, query, path))

    def _query(self, scope: Scope) -> dict[str, Any]:
        declared = self._operation.query
        given = read_query(scope, declared)
        return {
            name: _read_text(shape, given[name], name) if name in given else usual
            for name, (shape, usual) in declared.items()
        }

    async def _body(self, scope: Scope, receive: Receive) -> Any:
        shape = self._operation.body
        if shape is None:
            return None
        kind = b",".join(header(scope, b"content-type")).split(b";")[0].strip().lower()
        if kind != b"application/json":  # what a page of another site can make a browser send is anything but that
            raise ApiError(415, "unsupported_media_type", "the body must be application/json")
        return shape.decode(await read_json(receive, self._operation.bytes_max), "the body")


def _read_text(shape: Shape, text: str, name: str) -> Any:
    """A value of the path or the query. Raises ShapeError."""
    if isinstance(shape, Text):
        return shape.decode(text, name)
    try:
        value: Any = int(text) if text.isascii() and text.isdigit() and len(text) <= 16 else float(text)
    except ValueError:
        raise ShapeError(f"{name} must be a number") from None
    return shape.decode(value, name)
