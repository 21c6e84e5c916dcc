"""Processes and signals of Linux, as `pillion run` needs them: all that lies below one, and an end for all of it.

Must not know sidecars. Both processes of `guarded` have one thread and read signals from a descriptor (signalfd(2)),
never in a handler, so there is no race between a signal and a wait.
"""

import ctypes
import os
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

FORWARDED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)
ENDING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})

_LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_SFD_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
_SI_KERNEL = 0x80
_SIGINFO_BYTES = 128  # struct signalfd_siginfo: signo u32, errno i32, code i32, ...


def prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


@dataclass(frozen=True, slots=True)
class Received:
    """A signal; `by_terminal`: the kernel sent it, and to every process of the foreground group."""

    number: int
    by_terminal: bool


class SignalFile:
    """Signals as something to read. They stay blocked for as long as this process lives."""

    def __init__(self) -> None:
        # What is ignored from the start (nohup, a background job of a plain shell) stays ignored.
        self._numbers = {number for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN}
        self._numbers.add(signal.SIGCHLD)
        self.mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        self.descriptor = -1

    def open(self) -> None:
        """In the process that will read: after a fork each has its own."""
        bits = sum(1 << (number - 1) for number in self._numbers)
        mask = ctypes.create_string_buffer(struct.pack("=Q", bits), 128)
        self.descriptor = _LIBC.signalfd(-1, mask, _SFD_FLAGS)
        if self.descriptor < 0:
            raise OSError(ctypes.get_errno(), "signalfd failed")

    def read(self) -> list[Received]:
        try:
            data = os.read(self.descriptor, _SIGINFO_BYTES * 32)
        except BlockingIOError:
            return []
        found = (struct.unpack_from("=Iii", data, offset) for offset in range(0, len(data), _SIGINFO_BYTES))
        return [Received(number, code == _SI_KERNEL) for number, _, code in found]


def reap() -> dict[int, int]:
    """The exit codes, as a shell counts them, of all children that have ended, by process id."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        code = os.waitstatus_to_exitcode(status)
        ended[pid] = code if code >= 0 else 128 - code


def descendants(of: int, but: int | None = None) -> list[int]:
    """All processes below one, without the subtree of `but`."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()  # the command's name may hold anything
        except OSError:
            continue  # it has just ended
        if fields[0] != b"Z":
            children.setdefault(int(fields[1]), []).append(int(name))
    found: list[int] = []
    open_ends = [of]
    while open_ends:
        below = [pid for pid in children.get(open_ends.pop(), ()) if pid != but]
        found += below
        open_ends += below
    return found


def kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):  # ended meanwhile; or a setuid program of another user
        pass


def kill_descendants() -> None:
    for _ in range(100):  # each pass finds what was forked during the last one
        below = descendants(os.getpid())
        if not below:
            break
        for pid in below:
            kill(pid, signal.SIGKILL)
        time.sleep(0.005)
        reap()


def guarded(work: Callable[[SignalFile], int]) -> int:
    """Run `work` in a forked supervisor and pass on its exit code, its signals, and its end."""
    signals = SignalFile()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    front = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    supervisor = os.fork()
    if supervisor == 0:
        _be_supervisor(work, signals, front)
    signals.open()
    poll = select.poll()
    poll.register(signals.descriptor, select.POLLIN)
    code: int | None = None
    while code is None:
        poll.poll()
        for received in signals.read():
            if received.number == signal.SIGCHLD:
                code = reap().get(supervisor, code)
            elif not received.by_terminal:  # else the supervisor, in the same group, has got it too
                kill(supervisor, received.number)
    kill_descendants()  # none, unless the supervisor was killed
    return code


def _be_supervisor(work: Callable[[SignalFile], int], signals: SignalFile, front: int) -> NoReturn:
    code = 1
    try:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == front:  # else it was killed before we asked to be told
            signals.open()
            code = work(signals)
    except BaseException:
        traceback.print_exc()
        kill_descendants()
    finally:
        os._exit(code)
