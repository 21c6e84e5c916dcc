import json

import pytest

from control_plane.state.records import (
    ALIVE,
    CHANGES,
    INSTANCES,
    META,
    SERVICES,
    Change,
    Document,
    Instance,
    Observed,
    RecordError,
    change_key,
    decode,
    encode,
    kind_of,
)

DOCUMENT = Document("mesh.yaml", 3, "  web: {}\n", "ana", 5.0, 1)


@pytest.mark.parametrize(
    "record",
    [
        Instance("10.0.0.1", 15006, {"version": "1"}, {"http": 8000}),
        Instance("::1", 1, state="suspect", changed=1.5, until=46.5),
        Change("ana", 1.0, "first", {"services/web": None}, {"services/web": DOCUMENT}),
        Observed((("web", "reviews", 1.5, 0.0),), (("web", "reviews", "10.0.0.1:1", "open"),)),
        DOCUMENT,
    ],
)
def test_what_is_written_is_read(record: object) -> None:
    assert decode(type(record), encode(record)) == record


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"7", "not a JSON object"),
        (b"{}", "no record of pillion"),
        (b'{"format":true,"host":"a","port":1}', "no record"),
        (b'{"format":2,"host":"a","port":1}', "written by a newer pillion"),
        (b'{"format":1,"host":"a"}', "needs 'port'"),
        (b'{"format":1,"host":"a","port":"1"}', "instance.port: must be int"),
        (b'{"format":1,"host":"a","port":1,"colour":"red"}', "unknown key 'colour'"),
    ],
)
def test_anything_else_is_refused_with_the_reason(value: bytes, words: str) -> None:
    with pytest.raises(RecordError, match=words.replace("[", r"\[")):
        decode(Instance, value)


def test_every_record_carries_its_format() -> None:
    assert json.loads(encode(DOCUMENT))["format"] == 1


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("meta", META),
        ("metadata", None),
        ("alive/a1", ALIVE),
        ("alive/", None),
        ("alive/a/b", None),
        ("instances/web/a1", INSTANCES),
        ("instances/web", None),
        ("instances//a1", None),
        ("policy/services/web", SERVICES),
        ("policy/other", None),
        ("foreign/key", None),
        (change_key(7), CHANGES),
    ],
)
def test_keys_tell_their_kind(key: str, kind: str | None) -> None:
    assert kind_of(key) == kind


def test_changes_sort_by_their_number() -> None:
    assert sorted([change_key(10), change_key(9), change_key(100)]) == [change_key(9), change_key(10), change_key(100)]
