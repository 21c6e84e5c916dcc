"""Pieces of a policy in a few words, for people.

Pure; must not know where a policy comes from, or print.
"""

from .snapshot import Match, Route, ValueMatch


def tries_text(route: Route) -> str:
    origins = route.provenance
    return f"{route.retry.max_retries + 1} x {origins['timeout.try'].value} in {origins['timeout.total'].value}"


def match_text(match: Match) -> str:
    """A match in a few words."""
    parts = [",".join(sorted(match.methods))] if match.methods is not None else []
    parts += [match.path] if match.path is not None else []
    parts += [f"~{match.path_regex}"] if match.path_regex is not None else []
    parts += [f"{name}{_value_text(value)}" for name, value in match.headers]
    parts += [f"?{name}{_value_text(value)}" for name, value in match.query]
    parts += [f"from {','.join(sorted(match.callers))}"] if match.callers is not None else []
    return " ".join(parts) or "*"


def _value_text(value: ValueMatch) -> str:
    return {"exact": f"={value.value}", "prefix": f"^={value.value}", "regex": f"~{value.value}"}.get(value.kind, "")


def destination_text(route: Route) -> str:
    if route.respond is not None:
        return f"respond {route.respond.status}"
    if route.redirect is not None:
        return f"redirect {route.redirect.status} {route.redirect.to}"
    if len(route.destinations) == 1:
        return route.destinations[0].version or "every endpoint"
    return ", ".join(f"{each.version} {each.weight}%" for each in route.destinations)
