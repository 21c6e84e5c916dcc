"""What a sidecar does about interception before it serves: keep out of its own net, and put the ruleset right.

Blocks for as long as `nft` runs: call it in a worker thread. Must not know listeners or services.
"""

import os
from dataclasses import dataclass

from .mark import can_mark, exclusion_problem
from .nft import Change, InterceptError, Problem, Run, repair, run_nft
from .ruleset import InterceptConfig


@dataclass(frozen=True, slots=True)
class Prepared:
    """`mark` is for the sockets that the sidecar dials (None: its user is excluded instead). `change` None: without the
    capability the ruleset can be neither looked at nor repaired."""

    mark: int | None
    change: Change | None

    @property
    def strict(self) -> bool:
        return self.change is not None and self.change.strict

    def __str__(self) -> str:
        if self.change is None:
            return "interception: no CAP_NET_ADMIN, so the ruleset is not checked"
        done = "put right" if self.change.changed else "left as it is"
        return f"interception: the ruleset was {self.change.found.value}, {done}"


def prepare(config: InterceptConfig, run: Run = run_nft) -> Prepared:
    """Raises InterceptError where interception cannot work or would capture the sidecar itself."""
    marks = can_mark(config.mark)
    problem = exclusion_problem(config, marks, os.geteuid(), os.getegid())
    if problem is not None:
        raise InterceptError(Problem.SELF, problem)
    if not marks:
        return Prepared(None, None)
    return Prepared(config.mark, repair(config, run=run))
