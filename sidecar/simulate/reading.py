"""A scenario file to a Scenario and the policy that it names, with every problem in both.

Must not run anything. Never raises for bad input. Invariants: a Scenario is given exactly where no problem is an error;
its order is the file's order, so equal files give equal runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidecar.model.documents import add_documents, documents_of
from sidecar.model.fields import FILE
from sidecar.model.kinds import Block, Stated
from sidecar.model.load import load_texts, read_texts
from sidecar.model.problems import Problem, Severity, Sink, clip
from sidecar.model.resolve import Documents, resolve
from sidecar.model.snapshot import Snapshot
from sidecar.model.source import Source
from sidecar.model.yaml_tree import Map, Node, Scalar, read_yaml

from .fields import AT_LEAST, AT_MOST, SCENARIO
from .population import behaviour, latency_of, services_of
from .scenario import PANELS, Down, Load, Objective, Outage, Scenario, ServiceModel, Shape

EFFECTS = ("latency", "slowdown", "errors", "down", "unhealthy")
_TIMED = ("success_effective", "p50", "p99")  # what can be said of a part of the run


@dataclass(frozen=True, slots=True)
class Read:
    """`scenario` and `snapshot` are None where a problem is an error. `policy_name` is what a report calls the
    policy."""

    scenario: Scenario | None
    snapshot: Snapshot | None
    policy_name: str
    problems: tuple[Problem, ...]
    texts: Mapping[str, str]
    dropped: int = 0

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity is Severity.ERROR)


def read_scenario(path: Path, policy: Path | None = None) -> Read:
    """The scenario in a file; `policy` takes the place of the one that it names."""
    sink = Sink()
    texts = read_texts([path], sink)
    text = texts.get(str(path))
    if text is None:
        return Read(None, None, "", sink.problems(), texts, sink.dropped)
    return read_text(text, str(path), sink, policy, path.parent)


def read_text(
    text: str, file: str, sink: Sink | None = None, policy: Path | None = None, folder: Path | None = None
) -> Read:
    """The same for a normalised text. `folder`: what paths in it are relative to."""
    sink = Sink() if sink is None else sink
    texts = {file: text}
    node = read_yaml(text, file, sink)
    if node is None:
        if not sink.failed:
            sink.error("P0109", "the file is empty", Source(file, 1, 1), help="a scenario begins with version: 1")
        return Read(None, None, "", sink.problems(), texts, sink.dropped)
    block = SCENARIO.decode(node, "", sink)
    if not isinstance(block, Block):
        return Read(None, None, "", sink.problems(), texts, sink.dropped)
    stated = block.stated("policy")
    part: Any = policy if policy is not None else stated.value if stated is not None else None
    snapshot, name, more = _policy(part, sink, folder)
    scenario = _Resolver(block, snapshot or Snapshot(), sink, snapshot is None).scenario(file)
    if sink.failed:
        return Read(None, None, name, sink.problems(), texts | more, sink.dropped)
    return Read(scenario, snapshot, name, sink.problems(), texts | more, sink.dropped)


def _policy(part: Any, sink: Sink, folder: Path | None) -> tuple[Snapshot | None, str, dict[str, str]]:
    """The policy, what to call it, and the texts of its files. None: it has problems, or there is none; those of the
    scenario do not count."""
    failed, sink.failed = sink.failed, False
    try:
        return _read_policy(part, sink, folder)
    finally:
        sink.failed = sink.failed or failed


def _read_policy(part: Any, sink: Sink, folder: Path | None) -> tuple[Snapshot | None, str, dict[str, str]]:
    if isinstance(part, Map):
        block = FILE.decode(part, "policy", sink)
        if not isinstance(block, Block):
            return None, "inline", {}
        documents = Documents()
        add_documents(documents_of(block), documents, sink)
        services = resolve(documents, sink)
        return (None if sink.failed else Snapshot(services)), "inline", {}
    if part is None:
        return None, "", {}
    path = part if isinstance(part, Path) else (folder or Path()) / part.text
    if isinstance(part, Scalar) and not path.exists():
        help = "the path is relative to the scenario's file"
        sink.error("P0100", f"there is no policy {clip(str(path))}", part, help=help)
        return None, part.text, {}
    texts = read_texts([path], sink)
    return load_texts(texts, sink).snapshot, path.name, texts


@dataclass(slots=True)
class _Resolver:
    """What one key of a scenario says of another, and of the policy. `blind`: the policy could not be read, so what it
    has is not known."""

    block: Block
    snapshot: Snapshot
    sink: Sink
    blind: bool
    services: dict[str, ServiceModel] = field(default_factory=dict)

    def scenario(self, file: str) -> Scenario:
        block = self.block
        table = SCENARIO.by_key
        numbers = {
            key: block.get(key) if block.get(key) is not None else table[key].builtin
            for key in ("duration", "seed", "network", "discovery", "lease")
        }
        self.services = services_of(block, self.snapshot, self.sink, self.blind)
        outages = [self._outage(each, numbers["duration"]) for each in block.get("outages") or ()]
        return Scenario(
            name=Path(file).stem,
            services=self.services,
            load=tuple(each for one in block.get("load") or () if (each := self._load(one)) is not None),
            outages=tuple(each for each in outages if each is not None),
            objectives=tuple(each for one in block.get("objectives") or () for each in self._objectives(one)),
            picture=tuple(block.get("picture") or PANELS[:3]),
            duration_s=numbers["duration"],
            seed=numbers["seed"],
            network_s=numbers["network"],
            discovery_s=numbers["discovery"],
            lease_s=numbers["lease"],
        )

    def _service(self, stated: Stated | None) -> str | None:
        """A service of the scenario, by name."""
        if stated is None:
            return None
        if stated.value not in self.services:
            message = f'the scenario has no service "{clip(stated.value)}"'
            unknown(message, stated.value, self.services, stated, self.sink)
            return None
        return str(stated.value)

    # -- load

    def _load(self, block: Block) -> Load | None:
        caller, to = self._service(block.stated("from")), self._service(block.stated("to"))
        forms = [key for key in ("rate", "steps", "ramp") if block.stated(key) is not None]
        if not forms and _cut(block):
            return None
        if len(forms) != 1:
            message = "a load needs a rate" if not forms else f"a load has one of {' and '.join(forms)}"
            self.sink.error("P0502", message, block.node, help="say one of rate, steps and ramp")
            return None
        points = ((0.0, block.get("rate")),) if forms == ["rate"] else self._points(block.stated(forms[0]))
        shapes = tuple(_shape(each) for each in block.get("requests") or ()) or (Shape(),)
        if caller is None or to is None or points is None:
            return None
        return Load(caller, to, points, forms == ["ramp"], block.get("arrivals") == "even", shapes)

    def _points(self, stated: Stated | None) -> tuple[tuple[float, float], ...] | None:
        assert stated is not None
        points: list[tuple[float, float]] = []
        for each in stated.value:
            at_s, rate = each.get("at"), each.get("rate")
            if at_s is None or rate is None:
                return None
            if points and at_s <= points[-1][0]:
                self.sink.error("P0503", "the points of a rate go forward in time", each.node)
                return None
            points.append((at_s, rate))
        return tuple(points)

    # -- outages

    def _outage(self, block: Block, duration_s: float) -> Outage | None:
        sink = self.sink
        effects = [key for key in EFFECTS if block.stated(key) is not None and block.get(key) is not False]
        if not effects and not _cut(block):
            help = f"say at least one of {', '.join(EFFECTS[:-1])} and {EFFECTS[-1]}"
            sink.error("P0502", "an outage in which nothing goes wrong", block.node, help=help)
        if "latency" in effects and "slowdown" in effects:
            sink.error("P0502", "an outage states `latency` or `slowdown`, not both", block.node)
        at = block.stated("at")
        if at is not None and at.value >= duration_s:
            sink.error("P0503", "the outage begins after the run has ended", at.node, f"the run lasts {duration_s:g}s")
        named = block.stated("service")
        service = self._service(named)
        if named is not None and service is None:
            return None
        selects = [key for key in ("version", "zone", "endpoint") if block.stated(key) is not None]
        if service is None and "zone" not in selects:
            sink.error("P0502", "an outage needs a service, or a zone", block.node)
            return None
        names = [name for each in self._within(service) for name in self._selected(each, block)]
        if not names and not self.blind:
            stated = block.stated(selects[0]) if selects else named
            assert stated is not None
            known = [e.zone if "zone" in selects else e.name for s in self._within(service) for e in s.endpoints]
            unknown("no endpoint is hit by this outage", str(stated.value), dict.fromkeys(known), stated, sink)
            return None
        if at is None or not effects:
            return None
        lasts_s = block.get("for")
        words = " ".join([service or "", *(str(block.get(key)) for key in selects)]).strip()
        return Outage(
            at_s=at.value,
            ends_s=duration_s if lasts_s is None else at.value + lasts_s,
            service=service or "",
            endpoints=tuple(names),
            label=f"{words}: {_what(block)}",
            latency=latency_of(block.stated("latency"), sink),
            slowdown=block.get("slowdown"),
            errors=behaviour(block, sink).errors,
            down=Down(block.get("down")) if block.get("down") is not None else None,
            unhealthy=bool(block.get("unhealthy")),
        )

    def _within(self, service: str | None) -> list[ServiceModel]:
        return list(self.services.values()) if service is None else [self.services[service]]

    def _selected(self, model: ServiceModel, block: Block) -> list[str]:
        version = block.get("version")
        policy = self.snapshot.services.get(model.name)
        labels = policy.versions.get(version) if version is not None and policy is not None else {}
        if labels is None:
            return []
        zone, name = block.get("zone"), block.get("endpoint")
        return [
            each.name
            for each in model.endpoints
            if (zone is None or each.zone == zone)
            and (name is None or each.name == name)
            and all(each.spec.labels.get(key) == value for key, value in labels.items())
        ]

    # -- objectives

    def _objectives(self, block: Block) -> list[Objective]:
        sink = self.sink
        service = self._service(block.stated("service"))
        metrics = [key for key in (*AT_LEAST, *AT_MOST) if block.stated(key) is not None]
        if not metrics and not _cut(block):
            known = ", ".join((*AT_LEAST, *AT_MOST))
            sink.error("P0502", "an objective that asks for nothing", block.node, help=f"say one of {known}")
        after, before = block.stated("after"), block.stated("before")
        if after is not None and before is not None and after.value >= before.value:
            sink.error("P0503", "`after` is not before `before`", before.node)
        found = []
        for key in metrics:
            stated = block.fields[key]
            if (after is not None or before is not None) and key not in _TIMED:
                help = f"of a part of the run: {', '.join(_TIMED)}"
                sink.error("P0502", f"`{key}` holds for the whole run", stated.key, help=help)
            bound = stated.value / 100.0 if key in AT_LEAST else float(stated.value)
            found.append(
                Objective(
                    key,
                    bound,
                    service,
                    after.value if after is not None else 0.0,
                    before.value if before is not None else None,
                    stated.key.source,
                )
            )
        return found


def _cut(block: Block) -> bool:
    """Whether it states more than could be read; what is wrong with that has been said."""
    return isinstance(block.node, Map) and len(block.fields) < len(block.node.entries)


def _shape(block: Block) -> Shape:
    headers = tuple((name.encode(), each.value.encode()) for name, each in (block.get("headers") or {}).items())
    weight = block.get("weight")
    method, path = block.get("method") or "GET", block.get("path") or "/"
    return Shape(method.encode(), path.encode(), headers, 1 if weight is None else weight)


def _what(block: Block) -> str:
    """An outage's effects, for the report."""
    words = []
    errors = block.get("errors")
    if errors is not None and errors.get("rate") is not None:
        words.append(f"errors {errors.get('rate'):g}%")
    if block.get("slowdown") is not None:
        words.append(f"{block.get('slowdown'):g} times as slow")
    if block.get("latency") is not None:
        words.append("another latency")
    if block.get("down") is not None:
        words.append(f"down ({block.get('down')})")
    if block.get("unhealthy"):
        words.append("unhealthy")
    return ", ".join(words)


def unknown(message: str, word: str, known: Mapping[str, object], at: Stated, sink: Sink) -> None:
    """A name that nothing has."""
    shown = ", ".join([each for each in known if each][:10]) or "none"
    node: Node = at.node
    sink.error("P0501", message, node, help=sink.suggest(word, known) or f"known: {clip(shown, 200)}")
