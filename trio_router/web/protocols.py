"""Hypercorn's HTTP/1 and HTTP/2, as they are spoken here: strict where others might read differently, bounded, with words.

HTTP/1 forgives no line that the data plane's parser does not (`web.head.StrictBuffer`). Empty lines before a request are
nothing (RFC 9112 section 2.2), nor is what comes behind the last request of a connection (section 9.6). An upgrade to
HTTP/2 (`h2c`, which RFC 9113 has given up) is not taken: who wants HTTP/2 begins with it.

HTTP/2 answers a request that cannot be passed on, and the other streams of its connection go on; and a client that opens
no window for a stream loses that stream as one that reads nothing loses its connection.
"""

import contextlib
import json
from typing import Any, Final, TypeVar, cast

import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import h2.stream
import h11
import trio
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.events import Body, EndBody, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, H2Protocol
from hypercorn.protocol.h11 import H2ProtocolAssumedError, H11Protocol
from priority.priority import MissingStreamError

from trio_router.backend.answer import Headers
from trio_router.errors import HeadRefused
from trio_router.web.admission import request_id
from trio_router.web.dataplane import WRITE_STALL_SECONDS
from trio_router.web.head import CONTROL, CONTROL_CHARACTERS, METHOD, NO_WEBSOCKETS, TARGET, StrictBuffer, check_version

ANSWERING: Final = frozenset({h11.IDLE, h11.SEND_RESPONSE, h11.SEND_BODY})

TOLD_SECONDS: Final = 1.0
"""Within this, whoever answers a stream has been told that it is over, and is cancelled: it is to send no more."""
H1_PIECE_BYTES: Final = 16 * 1024
H2_PIECE_BYTES: Final = 1024
"""So much is taken in before others get their turn: 64 KiB of small chunks, or frames, are up to seconds of work."""
MAX_HEADERS_BYTES: Final = 16 * 1024
"""Of one request's, unpacked (RFC 9113 section 6.5.2): a few bytes that refer to an entry stand for thousands."""


class Parser(h11.Connection):
    """h11's, with a buffer that forgives nothing; and between requests and behind the last one there may be things."""

    why: str = ""
    """What was wrong."""

    def __init__(self, most: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size=most)
        self._receive_buffer: StrictBuffer = StrictBuffer()  # h11 has no setting for it

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """As h11 has it. Raises h11.RemoteProtocolError."""
        buffer = self._receive_buffer
        if self.their_state is h11.IDLE and not buffer.begins():
            return h11.NEED_DATA
        if self.their_state is h11.MUST_CLOSE and buffer:
            if self.our_state in ANSWERING:
                return h11.PAUSED
            buffer.clear()
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                check_version(event)
                _check_upgrade(event)
        except h11.RemoteProtocolError as error:
            self.why = str(error)
            raise
        return event


def _check_upgrade(request: h11.Request) -> None:
    """Raise h11.RemoteProtocolError for a WebSocket: Hypercorn does not survive all of them (pgjones/hypercorn#225)."""
    if any(name == b"upgrade" and value.strip().lower() == b"websocket" for name, value in request.headers):
        raise h11.RemoteProtocolError(NO_WEBSOCKETS)


class Http1(H11Protocol):
    """One connection's."""

    connection: Parser

    async def initiate(self) -> None:
        """Begin."""
        self.connection = Parser(self.config.h11_max_incomplete_size)

    async def handle(self, event: Event) -> None:
        """Something was read, or all is over. Others get their turn in between."""
        if not isinstance(event, RawData) or len(event.data) <= H1_PIECE_BYTES:
            await super().handle(event)
            return
        for at in range(0, len(event.data), H1_PIECE_BYTES):
            try:
                await super().handle(RawData(data=event.data[at : at + H1_PIECE_BYTES]))
            except H2ProtocolAssumedError as assumed:
                raise H2ProtocolAssumedError(assumed.data + event.data[at + H1_PIECE_BYTES :]) from assumed
            if self.connection.their_state is h11.ERROR:
                break
            await trio.lowlevel.checkpoint()

    async def _check_protocol(self, event: h11.Request) -> None:
        if (event.method, event.target, event.http_version) == (b"PRI", b"*", b"2.0"):
            await super()._check_protocol(event)

    async def _send_error_response(self, status_code: int) -> None:
        headers, body = refused(self.connection.why, status_code)
        headers += [(b"connection", b"close"), *self.config.response_headers("h11")]
        await self._send_h11_event(h11.Response(status_code=status_code, headers=headers))
        await self._send_h11_event(h11.Data(data=body))
        await self._send_h11_event(h11.EndOfMessage())


