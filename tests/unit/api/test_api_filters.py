"""Hooks cost nothing unless overridden, and do nothing by default."""

import pytest

from sidecar.api import HOOKS, AsyncFilter, Connection, Filter, Reply, Request, overrides
from sidecar.testing import make_context, make_request, make_response


class Sync(Filter):
    def on_request(self, request: Request) -> Reply | None:
        return None


class Async(AsyncFilter):
    async def on_request(self, request: Request) -> Reply | None:
        return None


class Child(Sync):
    def on_request_data(self, request: Request, data: bytes, end: bool) -> bytes:
        return data


def test_overrides_sees_what_a_class_or_its_parents_do() -> None:
    assert [hook for hook in HOOKS if overrides(Filter, hook)] == []
    assert [hook for hook in HOOKS if overrides(AsyncFilter, hook)] == []
    assert [hook for hook in HOOKS if overrides(Sync, hook)] == ["on_request"]
    assert [hook for hook in HOOKS if overrides(Async, hook)] == ["on_request"]
    assert [hook for hook in HOOKS if overrides(Child, hook)] == ["on_request", "on_request_data"]
    with pytest.raises(ValueError, match="is not a hook"):
        overrides(Sync, "on_everything")


async def test_the_default_hooks_change_nothing() -> None:
    filter_ = Filter()
    assert filter_.on_request(make_request()) is None
    assert filter_.on_response(make_request(), make_response()) is None
    assert filter_.on_request_data(make_request(), b"x", False) == b"x"
    assert filter_.on_response_data(make_request(), b"", True) == b""
    assert filter_.on_connection(Connection()) is None
    waiting = AsyncFilter()
    assert await waiting.on_request(make_request()) is None
    assert await waiting.on_response(make_request(), make_response()) is None


async def test_open_keeps_the_context_and_aclose_needs_none() -> None:
    filter_, context = Filter(), make_context()
    await filter_.aclose()
    await filter_.open(context)
    assert filter_.context is context
    await filter_.aclose()


def test_a_connection_says_who_and_where() -> None:
    connection = Connection(caller_service="web", service="reviews", port="api")
    assert repr(connection) == "<Connection to reviews:api from web>"
