"""Where a value stands in a policy file.

Every effective value, rule and route knows its place, so that `explain`, refusals and logs can name it.
Must not know what the values mean.
"""

from .records import record


@record(frozen=True, slots=True, order=True)
class Source:
    """A position in a policy file; lines and columns count from 1. An empty file name means built in."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        if not self.file:
            return "built-in"
        return f"{self.file}:{self.line}"


BUILT_IN = Source("")
