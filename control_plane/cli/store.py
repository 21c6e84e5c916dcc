"""`pillion store`: look at a control plane's store, back it up, restore it, move it to another.

Works on the store itself, on its host, not through a control plane. Must know no kind of store beyond its text.
Invariants: `show` and `backup` change nothing and may run beside a control plane; `restore` and `migrate` replace
nothing that is there unless told to with --force.
"""

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click

from control_plane.cli.output import table
from control_plane.state.records import KINDS, RecordError, decode, kind_of
from control_plane.store.address import (
    ETCD_PREFIX,
    EmbeddedAddress,
    EtcdAddress,
    EtcdOptions,
    etcd_options,
    parse_store,
)
from control_plane.store.base import Entry, Store, StoreError, View
from sidecar.model.problems import one_line

STATE_DIR = Path("pillion-control-plane")
PATH = click.Path(path_type=Path)
KEY_SHOWN_MAX = 120

F = TypeVar("F", bound=Callable[..., object])
T = TypeVar("T")


def _option(name: str, metavar: str, text: str, **more: Any) -> Callable[[F], F]:
    """One that `pillion control-plane` has too, and its environment variable."""
    variable = f"PILLION_CONTROL_PLANE_{name.removeprefix('--').replace('-', '_').upper()}"
    return click.option(name, metavar=metavar, help=text, envvar=variable, show_envvar=True, **more)


_ACCESS = (
    _option("--state-dir", "DIR", "Where --store embedded is.", type=PATH, default=STATE_DIR, show_default=True),
    _option("--etcd-cacert", "FILE", "The authority of etcd's certificates.", type=PATH),
    _option("--etcd-cert", "FILE", "Our certificate towards etcd.", type=PATH),
    _option("--etcd-key", "FILE", "Its key.", type=PATH),
    _option("--etcd-user", "NAME", "Our name towards etcd."),
    _option("--etcd-password-file", "FILE", "The password, in a file that only we can read.", type=PATH),
    _option("--etcd-prefix", "PREFIX", "What stands before our keys in etcd.", default=ETCD_PREFIX, show_default=True),
)
_store = _option("--store", "STORE", "embedded, embedded:FILE or etcd://HOST:PORT[,…].", default="embedded")
_force = click.option("--force", is_flag=True, help="Replace what the target holds.")


def _access(function: F) -> F:
    for option in reversed(_ACCESS):
        function = option(function)
    return function


@dataclass(frozen=True, slots=True)
class _Access:
    state_dir: Path
    etcd: EtcdOptions

    def open(self, text: str, *, read_only: bool = False, existing: bool = False) -> AbstractAsyncContextManager[Store]:
        from control_plane.store.open import opened

        address = parse_store(text, self.state_dir)
        if existing and isinstance(address, EmbeddedAddress) and not address.path.exists():
            raise StoreError(f"{address.path}: there is no such store")
        etcd = self.etcd if isinstance(address, EtcdAddress) else None
        return opened(text, state_dir=self.state_dir, etcd=etcd, read_only=read_only)


def _access_of(
    state_dir: Path,
    etcd_cacert: Path | None,
    etcd_cert: Path | None,
    etcd_key: Path | None,
    etcd_user: str | None,
    etcd_password_file: Path | None,
    etcd_prefix: str,
) -> _Access:
    options = etcd_options(
        cacert=etcd_cacert,
        cert=etcd_cert,
        key=etcd_key,
        user=etcd_user or "",
        password_file=etcd_password_file,
        prefix=etcd_prefix,
    )
    return _Access(state_dir, options)


def _run(work: Callable[[], Awaitable[T]]) -> T:
    import trio

    try:
        return trio.run(work)
    except StoreError as error:
        raise click.ClickException(str(error)) from None


@click.group()
def store() -> None:
    """Look at a store, back it up, restore it, move it to another.

    These verbs open the store itself. Stop every control plane first for `restore` and `migrate`; `show` and `backup`
    may run beside one.
    """


@store.command("backup")
@click.argument("file", type=PATH)
@_store
@_access
def backup_(file: Path, store: str, **access: Any) -> None:
    """Write everything to FILE.

    All of it as it stood at one revision. The keys of the certificate authority are not in the store: keep a copy of
    the control plane's state directory too.
    """

    async def work() -> None:
        from control_plane.store.backup import backup

        async with _access_of(**access).open(store, read_only=True) as source:
            held = await backup(source, file, time.time())
        click.echo(f"{len(held.entries)} entries of {held.source} at revision {held.revision} in {file}")
        _say_leased(held.leased)

    _run(work)


