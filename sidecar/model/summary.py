"""Pieces of a policy in a few words, for people.

Pure; must not know where a policy comes from, or print.
"""

from .snapshot import NONE, Match, Route, Service, ValueMatch


def tries_text(route: Route) -> str:
    origins = route.provenance
    hedged = f", hedged after {origins['hedge.after'].value}" if route.hedge_after_s != NONE else ""
    return f"{route.retry.max_retries + 1} x {origins['timeout.try'].value} in {origins['timeout.total'].value}{hedged}"


def match_text(match: Match) -> str:
    """A match in a few words."""
    parts = [",".join(sorted(match.methods))] if match.methods is not None else []
    parts += [match.path] if match.path is not None else []
    parts += [f"~{match.path_regex}"] if match.path_regex is not None else []
    parts += [f"{name}{_value_text(value)}" for name, value in match.headers]
    parts += [f"?{name}{_value_text(value)}" for name, value in match.query]
    parts += [f"cookie {name}{_value_text(value)}" for name, value in match.cookies]
    parts += [f"from {','.join(sorted(match.callers))}"] if match.callers is not None else []
    return " ".join(parts) or "*"


def _value_text(value: ValueMatch) -> str:
    return {"exact": f"={value.value}", "prefix": f"^={value.value}", "regex": f"~{value.value}"}.get(value.kind, "")


def concurrency_text(service: Service) -> str | None:
    """The limit before each instance's application, and its classes from the highest; None: there is none."""
    policy = service.concurrency
    if policy is None:
        return None
    limit = f"adaptive, {policy.least} to {policy.most}" if policy.adaptive else str(policy.most)
    timeout = service.provenance["concurrency.queue_timeout"].value if service.provenance else ""
    text = f"{limit} at a time, {policy.queue} wait"
    text += f" up to {timeout}" if policy.queue and timeout else ""
    classes = [each.name for each in policy.priorities]
    classes += [] if "default" in classes else ["default"]
    return text if len(classes) == 1 else f"{text}; {' > '.join(classes)}"


def destination_text(route: Route) -> str:
    if route.respond is not None:
        return f"respond {route.respond.status}"
    if route.redirect is not None:
        return f"redirect {route.redirect.status} {route.redirect.to}"
    text = ", ".join(f"{each.version} {each.weight}%" for each in route.destinations)
    if len(route.destinations) == 1:
        text = route.destinations[0].version or "every endpoint"
    mirror = route.mirror
    if mirror is not None:
        text += f"; copies of {mirror.percent:g}% to {mirror.version or mirror.service}"
    return text
