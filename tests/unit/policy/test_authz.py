"""Authorization against the prose, by way of a slow reference that shares no code with the compiled form."""

import re
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.model.snapshot import AuthzLevel, Level, Rule, ValueMatch
from sidecar.model.source import BUILT_IN, Source
from sidecar.policy.authz import Authorizer, Stage, Verdict, compile_authz, service_of
from sidecar.policy.paths import Readings, judge

TD = "mesh.test"
WEB, ADMIN, STRANGER = (f"spiffe://{TD}/service/{name}" for name in ("web", "admin", "stranger"))
FOREIGN = "spiffe://elsewhere.test/service/web"
CLOSEST_FIRST = (Level.ENFORCED, Level.ROUTE, Level.SERVICE, Level.DEFAULTS)

Fields = list[tuple[bytes, bytes]]
WITHOUT_HEADERS: Fields = []


# The reference, written from docs/policy.md sentence by sentence. Not compiled, not indexed, not shared.


def value_matches(match: ValueMatch, value: str) -> bool:
    if match.kind == "exact":
        return value == match.value
    if match.kind == "prefix":
        return value.startswith(match.value)
    return match.kind == "present" or re.fullmatch(match.value, value, re.DOTALL) is not None


def glob_matches(glob: str, path: str) -> bool:
    """By recursion over segments: `*` a non-empty segment or part of one, `**` any number of segments."""

    def go(pattern: list[str], parts: list[str]) -> bool:
        if not pattern:
            return not parts
        if pattern[0] == "**":
            return any(go(pattern[1:], parts[n:]) for n in range(len(parts) + 1))
        if not parts:
            return False
        one = "[^/]+" if pattern[0] == "*" else "[^/]*".join(re.escape(text) for text in pattern[0].split("*"))
        return re.fullmatch(one, parts[0]) is not None and go(pattern[1:], parts[1:])

    return go(glob[1:].split("/"), path[1:].split("/"))


def rule_matches(rule: Rule, deny: bool, caller: str | None, request: tuple[str, Readings, Fields] | None) -> bool:
    if rule.callers is not None and caller not in [
        name if "://" in name else f"spiffe://{TD}/service/{name}" for name in rule.callers
    ]:
        return False
    if request is None:  # plain TCP
        return deny or (rule.methods is None and rule.paths is None and not rule.headers)
    method, readings, headers = request
    if rule.methods is not None and method not in rule.methods:
        return False
    if rule.paths is not None:
        hits = [
            any(glob_matches(glob, path.decode()) for glob in rule.paths) for path in (readings.as_is, readings.merged)
        ]
        if not (any(hits) if deny else all(hits)):
            return False
    for name, match in rule.headers:
        values = [value.decode() for key, value in headers if key.decode() == name]
        if deny:
            values += [element.strip(" \t") for value in values for element in value.split(",")]
        hits = [value_matches(match, value) for value in values]
        if not hits or not (any(hits) if deny else all(hits)):
            return False
    return True


def reference(
    levels: tuple[AuthzLevel, ...],
    caller: str | None,
    request: tuple[str, Readings, Fields] | None,
    plain_allowed: bool,
) -> tuple[bool, int]:
    """(allowed, how many things were only logged)."""
    at = {level.level: level for level in levels}
    modes = [at[name].mode for name in CLOSEST_FIRST if name in at and at[name].mode is not None]
    audit = bool(modes) and modes[0] == "audit"
    logged = 0
    refused = False
    for name in CLOSEST_FIRST:
        for rule in at[name].deny if name in at else ():
            if not refused and rule_matches(rule, True, caller, request):
                if at[name].mode == "audit":
                    logged += 1
                else:
                    refused = True
    if refused:
        return False, logged
    enforced = at.get(Level.ENFORCED)
    ceiling = enforced.allow if enforced is not None else None
    if ceiling is not None and not any(rule_matches(rule, False, caller, request) for rule in ceiling):
        return False, logged
    union = [rule for level in levels if level.level is not Level.ENFORCED for rule in level.allow or ()]
    if union:
        admitted = any(rule_matches(rule, False, caller, request) for rule in union)
    else:
        defaults = [at[name].default for name in CLOSEST_FIRST if name in at and at[name].default is not None]
        default = defaults[0] if defaults else "mesh"
        admitted = default == "allow"
        if default == "mesh":
            admitted = plain_allowed if caller is None else caller.startswith(f"spiffe://{TD}/")
    if not admitted and audit:
        return True, logged + 1
    return admitted, logged


