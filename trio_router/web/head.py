"""Which requests the data plane takes: those whose head it understands to the last byte.

One expression describes every head that is taken; whatever it does not match goes to Hypercorn, whose parser (h11)
answers or refuses it. So there are no two opinions on an odd head (folded lines, bare line feeds, blanks before a
colon, two lengths, a length beside chunks: what request smuggling is made of): the strict one here is a subset of
what h11 accepts, and a test holds the two against each other.
"""

import re
from typing import Final

import attrs
import h11
from h11._receivebuffer import ReceiveBuffer

from trio_router.backend.answer import Headers
from trio_router.errors import HeadRefused
from trio_router.web.admission import INFERENCE_PATHS

MAX_HEAD_BYTES: Final = 64 * 1024
END: Final = b"\r\n\r\n"

HTTP2: Final = b"PRI * HTTP/2.0"
"""What a client that knows HTTP/2 to be spoken here begins with (RFC 9113 section 3.4)."""
BARE_LINE_FEED: Final = re.compile(rb"(?:^|[^\r])\n")
_CONTROL: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)")
"""In a head. Looked for before h11 sees it, whose expressions take time that grows with the square of the blanks before one."""
MAX_CHUNK_LINE_BYTES: Final = 4096
MAX_LINES: Final = 500
_EMPTY_LINES: Final = re.compile(rb"(?:\r\n)*")
_FOLDED: Final = re.compile(rb"\r\n[ \t]")
_CHUNKS: Final = re.compile(rb"(?i)\r\ntransfer-encoding[ \t]*:")
_SIZE: Final = re.compile(rb"(?i)\r\ncontent-length[ \t]*:")
_WEBSOCKET: Final = re.compile(rb"(?i)\r\nupgrade[ \t]*:[^\r\n]*\bwebsocket\b")

METHOD: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
TARGET: Final = re.compile(rb"[!-~]+")
CONTROL: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
"""What no value of a header holds (RFC 9110 section 5.5)."""
_LINE = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++:[ \t]*+(?:[!-~\x80-\xff]++(?:[ \t]++[!-~\x80-\xff]++)*+)?+[ \t]*+\r\n"
"""Possessive: where it does not match it says so at once."""
_HEAD: Final = re.compile(rb"POST (/[!-\"$-~]*) HTTP/1\.1\r\n((?:" + _LINE + rb")++)\r\n")
_LENGTH: Final = re.compile(rb"[0-9]{1,15}")
_ODD: Final = frozenset({b"transfer-encoding", b"expect", b"upgrade", b"te", b"trailer", b"http2-settings"})
"""Headers that ask for more than the plain case: Hypercorn knows them."""
_ONCE: Final = frozenset({b"host", b"content-length", b"connection"})


NO_WEBSOCKETS: Final = "WebSockets are not spoken here; streams are server-sent events"
CONTROL_CHARACTERS: Final = "a line of the head has a control character"
BOTH_LENGTHS: Final = "the request has a Content-Length and a Transfer-Encoding"


@attrs.frozen(kw_only=True)
class Head:
    """The head of a plain inference request."""

    path: str
    target: str
    """The path with its query, as it came."""
    headers: Headers
    """In the order they came; names are lower case."""
    fields: dict[bytes, bytes]
    """First value of each, by lower-case name."""
    length: int
    """Of the body, bytes."""
    close: bool
    """Whether the client wants the connection closed afterwards."""

    def get(self, name: bytes) -> str | None:
        """The first value of `name` (lower case)."""
        value = self.fields.get(name)
        return None if value is None else value.decode("latin-1")


def read_head(raw: bytes) -> Head | None:
    """The head in `raw`, which ends with its empty line; None: not one for the data plane."""
    match = _HEAD.fullmatch(raw)
    if match is None:
        return None
    target = match[1].decode("ascii")
    path = target.partition("?")[0]
    if path not in INFERENCE_PATHS:
        return None
    headers: Headers = []
    fields: dict[bytes, bytes] = {}
    for line in match[2].split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        name, value = name.lower(), value.strip(b" \t")
        headers.append((name, value))
        if name not in fields:
            fields[name] = value
        elif name in _ONCE:
            return None
    length, connection = fields.get(b"content-length"), fields.get(b"connection", b"").lower()
    if (
        length is None
        or not _LENGTH.fullmatch(length)
        or b"host" not in fields
        or not _ODD.isdisjoint(fields)
        or connection not in {b"", b"keep-alive", b"close"}
    ):
        return None
    return Head(
        path=path,
        target=target,
        headers=headers,
        fields=fields,
        length=int(length),
        close=connection == b"close",
    )


