"""Requests made from an OpenAPI document: every operation, every parameter, right, nearly right and wrong.

Knows the part of JSON Schema that our document uses, and fails on any other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from hypothesis import strategies as st

Json = Any

KNOWN = {
    "type", "enum", "maxLength", "minLength", "pattern", "minimum", "maximum", "anyOf", "oneOf", "items", "maxItems",
    "properties", "required", "additionalProperties", "propertyNames", "maxProperties", "default", "description",
}  # fmt: skip

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(10**30), max_value=10**30),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(["", "\0", "é", "\U0001f600", "-1", "1e999", "none", "../..", "a" * 5000, "spiffe://x"]),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@dataclass(frozen=True)
class Asked:
    method: str
    path: str  # with the query
    body: Json
    has_body: bool


def operations(document: Mapping[str, Json]) -> list[tuple[str, str, Mapping[str, Json]]]:
    return [
        (method.upper(), path, operation)
        for path, verbs in document["paths"].items()
        for method, operation in verbs.items()
    ]


def requests(
    method: str, path: str, operation: Mapping[str, Json], samples: Mapping[str, Sequence[Json]]
) -> st.SearchStrategy[Asked]:
    """`samples`: values that lead further, by the name of a property or parameter."""
    parameters = operation.get("parameters", [])

    @st.composite
    def build(draw: Any) -> Asked:
        where, query = path, []
        for each in parameters:
            good = _values(each["schema"], samples, each["name"])
            value = draw(good if _often(draw) else SCALARS)
            text = quote(value if isinstance(value, str) else str(value).lower(), safe="")
            if each["in"] == "path":
                where = where.replace("{" + each["name"] + "}", text or "x")
            elif draw(st.booleans()):
                query.append(f"{each['name']}={text}")
        if draw(st.integers(0, 9)) == 0:
            query.append(draw(st.sampled_from(["x=1", "=", "&", "a=%ff", "limit=1&limit=2", "%"])))
        body, content = None, operation.get("requestBody")
        if content is not None:
            schema = content["content"]["application/json"]["schema"]
            good = _values(schema, samples, "")
            body = draw(good if _often(draw) else st.one_of(_spoiled(good), ANYTHING))
        asked = where + ("?" + "&".join(query) if query else "")
        return Asked(method, asked, body, content is not None)

    return build()


def _often(draw: Any) -> bool:
    """`one_of` would flatten what is nested, and with it every weight."""
    return bool(draw(st.integers(0, 3)))


@st.composite
def _spoiled(draw: Any, good: Any) -> Json:
    """One value taken away, replaced or added."""
    value = draw(good)
    if not isinstance(value, dict):
        return draw(ANYTHING)
    value = dict(value)
    key = draw(st.sampled_from([*value, "other"]))
    if draw(st.booleans()):
        value.pop(key, None)
    else:
        value[key] = draw(ANYTHING)
    return value


def _values(schema: Mapping[str, Json], samples: Mapping[str, Sequence[Json]], name: str) -> st.SearchStrategy[Json]:
    assert set(schema) <= KNOWN, set(schema) - KNOWN
    found = _of_schema(schema, samples, name)
    given = samples.get(name)
    return found if not given else _mostly(st.sampled_from(list(given)), found)


@st.composite
def _mostly(draw: Any, usual: Any, other: Any) -> Json:
    return draw(usual if _often(draw) else other)


def _of_schema(schema: Mapping[str, Json], samples: Mapping[str, Sequence[Json]], name: str) -> st.SearchStrategy[Json]:
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return st.one_of(*(_values(each, samples, name) for each in schema[word]))
    kind = schema.get("type")
    if kind is None:
        return ANYTHING
    if kind == "null":
        return st.none()
    if kind == "boolean":
        return st.booleans()
    if kind == "integer":
        return st.integers(schema["minimum"], schema["maximum"]) | st.integers(schema["minimum"], schema["minimum"] + 9)
    if kind == "number":
        return st.floats(schema.get("minimum"), schema.get("maximum"), allow_nan=False, allow_infinity=False)
    if kind == "string":
        return _texts(schema)
    if kind == "array":
        most = min(4, schema.get("maxItems", 4))
        return st.lists(_values(schema["items"], samples, ""), max_size=most)
    assert kind == "object", schema
    more = schema.get("additionalProperties")
    if isinstance(more, dict):
        keys = _values({"type": "string", **schema.get("propertyNames", {})}, samples, f"{name}/key")
        return st.dictionaries(keys, _values(more, samples, f"{name}/value"), max_size=3)
    properties = {key: _values(each, samples, key) for key, each in schema.get("properties", {}).items()}
    needed = {key: properties[key] for key in schema.get("required", [])}
    return st.fixed_dictionaries(needed, optional={key: each for key, each in properties.items() if key not in needed})


def _texts(schema: Mapping[str, Json]) -> st.SearchStrategy[str]:
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    most = schema.get("maxLength", 60)
    if "pattern" in schema:
        return st.from_regex(schema["pattern"], fullmatch=False).filter(lambda text: len(text) <= most)
    return st.text(min_size=schema.get("minLength", 0), max_size=min(most, 60))