# The truth table.

HIT = Rule("hit")
MISS = Rule("miss", callers=("nobody",))
ALLOWS = {"none": None, "hit": (HIT,), "miss": (MISS,)}


def stack(
    denies: tuple[bool, ...], ceiling: str, allows: str, allow_at: Level, default: str | None, audits: tuple[bool, ...]
) -> tuple[AuthzLevel, ...]:
    """One level each; the stated default stands at the service, under a contrary one of `defaults`."""
    contrary = {"allow": "deny", "deny": "allow", "mesh": "deny"}
    levels = []
    for level, deny, audit in zip(reversed(CLOSEST_FIRST), denies, audits, strict=True):
        allow = ALLOWS[ceiling] if level is Level.ENFORCED else ALLOWS[allows] if level is allow_at else None
        stated = default if level is Level.SERVICE else None
        if level is Level.DEFAULTS and default is not None:
            stated = contrary[default]
        levels.append(AuthzLevel(level, allow, (HIT,) if deny else (MISS,), stated, "audit" if audit else None))
    return tuple(levels)


@pytest.mark.parametrize("default", [None, "mesh", "allow", "deny"])
@pytest.mark.parametrize("allow_at", [Level.DEFAULTS, Level.SERVICE, Level.ROUTE])
def test_truth_table(default: str | None, allow_at: Level) -> None:
    readings = judge(b"/a")
    yes_no = (False, True)
    for denies, ceiling, allows, audits in product(
        product(yes_no, repeat=4), ALLOWS, ALLOWS, product(yes_no, repeat=4)
    ):
        levels = stack(denies, ceiling, allows, allow_at, default, audits)
        authorizer = Authorizer(levels, TD)
        for caller, plain_allowed in ((WEB, False), (FOREIGN, True), (None, False), (None, True)):
            verdict = authorizer.judge(caller, b"GET", readings, [], plain_allowed=plain_allowed)
            expected = reference(levels, caller, ("GET", readings, []), plain_allowed)
            assert (verdict.allowed, len(verdict.audited)) == expected, (denies, ceiling, allows, audits, caller)


globs = st.sampled_from(["/a", "/a/**", "/a/*", "/**/b", "/a/*/b", "/**"])
values = st.builds(ValueMatch, st.sampled_from(["exact", "prefix", "present", "regex"]), st.sampled_from(["1", "1.*"]))
rules = st.builds(
    Rule,
    st.just("rule"),
    callers=st.none() | st.lists(st.sampled_from(["web", "admin", WEB, FOREIGN]), max_size=2).map(tuple),
    methods=st.none() | st.frozensets(st.sampled_from(["GET", "PUT"])),
    paths=st.none() | st.none() | st.lists(globs, max_size=2).map(tuple),
    headers=st.lists(st.tuples(st.sampled_from(["x", "y"]), values), max_size=1).map(tuple),
)


def level_of(level: Level) -> st.SearchStrategy[AuthzLevel]:
    return st.builds(
        AuthzLevel,
        st.just(level),
        allow=st.none() | st.lists(rules, max_size=3).map(tuple),
        deny=st.lists(rules, max_size=2).map(tuple),
        default=st.sampled_from([None, "mesh", "allow", "deny"]),
        mode=st.sampled_from([None, None, "enforce", "audit"]),
    )


