"""The reference tables of docs/policy.md, made from the declarations of fields.py and the table of codes.

The document holds them between markers; a test keeps both equal.
"""

from collections.abc import Iterator

from . import fields
from .forms import Destinations, GrpcHealth, OrAddress, ValueForm
from .kinds import Choice, Kind
from .problems import CODES
from .tables import Clampable, Field, ListOf, MapOf, Table

_SECTIONS: tuple[tuple[str, Table], ...] = (
    ("A file", fields.FILE),
    ("services.NAME", fields.SERVICE_TABLE),
    ("ports.NAME", fields.PORT),
    ("address[]", fields.ADDRESS),
    ("versions.NAME", fields.VERSION),
    ("routes[]", fields.ROUTE),
    ("match", fields.MATCH),
    ("match.grpc", fields.GRPC_MATCH),
    ("timeout", fields.TIMEOUT),
    ("retry", fields.RETRY),
    ("retry.budget", fields.BUDGET),
    ("hedge", fields.HEDGE),
    ("limits", fields.LIMITS),
    ("circuit_breaker", fields.CIRCUIT_BREAKER),
    ("balance", fields.BALANCE),
    ("outliers", fields.OUTLIERS),
    ("concurrency", fields.CONCURRENCY),
    ("concurrency.priorities[]", fields.PRIORITY),
    ("rate_limit", fields.RATE_LIMIT),
    ("pool", fields.POOL),
    ("health", fields.HEALTH),
    ("authz", fields.AUTHZ),
    ("authz.allow[] and authz.deny[]", fields.RULE),
    ("filters[]", fields.FILTER),
    ("fault.delay", fields.DELAY),
    ("fault.abort", fields.ABORT),
    ("sticky", fields.STICKY),
    ("fallback", fields.FALLBACK),
    ("mirror", fields.MIRROR),
    ("rewrite", fields.REWRITE),
    ("redirect", fields.REDIRECT),
    ("respond", fields.RESPOND),
    ("headers.request and headers.response", fields.HEADER_EDIT),
    ("calls.SERVICE", fields.CALL),
)


def reference() -> str:
    """All tables of keys, as Markdown."""
    return "\n".join(line for title, table in _SECTIONS for line in _section(title, table))


def _section(title: str, table: Table) -> Iterator[str]:
    heading = title if title == "A file" else " and ".join(f"`{part}`" for part in title.split(" and "))
    yield f"### {heading}"
    yield ""
    if table.doc:
        yield table.doc
        yield ""
    yield "| Key | Value | Built in | Meaning |"
    yield "|---|---|---|---|"
    for each in table.fields:
        if not each.later:
            yield f"| `{each.key}` | {_cell(value_of(each.kind))} | {_cell(_built_in(each))} | {_cell(each.doc)} |"
    yield ""


def value_of(kind: Kind) -> str:
    """What may be written, in a few words."""
    match kind:
        case Clampable():
            return value_of(kind.kind)
        case Choice():
            return ", ".join(f"`{word}`" for word in kind.words)
        case ListOf():
            return f"list: {value_of(kind.item)}"
        case MapOf():
            return f"map: {value_of(kind.item)}"
        case Table():
            return f"map `{kind.title}`"
        case Destinations() | GrpcHealth() | OrAddress() | ValueForm():
            return kind.name
    schema = kind.schema()
    name = kind.name.removeprefix("a ").removeprefix("an ")
    if "minimum" in schema:
        return f"{name}, {schema['minimum']} to {schema['maximum']}"
    if "none" in schema.get("pattern", ""):
        return name if "`none`" in name or "none" in name else f"{name}, `none`"
    return name


def _built_in(each: Field) -> str:
    if each.required:
        return "required"
    if each.builtin_text:
        return each.builtin_text
    if each.builtin is None or each.builtin == () or each.builtin == "":
        return ""
    return f"`{each.kind.format(each.builtin)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def codes() -> str:
    """The table of codes, as Markdown."""
    lines = ["| Code | Meaning |", "|---|---|"]
    return "\n".join([*lines, *(f"| {code} | {meaning} |" for code, meaning in CODES.items())]) + "\n"
