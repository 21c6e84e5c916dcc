"""The reference tables of docs/simulate.md, made from the declarations of fields.py.

The document holds them between markers; a test keeps both equal.
"""

from collections.abc import Iterator

from sidecar.model.reference import value_of
from sidecar.model.tables import Field, ListOf, MapOf, Table

from . import fields
from .fields import OrMap

_SECTIONS = (
    ("A file", fields.SCENARIO),
    ("`services.NAME`", fields.SERVICE_FIELDS),
    ("`services.NAME.endpoints.NAME`", fields.GROUP),
    ("`latency`", fields.LATENCY.table),
    ("`errors`", fields.ERRORS),
    ("`capacity`", fields.CAPACITY),
    ("`cold_start`", fields.COLD_START),
    ("`calls[]`", fields.CALL),
    ("`load[]`", fields.LOAD),
    ("`load[].requests[]`", fields.REQUEST),
    ("`outages[]`", fields.OUTAGE),
    ("`objectives[]`", fields.OBJECTIVE),
)


def reference() -> str:
    """All tables of keys, as Markdown."""
    return "\n".join(line for title, table in _SECTIONS for line in _section(title, table))


def _section(title: str, table: object) -> Iterator[str]:
    assert isinstance(table, Table)
    yield f"### {title}"
    yield ""
    if table.doc:
        yield table.doc
        yield ""
    yield "| Key | Value | Built in | Meaning |"
    yield "|---|---|---|---|"
    for each in table.fields:
        yield f"| `{each.key}` | {_value(each)} | {_built_in(each)} | {each.doc} |"
    yield ""


def _value(each: Field) -> str:
    kind = each.kind
    if isinstance(kind, OrMap):
        inner = kind.table
        what = "groups by name" if isinstance(inner, MapOf) else f"map `{getattr(inner, 'title', '')}`"
        return f"{value_of(kind.scalar)}, or {what}"
    if isinstance(kind, ListOf) and not isinstance(kind.item, Table):
        return f"list: {kind.item.name}"
    return value_of(kind)


def _built_in(each: Field) -> str:
    if each.required:
        return "required"
    if each.builtin_text:
        return each.builtin_text
    return "" if each.builtin is None else f"`{_format(each)}`"


def _format(each: Field) -> str:
    if isinstance(each.builtin, bool | tuple):
        return each.kind.format(each.builtin)
    return str(each.builtin) if isinstance(each.builtin, str | int) else each.kind.format(each.builtin)