level_stacks = st.tuples(*(st.none() | level_of(level) for level in reversed(CLOSEST_FIRST))).map(
    lambda levels: tuple(level for level in levels if level is not None)
)
requests = st.tuples(
    st.sampled_from(["GET", "PUT"]),
    st.sampled_from([b"/a", b"/a/b", b"/a//b", b"/a/x;p/b", b"/a/..;/b", b"/a/", b"/c"]).map(judge),
    st.lists(st.tuples(st.sampled_from([b"x", b"y"]), st.sampled_from([b"1", b"12", b"2", b"2, 1"])), max_size=3),
)


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    levels=level_stacks,
    caller=st.sampled_from([WEB, ADMIN, STRANGER, FOREIGN, None]),
    request_=requests,
    tcp=st.booleans(),
    plain_allowed=st.booleans(),
)
def test_agrees_with_the_prose(
    levels: tuple[AuthzLevel, ...],
    caller: str | None,
    request_: tuple[str, Readings, Fields],
    tcp: bool,
    plain_allowed: bool,
) -> None:
    method, readings, headers = request_
    expected = reference(levels, caller, None if tcp else request_, plain_allowed)
    authorizer = Authorizer(levels, TD)
    verdict, steps = authorizer.trace(caller, method.encode(), readings, headers, tcp=tcp, plain_allowed=plain_allowed)
    assert (verdict.allowed, len(verdict.audited)) == expected
    deciding = [step for step in steps if step.matched and step.stage is verdict.stage]
    assert deciding, "the trace shows the step that decided"
    assert verdict.level in {step.level for step in deciding}
    if compile_authz(levels, TD, peers_authenticated=False) is None:
        assert expected == (True, 0)
    if compile_authz(levels, TD) is None and caller != FOREIGN and (caller is not None or plain_allowed):
        assert expected == (True, 0)


# The algebra in words, one example each.


def verdict_of(
    *levels: AuthzLevel, caller: str | None = WEB, target: bytes = b"/a", headers: Fields = WITHOUT_HEADERS
) -> Verdict:
    return Authorizer(levels, TD).judge(caller, b"GET", judge(target), headers)


def test_nothing_stated_costs_nothing() -> None:
    assert compile_authz((), TD) is None
    assert compile_authz((AuthzLevel(Level.SERVICE, allow=()),), TD) is None
    assert compile_authz((AuthzLevel(Level.SERVICE, default="allow", mode="audit"),), TD) is None
    assert compile_authz((), TD, peers_authenticated=False) is not None
    assert compile_authz((AuthzLevel(Level.SERVICE, default="deny"),), TD) is not None
    assert compile_authz((AuthzLevel(Level.ENFORCED, allow=()),), TD) is not None, "an empty ceiling refuses everything"


def test_the_built_in_default_admits_the_mesh_only() -> None:
    authorizer = Authorizer((), TD)
    assert authorizer.judge(WEB, b"GET", None, []).allowed
    assert authorizer.judge(f"spiffe://{TD}/operator/ann", b"GET", None, []).allowed
    assert not authorizer.judge(FOREIGN, b"GET", None, []).allowed
    assert not authorizer.judge(f"spiffe://{TD}.evil/service/web", b"GET", None, []).allowed
    assert not authorizer.judge(None, b"GET", None, []).allowed
    assert authorizer.judge(None, b"GET", None, [], plain_allowed=True).allowed


def test_a_deny_of_any_level_beats_every_allow() -> None:
    allow = AuthzLevel(Level.ROUTE, allow=(Rule("yes"),))
    for level in (Level.DEFAULTS, Level.SERVICE, Level.ENFORCED):
        verdict = verdict_of(AuthzLevel(level, deny=(Rule("no", callers=("web",)),)), allow)
        assert (verdict.allowed, verdict.stage, verdict.level, verdict.name) == (False, Stage.DENY, level, "no")


def test_allows_add_up_over_levels() -> None:
    levels = (
        AuthzLevel(Level.DEFAULTS, allow=(Rule("of-defaults", callers=("web",)),)),
        AuthzLevel(Level.ROUTE, allow=(Rule("of-route", callers=("admin",)),)),
    )
    assert verdict_of(*levels, caller=WEB).name == "of-defaults"
    assert verdict_of(*levels, caller=ADMIN).name == "of-route"
    refused = verdict_of(*levels, caller=STRANGER)
    assert (refused.allowed, refused.stage, refused.level, refused.rule) == (False, Stage.ALLOW, Level.ROUTE, None)


def test_where_allows_exist_the_default_is_not_asked() -> None:
    levels = (AuthzLevel(Level.SERVICE, allow=(MISS,), default="allow"),)
    assert not verdict_of(*levels).allowed


