"""Putting the ruleset in place, taking it away, looking at it: the one module that runs `nft`.

Synchronous, because the command line must not load Trio; a sidecar calls it in a worker thread, before it serves. Knows
the text that goes in (`ruleset`) and the listing that comes back (`listing`), and nothing of sockets or services.
Invariants: a table that is not ours is never touched unless forced; every failure is an InterceptError that says what
to do; a change happens whole or not at all (one nft transaction).
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from .listing import Installed, State, compare, parse_listing
from .ruleset import FAMILY, TABLE, InterceptConfig, render, render_removal

TIMEOUT_S = 20.0
_OUTPUT_BYTES_MAX = 16 << 20


class Problem(Enum):
    """Why interception is not possible, and what to do about it."""

    NO_NFT = ("no-nft", "install nftables: apt install nftables (or dnf, apk, pacman: the package has the same name)")
    NO_PRIVILEGE = (
        "no-privilege",
        "CAP_NET_ADMIN is needed: run `sudo pillion intercept …`, or in a container add the capability NET_ADMIN",
    )
    NO_KERNEL = (
        "no-kernel-support",
        "the kernel needs nf_tables with NAT for inet (Linux 5.2 or later):"
        " `modprobe -a nft_chain_nat nft_redir nft_fib_inet` on the host, also for a container",
    )
    SYNTAX = (
        "syntax",
        "nftables 0.9.3 or later is needed; if yours is newer, please report this with the message above",
    )
    SELF = ("self-capture", "grant CAP_NET_ADMIN, or run the sidecar as a user of its own and exclude that user")
    FOREIGN = ("foreign-table", "look at it with `nft list table inet pillion`; `--force` replaces or removes it")
    OTHER_OWNER = ("other-owner", "stop that one first, or use `--force` to take its place")
    TIMEOUT = ("timeout", "another program may hold the nftables lock; try again")
    FAILED = ("failed", "the message of nft above is all that is known")

    def __init__(self, word: str, advice: str) -> None:
        self.word = word
        self.advice = advice


class InterceptError(Exception):
    """`problem` is for programs; the text is whole and for people."""

    def __init__(self, problem: Problem, detail: str) -> None:
        super().__init__(f"{detail}\n  help: {problem.advice}")
        self.problem = problem
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Completed:
    """How one run of nft ended."""

    code: int
    stdout: str
    stderr: str


Run = Callable[[tuple[str, ...], str], Completed]
"""(arguments after `nft`, standard input) -> how it ended."""


@dataclass(frozen=True, slots=True)
class Change:
    """What `up` or `repair` found, and whether it changed anything. `strict`: what is now in place asks for it."""

    found: State
    changed: bool
    strict: bool = False


def find_nft() -> str:
    """The program; also where an ordinary user's PATH does not reach."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    program = shutil.which("nft", path=path)
    if program is None:
        raise InterceptError(Problem.NO_NFT, "the program nft was not found")
    return program


def run_nft(arguments: tuple[str, ...], text: str) -> Completed:
    """Run the real nft, with messages in English and a limit of time."""
    command = [find_nft(), *arguments]
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(  # noqa: S603 - a fixed program, fixed arguments, no shell
            command, input=text, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, errors="replace"
        )
    except subprocess.TimeoutExpired:
        raise InterceptError(Problem.TIMEOUT, f"nft did not end within {TIMEOUT_S:g} s") from None
    except OSError as problem:
        raise InterceptError(Problem.NO_NFT, f"{command[0]} could not be run: {problem.strerror}") from None
    return Completed(done.returncode, done.stdout, done.stderr)


def diagnose(stderr: str) -> Problem:
    """What a failed run means, from what nft wrote."""
    text = stderr.lower()
    if "operation not permitted" in text or "permission denied" in text or "must be root" in text:
        return Problem.NO_PRIVILEGE
    if "syntax error" in text or "unknown chain type" in text or "unexpected" in text:
        return Problem.SYNTAX
    if "netlink socket" in text or "not supported" in text or "cache initialization failed" in text:
        return Problem.NO_KERNEL
    # A chain type or expression whose module is missing reads as a missing file.
    if "could not process rule: no such file or directory" in text:
        return Problem.NO_KERNEL
    return Problem.FAILED


def look(run: Run = run_nft) -> Installed | None:
    """What is in place; None if there is no such table."""
    done = run(("-j", "list", "table", FAMILY, TABLE), "")
    if done.code == 0:
        if len(done.stdout) > _OUTPUT_BYTES_MAX:
            raise InterceptError(Problem.FAILED, "nft listed more than 16 MiB under our table's name")
        try:
            return parse_listing(done.stdout)
        except ValueError as problem:
            raise InterceptError(Problem.SYNTAX, f"nft -j printed what cannot be read: {problem}") from None
    if _absent(done.stderr):
        return None
    raise _error("could not list the table", done)


def _absent(stderr: str) -> bool:
    # "Could not process rule: No such file …" is a failure of the kernel's, met in changes only.
    return "Error: No such file or directory" in stderr


def up(config: InterceptConfig, force: bool = False, run: Run = run_nft) -> Change:
    """Put the ruleset in place, whatever of ours was there. Doing it twice is doing it once."""
    installed = look(run)
    state = compare(installed, config)
    if not force:
        _refuse(state, installed)
    _apply(render(config), run)
    return Change(state, state is not State.CURRENT, config.strict)


def repair(config: InterceptConfig, force: bool = False, run: Run = run_nft) -> Change:
    """At a start, perhaps after kill -9: put right what is missing, stale or damaged; leave what serves as it is (its
    counters, and what somebody excluded by hand); refuse what is not ours."""
    installed = look(run)
    state = compare(installed, config)
    if state in (State.CURRENT, State.SUITABLE):
        assert installed is not None and installed.marker is not None
        return Change(state, False, installed.marker.strict)
    if not force:
        _refuse(state, installed)
    _apply(render(config), run)
    return Change(state, True, config.strict)


def down(owner: str | None = None, force: bool = False, run: Run = run_nft) -> bool:
    """Remove the table if it is ours (and, where `owner` is given, of that owner); False if there is none."""
    installed = look(run)
    if installed is None:
        return False
    if not force:
        if installed.marker is None and not installed.empty:
            _refuse(State.FOREIGN, installed)
        if owner is not None and installed.marker is not None and installed.marker.owner != owner:
            _refuse(State.OTHER_OWNER, installed)
    _apply(render_removal(), run)
    return True


def _refuse(state: State, installed: Installed | None) -> None:
    if state is State.FOREIGN:
        raise InterceptError(
            Problem.FOREIGN,
            f"there is a table {FAMILY} {TABLE} that pillion did not make: it carries no marker of ours",
        )
    if state is State.OTHER_OWNER:
        assert installed is not None and installed.marker is not None
        raise InterceptError(
            Problem.OTHER_OWNER, f"interception in this network namespace belongs to {installed.marker.owner!r}"
        )


def _apply(text: str, run: Run) -> None:
    done = run(("-f", "-"), text)
    if done.code != 0:
        raise _error("the ruleset was refused; nothing was changed", done)


def _error(what: str, done: Completed) -> InterceptError:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    said = "; ".join(lines[:3])[:400] or f"exit code {done.code}"
    return InterceptError(diagnose(done.stderr), f"{what}: {said}")
