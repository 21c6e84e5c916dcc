"""The text of a token: what a newcomer is given so that it and the control plane can trust each other at first contact.

It holds where the control plane is, by which root it is known, and a secret that proves the right to ask. Pure: the
secret is an argument; whether it is still good, only the control plane knows. Invariants: `parse_token(make_token(…))`
gives the same; a text that was cut or altered is told apart from one that was never a token; the secret stands in no
message and in no repr().
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .spiffe import SpiffeError, check_trust_domain

JOIN, OPERATOR = "join", "operator"
TOKEN_CHARACTERS_MAX = 4096
ADDRESSES_MAX = 16
ADDRESS_CHARACTERS_MAX = 300

_LETTERS = {JOIN: "j", OPERATOR: "o"}
_KINDS = {letter: kind for kind, letter in _LETTERS.items()}
_FORM = re.compile(r"pil_([a-z])_([A-Za-z0-9_-]+)", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9_-]{1,128}", re.ASCII)
_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})", re.ASCII)
_CHECK_BYTES = 4
_AGAIN = "copy it again, whole, as `pillion token create` printed it"


class TokenError(ValueError):
    """A text that is no token; says what is wrong with it and what to do, never what stands in it."""


@dataclass(frozen=True, slots=True)
class Token:
    """`addresses`: HOST:PORT of the join listeners, to be tried in order. `fingerprint`: SHA-256 (hex) of the root
    certificate by which the control plane is known. `kind`: `join` or `operator`."""

    id: str
    secret: str = field(repr=False)
    addresses: tuple[str, ...]
    fingerprint: str
    trust_domain: str
    kind: str
    text: str = field(repr=False, compare=False)


def make_token(kind: str, id: str, secret: str, addresses: Sequence[str], fingerprint: str, trust_domain: str) -> str:
    """Raises TokenError for what no token can hold."""
    letter = _LETTERS.get(kind)
    if letter is None:
        raise TokenError(f"there is no token of kind {kind[:40]!r}")
    data = {"id": id, "s": secret, "a": list(addresses[:ADDRESSES_MAX]), "f": fingerprint, "t": trust_domain}
    content = json.dumps(data, separators=(",", ":")).encode()
    body = base64.urlsafe_b64encode(content + _check(letter, content)).rstrip(b"=").decode()
    text = f"pil_{letter}_{body}"
    parse_token(text)
    return text


def parse_token(text: str) -> Token:
    """Raises TokenError."""
    text = text.strip()
    if not text:
        raise TokenError("the token is empty")
    if not text.startswith("pil_"):
        raise TokenError("this is no token of pillion: one begins with pil_j_ (join) or pil_o_ (operator)")
    if len(text) > TOKEN_CHARACTERS_MAX:
        raise TokenError(f"the token is longer than {TOKEN_CHARACTERS_MAX} characters; is there more than one?")
    if any(character.isspace() for character in text):
        raise TokenError(f"the token has white space within it (was it broken over lines?); {_AGAIN}")
    form = _FORM.fullmatch(text)
    if form is None:
        raise TokenError(f"the token is damaged; {_AGAIN}")
    kind = _KINDS.get(form[1])
    if kind is None:
        raise TokenError("the token is of a kind that this version of pillion does not know; is this version too old?")
    return _read(kind, _content(form[1], form[2]), text)


def _content(letter: str, body: str) -> bytes:
    try:
        whole = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise TokenError(f"the token is damaged (cut short?); {_AGAIN}") from None
    content, check = whole[:-_CHECK_BYTES], whole[-_CHECK_BYTES:]
    if check != _check(letter, content):
        raise TokenError(f"the token is damaged (cut short, or a character was changed); {_AGAIN}")
    return content


def _check(letter: str, content: bytes) -> bytes:
    """Against accidents only; a forger can make it, and is refused for the secret."""
    return hashlib.sha256(letter.encode() + content).digest()[:_CHECK_BYTES]


def _read(kind: str, content: bytes, text: str) -> Token:
    try:
        data: Any = json.loads(content)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or not {"id", "s", "a", "f", "t"} <= data.keys():
        raise TokenError("the token holds something else than this version of pillion expects; make a new one")
    id, secret, addresses = data["id"], data["s"], data["a"]
    if not (_is(id, _WORD) and _is(secret, _WORD)):
        raise TokenError("the token has no usable id and secret; make a new one")
    if not (isinstance(addresses, list) and 0 < len(addresses) <= ADDRESSES_MAX and all(map(_is_address, addresses))):
        raise TokenError("the token does not say where the control plane is; make a new one")
    if not _is(data["f"], _HEX):
        raise TokenError("the token does not say by which root the control plane is known; make a new one")
    try:
        trust_domain = check_trust_domain(data["t"]) if isinstance(data["t"], str) else ""
    except SpiffeError as error:
        raise TokenError(f"the token names no trust domain: {error}; make a new one") from None
    if not trust_domain:
        raise TokenError("the token names no trust domain; make a new one")
    return Token(id, secret, tuple(addresses), data["f"], trust_domain, kind, text)


def _is(value: object, form: "re.Pattern[str]") -> bool:
    return isinstance(value, str) and form.fullmatch(value) is not None


def _is_address(value: object) -> bool:
    if not isinstance(value, str) or len(value) > ADDRESS_CHARACTERS_MAX:
        return False
    match = _ADDRESS.fullmatch(value)
    return match is not None and 0 < int(match[1]) <= 65535
