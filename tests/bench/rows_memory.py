"""Memory of a sidecar and of an idle connection, and long bodies, through which memory must stay flat."""

import ssl
import time

from . import load
from .context import ENVOYS, KB, MB, Context, in_turn, unfinished
from .table import Bar, Group, Row

IDLE = 1000


def mesh_memory(context: Context) -> list[Group]:
    idle = Row("mesh-memory.idle", "when ready", "MB", rivals=ENVOYS)
    loaded = Row("mesh-memory.loaded", "after 256 busy connections", "MB", rivals=ENVOYS)
    starts = context.pairs(context.backend.port)
    for number in range(context.pace.few):
        for name in in_turn(list(starts), number):
            try:
                with context.fresh(starts[name]) as target:
                    time.sleep(0.3)
                    idle.add(name, load.mean_resident(target.proxies) / MB)
                    window = load.closed_loop(context.stage, target, context.backend, 256, 1.0, context.pace.window_s)
                    loaded.add(name, load.mean_resident(target.proxies) / MB, window.errors)
                    context.say(f"mesh-memory round {number + 1}: {name} {loaded.series[name][-1]:.1f} MB")
            except load.MISHAPS as error:
                context.failed(unfinished(name, number, idle, loaded), name, error)
    return [Group("Resident memory of one sidecar", [idle, loaded])]


def idle_connections(context: Context) -> list[Group]:
    plain = Row("idle.plain", "plain, at the caller's side", "KB", bars=(Bar(4.0),))
    mtls = Row("idle.mtls", "mutual TLS, at the callee's side", "KB", bars=(Bar(24.0),))
    plain_all = Row("idle.plain.total", f"the caller's side in all, with {IDLE}", "MB")
    mtls_all = Row("idle.mtls.total", f"the callee's side in all, with {IDLE}", "MB")
    rows = [plain, mtls, plain_all, mtls_all]
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(context.identities.caller / "bundle.pem")
    client.load_cert_chain(context.identities.caller / "cert.pem", context.identities.caller / "key.pem")
    client.set_alpn_protocols(["http/1.1"])
    pairs = context.pairs(context.backend.port, compiled=False)  # its connections weigh the same
    starts = {name: start for name, start in pairs.items() if name != ENVOYS[1]}
    for number in range(context.pace.few):
        for name in in_turn(list(starts), number):
            try:
                with context.fresh(starts[name]) as target:
                    outbound, inbound = target.proxies
                    callers = load.memory_of_idle(outbound, target.port, target.host, IDLE)
                    plain.add(name, callers.each / KB)
                    plain_all.add(name, callers.total / MB)
                    callees = load.memory_of_idle(inbound, target.mesh_port, target.host, IDLE, client)
                    mtls.add(name, callees.each / KB)
                    mtls_all.add(name, callees.total / MB)
                    context.say(
                        f"idle round {number + 1}: {name} {callers.each / KB:.1f}, {callees.each / KB:.1f} KB each"
                    )
            except load.MISHAPS as error:
                context.failed(unfinished(name, number, *rows), name, error)
    note = f"{IDLE} connections, each with one request behind it; resident memory of the process, so sockets' buffers \
in the kernel are not in it."
    return [Group("Memory of an idle connection", rows, note)]


def bulk(context: Context) -> list[Group]:
    rows: dict[str, list[Row]] = {}
    for way in ("download", "upload"):
        rows[way] = [
            Row(
                f"bulk.{way}.rate",
                f"{way}, throughput",
                "MB/s",
                0,
                lower_is_better=False,
                bars=(Bar(0.9, ENVOYS),),
                rivals=ENVOYS,
            ),
            Row(f"bulk.{way}.cpu", f"{way}, CPU of both proxies", "s/GB", 2, rivals=ENVOYS),
            Row(f"bulk.{way}.memory", f"{way}, growth of memory at its peak", "MB", 1, bars=(Bar(16.0),)),
        ]
    app_port = load.bulk_backend(context.stage)
    with context.together(
        context.pairs(app_port, bodies=True, compiled=False), [row for each in rows.values() for row in each]
    ) as targets:
        for number in range(max(context.pace.few, 2)):
            for way, (rate, cpu, memory) in rows.items():
                if not context.wants(f"bulk.{way}"):
                    continue
                for name in in_turn(list(targets), number):
                    try:
                        done = load.transfer(targets[name], context.pace.bulk_bytes, upload=way == "upload")
                    except load.MISHAPS as error:
                        context.failed([rate, cpu, memory], name, error)
                        continue
                    rate.add(name, done.megabytes_per_second)
                    cpu.add(name, done.cpu_s / done.bytes * 1e9)
                    memory.add(name, max(done.peak_growth) / MB)
                    context.say(f"bulk.{way} round {number + 1}: {name} {done.megabytes_per_second:.0f} MB/s")
    size = context.pace.bulk_bytes / (1 << 30)
    note = f"One body of {size:g} GiB through two hops with mutual TLS."
    return [Group("Long bodies", [row for each in rows.values() for row in each if row.series], note)]
