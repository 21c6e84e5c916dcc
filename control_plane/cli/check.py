"""`pillion check`: what is wrong, with cause and remedy; first here, then at the control plane.

The local checks come first, and say as much as can be said when nothing answers. Must not judge the mesh: the control
plane's own checks are shown as they come. Exit codes: 0 all is well, 1 something is wrong, 3 no control plane answered.
"""

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from . import EXIT_FAILED, EXIT_UNREACHABLE
from .output import BAD, FAINT, GOOD, STRONG, colors, echo_json, marks, note, output_option, paint, plural, span
from .target import Asked, NotConfigured, Target, context_path, remote_options, resolve

if TYPE_CHECKING:
    from .remote import Remote

LOCAL, REACH = "this machine", "control plane"
CLOCK_SKEW_MAX_S = 30.0
EXPIRES_SOON_S = 3 * 86400
INTERVAL_S = 1.0

Json = Any


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `level`: ok, warning or failed; a warning does not change the exit code."""

    category: str
    name: str
    level: str
    cause: str = ""
    remedy: str = ""

    def to_json(self) -> dict[str, Json]:
        return {
            "category": self.category,
            "name": self.name,
            "ok": self.level != "failed",
            "warning": self.level == "warning",
            "cause": self.cause,
            "remedy": self.remedy,
        }


@dataclass(frozen=True, slots=True)
class Report:
    checks: tuple[Check, ...]
    reached: bool

    @property
    def code(self) -> int:
        if not self.reached:
            return EXIT_UNREACHABLE
        return EXIT_FAILED if any(check.level == "failed" for check in self.checks) else 0


@click.command()
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(0, 86400),
    default=0.0,
    metavar="SECONDS",
    help="Go on for so long until all is well.",
)
@output_option("text", "json")
@remote_options
def check(wait_s: float, output: str, asked: Asked) -> int:
    """Find what is wrong, with cause and remedy.

    Looks at this machine first (what is configured, the clock, whether the control plane can be reached), then asks the
    control plane for its own checks.

    \b
    Ends with 0 if all is well, 1 if something is wrong, 3 if no control plane could be reached.
    """
    end = time.monotonic() + wait_s
    told = ""
    while True:
        report = look(asked)
        if not report.code or time.monotonic() >= end:
            break
        failed = [each for each in report.checks if each.level == "failed"]
        words = "; ".join(each.name for each in failed[:3])
        if words != told:
            note(f"waiting ({span(end - time.monotonic())} left): {words}")
            told = words
        time.sleep(min(INTERVAL_S, max(0.0, end - time.monotonic())))
    if output == "json":
        echo_json(
            {"ok": not report.code, "reached": report.reached, "checks": [each.to_json() for each in report.checks]}
        )
    else:
        click.echo(render(report, colors(sys.stdout)), color=True)
    return report.code


def look(asked: Asked) -> Report:
    """Everything once."""
    checks: list[Check] = []
    try:
        target = resolve(asked, os.environ)
    except (NotConfigured, click.UsageError) as error:
        cause, _, remedy = error.message.partition("\nNext: ")
        checks.append(Check(LOCAL, "a control plane is known here", "failed", cause, remedy or _remedy_of(error)))
        return Report(tuple(checks), False)
    checks += _of_target(target)
    from .remote import ApiError, Remote, Unreachable

    with Remote(target, timeout_s=10.0) as remote:
        try:
            who = remote.get("/v1/whoami")
            found = remote.get("/v1/check").get("checks") or []
        except Unreachable as error:
            checks += _clock(remote)
            checks += [_unreachable(address, reason, target) for address, reason in error.tried]
            return Report(tuple(checks), False)
        except ApiError as error:
            checks += _clock(remote)
            checks.append(Check(REACH, f"https://{remote.address} answers", "ok"))
            checks.append(Check(REACH, "it takes our word for who we are", "failed", error.message, error.help))
            return Report(tuple(checks), error.exit_code != EXIT_UNREACHABLE)
        checks += _clock(remote)
        checks.append(Check(REACH, f"https://{remote.address} answers, and is the one that is known here", "ok"))
        checks.append(_who(who))
        checks += [_theirs(each) for each in found if isinstance(each, dict)]
    return Report(tuple(checks), True)


def _who(who: Mapping[str, Json]) -> Check:
    name = f"we are {who.get('name')} there ({_role(who)})"
    expires = who.get("expires")
    left = expires - time.time() if isinstance(expires, int | float) else EXPIRES_SOON_S
    if left >= EXPIRES_SOON_S:
        return Check(REACH, name, "ok")
    remedy = "have an admin make a new one: pillion token create --operator NAME --role ROLE; then pillion login"
    return Check(REACH, name, "warning", f"our token ends in {span(left)}", remedy)


def _role(who: Mapping[str, Json]) -> str:
    teams = ", ".join(who.get("teams") or ())
    return f"{who.get('role')}{f' of {teams}' if teams else ''}"


def _remedy_of(error: click.ClickException) -> str:
    text = error.message
    for word in ("run: ", "write "):
        if word in text:
            return text[text.rindex(word) :]
    return "pillion login --token-file FILE"


def _of_target(target: Target) -> list[Check]:
    place = str(context_path(os.environ))
    checks = [
        Check(
            LOCAL,
            f"the control plane is known from {'the context file ' if target.where == place else ''}{target.where}",
            "ok",
        )
    ]
    if target.identity is not None:
        left = target.identity.not_after.timestamp() - time.time()
        name = f"the operator's certificate ({target.identity.spiffe_id}) is good for {span(left)}"
        soon = left < EXPIRES_SOON_S
        checks.append(
            Check(
                LOCAL,
                name,
                "warning" if soon else "ok",
                "it ends soon" if soon else "",
                "pillion login --cert" if soon else "",
            )
        )
    elif target.whom == "--token":
        checks.append(
            Check(LOCAL, "there is a token", "warning", "flags can be seen by every user of this machine",
                  "use --token-file or pillion login")
        )  # fmt: skip
    else:
        checks.append(Check(LOCAL, "there is a token, and it is whole", "ok"))
    return checks


def _clock(remote: "Remote") -> list[Check]:
    """Our clock against the server's, where anything at all came from there."""
    if remote.date is None:
        return []
    from email.utils import parsedate_to_datetime

    try:
        skew = time.time() - parsedate_to_datetime(remote.date).timestamp()
    except ValueError:
        return []
    if abs(skew) <= CLOCK_SKEW_MAX_S:
        return [Check(LOCAL, "the clock agrees with the control plane's", "ok")]
    word = "ahead of" if skew > 0 else "behind"
    return [
        Check(
            LOCAL,
            "the clock agrees with the control plane's",
            "failed",
            f"it is {span(abs(skew))} {word} it; certificates and tokens then seem to have ended, or not begun",
            "set the clock of the one that is wrong, and keep it right with NTP",
        )
    ]


