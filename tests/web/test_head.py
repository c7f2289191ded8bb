"""Which heads the data plane takes, held against the parser of the other way in; and what is said of the others."""

import contextlib

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_router.errors import HeadRefused
from trio_router.web.head import END, MAX_HEAD_BYTES, check_head, read_head
from trio_router.web.protocols import Parser

PLAIN = b"POST /v1/chat/completions?x=1 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 12\r\n\r\n"


def plain(*lines: bytes, first: bytes = b"POST /v1/chat/completions HTTP/1.1") -> bytes:
    return b"\r\n".join([first, *lines]) + END


def by_h11(raw: bytes) -> h11.Request | None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
    connection.receive_data(raw)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError:
        return None
    return event if isinstance(event, h11.Request) else None


def test_a_plain_one():
    head = read_head(PLAIN)
    assert head is not None
    assert (head.path, head.target, head.length, head.close) == (
        "/v1/chat/completions",
        "/v1/chat/completions?x=1",
        12,
        False,
    )
    assert head.headers == [(b"host", b"localhost"), (b"content-length", b"12")]
    assert head.get(b"host") == "localhost"


HOST, LENGTH = b"Host: h", b"Content-Length: 2"


@pytest.mark.parametrize(
    "raw",
    [
        plain(HOST, LENGTH, first=b"GET /v1/chat/completions HTTP/1.1"),
        plain(HOST, LENGTH, first=b"POST /health HTTP/1.1"),
        plain(HOST, LENGTH, first=b"POST /v1/chat/completions HTTP/1.0"),
        plain(HOST, LENGTH, first=b"POST http://h/v1/chat/completions HTTP/1.1"),
        plain(HOST, LENGTH, first=b"POST  /v1/chat/completions HTTP/1.1"),
        plain(HOST),
        plain(LENGTH),
        plain(HOST, HOST, LENGTH),
        plain(HOST, LENGTH, LENGTH),
        plain(HOST, LENGTH, b"Content-Length: 3"),
        plain(HOST, b"Content-Length: 2, 2"),
        plain(HOST, b"Content-Length: +2"),
        plain(HOST, b"Content-Length: -2"),
        plain(HOST, b"Content-Length: 0x2"),
        plain(HOST, b"Content-Length: \xb2"),
        plain(HOST, LENGTH, b"Transfer-Encoding: chunked"),
        plain(HOST, LENGTH, b"transfer-encoding: identity"),
        plain(HOST, b"Transfer-Encoding: chunked"),
        plain(HOST, LENGTH, b"Expect: 100-continue"),
        plain(HOST, LENGTH, b"Upgrade: h2c", b"Connection: upgrade"),
        plain(HOST, LENGTH, b"Connection: close, x-api-key"),
        plain(HOST, LENGTH, b"X: y", b" folded"),
        plain(HOST, LENGTH, b"X : y"),
        plain(HOST, LENGTH, b"X: a\x00b"),
        plain(HOST, LENGTH, b": y"),
        plain(HOST, LENGTH, b"X"),
        PLAIN.replace(b"\r\nContent", b"\nContent"),
        PLAIN.replace(b"localhost", b"local\rhost"),
    ],
)
def test_what_is_odd_is_not_taken(raw):
    assert read_head(raw) is None


