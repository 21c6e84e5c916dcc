"""The fake passes the real thing's tests."""

import pytest
from support.memory_store import MemoryStore
from support.store_suite import CHECKS, Check, name_of
from trio.testing import MockClock


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
async def test_store(check: Check, autojump_clock: MockClock) -> None:
    await check(MemoryStore())
