import pytest
from hypothesis import given
from hypothesis import strategies as st

from certs.pem import Block, PemError, read_blocks, write_blocks


def read(data: bytes) -> list[Block]:
    return read_blocks(data, bytes_max=10_000, blocks_max=3)


@given(st.lists(st.binary(min_size=1, max_size=200), max_size=3))
def test_what_is_written_is_read(ders: list[bytes]) -> None:
    assert [block.der for block in read(write_blocks("THING", ders))] == ders


def test_text_between_blocks_is_ignored_and_crlf_is_fine() -> None:
    data = b"# a comment\r\n-----BEGIN A-----\r\nAAEC\r\n-----END A-----\r\nsubject=x\r\n"
    assert read(data) == [Block("A", b"\x00\x01\x02", 2)]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"-----BEGIN A-----\nAAEC\n", "line 1: this block has no END"),
        (b"-----BEGIN A-----\nAAEC\n-----END B-----\n", "line 3: this END"),
        (b"-----END A-----\n", "line 1: this END"),
        (b"-----BEGIN A-----\n-----BEGIN A-----\n", "line 2: a block begins inside the one of line 1"),
        (b"-----BEGIN A-----\nA!EC\n-----END A-----\n", "not Base64"),
        (b"-----BEGIN A-----\nAAE\n-----END A-----\n", "not Base64"),
        (b"-----BEGIN A-----\n-----END A-----\n", "empty"),
        (b"-----BEGIN A-----\nProc-Type: 4,ENCRYPTED\n\nAAEC\n-----END A-----\n", "encrypted"),
        (b"\x30\x82\x01\x02", "DER"),
        (b"x" * 10_001, "larger than 10000 bytes"),
        (write_blocks("A", [b"1"] * 4), "more than 3 blocks"),
    ],
)
def test_malformed_text_is_refused_with_its_line(data: bytes, says: str) -> None:
    with pytest.raises(PemError) as caught:
        read(data)
    assert says in str(caught.value)