def test_the_closest_default_decides_and_enforced_is_the_closest() -> None:
    assert verdict_of(AuthzLevel(Level.DEFAULTS, default="deny"), AuthzLevel(Level.ROUTE, default="allow")).allowed
    verdict = verdict_of(AuthzLevel(Level.ROUTE, default="allow"), AuthzLevel(Level.ENFORCED, default="deny"))
    assert (verdict.allowed, verdict.level, verdict.name) == (False, Level.ENFORCED, "enforced.authz.default")


def test_the_ceiling_only_takes_away() -> None:
    ceiling = AuthzLevel(Level.ENFORCED, allow=(Rule("ceiling", callers=("web", "admin")),))
    allow = AuthzLevel(Level.SERVICE, allow=(Rule("web-and-stranger", callers=("web", "stranger")),))
    assert verdict_of(allow, ceiling, caller=WEB).allowed
    assert verdict_of(allow, ceiling, caller=ADMIN).stage is Stage.ALLOW
    assert not verdict_of(allow, ceiling, caller=ADMIN).allowed
    assert verdict_of(allow, ceiling, caller=STRANGER).stage is Stage.CEILING
    assert not verdict_of(allow, ceiling, caller=STRANGER).allowed


def test_audit_of_a_level_logs_its_own_denies_only() -> None:
    quiet = AuthzLevel(Level.DEFAULTS, deny=(Rule("quiet"),), mode="audit")
    verdict = verdict_of(quiet, AuthzLevel(Level.SERVICE, mode="enforce", allow=(HIT,)))
    assert verdict.allowed
    assert verdict.rule == HIT
    assert [(one.rule.name, one.would) for one in verdict.audited if one.rule] == [
        ("quiet", "would refuse: denied by quiet")
    ]
    loud = AuthzLevel(Level.SERVICE, deny=(Rule("loud"),))
    verdict = verdict_of(quiet, loud)
    assert (verdict.allowed, verdict.name) == (False, "loud")


def test_audit_as_the_closest_mode_spares_allows_and_default_but_not_the_ceiling() -> None:
    audit = AuthzLevel(Level.SERVICE, allow=(MISS,), mode="audit")
    verdict = verdict_of(AuthzLevel(Level.DEFAULTS, mode="enforce"), audit)
    assert verdict.allowed
    assert verdict.audited[0].would == "would refuse: no allow rule matches"
    assert not verdict_of(audit, AuthzLevel(Level.ROUTE, mode="enforce")).allowed
    assert not verdict_of(audit, AuthzLevel(Level.ENFORCED, allow=(MISS,))).allowed
    assert not verdict_of(AuthzLevel(Level.ENFORCED, allow=(MISS,), mode="audit")).allowed
    default = verdict_of(AuthzLevel(Level.SERVICE, default="deny", mode="audit"))
    assert default.allowed
    assert default.audited[0].would == "would refuse: default deny of service"


def test_names_are_services_of_the_own_trust_domain() -> None:
    by_name = AuthzLevel(Level.SERVICE, allow=(Rule("r", callers=("web",)),))
    assert verdict_of(by_name, caller=WEB).allowed
    for caller in (FOREIGN, f"spiffe://{TD}/web", f"{WEB}/", f"{WEB}x", "web", None):
        assert not verdict_of(by_name, caller=caller).allowed
    by_id = AuthzLevel(Level.SERVICE, allow=(Rule("r", callers=(FOREIGN,)),))
    assert verdict_of(by_id, caller=FOREIGN).allowed
    assert not verdict_of(by_id, caller=WEB).allowed


def test_service_of() -> None:
    assert service_of(WEB, TD) == "web"
    for identity in (None, FOREIGN, f"spiffe://{TD}/service/", f"spiffe://{TD}/service/a/b", f"spiffe://{TD}/user/web"):
        assert service_of(identity, TD) is None


