"""Policy and identity from files: read at start, and again whenever they change.

Polls once a second (no dependency, works on every file system, and an editor's or a secret store's way of replacing a
file does not matter). Must not know what is done with what it reads. Invariant: a change is reported at most once per
state of the files, good or bad.
"""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import trio

from certs.files import IdentityError, IdentityFiles, changed, load_identity, stat_identity
from sidecar.model.load import Loaded, load_policy

POLL_S = 1.0

Seen = tuple[tuple[str, int, int, int], ...]


def policy_state(paths: Sequence[Path]) -> Seen:
    """What is compared of the policy's files: names, inodes, sizes, times."""
    found: list[tuple[str, int, int, int]] = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        for each in inside:
            try:
                status = each.stat()
            except OSError:
                found.append((str(each), 0, 0, 0))
            else:
                found.append((str(each), status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


class PolicyFiles:
    """The policy of a sidecar that runs from files alone."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self._seen: Seen | None = None

    def load(self) -> Loaded:
        self._seen = self._state()
        return load_policy(self.paths)

    def _state(self) -> Seen | None:
        try:
            return policy_state(self.paths)
        except OSError:
            return None

    async def watch(self, on_change: Callable[[], Awaitable[None]]) -> None:
        """Tell each new state of the files, for ever; whoever is told loads them."""
        while True:
            await trio.sleep(POLL_S)
            if self._state() != self._seen:
                await on_change()


class IdentityDirectory:
    """The certificate, key and bundle of a sidecar that runs from files alone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._seen = stat_identity(directory)

    def load(self) -> IdentityFiles:
        """Raises IdentityError."""
        self._seen = stat_identity(self.directory)
        return load_identity(self.directory)

    async def watch(
        self, on_change: Callable[[IdentityFiles], None], on_problem: Callable[[IdentityError], None]
    ) -> None:
        """Tell each new set of files, for ever. A set that is being written is waited for."""
        reported = ""
        while True:
            await trio.sleep(POLL_S)
            state = changed(self.directory, self._seen)
            if state is None:
                continue
            try:
                identity = await trio.to_thread.run_sync(load_identity, self.directory)
            except IdentityError as error:
                if not error.transient:
                    self._seen = state
                if str(error) != reported:
                    reported = str(error)
                    on_problem(error)
            else:
                self._seen = state
                reported = ""
                on_change(identity)