def check_lines(raw: bytes) -> None:
    """Raise HeadRefused for lines that h11 forgives and others read differently (RFC 9112 sections 2.2 and 5.2).

    And for so many that it takes long.
    """
    if raw.count(b"\n") > MAX_LINES:
        raise HeadRefused(f"the head has more than {MAX_LINES} lines", status=431)
    if BARE_LINE_FEED.search(raw):
        raise HeadRefused("a line of the head ends without a carriage return")
    if _FOLDED.search(raw):
        raise HeadRefused("a line of the head is folded")
    if _CONTROL.search(raw):
        raise HeadRefused(CONTROL_CHARACTERS)


class StrictBuffer(ReceiveBuffer):
    """What h11 has received of a connection, of which it is to forgive no line: `check_lines` for every head and trailer."""

    def begins(self) -> bool:
        """Whether a request has begun; empty lines before it are dropped."""
        empty = _EMPTY_LINES.match(self._data)
        if empty is not None and empty.end():
            self._extract(empty.end())
        return bytes(self._data[:2]) not in {b"", b"\r"}

    def clear(self) -> None:
        """Drop all of it."""
        self._extract(len(self))

    def maybe_extract_next_line(self) -> bytearray | None:
        """The line that says how large a chunk is, None: it is not there yet."""
        line: bytearray | None = super().maybe_extract_next_line()
        said = self if line is None else line
        if len(said) > MAX_CHUNK_LINE_BYTES or (line and (_CONTROL.search(line) or BARE_LINE_FEED.search(line))):
            raise h11.RemoteProtocolError("the line before a chunk is too long, or has a control character")
        return line

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """The lines up to an empty one, None: it is not there yet."""
        received = bytes(self)
        lines: list[bytearray] | None = super().maybe_extract_lines()
        head = received[: len(received) - len(self)]
        try:
            check_lines(head)
            if len(head) > MAX_HEAD_BYTES:
                raise _too_large()
        except HeadRefused as error:
            raise h11.RemoteProtocolError(error.message, error_status_hint=error.status) from error
        return lines


def _too_large() -> HeadRefused:
    return HeadRefused(f"the head is larger than {MAX_HEAD_BYTES} bytes", status=431)


def check_version(request: object) -> None:
    """Raise h11.RemoteProtocolError for a request in no version that is spoken here: h11 takes any number."""
    if (
        isinstance(request, h11.Request)
        and not request.http_version.startswith(b"1.")
        and (request.method, request.target, request.http_version) != (b"PRI", b"*", b"2.0")
    ):
        raise h11.RemoteProtocolError("HTTP/1.0, HTTP/1.1 and HTTP/2 are spoken here", error_status_hint=505)


def check_head(raw: bytes) -> None:
    """Raise HeadRefused for a head that Hypercorn would answer with nothing but a status, or fall over.

    Its parser is asked, so there are no two opinions; only the answer is ours, with a body and an id. WebSockets are not
    spoken here, and Hypercorn does not survive one whose first frames come with its head (pgjones/hypercorn#225).
    What that parser forgives and others read differently is refused besides: bare line feeds, folded lines, a length
    beside chunks (RFC 9112 section 6.1).
    """
    if raw.startswith(HTTP2):
        return
    head, end, _ = raw.partition(END)
    check_lines(head)
    if not end:
        if len(raw) >= MAX_HEAD_BYTES:
            raise _too_large()
        raise HeadRefused("the request does not begin with a method")
    if _CHUNKS.search(raw) and _SIZE.search(raw):
        raise HeadRefused(BOTH_LENGTHS)
    if _WEBSOCKET.search(raw):
        raise HeadRefused(NO_WEBSOCKETS)
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
    try:
        parser.receive_data(raw)
        check_version(parser.next_event())
    except h11.RemoteProtocolError as error:
        raise HeadRefused(f"the request is not HTTP: {error}", status=error.error_status_hint) from error
