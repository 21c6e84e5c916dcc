"""The kinds of value that have a form of their own: addresses, destinations, value matches, retry conditions.

Built on kinds.py and tables.py, used by fields.py only. Must not know how levels merge.
"""

import re
from typing import Any

from . import words
from .kinds import INVALID, Block, Kind, Mark, Ref, Schema, Stated, Text
from .problems import Sink, clip
from .records import record
from .snapshot import ValueMatch
from .tables import Field, Table
from .yaml_tree import Broken, List, Map, Node, Scalar

LABEL = Text("a name", words.label, 63, words.LABEL_PATTERN)
SERVICE = Text("the name of a service", words.service_name, 63, words.LABEL_PATTERN)
VERSION_REF = Text("the name of a version", words.label, 63, words.LABEL_PATTERN, ref=True)
SERVICE_REF = Text("the name of a service", words.label, 63, words.LABEL_PATTERN, ref=True)
PORT_REF = Text("the name of a port", words.label, 63, words.LABEL_PATTERN, ref=True)
CALLER = Text("a caller: a service or a SPIFFE ID", words.caller, 2048, ref=True)
METHOD = Text("an HTTP method", words.method, 40, words.TOKEN_PATTERN)
RETRY_METHOD = Text("an HTTP method, or any", words.retry_method, 40, words.TOKEN_PATTERN)
HEADER_NAME = Text("a header name", words.header_name, 256, words.TOKEN_PATTERN)
ASKED_HEADER = Text("a header name", words.asked_header, 256, words.TOKEN_PATTERN)
EDITED_HEADER = Text("a header name", words.edited_header, 256, words.TOKEN_PATTERN, convert=str.lower)
HEADER_VALUE = Text("a header value", words.header_value, 4096)
PATH_GLOB = Text("a path or a path pattern", words.path_glob, 1024, "^/")
REGEX = Text("a regular expression", words.regex, 1024)

_STATUS_CLASSES = ("4xx", "5xx", "gateway-error", "retriable-4xx")
_FAILURES = ("connect-error", "refused-stream", "reset", "timeout")
GRPC_STATUSES = {
    name: code
    for code, name in enumerate(
        (
            "cancelled", "unknown", "invalid-argument", "deadline-exceeded", "not-found", "already-exists",
            "permission-denied", "resource-exhausted", "failed-precondition", "aborted", "out-of-range",
            "unimplemented", "internal", "unavailable", "data-loss", "unauthenticated",
        ),
        start=1,
    )
}  # fmt: skip
"""gRPC statuses as `retry.when` names them, with their codes. OK is no failure."""


@record(frozen=True)
class RetryCondition(Kind):
    """One entry of `retry.when`: a word, a class of statuses, or a status; its value is text."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return "a failure or a status"

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        if not isinstance(node, Scalar) or isinstance(node.value, bool | float) or node.value is None:
            return self.wrong(node, where, sink, "for example connect-error, reset, 503, 5xx")
        if isinstance(node.value, int) or re.match(r"[0-9]{3}\Z", node.text):
            if 400 <= int(node.text) <= 599 and len(node.text) == 3:
                return node.text
            sink.error("P0115", f"the status {clip(node.text)} cannot be retried", node, help="statuses are 400 to 599")
            return INVALID
        if node.text in _FAILURES or node.text in _STATUS_CLASSES or node.text in GRPC_STATUSES:
            return node.text
        known = (*_FAILURES, *_STATUS_CLASSES)
        label = f"known: {', '.join(known)}, statuses, and gRPC statuses by name"
        help = sink.suggest(node.text.replace("_", "-"), (*known, *GRPC_STATUSES))
        sink.error("P0106", f'"{clip(node.text)}" is nothing to retry', node, label, help)
        return INVALID

    def schema(self) -> Schema:
        return {
            "anyOf": [
                {"type": "string", "enum": [*_FAILURES, *_STATUS_CLASSES, *GRPC_STATUSES]},
                {"type": "string", "pattern": "^[45][0-9][0-9]$"},
                {"type": "integer", "minimum": 400, "maximum": 599},
            ]
        }


def failures_and_statuses(conditions: tuple[str, ...]) -> tuple[frozenset[str], frozenset[int], frozenset[int]]:
    """What `retry.when` names, with its classes written out: failures, statuses of HTTP, statuses of gRPC."""
    statuses: set[int] = set()
    for each in conditions:
        match each:
            case "5xx" | "4xx":
                statuses.update(range(int(each[0]) * 100, int(each[0]) * 100 + 100))
            case "gateway-error":
                statuses.update((502, 503, 504))
            case "retriable-4xx":
                statuses.update((409, 425))
            case _ if each.isdigit():
                statuses.add(int(each))
    failures = frozenset(each for each in conditions if each in _FAILURES)
    return failures, frozenset(statuses), frozenset(GRPC_STATUSES[each] for each in conditions if each in GRPC_STATUSES)


_VALUE_FORMS = Table(
    "value match",
    (
        Field("prefix", HEADER_VALUE, "The value begins so."),
        Field("regex", REGEX, "The whole value matches (RE2)."),
        Field("present", Text("true"), "The name is there, whatever its value."),
    ),
)


@record(frozen=True)
class ValueForm(Kind):
    """A header or query value: exact, or a map of one of prefix, regex, present."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return "a string, or a map of one of prefix, regex, present"

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        if not isinstance(node, Map):
            value = HEADER_VALUE.decode(node, where, sink)
            return INVALID if value is INVALID else ValueMatch("exact", value)
        if len(node.entries) != 1:
            sink.error("P0111", f"`{where}` must be {self.name}", node)
            return INVALID
        ((form, (key, each)),) = node.entries.items()
        if form == "present":
            if isinstance(each, Scalar) and each.value is True:
                return ValueMatch("present")
            if not isinstance(each, Broken):
                sink.error("P0106", f"`{where}.present` can only be true", each)
            return INVALID
        kind = {"prefix": HEADER_VALUE, "regex": REGEX, "exact": HEADER_VALUE}.get(form)
        if kind is None:
            known = ("exact", "prefix", "regex", "present")
            help = sink.suggest(form, known) or f"known here: {', '.join(known)}"
            sink.error("P0104", f'unknown key "{clip(form)}"', key, label=f"in `{where}`", help=help)
            return INVALID
        value = kind.decode(each, f"{where}.{form}", sink)
        return INVALID if value is INVALID else ValueMatch(form, value)

    def format(self, value: Any) -> str:
        if value.kind == "exact":
            return f'"{value.value}"'
        return "{present: true}" if value.kind == "present" else f'{{{value.kind}: "{value.value}"}}'

    def schema(self) -> Schema:
        text = {"type": "string"}
        forms = [{key: text} for key in ("exact", "prefix", "regex")] + [{"present": {"const": True}}]
        objects = [
            {"type": "object", "properties": form, "required": list(form), "additionalProperties": False}
            for form in forms
        ]
        return {"anyOf": [text, *objects]}