def _unreachable(address: str, reason: str, target: Target) -> Check:
    return Check(REACH, f"https://{address} answers", "failed", reason, _remedy(reason, target))


def _remedy(reason: str, target: Target) -> str:
    if "another control plane" in reason or "log in again" in reason:
        return "pillion login --token-file FILE, with a token of the control plane that runs now"
    if "clock" in reason:
        return "set this machine's clock"
    if "certificate" in reason or "expected spiffe" in reason:
        return "look who listens there: it is not the control plane that is known here"
    if "TLS" in reason:
        return "name the join and operator listener of the control plane (port 15011 unless it was changed)"
    if "refused" in reason:
        return "start it: pillion up on a developer's machine, pillion control-plane elsewhere; or correct the address"
    return f"see whether it runs, and whether this machine can reach it (the address is from {target.where})"


def _theirs(data: Mapping[str, Json]) -> Check:
    level = "ok" if data.get("ok") else "failed"
    if data.get("ok") and data.get("warning"):
        level = "warning"
    return Check(
        str(data.get("category") or "mesh"),
        str(data.get("name") or ""),
        level,
        str(data.get("cause") or ""),
        str(data.get("remedy") or ""),
    )


def render(report: Report, color: bool) -> str:
    good, bad = marks()
    signs = {"ok": paint(good, GOOD, color), "warning": paint("!", "33", color), "failed": paint(bad, BAD, color)}
    lines: list[str] = []
    for category in dict.fromkeys(each.category for each in report.checks):
        lines += ["", paint(category, STRONG, color)] if lines else [paint(category, STRONG, color)]
        for each in report.checks:
            if each.category != category:
                continue
            lines.append(f"  {signs[each.level]} {each.name}")
            if each.level != "ok":
                lines += _explained("cause", each.cause, color) + _explained("remedy", each.remedy, color)
    failed = sum(1 for each in report.checks if each.level == "failed")
    warned = sum(1 for each in report.checks if each.level == "warning")
    ending = f"{plural(failed, 'thing')} wrong" if failed else "all is well"
    if not report.reached:
        ending += "; the control plane's own checks could not be asked for"
    if warned:
        ending += f", {plural(warned, 'warning')}"
    return "\n".join([*lines, "", paint(ending, BAD if failed else GOOD, color)])


def _explained(word: str, text: str, color: bool) -> list[str]:
    if not text:
        return []
    first, *rest = text.splitlines()
    return [f"      {paint(f'{word:<7}', FAINT, color)} {first}", *(f"              {line.strip()}" for line in rest)]
