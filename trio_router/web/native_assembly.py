"""Whole answers in llama-server's own words (`/completion`, `/infill`), put together from their streams."""

import attrs
import msgspec

from trio_router.web.assembly import Events, NotWhole, data_of, error_in, inside, raw, written

STREAMED = b'"stream":true'
"""In the settings that an answer repeats; inside a string its quotes would be escaped."""


@attrs.define(eq=False)
class NativeAssembly:
    """One answer, while its stream comes: the last event says it all but for what came in pieces."""

    _events: Events = attrs.field(factory=Events)
    _content: list[bytes] = attrs.field(factory=list)
    _probabilities: list[bytes] = attrs.field(factory=list)
    _last: dict[str, bytes] | None = None
    _error: tuple[int, bytes] | None = None

    def feed(self, piece: bytes) -> None:
        """Take what came. Raises NotWhole."""
        try:
            for event in self._events.split(piece):
                self._take(data_of(event))
        except (msgspec.DecodeError, KeyError) as error:
            raise NotWhole(f"the stream is not as expected ({error})") from error

    def _take(self, data: bytes) -> None:
        if not data:
            return
        found = raw(data)
        if "error" in found:
            self._error = error_in(data, found["error"])
            return
        if "prompt_progress" in found:
            return
        self._content.append(inside(found["content"]))
        if "completion_probabilities" in found:
            self._probabilities.append(found.pop("completion_probabilities")[1:-1])
        if found["stop"] == b"true":
            if self._last is not None:
                raise NotWhole("there are several answers in the stream")
            self._last = found

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
