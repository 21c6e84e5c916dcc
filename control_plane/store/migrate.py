"""Everything from one store into another: from embedded to etcd, and back.

Must not know which kind either is, nor what the keys mean. Invariants: the source is never changed; the target is whole
only if `migrate` returned (both were read again and found equal); run again after a crash it goes on where it ended.
Keys that live by a lease stay behind: sidecars and replicas write them anew within one heartbeat. Revisions begin anew.
"""

from control_plane.store.backup import BackupError, Restored, fill, leased_of, unleased
from control_plane.store.base import Store


async def migrate(source: Store, target: Store, *, force: bool = False) -> Restored:
    """Raises StoreError. Nobody may write to either meanwhile; where the source did change, that is said."""
    view = await source.read()
    entries = unleased(view)
    if not entries:
        raise BackupError(f"{source.description} is empty: there is nothing to move")
    done = await fill(target, entries, leased_of(view), force=force)
    if unleased(await source.read()) != entries:
        raise BackupError(
            f"{source.description} changed while it was read: stop its control planes and run this again with --force"
        )
    return done
