"""What good policies become."""

from pathlib import Path

import pytest

from sidecar.model.load import load_policy, load_texts
from sidecar.model.snapshot import (
    NONE,
    Call,
    Destination,
    EndpointSpec,
    Fallback,
    Fault,
    FilterUse,
    HeaderEdit,
    Health,
    Level,
    Match,
    PathHandling,
    Port,
    Protocol,
    Redirect,
    Respond,
    Rewrite,
    Route,
    Service,
    Snapshot,
    Sticky,
    Tls,
    ValueMatch,
)


def load(services: str) -> Snapshot:
    loaded = load_texts({"mesh.yaml": f"version: 1\nservices:\n{services}"})
    assert loaded.snapshot is not None, loaded.problems
    return loaded.snapshot


def route(text: str) -> Route:
    """One route of a service that has versions v1 and v2."""
    service = (
        f"  web:\n    versions: {{v1: {{labels: {{a: x}}}}, v2: {{labels: {{a: y}}}}}}\n    routes: [{{{text}}}]\n"
    )
    return load(service + "  api: {}\n").services["web"].routes[0]


def test_the_example_has_no_problems() -> None:
    loaded = load_policy([Path(__file__).parent / "example.yaml"])
    assert loaded.problems == ()
    assert loaded.snapshot is not None
    reviews = loaded.snapshot.services["reviews"]
    assert [each.name for each in reviews.routes] == ["beta-users", "write", "chaos", "canary"]
    assert reviews.routes[3].destinations == (Destination("v1", 90), Destination("v2", 10))
    assert loaded.snapshot.services["web"].calls["reviews"].local_port == 9101


def test_a_service_of_nothing() -> None:
    services = load("  a: {}\n  b:\n  c: null\n").services
    assert services["b"] == Service(
        "b", routes=(Route("default", source=services["b"].source),), source=services["b"].source
    )
    assert set(services) == {"a", "b", "c"}


def test_match() -> None:
    match = route(
        "match: {path: /a/**, methods: [GET, HEAD], from: [web, 'spiffe://x/y'], query: {Q: '1'}, "
        "headers: {X-B: on, x-a: {prefix: p}, x-c: {regex: r+}, x-d: {present: true}}}"
    ).match
    assert match == Match(
        path="/a/**",
        methods=frozenset({"GET", "HEAD"}),
        headers=(
            ("x-a", ValueMatch("prefix", "p")),
            ("x-b", ValueMatch("exact", "on")),
            ("x-c", ValueMatch("regex", "r+")),
            ("x-d", ValueMatch("present")),
        ),
        query=(("Q", ValueMatch("exact", "1")),),
        callers=frozenset({"web", "spiffe://x/y"}),
    )
    assert route("match: {path_regex: '/a[0-9]+'}").match == Match(path_regex="/a[0-9]+")
    assert route("match: {}").match == Match()


def test_destinations() -> None:
    assert route("name: x").destinations == (Destination(None),)
    assert route("to: v1").destinations == (Destination("v1"),)
    assert route("to: {v1: 1, v2: 99}").destinations == (Destination("v1", 1), Destination("v2", 99))
    assert route("to: {v1: 100, v2: 0}").destinations == (Destination("v1", 100),)


def test_actions() -> None:
    assert route("respond: {status: 204}").respond == Respond(204)
    assert route("respond: {status: 503, body: later}").respond == Respond(503, "later")
    assert route("redirect: {to: /b}").redirect == Redirect("/b", 302)
    assert route("redirect: {to: 'https://x/', status: 308}").redirect == Redirect("https://x/", 308)
    assert route("rewrite: {path: /b, host: b.example}").rewrite == Rewrite("/b", "b.example")
    assert route("upgrade: [WebSocket]").upgrade == {"websocket"}
    headers = route("headers: {request: {set: {X-A: '1'}, add: {x-b: b}, remove: [X-C]}, response: {remove: [server]}}")
    assert headers.request_headers == HeaderEdit((("x-a", "1"),), (("x-b", "b"),), ("x-c",))
    assert headers.response_headers == HeaderEdit(remove=("server",))


def test_fault() -> None:
    fault = route("fault: {delay: {fixed: 2s, percent: 50%}, abort: {status: 503, percent: 10%}}").fault
    assert fault is not None
    assert fault == Fault(2, 50, 503, 10, fault.source)
    only_abort = route("fault: {abort: {status: 500}}").fault
    assert only_abort is not None and (only_abort.delay_s, only_abort.abort_status, only_abort.abort_percent) == (
        0,
        500,
        100,
    )


