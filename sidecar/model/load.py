"""Policy files and folders to one Snapshot, with every problem in them.

The edge of the package: the only module that reads files. Never raises for bad input: what cannot be read is a
problem like any other. Invariant: `snapshot` is None exactly where a problem is an error.
"""

import hashlib
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from .documents import add_file
from .lint import lint
from .problems import Problem, Severity, Sink
from .records import record
from .resolve import Documents, resolve
from .snapshot import Snapshot
from .source import Source
from .yaml_tree import BYTES_MAX, normalise

FILES_MAX = 5000
TOTAL_BYTES_MAX = 32 * 1024 * 1024
SUFFIXES = (".yaml", ".yml")


@record(frozen=True, slots=True)
class Loaded:
    """`texts` holds the text of each file as positions refer to it; `dropped` counts problems beyond the bound."""

    snapshot: Snapshot | None
    problems: tuple[Problem, ...]
    texts: Mapping[str, str]
    dropped: int = 0

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity is Severity.ERROR)


def load_policy(paths: Sequence[Path]) -> Loaded:
    """All files, and all `*.yaml` and `*.yml` files of all folders, as one policy."""
    sink = Sink()
    return load_texts(read_texts(paths, sink), sink)


def read_texts(paths: Sequence[Path], sink: Sink) -> dict[str, str]:
    """The same files, only read: their texts by file name. What cannot be read is a problem in `sink`."""
    texts: dict[str, str] = {}
    total = 0
    for path in _files(paths, sink):
        content = _read(path, sink)
        if content is None:
            continue
        total += len(content)
        if total > TOTAL_BYTES_MAX:
            sink.error("P0114", f"the policy holds more than {TOTAL_BYTES_MAX // 1024 // 1024} MB", Source(str(path)))
            break
        text = _decode(content, str(path), sink)
        if text is not None:
            texts[str(path)] = text
    return texts


def load_texts(texts: Mapping[str, str], sink: Sink | None = None) -> Loaded:
    """The same for texts by file name, as `normalise` gives them."""
    sink = Sink() if sink is None else sink
    documents = Documents()
    for file in sorted(texts):
        add_file(texts[file], file, documents, sink)
    services = resolve(documents, sink)
    snapshot = Snapshot(services, _revision(texts))
    if not sink.failed:
        lint(snapshot, sink)
    return Loaded(None if sink.failed else snapshot, sink.problems(), texts, sink.dropped)


def _revision(texts: Mapping[str, str]) -> str:
    """By content alone: the names of the files make no difference."""
    digest = hashlib.sha256()
    for text in sorted(texts.values()):
        digest.update(hashlib.sha256(text.encode()).digest())
    return f"sha256:{digest.hexdigest()[:16]}"


def _files(paths: Sequence[Path], sink: Sink) -> list[Path]:
    """Each file once, folders opened one level deep."""
    found: dict[tuple[int, int], Path] = {}
    for path in paths:
        facts = _stat(path, sink)
        if facts is None:
            continue
        if not stat.S_ISDIR(facts.mode):
            found.setdefault(facts.identity, path)
            continue
        try:
            inside = sorted(
                each for each in path.iterdir() if each.suffix in SUFFIXES and not each.name.startswith(".")
            )
        except OSError as error:
            sink.error("P0100", f"cannot read the folder: {error.strerror or error}", Source(str(path)))
            continue
        if not inside:
            sink.error("P0100", "no policy files in this folder", Source(str(path)), help="they end in .yaml or .yml")
        for each in inside:
            facts = _stat(each, sink)
            if facts is not None:
                found.setdefault(facts.identity, each)
    files = list(found.values())
    if len(files) > FILES_MAX:
        sink.error("P0114", f"more than {FILES_MAX} policy files", Source(str(files[FILES_MAX])))
    if not paths:
        sink.error("P0100", "no policy file is named", Source(""))
    return files[:FILES_MAX]


@record(frozen=True, slots=True)
class _Facts:
    mode: int
    identity: tuple[int, int]  # the same for two names of one file


def _stat(path: Path, sink: Sink) -> _Facts | None:
    try:
        facts = path.stat()
        return _Facts(facts.st_mode, (facts.st_dev, facts.st_ino))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        sink.error("P0100", f"cannot read the file: {reason}", Source(str(path)))
        return None


def _read(path: Path, sink: Sink) -> bytes | None:
    facts = _stat(path, sink)
    if facts is None:
        return None
    mode = facts.mode
    if not stat.S_ISREG(mode):  # opening a FIFO would wait for a writer
        kind = "a folder" if stat.S_ISDIR(mode) else "a FIFO" if stat.S_ISFIFO(mode) else "a device or socket"
        sink.error("P0100", f"not a regular file but {kind}", Source(str(path)))
        return None
    try:
        with path.open("rb") as file:
            content = file.read(BYTES_MAX + 1)
    except OSError as error:
        sink.error("P0100", f"cannot read the file: {error.strerror or error}", Source(str(path)))
        return None
    if len(content) > BYTES_MAX:
        sink.error("P0114", f"the file holds more than {BYTES_MAX // 1024 // 1024} MB", Source(str(path)))
        return None
    return content


def _decode(content: bytes, file: str, sink: Sink) -> str | None:
    try:
        return normalise(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        before = normalise(content[: error.start].decode("utf-8", "replace"))
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        sink.error(
            "P0101",
            f"byte 0x{content[error.start]:02X} is not UTF-8",
            Source(file, line, column),
            help="save the file as UTF-8",
        )
        return None
