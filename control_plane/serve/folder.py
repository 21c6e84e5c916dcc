"""A folder of policy files that a control plane follows: whatever it holds is the mesh's policy, by the author
`folder:PATH`.

Polls, like the sidecar's own files. What leaves the folder is removed, but only what the folder had brought; content
with an error changes nothing and is reported once. Must not know how a policy is judged. Invariants: content is taken
only after it has stood still for one poll, so that a file that is being written is not taken for a shorter policy; what
was taken is not taken again until it changes, so that two replicas never undo each other's work in turns.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path

import trio

from control_plane.state.policy import PolicyError, PolicyInvalid, plan_apply, policy_of
from control_plane.store.base import Conflict, StoreError, StoreUnavailable
from sidecar.model.documents import decode_file, documents_of
from sidecar.model.load import read_texts
from sidecar.model.problems import Sink, render

from .joins import caught_up
from .replica import Replica

log = logging.getLogger(__name__)

POLL_S = 1.0
RETRY_S = 30.0  # what is not valid may become so by what others apply
TRIES = 10

Apply = Callable[[Mapping[str, str]], Awaitable[object]]
"""Make these files (texts by name) the policy; raises PolicyError, StoreError."""

Seen = tuple[tuple[str, int, int, int], ...]
"""What is compared of the files: names, inodes, sizes, times."""
Read = tuple[dict[str, str], dict[str, str], str]
"""Texts by file name, the file of each document, and what is wrong."""
Aside = Callable[[Callable[[], Read]], Awaitable[Read]]


def author_of(path: Path) -> str:
    return f"folder:{path}"


class Folder:
    """`brought` names the file of a document that the folder brought before we started, if it did. `aside` runs what
    takes long."""

    def __init__(
        self,
        path: Path,
        apply: Apply,
        brought: Callable[[str], str | None] = lambda document: None,
        aside: Aside = trio.to_thread.run_sync,
    ) -> None:
        self.path, self.author = path, author_of(path)
        self.problem = ""  # why the content as it is now is not in force
        self._apply, self._brought, self._aside = apply, brought, aside
        self._files: Mapping[str, str] = {}  # of each document, since it was last taken
        self._taken: Seen | None = None

    def file_of(self, document: str) -> str | None:
        """The file of the folder that names this document (`defaults`, `enforced`, `services/NAME`), if one does."""
        file = self._files.get(document) or (self._brought(document) if not self._files else None)
        return None if file is None else str(self.path / file if self.path.is_dir() else self.path)

    async def run(self) -> None:
        """For ever."""
        last = state = self._state()
        due = trio.current_time()
        while True:
            if state == last and (state != self._taken or self.problem) and trio.current_time() >= due:
                due = trio.current_time() + await self._take(state)
            await trio.sleep(POLL_S)
            last, state = state, self._state()
            if state != last:
                due = trio.current_time()

    def _state(self) -> Seen:
        try:
            return tuple(_seen(each) for each in (sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]))
        except OSError as error:
            return ((str(self.path), -(error.errno or 1), 0, 0),)

    async def _take(self, state: Seen) -> float:
        """How long to wait before the same content is tried again, if it must be."""
        files, names, problems = await self._aside(partial(_read, self.path))
        self._taken = state
        if problems:
            self._report(problems)
            return RETRY_S
        try:
            await self._apply(files)
        except PolicyInvalid as error:
            self._report(render(error.problems, error.texts))
            return RETRY_S
        except PolicyError as error:
            self._report(str(error))
            return RETRY_S
        except StoreError as error:
            self._report(f"the store did not take it, trying again: {error}")
            return POLL_S
        self._files = names
        if self.problem:
            log.info("the policy folder %s is in force again", self.path)
        self.problem = ""
        return POLL_S

    def _report(self, problem: str) -> None:
        if problem == self.problem:
            return
        self.problem = problem
        log.error("the policy folder %s is not taken, what was in force stays:", self.path)
        for line in problem.splitlines():
            log.error("%s", line)


def _seen(path: Path) -> tuple[str, int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return str(path), 0, 0, 0
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns


def _read(path: Path) -> Read:
    sink = Sink()
    read = read_texts([path], sink)
    if sink.failed:
        return {}, {}, render(sink.problems(), read)
    files = {Path(name).name: text for name, text in read.items()}
    names = {}
    for file, text in files.items():
        block = decode_file(text, file, Sink())
        if block is not None:
            names.update(dict.fromkeys(documents_of(block), file))
    return files, names, ""


def follow_folder(replica: Replica, path: Path) -> Folder:
    """The folder of a control plane."""
    author = author_of(path)

    async def apply(files: Mapping[str, str]) -> None:
        for _ in range(TRIES):
            plan = await trio.to_thread.run_sync(
                partial(
                    plan_apply,
                    policy_of(replica.state),
                    files,
                    author=author,
                    at=replica.now(),
                    prune_author=author,
                    source="folder",
                    catalogue=replica.catalogue,
                )
            )
            for line in render(plan.problems, plan.texts).splitlines():
                log.warning("%s", line)
            if not plan.operations:
                return
            try:
                await replica.commit(plan.operations, plan.compares)
            except Conflict as conflict:
                await caught_up(replica, conflict)
                continue
            names = ", ".join(each.document for each in plan.diff[:10])
            await replica.audit(author, "apply policy", f"change {plan.change}", names)
            return
        raise StoreUnavailable("the policy changes all the time")

    def brought(document: str) -> str | None:
        held = policy_of(replica.state).documents.get(document)
        return held.record.file if held is not None and held.record.author == author else None

    return Folder(path, apply, brought)
