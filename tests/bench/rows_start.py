"""From exec to the first answer, and memory then: with one service, and with a large mesh."""

import time
from collections.abc import Sequence

from . import contenders, envoy, load, policy
from .context import MB, Context, in_turn, unfinished
from .exchange import answers
from .stage import COMPILED, ENVOY, Process, free_port, until
from .table import OURS, OURS_COMPILED, Bar, Group, Row

MANY_SERVICES, ENDPOINTS_EACH = 1000, 10


def start(context: Context) -> list[Group]:
    groups = []
    for services in (1, MANY_SERVICES):
        if context.wants(f"start.{services}"):
            groups.append(_start(context, services))
    return groups


def _start(context: Context, services: int) -> Group:
    many = services > 1
    words = f"{services:,} services with {ENDPOINTS_EACH} endpoints each".replace(",", "\N{NO-BREAK SPACE}")
    rivals = ("Envoy",)
    soon = Bar(800.0 if many else 300.0)
    small = (Bar(0.5, rivals),) if many else ()
    ready = Row(f"start.{services}.ready", "from exec to the first answer", "ms", 0, bars=(soon,), rivals=rivals)
    memory = Row(f"start.{services}.memory", "resident memory then", "MB", bars=small, rivals=rivals)
    reachable = contenders.plain_service(context.backend.port)
    all_services = policy.many_services(reachable, services, ENDPOINTS_EACH)
    commands = {OURS: _pillion_command(context, all_services)}
    if context.has(OURS_COMPILED, COMPILED):
        commands[OURS_COMPILED] = _pillion_command(context, all_services, OURS_COMPILED)
    if context.has("Envoy", ENVOY):
        commands["Envoy"] = _envoy_command(context, all_services)
    for number in range(-1, context.pace.rounds):  # one before the first, for the file cache
        for name in in_turn(list(commands), number):
            port, command = commands[name]
            begun = time.perf_counter()
            process = context.stage.start(f"{name} start", command)
            try:
                _wait(port, reachable.name, process)
                if number < 0:
                    continue
                ready.add(name, 1000 * (time.perf_counter() - begun))
                time.sleep(0.3)
                memory.add(name, process.memory().resident / MB)
                context.say(f"start.{services} round {number + 1}: {name} {ready.series[name][-1]:.0f} ms")
            except load.MISHAPS as error:
                if number >= 0:
                    context.failed(unfinished(name, number, ready, memory), name, error)
            finally:
                context.stage.end([process])
    return Group(f"Start of one sidecar with {'one service' if not many else words}", [ready, memory])


def _wait(port: int, host: str, process: Process) -> None:
    until(lambda: answers(port, host), process, "an answer with 200", 60.0)


def _pillion_command(context: Context, services: Sequence[policy.Service], own: str = OURS) -> tuple[int, list[str]]:
    port = free_port()
    command = contenders.pillion_command(context.stage, services, own)
    own = ["--service", policy.CALLER, "--identity", str(context.identities.caller)]
    return port, [*command, *own, "--inbound", "off", "--outbound", f"127.0.0.1:{port}", "--admin", "127.0.0.1:0"]


def _envoy_command(context: Context, services: Sequence[policy.Service]) -> tuple[int, list[str]]:
    port = free_port()
    config = envoy.outbound(port, services, context.identities.caller, policy.CALLER)
    return port, contenders.envoy_command(context.stage, config)