class Http2(H2Protocol):
    """One connection's."""

    _patience: dict[int, trio.CancelScope]
    """By stream; of those that something waits to be sent on."""
    _leaving: bool = False
    """Whether the client has said that it is."""

    async def initiate(self, headers: list[tuple[bytes, bytes]] | None = None, settings: bytes | None = None) -> None:
        """Begin."""
        self._patience = {}
        self._settle({h2.settings.SettingCodes.ENABLE_CONNECT_PROTOCOL: 0})  # no WebSockets
        await super().initiate(headers, settings)
        self.connection.decoder.max_header_list_size = MAX_HEADERS_BYTES
        # a stream too many is refused by us: h2 would end them all
        self._settle(
            {h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: h2.connection.H2Connection.HIGHEST_ALLOWED_STREAM_ID}
        )

    def _settle(self, settings: dict[h2.settings.SettingCodes, int]) -> None:
        """Have these counted among our settings."""
        settled = cast("Any", {**self.connection.local_settings, **settings})
        self.connection.local_settings = h2.settings.Settings(client=False, initial_values=settled)

    async def handle(self, event: Event) -> None:
        """Something was read, or all is over. Others get their turn in between."""
        data = event.data if isinstance(event, RawData) else b""
        if len(data) <= H2_PIECE_BYTES:
            await super().handle(event)
        else:
            for at in range(0, len(data), H2_PIECE_BYTES):
                if self.closed:
                    break
                await super().handle(RawData(data=data[at : at + H2_PIECE_BYTES]))
                await trio.lowlevel.checkpoint()
        if isinstance(event, Closed):
            for buffer in list(self.stream_buffers.values()):
                await buffer.close()  # what it holds is for nobody

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            match event:
                case h2.events.PriorityUpdated():  # RFC 9113 has given it up, and a tree of them costs much
                    pass
                case h2.events.RequestReceived() if len(self.streams) >= self.config.h2_max_concurrent_streams:
                    with contextlib.suppress(h2.exceptions.ProtocolError):
                        self.connection.reset_stream(event.stream_id, h2.errors.ErrorCodes.REFUSED_STREAM)
                case h2.events.RequestReceived() if (why := _unfit(event)) is not None:
                    await self._refuse(event, why)
                case h2.events.DataReceived() if event.stream_id not in self.streams:
                    # it was answered by its head; to Hypercorn that is a bug of its own, and the connection's end
                    with contextlib.suppress(h2.exceptions.ProtocolError):
                        self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                case h2.events.ConnectionTerminated(error_code=h2.errors.ErrorCodes.NO_ERROR) if self.streams:
                    # it begins no more streams, and waits for those there are; h2 takes it for the end of everything
                    self.connection.state_machine.state = h2.connection.ConnectionState.SERVER_OPEN
                    self._leaving = True
                case h2.events.StreamReset():
                    await super()._handle_events([event])
                    await self._forget(event.stream_id)
                case _:
                    await super()._handle_events([event])
        await self._flush()

    async def _forget(self, stream_id: int) -> None:
        """Drop what waits to be sent on a stream that is over. Hypercorn has it wait for a window that never comes."""
        if (buffer := self.stream_buffers.pop(stream_id, None)) is not None:
            await buffer.close()
            with contextlib.suppress(MissingStreamError):
                self.priority.remove_stream(stream_id)
        await self._leave()

    async def _refuse(self, event: h2.events.RequestReceived, why: str) -> None:
        headers, body = refused(why, 400)
        stream = event.stream_id
        with contextlib.suppress(h2.exceptions.ProtocolError):  # it is over, or wants no words
            self.connection.send_headers(stream, [(b":status", b"400"), *headers])
            self.connection.send_data(stream, body, end_stream=True)
        with contextlib.suppress(h2.exceptions.ProtocolError):  # all of it is there
            self.connection.reset_stream(stream, h2.errors.ErrorCodes.NO_ERROR)

    async def stream_send(self, event: StreamEvent) -> None:
        """Send on a stream; wait while its client takes something now and then."""
        if not isinstance(event, Body | EndBody):
            await super().stream_send(event)
            if isinstance(event, StreamClosed):
                await self._end(event.stream_id)
            await self._leave()
            return
        with trio.CancelScope(deadline=trio.current_time() + WRITE_STALL_SECONDS) as patience:
            self._patience[event.stream_id] = patience
            try:
                await self._room(event.stream_id)
                await super().stream_send(event)
            finally:
                del self._patience[event.stream_id]
        if patience.cancelled_caught:
            await self._give_up(event.stream_id)
            if isinstance(event, Body):
                await trio.sleep(TOLD_SECONDS)

    async def _end(self, stream_id: int) -> None:
        """A request was answered. If its client has not ended it, it is to send no more (RFC 9113 section 8.1)."""
        stream = self.connection.streams.get(stream_id)
        if stream is not None and stream.state_machine.state is h2.stream.StreamState.HALF_CLOSED_LOCAL:
            with contextlib.suppress(h2.exceptions.ProtocolError):
                self.connection.reset_stream(stream_id, h2.errors.ErrorCodes.NO_ERROR)
                await self._flush()

    async def _room(self, stream_id: int) -> None:
        """Wait until little enough of a stream is buffered. Hypercorn's push does not, if anything at all has been sent."""
        buffer = self.stream_buffers.get(stream_id)
        while buffer is not None and len(buffer.buffer) >= BUFFER_HIGH_WATER:
            await buffer._paused.clear()  # noqa: SLF001  (no other says when something was taken out)
            await buffer._paused.wait()  # noqa: SLF001

    async def _send_data(self, stream_id: int) -> None:
        if (patience := self._patience.get(stream_id)) is not None:
            with contextlib.suppress(h2.exceptions.ProtocolError):
                if self.connection.local_flow_control_window(stream_id) > 0:
                    patience.deadline = trio.current_time() + WRITE_STALL_SECONDS
        with contextlib.suppress(KeyError, MissingStreamError):  # forgotten meanwhile
            await super()._send_data(stream_id)
        if stream_id not in self.stream_buffers:
            await self._end(stream_id)
        await self._leave()

    async def _leave(self) -> None:
        """End the connection, if all is done on it."""
        if self._leaving and not self.streams and not self.stream_buffers:
            await self.send(Closed())

    async def _give_up(self, stream_id: int) -> None:
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self.connection.reset_stream(stream_id, h2.errors.ErrorCodes.CANCEL)
        await self._flush()
        await self._close_stream(stream_id)  # tells whoever answers it
        await self._forget(stream_id)