@pytest.mark.parametrize(
    ("values", "denied", "allowed"),
    [
        ([], False, False),
        ([b"1"], True, True),
        ([b"2"], False, False),
        ([b"1", b"1"], True, True),
        ([b"1", b"2"], True, False),
        ([b"2", b"1"], True, False),
        ([b"2, 1"], True, False),
        ([b"2,\t1 ,3"], True, False),
    ],
)
def test_headers_with_several_values(values: list[bytes], denied: bool, allowed: bool) -> None:
    rule = Rule("r", headers=(("x", ValueMatch("exact", "1")),))
    headers = [(b"y", b"1"), *((b"x", value) for value in values)]
    assert verdict_of(AuthzLevel(Level.SERVICE, deny=(rule,)), headers=headers).allowed is not denied
    assert verdict_of(AuthzLevel(Level.SERVICE, allow=(rule,)), headers=headers).allowed is allowed


@pytest.mark.parametrize(
    "target",
    [
        b"/admin",
        b"/admin/",
        b"/admin/x",
        b"//admin/x",
        b"/public/../admin",
        b"/public/%2e%2e/admin",
        b"/public/..;/admin",
        b"/public/..;a=b/admin/x",
        b"/;x/admin",
        b"/./admin",
        b"/%61dmin",
        b"/%61%64%6D%69%6e/x",
        b"/admin;x=1",
        b"/admin/;/x",
        b"/admin?x=/public",
        b"/public/..//admin",
        b"/admin//",
        b"///admin",
    ],
)
def test_no_spelling_of_a_path_goes_round_a_deny_or_an_allow(target: bytes) -> None:
    rest = Rule("rest", paths=("/**",))
    assert not verdict_of(
        AuthzLevel(Level.SERVICE, allow=(rest,), deny=(Rule("no", paths=("/admin/**",)),)), target=target
    ).allowed
    public = AuthzLevel(Level.SERVICE, allow=(Rule("public", paths=("/public/**", "/public")),))
    assert not verdict_of(public, target=target).allowed


@pytest.mark.parametrize("target", [b"/%41dmin", b"/%2561dmin", b"/%252e/admin", b"/%C0%AFadmin", b"/x%3B/admin"])
def test_other_paths_are_other_paths(target: bytes) -> None:
    """Case counts, and what is encoded twice stays encoded: that is what is forwarded."""
    level = AuthzLevel(Level.SERVICE, deny=(Rule("no", paths=("/admin/**",)),))
    assert verdict_of(level, target=target).allowed
    assert judge(target).as_is == judge(target).merged


def test_an_unread_path_never_admits() -> None:
    denied = Authorizer((AuthzLevel(Level.SERVICE, deny=(Rule("r", paths=("/a",)),)),), TD)
    allowed = Authorizer((AuthzLevel(Level.SERVICE, allow=(Rule("r", paths=("/a",)),)),), TD)
    assert denied.needs_path and allowed.needs_path
    assert not denied.judge(WEB, b"GET", None, []).allowed
    assert not allowed.judge(WEB, b"GET", None, []).allowed


def test_http_attributes_on_tcp_match_for_deny_and_never_for_allow() -> None:
    for rule in (
        Rule("r", methods=frozenset({"GET"})),
        Rule("r", paths=("/**",)),
        Rule("r", headers=(("x", ValueMatch("present")),)),
    ):
        deny = Authorizer((AuthzLevel(Level.SERVICE, deny=(rule,)),), TD)
        allow = Authorizer((AuthzLevel(Level.SERVICE, allow=(rule,)),), TD)
        ceiling = Authorizer((AuthzLevel(Level.ENFORCED, allow=(rule,)),), TD)
        for authorizer in (deny, allow, ceiling):
            assert not authorizer.judge(WEB, b"", None, [], tcp=True).allowed
    named = Authorizer((AuthzLevel(Level.SERVICE, deny=(Rule("r", ("admin",), frozenset({"GET"})),)),), TD)
    assert named.judge(WEB, b"", None, [], tcp=True).allowed, "the caller still counts"
    assert not named.judge(ADMIN, b"", None, [], tcp=True).allowed


def test_needs_path_only_where_a_rule_has_paths() -> None:
    assert not Authorizer((AuthzLevel(Level.SERVICE, allow=(Rule("r", methods=frozenset({"GET"})),)),), TD).needs_path
    assert Authorizer((AuthzLevel(Level.ENFORCED, allow=(Rule("r", paths=("/a",)),)),), TD).needs_path


