"""Keeps a sidecar and an application together: both live, or both end, and nothing of theirs is left behind.

    front ──fork──▶ supervisor ──▶ sidecar (in a session of its own: the terminal's signals are not for it)
                               └─▶ application (in the terminal's foreground group, with its stdin, stdout, stderr)

The front is the process that the user sees; the supervisor does the work. Each is a "child subreaper": what loses its
parent below it becomes its child. So either of them can be killed with SIGKILL, and the other finds and ends every
process that remains, grandchildren of the application included.

Must not know what a sidecar is beyond its command line and the descriptor on which it says that it is ready.
Invariants: a signal reaches the application once (the terminal sends to the whole foreground group by itself, so those
are not forwarded again); every wait has an end; a stopped terminal on stderr does not hold up signals.
"""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .log_pipe import LogPipe
from .processes import ENDING, PR_SET_PDEATHSIG, Received, SignalFile, descendants, kill, kill_descendants, prctl, reap

READY_WITHIN_S = 30.0
READY_BYTES_MAX = 64 * 1024
DRAIN_S = 25.0  # what a sidecar may take to let its connections finish
APP_END_S = 10.0  # for an application that must end because its sidecar has
ORPHANED_S = 5.0  # for everything, once the front is gone
LEFTOVER_S = 5.0  # for processes that the application left behind

EXIT_FAILED = 1
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127


@dataclass(frozen=True, slots=True)
class Plan:
    """What to start. The sidecar also gets `--ready-fd`, and the application its environment once the sidecar has told
    there where it listens."""

    sidecar: Sequence[str]
    application: Sequence[str]
    application_environment: Callable[[Mapping[str, str]], Mapping[str, str]]
    sidecar_environment: Mapping[str, str] | None = None  # None: as ours
    sidecar_log: str | None = None  # a file's path; None: stderr, each line with a prefix


