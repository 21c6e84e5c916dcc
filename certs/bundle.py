"""Trust bundles: the roots that may vouch for the workloads of one trust domain.

Pure: PEM text in, roots out; no files, no clock (an expired root stays in a bundle, TLS refuses it). Invariants: a
bundle belongs to exactly one trust domain, because pooled roots would let one domain issue for another; it holds at
least one root and never a private key; each root is a self-signed authority with a key of sane size.
"""

from dataclasses import dataclass, field
from datetime import datetime

from .pem import CERTIFICATE, PemError, read_blocks, write_blocks
from .spiffe import check_trust_domain
from .svid import SvidError, check_ca, fingerprint, issued_by, parse_certificate, validity_of

BUNDLE_BYTES_MAX = 256 * 1024
ROOTS_MAX = 32


class BundleError(ValueError):
    """Not a usable trust bundle; says what is wrong and where."""


@dataclass(frozen=True, slots=True)
class Root:
    """One trusted root. Two are the same if their bytes are."""

    der: bytes
    fingerprint: str = field(compare=False)  # SHA-256, hex
    not_after: datetime = field(compare=False)


@dataclass(frozen=True, slots=True)
class BundleDiff:
    """What one bundle has and another has not. Connections that relied on a lost root must end."""

    added: tuple[Root, ...]
    lost: tuple[Root, ...]

    def __bool__(self) -> bool:
        return bool(self.added or self.lost)


@dataclass(frozen=True, slots=True)
class TrustBundle:
    trust_domain: str
    roots: tuple[Root, ...]  # in the order of the file, each once

    @classmethod
    def parse(cls, trust_domain: str, pem: bytes) -> "TrustBundle":
        check_trust_domain(trust_domain)
        try:
            blocks = read_blocks(pem, BUNDLE_BYTES_MAX, ROOTS_MAX)
        except PemError as error:
            raise BundleError(str(error)) from None
        if not blocks:
            raise BundleError("the trust bundle holds no certificate")
        roots: dict[bytes, Root] = {}
        for block in blocks:
            if "PRIVATE KEY" in block.label:
                raise BundleError(
                    f"line {block.line}: the trust bundle holds a private key; bundles are given to everyone. "
                    "Remove it and replace that key"
                )
            if block.label != CERTIFICATE:
                raise BundleError(f"line {block.line}: a trust bundle holds certificates only, not {block.label!r}")
            try:
                roots.setdefault(block.der, _root(block.der, trust_domain))
            except SvidError as error:
                raise BundleError(f"line {block.line}: {error}") from None
        return cls(trust_domain, tuple(roots.values()))

    @property
    def pem(self) -> bytes:
        return write_blocks(CERTIFICATE, (root.der for root in self.roots))

    def diff(self, newer: "TrustBundle") -> BundleDiff:
        """What changes when `newer` takes this bundle's place."""
        if newer.trust_domain != self.trust_domain:
            raise ValueError("bundles of two trust domains cannot take each other's place")
        held, coming = set(self.roots), set(newer.roots)
        return BundleDiff(
            added=tuple(root for root in newer.roots if root not in held),
            lost=tuple(root for root in self.roots if root not in coming),
        )


def _root(der: bytes, trust_domain: str) -> Root:
    certificate = parse_certificate(der)
    check_ca(certificate, trust_domain)
    if not issued_by(certificate, certificate):
        raise SvidError("this authority is not a root (it is not signed by itself); a bundle holds roots only")
    return Root(der, fingerprint(der), validity_of(certificate).not_after)