@store.command("restore")
@click.argument("file", type=PATH)
@_store
@_force
@_access
def restore_(file: Path, store: str, force: bool, **access: Any) -> None:
    """Make a store hold what FILE holds.

    The whole file is checked before anything is written. If it is interrupted, run it again.
    """

    async def work() -> None:
        from control_plane.store.backup import read_backup, restore

        held = read_backup(file)
        async with _access_of(**access).open(store) as target:
            done = await restore(target, held, force=force)
            description = target.description
        when = datetime.fromtimestamp(held.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        click.echo(f"{done.entries} entries of {held.source}, as of {when}, are in {description}")
        _say_removed(done.removed)
        _say_leased(done.leased)

    _run(work)


@store.command("migrate")
@click.option("--from", "source", required=True, metavar="STORE", help="Where everything is.")
@click.option("--to", "target", required=True, metavar="STORE", help="Where it is to be.")
@_force
@_access
def migrate_(source: str, target: str, force: bool, **access: Any) -> None:
    """Copy everything from one store to another.

    Stop every control plane first, and start it with the other --store afterwards. The source stays as it is. The
    target is read again and compared. If it is interrupted, run it again.
    """

    async def work() -> None:
        from control_plane.store.migrate import migrate

        means = _access_of(**access)
        if parse_store(source, means.state_dir) == parse_store(target, means.state_dir):
            raise StoreError(f"--from and --to are the same store, {source}")
        # Not read_only: nobody else may have it meanwhile.
        async with means.open(source, existing=True) as old, means.open(target) as new:
            done = await migrate(old, new, force=force)
            description = new.description
        click.echo(f"{done.entries} entries are in {description}; both were read again and are equal")
        _say_removed(done.removed)
        _say_leased(done.leased)
        click.echo(f"Next: pillion control-plane --store {target}", err=True)

    _run(work)


def _say_removed(number: int) -> None:
    if number:
        click.echo(f"{number} other entries were removed from it")


def _say_leased(number: int) -> None:
    if number:
        click.echo(
            f"{number} entries that live by a lease (who is connected now) were left out; sidecars and control planes "
            "write them again by themselves",
            err=True,
        )


@store.command("show")
@_store
@_access
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
def show(store: str, output: str, **access: Any) -> int:
    """Show what a store holds.

    Keys and bytes by kind, the revision, and each record that cannot be read, by its key. Exits with 1 where there is
    one.
    """

    async def work() -> tuple[str, View]:
        async with _access_of(**access).open(store, read_only=True) as source:
            return source.description, await source.read()

    description, view = _run(work)
    facts = {"store": description, **_facts(view)}
    click.echo(json.dumps(facts, indent=2) if output == "json" else _as_text(facts))
    return 1 if facts["problems"] else 0


def _facts(view: View) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {}
    problems = []
    for key, entry in sorted(view.entries.items()):
        kind = kind_of(key)
        facts = kinds.setdefault(kind or "(not ours)", {"keys": 0, "leased": 0, "bytes": 0})
        facts["keys"] += 1
        facts["leased"] += bool(entry.lease)
        facts["bytes"] += len(entry.key) + len(entry.value)
        reason = _problem_of(kind, entry)
        if reason:
            problems.append({"key": key, "revision": entry.revision, "reason": reason})
    return {
        "revision": view.revision,
        "keys": len(view.entries),
        "bytes": sum(facts["bytes"] for facts in kinds.values()),
        "kinds": [{"kind": kind, **facts} for kind, facts in sorted(kinds.items())],
        "problems": problems,
    }


def _problem_of(kind: str | None, entry: Entry) -> str:
    if kind is None:
        return "not a key of pillion"
    try:
        decode(KINDS[kind], entry.value)
    except RecordError as error:
        return str(error)
    return ""


def _as_text(facts: Mapping[str, Any]) -> str:
    blocks = [f"{facts['store']}\nrevision {facts['revision']}, {facts['keys']} keys, {facts['bytes']} bytes"]
    if facts["kinds"]:
        rows = [[each["kind"], str(each["keys"]), str(each["leased"]), str(each["bytes"])] for each in facts["kinds"]]
        blocks.append(table(rows, ("KIND", "KEYS", "LEASED", "BYTES")))
    if facts["problems"]:
        rows = [[one_line(each["key"])[:KEY_SHOWN_MAX], one_line(each["reason"])] for each in facts["problems"]]
        blocks.append("Cannot be read, and is skipped:\n" + table(rows, ("KEY", "REASON")))
    return "\n\n".join(blocks)
