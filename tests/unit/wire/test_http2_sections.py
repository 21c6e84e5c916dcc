"""Header sections that were seen before are judged as they would be the first time, and little is kept of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.wire import http2_heads, http2_sections
from sidecar.wire.http1_guard import ProtocolError
from sidecar.wire.http1_message import Message
from sidecar.wire.http2_heads import Field, Malformed
from sidecar.wire.http2_sections import Section

TRACE = b"00-%032x-%016x-01"
CALL: Section = (
    (b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/shop.Cart/Add"), (b":authority", b"shop"),
    (b"user-agent", b"grpc-go/1.60"), (b"content-type", b"application/grpc"), (b"te", b"trailers"),
)  # fmt: skip
ANSWER: Section = ((b":status", b"200"), (b"server", b"nginx"), (b"content-type", b"application/grpc"))

PSEUDO: list[Field] = [
    (b":method", b"GET"), (b":method", b"POST"), (b":method", b"CONNECT"), (b":method", b"TRACE"), (b":method", b"get"),
    (b":scheme", b"http"), (b":path", b"/a"), (b":path", b"/a?b"), (b":path", b"*"), (b":path", b"/" + b"a" * 200),
    (b":authority", b"shop"), (b":authority", b"shop:80"), (b":authority", b""), (b":protocol", b"websocket"),
    (b":status", b"200"), (b":status", b"204"), (b":status", b"99"),
]  # fmt: skip
OTHERS: list[Field] = [
    (b"host", b"shop"), (b"host", b"other"), (b"content-length", b"0"), (b"content-length", b"5"),
    (b"content-length", b"+5"), (b"content-type", b"application/grpc"), (b"content-type", b"text/plain"),
    (b"te", b"trailers"), (b"te", b"gzip"), (b"expect", b"100-continue"), (b"expect", b"else"), (b"accept", b"*/*"),
    (b"user-agent", b"x"), (b"user-agent", b"x\r\ny"), (b"cookie", b"a=1"), (b"cookie", b"b=2"), (b"x-any", b"1"),
    (b"authorization", b"Bearer secret"), (b"traceparent", TRACE % (1, 1)), (b"traceparent", TRACE % (2, 2)),
    (b"traceparent", b"nonsense"), (b"tracestate", b"a=b"), (b"grpc-timeout", b"5S"), (b"grpc-timeout", b"1m"),
    (b"grpc-timeout", b"soon"), (b"x-pillion-attempt", b"1"), (b"x-pillion-attempt", b"-1"),
    (b"x-pillion-attempt", b"2000"), (b"x-request-deadline-ms", b"700"), (b"x-request-deadline-ms", b"9" * 12),
    (b"x-pillion-retried", b"exhausted"), (b"x-pillion-reason", b"overflow"), (b"x-forwarded-for", b"10.0.0.1"),
    (b"x-forwarded-proto", b"https"), (b"x-forwarded-client-cert", b"forged"), (b"content_length", b"5"),
    (b"connection", b"close"), (b"upgrade", b"h2c"), (b"grpc-status", b"5"), (b"grpc-message", b""), (b"Upper", b"x"),
    (b"x-long", b"x" * 700), (b"server", b"nginx"), (b"date", b"Mon, 23 Nov 2026 00:00:00 GMT"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def empty_tables() -> None:
    for table in (http2_sections._REQUESTS, http2_sections._RESPONSES):
        table.known.clear()
        table.seen.clear()
        table.split[:] = [0] * len(table.split)


def told(m: Message) -> dict[str, object]:
    found = {name: getattr(m, name) for name in dir(m) if name[0] != "_"}
    return {name: value for name, value in found.items() if not callable(value)}


def verdict(judge: object, fields: Section, *more: bool) -> object:
    try:
        found = judge(fields, *more)  # type: ignore[operator]
    except (Malformed, ProtocolError) as exc:
        return type(exc), exc.args
    return told(found) if isinstance(found, Message) else found


def sections(leading: list[Field]) -> st.SearchStrategy[Section]:
    usual = st.permutations(leading).map(lambda found: found[: len(leading)])
    mixed = st.lists(st.sampled_from(PSEUDO), max_size=5)
    rest = st.lists(st.sampled_from(OTHERS), max_size=6)
    return st.tuples(st.one_of(st.just(leading), usual, mixed), rest).map(lambda both: (*both[0], *both[1]))


@given(st.lists(sections(list(CALL[:4])), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_requests_are_judged_the_same_however_often_they_come(some: list[Section], end: bool, between: bool) -> None:
    for fields in (*some, *some, *some):
        expected = verdict(http2_heads.request_message, fields, end, between)
        assert verdict(http2_sections.request_message, fields, end, between) == expected


@given(st.lists(sections(list(ANSWER[:1])), min_size=1, max_size=4), st.booleans())
def test_responses_are_judged_the_same_however_often_they_come(some: list[Section], end: bool) -> None:
    for fields in (*some, *some, *some):
        expected = verdict(http2_heads.response_message, fields, end, True)
        assert verdict(http2_sections.response_message, fields, end, True) == expected


@given(st.lists(st.sampled_from(OTHERS), max_size=3).map(tuple))
def test_trailers_are_judged_the_same(fields: Section) -> None:
    expected = verdict(http2_heads.trailer_fields, fields)
    assert verdict(http2_sections.trailer_fields, fields) == expected


def request(*more: Field) -> Message:
    return http2_sections.request_message((*CALL, *more), False, True)


def test_what_varies_stands_behind_what_is_known() -> None:
    for number in range(1, 5):
        m = request((b"traceparent", TRACE % (number, number)), (b"grpc-timeout", b"%dS" % number))
        assert m.traceparent == TRACE % (number, number) and m.deadline_ms == number * 1000
    assert list(http2_sections._REQUESTS.known) == [CALL]


def test_nothing_is_kept_of_what_came_once() -> None:
    request()
    assert not http2_sections._REQUESTS.known


def test_each_message_is_its_own() -> None:
    for _ in range(4):
        m = request((b"x-any", b"1"))
        assert m.headers == [*CALL[4:6], (b"x-any", b"1")]
        m.headers.clear()
        m.body.append(b"x")
        m.trailers.append((b"a", b"b"))
    one, other = (http2_sections.trailer_fields(((b"grpc-status", b"0"),))[0] for _ in range(2))
    one.clear()
    assert other == [(b"grpc-status", b"0")]


@pytest.mark.parametrize(
    "private", [(b"authorization", b"Bearer secret"), (b"cookie", b"a=secret"), (b"x-key", b"secret")]
)
def test_no_credentials_are_kept(private: Field) -> None:
    for _ in range(4):
        assert request(private).headers[-1] == private
        http2_sections.request_message((*CALL[:2], (b":path", b"/a?secret"), *CALL[3:]), False)
    assert b"secret" not in repr(list(http2_sections._REQUESTS.known)).encode()


def test_the_tables_are_bounded() -> None:
    for number in range(6000):
        fields = (*CALL[:2], (b":path", b"/%d" % number), *CALL[3:])
        http2_sections.request_message(fields, False)
        http2_sections.request_message(fields, False)
    assert len(http2_sections._REQUESTS.known) <= 512 and len(http2_sections._REQUESTS.seen) <= 4096


def test_long_sections_are_judged_each_time() -> None:
    fields = (*CALL, *((b"accept", b"%d" % number) for number in range(200)))
    for _ in range(4):
        with pytest.raises(ProtocolError) as caught:
            http2_sections.request_message(fields, False, True)
        assert caught.value.status == 431