def test_sticky_and_fallback() -> None:
    assert route("to: {v1: 50, v2: 50}, sticky: {}").sticky == Sticky("pillion_version", 3600)
    assert route("to: {v1: 50, v2: 50}, sticky: {level: version, cookie: c, ttl: 5m}").sticky == Sticky("c", 300)
    assert route("fallback: {version: v2}").fallback == Fallback(version="v2")
    assert route("fallback: {service: api}").fallback == Fallback(service="api")
    assert route("fallback: {status: 503, body: later}").fallback == Fallback(respond=Respond(503, "later"))


def test_filters() -> None:
    first, second = route(
        "filters: [{use: headers}, {use: 'm.f:C', with: {a: [1, on, null]}, side: out, on_error: open}]"
    ).filters
    assert first == FilterUse("headers", source=first.source)
    assert second == FilterUse("m.f:C", {"a": [1, "on", None]}, "out", "open", second.source)


def test_addresses() -> None:
    service = load(
        "  db:\n    tls: originate\n    address:\n      - DB.example:5432\n"
        "      - {at: '[::1]:1', labels: {zone: a}, weight: 3, tls: mesh, identity: spiffe://mesh/db}\n"
    ).services["db"]
    assert service.endpoints == (
        EndpointSpec("db.example", 5432, tls=Tls.ORIGINATE),
        EndpointSpec("::1", 1, {"zone": "a"}, 3, Tls.MESH, "spiffe://mesh/db"),
    )


def test_ports() -> None:
    ports = "{http: {port: 80, path_handling: strict}, sql: {port: 5432, protocol: tcp}}"
    assert load(f"  web: {{ports: {ports}}}\n").services["web"].ports == (
        Port("http", 80, path_handling=PathHandling.STRICT),
        Port("sql", 5432, Protocol.TCP),
    )


def test_a_catch_all_is_added_where_none_is_written() -> None:
    written = load("  web: {routes: [{match: {path: /a}}, {name: default}]}\n").services["web"].routes
    assert [each.name for each in written] == ["route-1", "default"]
    added = load("  web: {routes: [{name: a, match: {path: /a}}]}\n").services["web"].routes
    assert [each.name for each in added] == ["a", "default"]
    assert added[1].match == Match()


def test_calls() -> None:
    snapshot = load(
        "  api: {ports: {a: {port: 1}, b: {port: 2}}, timeout: {total: 10s}}\n"
        "  web:\n    calls:\n      db:\n"
        "      api: {port: b, local_port: 9000, timeout: {total: 5s, try: 1s}, retry: {max_retries: 0}}\n"
        "  db: {}\n"
    )
    calls = snapshot.services["web"].calls
    assert list(calls) == ["api", "db"]
    api = calls["api"]
    assert api == Call("api", "b", 9000, total_s=5, try_s=1, max_retries=0, source=api.source)
    assert {key: (each.value, each.level) for key, each in api.provenance.items()} == {
        "timeout.total": ("5s", Level.CALLER),
        "timeout.try": ("1s", Level.CALLER),
        "retry.max_retries": ("0", Level.CALLER),
    }
    assert calls["db"] == Call("db", source=calls["db"].source)


def test_a_caller_that_loosens_is_clamped() -> None:
    loaded = load_texts(
        {
            "mesh.yaml": "version: 1\nservices:\n  api: {routes: [{match: {path: /a}, timeout: {total: 20s}}]}\n"
            "  web: {calls: {api: {timeout: {total: 30s, body: 1h}, retry: {max_retries: 3}}}}\n"
        }
    )
    assert [problem.code for problem in loaded.problems] == ["P0308", "P0308"]
    assert loaded.snapshot is not None
    call = loaded.snapshot.services["web"].calls["api"]
    assert (call.total_s, call.body_s, call.max_retries, call.idle_s) == (20, 3600, 1, NONE)


