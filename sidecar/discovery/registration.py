"""How callers come to know this instance: registration, heartbeats, withdrawal.

A sidecar registers once its application accepts connections; from then on its heartbeat keeps the registration alive,
says how the application is, and what traffic it sees. Must not know the application or the data path. Invariants: a
sidecar that is ending does not register again; health never withdraws a registration; who has nothing to register
sends heartbeats all the same.
"""

import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import trio

from .control_plane import ControlPlane
from .http import Json, Refused, Unreachable, split_address

log = logging.getLogger(__name__)

WITHDRAW_S = 5.0
AGAIN_S = 1.0
SAY_EVERY_S = 10.0
_SINCE_MINOR = {"priority": 1, "evidence": 1, "demand": 1}  # a control plane refuses keys that it does not know


@dataclass(frozen=True, slots=True)
class Instance:
    """What is registered. `host` "": the address by which we reach the control plane."""

    host: str
    port: int
    ports: Mapping[str, int] = field(default_factory=dict)  # the application's own
    labels: Mapping[str, str] = field(default_factory=dict)
    weight: int = 1
    zone: str = ""
    priority: int = 0  # 0 serves first


class Registration:
    """`report` gives what a heartbeat carries beside health."""

    def __init__(self, control: ControlPlane, report: Callable[[], dict[str, Json]]) -> None:
        self.control, self._report = control, report
        self.wanted: Callable[[], Instance] | None = None  # what to register; None: nothing, or not yet
        self.registered = False
        self.healthy, self.reason = True, ""
        self._rouse = trio.Event()
        self._changing = trio.Lock()
        self._said_at = -SAY_EVERY_S

    def begin(self, instance: Callable[[], Instance]) -> None:
        self.wanted = instance
        self._rouse.set()

    def health(self, healthy: bool, reason: str) -> None:
        self.healthy, self.reason = healthy, reason
        self._rouse.set()

    async def run(self) -> None:
        """Heartbeats, for ever; and the registration whenever it is wanted and not there."""
        while True:
            await self.control.until_connected()
            wait_s = self.control.heartbeat_s
            self._rouse = trio.Event()
            try:
                async with self._changing:
                    if self.wanted is not None and not self.registered:
                        await self._register()
                await self._heartbeat()
            except Refused as error:
                wait_s = AGAIN_S
                if error.status == 410:
                    self.registered = False
                    if self.wanted is None:
                        wait_s = self.control.heartbeat_s
                    else:
                        log.info("the control plane does not have our registration: registering again")
                        continue
                else:
                    self._say(f"the control plane refuses it: {error}")
            except (Unreachable, OSError) as error:
                wait_s = AGAIN_S
                self._say(str(error))
            with trio.move_on_after(wait_s):
                await self._rouse.wait()

    def _say(self, problem: str) -> None:
        now = trio.current_time()
        if now - self._said_at >= SAY_EVERY_S:
            self._said_at = now
            what = "not registered yet" if self.wanted is not None and not self.registered else "heartbeat failed"
            log.warning("%s: %s", what, problem)

    async def _register(self) -> None:
        assert self.wanted is not None
        instance = self.wanted()
        host = instance.host or await local_address(self.control.address)
        body = {
            "host": host,
            "port": instance.port,
            "labels": dict(instance.labels),
            "ports": dict(instance.ports),
            "weight": instance.weight,
            "zone": instance.zone,
            "priority": instance.priority,
            "healthy": self.healthy,
            "reason": self.reason,
        }
        await self.control.post("/v1/register", self._understood(body))
        self.registered = True
        log.info("registered as %s at %s port %d", self.control.holdings.own, host, instance.port)

    async def _heartbeat(self) -> None:
        body = {**self._report(), "healthy": self.healthy, "reason": self.reason}
        await self.control.post("/v1/heartbeat", self._understood(body))

    def _understood(self, body: dict[str, Json]) -> dict[str, Json]:
        """What a control plane of another minor version would refuse is left out."""
        minor = self.control.minor
        return {key: value for key, value in body.items() if _SINCE_MINOR.get(key, 0) <= minor}

    async def withdraw(self) -> None:
        """Tell callers to go elsewhere, and wait until they have heard it, 5 s at most."""
        self.wanted = None
        try:
            with trio.fail_after(WITHDRAW_S + 0.5):
                async with self._changing:  # a registration that is under way is waited for
                    if not self.registered:
                        return
                    self.registered = False
                    answer = await self.control.post("/v1/withdraw", {}, timeout_s=WITHDRAW_S + 0.5)
        except (Refused, Unreachable, trio.TooSlowError) as error:
            log.warning("the registration could not be withdrawn (it will lapse): %s", str(error) or "no answer")
        else:
            known = isinstance(answer, dict) and answer.get("acknowledged") is True
            log.info("withdrawn; %s", "every caller knows" if known else "not every caller has said that it knows")


async def local_address(remote: str) -> str:
    """By which of our addresses we reach an address. Raises OSError, Unreachable."""
    host, port = split_address(remote)
    try:
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except socket.gaierror as error:
        raise OSError(errno.EHOSTUNREACH, f"{host} cannot be resolved: {error.strerror}") from None
    family, kind, protocol, _, where = found[0]
    with socket.socket(family, kind, protocol) as sock:
        sock.connect(where)  # a datagram socket: nothing is sent, the kernel only chooses the source address
        return str(sock.getsockname()[0])


async def until_answering(once: Callable[[], Awaitable[str | None]], say: Callable[[str], None]) -> None:
    """Wait until the application accepts connections; say every 10 s that it does not."""
    begun = trio.current_time()
    said_at = begun - SAY_EVERY_S + 3.0  # the first time after a moment: applications take one to start
    while True:
        problem = await once()
        if problem is None:
            return
        now = trio.current_time()
        if now - said_at >= SAY_EVERY_S:
            said_at = now
            say(f"not registered yet: the application does not answer (for {now - begun:.0f} s now): {problem}")
        await trio.sleep(AGAIN_S)
