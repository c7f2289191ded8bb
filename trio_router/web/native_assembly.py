"""Whole answers in llama-server's own words (`/completion`, `/infill`), put together from their streams."""

import attrs

from trio_router.web.assembly import KeptBack, NotWhole, OfChunks, inside, written

STREAMED = ((b'"stream":true', b'"stream":false'), (b'"reasoning_in_content":true', b'"reasoning_in_content":false'))
"""What the settings that an answer repeats say of a stream, and of a whole; inside a string the quotes would be escaped."""


@attrs.define(eq=False)
class NativeAssembly(OfChunks):
    """One answer, while its stream comes: the last event says it all but for what came in pieces."""

    _content: list[bytes] = attrs.field(factory=list)
    _spoken: bytes = b"0"
    """How many tokens there were when something was said last."""
    _last: dict[str, bytes] | None = None

    def _take(self, chunk: dict[str, bytes]) -> None:
        if "prompt_progress" in chunk:
            return
        if "completion_probabilities" in chunk:
            raise NotWhole("there are log probabilities, which streams have of other tokens", ever=False)
        said = inside(chunk["content"])
        if said:
            self._content.append(said)
            self._spoken = chunk.get("tokens_predicted", b"0")
        if chunk["stop"] == b"true":
            if self._last is not None:
                raise NotWhole("there are several answers in the stream")
            self._last = chunk

    def whole(self) -> tuple[int, bytes]:
        """The status and the body of the answer whose stream came. Raises NotWhole."""
        if self._error is not None:
            return self._error
        if self._last is None:
            raise NotWhole("the stream ended before the answer did")
        if self._last.get("stop_type") == b'"limit"' and self._spoken != self._last.get("tokens_predicted"):
            raise KeptBack
        fields = self._last | {"content": b'"%b"' % b"".join(self._content)}
        if "generation_settings" in fields:
            for streamed, whole in STREAMED:
                fields["generation_settings"] = fields["generation_settings"].replace(streamed, whole)
        return 200, written(fields.items())
