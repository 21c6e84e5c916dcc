"""PEM (RFC 7468), read strictly: a text in, labelled DER blocks out.

Knows nothing of what the blocks hold, and no files. Invariants: the work is linear and bounded by the size of the text;
a block that is not well formed is an error that names its line, never skipped; text between blocks is ignored, as
RFC 7468, section 2, has it.
"""

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass

CERTIFICATE = "CERTIFICATE"
_BEGIN = "-----BEGIN "
_END = "-----END "
_DASHES = "-----"


class PemError(ValueError):
    """Not well-formed PEM; says where."""


@dataclass(frozen=True, slots=True)
class Block:
    label: str
    der: bytes
    line: int  # of its BEGIN, from 1


def read_blocks(data: bytes, bytes_max: int, blocks_max: int) -> list[Block]:
    """All blocks of a PEM text, in order."""
    if len(data) > bytes_max:
        raise PemError(f"larger than {bytes_max} bytes")
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise PemError("not text; a PEM file is needed (this may be DER)") from None
    blocks: list[Block] = []
    label: str | None = None
    begun = 0
    body: list[str] = []
    for number, raw in enumerate(lines, 1):
        line = raw.rstrip()
        if line.startswith(_BEGIN) and line.endswith(_DASHES):
            if label is not None:
                raise PemError(f"line {number}: a block begins inside the one of line {begun}")
            label, begun, body = line[len(_BEGIN) : -len(_DASHES)], number, []
        elif line.startswith(_END) and line.endswith(_DASHES):
            if label is None or line[len(_END) : -len(_DASHES)] != label:
                raise PemError(f"line {number}: this END has no BEGIN of its own")
            if len(blocks) == blocks_max:
                raise PemError(f"line {begun}: more than {blocks_max} blocks")
            blocks.append(Block(label, _decoded(body, begun), begun))
            label = None
        elif label is not None:
            body.append(line)
    if label is not None:
        raise PemError(f"line {begun}: this block has no END; the file was cut short")
    return blocks


def _decoded(body: list[str], line: int) -> bytes:
    if any(":" in text for text in body):  # RFC 1421 headers: an encrypted key of the old form
        raise PemError(f"line {line}: the block carries headers (is it encrypted?); only plain PEM is read")
    try:
        der = base64.b64decode("".join(body), validate=True)
    except (binascii.Error, ValueError):
        raise PemError(f"line {line}: the block is not Base64") from None
    if not der:
        raise PemError(f"line {line}: the block is empty")
    return der


def write_blocks(label: str, ders: Iterable[bytes]) -> bytes:
    """The PEM text of DER blocks that share one label."""
    out: list[str] = []
    for der in ders:
        text = base64.b64encode(der).decode("ascii")
        out.append(f"{_BEGIN}{label}{_DASHES}")
        out.extend(text[start : start + 64] for start in range(0, len(text), 64))
        out.append(f"{_END}{label}{_DASHES}")
    return ("\n".join(out) + "\n").encode("ascii") if out else b""
