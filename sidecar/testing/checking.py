"""`check_filter`: a filter is put through its whole life, with ordinary and with odd traffic.

It finds what types cannot say: settings that are ignored, work in the constructor, hooks that block, raise, return the
wrong thing or leave a head that must not be forwarded, and a close that fails after half an open. Every finding is an
AssertionError that says which hook, for which traffic, and what to do.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import trio
import trio.testing

from sidecar.api import (
    HOOKS,
    AsyncFilter,
    ConfigError,
    Connection,
    FilterBase,
    FilterContext,
    Reply,
    Request,
    Response,
    overrides,
)
from sidecar.api.headers import checked_value

from .making import make_context, make_request, make_response

_TIMED_CALLS = 5
_BLOCKING = {
    "open": "opens a file",
    "socket.connect": "connects a socket",
    "socket.bind": "binds a socket",
    "socket.getaddrinfo": "resolves a name",
    "subprocess.Popen": "starts a process",
    "os.system": "starts a process",
    "time.sleep": "sleeps",
}
_UNKNOWN_KEY = "no-such-setting"


def check_filter(
    cls: type[FilterBase], config: Mapping[str, object] | None = None, *, context: FilterContext | None = None
) -> None:
    """Raises AssertionError where the filter breaks its contract. From an asynchronous test use `acheck_filter`."""
    trio.run(_run, cls, config, context, clock=trio.testing.MockClock(autojump_threshold=0))


async def acheck_filter(
    cls: type[FilterBase], config: Mapping[str, object] | None = None, *, context: FilterContext | None = None
) -> None:
    """As `check_filter`, in a Trio program; waits take as long as its clock says."""
    await _run(cls, config, context)


async def _run(cls: type[FilterBase], config: Mapping[str, object] | None, context: FilterContext | None) -> None:
    _check_class(cls)
    name = cls.__name__
    make = _check_settings(cls, dict(config or {}))
    await _check_half_open(cls, make())
    await _close(make(), f"{name}.aclose without open")
    filter_ = make()
    side = "out" if cls.side == "out" else "in"
    try:
        await filter_.open(context if context is not None else make_context(side=side))
    except Exception as error:
        await _close(filter_, f"{name}.aclose after a failed open")
        raise AssertionError(f"{name}.open raised {error!r}; with these settings it should succeed") from error
    assert hasattr(filter_, "context"), f"{name}.open must call `await super().open(context)`"
    try:
        await _check_hooks(filter_)
    finally:
        await _close(filter_, f"{name}.aclose")


def _check_class(cls: type[FilterBase]) -> None:
    name = getattr(cls, "__name__", repr(cls))
    assert isinstance(cls, type) and issubclass(cls, FilterBase), (
        f"{name} must be a class that derives from sidecar.api.Filter or sidecar.api.AsyncFilter"
    )
    assert cls.side in ("in", "out", "both"), f'{name}.side must be "in", "out" or "both", not {cls.side!r}'
    assert cls.on_error in ("closed", "open"), f'{name}.on_error must be "closed" or "open", not {cls.on_error!r}'
    known = {*dir(AsyncFilter), *HOOKS}
    for attribute in vars(cls):
        assert not attribute.startswith("on_") or attribute in known, (
            f"{name}.{attribute} is never called; the hooks are {', '.join(HOOKS)}"
        )


def _check_settings(cls: type[FilterBase], config: dict[str, object]) -> Callable[[], FilterBase]:
    name = cls.__name__
    try:
        settings = cls.decode(config)
    except ConfigError as error:
        raise AssertionError(f"{name}.decode refuses the settings given to check_filter: {error}") from error
    try:
        cls.decode({**config, _UNKNOWN_KEY: 1})
    except ConfigError:
        pass
    except Exception as error:
        raise AssertionError(f"{name}.decode must raise ConfigError for an unknown key, not {error!r}") from error
    else:
        raise AssertionError(
            f"{name}.decode ignores unknown keys, so a misspelt setting would go unnoticed; use sidecar.api.decode"
        )

    def make() -> FilterBase:
        with _watched(f"{name}.__init__", "move it into `open`"):
            return cls(settings)

    return make


async def _check_half_open(cls: type[FilterBase], filter_: FilterBase) -> None:
    """Everything that `open` may ask of its context fails; closing must not."""

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("check_filter lets everything fail while a filter opens")

    side = "out" if cls.side == "out" else "in"
    try:
        await filter_.open(FilterContext("reviews", side, broken, broken, broken, broken, broken, broken))
    except Exception:
        await _close(filter_, f"{cls.__name__}.aclose after an open that failed half-way")
    else:
        await _close(filter_, f"{cls.__name__}.aclose")


async def _close(filter_: FilterBase, what: str) -> None:
    try:
        await filter_.aclose()
    except Exception as error:
        raise AssertionError(f"{what} raised {error!r}; it must not raise, whatever was opened before") from error


async def _check_hooks(filter_: FilterBase) -> None:
    cls = type(filter_)
    if overrides(cls, "on_connection"):
        for what, connection in _connections():
            verdict = _timed(filter_, "on_connection", what, connection)
            assert verdict is None or isinstance(verdict, str), (
                f"{cls.__name__}.on_connection returned {verdict!r}; None goes on, a text closes the connection"
            )
    for what, make in _requests():
        if overrides(cls, "on_request"):
            await _head_hook(filter_, "on_request", what, lambda make=make: (make(),))  # type: ignore[misc]
        if overrides(cls, "on_request_data"):
            _body_hook(filter_, "on_request_data", what, make)
        for told, respond in _responses():
            both = f"{what}, {told}"
            if overrides(cls, "on_response"):
                await _head_hook(filter_, "on_response", both, lambda m=make, r=respond: (m(), r()))  # type: ignore[misc]
        if overrides(cls, "on_response_data"):
            _body_hook(filter_, "on_response_data", what, make)


async def _head_hook(filter_: FilterBase, hook: str, what: str, make: Callable[[], tuple[Any, ...]]) -> None:
    name = f"{type(filter_).__name__}.{hook}"
    views = make()
    if hook == "on_response":  # a real request has been through on_request before
        await _quietly(filter_, views[0])
    if isinstance(filter_, AsyncFilter):
        verdict = None
        with trio.move_on_after(filter_.timeout_s) as scope, _watched(name, "await Trio's own instead"):
            try:
                verdict = await getattr(filter_, hook)(*views)
            except Exception as error:
                raise AssertionError(f"{name} raised {error!r} for {what}") from error
        assert not scope.cancelled_caught, f"{name} took longer than timeout_s = {filter_.timeout_s} s for {what}"
    else:
        verdict = _timed(filter_, hook, what, *views)
    assert verdict is None or isinstance(verdict, Reply), (
        f"{name} returned {verdict!r} for {what}; None goes on, a Reply is the answer"
    )
    _check_views(name, what, views)


async def _quietly(filter_: FilterBase, request: Request) -> None:
    if overrides(type(filter_), "on_request"):
        done: Any = filter_.on_request(request)  # type: ignore[attr-defined]
        if isinstance(filter_, AsyncFilter):
            await done


def _timed(filter_: FilterBase, hook: str, what: str, *arguments: Any) -> Any:
    """Calls a synchronous hook; where it was slow, a few times more, because the first call may have other reasons."""
    name = f"{type(filter_).__name__}.{hook}"
    call = getattr(filter_, hook)
    best_s = float("inf")
    result = None
    for attempt in range(_TIMED_CALLS):
        with _watched(name, "a hook that must wait belongs into an AsyncFilter"):
            begun = time.perf_counter()
            try:
                again = call(*arguments)
            except Exception as error:
                raise AssertionError(f"{name} raised {error!r} for {what}") from error
            best_s = min(best_s, time.perf_counter() - begun)
        if attempt == 0:
            result = again
        if best_s <= filter_.budget_s or hook.endswith("_data"):
            return result
    raise AssertionError(
        f"{name} took {best_s * 1000:.1f} ms for {what}; its budget is {filter_.budget_s * 1000:.1f} ms, because "
        "nothing else is served meanwhile: make it faster, or an AsyncFilter that works in a thread"
    )


def _body_hook(filter_: FilterBase, hook: str, what: str, make: Callable[[], Request]) -> None:
    name = f"{type(filter_).__name__}.{hook}"
    bodies: tuple[tuple[str, list[bytes]], ...] = (
        ("no body", [b""]),
        ("a body in one piece", [b'{"a": 1}']),
        ("a body in single bytes", [b"x", b"y", b"z", b""]),
        ("a binary body of 64 KiB", [bytes(range(256)) * 256, b""]),
    )
    for told, pieces in bodies:
        request = make()
        for index, piece in enumerate(pieces):
            data = _timed(filter_, hook, f"{what}, {told}", request, piece, index == len(pieces) - 1)
            assert isinstance(data, bytes), (
                f"{name} returned {type(data).__name__} for {what}, {told}; it must return the bytes that go on"
            )


def _check_views(name: str, what: str, views: tuple[Any, ...]) -> None:
    for view in views:
        for field, value in view._message.headers:
            assert isinstance(field, bytes) and isinstance(value, bytes), (
                f"{name} wrote past the Headers view: {field!r} and its value must be bytes"
            )
            try:
                checked_value(field, value)
            except ValueError as error:
                raise AssertionError(f"{name} left a malformed field for {what}: {error}") from error


@contextmanager
def _watched(what: str, advice: str) -> Iterator[None]:
    """Notices blocking calls of this thread."""
    _install_audit()
    before, _watch.found = _watch.found, []
    _watch.thread = get_ident()
    try:
        yield
        found = _watch.found
    finally:
        _watch.found = before
    assert not found, f"{what} {found[0]}: {advice}"


class _Watch:
    """What was noticed since the watch began; None: nobody watches."""

    found: list[str] | None = None
    thread = 0  # worker threads may block
    installed = False


_watch = _Watch()


def _install_audit() -> None:
    """Audit hooks cannot be removed, so there is one, which does nothing while nobody watches."""
    if not _watch.installed:
        _watch.installed = True
        sys.addaudithook(_audit)
        if sys.version_info < (3, 13):  # before that, sleeping raises no audit event
            time.sleep = partial(_audited_sleep, time.sleep)


def _audited_sleep(sleep: Callable[[float], None], seconds: float) -> None:
    sys.audit("time.sleep", seconds)
    sleep(seconds)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    found = _watch.found
    if found is None or event not in _BLOCKING or get_ident() != _watch.thread:
        return
    if event == "open" and (not isinstance(arguments[0], str) or arguments[0].endswith((".py", ".pyc", ".so"))):
        return  # an import, or a descriptor that is open already
    detail = f" ({arguments[0]})" if event == "open" else ""
    found.append(_BLOCKING[event] + detail)


def _connections() -> list[tuple[str, Connection]]:
    return [
        ("a peer of the mesh", Connection(caller="spiffe://mesh.local/service/web", caller_service="web", port="api")),
        ("a peer without identity, on plain TCP", Connection(address="::1", service="reviews", protocol="tcp")),
    ]


def _requests() -> list[tuple[str, Callable[[], Request]]]:
    many = [(f"x-{number}", "v") for number in range(95)]
    odd = [("x-empty", ""), ("accept", "a"), ("accept", "b"), ("x-latin", "\xe4\xff"), ("cookie", "=;;a")]
    return [
        ("an ordinary GET", lambda: make_request("GET", "/reviews/7?page=2", {"accept": "*/*", "user-agent": "test"})),
        ("a POST", lambda: make_request("POST", "/reviews", {"content-type": "application/json"})),
        ("a request without any header", lambda: make_request("HEAD", "/", host=None)),
        ("repeated, empty and non-ASCII header values", lambda: make_request("GET", "/%7E//a;b=c/%C3%A4?=&&", odd)),
        ("as many headers as may come", lambda: make_request("PUT", "/" + "x" * 8000, many)),
        (
            "a peer without identity and an unknown method",
            lambda: make_request("PURGE", "/", caller="", caller_service="", address="::1", trace_id="", request_id=""),
        ),
    ]


def _responses() -> list[tuple[str, Callable[[], Response]]]:
    odd = [("set-cookie", "a=b"), ("set-cookie", "c=d"), ("x-empty", ""), ("x-latin", "\xe4")]
    return [
        ("answered with 200", lambda: make_response(200, {"content-type": "text/plain"})),
        ("answered with 204 and no header", lambda: make_response(204)),
        ("answered with 304", lambda: make_response(304, {"etag": '"x"'})),
        ("answered with 404 and repeated headers", lambda: make_response(404, odd)),
        ("answered with 503", lambda: make_response(503, {"retry-after": "1"})),
    ]
