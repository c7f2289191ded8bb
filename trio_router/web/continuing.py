"""Whole answers that are made in parts: a low request gave its slot to a high one, and goes on where it was.

What came of the answer is kept, and llama-server is asked to go on from there: a chat with what was said so far as its
last message, which it continues and repeats at the beginning of its own; a bare prompt with that at its end. What it
says of itself is joined: the tokens of all parts were made, the prompt is the first one's.

That a chat was gone on with, and not answered anew behind an answer that breaks off, is known by the repetition. Where
that does not come (its template cannot be continued, `--no-prefill-assistant`, a model that thinks first, a build that
does not repeat), the request is done from the start, as is every other on the same path until there is another
llama-server.

Only requests of which every field is known to say the same of a part are done so: tools, grammars, several answers,
seeds and all that we do not know begin anew. The text is what it would have been as far as its tokens are the same when
it is read as a prompt, and llama-server computes them to the same digits when they come in one batch.
"""

from typing import Any, Final, TypeAlias

import attrs
import msgspec

from trio_router.fleet.rewriting import ALL_LENGTHS, number_of
from trio_router.fleet.ticket import Ticket
from trio_router.web.admission import Talk
from trio_router.web.assembly import Assembly, NotWhole

PATHS: Final = {
    "/v1/chat/completions": "messages",
    "/chat/completions": "messages",
    "/v1/completions": "prompt",
}
"""Where answers can be gone on with, and the field that says what was said."""
KNOWN: Final = frozenset(
    {
        *{"model", "messages", "prompt", "stream", "stream_options", "user", "metadata", "store", "id_slot"},
        *{"temperature", "dynatemp_range", "dynatemp_exponent", "top_k", "top_p", "min_p", "typical_p", "xtc_probability"},
        *{"xtc_threshold", "repeat_penalty", "repeat_last_n", "presence_penalty", "frequency_penalty", "logit_bias"},
        *{"samplers", "ignore_eos", "stop", "logprobs", "top_logprobs", "cache_prompt", "timings_per_token"},
        *{"chat_template_kwargs", "prompt_cache_key", "service_tier"},
        *ALL_LENGTHS,
    }
)  # fmt: skip
"""Fields that say of a part of an answer what they say of the whole."""
Timings: TypeAlias = dict[str, Any]
_Raw = dict[str, msgspec.Raw]
_OBJECT: Final = msgspec.json.Decoder(_Raw)
_MESSAGES: Final = msgspec.json.Decoder(list[msgspec.Raw])
_encode: Final = msgspec.json.encode
NEEDED: Final = frozenset({"cache_n", "prompt_n", "prompt_ms", "predicted_n", "predicted_ms"})
"""What llama-server must say of a part."""


class _Message(msgspec.Struct):
    role: str


class NotContinued(NotWhole):
    """Raised when llama-server does not go on with what it said."""


@attrs.frozen(kw_only=True)
class Part:
    """What came of an answer before it was interrupted."""

    text: bytes
    """JSON, without its quotation marks."""
    timings: Timings
    """llama-server's own, at the last token."""


@attrs.define(eq=False)
class Continuing:
    """One request whose answer may be made in parts."""

    ticket: Ticket
    path: str
    source: bytes | bytearray
    """The body as the client sent it."""
    parts: list[Part] = attrs.field(factory=list)

    @classmethod
    def of(cls, ticket: Ticket, path: str, body: bytes | bytearray, talk: Talk) -> "Continuing | None":
        """None for a request that is to begin anew whenever it is interrupted."""
        if path not in PATHS or talk.has_tools or talk.is_several:
            return None
        fields = _OBJECT.decode(body)
        if not fields.keys() <= KNOWN:
            return None
        found = cls(ticket, path, body)
        said = bytes(fields.get(PATHS[path], b""))
        able = _ends_with_a_question(said) if found.is_chat else said.startswith(b'"')
        return found if able else None

    @property
    def is_chat(self) -> bool:
        """Whether llama-server repeats what it goes on with."""
        return PATHS[self.path] == "messages"

    @property
    def text(self) -> bytes:
        """What was said so far."""
        said = [part.text for part in self.parts]
        return b"".join(said[-1:] if self.is_chat else said)

    @property
    def body(self) -> bytes | bytearray:
        """What is to be asked for now, as the client would ask for it."""
        if not self.parts:
            return self.source
        fields = _OBJECT.decode(self.source)
        made = _made(self.parts)
        for name, length in _lengths(fields).items():
            fields[name] = msgspec.Raw(b"%d" % (length - made))
        field = PATHS[self.path]
        said = bytes(fields[field])[:-1]
        end = b',{"role":"assistant","content":"%b"}]' if self.is_chat else b'%b"'
        fields[field] = msgspec.Raw(said + end % self.text)
        return _encode(fields)

    def keep(self, part: Part) -> None:
        """The try was interrupted when so much was there; all of it is not gone on with."""
        if not self.ticket.yielded:
            return
        made = _made([*self.parts, part])
        if all(made < length for length in _lengths(_OBJECT.decode(self.source)).values()):
            self.parts.append(part)

    def check(self, said: bytes) -> bool:
        """Whether an answer that begins with `said` is known to go on with what was kept. Raises NotContinued."""
        if not self.parts or not self.is_chat:
            return True
        text = self.text
        if not said.startswith(text[: len(said)]):
            raise NotContinued("its answer does not begin with what it had said")
        return len(said) >= len(text)

    def joined(self, last: dict[str, bytes]) -> dict[str, bytes]:
        """What stands once in an answer, of all parts; `last` is the last one's."""
        own: Timings = msgspec.json.decode(last.get("timings", b"{}"))
        timings = [*(part.timings for part in self.parts), own]
        return last | {"usage": _usage(msgspec.json.decode(last["usage"]), timings), "timings": _timings(timings)}


