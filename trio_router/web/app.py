"""The Quart app: routes, and what is the same for all of them (ids, admission, errors as JSON).

It is one of two ways in. What a route decides it asks of the rooms behind; here values are taken out of a request
and put into a response.
"""

import re
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import cast
from urllib.parse import unquote

import quart.wrappers
import structlog
import trio
from hypercorn.typing import (
    ASGIReceiveCallable,
    ASGIReceiveEvent,
    ASGISendCallable,
    ASGISendEvent,
    HTTPRequestEvent,
    HTTPScope,
)
from quart import Quart, Request, Response, g, request
from quart.routing import QuartMap
from quart.wrappers.base import BaseRequestWebsocket
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from werkzeug.exceptions import HTTPException
from werkzeug.exceptions import MethodNotAllowed as WerkzeugMethodNotAllowed
from werkzeug.routing import MapAdapter

from trio_router.backend.answer import Headers
from trio_router.errors import (
    BodyTooLarge,
    HeadRefused,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    RouterError,
    UnknownPath,
    shown,
)
from trio_router.fleet.registry import Registry
from trio_router.memory.devices import DeviceMonitor
from trio_router.telemetry.events import Events
from trio_router.telemetry.metrics import Metrics
from trio_router.telemetry.summary import Summary
from trio_router.web import llama_router, logs, models, monitoring, openapi, plans, reload, requests, responses, ui
from trio_router.web.admission import INFERENCE_PATHS, Admission, changes_state, request_id
from trio_router.web.body import INVITE, read_body
from trio_router.web.cors import cors_headers, preflight_headers
from trio_router.web.head import BOTH_LENGTHS
from trio_router.web.inference import CLIENT_CLOSED_REQUEST, Asked, Exchange, refusal
from trio_router.web.late import LateAnswer
from trio_router.web.relay import Answer
from trio_router.web.reload import Reloader
from trio_router.web.sse import StreamBody, stream_response
from trio_router.web.streams import Streams
from trio_router.web.streams import add_routes as add_streams
from trio_router.web.waiting_streams import WaitingStreams

log = structlog.get_logger("trio_router.web")

UNREAD_BYTES = 1024 * 1024
"""More than comes before a handler looks at it, if it does."""
ABSOLUTE = re.compile(rb"[a-zA-Z][a-zA-Z0-9+.-]*://([^/]*)")
SLASH_COUNTS = (b"/ui/", b"/upstream/")
"""Below these, a path with a slash at its end is another one than that without."""

# Quart 0.23's word for it; 0.22 has none, and never says it
ClientGone: type[Exception] = getattr(quart.wrappers, "ClientDisconnectedError", trio.BrokenResourceError)


class Connection(TrioASGIHTTPConnection):
    """Gives each request a stack for what it borrows, unwound when its last byte is out.

    Not in the handler: a client may leave after the handler returned and before the body's iterator was entered,
    and then nothing of the iterator ever runs.

    Hypercorn tells of a disconnect also when an answer is complete, and the task it tells is the one in which it
    then restarts the connection's idle timeout: cancelled there, the connection would be kept for ever.

    Of a body that nobody reads, as of a stream of states, no more is kept than `UNREAD_BYTES`.
    """

    def __init__(self, app: Quart, scope: HTTPScope) -> None:
        raw = scope["raw_path"]
        path = origin_form(raw)
        scope = {**scope, "raw_path": path, "path": unquote(path.decode("ascii"))}
        if (
            named := ABSOLUTE.match(raw)
        ) is not None:  # a host in the target counts, and `Host` does not (RFC 9112, 3.2.2)
            others = [(name, value) for name, value in scope["headers"] if name != b"host"]
            scope["headers"] = [*others, (b"host", named[1])]
        extensions = scope["extensions"]
        self._invited: Callable[[], Awaitable[None]] | None = extensions.get(INVITE)  # type: ignore[assignment]
        super().__init__(app, {**scope, "extensions": {**extensions, INVITE: self._invite}})  # type: ignore[dict-item]
        self._ending = self._reads = False
        self._unread = 0

    async def _invite(self) -> None:
        """Somebody reads the body from now on. Raises BodyTooLarge if some of it was not kept."""
        self._reads = True
        if self._unread > UNREAD_BYTES:
            raise BodyTooLarge(f"more than {UNREAD_BYTES} bytes came before they were asked for")
        if self._invited is not None:
            await self._invited()

    def _kept(self, message: HTTPRequestEvent) -> HTTPRequestEvent:
        """What is kept of a piece of the body."""
        if not self._reads:
            self._unread += len(message["body"])
            if self._unread > UNREAD_BYTES:
                return {**message, "body": b""}
        return message

    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        async def noting(message: ASGISendEvent) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                self._ending = True
            await send(message)

        async def unless_ending() -> ASGIReceiveEvent:
            message = await receive()
            if message["type"] == "http.request":
                return self._kept(message)
            if message["type"] == "http.disconnect" and self._ending:
                await trio.sleep_forever()  # until `handle_request` is through
            return message

        await super().__call__(unless_ending, noting)

    async def handle_request(  # type: ignore[override]  # as quart_trio's own differs from quart's
        self, nursery: trio.Nursery, request: Request, send: ASGISendCallable
    ) -> None:
        async with AsyncExitStack() as stack:
            request.borrowed = stack  # type: ignore[attr-defined]
            try:
                await super().handle_request(nursery, request, send)
            except RouterError as error:
                # in the middle of an answer: returning without its end makes Hypercorn close the connection
                log.warning("answer cut", path=request.path, error=error.message)
                nursery.cancel_scope.cancel()
            except ClientGone:
                nursery.cancel_scope.cancel()


