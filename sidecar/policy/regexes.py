"""Regular expressions of the policy file: RE2 syntax, matched in linear time, bounded in size.

A pattern is matched against the whole value, on bytes: one byte is one character and `.` is any byte. So there is no
value, however badly encoded, that a pattern cannot look at, and none that slips past a deny for not being UTF-8.
Must not know requests or rules. Invariant: neither pattern nor value can make a test take more than linear time.
"""

from collections.abc import Callable

PATTERN_CHARACTERS_MAX = 1024
PROGRAM_INSTRUCTIONS_MAX = 1000
MEMORY_BYTES_MAX = 1 << 20


def compile_regex(pattern: str) -> Callable[[bytes], bool]:
    """A test for a full match. Raises ValueError where the pattern is malformed or too large."""
    shown = pattern if len(pattern) <= 80 else pattern[:80] + "…"
    if len(pattern) > PATTERN_CHARACTERS_MAX:
        raise ValueError(
            f'regular expression "{shown}" is {len(pattern)} characters long; at most {PATTERN_CHARACTERS_MAX}'
        )
    if not pattern.isascii():
        raise ValueError(f'regular expression "{shown}" is not ASCII: write other characters as bytes, \\xNN')
    import re2  # on first use: most policies have no regular expression

    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.dot_nl = True
    options.never_capture = True
    options.log_errors = False
    options.max_mem = MEMORY_BYTES_MAX
    try:
        compiled = re2.compile(pattern.encode("ascii"), options)
    except re2.error as error:
        raise ValueError(f'regular expression "{shown}": {_text(error)} (RE2 syntax: no look-around, no \\1)') from None
    if compiled.programsize > PROGRAM_INSTRUCTIONS_MAX:
        raise ValueError(
            f'regular expression "{shown}" compiles to {compiled.programsize} instructions; '
            f"at most {PROGRAM_INSTRUCTIONS_MAX}: use smaller repetition counts"
        )
    fullmatch = compiled.fullmatch

    def test(value: bytes) -> bool:
        return fullmatch(value) is not None

    return test


def _text(error: Exception) -> str:
    detail = error.args[0] if error.args else b"malformed"
    return detail.decode("latin-1") if isinstance(detail, bytes) else str(detail)
