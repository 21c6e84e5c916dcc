"""SPIFFE IDs: who a workload is, as a URI.

Knows the syntax of the SPIFFE-ID standard and nothing of certificates or connections. Invariant: an ID is either
exactly canonical or refused; nothing is ever normalised, because two spellings of one name are how identities get
confused (CVE-2021-27099). Two IDs are the same if and only if their texts are the same.
"""

import re
from dataclasses import dataclass

SCHEME = "spiffe://"
ID_BYTES_MAX = 2048  # SPIFFE-ID, 2.3
TRUST_DOMAIN_BYTES_MAX = 255  # SPIFFE-ID, 2.1
SERVICE_NAME_BYTES_MAX = 63  # a DNS label: the name stands in Host and in SNI

_TRUST_DOMAIN = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*", re.ASCII)
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)
_SERVICE_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?", re.ASCII)


class SpiffeError(ValueError):
    """A text that is not a canonical SPIFFE ID; says what is wrong with it."""


def shown(text: str, length_max: int = 80) -> str:
    """A hostile text made fit for a message or a log line: escaped and cut."""
    return ascii(text if len(text) <= length_max else text[:length_max] + "…")


def check_trust_domain(name: str) -> str:
    """The same name, if it is one that a trust domain may have."""
    if not name:
        raise SpiffeError("the trust domain is empty")
    if len(name) > TRUST_DOMAIN_BYTES_MAX:
        raise SpiffeError(f"the trust domain is longer than {TRUST_DOMAIN_BYTES_MAX} bytes")
    if _TRUST_DOMAIN.fullmatch(name):
        return name
    if "@" in name:
        problem = "user information is not allowed"
    elif ":" in name:
        problem = "a port is not allowed"
    elif name.lower() != name:
        problem = "it must be lower case"
    elif name.startswith(".") or name.endswith(".") or ".." in name:
        problem = "a label is empty"
    else:
        problem = "only a-z, 0-9, '.', '-' and '_' are allowed"
    raise SpiffeError(f"trust domain {shown(name)}: {problem}")


def check_service_name(name: str) -> str:
    """The same name, if it is one that a service may have."""
    if len(name) > SERVICE_NAME_BYTES_MAX:
        raise SpiffeError(f"service name {shown(name)} is longer than {SERVICE_NAME_BYTES_MAX} characters")
    if not _SERVICE_NAME.fullmatch(name):
        raise SpiffeError(
            f"service name {shown(name)}: use a-z, 0-9 and '-', beginning and ending with a letter or a digit"
        )
    return name


def _check_path(path: str) -> None:
    if not path or path == "/":
        raise SpiffeError("the path is empty: this names a trust domain, not a workload")
    for segment in path[1:].split("/"):
        if not segment:
            raise SpiffeError("the path ends with '/'" if path.endswith("/") else "the path has an empty segment")
        if segment in (".", ".."):
            raise SpiffeError(f"the path has a segment {segment!r}")
        if _SEGMENT.fullmatch(segment):
            continue
        if "%" in segment:
            raise SpiffeError("percent-encoding is not allowed")
        raise SpiffeError(f"path segment {shown(segment)}: only letters, digits, '.', '-' and '_' are allowed")


@dataclass(frozen=True, slots=True, order=True)
class SpiffeId:
    """The identity of one workload. `path` begins with a slash; str() gives the one and only spelling."""

    trust_domain: str
    path: str

    def __post_init__(self) -> None:
        check_trust_domain(self.trust_domain)
        if self.path and not self.path.startswith("/"):
            raise SpiffeError(f"path {shown(self.path)} does not begin with '/'")
        _check_path(self.path)
        if len(SCHEME) + len(self.trust_domain) + len(self.path) > ID_BYTES_MAX:
            raise SpiffeError(f"the ID is longer than {ID_BYTES_MAX} bytes")

    @classmethod
    def parse(cls, text: str) -> "SpiffeId":
        """The ID that this text spells, exactly; SpiffeError for anything else."""
        if len(text) > ID_BYTES_MAX:  # before anything that looks at each character
            raise SpiffeError(f"the ID is longer than {ID_BYTES_MAX} bytes")
        if not text.startswith(SCHEME):
            if text[: len(SCHEME)].lower() == SCHEME:
                raise SpiffeError(f"{shown(text)}: the scheme must be lower case")
            raise SpiffeError(f"{shown(text)} does not begin with {SCHEME!r}")
        if not text.isascii():
            raise SpiffeError(f"{shown(text)}: only ASCII is allowed")
        if any(character <= " " or character == "\x7f" for character in text):
            raise SpiffeError(f"{shown(text)}: white space and control characters are not allowed")
        for mark, name in (("?", "a query"), ("#", "a fragment")):
            if mark in text:
                raise SpiffeError(f"{shown(text)}: {name} is not allowed")
        trust_domain, slash, rest = text[len(SCHEME) :].partition("/")
        return cls(trust_domain, slash + rest)

    @classmethod
    def for_service(cls, trust_domain: str, name: str) -> "SpiffeId":
        return cls(trust_domain, f"/service/{check_service_name(name)}")

    @property
    def service(self) -> str | None:
        """The name of the service whose workload this is, or None for an ID of another form."""
        head, name = self.path[:9], self.path[9:]
        if head == "/service/" and len(name) <= SERVICE_NAME_BYTES_MAX and _SERVICE_NAME.fullmatch(name):
            return name
        return None

    def __str__(self) -> str:
        return f"{SCHEME}{self.trust_domain}{self.path}"
