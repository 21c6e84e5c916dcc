"""Valid policies for property tests: plain data, to be written as YAML."""

from typing import Any

from hypothesis import strategies as st

from sidecar.model import fields
from sidecar.model.forms import BalancerName, GrpcHealth, RetryCondition, ValueForm
from sidecar.model.kinds import Choice, Duration, Flag, Kind, Number, Percent, Text
from sidecar.model.tables import Anything, Clampable, ListOf, MapOf, Table

Data = st.SearchStrategy[Any]

_TEXTS = {
    "a caller: a service or a SPIFFE ID": ("web", "api", "spiffe://other.mesh/service/x"),
    "an HTTP method": ("GET", "POST", "PURGE"),
    "an HTTP method, or any": ("GET", "any"),
    "a header name": ("x-a", "X-B", "accept"),
    "a header value": ("", "1", "on", "a b", "x:y"),
    "a cookie's name": ("session", "beta"),
    "a name": ("batch", "default"),
    "a path": ("/", "/healthz"),
    "a path or a path pattern": ("/", "/a", "/a/**", "/**/b", "/*/c*d/e"),
    "a regular expression": ("/a.*", "[0-9]{1,3}", "on"),
    "a query name": ("q", "no"),
    "the name of a filter": ("headers", "my.filters:Add"),
    "a text": ("", "no: really", "é"),
    "caller, address, header:NAME or none": ("caller", "address", "none", "header:X-Tenant"),
    "header:NAME, cookie:NAME, caller or address": ("header:X-User", "cookie:session", "caller"),
    "a zone": ("eu-1a", "on"),
    "an upgrade": ("websocket",),
    "true": ("true",),
    "the name of a gRPC service": ("shop.v1.Cart", "Echo"),
    "the name of a gRPC method": ("AddItem",),
}


def data_for(kind: Kind) -> Data:
    """What a user may write for a value of this kind."""
    match kind:
        case Clampable():
            inner = data_for(kind.kind)
            return (
                inner | st.builds(lambda value: {"max": value}, inner) | st.builds(lambda value: {"min": value}, inner)
            )
        case Duration():
            ends = st.just("none") if kind.none else st.nothing()
            return st.sampled_from(("250ms", "1s", "1.5s", "2m")) | ends
        case Percent():
            return st.sampled_from(("0%", "12.5%", "100%"))
        case Number():
            numbers = st.integers(int(kind.minimum), int(min(kind.maximum, 1000)))
            return numbers if kind.whole else numbers | st.floats(0, 100, allow_nan=False, width=16)
        case Flag():
            return st.booleans()
        case Choice():
            return st.sampled_from(kind.words)
        case RetryCondition():
            return st.sampled_from(
                ("reset", "timeout", 503, "5xx", "gateway-error", "unavailable", "resource-exhausted")
            )
        case BalancerName():
            return st.sampled_from(("random", "peak-ewma", "my_team.balancers:Cheapest", "cheapest"))
        case ValueForm():
            return st.sampled_from(("1", {"prefix": "a"}, {"regex": "a+"}, {"present": True}))
        case Anything():
            leaves = st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(("on", "1", "", "x y"))
            return st.dictionaries(st.sampled_from("abc"), leaves | st.lists(leaves, max_size=2), max_size=2)
        case GrpcHealth():
            return st.sampled_from((True, "shop.v1.Cart"))
        case ListOf():
            unique = repr if kind.unique else None
            return st.lists(data_for(kind.item), min_size=kind.items_min, max_size=3, unique_by=unique)
        case MapOf():
            return st.dictionaries(data_for(kind.key), data_for(kind.item), max_size=2)
        case Table():
            return _table(kind)
        case Text():
            return st.sampled_from(_TEXTS[kind.what])
    raise AssertionError(kind)


def _table(table: Table) -> Data:
    required = {each.key: data_for(each.kind) for each in table.fields if each.required}
    optional = {each.key: data_for(each.kind) for each in table.fields if not each.required and not each.later}
    if table is fields.MATCH:
        optional.pop("path_regex")  # beside `path`
        optional.pop("grpc")
    if table.title == "match.grpc":
        required["service"] = optional.pop("service")
    if table.title == "retry":
        optional.pop("max")  # so that it is never shorter than `base`
    if table.title == "health":
        optional.pop("tcp")  # a contradiction beside `http`
        optional.pop("grpc")
    if table.title == "rate_limit":
        required = {"requests": optional.pop("requests")}
    return st.fixed_dictionaries(required, optional=optional)


_SETTINGS = {each.key: data_for(each.kind) for each in (*fields.SETTINGS.fields, fields.AUTHZ_FIELD)}
_VERSIONS = {"v1": {"labels": {"version": "1"}}, "v2": {"labels": {"version": "2"}}}

_ROUTES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "match": data_for(fields.MATCH),
            "to": st.sampled_from(("v1", {"v1": 90, "v2": 10}, {"v1": 100, "v2": 0})),
            "fault": st.fixed_dictionaries(
                {"delay": data_for(fields.DELAY)}, optional={"abort": data_for(fields.ABORT)}
            ),
            "sticky": st.sampled_from(({}, {"cookie": "c", "ttl": "1h"}, {"level": "version"}, {"level": "endpoint"})),
            "fallback": st.sampled_from(({"version": "v2"}, {"service": "api"}, {"status": 503, "body": "later"})),
            "mirror": st.sampled_from(({"to": "v2"}, {"service": "api", "percent": "2.5%", "writes": True})),
            "headers": st.fixed_dictionaries(
                {"request": st.sampled_from(({"set": {"X-A": "1"}}, {"remove": ["x-b"]}))}
            ),
            "upgrade": st.just(["websocket"]),
        }
        | {each.key: data_for(each.kind) for each in (*fields.ROUTE_SETTINGS.fields, fields.AUTHZ_FIELD)},
    ),
    max_size=3,
)


def _level(table: Table) -> Data:
    keys = {each.key: data_for(each.kind) for each in table.fields if not each.later}
    return st.fixed_dictionaries({}, optional=keys)


def policies() -> Data:
    """Services web, api and db, with any settings at any level."""
    web = st.fixed_dictionaries(
        {"versions": st.just(_VERSIONS), "ports": st.just({"http": {"port": 80}})},
        optional=_SETTINGS | {"routes": _ROUTES, "owners": st.just(["team-a"])},
    )
    api = st.fixed_dictionaries(
        {},
        optional=_SETTINGS
        | {
            "address": st.just(
                ["10.0.0.1:80", {"at": "[::1]:81", "labels": {"a": "on"}, "weight": 3, "zone": "a", "priority": 1}]
            )
        }
        | {"calls": st.just({"web": {"local_port": 9000, "timeout": {"total": "1s"}, "retry": {"max_retries": 0}}})},
    )
    return st.fixed_dictionaries(
        {"version": st.just(1), "services": st.fixed_dictionaries({"web": web, "api": api, "db": st.just({})})},
        optional={"defaults": _level(fields.DEFAULTS), "enforced": _level(fields.ENFORCED)},
    )
