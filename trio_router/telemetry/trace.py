"""What really happened, without what was said: requests and loads, to be played again in virtual time.

One JSON object a line. A request: `kind` "request", `at` (Unix time of its arrival), `model`, `priority`, `client` (a
number that means something in this trace only), `input_tokens`, `output_tokens`, `waited_sec` (for a slot),
`service_sec` (it held one; null if it got none), `status`. A load or the end of a llama-server:
`kind` "load" or "unload", `at`, `model`, `seconds`.
"""

import hashlib
import json
import os
import struct
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

from trio_router.telemetry.events import Event, LoadFinished, LoadResult, RequestFinished, Unloaded

MAX_REQUESTS: Final = 50_000
MAX_LOADS: Final = 5_000
_REQUEST: Final = struct.Struct(">dffHBIIIH")
"""Packed, one takes a sixth of what an object would: there may be many."""
_NONE: Final = 0xFFFF_FFFF
_PRIORITIES: Final = ("high", "normal", "low")


@attrs.frozen(kw_only=True)
class TracedRequest:
    """A request that arrived."""

    at: float
    model: str
    priority: str
    client: str
    service_seconds: float | None
    waited_seconds: float | None
    input_tokens: int | None = None
    output_tokens: int | None = None
    status: int = 200

    def as_json(self) -> dict[str, Any]:
        """A line's object."""
        return {
            "kind": "request",
            "at": round(self.at, 6),
            "model": self.model,
            "priority": self.priority,
            "client": self.client,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "waited_sec": _rounded(self.waited_seconds),
            "service_sec": _rounded(self.service_seconds),
            "status": self.status,
        }


@attrs.frozen(kw_only=True)
class TracedLoad:
    """A model that became ready at `at`, or was gone, so many seconds after its llama-server's start, or its stop."""

    at: float
    model: str
    seconds: float
    kind: str = "load"

    def as_json(self) -> dict[str, Any]:
        """A line's object."""
        return {"kind": self.kind, "at": round(self.at, 6), "model": self.model, "seconds": _rounded(self.seconds)}


def _packed(tokens: int | None) -> int:
    return _NONE if tokens is None else min(tokens, _NONE - 1)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


@attrs.define(eq=False)
class Trace:
    """The last of both. A sink of events and of requests."""

    _requests: deque[bytes] = attrs.field(factory=lambda: deque(maxlen=MAX_REQUESTS))
    _loads: deque[TracedLoad] = attrs.field(factory=lambda: deque(maxlen=MAX_LOADS))
    _models: dict[str, int] = attrs.field(factory=dict)
    _salt: bytes = attrs.field(factory=lambda: os.urandom(16))

    def __call__(self, event: Event) -> None:
        """Note a load, or its end."""
        match event:
            case LoadFinished(alias=alias, result=LoadResult.OK, seconds=seconds):
                self._loads.append(TracedLoad(at=time.time(), model=alias, seconds=seconds))
            case Unloaded(alias=alias, seconds=float(seconds)):
                self._loads.append(TracedLoad(at=time.time(), model=alias, seconds=seconds, kind="unload"))
            case _:
                pass

    def requests(self, ended: Sequence[RequestFinished]) -> None:
        """Note requests for models of ours."""
        for event in ended:
            if event.alias is None or event.priority is None:
                continue
            number = self._models.setdefault(event.alias, len(self._models))
            self._requests.append(
                _REQUEST.pack(
                    event.finished_at - event.duration_seconds,
                    -1.0 if event.held_seconds is None else event.held_seconds,
                    -1.0 if event.waited_seconds is None else event.waited_seconds,
                    number & 0xFFFF,
                    _PRIORITIES.index(event.priority),
                    self._client(event.client or ""),
                    _packed(event.input_tokens),
                    _packed(event.output_tokens),
                    event.status,
                )
            )

    def _client(self, client: str) -> int:
        digest = hashlib.blake2b(client.encode("utf-8", "surrogateescape"), digest_size=4, key=self._salt).digest()
        return int.from_bytes(digest, "big")

    def lines(self) -> Iterator[str]:
        """All that is kept, requests by their end, loads after them."""
        aliases = list(self._models)
        for packed in tuple(self._requests):
            at, held, waited, number, priority, client, read, written, status = _REQUEST.unpack(packed)
            request = TracedRequest(
                at=at,
                model=aliases[number],
                priority=_PRIORITIES[priority],
                client=f"{client:08x}",
                service_seconds=None if held < 0 else held,
                waited_seconds=None if waited < 0 else waited,
                input_tokens=None if read == _NONE else read,
                output_tokens=None if written == _NONE else written,
                status=status,
            )
            yield json.dumps(request.as_json()) + "\n"
        for load in tuple(self._loads):
            yield json.dumps(load.as_json()) + "\n"


class BadTrace(ValueError):
    """Raised when a line is none of a trace's."""


def read_line(line: str) -> TracedRequest | TracedLoad:
    """What a line says. Raises BadTrace."""
    try:
        told = json.loads(line)
        if not isinstance(told, Mapping):
            raise BadTrace("not an object")
        if (kind := told["kind"]) in {"load", "unload"}:
            seconds = float(told["seconds"])
            return TracedLoad(at=float(told["at"]), model=str(told["model"]), seconds=seconds, kind=kind)
        if kind != "request" or told["priority"] not in _PRIORITIES:
            raise BadTrace(f"kind {kind!r}, priority {told.get('priority')!r}")
        service, waited = told.get("service_sec"), told.get("waited_sec")
        return TracedRequest(
            at=float(told["at"]),
            model=str(told["model"]),
            priority=told["priority"],
            client=str(told.get("client", "")),
            service_seconds=None if service is None else float(service),
            waited_seconds=None if waited is None else float(waited),
            input_tokens=told.get("input_tokens"),
            output_tokens=told.get("output_tokens"),
            status=int(told.get("status", 200)),
        )
    except KeyError as error:
        raise BadTrace(f"{error.args[0]!r} is missing") from None
    except (TypeError, ValueError) as error:
        raise BadTrace(str(error)) from None