class Paths(QuartMap):
    """Routes by paths alone. Quart would look at `Host` first, and breaks where that is no name: see `Admission`."""

    def bind_to_request(
        self, request: BaseRequestWebsocket, subdomain: str | None, server_name: str | None
    ) -> MapAdapter:
        """What finds the route of `request`."""
        return self.bind(
            server_name or "router", request.root_path, subdomain or "", request.scheme, request.method, request.path,
            request.query_string.decode("latin-1"),
        )  # fmt: skip


class App(QuartTrio):
    """Quart's, with connections and routes of our own."""

    asgi_http_class = Connection
    url_map_class = Paths


def create_app(
    registry: Registry,
    devices: DeviceMonitor,
    events: Events,
    *,
    admission: Admission,
    waiting_streams: WaitingStreams,
    reloader: Reloader,
    streams: Streams,
    metrics: Metrics,
    summary: Summary,
    under_way: set[Exchange],
) -> QuartTrio:
    """The app of one router."""
    app = App("trio_router", static_folder=None)
    # no clock of Quart's (it would cut streams without a word), no limit of its own (it does not bound chunked bodies)
    app.config.update(RESPONSE_TIMEOUT=None, BODY_TIMEOUT=None, MAX_CONTENT_LENGTH=None)
    app.config.update(PROVIDE_AUTOMATIC_OPTIONS=False)
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    _add_admission(app, admission, registry, events)
    _add_errors(app, events)
    infer = _add_inference(app, registry, events, waiting_streams, under_way)
    requests.add_routes(app, under_way)
    llama_router.add_routes(app, registry, events, infer, reloader)
    models.add_routes(app, registry)
    monitoring.add_routes(app, registry, devices, metrics, summary)
    add_streams(app, streams)
    logs.add_routes(app, registry)
    reload.add_routes(app, reloader)
    plans.add_routes(app, registry, events)
    ui.add_routes(app)
    openapi.add_routes(app, registry, admission)
    return app


def _add_admission(app: QuartTrio, admission: Admission, registry: Registry, events: Events) -> None:
    """What every request goes through before its route, and every response after it."""

    @app.before_request
    async def admit() -> Response | None:
        events.settle()  # whoever asks for numbers is told all that happened
        g.arrived_at = trio.current_time()
        headers = request.headers
        g.request_id = request_id(headers.get("X-Request-ID"))
        host, origin = headers.get("Host"), headers.get("Origin")
        if not host and request.http_version == "1.0":  # Quart makes one up
            host = None
        if "Content-Length" in headers and "Transfer-Encoding" in headers:
            raise HeadRefused(BOTH_LENGTHS)
        admission.check_host(host)
        admission.check_origin(request.method, host, origin)
        if request.method == "OPTIONS":
            answer = Response(b"", 204)
            del answer.headers["content-type"], answer.headers["content-length"]  # RFC 9110 section 8.6: 204 has none
            return _with(answer, preflight_headers(admission, origin))
        g.holder = admission.check_key(request.path, headers.get("Authorization"), headers.get("X-Api-Key"))
        g.check_page = partial(admission.check_page, host, headers.get)
        changes = changes_state(request.method, request.path)
        if llama_router.asks_to_reload():
            g.check_page()
            changes = True
        if g.holder is not None and changes:
            g.holder.check_admin()
            log.info("command", key=g.holder.name, method=request.method, path=request.path, id=g.request_id)
        return None

    @app.after_request
    async def finish(response: Response) -> Response:
        response.headers["X-Request-ID"] = response.headers["Request-ID"] = named()
        _with(response, cors_headers(admission, request.headers.get("Origin")))
        if registry.draining:
            response.headers["Connection"] = "close"
        return response