@pytest.mark.parametrize(
    "services",
    [
        "  a: {routes: [{match: {path: /a}}, {match: {path: /a/b}}]}\n",
        "  a: {routes: [{match: {path: /a/*}}, {match: {path: /a/b}}]}\n",
        "  a: {routes: [{match: {path: /a/**, methods: [GET]}}, {match: {path: /a/b}}]}\n",
        "  a: {routes: [{match: {headers: {x: '1'}}}, {match: {headers: {x: '2'}}}]}\n",
        "  a: {routes: [{match: {from: [a]}}, {match: {path: /b}}]}\n",
        "  a: {routes: [{match: {path: /ab/**}}, {match: {path: /abc}}]}\n",
        "  a: {timeout: {total: 10s, try: 5s}}\n",
        "  a: {retry: {max_retries: 0}, timeout: {total: 1s, try: 5s}}\n",
        "  a: {retry: {methods: [GET, PUT]}}\n",
        "  a: {routes: [{match: {methods: [GET]}, retry: {methods: [any]}}]}\n",
        "  a: {limits: {requests: 10}}\n",
        "  a: {retry: {when: [503]}, routes: [{match: {methods: [POST]}, retry: {max_retries: 0}}]}\n",
        "  a: {retry: {when: [timeout]}, routes: [{match: {path: /a}}, {timeout: {try: 1s}}]}\n",
        "  a: {authz: {allow: [{from: ['spiffe://other/x']}]}}\n",
        "  a: {retry: {max_retries: 2}, calls: {b: {}}}\n  b: {retry: {max_retries: 2}}\n",
        "  a: {calls: {b: {}}}\n  b: {calls: {c: {retry: {max_retries: 0}}}, retry: {max_retries: 2}}\n"
        "  c: {retry: {max_retries: 2}}\n",
    ],
)
def test_no_warning_where_it_is_not_certain(services: str) -> None:
    assert load_texts({"mesh.yaml": f"version: 1\nservices:\n{services}"}).problems == ()


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        ("path: /**", "path_regex: /x"),
        ("path: /a/**", "path: /a"),
        ("path: /a/**", "path: /a/b/**"),
        ("methods: [GET, POST]", "methods: [GET], path: /a"),
        ("headers: {x: {present: true}}", "headers: {x: '1', y: '2'}"),
        ("from: [web]", "from: [web], query: {q: '1'}"),
        ("path_regex: /x+", "path_regex: /x+, methods: [GET]"),
    ],
)
def test_shadowed_routes(wide: str, narrow: str) -> None:
    loaded = load_texts(
        {"mesh.yaml": f"version: 1\nservices: {{web: {{routes: [{{match: {{{wide}}}}}, {{match: {{{narrow}}}}}]}}}}\n"}
    )
    assert [problem.code for problem in loaded.problems] == ["P0301"]


def test_a_hostile_policy_ends_soon() -> None:
    """Many unknown names, many routes, a dense graph of fallbacks: nothing grows with the square or worse."""
    count = 1500
    callers = ", ".join(f"nobody-{n}" for n in range(900))
    routes = "\n".join(
        f"      - {{match: {{headers: {{x: '{n}'}}}}, fallback: {{service: s{n % 60}}}}}" for n in range(count)
    )
    lines = []
    for n in range(60):
        onward = ", ".join(f"{{match: {{path: /{m}}}, fallback: {{service: s{m}}}}}" for m in range(n + 1, 60))
        lines.append(f"  s{n}: {{routes: [{onward}]}}")
    text = (
        f"version: 1\nservices:\n  web:\n    authz: {{deny: [{{from: [{callers}]}}]}}\n    routes:\n{routes}\n"
        + "\n".join(lines)
    )
    loaded = load_texts({"mesh.yaml": text})
    assert len(loaded.problems) == 200 and loaded.dropped > 0


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ("services: {web: {}}", None),
        ("services: {web: {health: {http: /healthz}}}", Health(http="/healthz")),
        ("services: {web: {health: {tcp: true, interval: 5s}}}", Health(interval_s=5.0)),
        ("services: {web: {health: {timeout: 1s, healthy: 1, unhealthy: 5}}}", Health(None, 10.0, 1.0, 1, 5)),
        ("defaults: {health: {http: /up, interval: 3s}}\nservices: {web: {}}", Health("/up", 3.0)),
        ("defaults: {health: {http: /up}}\nservices: {web: {health: {tcp: true}}}", Health()),
        ("defaults: {health: {tcp: true}}\nservices: {web: {health: {http: /up}}}", Health("/up")),
        (
            "services: {web: {health: {interval: 1s}}}\nenforced: {health: {interval: {min: 2s}}}",
            Health(interval_s=2.0),
        ),
    ],
)
def test_health(levels: str, expected: Health | None) -> None:
    loaded = load_texts({"mesh.yaml": f"version: 1\n{levels}\n"})
    assert loaded.snapshot is not None, loaded.problems
    assert loaded.snapshot.services["web"].health == expected
