"""Whole answers in llama-server's own words (`/completion`, `/infill`), put together from their streams."""

import attrs

from trio_router.web.assembly import NotWhole, OfChunks, inside, written

STREAMED = b'"stream":true'
"""In the settings that an answer repeats; inside a string its quotes would be escaped."""


@attrs.define(eq=False)
class NativeAssembly(OfChunks):
    """One answer, while its stream comes: the last event says it all but for what came in pieces."""

    _content: list[bytes] = attrs.field(factory=list)
    _probabilities: list[bytes] = attrs.field(factory=list)
    _last: dict[str, bytes] | None = None

    def _take(self, chunk: dict[str, bytes]) -> None:
        if "prompt_progress" in chunk:
            return
        self._content.append(inside(chunk["content"]))
        if "completion_probabilities" in chunk:
            self._probabilities.append(chunk.pop("completion_probabilities")[1:-1])
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
        fields = self._last | {"content": b'"%b"' % b"".join(self._content)}
        if "generation_settings" in fields:
            fields["generation_settings"] = fields["generation_settings"].replace(STREAMED, b'"stream":false')
        if self._probabilities:
            fields["completion_probabilities"] = b"[%b]" % b",".join(self._probabilities)
        return 200, written(fields.items())