@attrs.define(eq=False)
class PartAssembly(Assembly):
    """A whole answer from the stream of its last part, and what came before."""

    continuing: Continuing = attrs.field(kw_only=True)
    _goes_on: bool = False
    """Whether it is known to go on with what came before."""

    def feed(self, piece: bytes) -> None:
        """Take what came. Raises NotWhole, NotContinued."""
        super().feed(piece)
        if not self._goes_on:
            self._goes_on = self.continuing.check(self._said)

    @property
    def _said(self) -> bytes:
        """The text so far, JSON inside of its quotation marks."""
        choice = self._choices.get(0)
        return b"" if choice is None else choice.text("content" if self.continuing.is_chat else "text")[1:-1]

    def keep(self) -> None:
        """Its stream was interrupted."""
        choice = self._choices.get(0)
        if choice is None or choice.finish or self._timings is None or not self._goes_on:
            return
        timings = msgspec.json.decode(self._timings)
        if self._said and "reasoning_content" not in choice.texts and timings.keys() >= NEEDED:
            self.continuing.keep(Part(text=self._said, timings=timings))

    def whole(self) -> tuple[int, bytes]:
        """The status and the body of the answer. Raises NotWhole, NotContinued."""
        parts, choice = self.continuing.parts, self._choices.get(0)
        if parts and (self._error is not None or choice is None or not self._goes_on):
            raise NotContinued("its stream is an error, or does not repeat what it had said")
        if parts and choice is not None and "usage" in self._last:
            if not self.continuing.is_chat:
                choice.texts.setdefault("text", []).insert(0, self.continuing.text)
            self._last = self.continuing.joined(self._last)
        return super().whole()


def _made(parts: list[Part]) -> int:
    """Tokens."""
    return sum(int(part.timings["predicted_n"]) for part in parts)


def _ends_with_a_question(messages: bytes) -> bool:
    """Whether there is a last message that is not the model's own: what it is to go on with would be lost in ours."""
    try:
        last = _MESSAGES.decode(messages)[-1]
        return msgspec.json.decode(last, type=_Message).role != "assistant"
    except (msgspec.DecodeError, IndexError):
        return False


def _lengths(fields: _Raw) -> dict[str, int]:
    """The bounds that a request sets, by their names."""
    found = {name: number_of(fields[name]) for name in ALL_LENGTHS if name in fields}
    return {name: number for name, number in found.items() if isinstance(number, int) and number >= 0}


def _usage(usage: dict[str, Any], timings: list[Timings]) -> bytes:
    first = timings[0]
    usage["completion_tokens"] = sum(each.get("predicted_n", 0) for each in timings)
    usage["prompt_tokens"] = first["cache_n"] + first["prompt_n"]
    usage["total_tokens"] = usage["completion_tokens"] + usage["prompt_tokens"]
    if "prompt_tokens_details" in usage:
        usage["prompt_tokens_details"]["cached_tokens"] = first["cache_n"]
    return _encode(usage)


def _timings(timings: list[Timings]) -> bytes:
    """Sums; what was cached is the first one's, since the others find what the first has computed."""
    found = dict(timings[-1])
    for what in ("prompt", "predicted"):
        count = sum(each.get(f"{what}_n", 0) for each in timings)
        took = round(sum(each.get(f"{what}_ms", 0.0) for each in timings), 3)
        found |= {
            f"{what}_n": count,
            f"{what}_ms": took,
            f"{what}_per_token_ms": took / count if count else None,
            f"{what}_per_second": 1000 * count / took if took else 0.0,
        }
    for name in ("draft_n", "draft_n_accepted"):
        if name in found:
            found[name] = sum(each.get(name, 0) for each in timings)
    return _encode(found | {"cache_n": timings[0]["cache_n"]})