class Supervisor:
    def __init__(self, plan: Plan, signals: SignalFile) -> None:
        self._plan = plan
        self._signals = signals
        self._front = os.getppid()
        self._pid = os.getpid()
        self._sidecar = 0
        self._application = 0
        self._codes: dict[int, int] = {}  # of those two, once they have ended
        self._ready: int | None = None  # where the sidecar tells that it is ready, until it has
        self._addresses: dict[str, str] = {}
        self._log = LogPipe()

    def run(self) -> int:
        """Start both, keep both, end both; the exit code for the command line."""
        try:
            self._start_sidecar()
        except OSError as error:
            self._say(f"cannot start the sidecar: {error}")
            return EXIT_FAILED
        code = self._await_ready()
        if code is None:
            code = self._start_application()
        if code is None:
            code = self._keep_both()
        self._end_all()
        return code

    # Starting

    def _start_sidecar(self) -> None:
        if self._plan.sidecar_log is None:
            output = self._log.open()
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            output = os.open(self._plan.sidecar_log, flags, 0o640)
        self._ready, telling = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._sidecar = self._spawn(
                [*self._plan.sidecar, "--ready-fd", str(telling)],
                self._plan.sidecar_environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=(telling,),
            )
        finally:
            os.close(output)
            os.close(telling)

    def _spawn(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        start_new_session: bool = False,
        pass_fds: Sequence[int] = (),
    ) -> int:
        def in_child() -> None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != self._pid:
                os._exit(EXIT_FAILED)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._signals.mask_before)

        process = subprocess.Popen(  # noqa: S603 - running what the user names is the purpose
            command,
            env=environment,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=start_new_session,
            pass_fds=pass_fds,
            preexec_fn=in_child,  # safe: this process has one thread
        )
        process.returncode = 0  # it is reaped here, with all others, and never through this object
        return process.pid

    def _await_ready(self) -> int | None:
        """None once the sidecar is ready, else the exit code to end with."""
        deadline = time.monotonic() + READY_WITHIN_S
        told = b""
        while not told.endswith(b"\n"):
            for received in self._turn(max(0.0, deadline - time.monotonic())):
                if received.number in ENDING:
                    return 128 + received.number
            code = self._codes.get(self._sidecar)
            if code is not None:
                self._log.finish()
                self._say(f"the sidecar ended before it was ready ({_ending(code)}); {self._name()} was not started")
                return code if code in (1, 2) else EXIT_FAILED
            if time.monotonic() >= deadline:
                self._say(f"the sidecar was not ready within {READY_WITHIN_S:.0f} s; {self._name()} was not started")
                return EXIT_FAILED
            told += self._read_ready()
        self._addresses = json.loads(told)
        return None

    def _read_ready(self) -> bytes:
        """More of the line on which the sidecar tells its addresses."""
        if self._ready is None:
            return b""
        try:
            data = os.read(self._ready, READY_BYTES_MAX)
        except BlockingIOError:
            return b""
        if not data or data.endswith(b"\n"):  # told, or closed untold: then its end, or the time, decides
            os.close(self._ready)
            self._ready = None
        return data

    def _start_application(self) -> int | None:
        environment = self._plan.application_environment(self._addresses)
        try:
            self._application = self._spawn(self._plan.application, environment)
        except OSError as error:
            code, text = start_problem(self._plan.application[0], error)
            self._say(text)
            return code
        return None

    # Keeping

    def _keep_both(self) -> int:
        kill_at: float | None = None
        sidecar_ended = False
        while self._application not in self._codes:
            for received in self._turn(None if kill_at is None else max(0.0, kill_at - time.monotonic())):
                self._forward(received)
            if self._sidecar in self._codes and not sidecar_ended:
                sidecar_ended = True
                self._log.finish()
                self._say(
                    f"the sidecar ended ({_ending(self._codes[self._sidecar])}) before {self._name()} did; "
                    f"ending {self._name()} too, since its traffic would go nowhere"
                )
                self._kill_application(signal.SIGTERM)
                kill_at = time.monotonic() + APP_END_S
            if kill_at is None and os.getppid() != self._front:
                kill_at = time.monotonic() + ORPHANED_S  # its SIGTERM has been forwarded like any other
            if kill_at is not None and time.monotonic() >= kill_at:
                self._kill_application(signal.SIGKILL)
                kill_at = time.monotonic() + 1.0
        return EXIT_FAILED if sidecar_ended else self._codes[self._application]

    def _forward(self, received: Received) -> None:
        if received.by_terminal:
            try:
                if os.getpgid(self._application) == os.getpgrp():
                    return  # it has got it from the terminal
            except ProcessLookupError:
                return
        self._kill_application(received.number)

    def _kill_application(self, number: int) -> None:
        if self._application not in self._codes:
            kill(self._application, number)

    # Ending

    def _end_all(self) -> None:
        """The sidecar lets its connections finish; what the application left behind is asked to go, then made to."""
        begun = time.monotonic()
        asked: set[int] = set()
        had_ended = self._sidecar in self._codes
        self._kill_sidecar(signal.SIGTERM)
        while True:
            now = time.monotonic()
            limit_s = DRAIN_S if os.getppid() == self._front else ORPHANED_S
            left = descendants(self._pid, but=self._sidecar)
            for pid in set(left) - asked:
                kill(pid, signal.SIGTERM)
                kill(pid, signal.SIGCONT)
            asked.update(left)
            running = self._sidecar not in self._codes
            if not running and (not left or now >= begun + LEFTOVER_S):
                break
            if now >= begun + limit_s:
                if running:
                    self._say(f"the sidecar was still draining after {limit_s:.0f} s and was killed")
                break
            for received in self._turn(0.02 if left else 0.25):
                if received.number in ENDING:
                    self._kill_sidecar(signal.SIGTERM)  # a second one: it ends at once
        code = self._codes.get(self._sidecar, 0)
        if code and not had_ended:
            self._say(f"the sidecar did not drain well ({_ending(code)})")
        kill_descendants()
        self._log.finish()

    def _kill_sidecar(self, number: int) -> None:
        if self._sidecar not in self._codes:
            kill(self._sidecar, number)

    # Both

    def _turn(self, timeout_s: float | None) -> list[Received]:
        """Wait for something to happen, at most so long; reap and pass output on; the signals that came."""
        poll = select.poll()
        poll.register(self._signals.descriptor, select.POLLIN)
        if self._ready is not None:
            poll.register(self._ready, select.POLLIN)
        self._log.register(poll)
        poll.poll(None if timeout_s is None else timeout_s * 1000)
        self._log.move()
        others: list[Received] = []
        for received in self._signals.read():
            if received.number != signal.SIGCHLD:
                others.append(received)
        ended = reap()
        self._codes.update({pid: code for pid, code in ended.items() if pid in (self._sidecar, self._application)})
        return others

    def _name(self) -> str:
        return os.path.basename(self._plan.application[0])

    def _say(self, text: str) -> None:
        self._log.say(f"pillion run: {text}\n".encode())


def start_problem(program: str, error: OSError) -> tuple[int, str]:
    """The exit code and the words for a command that could not be started, as shells have them."""
    if isinstance(error, FileNotFoundError):
        return EXIT_NOT_FOUND, f"{program}: command not found (or its interpreter)"
    if isinstance(error, PermissionError):
        return EXIT_NOT_EXECUTABLE, f"{program}: permission denied; is it executable?"
    return EXIT_NOT_EXECUTABLE, f"{program}: cannot be executed: {error.strerror}"


def _ending(code: int) -> str:
    if code <= 128:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(code - 128).name}"
    except ValueError:
        return f"exit code {code}"
