"""Prometheus text: which of its forms a client reads, and how that of many servers becomes one."""

import re
from collections.abc import Iterable
from typing import Final

import attrs
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import choose_encoder

PLAIN: Final = "text/plain; version=0.0.4; charset=utf-8"
MAX_SERIES: Final = 1000
"""Of one server; what comes after is left out."""
MAX_LINE: Final = 2000

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_ABOUT: Final = re.compile(rf"# (HELP|TYPE) ({_NAME}) (.*)")
_VALUE = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|Inf|NaN)"
_SAMPLE: Final = re.compile(rf"({_NAME})(?:\{{(.*)\}})?[ \t]+({_VALUE})(?:[ \t]+-?[0-9]+)?[ \t]*")
_LABEL: Final = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')
_SUFFIX: Final = re.compile(r"_(?:bucket|sum|count)$")


def encode(registry: CollectorRegistry, accept: str | None) -> tuple[bytes, str]:
    """Everything in `registry` in the form that `accept` names, plain text if it names none, and its content type."""
    try:
        encoder, content_type = choose_encoder(accept or "")
    except (TypeError, ValueError):  # a version that is no number
        encoder, content_type = generate_latest, PLAIN
    return encoder(registry), content_type


@attrs.frozen(kw_only=True)
class Scraped:
    """What the llama-server of one model said of itself, or why it did not."""

    alias: str
    text: str = ""
    problem: str | None = None


@attrs.define(eq=False)
class _Family:
    about: dict[str, str] = attrs.field(factory=dict)
    samples: list[str] = attrs.field(factory=list)


def merge(scraped: Iterable[Scraped]) -> str:
    """One text of many: each family once, each series with the label `model` first.

    A label of that name that was there already becomes `exported_model`, as it does in Prometheus. A line that is no
    sample is left out; a server that did not answer is a comment.
    """
    families: dict[str, _Family] = {}
    comments = []
    for one in scraped:
        if one.problem is not None:
            comments.append(f"# model {_escaped(one.alias)}: {' '.join(one.problem.split())}")
            continue
        _read(one, families)
    lines = list(comments)
    for name, family in families.items():
        if family.samples:
            lines += [f"# {word} {name} {family.about[word]}" for word in ("HELP", "TYPE") if word in family.about]
            lines += family.samples
    return "\n".join(lines) + "\n"


def _read(one: Scraped, families: dict[str, _Family]) -> None:
    series = 0
    for line in one.text.split("\n"):
        if len(line) > MAX_LINE:
            continue
        if about := _ABOUT.fullmatch(line):
            word, name, text = about.groups()
            families.setdefault(name, _Family()).about.setdefault(word, text)
        elif sample := _SAMPLE.fullmatch(line):
            name, labels, value = sample.groups()
            if (series := series + 1) > MAX_SERIES:
                return
            bare = _SUFFIX.sub("", name)
            family = families.setdefault(name if name in families or bare not in families else bare, _Family())
            kept = "".join(
                f',{"exported_model" if label == "model" else label}="{text}"'
                for label, text in _LABEL.findall(labels or "")
            )
            family.samples.append(f'{name}{{model="{_escaped(one.alias)}"{kept}}} {value}')


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
