"""The demo's policy files and the edits that its story makes to them.

Files of text, edited as a person would, so that comments and line numbers are those of a real file. Must not know
processes, nor how a policy is applied. Invariants: a file is replaced whole (write aside, rename); an edit that does
not fit what the file says now changes nothing and says so; what is written has been checked as a whole policy before.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sidecar.model.load import load_texts
from sidecar.model.problems import render


class EditError(Exception):
    """An edit that cannot be made; the text says why."""


@dataclass(frozen=True, slots=True)
class Edit:
    """In one file, one piece of text in place of another."""

    file: str
    old: str
    new: str


MESH = """\
version: 1
defaults:
  timeout: {total: 5s}
  authz: {default: deny}
"""

CUSTOMERS = """\
version: 1
services:
  customers:                        # the load generator
    calls: {web: {}}
"""

WEB = """\
version: 1
services:
  web:
    ports: {http: {port: 8000, protocol: http}}   # no addresses: who joins as web registers its own
    calls: {reviews: {}, orders: {}}
    authz:
      allow:
        - {from: [customers]}
"""

ORDERS = """\
version: 1
services:
  orders:
    ports: {http: {port: 8000, protocol: http}}
    calls: {ratings: {}}
    authz:
      allow:
        - {from: [web]}
"""

RATINGS = """\
version: 1
services:
  ratings:
    ports: {http: {port: 8000, protocol: http}}
    authz:
      allow:
        - {from: [reviews, orders]}
"""

REVIEWS = """\
version: 1
services:
  reviews:
    ports: {http: {port: 8000, protocol: http}}
    calls: {ratings: {}}
    versions:                                     # by the labels with which instances register
      v1: {labels: {version: "1"}}
      v2: {labels: {version: "2"}}
    authz:
      allow:
        - {from: [web]}
    circuit_breaker: {consecutive_failures: 30}   # v2 is to be seen failing, not to be shut off
    retry: {max_retries: 0}
    routes:
      - name: canary
        to: {v1: 70, v2: 30}
"""

FILES = {
    "customers.yaml": CUSTOMERS,
    "mesh.yaml": MESH,
    "orders.yaml": ORDERS,
    "ratings.yaml": RATINGS,
    "reviews.yaml": REVIEWS,
    "web.yaml": WEB,
}

RETRIES = Edit(
    "reviews.yaml",
    "    retry: {max_retries: 0}\n",
    "    retry: {max_retries: 3, when: [connect-error, reset, 503]}\n",
)
CANARY = Edit("reviews.yaml", "to: {v1: 70, v2: 30}", "to: {v1: 90, v2: 10}")
DENIAL = Edit("ratings.yaml", "- {from: [reviews, orders]}", "- {from: [reviews]}")
FILTER = Edit(
    "reviews.yaml",
    "    routes:\n",
    "    filters:\n      - {use: shop_filters:AddTenant, with: {header: x-tenant}}\n    routes:\n",
)


class PolicyDirectory:
    """The folder of policy files that the story edits, and then applies."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self) -> None:
        """The first policy."""
        self.path.mkdir()
        self._write(FILES)

    def edit(self, edit: Edit) -> list[str]:
        """Make an edit; the lines that changed."""
        path = self.path / edit.file
        try:
            before = path.read_text()
        except OSError as error:
            raise EditError(f"{path}: {error.strerror}") from None
        if before.count(edit.old) != 1:
            raise EditError(
                f"{path} does not say what it said at the start, so it cannot be edited: {edit.old.strip()}"
            )
        after = before.replace(edit.old, edit.new)
        self._write({edit.file: after})
        return changed_lines(before, after)

    def _write(self, texts: Mapping[str, str]) -> None:
        present = {str(path): path.read_text() for path in sorted(self.path.glob("*.yaml"))}
        loaded = load_texts(present | {str(self.path / name): text for name, text in texts.items()})
        if loaded.snapshot is None:
            raise EditError(render(loaded.problems, loaded.texts))
        for name, text in texts.items():
            aside = self.path / f".{name}.new"
            aside.write_text(text)
            os.replace(aside, self.path / name)


def changed_lines(before: str, after: str) -> list[str]:
    """`-` and `+` lines, without the rest."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return [line for line in lines if line[:1] in "+-" and line[:3] not in ("---", "+++")]
