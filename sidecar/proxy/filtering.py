"""Runs filters' hooks: the plan's side of the plug-in contract.

A Chain holds the filters of one route and side, with each hook in a tuple of its own, so that a hook nobody overrides
costs nothing. A synchronous hook runs in the reactor and is timed; an asynchronous one runs in a task of its own with a
time limit, while the request waits. Must not know which filters exist or how they were loaded.
Invariants: a hook that raises ends its own request at most, as its `on_error` says, with the traceback in the log;
Cancelled is never swallowed; `active` counts the requests that use the chain.
"""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from sidecar.api import AsyncFilter, Connection, FilterBase, FilterContext, Reply, Request, Response, overrides
from sidecar.telemetry.catalogue import ServiceMeters
from sidecar.wire.http1 import Message

if TYPE_CHECKING:
    from .serving import Serving


class _Mark:
    """A result that is not a Reply."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


PENDING = _Mark("PENDING")
"""An asynchronous hook is under way; the answer comes by `Serving.filtered` or `response_filtered`."""

FAILED = _Mark("FAILED")
"""A hook whose filter fails closed has raised."""

Verdict = Reply | _Mark | None


@dataclass(frozen=True, slots=True)
class Link:
    """One filter in its place."""

    filter: FilterBase
    name: str
    closed: bool  # what to do when a hook raises
    context: FilterContext


@dataclass(frozen=True, slots=True)
class _Hook:
    call: Callable[..., Any]
    link: Link
    waits: bool
    limit_s: float
    gives: type  # what it may return beside None


class Chain:
    """The filters of one route on one side, in order; responses pass them in reverse."""

    def __init__(self, links: Sequence[Link], meters: ServiceMeters, note: Callable[[str, str], None]) -> None:
        self.links = tuple(links)
        self.meters, self.note = meters, note
        self.active = 0  # requests that use it
        self.on_request = self._hooks("on_request")
        self.on_response = tuple(reversed(self._hooks("on_response")))
        self.on_request_data = self._hooks("on_request_data")
        self.on_response_data = tuple(reversed(self._hooks("on_response_data")))
        self.on_connection = self._hooks("on_connection")

    @property
    def has_body_hooks(self) -> bool:
        return bool(self.on_request_data or self.on_response_data)

    def _hooks(self, name: str) -> tuple[_Hook, ...]:
        hooks = []
        for link in self.links:
            kind = type(link.filter)
            if overrides(kind, name):
                waits = isinstance(link.filter, AsyncFilter) and name in ("on_request", "on_response")
                limit_s = link.filter.timeout_s if waits and isinstance(link.filter, AsyncFilter) else kind.budget_s
                gives = bytes if name.endswith("_data") else str if name == "on_connection" else Reply
                hooks.append(_Hook(getattr(link.filter, name), link, waits, limit_s, gives))
        return tuple(hooks)

    # -- hooks

    def connection(self, connection: Connection) -> str | None:
        """Why a connection must be closed, or None."""
        for hook in self.on_connection:
            refusal = self._call(hook, connection)
            if refusal is FAILED:
                return f"filter {hook.link.name} failed"
            if refusal is not None:
                return f"filter {hook.link.name}: {refusal}"
        return None

    def request(self, serving: "Serving") -> Verdict:
        """Run the request hooks, up to the first that waits."""
        self.active += 1
        serving.request_view = view = _view(serving)
        for index, hook in enumerate(self.on_request):
            if hook.waits:
                serving.filter_scope = scope = trio.CancelScope()
                serving.world.errand(self._request_rest, serving, index, scope)
                return PENDING
            reply = self._call(hook, view)
            if reply is not None:
                return reply  # type: ignore[no-any-return]
        return None

    async def _request_rest(self, serving: "Serving", index: int, scope: trio.CancelScope) -> None:
        world = serving.world
        with scope:
            reply = await self._run_all(self.on_request[index:], (serving.request_view,))
        serving.filter_scope = None
        if not scope.cancelled_caught:
            world.reactor.call(serving.filtered, reply)

    def response(self, serving: "Serving", m: Message) -> Verdict:
        """Run the response hooks, up to the first that waits."""
        view = serving.request_view
        if view is None:
            self.active += 1
            serving.request_view = view = _view(serving)
        response = Response(m)
        for index, hook in enumerate(self.on_response):
            if hook.waits:
                serving.filter_scope = scope = trio.CancelScope()
                serving.world.errand(self._response_rest, serving, response, index, scope)
                return PENDING
            reply = self._call(hook, view, response)
            if reply is not None:
                return reply  # type: ignore[no-any-return]
        return None

    async def _response_rest(self, serving: "Serving", response: Response, index: int, scope: trio.CancelScope) -> None:
        world = serving.world
        with scope:
            reply = await self._run_all(self.on_response[index:], (serving.request_view, response))
        serving.filter_scope = None
        if not scope.cancelled_caught:
            world.reactor.call(serving.response_filtered, reply)

    async def _run_all(self, hooks: Sequence[_Hook], arguments: tuple[Any, ...]) -> Verdict:
        for hook in hooks:
            reply = await self._wait(hook, *arguments) if hook.waits else self._call(hook, *arguments)
            if reply is not None:
                return reply  # type: ignore[no-any-return]
        return None

    def request_data(self, serving: "Serving", data: bytes, end: bool) -> bytes | None:
        """What goes on in place of these bytes; None: a filter that fails closed has raised."""
        return self._data(self.on_request_data, serving, data, end)

    def response_data(self, serving: "Serving", data: bytes, end: bool) -> bytes | None:
        return self._data(self.on_response_data, serving, data, end)

    def _data(self, hooks: tuple[_Hook, ...], serving: "Serving", data: bytes, end: bool) -> bytes | None:
        if not data and not end:
            return data
        if serving.request_view is None:
            self.active += 1
            serving.request_view = _view(serving)
        for hook in hooks:
            result = self._call(hook, serving.request_view, data, end)
            if result is FAILED:
                return None
            if result is not None:
                data = result
        return data

    def reframe_request(self, m: Message) -> None:
        """The body's length is no longer known once a filter may change it."""
        if self.on_request_data and (m.length or m.chunked):
            m.length, m.chunked = None, True

    def reframe_response(self, m: Message) -> None:
        if self.on_response_data:
            m.length = None

    # -- one hook

    def _call(self, hook: _Hook, *arguments: Any) -> Any:
        clock = hook.link.context.clock
        began = clock()
        try:
            result = hook.call(*arguments)
            if result is not None and not isinstance(result, hook.gives):
                raise TypeError(f"{hook.call.__name__} gave {type(result).__name__}, not {hook.gives.__name__}")
        except Exception:
            return self._raised(hook)
        if clock() - began > hook.limit_s:
            took_s = clock() - began
            name = hook.link.name
            self.meters.filter_overruns.inc(name)
            self.note(
                f"overrun {name}",
                f"filter {name}: {hook.call.__name__} took {took_s * 1e3:.1f} ms, over its budget of "
                f"{hook.limit_s * 1e3:.1f} ms; it holds up all traffic of this sidecar",
            )
        return result

    async def _wait(self, hook: _Hook, *arguments: Any) -> Any:
        try:
            with trio.fail_after(hook.limit_s):
                result = await hook.call(*arguments)
            if result is not None and not isinstance(result, Reply):
                raise TypeError(f"{hook.call.__name__} gave {type(result).__name__}, not Reply")
            return result
        except trio.TooSlowError:
            name = hook.link.name
            self.meters.filter_errors.inc(name)
            self.note(f"filter {name}", f"filter {name}: {hook.call.__name__} took longer than {hook.limit_s:g} s")
            return FAILED if hook.link.closed else None
        except Exception:
            return self._raised(hook)

    def _raised(self, hook: _Hook) -> _Mark | None:
        name = hook.link.name
        self.meters.filter_errors.inc(name)
        what = "the request is refused" if hook.link.closed else "going on without it"
        self.note(f"filter {name}", f"filter {name}: {hook.call.__name__} raised; {what}\n{traceback.format_exc()}")
        return FAILED if hook.link.closed else None


def _view(serving: "Serving") -> Request:
    plan = serving.plan
    assert plan is not None
    down = serving.down
    request_id = serving.request_id()
    return Request(
        serving.m,
        caller=down.peer,
        caller_service=serving.entry.caller_service,
        address=down.address,
        service=plan.service,
        route=plan.name,
        version=serving.subset.name if serving.subset is not None else "",
        trace_id=request_id,
        request_id=request_id,
    )
