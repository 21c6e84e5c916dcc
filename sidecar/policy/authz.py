"""Who may do what: the authorization of a route or a port, compiled.

In order: a matching deny of any level refuses; the allows of `enforced`, where stated, are a ceiling that must match
too; then one match in the union of the other levels' allows admits, and none refuses; only where that union is empty
does the closest `default` decide. A level in audit mode only logs its own denies; where the closest mode is audit, the
last two steps only log as well. The ceiling always refuses.

The data path asks `Authorizer.judge`, which gives back shared verdicts: an ordinary admission allocates nothing. Rules
are filed by the caller that they name, so other callers' rules cost nothing. `Authorizer.trace` lists the same steps
for people. Identity is the SPIFFE ID of the peer's certificate and nothing else.
Must not know connections or how a refusal is answered. Invariant: what is unknown (a caller, a header, an HTTP
attribute on plain TCP) never makes an allow match.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from sidecar.model.snapshot import AuthzLevel, Level, Rule, ValueMatch
from sidecar.model.source import BUILT_IN, Source

from .globs import compile_glob_bytes
from .matching import Headers, ValueTest, compile_value
from .paths import Readings

_PRECEDENCE = (Level.ENFORCED, Level.ROUTE, Level.SERVICE, Level.DEFAULTS)
"""The levels that may state authorization, closest first."""

HttpTest = Callable[[bytes, Readings | None, Headers], bool]


class Stage(Enum):
    """The step of the algebra that decided."""

    DENY = "deny"
    CEILING = "ceiling"
    ALLOW = "allow"
    DEFAULT = "default"


class Audited(NamedTuple):
    """What a level in audit mode would have refused, and by which rule (None: by the lack of one, or by default)."""

    rule: Rule | None
    would: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """`rule` is None where the lack of a matching rule, or the default, decided."""

    allowed: bool
    stage: Stage
    level: Level
    reason: str
    source: Source = BUILT_IN
    rule: Rule | None = None
    audited: tuple[Audited, ...] = ()

    @property
    def name(self) -> str:
        """The word in log and metrics."""
        return self.rule.name if self.rule is not None else f"{self.level.value}.authz.{self.stage.value}"

    def explain(self) -> list[str]:
        """Lines for people: what decided and where that stands, then what only logged."""
        lines = [f"{'allowed' if self.allowed else 'denied'}: {self.reason} ({self.source})"]
        lines.extend(
            f"audit: {one.would}" + (f" ({one.rule.source})" if one.rule is not None else "") for one in self.audited
        )
        return lines


@dataclass(frozen=True, slots=True)
class Step:
    """One rule, or one decision without a rule, as `trace` saw it."""

    stage: Stage
    level: Level
    text: str
    matched: bool
    source: Source

    def __str__(self) -> str:
        return f"{self.stage.value:8} {self.level.value:9} {self.text} ({self.source})"


class _Compiled(NamedTuple):
    """A rule. `callers` None: any, also plain ones; `test` None: asks nothing of the request."""

    callers: frozenset[str] | None
    test: HttpTest | None
    verdict: Verdict
    audited: Audited | None  # for a deny that only logs


_ByCaller = dict[str | None, tuple[_Compiled, ...]]


def compile_authz(
    levels: Sequence[AuthzLevel], trust_domain: str, *, peers_authenticated: bool = True
) -> "Authorizer | None":
    """None where every peer that the listener admits may do everything, so that nothing need be asked.

    `peers_authenticated`: the listener admits only peers of this trust domain (and plain ones where its mtls says so).
    Raises ValueError, naming the rule, where a pattern is malformed.
    """
    authorizer = Authorizer(levels, trust_domain)
    return None if authorizer.admits_all(peers_authenticated) else authorizer


def service_of(identity: str | None, trust_domain: str) -> str | None:
    """The service name in a SPIFFE ID of this trust domain: what `from` in a route's match compares."""
    prefix = f"spiffe://{trust_domain}/service/"
    if identity is None or not identity.startswith(prefix):
        return None
    name = identity[len(prefix) :]
    return name if name and "/" not in name else None