def _with(response: Response, headers: Headers) -> Response:
    """`response` with `headers` besides its own."""
    for name, value in headers:
        response.headers.add(name.decode("latin-1"), value.decode("latin-1"))
    return response


def named() -> str:
    """The id of the request at hand."""
    if "request_id" not in g:
        g.request_id = request_id(None)
    return str(g.request_id)


def _add_errors(app: QuartTrio, events: Events) -> None:
    """Every error as a JSON object."""

    def error_response(error: RouterError) -> Response:
        return responses.error_response(error, request.path, named())

    @app.errorhandler(RouterError)
    async def router_error(error: RouterError) -> Response:
        response = error_response(error)
        if isinstance(error, HeadRefused):
            response.headers["Connection"] = "close"
        if request.method == "POST" and request.path in INFERENCE_PATHS and "exchange" not in g:
            events.ended(partial(refusal, request.path, error, g.request_id, g.arrived_at))
        return response

    @app.errorhandler(HTTPException)
    async def http_error(error: HTTPException) -> Response:
        path = shown(request.path)
        if isinstance(error, WerkzeugMethodNotAllowed):
            allowed = tuple(sorted(set(error.valid_methods or ()) - {"HEAD", "OPTIONS"}))
            return error_response(MethodNotAllowed(f"{shown(request.method)} is not for {path}", allowed=allowed))
        if error.code == 404:
            return error_response(UnknownPath(f"nothing is at {path}"))
        response = error_response(InvalidRequest(error.description or error.name))
        response.status_code = error.code or 400
        return response

    @app.errorhandler(ClientGone)
    async def client_gone(_: Exception) -> Response:
        return Response(b"", CLIENT_CLOSED_REQUEST)

    @app.errorhandler(Exception)
    async def bug(error: Exception) -> Response:
        log.error("internal error", id=g.get("request_id"), path=request.path, exc_info=error)
        return error_response(InternalError("an internal error; the router's log says more"))


def _add_inference(
    app: QuartTrio, registry: Registry, events: Events, waiting_streams: WaitingStreams, under_way: set[Exchange]
) -> llama_router.Infer:
    """The paths that are answered by a llama-server; returns what answers the request at hand."""

    async def infer(alias: str | None, path: str) -> Response:
        headers = cast("Headers", list(request.scope["headers"]))
        exchange = Exchange(
            registry=registry,
            events=events,
            asked=Asked.of(path, path + _query(request), headers, g.holder),
            body=await read_body(request, registry.config.api.max_body_bytes),
            client=(request.scope.get("client") or [""])[0],
            request_id=g.request_id,
            arrived_at=g.arrived_at,
            under_way=under_way,
            alias=alias,
        )
        borrowed: AsyncExitStack = request.borrowed  # type: ignore[attr-defined]
        g.exchange = True  # from here on it is the exchange that tells what became of the request
        answer: Answer | None
        if exchange.asked.streamed and b'"stream"' in exchange.body:
            late = LateAnswer(exchange)
            answer = await late.begin(borrowed, waiting_streams)
            if answer is None:
                response = stream_response(late)
                response.headers["X-Queue-Position"] = str(late.position)
                return response
        else:
            answer = await borrowed.enter_async_context(exchange)
        response = Response(StreamBody(answer), answer.status)
        del response.headers["content-type"]
        response.timeout = None
        return _with(response, answer.headers())

    async def inference() -> Response:
        return await infer(None, str(request.url_rule))  # as llama-server has it, without a slash at its end

    for path in sorted(INFERENCE_PATHS):
        app.add_url_rule(path, f"inference {path}", inference, methods=["POST"])
    return infer


def origin_form(path: bytes) -> bytes:
    """The path alone, of a target that may name scheme and host before it (RFC 9112 section 3.2.2), or be none.

    Without a slash at its end, where that makes no difference: no alias ends in one.
    """
    match = ABSOLUTE.match(path)
    if match is not None:
        path = path[match.end() :]
    if not path.startswith(SLASH_COUNTS):
        path = path.rstrip(b"/")
    return path if path.startswith(b"/") else b"/" + path


def _query(incoming: Request) -> str:
    """The query as the client wrote it, with its question mark, or nothing."""
    query: bytes = incoming.scope["query_string"]
    return "?" + query.decode("ascii", "backslashreplace") if query else ""
