from typing import Any

import pytest

from sidecar.model.load import load_texts
from sidecar.model.snapshot import NONE, AuthzLevel, Level, Mtls, Retry, Route, Service, Snapshot, Timeouts


def load(text: str) -> Snapshot:
    loaded = load_texts({"mesh.yaml": text})
    assert loaded.snapshot is not None, loaded.problems
    return loaded.snapshot


def web(defaults: str = "{}", service: str = "{}", enforced: str = "{}") -> Service:
    text = f"version: 1\ndefaults: {defaults}\nservices:\n  web: {service}\nenforced: {enforced}\n"
    return load(text).services["web"]


def only_route(**levels: str) -> Route:
    return web(**levels).routes[0]


def test_built_in() -> None:
    service = web()
    assert service == Service("web", routes=(Route("default", source=service.source),), source=service.source)
    assert service.routes[0].provenance["timeout.total"].level is Level.BUILT_IN


def test_the_closest_wins_field_by_field() -> None:
    route = only_route(
        defaults="{timeout: {total: 10s, try: 3s, idle: 1m}}",
        service="{timeout: {try: 2s}, routes: [{timeout: {idle: 30s}}]}",
        enforced="{timeout: {connect: 1s}}",
    )
    assert route.timeouts == Timeouts(total_s=10, try_s=2, idle_s=30, connect_s=1, idle_tcp_s=30)
    origin = route.provenance["timeout.try"]
    assert (origin.value, origin.level, origin.source.line) == ("2s", Level.SERVICE, 4)
    assert [(each.value, each.level) for each in origin.overrode] == [
        ("3s", Level.DEFAULTS),
        ("none", Level.BUILT_IN),
    ]
    assert all(each.overrode == () for each in origin.overrode)


def test_enforced_beats_the_route() -> None:
    route = only_route(service="{routes: [{retry: {max_retries: 5}}]}", enforced="{retry: {max_retries: 0}}")
    assert route.retry.max_retries == 0
    assert [each.level for each in route.provenance["retry.max_retries"].overrode] == [Level.ROUTE, Level.BUILT_IN]


def test_lists_replace() -> None:
    route = only_route(defaults="{retry: {when: [reset, 503]}}", service="{retry: {when: [5xx, gateway-error]}}")
    assert route.retry.failures == frozenset()
    assert route.retry.statuses == frozenset(range(500, 600))


def test_an_empty_list_is_a_value() -> None:
    route = only_route(
        defaults="{retry: {when: [503]}, filters: [{use: a}]}", service="{retry: {when: []}, filters: []}"
    )
    assert (route.retry.failures, route.retry.statuses, route.filters) == (frozenset(), frozenset(), ())


def test_conditions() -> None:
    retry = only_route(defaults="{retry: {when: [timeout, 429, '418', retriable-4xx], methods: [any]}}").retry
    assert retry.failures == {"timeout"}
    assert retry.statuses == {429, 418, 409, 425}
    assert retry.methods == {"any"}


@pytest.mark.parametrize("null", ["{total: null}", "null", "{total: }", "~"])
def test_null_restores_the_built_in(null: str) -> None:
    route = only_route(defaults="{timeout: {total: 1s}}", service=f"{{timeout: {null}}}")
    assert route.timeouts.total_s == 15
    origin = route.provenance["timeout.total"]
    assert (origin.value, origin.level) == ("15s", Level.SERVICE)


def test_null_restores_idle_for_tcp_as_well() -> None:
    service = web(defaults="{timeout: {idle: 1s}}", service="{timeout: {idle: null}}")
    assert (service.timeouts.idle_s, service.timeouts.idle_tcp_s) == (300, 3600)


def test_null_switches_a_limit_off() -> None:
    limit = "{rate_limit: {requests: 5}}"
    assert only_route(defaults=limit).rate_limit is not None
    assert only_route(defaults=limit, service="{rate_limit: null}").rate_limit is None


