"""The services of a scenario with their endpoints, put together from the scenario and the policy.

Must not know outages, load or time. Invariant: every endpoint has a name of its own, and every service is in the
policy.
"""

from collections.abc import Mapping
from dataclasses import replace

from sidecar.model.kinds import Block, Stated
from sidecar.model.problems import Sink, clip
from sidecar.model.snapshot import EndpointSpec, Service, Snapshot
from sidecar.model.yaml_tree import Map
from sidecar.policy.endpoint import endpoint_key

from .fields import ENDPOINTS_MAX
from .scenario import Behaviour, Capacity, ColdStart, EndpointModel, Errors, Latency, ServiceModel, Step

BUILT_IN = Behaviour(latency=Latency("fixed", 0.010))


def services_of(scenario: Block, snapshot: Snapshot, sink: Sink, blind: bool) -> dict[str, ServiceModel]:
    """`blind`: the policy could not be read, so nothing is said of what it lacks."""
    models: dict[str, ServiceModel] = {}
    stated: Mapping[str, Stated] = scenario.get("services") or {}
    for name, each in stated.items():
        policy = snapshot.services.get(name)
        if policy is None and not blind:
            known = ", ".join(snapshot.services) or "none"
            help = sink.suggest(name, snapshot.services) or f"known: {clip(known, 200)}"
            sink.error("P0501", f'the policy has no service "{clip(name)}"', each.key, help=help)
        elif policy is not None and policy.ports and not any(port.protocol.value != "tcp" for port in policy.ports):
            sink.error("P0505", f'the service "{clip(name)}" serves no requests: its ports are TCP', each.key)
        models[name] = _model(name, each.value, policy or Service(name), sink)
    for each in stated.values():
        for call in each.value.get("calls") or ():
            to = call.stated("to")
            if to is not None and to.value not in models:
                help = sink.suggest(to.value, models) or "add it to `services`"
                sink.error("P0501", f'the scenario has no service "{clip(to.value)}"', to.node, help=help)
    if sum(len(model.endpoints) for model in models.values()) > ENDPOINTS_MAX:
        sink.error("P0114", f"the scenario has more than {ENDPOINTS_MAX} endpoints", scenario.node)
    _find_circle(models, stated, sink)
    return models


def _model(name: str, block: Block, policy: Service, sink: Sink) -> ServiceModel:
    propagates = block.get("propagates")
    return ServiceModel(
        name,
        tuple(_endpoints(name, block, policy, sink)),
        tuple(_step(call) for call in block.get("calls") or () if call.get("to") is not None),
        True if propagates is None else propagates,
        block.get("on_cancel") == "stop",
    )


def _endpoints(name: str, block: Block, policy: Service, sink: Sink) -> list[EndpointModel]:
    own = behaviour(block, sink)
    groups = block.get("endpoints")
    port = policy.ports[0].number if policy.ports else 80
    if groups is None and policy.endpoints:
        return [EndpointModel(endpoint_key(spec.host, spec.port), spec, own, spec.zone) for spec in policy.endpoints]
    if groups is None or isinstance(groups, int):
        count = groups or 1
        names = [f"{name}-{number}" for number in range(1, count + 1)]
        return [EndpointModel(each, EndpointSpec(each, port), own) for each in names]
    found = []
    for group, stated in groups.items():
        said: Block = stated.value
        labels = {key: each.value for key, each in (said.get("labels") or {}).items()}
        weight, zone = said.get("weight"), said.get("zone") or ""
        starts_s, ends_s = said.get("from") or 0.0, said.get("until")
        if ends_s is not None and ends_s <= starts_s:
            sink.error("P0503", f'the endpoints "{clip(group)}" end before they start', said.fields["until"].node)
        for number in range(1, (said.get("count") or 1) + 1):
            each = f"{name}-{group}-{number}"
            spec = EndpointSpec(
                each, port, labels, 1 if weight is None else weight, zone=zone, priority=said.get("priority") or 0
            )
            found.append(EndpointModel(each, spec, behaviour(said, sink, own), zone, starts_s, ends_s))
    return found


def _step(call: Block) -> Step:
    share, status = call.get("share"), call.get("on_failure")
    return Step(
        to=call.get("to"),
        method=(call.get("method") or "GET").encode(),
        target=(call.get("path") or "/").encode(),
        headers=tuple((key.encode(), each.value.encode()) for key, each in (call.get("headers") or {}).items()),
        times=call.get("times") or 1,
        share=1.0 if share is None else share / 100.0,
        status=500 if status is None else status,
    )


# -- models


def behaviour(block: Block, sink: Sink, built_in: Behaviour = BUILT_IN) -> Behaviour:
    """What is stated here, over what holds without it."""
    found = built_in
    latency = latency_of(block.stated("latency"), sink)
    if latency is not None:
        found = replace(found, latency=latency)
    errors: Block | None = block.get("errors")
    if errors is not None and errors.get("rate") is not None:
        slow = latency_of(errors.stated("latency"), sink)
        statuses = errors.get("statuses") or (500,)
        found = replace(found, errors=Errors(errors.get("rate") / 100.0, statuses, slow, errors.get("retry_after")))
    capacity: Block | None = block.get("capacity")
    if capacity is not None and capacity.get("concurrency") is not None:
        status = capacity.get("status")
        found = replace(
            found,
            capacity=Capacity(
                capacity.get("concurrency"), capacity.get("queue") or 0, 503 if status is None else status
            ),
        )
    cold: Block | None = block.get("cold_start")
    if cold is not None and cold.get("for") is not None and cold.get("slowdown") is not None:
        found = replace(found, cold_start=ColdStart(cold.get("for"), cold.get("slowdown")))
    return found


def latency_of(stated: Stated | None, sink: Sink) -> Latency | None:
    if stated is None:
        return None
    said = stated.value
    if not isinstance(said, Block):
        return Latency("fixed", said)
    keys = sorted(key for key in said.fields if said.get(key) is not None)
    if isinstance(said.node, Map) and len(said.fields) < len(said.node.entries):
        return None  # what is wrong has been said
    if keys == ["fixed"]:
        return Latency("fixed", said.get("fixed"))
    if keys == ["uniform"]:
        low, high = said.get("uniform").get("min"), said.get("uniform").get("max")
        if low is None or high is None:
            return None
        if low > high:
            sink.error("P0502", "min is greater than max", said.node)
        return Latency("uniform", low, high)
    if keys == ["p50", "p99"]:
        p50, p99 = said.get("p50"), said.get("p99")
        if not 0.0 < p50 <= p99:
            sink.error("P0502", "p50 is above 0, and p99 not less than p50", said.node)
        return Latency("lognormal", p50, p99)
    sink.error("P0502", "this says no latency", said.node, help="say fixed, uniform, or p50 with p99")
    return None


def _find_circle(models: Mapping[str, ServiceModel], stated: Mapping[str, Stated], sink: Sink) -> None:
    """Services that call each other in a circle would never answer."""
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> None:
        if name in path:
            circle = [*path[path.index(name) :], name]
            sink.error("P0504", f"services call each other in a circle: {' → '.join(circle)}", stated[name].key)
            done.update(circle)
            return
        if name in done or name not in models:
            return
        path.append(name)
        for step in models[name].steps:
            visit(step.to)
        path.pop()
        done.add(name)

    for name in models:
        visit(name)