@pytest.mark.timeout(20)  # what grows with the square of the blanks takes minutes for these
@pytest.mark.parametrize("last", [b"\0", b"\1", b"\r", b"\n", b"\x0b", b"\x7f", b"\xff", b"a"])
@pytest.mark.parametrize("blank", [b" ", b"\t", b" \t", b"a "])
def test_blanks_cost_nobody_time(blank, last):
    many = blank * (60_000 // len(blank)) + last
    raw = plain(HOST, b"Content-Length: 2", b"X:" + many)
    for read in (read_head, check_head, parsed):
        with contextlib.suppress(HeadRefused, h11.RemoteProtocolError):
            read(raw)
    chunked = plain(HOST, b"Transfer-Encoding: chunked")
    for body in (b"1;" + many + b"\r\n", b"1;" + many[-4000:] + b"\r\na\r\n0\r\nX:" + many + b"\r\n\r\n"):
        with contextlib.suppress(HeadRefused, h11.RemoteProtocolError):
            parsed(chunked + body)


def parsed(raw):
    parser = Parser(4 * MAX_HEAD_BYTES)
    parser.receive_data(raw)
    while isinstance(parser.next_event(), h11.Event):
        pass


def test_a_line_before_a_chunk():
    head = plain(HOST, b"Transfer-Encoding: chunked")
    parsed(head + b"1;x=" + b"y" * 4000 + b" \r\na\r\n0\r\n\r\n")
    for line in (b"1;" + b"y" * 5000 + b"\r\n", b"1;" + b"y" * 5000, b"1;\n\r\n", b"1;\0\r\n", b"1\r2\r\n"):
        with pytest.raises(h11.RemoteProtocolError, match="before a chunk"):
            parsed(head + line)


names = st.sampled_from([b"Host", b"Content-Length", b"Connection", b"Transfer-Encoding", b"X-A", b"x b", b"", b"X\t"])
blanks = st.sampled_from([b"", b" ", b"\t ", b"\r", b"\n"])
values = st.one_of(st.sampled_from([b"h", b"2", b"02", b"close", b"chunked", b"1, 1", b"\xff"]), st.binary(max_size=6))
line = st.builds(lambda n, a, b, v, c: n + a + b":" + b + v + c, names, blanks, blanks, values, blanks)
ends = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r\n "])


@settings(max_examples=2000)
@given(st.lists(st.tuples(line, ends), max_size=5), st.booleans())
def test_whatever_is_taken_hypercorns_parser_reads_the_same(lines, begun):
    start = [(b"POST /tokenize HTTP/1.1", b"\r\n")]
    if begun:
        start += [(b"Host: h", b"\r\n"), (b"Content-Length: 2", b"\r\n")]
    raw = b"".join(text + end for text, end in start + lines) + b"\r\n"
    raw = raw[: raw.index(END) + len(END)] if END in raw else raw
    ours, theirs = read_head(raw), by_h11(raw)
    if ours is None:
        return
    assert theirs is not None
    assert theirs.method == b"POST"
    assert theirs.target.decode() == ours.target
    assert [(name, value) for name, value in theirs.headers] == ours.headers
    assert dict(theirs.headers)[b"content-length"] == b"%d" % ours.length


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"x" * MAX_HEAD_BYTES, 431),
        (b"\x16\x03\x01\x02", 400),
        (b"\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : h\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: h\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\nX: y\r\n\r\n", 400),
        (b"\nGET / HTTP/1.1\r\nHost: h\r\n\r\n", 400),
        (plain(HOST, LENGTH, b"X: y", b" folded"), 400),
        (plain(HOST, LENGTH, b"X: y", b"\tfolded"), 400),
        (plain(HOST, LENGTH, b"Transfer-Encoding: chunked"), 400),
        (plain(HOST, b"transfer-encoding: chunked", b"CONTENT-LENGTH: 2"), 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (plain(HOST, b"Transfer-Encoding: gzip"), 501),
        (plain(HOST, b"Connection: Upgrade", b"Upgrade: WebSocket", first=b"GET /x HTTP/1.1"), 400),
    ],
)
def test_what_is_refused_and_how(raw, status):
    with pytest.raises(HeadRefused) as refused:
        check_head(raw)
    assert refused.value.status == status


@pytest.mark.parametrize(
    "raw",
    [
        PLAIN,
        b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /health HTTP/1.0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\n",
        plain(HOST, b"Transfer-Encoding: chunked"),
        plain(HOST, b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: x"),
    ],
)
def test_what_is_not_refused(raw):
    check_head(raw)