@pytest.mark.parametrize(
    ("below", "clamp", "effective", "level"),
    [
        ("{total: 10s}", "{max: 30s}", 10, Level.SERVICE),
        ("{total: 60s}", "{max: 30s}", 30, Level.ENFORCED),
        ("{total: none}", "{max: 30s}", 30, Level.ENFORCED),
        ("{total: 1s}", "{min: 2s, max: 30s}", 2, Level.ENFORCED),
        ("{total: none}", "{min: 2s}", NONE, Level.SERVICE),
        ("{}", "{max: 5s}", 5, Level.ENFORCED),
    ],
)
def test_clamps(below: str, clamp: str, effective: float, level: Level) -> None:
    route = only_route(service=f"{{timeout: {below}}}", enforced=f"{{timeout: {{total: {clamp}}}}}")
    assert route.timeouts.total_s == effective
    assert route.provenance["timeout.total"].level is level


def test_a_clamp_of_idle_treats_both_built_ins() -> None:
    timeouts = web(enforced="{timeout: {idle: {max: 10m}}}").timeouts
    assert (timeouts.idle_s, timeouts.idle_tcp_s) == (300, 600)


def test_a_clamp_reaches_every_route() -> None:
    service = web(
        service="{routes: [{match: {path: /a}, retry: {max_retries: 9}}, {retry: {max_retries: 3}}]}",
        enforced="{retry: {max_retries: {max: 5}}, limits: {requests: {max: 10}}, max_connection_age: {max: 1h}}",
    )
    assert [route.retry.max_retries for route in service.routes] == [5, 3]
    assert service.limits.requests == 10
    assert service.max_connection_age_s == 3600


def test_a_clamp_of_what_is_not_stated_does_nothing() -> None:
    assert only_route(enforced="{rate_limit: {requests: {max: 5}}}").rate_limit is None


def test_the_greatest_backoff_follows_the_first() -> None:
    assert only_route(defaults="{retry: {base: 100ms}}").retry.max_s == 1.0
    assert only_route(defaults="{retry: {base: 100ms, max: 200ms}}").retry.max_s == 0.2
    assert only_route(defaults="{retry: {base: 100ms, max: 200ms}}", service="{retry: {max: null}}").retry.max_s == 1.0
    assert only_route(defaults="{retry: {base: 100ms}}", enforced="{retry: {max: {max: 400ms}}}").retry.max_s == 0.4


def test_whole_settings() -> None:
    service = web(
        service="""
      limits: {connections: 1, pending: 0, requests: 3}
      circuit_breaker: {consecutive_failures: 2, open_for: 1s, max_open: 4s, success_rate: 90%}
      balance: {policy: round-robin}
      mtls: permissive
      pool: {idle: 3s}
      max_connection_age: 1h
      owners: [team-a]
      retry:
        {max_retries: 3, base: 10ms, max: 1s, max_server_delay: 2s, honour_retry_after: false,
         budget: {percent: 12.5%, min_per_second: 0.5}}
      rate_limit: {requests: 10, per: 1m, key: "header:X-Tenant"}
"""
    )
    assert (service.limits.connections, service.limits.pending, service.limits.requests) == (1, 0, 3)
    breaker = service.circuit_breaker
    assert (breaker.consecutive_failures, breaker.open_for_s, breaker.max_open_s, breaker.success_rate) == (2, 1, 4, 90)
    assert (service.balance, service.mtls, service.pool_idle_s) == ("round-robin", Mtls.PERMISSIVE, 3)
    assert (service.max_connection_age_s, service.owners) == (3600, ("team-a",))
    retry: Retry = service.routes[0].retry
    assert (retry.base_s, retry.max_s, retry.max_server_delay_s, retry.honour_retry_after) == (0.01, 1, 2, False)
    assert (retry.budget.percent, retry.budget.min_per_second) == (12.5, 0.5)
    limit = service.routes[0].rate_limit
    assert limit is not None
    assert (limit.requests, limit.per_s, limit.burst, limit.key) == (10, 60, 10, "header:x-tenant")


