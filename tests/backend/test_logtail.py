import itertools
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_router.backend.logtail import MAX_LINE_BYTES, MAX_LINES, LogTail

lines_of_text = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.binary(min_size=1, max_size=3).map(lambda part: part * (MAX_LINE_BYTES // 2)),
    ),
    max_size=12,
).map(b"\n".join)


def all_of(pieces: list[bytes]) -> tuple[list[str], LogTail]:
    tail = LogTail()
    done = [line for piece in pieces for line in tail.feed(piece)]
    return done + tail.close(), tail


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


@given(lines_of_text, st.lists(st.integers(min_value=0, max_value=2**20), max_size=20))
def test_where_a_read_ends_changes_nothing(data, places):
    whole, tail = all_of([data])
    pieces, split = all_of(cut(data, places))
    assert whole == pieces
    assert tail.lines == split.lines
    assert tail.written == split.written == len(whole)


@pytest.mark.parametrize("length", [MAX_LINE_BYTES - 1, MAX_LINE_BYTES, MAX_LINE_BYTES + 1])
def test_byte_by_byte_around_the_longest_line(length):
    data = b"x" * length + b"\nnext\n"
    assert all_of([data])[0] == all_of([bytes([byte]) for byte in data])[0] == ["x" * min(length, 4096), "next"]


@given(st.lists(st.binary(max_size=20_000), max_size=60))
def test_memory_is_bounded(pieces):
    tail = LogTail()
    for piece in pieces:
        tail.feed(piece)
        assert len(tail._partial) <= MAX_LINE_BYTES
        assert len(tail.lines) <= MAX_LINES
        assert all(len(line) <= MAX_LINE_BYTES for line in tail.lines)


def test_a_flood_without_a_newline_costs_one_line():
    tail = LogTail()
    for _ in range(2000):
        tail.feed(b"x" * 65536)
    tail.feed(b"\nafter\n")
    assert list(tail.lines) == ["x" * MAX_LINE_BYTES, "after"]
    assert tail.written == 2
    assert sys.getsizeof(tail._partial) < 100


def test_only_the_last_lines_are_kept_and_all_are_counted():
    tail = LogTail()
    tail.feed(b"".join(b"line %d\n" % number for number in range(1000)))
    assert len(tail.lines) == MAX_LINES
    assert tail.lines[0] == "line 800"
    assert tail.written == 1000
    assert tail.last(2) == "line 998\nline 999"


def test_lines_are_returned_once_complete():
    tail = LogTail()
    assert tail.feed(b"half") == []
    assert tail.feed(b" a line\r\nand") == ["half a line"]
    assert tail.feed(b"") == []
    assert tail.close() == ["and"]
    assert tail.close() == []


def test_an_end_in_the_middle_of_an_overlong_line_says_nothing_twice():
    tail = LogTail()
    assert len(tail.feed(b"y" * (MAX_LINE_BYTES + 1))) == 1
    assert tail.close() == []
    assert tail.written == 1


def test_control_characters_cannot_reach_a_terminal():
    tail = LogTail()
    assert tail.feed(b"\x1b[31mred\x00\x07\tand\x9b\xff\xe2\x80\xae evil\n") == ["[31mred\tand\ufffd\ufffd evil"]


def test_a_character_that_is_cut_by_the_limit_is_replaced():
    (line,) = LogTail().feed(b"x" * (MAX_LINE_BYTES - 1) + "é".encode() + b"\n")
    assert line == "x" * (MAX_LINE_BYTES - 1) + "\ufffd"


def test_last_skips_what_says_nothing():
    tail = LogTail()
    tail.feed(b"one\n\n   \ntwo\n\n")
    assert tail.last(2) == "one\ntwo"
    assert tail.last(1) == "two"
    assert LogTail().last(5) == ""
