"""Which build of pillion this is: pure Python, or with the data path compiled (docs/performance.md).

Both are made of the same sources and behave alike. Light: the command line asks it too.
"""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

PURE, COMPILED = "pure Python", "compiled"


def build() -> str:
    """PURE or COMPILED, in words for people."""
    module = Path(__file__).parent / "policy" / "exchange"  # one of those that are compiled together
    found = any(module.with_name(module.name + suffix).exists() for suffix in EXTENSION_SUFFIXES)
    return COMPILED if found else PURE
