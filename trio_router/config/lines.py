"""On which line each key of a TOML document stands. The standard library's reader does not tell.

Only for documents that `tomllib` has read without complaint: this walks over the text and trusts its grammar.
Keys inside an inline table or an array are found on the line where that value's own key stands.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Mapping

from trio_router.config.problems import KeyPath

_BLANK = re.compile(r"(?:[ \t\r\n]|\#[^\n]*)+")
_KEY_PART = re.compile(r"""[ \t]*(?P<part>"(?:\\.|[^"\\\n])*"|'[^'\n]*'|[A-Za-z0-9_-]+)[ \t]*""")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}'
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
_PLAIN = re.compile(r"[^\"'\[\]{}\#\n]+")


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line, counted from 1, of every table header and every `key =`."""
    text = text.replace("\r\n", "\n")
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    entries: Counter[KeyPath] = Counter()
    at = counted = 0
    line = 1
    while True:
        blank = _BLANK.match(text, at)
        at = blank.end() if blank else at
        if at >= len(text):
            return lines
        line += text.count("\n", counted, at)
        counted = at
        header, array = text[at] == "[", text.startswith("[[", at)
        if header:
            at += 2 if array else 1
        key, at = _read_key(text, at)
        if not key:
            return lines
        if header:
            table = (*key, entries[key]) if array else key
            entries[key] += array
            at = _end_of_line(text, at)
        else:
            at = _end_of_value(text, at)
        path = table if header else table + key
        for depth in range(1, len(path) + 1):  # `a.b.c = 1` is also the first line of `a.b`
            lines.setdefault(path[:depth], line)


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int | None:
    """The line of `path`, or of the closest thing around it that has one."""
    for depth in range(len(path), 0, -1):
        if path[:depth] in lines:
            return lines[path[:depth]]
    return None


def _read_key(text: str, at: int) -> tuple[KeyPath, int]:
    parts: list[str] = []
    while match := _KEY_PART.match(text, at):
        part = match["part"]
        parts.append(tomllib.loads(f"key = {part}")["key"] if part[0] in "\"'" else part)
        at = match.end()
        if not text.startswith(".", at):
            break
        at += 1
    return tuple(parts), at


def _end_of_value(text: str, at: int) -> int:
    """The first line break that is in no string, no array and no inline table."""
    depth = 0
    while at < len(text):
        if skipped := _STRING.match(text, at) or _PLAIN.match(text, at):
            at = skipped.end()
            continue
        match text[at]:
            case "\n" if depth == 0:
                return at
            case "#":
                at = _end_of_line(text, at)
                continue
            case "[" | "{":
                depth += 1
            case "]" | "}":
                depth -= 1
        at += 1
    return at


def _end_of_line(text: str, at: int) -> int:
    end = text.find("\n", at)
    return len(text) if end < 0 else end
