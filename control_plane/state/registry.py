"""Who is there: what becomes of registrations whose lease has ended.

One that stops sending heartbeats is told to nobody any more (`gone`). But where more than half of a service of three or
more go within one TTL, the fault is more likely between them and us than in all of them: they are kept as `suspect` for
three more. Pure: `now` is an argument, and so is for how long we have known each as it is: of two replicas whose
clocks differ, the one that is ahead must not cut short what the other began. Invariant: what is alive is `up`, whatever
it was before.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

from sidecar.model.snapshot import EndpointSpec

from .mirror import Held
from .records import Instance

TTL_S = 15.0
SUSPECT_S = 3 * TTL_S
MANY = 3  # services with fewer instances are too small to tell a crowd from a coincidence


def judge(
    instances: Mapping[str, Held[Instance]], alive: Collection[str], now: float, ages_s: Mapping[str, float]
) -> dict[str, Instance | None]:
    """What must be written of one service's registrations, by sidecar; None: deleted. `ages_s`: for how long each has
    been in its state, as we saw it."""
    verdict: dict[str, Instance | None] = {}
    here, going = 0, []
    for name, held in instances.items():
        instance = held.record
        if name in alive:
            here += 1
            if instance.state != "up":
                verdict[name] = replace(instance, state="up", changed=now, until=0.0)
        elif instance.state == "up":
            going.append(name)
            verdict[name] = replace(instance, state="gone", changed=now)
        elif instance.state == "gone":
            if ages_s.get(name, 0.0) < TTL_S:
                going.append(name)
            else:
                verdict[name] = None
        elif ages_s.get(name, 0.0) >= SUSPECT_S:
            verdict[name] = None
        else:
            here += 1
    total = here + len(going)
    if (total >= MANY and 2 * len(going) > total) or _joins_suspects(instances, going):
        for name in going:
            verdict[name] = replace(instances[name].record, state="suspect", changed=now, until=now + SUSPECT_S)
    return verdict


def _joins_suspects(instances: Mapping[str, Held[Instance]], going: Collection[str]) -> bool:
    """Whether a crowd is already missing: who goes now belongs to it."""
    return bool(going) and any(held.record.state == "suspect" for held in instances.values())


def next_due_s(instances: Mapping[str, Held[Instance]], ages_s: Mapping[str, float]) -> float:
    """In how many seconds to look again although nothing happens; infinity: not before something does."""
    due_s = float("inf")
    for name, held in instances.items():
        kept_s = {"gone": TTL_S, "suspect": SUSPECT_S}.get(held.record.state)
        if kept_s is not None:
            due_s = min(due_s, kept_s - ages_s.get(name, 0.0))
    return due_s


def endpoints(static: Collection[EndpointSpec], instances: Mapping[str, Held[Instance]]) -> tuple[EndpointSpec, ...]:
    """The addresses of a service: those of its policy, then those registered, in the order of their sidecars' ids."""
    registered = (
        EndpointSpec(
            host=instance.host,
            port=instance.port,
            labels=instance.labels,
            weight=instance.weight,
            healthy=instance.healthy,
            zone=instance.zone,
            priority=instance.priority,
        )
        for _, instance in sorted((name, held.record) for name, held in instances.items())
        if instance.state != "gone"
    )
    return (*static, *registered)