class Authorizer:
    """The compiled authorization of one route, or of one TCP port."""

    __slots__ = (
        "_allows",
        "_allows_any",
        "_ceiling",
        "_ceiling_any",
        "_default",
        "_default_verdict",
        "_denies",
        "_denies_any",
        "_ordered",
        "_outside_ceiling",
        "_trust_prefix",
        "_unmatched",
        "needs_path",
    )

    def __init__(self, levels: Sequence[AuthzLevel], trust_domain: str) -> None:
        stated = {level.level: level for level in levels}
        closest_first = [stated[level] for level in _PRECEDENCE if level in stated]
        if len(closest_first) != len(levels):
            raise ValueError("each level may state authorization once: defaults, service, route, enforced")
        audit = next((level.mode for level in closest_first if level.mode is not None), "enforce") == "audit"
        enforced = stated.get(Level.ENFORCED)
        self._trust_prefix = f"spiffe://{trust_domain}/"
        rules = [rule for level in levels for rule in (*level.deny, *(level.allow or ()))]
        self.needs_path = any(rule.paths is not None for rule in rules)

        denies = [
            _compile(rule, level, trust_domain, Stage.DENY, level.mode == "audit")
            for level in closest_first
            for rule in level.deny
        ]
        self._denies, self._denies_any = _by_caller(denies)

        ceiling: list[_Compiled] = []
        self._outside_ceiling: Verdict | None = None  # None: there is no ceiling
        if enforced is not None and enforced.allow is not None:
            ceiling = [_compile(rule, enforced, trust_domain, Stage.CEILING) for rule in enforced.allow]
            self._outside_ceiling = Verdict(
                False, Stage.CEILING, Level.ENFORCED, "no rule of enforced.authz.allow matches", enforced.source
            )
        self._ceiling, self._ceiling_any = _by_caller(ceiling)

        union = [level for level in closest_first if level is not enforced and level.allow]
        allows = [
            _compile(rule, level, trust_domain, Stage.ALLOW) for level in reversed(union) for rule in level.allow or ()
        ]
        self._allows, self._allows_any = _by_caller(allows)
        self._unmatched: Verdict | None = None  # None: there are no allows, and the default decides
        if union:
            self._unmatched = _refusal_or_log(
                Verdict(False, Stage.ALLOW, union[0].level, "no allow rule matches", union[0].source), audit
            )

        by = next((level for level in closest_first if level.default is not None), None)
        default, at, source = (
            (by.default, by.level, by.source) if by is not None else ("mesh", Level.BUILT_IN, BUILT_IN)
        )
        if default not in ("mesh", "allow", "deny"):
            raise ValueError(f'unknown authz.default "{default}" ({source}): mesh, allow or deny')
        self._default = default
        admitted = Verdict(True, Stage.DEFAULT, at, f"default {default} of {at.value}", source)
        refusal = replace(admitted, allowed=False)
        self._default_verdict = (_refusal_or_log(refusal, audit), admitted)
        self._ordered = (*denies, *ceiling, *allows)

    def admits_all(self, peers_authenticated: bool) -> bool:
        """Whether no peer that the listener admits can be refused, and nothing is ever logged."""
        if self._ordered or self._outside_ceiling is not None or self._unmatched is not None:
            return False
        return self._default == "allow" or (self._default == "mesh" and peers_authenticated)

    def judge(
        self,
        caller: str | None,
        method: bytes,
        readings: Readings | None,
        headers: Headers,
        *,
        tcp: bool = False,
        plain_allowed: bool = False,
    ) -> Verdict:
        """`caller` is the peer's SPIFFE ID, None for a plain peer; `readings` may be None unless `needs_path`.

        `tcp`: there is no request, and attributes of HTTP in a rule match for deny, never for allow.
        """
        audited: tuple[Audited, ...] = ()
        if self._denies_any or self._denies:
            for _callers, test, refusal, only_log in self._denies.get(caller, self._denies_any):
                if test is None or tcp or test(method, readings, headers):
                    if only_log is None:
                        return replace(refusal, audited=audited) if audited else refusal
                    audited = (*audited, only_log)
        verdict = self._outside_ceiling
        if verdict is not None and not _matching(
            self._ceiling.get(caller, self._ceiling_any), method, readings, headers, tcp
        ):
            return replace(verdict, audited=audited) if audited else verdict
        verdict = self._unmatched
        if verdict is not None:
            allow = _matching(self._allows.get(caller, self._allows_any), method, readings, headers, tcp)
            if allow is not None:
                verdict = allow.verdict
        else:
            verdict = self._default_verdict[self._admitted_by_default(caller, plain_allowed)]
        return replace(verdict, audited=audited + verdict.audited) if audited else verdict

    def _admitted_by_default(self, caller: str | None, plain_allowed: bool) -> bool:
        if self._default == "mesh":
            return plain_allowed if caller is None else caller.startswith(self._trust_prefix)
        return self._default == "allow"

    def trace(
        self,
        caller: str | None,
        method: bytes,
        readings: Readings | None,
        headers: Headers,
        *,
        tcp: bool = False,
        plain_allowed: bool = False,
    ) -> tuple[Verdict, list[Step]]:
        """The verdict of `judge`, and every rule in the order of the algebra with whether it matched."""
        steps: list[Step] = []
        for rule in self._ordered:
            by_caller = rule.callers is None or caller in rule.callers
            deny = rule.verdict.stage is Stage.DENY
            by_request = rule.test is None or (deny if tcp else rule.test(method, readings, headers))
            matched = by_caller and by_request
            if matched:
                said = "matches, in audit mode: only logged" if rule.audited is not None else "matches"
            else:
                said = "does not match the request" if by_caller else "does not name the caller"
            steps.append(_step(rule.verdict, f"{rule.verdict.name} {said}", matched))
        if self._outside_ceiling is not None and not any(s.stage is Stage.CEILING and s.matched for s in steps):
            steps.append(_step(self._outside_ceiling, self._outside_ceiling.reason, True))
        unmatched = self._unmatched
        if unmatched is not None and not any(step.stage is Stage.ALLOW and step.matched for step in steps):
            steps.append(_step(unmatched, unmatched.reason, True))
        elif unmatched is None:
            default = self._default_verdict[self._admitted_by_default(caller, plain_allowed)]
            steps.append(_step(default, default.reason, True))
        verdict = self.judge(caller, method, readings, headers, tcp=tcp, plain_allowed=plain_allowed)
        return verdict, steps