_Spoken = TypeVar("_Spoken", Http1, Http2)


class Protocols(ProtocolWrapper):
    """The one that a connection speaks: HTTP/1 until it begins with the words that say HTTP/2."""

    protocol: Http1 | Http2

    @classmethod
    def of(cls, wrapper: ProtocolWrapper) -> "Protocols":
        """In the place of Hypercorn's own."""
        return cls(
            wrapper.app, wrapper.config, wrapper.context, wrapper.task_group, wrapper.state, wrapper.ssl,
            wrapper.client, wrapper.server, wrapper.send,
        )  # fmt: skip

    async def initiate(self) -> None:
        """Begin."""
        self.protocol = self._speak(Http1)
        await self.protocol.initiate()

    async def handle(self, event: Event) -> None:
        """Something was read, or all is over."""
        try:
            await self.protocol.handle(event)
        except H2ProtocolAssumedError as assumed:
            self.protocol = self._speak(Http2)
            await self.protocol.initiate()
            await self.protocol.handle(RawData(data=assumed.data))

    def _speak(self, protocol: type[_Spoken]) -> _Spoken:
        return protocol(
            self.app, self.config, self.context, self.task_group, self.state, self.ssl,
            self.client, self.server, self.send,
        )  # fmt: skip


def _unfit(event: h2.events.RequestReceived) -> str | None:
    """Why a request cannot be passed on."""
    fields = dict(event.headers)
    if fields[b":method"].upper() == b"CONNECT":
        return NO_WEBSOCKETS if b":protocol" in fields else "CONNECT is not spoken here"
    if METHOD.fullmatch(fields[b":method"]) is None or TARGET.fullmatch(fields[b":path"]) is None:
        return "the method or the path has characters that do not belong there"
    if any(CONTROL.search(value) for _, value in event.headers):
        return CONTROL_CHARACTERS
    return None


def refused(message: str, status: int) -> tuple[Headers, bytes]:
    """Headers and body of a refusal."""
    body = json.dumps(HeadRefused(message, status=status).body()).encode()
    identity = request_id(None).encode("ascii")
    headers = [
        (b"content-type", b"application/json"),
        (b"x-request-id", identity),
        (b"request-id", identity),
        (b"content-length", b"%d" % len(body)),
    ]
    return headers, body
