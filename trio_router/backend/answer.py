"""An answer of a llama-server, as its bytes come: its head, then pieces of its body without their framing.

Several chunks that arrived together come out together. llama-server's plain answers begin with the same bytes again
and again but for the length. Such a head is parsed once, by llhttp like all others, and known by its bytes from then on.
Nothing here knows of sockets.
"""

import re
from typing import Any, Final

import attrs
import httptools

MAX_HEAD_BYTES: Final = 64 * 1024

HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
"""RFC 9110 section 7.6.1, and what older clients send."""

Headers = list[tuple[bytes, bytes]]

_END: Final = b"\r\n\r\n"
_LENGTH: Final = re.compile(rb"\r\nContent-Length: ([0-9]{1,15})\r\n")
_MOST_KNOWN: Final = 256
_MAX_KNOWN_BYTES: Final = 2048
BODILESS: Final = frozenset({204, 304})


@attrs.define(eq=False, kw_only=True)
class AnswerHead:
    """The first part of an answer; names are lower case, hop-by-hop headers are gone."""

    status: int
    headers: Headers
    length: int | None = None
    """Of the body, bytes, where the answer says so beforehand."""
    memo: dict[str, Any] = attrs.field(factory=dict)
    """For whoever passes answers on: shared by all whose heads are the same but for the length."""

    def get(self, name: bytes) -> bytes | None:
        """The first value of `name` (lower case), or None."""
        return next((value for key, value in self.headers if key == name), None)


@attrs.define(eq=False)
class _Kind:
    """Heads that are the same but for the length."""

    status: int
    before: Headers
    after: Headers
    """Headers before and after the length."""
    memo: dict[str, Any] = attrs.field(factory=dict)


_known: Final[dict[tuple[bytes, bytes], _Kind]] = {}
"""By their bytes before and after the length. All of them are llama-server's, so they are few."""

_heads: Final[dict[tuple[int | tuple[bytes, bytes], ...], AnswerHead]] = {}
"""Heads that do not say how long the body is, by what they say."""


@attrs.define(eq=False)
class Reading:
    """What we know of the answer at hand: by its bytes, or because the parser has told us."""

    status: int = 0
    headers: Headers = attrs.field(factory=list)
    head_bytes: int = 0
    head_done: bool = False
    barren_bytes: int = 0
    """What came since there was last something for the client: a head, trailers or a chunk's name without an end."""
    keep_alive: bool = False
    """Whether the connection may carry another request; the parser knows until the answer's end."""
    body: list[bytes] = attrs.field(factory=list)
    done: bool = False
    extra: bool = False
    """Something came after the end: the connection cannot be trusted with another request."""
    head: AnswerHead | None = None
    left: int = 0
    """Bytes of the body to come, of an answer whose head was known."""
    parser: httptools.HttpResponseParser | None = None

    def recognise(self, data: bytes) -> bool:
        """Take the first bytes of an answer, if its head is one we know."""
        end = data.find(_END)
        if end < 0 or (length := _LENGTH.search(data, 0, end + 2)) is None:
            return False
        kind = _known.get((data[: length.start(1)], data[length.end(1) : end]))
        if kind is None:
            return False
        digits = length[1]
        self.left = int(digits)
        self.head = AnswerHead(
            status=kind.status,
            headers=[*kind.before, (b"content-length", digits), *kind.after],
            length=self.left,
            memo=kind.memo,
        )
        self.head_done = self.keep_alive = True
        self.done = not self.left
        if len(data) > end + len(_END):
            self.take(data[end + len(_END) :])
        return True

    def take(self, data: bytes) -> None:
        """Take more bytes of an answer whose head was known."""
        if len(data) > self.left:
            self.extra = True
            data = data[: self.left]
        if data:
            self.left -= len(data)
            self.body.append(data)
            self.done = not self.left

    def feed(self, data: bytes) -> None:
        """Have the parser take more bytes. Raises httptools' errors."""
        if self.parser is None:
            self.parser = httptools.HttpResponseParser(self)
            self.parser.feed_data(data)
            self._get_to_know(data)
        else:
            self.parser.feed_data(data)

    def _get_to_know(self, data: bytes) -> None:
        """Remember the head that `data`, the first bytes of an answer, begins with, if it is a plain one."""
        end = data.find(_END)
        if end < 0 or not self.head_done or not self.keep_alive or self.status < 200 or self.status in BODILESS:
            return
        names = [name for name, _ in self.headers]
        length = _LENGTH.search(data, 0, end + 2)
        if length is None or b"transfer-encoding" in names or names.count(b"content-length") != 1:
            return
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        headers = kept(self.headers)
        place = [name for name, _ in headers].index(b"content-length")
        kind = _Kind(self.status, headers[:place], headers[place + 1 :])
        _known[data[: length.start(1)], data[length.end(1) : end]] = kind

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.head_done:  # a trailer, which is no header (RFC 9110 section 6.5.1), or part of something extra
            return
        self.head_bytes += len(name) + len(value)
        if self.head_bytes > MAX_HEAD_BYTES:
            raise ValueError(f"headers of more than {MAX_HEAD_BYTES} bytes")
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self.parser is not None and not self.head_done:
            self.head_done = True
            self.status = self.parser.get_status_code()
            self.keep_alive = self.parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        if not self.extra:
            self.body.append(body)

    def on_message_begin(self) -> None:
        self.extra = self.done

    def on_message_complete(self) -> None:
        self.done = True


def head_of(status: int, headers: Headers) -> AnswerHead:
    """What an answer begins with. Those of streams are all the same, and then the same object."""
    head = _heads.get((status, *headers))
    if head is None:
        head = AnswerHead(status=status, headers=headers)
        length = head.get(b"content-length")
        if length is not None:
            head.length = int(length) if length.isdigit() else None
        elif sum(len(name) + len(value) for name, value in headers) <= _MAX_KNOWN_BYTES:
            if len(_heads) >= _MOST_KNOWN:
                _heads.clear()
            _heads[status, *headers] = head
    return head


def kept(headers: Headers) -> Headers:
    """`headers` without those that concern the connection alone."""
    listed = {name.strip().lower() for key, value in headers if key == b"connection" for name in value.split(b",")}
    return [(key, value) for key, value in headers if key not in HOP_BY_HOP and key not in listed]
