from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.serve.operations import OPERATIONS
from control_plane.serve.shapes import (
    Choice,
    Flag,
    Listing,
    Maybe,
    Number,
    Record,
    Shape,
    ShapeError,
    Table,
    Text,
    Whole,
)

NAME = Text(8, 1, "[a-z]+", about="lower-case letters")
SHAPE = Choice(
    "kind",
    {
        "one": Record({"name": NAME, "count": Whole(1, 9)}, {"flag": (Flag(), True)}),
        "two": Record(
            {}, {"rate": (Maybe(Number(0.0, 1.0)), None), "texts": (Table(NAME, Listing(Text(3), 2), 2), {})}
        ),
    },
)


def test_what_is_left_out_has_its_usual_value() -> None:
    assert SHAPE.decode({"kind": "one", "name": "a", "count": 3}, "it") == {
        "kind": "one",
        "name": "a",
        "count": 3,
        "flag": True,
    }
    assert SHAPE.decode({"kind": "two", "rate": 1}, "it") == {"kind": "two", "rate": 1.0, "texts": {}}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "it must be a map"),
        ({}, "it.kind must be a text"),
        ({"kind": "three"}, "it.kind must be one of one, two"),
        ({"kind": "one", "name": "a"}, "it needs 'count'"),
        ({"kind": "one", "name": "a", "count": True}, "it.count must be a whole number"),
        ({"kind": "one", "name": "a", "count": 1.0}, "it.count must be a whole number"),
        ({"kind": "one", "name": "a", "count": 10}, "it.count must be from 1 to 9"),
        ({"kind": "one", "name": "", "count": 1}, "it.name is empty"),
        ({"kind": "one", "name": "a\n", "count": 1}, "it.name must be lower-case letters"),
        ({"kind": "one", "name": "a" * 9, "count": 1}, "it.name is longer than 8"),
        ({"kind": "one", "name": "a", "count": 1, "flag": None}, "it.flag must be true or false"),
        ({"kind": "one", "name": "a", "count": 1, "x" * 99: 1}, "it has an unknown key 'xxx"),
        ({"kind": "two", "rate": 2}, "it.rate must be from 0 to 1"),
        ({"kind": "two", "rate": float("nan")}, "it.rate must be from 0 to 1"),
        ({"kind": "two", "texts": {"A": []}}, "a key of it.texts must be lower-case"),
        ({"kind": "two", "texts": {"a": ["x", "long"]}}, r"it.texts\['a'\]\[1\] is longer than 3"),
        ({"kind": "two", "texts": {"a": ["x"] * 3}}, "holds more than 2 values"),
        ({"kind": "two", "texts": {"a": [], "b": [], "c": []}}, "holds more than 2 entries"),
    ],
)
def test_where_it_is_wrong(value: Any, says: str) -> None:
    with pytest.raises(ShapeError, match=says):
        SHAPE.decode(value, "it")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 11)
    | st.floats(0, 2, allow_nan=False)
    | st.sampled_from(["a", "one", "", "A"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["kind", "name", "count", "flag", "rate", "texts", "a", "x"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@given(JSON | st.fixed_dictionaries({"kind": st.sampled_from(["one", "two"]), "name": st.just("a"), "count": JSON}))
def test_the_schema_says_what_is_taken(value: Any) -> None:
    valid = jsonschema.Draft202012Validator(SHAPE.schema()).is_valid(value)
    try:
        SHAPE.decode(value, "it")
    except ShapeError:
        # JSON Schema takes 1.0 for an integer; we do not.
        assert not valid or any(isinstance(each, float) for each in value.values())
    else:
        assert valid


def bounded(shape: Shape) -> bool:
    if isinstance(shape, Text):
        return shape.length_max is not None or bool(shape.choices)
    if isinstance(shape, Listing):
        return shape.count_max is not None and bounded(shape.item)
    if isinstance(shape, Table):
        return shape.count_max is not None and bounded(shape.key) and bounded(shape.value)
    if isinstance(shape, Maybe):
        return bounded(shape.shape)
    if isinstance(shape, Record):
        return all(map(bounded, shape.needed.values())) and all(bounded(each) for each, _ in shape.usual.values())
    if isinstance(shape, Choice):
        return all(map(bounded, shape.records.values()))
    return isinstance(shape, Whole | Number | Flag)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: each.name)
def test_what_comes_in_has_a_bound(operation: Any) -> None:
    assert operation.body is None or bounded(operation.body)
    assert all(bounded(shape) for shape, _ in operation.query.values())
    assert all(map(bounded, operation.parameters.values()))
    assert (operation.body is None) is (operation.method != "POST")