def test_an_ordinary_verdict_is_shared() -> None:
    levels = (
        AuthzLevel(Level.SERVICE, allow=(Rule("r", callers=("web",)),), deny=(Rule("d", methods=frozenset({"PUT"})),)),
    )
    authorizer = Authorizer(levels, TD)
    for caller, method in ((WEB, b"GET"), (ADMIN, b"GET"), (WEB, b"PUT")):
        assert authorizer.judge(caller, method, None, []) is authorizer.judge(caller, method, None, [])
    default = Authorizer((), TD)
    assert default.judge(WEB, b"GET", None, []) is default.judge(ADMIN, b"PUT", None, [])


def test_explanations_name_rule_and_place() -> None:
    rule = Rule("services.reviews.authz.allow[0]", ("web",), frozenset({"GET"}), source=Source("mesh.yaml", 27, 11))
    quiet = Rule("defaults.authz.deny[0]", source=Source("mesh.yaml", 7, 9))
    authorizer = Authorizer(
        (
            AuthzLevel(Level.DEFAULTS, deny=(quiet,), mode="audit", source=Source("mesh.yaml", 6)),
            AuthzLevel(Level.SERVICE, allow=(rule,), mode="enforce", source=Source("mesh.yaml", 25)),
        ),
        TD,
    )
    verdict, steps = authorizer.trace(WEB, b"GET", judge(b"/a"), [])
    assert verdict.explain() == [
        "allowed: allowed by services.reviews.authz.allow[0] (mesh.yaml:27)",
        "audit: would refuse: denied by defaults.authz.deny[0] (mesh.yaml:7)",
    ]
    assert [str(step) for step in steps] == [
        "deny     defaults  defaults.authz.deny[0] matches, in audit mode: only logged (mesh.yaml:7)",
        "allow    service   services.reviews.authz.allow[0] matches (mesh.yaml:27)",
    ]
    verdict, steps = authorizer.trace(ADMIN, b"GET", judge(b"/a"), [])
    assert verdict.explain()[0] == "denied: no allow rule matches (mesh.yaml:25)"
    assert verdict.name == "service.authz.allow"
    assert [str(step) for step in steps][1:] == [
        "allow    service   services.reviews.authz.allow[0] does not name the caller (mesh.yaml:27)",
        "allow    service   no allow rule matches (mesh.yaml:25)",
    ]
    assert Authorizer((), TD).judge(WEB, b"GET", None, []).explain() == ["allowed: default mesh of built-in (built-in)"]
    assert Authorizer((), TD).judge(WEB, b"GET", None, []).source == BUILT_IN


def test_a_bad_rule_is_named() -> None:
    bad = Rule("services.a.authz.deny[0]", paths=("nope",), source=Source("mesh.yaml", 3))
    with pytest.raises(ValueError, match=r"services\.a\.authz\.deny\[0\] \(mesh\.yaml:3\): glob \"nope\" must begin"):
        Authorizer((AuthzLevel(Level.SERVICE, deny=(bad,)),), TD)
    with pytest.raises(ValueError, match="mesh, allow or deny"):
        Authorizer((AuthzLevel(Level.SERVICE, default="maybe"),), TD)
    with pytest.raises(ValueError, match="once"):
        Authorizer((AuthzLevel(Level.SERVICE), AuthzLevel(Level.SERVICE)), TD)


def test_rules_of_other_callers_are_not_asked() -> None:
    class Untouchable(list[tuple[bytes, bytes]]):
        def __iter__(self) -> None:  # type: ignore[override]
            raise AssertionError("headers were looked at")

    asks = (("x", ValueMatch("present")),)
    level = AuthzLevel(
        Level.SERVICE,
        allow=(*(Rule(f"r{i}", callers=(f"other{i}",), headers=asks) for i in range(1000)), Rule("web", ("web",))),
        deny=tuple(Rule(f"d{i}", callers=(f"other{i}",), headers=asks) for i in range(1000)),
    )
    assert Authorizer((level,), TD).judge(WEB, b"GET", None, Untouchable()).name == "web"
