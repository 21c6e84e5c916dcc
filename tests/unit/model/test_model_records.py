from collections.abc import Mapping
from dataclasses import asdict, field, fields, replace

import pytest

from sidecar.model.records import record


@record(frozen=True, slots=True)
class Part:
    name: str
    tags: Mapping[str, str] = field(default_factory=dict)
    note: str = field(default="", compare=False, repr=False)


@record(frozen=True, slots=True)
class Painted(Part):
    """A part with a colour."""

    colour: str = "red"


@record(frozen=True, slots=True, order=True)
class Place:
    line: int
    column: int = 0

    def __repr__(self) -> str:
        return f"{self.line}:{self.column}"


@record(frozen=True)
class Nothing:
    pass


def test_a_record_is_made_and_shown() -> None:
    part = Part("a", note="unseen")
    assert (part.name, part.tags, part.note) == ("a", {}, "unseen")
    assert repr(part) == "Part(name='a', tags={})"
    assert repr(Place(3)) == "3:0"
    assert Part("a").tags is not Part("a").tags
    with pytest.raises(TypeError, match="name"):
        Part()  # type: ignore[call-arg]
    with pytest.raises(AttributeError):
        part.other = 1  # type: ignore[attr-defined]


def test_records_are_equal_by_what_compares() -> None:
    assert Part("a", note="x") == Part("a", note="y") != Part("b")
    assert Part("a") != Painted("a")
    assert hash(Place(1, 2)) == hash(Place(1, 2)) and len({Place(1), Place(1), Place(2)}) == 2
    assert Nothing() == Nothing() and hash(Nothing()) == hash(Nothing())


def test_records_in_order() -> None:
    assert sorted([Place(2), Place(1, 5), Place(1, 2)]) == [Place(1, 2), Place(1, 5), Place(2)]
    assert Place(1) <= Place(1) < Place(2) > Place(1) >= Place(1)
    with pytest.raises(TypeError):
        _ = Place(1) < 1  # type: ignore[operator]


def test_what_goes_by_fields_works_as_usual() -> None:
    painted = Painted("a", {"x": "y"})
    assert [each.name for each in fields(painted)] == ["name", "tags", "note", "colour"]
    assert replace(painted, colour="blue") == Painted("a", {"x": "y"}, colour="blue")
    assert asdict(painted) == {"name": "a", "tags": {"x": "y"}, "note": "", "colour": "red"}
    match painted:
        case Painted(name=name, colour="red"):
            assert name == "a"
        case _:
            pytest.fail("it did not match")
