"""How the user can call this `pillion` again, for commands that are printed to be typed."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path


def program() -> str:
    """Its name; or its path, where PATH does not lead to this one."""
    beside = Path(sys.executable).with_name("pillion")
    found = shutil.which("pillion")
    if found is not None and (not beside.exists() or os.path.samefile(found, beside)):
        return "pillion"
    return shlex.quote(str(beside)) if beside.exists() else "pillion"


def typed(args: Iterable[str], program: str = "pillion") -> str:
    """A command as one would type it."""
    return " ".join([program, *map(_quoted, args)])


def _quoted(text: str) -> str:
    plain = text.replace(" ", "")
    return f'"{text}"' if plain != text and shlex.quote(plain) == plain else shlex.quote(text)
