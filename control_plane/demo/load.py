"""The load generator: customers who look at products and orders, through their own sidecar, at a steady rate.

Keeps what the answers said of identities, denials and filters. Must not know the story. Invariants: at most WORKERS
requests are in flight; what is kept is bounded.
"""

import json
import re
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import trio

from .client import CallError, Client

WORKERS = 12
ORDERS_EVERY = 4
KEPT_PROBLEMS = 20

_URI = re.compile(r"URI=([^;,]+)")


@dataclass
class Heard:
    """What the applications said, seen from the end of the line."""

    answers: Counter[int] = field(default_factory=Counter)  # by status; 0: none
    callers: Counter[tuple[str, str]] = field(default_factory=Counter)  # service, identity that it saw calling
    tenants: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # service, version, what the filter set
    filtered: Counter[str] = field(default_factory=Counter)  # service whose answer a filter has marked
    stars: Counter[tuple[str, bool]] = field(default_factory=Counter)  # service, whether ratings answered it
    refusals: Counter[tuple[str, int, str]] = field(default_factory=Counter)  # service, status, reason: of ratings
    problems: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_PROBLEMS))

    @property
    def requests(self) -> int:
        return self.answers.total()

    def take(self, answer: dict[str, Any]) -> None:
        """One application's answer, and those within it."""
        service = str(answer.get("service", ""))
        found = _URI.search(str(answer.get("caller", "")))
        self.callers[service, found[1] if found else ""] += 1
        self.tenants[service, str(answer.get("version", "")), str(answer.get("tenant", ""))] += 1
        if "filtered_by" in answer:
            self.filtered[service] += 1
        if "ratings" in answer:
            self.stars[service, answer["ratings"] is not None] += 1
        refused = answer.get("ratings_refused")
        if isinstance(refused, dict):
            self.refusals[service, int(refused.get("status", 0)), str(refused.get("reason", ""))] += 1
        for below in ("reviews", "orders", "ratings"):
            if isinstance(answer.get(below), dict) and "service" in answer[below]:
                self.take(answer[below])


class Load:
    """`outbound` is the address of the customers' sidecar."""

    def __init__(self, outbound: str, rate: float) -> None:
        self.rate = rate
        self.heard = Heard()
        self._outbound = outbound
        self._number = 0
        self._due = 0.0

    async def run(self) -> None:
        self._due = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(WORKERS):
                nursery.start_soon(self._work)

    async def _work(self) -> None:
        client = Client(self._outbound, host="web")
        try:
            while True:
                # Late requests are not made up for: a busy machine gets less load, not a burst.
                due = self._due = max(self._due + 1 / self.rate, trio.current_time() - 0.1)
                await trio.sleep_until(due)
                self._number += 1
                kind = "orders" if self._number % ORDERS_EVERY == 0 else "product"
                await self._ask(client, f"/{kind}/{self._number}")
        finally:
            with trio.CancelScope(shield=True):
                await client.aclose()

    async def _ask(self, client: Client, target: str) -> None:
        try:
            answer = await client.get(target)
            said = json.loads(answer.body)
        except (CallError, ValueError) as error:
            self.heard.answers[0] += 1
            self.heard.problems.append(f"GET {target}: {error}")
            await trio.sleep(0.1)
            return
        self.heard.answers[answer.status] += 1
        if isinstance(said, dict):
            self.heard.take(said)