def _step(verdict: Verdict, text: str, matched: bool) -> Step:
    return Step(verdict.stage, verdict.level, text, matched, verdict.source)


def _refusal_or_log(refusal: Verdict, audit: bool) -> Verdict:
    """In audit mode a refusal for want of a rule becomes an admission that logs."""
    if not audit:
        return refusal
    return replace(refusal, allowed=True, audited=(Audited(None, f"would refuse: {refusal.reason}"),))


def _matching(
    rules: tuple[_Compiled, ...], method: bytes, readings: Readings | None, headers: Headers, tcp: bool
) -> _Compiled | None:
    """The first allow that matches. The caller has been looked up already."""
    for rule in rules:
        test = rule.test
        if test is None or (not tcp and test(method, readings, headers)):
            return rule
    return None


def _by_caller(rules: Iterable[_Compiled]) -> tuple[_ByCaller, tuple[_Compiled, ...]]:
    """(caller -> the rules that can match it, in order; the rules for everybody else)."""
    anyone: list[_Compiled] = []
    named: dict[str, list[_Compiled]] = {}
    for rule in rules:
        if rule.callers is None:
            anyone.append(rule)
            for filed in named.values():
                filed.append(rule)
        else:
            for caller in rule.callers:
                if caller not in named:
                    named[caller] = list(anyone)
                named[caller].append(rule)
    return {caller: tuple(filed) for caller, filed in named.items()}, tuple(anyone)


def _compile(rule: Rule, level: AuthzLevel, trust_domain: str, stage: Stage, audit: bool = False) -> _Compiled:
    callers = None
    if rule.callers is not None:
        callers = frozenset(
            caller if caller.startswith("spiffe://") else f"spiffe://{trust_domain}/service/{caller}"
            for caller in rule.callers
        )
    deny = stage is Stage.DENY
    try:
        test = _http_test(rule, deny)
    except ValueError as error:
        raise ValueError(f"{rule.name} ({rule.source}): {error}") from None
    said = "denied by" if deny else "within the ceiling of" if stage is Stage.CEILING else "allowed by"
    verdict = Verdict(not deny, stage, level.level, f"{said} {rule.name}", rule.source, rule)
    return _Compiled(callers, test, verdict, Audited(rule, f"would refuse: denied by {rule.name}") if audit else None)


def _http_test(rule: Rule, deny: bool) -> HttpTest | None:
    """What a rule asks of a request; a deny matches on any reading and any value, an allow needs them all."""
    parts: list[HttpTest] = []
    if rule.methods is not None:
        methods = frozenset(method.encode() for method in rule.methods)
        parts.append(lambda method, readings, headers: method in methods)
    if rule.paths is not None:
        parts.append(_path_test(rule.paths, deny))
    for name, value in rule.headers:
        parts.append((_any_value_test if deny else _every_value_test)(name, value))
    if len(parts) <= 1:
        return parts[0] if parts else None
    together = tuple(parts)

    def test(method: bytes, readings: Readings | None, headers: Headers) -> bool:
        for part in together:  # noqa: SIM110 (a generator would cost more than the comparisons)
            if not part(method, readings, headers):
                return False
        return True

    return test


def _path_test(globs: tuple[str, ...], deny: bool) -> HttpTest:
    tests: tuple[ValueTest, ...] = tuple(compile_glob_bytes(glob) for glob in globs)

    def fits(path: bytes) -> bool:
        for glob in tests:  # noqa: SIM110 (a generator would cost more than the comparisons)
            if glob(path):
                return True
        return False

    fits_path = tests[0] if len(tests) == 1 else fits

    def test(method: bytes, readings: Readings | None, headers: Headers) -> bool:
        if readings is None:
            return deny  # the driver has not read the path: what is unknown never admits
        as_is = fits_path(readings.as_is)
        if as_is is deny or readings.merged is readings.as_is:
            return as_is
        return fits_path(readings.merged)

    return test


def _any_value_test(name: str, value: ValueMatch) -> HttpTest:
    """For denies. A field may hold a list (RFC 9110, 5.6.1): its elements are values too."""
    wanted, fits = name.encode("latin-1"), compile_value(value)

    def test(method: bytes, readings: Readings | None, headers: Headers) -> bool:
        for key, held in headers:
            if key == wanted and (
                fits(held) or (b"," in held and any(fits(element.strip(b" \t")) for element in held.split(b",")))
            ):
                return True
        return False

    return test


def _every_value_test(name: str, value: ValueMatch) -> HttpTest:
    """For allows: the header is there, and each of its values matches."""
    wanted, fits = name.encode("latin-1"), compile_value(value)

    def test(method: bytes, readings: Readings | None, headers: Headers) -> bool:
        found = False
        for key, held in headers:
            if key == wanted:
                if not fits(held):
                    return False
                found = True
        return found

    return test
