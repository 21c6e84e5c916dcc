"""Every key of a scenario file, declared once, with the machinery of policy files: strict, all problems at once.

Must not hold logic: kinds decode, `reading` judges what one key says of another.
"""

from dataclasses import dataclass
from typing import Any

from sidecar.model import words
from sidecar.model.fields import FILE
from sidecar.model.forms import ASKED_HEADER, HEADER_VALUE, LABEL, METHOD, SERVICE
from sidecar.model.kinds import INVALID, Choice, Duration, Flag, Kind, Number, Percent, Schema, Text
from sidecar.model.problems import Sink, clip
from sidecar.model.tables import Field, ListOf, MapOf, Table
from sidecar.model.yaml_tree import Map, Node, Scalar

from .scenario import HANG, PANELS, RESET

ENDPOINTS_MAX = 500
RATE_MAX = 1_000_000.0
_TIME = Duration(min_s=0.0, max_s=86_400.0)
_SPAN = Duration(max_s=86_400.0)
_STATUS = Number(400, 599)


@dataclass(frozen=True)
class ErrorStatus(Kind):
    """A status, or what happens in place of an answer."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return "a status, reset or hang"

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        if isinstance(node, Scalar) and node.value in ("reset", "hang"):
            return RESET if node.value == "reset" else HANG
        if isinstance(node, Scalar) and isinstance(node.value, str):
            message = f'"{clip(node.text)}" is no error'
            sink.error("P0106", message, node, help="a status from 400 to 599, reset (drops the connection), or hang")
            return INVALID
        return _STATUS.decode(node, where, sink)

    def schema(self) -> Schema:
        return {"anyOf": [{"enum": ["reset", "hang"]}, _STATUS.schema()]}


@dataclass(frozen=True)
class OrIgnore(Kind):
    """A status, or `ignore`, which is 0."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return "a status or ignore"

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        if isinstance(node, Scalar) and node.value == "ignore":
            return 0
        return _STATUS.decode(node, where, sink)

    def schema(self) -> Schema:
        return {"anyOf": [{"const": "ignore"}, _STATUS.schema()]}


@dataclass(frozen=True)
class OrMap(Kind):
    """A scalar, or a map that says more."""

    scalar: Kind
    table: Kind

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self.scalar.name}, or a map"

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        return (self.table if isinstance(node, Map) else self.scalar).decode(node, where, sink)

    def schema(self) -> Schema:
        return {"anyOf": [self.scalar.schema(), self.table.schema()]}


@dataclass(frozen=True)
class PolicyPart(Kind):
    """A file's name, or a policy as it stands; gives the node, for the policy's own decoder."""

    @property
    def name(self) -> str:  # type: ignore[override]
        return "the path of a policy file, or a policy"

    def decode(self, node: Node, where: str, sink: Sink) -> Any:
        if isinstance(node, Map) or (isinstance(node, Scalar) and isinstance(node.value, str) and node.value):
            return node
        return self.wrong(node, where, sink)

    def schema(self) -> Schema:
        return {"anyOf": [{"type": "string", "minLength": 1}, FILE.schema()]}


