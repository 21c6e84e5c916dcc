"""From what people write after `--store` to an open store.

Must know no store's inside: etcd is imported only where it is asked for.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from control_plane.store.address import (
    ETCD_PREFIX,
    EmbeddedAddress,
    EtcdAddress,
    EtcdOptions,
    etcd_options,
    parse_store,
)
from control_plane.store.base import Store, StoreError
from control_plane.store.embedded import EmbeddedStore

__all__ = [
    "ETCD_PREFIX",
    "EmbeddedAddress",
    "EtcdAddress",
    "EtcdOptions",
    "etcd_options",
    "open_store",
    "opened",
    "parse_store",
]


async def open_store(
    text: str,
    nursery: trio.Nursery,
    *,
    state_dir: Path,
    etcd: EtcdOptions | None = None,
    read_only: bool = False,
) -> Store:
    """Open it; its tasks live in the nursery until `aclose`. Raises StoreError. `read_only`: to look at it, and to
    make a backup; an embedded store can be in use then, and must exist."""
    address = parse_store(text, state_dir)
    if isinstance(address, EmbeddedAddress):
        if etcd not in (None, EtcdOptions()):
            raise StoreError(f"options of etcd with {text!r}; they need --store etcd://HOST:PORT")
        return await EmbeddedStore.open(address.path, nursery, read_only=read_only)
    # With etcd3 and grpc, so only where it is wanted; without them, a StoreRefused that says what to install.
    from control_plane.store.etcd import EtcdStore

    return await EtcdStore.open(address.hosts, etcd or EtcdOptions(), nursery)


@asynccontextmanager
async def opened(
    text: str, *, state_dir: Path, etcd: EtcdOptions | None = None, read_only: bool = False
) -> AsyncIterator[Store]:
    """For commands: opens it, and closes it. A StoreError comes out as it is, not in a group."""
    try:
        async with trio.open_nursery() as nursery:
            store = await open_store(text, nursery, state_dir=state_dir, etcd=etcd, read_only=read_only)
            try:
                yield store
            finally:
                await store.aclose()
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if error is group:
            raise
        raise error from error.__cause__