def test_routes_that_inherit_a_limit_have_the_same_one() -> None:
    service = web(
        service="""
      rate_limit: {requests: 5}
      routes: [{match: {path: /a}}, {match: {path: /b}, rate_limit: {requests: 1}}]
"""
    )
    first, own, catch_all = (route.rate_limit for route in service.routes)
    assert first == catch_all and own != first and own is not None and own.per_s == 1


def test_success_rate_can_be_switched_off_again() -> None:
    on = "{circuit_breaker: {success_rate: 90%}}"
    assert web(defaults=on).circuit_breaker.success_rate == 90
    assert web(defaults=on, service="{circuit_breaker: {success_rate: none}}").circuit_breaker.success_rate is None


def levels(**stated: str) -> tuple[AuthzLevel, ...]:
    return only_route(**stated).authz


def test_authorization_is_stacked() -> None:
    stack = levels(
        defaults="{authz: {default: deny, deny: [{from: [web]}]}}",
        service="""
      authz: {allow: [{from: [web], methods: [GET]}]}
      routes: [{name: r, authz: {mode: audit, allow: []}}]
""",
        enforced="{authz: {allow: [{paths: [/a/**]}]}}",
    )
    assert [level.level for level in stack] == [Level.DEFAULTS, Level.SERVICE, Level.ROUTE, Level.ENFORCED]
    names = [rule.name for level in stack for rule in (*(level.allow or ()), *level.deny)]
    assert names == ["defaults.authz.deny[0]", "services.web.authz.allow[0]", "enforced.authz.allow[0]"]
    assert (stack[0].default, stack[0].mode, stack[0].allow) == ("deny", None, None)
    assert (stack[2].mode, stack[2].allow) == ("audit", ())


def test_null_puts_the_built_in_default_over_the_levels_below() -> None:
    stack = levels(defaults="{authz: {default: deny, mode: audit}}", service="{authz: {default: null, mode: null}}")
    assert (stack[1].default, stack[1].mode) == ("mesh", "enforce")


def test_levels_that_say_nothing_are_left_out() -> None:
    assert levels(defaults="{authz: {}}", service="{authz: {}}") == ()


def test_tcp_authorization_has_no_route_level() -> None:
    service = web(
        service="{authz: {default: deny}, routes: [{authz: {default: allow}}]}", enforced="{authz: {deny: [{}]}}"
    )
    assert [level.level for level in service.authz] == [Level.SERVICE, Level.ENFORCED]


def test_equal_policies_give_equal_snapshots() -> None:
    one = load("version: 1\nservices: {b: {}, a: {routes: [{match: {headers: {x: '1', y: '2'}}}]}}\n")
    two = load("version: 1\nservices: {b: {}, a: {routes: [{match: {headers: {y: '2', x: '1'}}}]}}\n")
    assert list(one.services) == ["a", "b"]
    assert one.services["a"].routes[0].match == two.services["a"].routes[0].match


def test_settings_are_shared_where_nothing_differs() -> None:
    service = web(service="{routes: [{match: {path: /a}}, {match: {path: /b}}]}")
    assert service.routes[0].retry is service.routes[2].retry


def provenance(route: Route) -> dict[str, Any]:
    return {key: origin.value for key, origin in route.provenance.items()}


def test_what_only_routes_have_is_in_the_provenance_too() -> None:
    route = only_route(
        service="""
      versions: {v1: {labels: {a: b}}, v2: {labels: {a: c}}}
      routes: [{to: {v1: 90, v2: 10}, upgrade: [WebSocket]}]
"""
    )
    values = provenance(route)
    assert (values["to"], values["upgrade"]) == ("{v1: 90, v2: 10}", "[websocket]")
