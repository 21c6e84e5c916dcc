"""The key by which hashing balancers choose: 64 bits made of a header, a cookie, the caller or its address.

Compiled once for each service. The hash is the same in every sidecar, so that all callers of a service agree where a
key belongs. Must not know balancers. Invariant: a request that has nothing to hash has the key None.
"""

from collections.abc import Callable, Iterable
from hashlib import blake2b

Headers = Iterable[tuple[bytes, bytes]]
KeyOf = Callable[[Headers, str, str], int | None]
"""(header fields with lower-case names, the caller's service or SPIFFE ID, its address) → key."""


def hash64(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def compile_key(by: str) -> KeyOf:
    """`by` is header:NAME, cookie:NAME, caller or address."""
    kind, _, name = by.partition(":")
    if kind == "header":
        return _by_header(name.lower().encode())
    if kind == "cookie":
        return _by_cookie(name.encode())
    if kind == "caller":
        return lambda headers, caller, address: hash64(caller.encode()) if caller else None
    if kind == "address":
        return lambda headers, caller, address: hash64(address.encode()) if address else None
    raise ValueError(f'"{by}" is not a key: header:NAME, cookie:NAME, caller or address')


def _by_header(wanted: bytes) -> KeyOf:
    def key(headers: Headers, caller: str, address: str) -> int | None:
        values = [value for name, value in headers if name == wanted]
        return hash64(b",".join(values)) if values else None  # of one sent twice, all values

    return key


def _by_cookie(wanted: bytes) -> KeyOf:
    prefix = wanted + b"="

    def key(headers: Headers, caller: str, address: str) -> int | None:
        for name, value in headers:
            if name == b"cookie" and prefix in value:
                for pair in value.split(b";"):
                    crumb = pair.strip(b" \t")
                    if crumb.startswith(prefix):
                        return hash64(crumb[len(prefix) :])
        return None

    return key
