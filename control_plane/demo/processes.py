"""The demo's processes: started so that they cannot outlive it, and ended so that nothing of them stays.

Each child is in a session of its own (the terminal's Ctrl-C is for the demo alone) and is killed by the kernel when the
demo dies in whatever way (PR_SET_PDEATHSIG). A keeper, a tiny process that waits on a pipe, removes the demo's
directory once the demo is gone, should it not have done so itself. Must not know what the children are. A child that is
ended on purpose (`Child.kill`) ends nothing else.
Invariant: children are started in the main thread while there is no other (PR_SET_PDEATHSIG goes by the thread that
forked, and a forked child of a process with threads may run no Python).
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import trio

TERM_S = 1.0  # then the second signal, at which a sidecar ends at once
KILL_S = 2.5
LOG_TAIL_LINES = 5

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1

_KEEPER = """
import os, shutil, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
while os.read(0, 1):
    pass
for _ in range(50):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    if not os.path.exists(sys.argv[1]):
        break
    time.sleep(0.1)
"""


class ChildEnded(Exception):
    """A process that should run has ended; the text says which, how, and its last words."""


@dataclass
class Child:
    name: str
    log: Path
    process: "subprocess.Popen[bytes]"
    unwanted: bool = False  # to be ended: its end is nobody's problem

    async def ended(self) -> int:
        """Wait for its end; the exit code."""
        if self.process.returncode is None:
            descriptor = os.pidfd_open(self.process.pid)
            try:
                await trio.lowlevel.wait_readable(descriptor)
            finally:
                os.close(descriptor)
        return self.process.wait()

    async def watch(self) -> None:
        """Wait for its end, and raise ChildEnded unless it was to end."""
        code = await self.ended()
        if not self.unwanted:
            raise ChildEnded(f"{self.name} ended ({_how(code)}){_last_words(self.log)}")

    def kill(self) -> None:
        """SIGKILL, on purpose."""
        self.unwanted = True
        if self.process.poll() is None:
            self.process.kill()

    async def tells(self, reading: int) -> bytes:
        """The line that it writes to a pipe; `reading` is our end of that, and is closed. Raises ChildEnded."""
        told = b""
        try:
            while not told.endswith(b"\n"):
                await trio.lowlevel.wait_readable(reading)
                data = os.read(reading, 4096)
                if not data:
                    await self.watch()
                told += data
        finally:
            os.close(reading)
        return told


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has been run."""

    code: int
    out: str
    said: str  # on stderr


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _last_words(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    except OSError:
        return ""
    return ":\n" + "\n".join(f"  {line}" for line in lines) if lines else ""


def _reap(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process.pid, 0)
    if process.returncode is None:
        process.returncode = -signal.SIGKILL


@dataclass
class Children:
    """All processes of one demo, and its directory."""

    directory: Path
    children: list[Child] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._pid = os.getpid()
        reading, self._alive = os.pipe2(os.O_CLOEXEC)
        try:
            self._keeper = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-S", "-c", _KEEPER, str(self.directory)],
                stdin=reading,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        finally:
            os.close(reading)

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], pass_fds: Sequence[int] = ()
    ) -> Child:
        """What is to run for as long as the demo; its output goes to a log."""
        log = self.directory / "log" / f"{name.replace(' ', '-')}.log"
        with log.open("ab") as output:
            return self._start(name, log, command, environment, (output.fileno(), output.fileno()), pass_fds)

    async def run(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> Done:
        """Run a command to its end, in the demo's directory. Cancelled, it is killed."""
        outputs = [os.pipe2(os.O_CLOEXEC) for _ in range(2)]
        readings = [trio.lowlevel.FdStream(reading) for reading, _ in outputs]
        texts = ["", ""]

        async def read(number: int) -> None:
            content = b"".join([bytes(data) async for data in readings[number]])
            texts[number] = content.decode("utf-8", "replace")

        try:
            child = self._start(
                name, Path(os.devnull), command, environment, (outputs[0][1], outputs[1][1]), (), self.directory
            )
        finally:
            for _, writing in outputs:
                os.close(writing)
        try:
            async with trio.open_nursery() as nursery:
                for number in range(2):
                    nursery.start_soon(read, number)
                code = await child.ended()
        finally:
            child.kill()
            child.process.wait()
            self.children.remove(child)
            for stream in readings:
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(stream)
        return Done(code, *texts)

    def _start(
        self,
        name: str,
        log: Path,
        command: Sequence[str],
        environment: Mapping[str, str],
        outputs: tuple[int, int],
        pass_fds: Sequence[int],
        directory: Path | None = None,
    ) -> Child:
        process = subprocess.Popen(  # noqa: S603
            command,
            env=environment,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=outputs[0],
            stderr=outputs[1],
            start_new_session=True,
            pass_fds=pass_fds,
            preexec_fn=self._die_with_parent,
        )
        child = Child(name, log, process)
        self.children.append(child)
        return child

    def _die_with_parent(self) -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != self._pid:
            os._exit(1)

    async def end(self) -> None:
        """Ask all to end, make them, and remove what is left. At most KILL_S seconds."""
        with trio.CancelScope(shield=True):
            self._signal(signal.SIGTERM)
            if not await self._gone_within(TERM_S):
                self._signal(signal.SIGTERM)
                await self._gone_within(KILL_S - TERM_S)
        self.kill()

    def kill(self) -> None:
        """End everything now. Safe to call in a signal handler, and twice."""
        processes = [child.process for child in self.children if child.process.returncode is None]
        for process in processes:  # without Popen's methods: their lock may be held by what a signal interrupted
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            _reap(process)
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1
            _reap(self._keeper)

    def _signal(self, number: int) -> None:
        for child in self.children:
            if child.process.poll() is None:
                child.process.send_signal(number)

    async def _gone_within(self, seconds: float) -> bool:
        with trio.move_on_after(seconds):
            while any(child.process.poll() is None for child in self.children):  # noqa: ASYNC110
                await trio.sleep(0.02)
            return True
        return False


class Ending:
    """What SIGINT, SIGTERM and SIGHUP do: the first asks the demo to end, the second ends it at once.

    Plain handlers rather than tasks, so that they also act while the terminal is stopped and a write to it blocks.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.children: Children | None = None
        self._ask: tuple[trio.lowlevel.TrioToken, trio.CancelScope] | None = None
        self._pid = os.getpid()

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def cancels(self, scope: trio.CancelScope) -> None:
        self._ask = trio.lowlevel.current_trio_token(), scope
        if self.number is not None:
            scope.cancel()

    @property
    def exit_code(self) -> int:
        return 128 + (self.number or signal.SIGINT)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            os._exit(1)  # a child that has not become its own program yet
        if self.number is None:
            self.number = number
            if self._ask is not None:
                token, scope = self._ask
                with contextlib.suppress(trio.RunFinishedError):
                    token.run_sync_soon(scope.cancel)
            return
        if self.children is not None:
            self.children.kill()
        os._exit(self.exit_code)
