"""Lengths of time as people write them on the command line: `90s`, `30m`, `24h`, `7d`."""

import re
from datetime import timedelta

import click

_DURATION = re.compile(r"(\d{1,6})(s|m|h|d)", re.ASCII)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_duration(text: str, what: str | None = None) -> timedelta:
    """`what`: the option, where click does not know it by itself."""
    match = _DURATION.fullmatch(text)
    if not match:
        raise click.BadParameter(
            f"{text!r} is not a duration; write a number and a unit, such as 90s, 30m, 24h or 7d", param_hint=what
        )
    return timedelta(**{_UNITS[match[2]]: int(match[1])})
