"""The documents of this repository as tests read them, and the parts of them that are made from the program.

    python -m support.documents        (in tests/) writes the made parts anew

Made parts stand between `<!-- NAME: made from the program -->` (of the policy file: `from the declarations`) and
`<!-- end of NAME -->`. What `pillion simulate` prints and draws in the documents is the business of
`support.rehearsals`.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from control_plane.cli import VERBS, load
from sidecar.model import reference as policy_file
from sidecar.policy.outcome import Outcome
from sidecar.proxy.answers import MESSAGES
from sidecar.proxy.world import World
from sidecar.telemetry import process
from sidecar.telemetry.catalogue import Meters
from sidecar.telemetry.metrics import Registry

from . import rehearsals

ROOT = Path(__file__).parents[2]
OPERATIONS = ROOT / "docs" / "operations.md"
OBSERVABILITY = ROOT / "docs" / "observability.md"
POLICY = ROOT / "docs" / "policy.md"


def shell_blocks(text: str) -> list[str]:
    """The shell commands of a document, block by block."""
    return re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def section(text: str, heading: str) -> str:
    """A second-level section, its subsections included."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"there is no section {heading!r}"
    return found[1]


def links(text: str) -> Iterator[str]:
    """The targets of links to files of this repository, without their fragments."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" not in target and not target.startswith("#"):
            yield target.partition("#")[0]


def commands() -> Iterator[tuple[str, click.Command, str | None]]:
    """Every command that does something: its words, itself, and the prefix of its options in the environment."""
    for name, verb in VERBS.items():
        yield from _below(f"pillion {name}", load(name, verb), None)


def _below(words: str, command: click.Command, prefix: str | None) -> Iterator[tuple[str, click.Command, str | None]]:
    prefix = command.context_settings.get("auto_envvar_prefix", prefix)
    if isinstance(command, click.Group):
        context = click.Context(command)  # a lazy group knows its verbs by name only
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None, name
            yield from _below(f"{words} {name}", child, prefix)
    else:
        yield words, command, prefix


def options_reference() -> str:
    """The options of every command, as tables."""
    parts = []
    for words, command, prefix in commands():
        rows = [_row(option, prefix) for option in command.params if isinstance(option, click.Option)]
        arguments = " ".join(
            f"`{argument.metavar or (argument.name or '').upper()}`"
            for argument in command.params
            if isinstance(argument, click.Argument) and argument.metavar != ""
        )
        summary = (command.help or "").strip().split("\n\n")[0].replace("\n", " ")
        parts.append(
            f"### `{words}`\n\n{' '.join(summary.split())}{f' Arguments: {arguments}.' if arguments else ''}\n"
        )
        if rows:
            parts.append("| option | built in | environment | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(option: click.Option, prefix: str | None) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    value = "" if option.is_flag else f" {_value(option)}"
    many = ", repeatable" if option.multiple else ""
    return (
        f"| {names}{value}{many} | {_default(option)} | {_variable(option, prefix)} | {_escaped(option.help or '')} |"
    )


def _value(option: click.Option) -> str:
    if option.metavar:
        return option.metavar
    if isinstance(option.type, click.Choice):
        return "\\|".join(map(str, option.type.choices))
    if isinstance(option.type, click.Path):
        return "PATH"
    return _escaped(option.type.name.upper().removesuffix(" RANGE"))


def _default(option: click.Option) -> str:
    if option.required:
        return "*required*"
    if isinstance(option.show_default, str):
        return f"`{option.show_default}`"
    default = option.default
    if option.is_flag or default is None or callable(default) or not isinstance(default, str | int | float | Path):
        return ""
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def _variable(option: click.Option, prefix: str | None) -> str:
    if option.envvar is not None:
        names = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar)
        return ", ".join(f"`{name}`" for name in names)
    return f"`{prefix}_{(option.name or '').upper()}`" if prefix else ""


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def metrics_reference() -> str:
    """Every family of metrics, from a scrape of a registry in which each has a series."""
    registry = Registry(lambda: 0.0)
    process.register(registry)
    meters = Meters(registry)
    meters.build_info(lambda: "0", "3", lambda: "r")
    meters.certificate_expiry(lambda: 0.0)
    meters.global_limits(lambda: 1.0, lambda: 0.0)
    meters.log_drops("own", lambda: 0.0)
    service = meters.service("in", "s")
    for counters, label in (
        (meters.inbound.handshakes_failed, "x"),
        (meters.crashes, "x"),
        (service.hedges, "x"),
        (service.mirrored, "x"),
        (service.denied, "x"),
        (service.would_deny, "x"),
        (service.filter_errors, "x"),
        (service.filter_overruns, "x"),
    ):
        counters.inc(label)
    meters.endpoint("s", "e")
    for side in ("in", "out"):
        registry.requests(side=side, service="s", route="r", version="v").record(b"GET", 503, "overflow", 0.1)
        registry.requests(side=side, service="s", route="r", version="v").record(b"POST", 200, "ok", 0.1, "OK")
    cluster: Any = SimpleNamespace(**dict.fromkeys(_CLUSTER_ATTRIBUTES, 0))
    gate: Any = SimpleNamespace(limit=0, in_flight=0, waiting=0, shed={"c": 0})
    world: Any = SimpleNamespace(
        registry=registry,
        meters=meters,
        state=SimpleNamespace(clusters={("in", "s", "p"): cluster}, gates={"s": gate}),
        reactor=SimpleNamespace(held_bytes=0),
        downstreams=(),
        tunnels=(),
    )
    World.observe(world)
    text = b"".join(registry.render(openmetrics=False)).decode()
    families: dict[str, tuple[str, str, set[str]]] = {}
    for name, words in re.findall(r"^# HELP (\S+) (.*)$", text, re.MULTILINE):
        kind = re.search(rf"^# TYPE {name} (\w+)$", text, re.MULTILINE)
        labels = set()
        for found in re.findall(rf"^{name}(?:_count)?{{(.*)}} ", text, re.MULTILINE):
            labels |= set(re.findall(r'(\w+)="', found))
        assert kind is not None
        families[name] = kind[1], words, labels
    rows = [
        f"| `{name}` | {kind} | {', '.join(f'`{label}`' for label in sorted(labels))} | {_escaped(words)} |"
        for name, (kind, words, labels) in sorted(families.items())
    ]
    return "| name | kind | labels | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


_CLUSTER_ATTRIBUTES = (
    *("attempts", "retries", "resends", "cancelled", "overflows", "budget_exhausted"),
    *("active", "connections", "panic", "panic_picks", "spilled_picks", "zone_picks", "ejected"),
    "ejections_capped",
)


def reasons_reference() -> str:
    """How a request can end."""
    rows = [
        f"| `{outcome.reason}` | {outcome.status or ''} | {_grpc(outcome)} | {outcome.retryable.value} "
        f"| {outcome.blame.value} | {MESSAGES.get(outcome, _UNSAID.get(outcome, ''))} |"
        for outcome in Outcome
    ]
    return (
        "| reason | status | gRPC | retried | failure | meaning |\n|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def _grpc(outcome: Outcome) -> str:
    return f"`{outcome.grpc.name}`" if outcome.status else ""


_UNSAID = {
    Outcome.OK: "the application answered, whatever its status",
    Outcome.FAULT_INJECTED: "a fault of the policy",
    Outcome.RESPONDED: "the policy (`respond`, `redirect`, `fallback`) or a filter answered",
    Outcome.CUT_SHORT: "the response had begun and could not be finished",
    Outcome.CALLER_GONE: "the caller went away before the answer",
}

MADE = {
    OPERATIONS: {"options": options_reference},
    OBSERVABILITY: {"metrics": metrics_reference, "reasons": reasons_reference},
    POLICY: {"reference": policy_file.reference, "codes": policy_file.codes},
}


def renewed(path: Path) -> str:
    """A document with its made parts as they should be."""
    text = path.read_text()
    for name, make in MADE[path].items():
        pattern = rf"(<!-- {name}: made from the (?:program|declarations) -->\n).*?(<!-- end of {name} -->)"
        text, count = re.subn(pattern, lambda found: f"{found[1]}\n{make()}\n{found[2]}", text, flags=re.DOTALL)  # noqa: B023
        assert count == 1, f"{path} has no part {name!r}"
    return text


def main() -> int:
    for path in MADE:
        path.write_text(renewed(path))
    rehearsals.renew_reference()
    return 0


if __name__ == "__main__":
    sys.exit(main())