_GRPC_SERVICE = Text("the name of a gRPC service", words.grpc_service, 255)


@record(frozen=True)
class GrpcHealth(Kind):
    """`true`: the server as a whole, which gives ""; or the name of one of its services."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return "true, or the name of a gRPC service"

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        if isinstance(node, Scalar) and isinstance(node.value, bool):
            if node.value:
                return ""
            sink.error("P0106", f"`{where}` cannot be false", node, help="say `tcp: true` to only connect")
            return INVALID
        if not isinstance(node, Scalar) or not isinstance(node.value, str):
            return self.wrong(node, where, sink, "for example true, or shop.v1.Cart")
        return _GRPC_SERVICE.decode(node, where, sink)

    def format(self, value: Any) -> str:
        return str(value) or "true"

    def schema(self) -> Schema:
        return {"anyOf": [{"const": True}, _GRPC_SERVICE.schema()]}


@record(frozen=True)
class BalancerName(Kind):
    """A built-in balancer, an entry point's name, or `module:Class`."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return "the name of a balancer"

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        return Text(self.name, words.balancer, 256).decode(node, where, sink)

    def schema(self) -> Schema:
        own = {"type": "string", "pattern": "^[A-Za-z0-9_][A-Za-z0-9_.:-]*$", "maxLength": 256}
        return {"anyOf": [{"type": "string", "enum": list(words.BALANCERS)}, own]}


@record(frozen=True)
class Destinations(Kind):
    """`v1`, or weights by version that sum to 100; gives a tuple of (Ref, weight)."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return "a version, or a map of versions and weights"

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        if not isinstance(node, Map):
            if isinstance(node, List):
                return self.wrong(node, where, sink, "for example v1, or {v1: 90, v2: 10}")
            value = VERSION_REF.decode(node, where, sink)
            return INVALID if value is INVALID else ((value, 100),)
        destinations: list[tuple[Ref, int]] = []
        sound = True
        total = 0
        for version, (key, each) in node.entries.items():
            weight = each.value if isinstance(each, Scalar) else None
            if isinstance(weight, bool) or not isinstance(weight, int) or not 0 <= weight <= 100:
                sound = False
                if not isinstance(each, Broken):
                    help = "without the percent sign" if isinstance(weight, str) and weight.endswith("%") else ""
                    sink.error("P0115", "a weight is a whole number from 0 to 100", each, help=help)
            elif VERSION_REF.judge(version, key, where, sink):
                destinations.append((Ref(version, key), weight))
                total += weight
            else:
                sound = False
        if sound and total != 100:
            sink.error("P0110", f"the weights of `{where}` sum to {total}, not 100", node)
        return tuple(destinations) if sound and total == 100 else INVALID if not destinations else tuple(destinations)

    def format(self, value: Any) -> str:
        if len(value) == 1 and value[0][1] == 100:
            return str(value[0][0].name)
        return "{" + ", ".join(f"{ref.name}: {weight}" for ref, weight in value) + "}"

    def schema(self) -> Schema:
        weight = {"type": "integer", "minimum": 0, "maximum": 100}
        name = {"pattern": words.LABEL_PATTERN}
        weights = {"type": "object", "propertyNames": name, "additionalProperties": weight, "minProperties": 1}
        return {"anyOf": [{"type": "string"} | name, weights]}


@record(frozen=True)
class OrAddress(Kind):
    """An entry of `address`: a table, or just host:port."""

    table: Table
    at: Text

    @property
    def name(self) -> str:  # type: ignore[override]
        return "host:port, or a map"

    def decode(self, node: Node, where: str, sink: Sink) -> Block | Mark:
        if isinstance(node, Scalar) and node.value is not None:
            value = self.at.decode(node, where, sink)
            return INVALID if value is INVALID else Block({"at": Stated(value, node, node)}, node)
        block: Block | Mark = self.table.decode(node, where, sink)
        return block if isinstance(block, Block) and "at" in block.fields else INVALID

    def schema(self) -> Schema:
        return {"anyOf": [self.at.schema(), self.table.schema()]}
