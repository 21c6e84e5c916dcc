"""The documents of a policy: `defaults`, `enforced`, and each service; from whole files, or from pieces of one.

Must not know where the texts come from. Invariant: a piece that stands at its place in a file decodes, with the number
of its first line, to what the file gives, positions included.
"""

from dataclasses import replace

from .fields import FILE
from .kinds import Block, Stated
from .problems import Sink, clip
from .resolve import Documents
from .source import Source
from .tables import Table
from .yaml_tree import Map, Scalar, read_yaml

DEFAULTS, ENFORCED, SERVICES = "defaults", "enforced", "services/"

_PIECE = Table("file", tuple(replace(each, required=False) for each in FILE.fields))


def decode_file(text: str, file: str, sink: Sink) -> Block | None:
    """What one normalised text states; None where it cannot be understood at all."""
    before = sink.failed
    node = read_yaml(text, file, sink)
    if node is None:
        if not before and not sink.failed:
            sink.error("P0109", "the file is empty", Source(file, 1, 1), help="a policy begins with version: 1")
        return None
    block = FILE.decode(node, "", sink)
    return block if isinstance(block, Block) else None


def documents_of(block: Block) -> dict[str, Stated]:
    """By name: `defaults`, `enforced`, `services/web`."""
    found = {key: stated for key in (DEFAULTS, ENFORCED) if (stated := block.stated(key)) is not None}
    return found | {SERVICES + name: stated for name, stated in (block.get("services") or {}).items()}


def decode_piece(name: str, text: str, file: str, first_line: int, sink: Sink) -> Stated | None:
    """The document `name` from a piece of a file: the lines of `defaults:` or `enforced:`, or those of one entry of
    `services:` with its indentation."""
    before = sink.failed
    node = read_yaml(text, file, sink, first_line)
    key = name.removeprefix(SERVICES)
    if not isinstance(node, Map) or list(node.entries) != [key]:
        if before or not sink.failed:
            sink.error("P0109", f"this is not the document {clip(name)}", Source(file, first_line, 1))
        return None
    if name.startswith(SERVICES):
        node = Map(node.source, 1, {"services": (Scalar(node.source, 1, "services", "services"), node)})
    block = _PIECE.decode(node, "", sink)
    return documents_of(block).get(name) if isinstance(block, Block) else None


def add_file(text: str, file: str, documents: Documents, sink: Sink) -> None:
    block = decode_file(text, file, sink)
    if block is not None:
        add_documents(documents_of(block), documents, sink)


def add_documents(found: dict[str, Stated], documents: Documents, sink: Sink) -> None:
    """What may stand once and stands again is a problem."""
    for name, stated in found.items():
        if name.startswith(SERVICES):
            _add_service(name.removeprefix(SERVICES), stated, documents, sink)
            continue
        first: Stated | None = getattr(documents, name)
        if first is not None:
            sink.error(
                "P0113",
                f"`{name}` is stated twice",
                stated.key,
                label=f"first here: {first.key.source}",
                help=f"a policy has one `{name}`",
            )
        else:
            setattr(documents, name, stated)


def _add_service(name: str, stated: Stated, documents: Documents, sink: Sink) -> None:
    if name in documents.services:
        sink.error(
            "P0113",
            f'the service "{clip(name)}" is defined twice',
            stated.key,
            label=f"first here: {documents.services[name].key.source}",
            help="a service is defined in one place",
        )
    else:
        documents.services[name] = stated