UNIFORM = Table(
    "latency.uniform",
    (
        Field("min", _TIME, "The shortest.", required=True),
        Field("max", _TIME, "The longest.", required=True),
    ),
)
LATENCY = OrMap(
    _TIME,
    Table(
        "latency",
        (
            Field("fixed", _TIME, "Always the same."),
            Field("uniform", UNIFORM, "Each length between two as likely."),
            Field("p50", _TIME, "Log-normal: the median."),
            Field("p99", _TIME, "Log-normal: what 99 of 100 stay under."),
        ),
        doc="One of fixed, uniform, or p50 with p99.",
    ),
)
ERRORS = Table(
    "errors",
    (
        Field("rate", Percent(), "The share of requests that fail.", required=True),
        Field("statuses", ListOf(ErrorStatus(), "a list of statuses", 1, 20), "How they fail, each as likely: a "
              "status, `reset` (the connection is dropped) or `hang` (no answer).", (500,)),
        Field("latency", LATENCY, "How long a failure takes.", builtin_text="as a success"),
        Field("retry_after", Duration(min_s=0.0, max_s=3600), "`Retry-After` of those answers."),
    ),
)  # fmt: skip
CAPACITY = Table(
    "capacity",
    (
        Field("concurrency", Number(1, 100_000), "Requests that one endpoint works on at a time.", required=True),
        Field("queue", Number(0, 1_000_000), "Requests that wait for their turn, first come first served.", 0),
        Field("status", _STATUS, "What it answers at once where the queue is full.", 503),
    ),
)
COLD_START = Table(
    "cold_start",
    (
        Field("for", _SPAN, "How long after its start an endpoint is slow.", required=True),
        Field("slowdown", Number(1, 10_000, whole=False), "How many times as slow at first; falls evenly to 1.",
              required=True),
    ),
)  # fmt: skip
_BEHAVIOUR = (
    Field("latency", LATENCY, "The application's own work on a request.", builtin_text="10ms"),
    Field("errors", ERRORS, "Requests that fail by themselves."),
    Field("capacity", CAPACITY, "Of each endpoint.", builtin_text="unlimited"),
    Field("cold_start", COLD_START, "What a start costs."),
)
_LABELS = MapOf(Text("a label", words.message, 63), Text("a label's value", words.plain_text, 255), "a map of labels")
_ZONE = Text("a zone", words.zone, 63)
_COUNT = Number(1, ENDPOINTS_MAX)
GROUP = Table(
    "endpoints",
    (
        Field("count", _COUNT, "How many.", 1),
        Field("labels", _LABELS, "What the policy's versions select by."),
        Field("zone", _ZONE, "Where they are. Callers may prefer their own, and an outage may select by it."),
        Field("priority", Number(0, 100), "0 serves first.", 0),
        Field("weight", Number(0, 1000), "The share of each, relative to the others.", 1),
        Field("from", _TIME, "When they start.", builtin_text="before the run"),
        Field("until", _TIME, "When they end, in good order.", builtin_text="after the run"),
        *_BEHAVIOUR,
    ),
    nothing=True,
    doc="What is not stated is as the service states it.",
)
_TARGET = Text("a path", words.exact_path, 2048, "^/")
_HEADERS = MapOf(ASKED_HEADER, HEADER_VALUE, "a map of headers", 64, lower=True)
_REQUEST = (
    Field("method", METHOD, "The method.", "GET"),
    Field("path", _TARGET, "The path.", "/"),
    Field("headers", _HEADERS, "Further header fields."),
)
CALL = Table(
    "calls[]",
    (
        Field("to", SERVICE, "The service.", required=True),
        *_REQUEST,
        Field("times", Number(1, 100), "How often for each request.", 1),
        Field("share", Percent(), "The share of requests that need it.", 100.0),
        Field("on_failure", OrIgnore(), "What the application answers where the call fails: a status, or `ignore`.",
              500),
    ),
)  # fmt: skip
SERVICE_FIELDS = Table(
    "services.NAME",
    (
        Field("endpoints", OrMap(_COUNT, MapOf(LABEL, GROUP, "a map of endpoints", 64)), "Their number, or groups of "
              "them by name.", builtin_text="as the policy's `address`, else 1"),
        *_BEHAVIOUR,
        Field("calls", ListOf(CALL, "a list of calls", items_max=20), "What a request needs of other services, one "
              "after the other, once the own work is done."),
        Field("propagates", Flag(), "Whether the application passes `traceparent` on.", True),
        Field("on_cancel", Choice(("finish", "stop")), "What it does with a request whose caller has gone.", "finish"),
    ),
    nothing=True,
)  # fmt: skip
_RATE = Number(0, RATE_MAX, whole=False)
POINT = Table(
    "rate[]",
    (
        Field("at", _TIME, "From when on, or at which moment.", required=True),
        Field("rate", _RATE, "Requests per second.", required=True),
    ),
)
REQUEST = Table("requests[]", (*_REQUEST, Field("weight", Number(1, 10_000), "The share, relative to the others.", 1)))
LOAD = Table(
    "load[]",
    (
        Field("from", SERVICE, "Whose application asks.", required=True),
        Field("to", SERVICE, "Which service is asked.", required=True),
        Field("rate", _RATE, "Requests per second, constant."),
        Field("steps", ListOf(POINT, "a list of points", 1, 1000), "A rate that holds until the next one."),
        Field("ramp", ListOf(POINT, "a list of points", 2, 1000), "A rate that goes evenly from one to the next."),
        Field("arrivals", Choice(("poisson", "even")), "At random, or evenly spaced.", "poisson"),
        Field("requests", ListOf(REQUEST, "a list of requests", 1, 100), "Which requests, by their shares.",
              builtin_text="GET /"),
    ),
    doc="Exactly one of rate, steps and ramp.",
)  # fmt: skip
OUTAGE = Table(
    "outages[]",
    (
        Field("at", _TIME, "When it begins.", required=True),
        Field("for", _SPAN, "How long it lasts.", builtin_text="to the end"),
        Field("service", SERVICE, "Whose endpoints.", builtin_text="every service's"),
        Field("version", LABEL, "Only those of this version of the policy."),
        Field("zone", _ZONE, "Only those of this zone."),
        Field("endpoint", Text("the name of an endpoint", words.message, 300), "Only this one."),
        Field("latency", LATENCY, "How long their work takes meanwhile."),
        Field("slowdown", Number(0.01, 10_000, whole=False), "How many times as slow they are meanwhile."),
        Field("errors", ERRORS, "How they fail meanwhile."),
        Field("down", Choice(("refused", "silent")), "They are gone: connections are refused, or nobody answers. "
              "Callers hear of it after the lease."),
        Field("unhealthy", Flag(), "Their health checks fail meanwhile. Callers hear of it after as many checks as the "
              "policy's `health` says."),
    ),
    doc="Which endpoints, and at least one of latency, slowdown, errors, down and unhealthy.",
)  # fmt: skip
AT_LEAST = ("success_effective", "success_actual")
AT_MOST = ("p50", "p99", "amplification", "openings")
OBJECTIVE = Table(
    "objectives[]",
    (
        Field("success_effective", Percent(), "At least this share of requests is answered well."),
        Field("success_actual", Percent(), "At least this share of attempts is."),
        Field("p50", _TIME, "At most this median of latency."),
        Field("p99", _TIME, "At most this 99th percentile of latency."),
        Field("amplification", Number(1, 10_000, whole=False), "At most so many attempts for each request."),
        Field("openings", Number(0, 1_000_000), "At most so many openings of breakers."),
        Field("service", SERVICE, "Of all calls to this service.", builtin_text="the load"),
        Field("after", _TIME, "Of requests from this moment on."),
        Field("before", _TIME, "Of requests before this moment."),
    ),
)
SCENARIO = Table(
    "scenario",
    (
        Field("version", Number(1, 1), "The version of this format: 1.", required=True),
        Field("policy", PolicyPart(), "A policy file or folder, relative to this file; or a policy.", required=True),
        Field("services", MapOf(SERVICE, SERVICE_FIELDS, "a map of services", 200), "How services behave.",
              required=True),
        Field("load", ListOf(LOAD, "a list of loads", 1, 100), "Who asks whom, how often.", required=True),
        Field("outages", ListOf(OUTAGE, "a list of outages", items_max=1000), "What goes wrong, and when."),
        Field("objectives", ListOf(OBJECTIVE, "a list of objectives", items_max=100), "What must hold."),
        Field("picture", ListOf(Choice(PANELS), "a list of panels", 1, len(PANELS)), "What `--svg` draws, from top to "
              "bottom.", builtin_text="success, in-flight, open-breakers"),
        Field("duration", _SPAN, "How long the load lasts.", 60.0),
        Field("seed", Number(0, 2**63 - 1), "Where chance begins.", 1),
        Field("network", _TIME, "Between two services, there and back, with both sidecars.", 0.0005),
        Field("discovery", _TIME, "Until callers hear of an endpoint that comes or goes in good order.", 1.0),
        Field("lease", _TIME, "Until callers hear of an endpoint that is lost.", 15.0),
    ),
)  # fmt: skip
