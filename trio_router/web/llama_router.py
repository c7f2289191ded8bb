"""The paths of llama-server's own router mode, so that programs written for it show and steer our models.

Source: "Using multiple models" in llama.cpp's tools/server/README.md, and a llama-server b10434 in that mode, which a
test holds these answers against. Ours differ in errors' codes, which are words, and in 404 for unknown models. What belongs to one model (`/props`, `/slots`,
`/lora-adapters`, each with `?model=`) is answered by its llama-server, which is loaded for it unless `?autoload=false`.
What is said to one (`POST` there, and `/slots/0?action=save`) may name it in its body, too.
`/upstream/{alias}/...` is that llama-server itself, its own chat page included; what is asked of it there to compute
waits for a slot like everything else.
"""

import re
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, Final
from urllib.parse import quote

import attrs
from quart import Response, g, request
from quart_trio import QuartTrio
from werkzeug.utils import redirect
from werkzeug.wrappers import Response as WerkzeugResponse

from trio_router import __version__
from trio_router.backend.client import BackendClient, NoAnswer
from trio_router.backend.lifecycle import State
from trio_router.errors import (
    BackendUnavailable,
    MissingModel,
    ModelIsNotRunning,
    ModelIsRunning,
    ModelNotLoaded,
    UnknownPath,
    shown,
)
from trio_router.fleet.model import Model
from trio_router.fleet.registry import Registry
from trio_router.fleet.status import LISTED, listed
from trio_router.telemetry.events import Event, Events, ModelChanged, Reloaded
from trio_router.web.admission import CONTROL_PATH, INFERENCE_PATHS, SAFE_METHODS, UPSTREAM
from trio_router.web.body import COMMAND_BYTES, parsed, read_body
from trio_router.web.inference import check_target
from trio_router.web.models import named_model
from trio_router.web.query import truth
from trio_router.web.reload import Reloader
from trio_router.web.responses import json_response
from trio_router.web.sse import Hub, stream_response

OF_ONE_MODEL: Final = ("/slots", "/lora-adapters")
TO_ONE_MODEL: Final = ("/props", "/slots/<int:id>", "/lora-adapters")
DONE: Final = re.compile(rb'"success"\s*:\s*true')
PASSED_HEADERS: Final = ("content-type", "content-encoding", "cache-control", "etag", "location")
DOTS: Final = frozenset({".", ".."})
Infer = Callable[[str, str], Any]
"""Answers the request at hand by a model (its alias), at a path."""


@attrs.define(eq=False)
class ModelEvents:
    """What `/models/sse` tells. A sink."""

    hub: Hub
    _registry: Registry
    _told: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    """What was said of each model last: some of our states are one to llama-server."""

    @classmethod
    def of(cls, registry: Registry, events: Events) -> "ModelEvents":
        """Told of what happens from now on."""
        told = cls(Hub(opening=lambda: ("message", {"model": "*", "event": "models_reload"})), registry)
        events.sinks.append(told.hear)
        return told

    def hear(self, event: Event) -> None:
        """A sink: publish what concerns who watches."""
        match event:
            case ModelChanged(alias=alias) if alias in self._registry.models:
                data = told_status(self._registry, self._registry.models[alias])
                if data != self._told.get(alias):
                    self._told[alias] = data
                    self.hub.publish("message", {"model": alias, "event": "model_status", "data": data})
            case Reloaded():
                self.hub.publish("message", {"model": "*", "event": "models_reload"})
            case _:
                pass
        if self._registry.draining:
            self.hub.close()


def entry(registry: Registry, said: str) -> dict[str, Any]:
    """A model in GET /models: that of GET /v1/models, in llama-server's words where those differ."""
    model, told = registry.model(said), listed(registry, said)
    status = {**told["status"], "value": value(model)}
    if model.state is State.FAILED:
        status |= {"failed": True, "exit_code": exit_code(model)}
    more = {"owned_by": "llamacpp", "tags": [], "source": "preset", "can_remove": False, "status": status}
    if model.state is State.READY:
        more["meta"] = model.supervisor.meta
    return {**told, **more}


def told_status(registry: Registry, model: Model) -> dict[str, Any]:
    """What `/models/sse` says of a model that changed."""
    told: dict[str, Any] = {"status": value(model)}
    match told["status"]:
        case "loaded":
            told["info"] = entry(registry, model.alias)
        case "loading":
            done = (model.load_progress or 0) / 100
            told["progress"] = {"stages": ["text_model"], "current": "text_model", "value": done}
        case _:
            told["exit_code"] = exit_code(model) if model.state is State.FAILED else 0
    return told


def value(model: Model) -> str:
    """`status.value`: llama-server knows no "failed", and says beside "unloaded" that it did."""
    return "unloaded" if model.state is State.FAILED else LISTED[model.state]


def exit_code(model: Model) -> int:
    """Of a model that failed; never 0, by which programs see that it did."""
    return model.supervisor.exit_code or 1


def router_props(registry: Registry) -> dict[str, Any]:
    """GET /props without a model: llama-server's router says as much."""
    return {
        "role": "router",
        "max_instances": registry.config.system.max_concurrent_models,
        "models_autoload": True,
        "model_alias": "trio-router",
        "model_path": "none",
        "default_generation_settings": {"params": None, "n_ctx": 0},
        "ui_settings": {},
        "cors_proxy_enabled": False,
        "total_slots": sum(model.config.slots for model in registry.models.values()),
        "build_info": f"trio-router {__version__}",
    }


def asks_to_reload() -> bool:
    """Whether the request at hand is GET /models?reload: their router looks through its folders then, whatever the value."""
    return request.path.rstrip("/") == "/models" and "reload" in request.args


async def props(registry: Registry) -> dict[str, Any]:
    """The same with what the default model says of itself, if it is loaded: programs for one llama-server look for that."""
    default, own = registry.config.system.default_model, router_props(registry)
    backend = None if default is None else registry.model(default).supervisor.backend
    if backend is None:
        return own
    client: BackendClient = backend.client
    try:
        return {**own, **await client.props(), "role": own["role"], "cors_proxy_enabled": False}
    except NoAnswer:  # it is on its way out, or does not answer: its supervisor sees to that
        return own


async def loaded(registry: Registry, alias: str) -> BackendClient:
    """Who to ask about the model; it is loaded first, unless the request says not to.

    Raises ModelNotAllowed, OriginNotAllowed: to be told of a model has it loaded, and others leave for it.
    Raises ModelNotLoaded, and TargetTooLong if it would not take the request.
    """
    model = registry.model(alias)
    check_target(f"{request.scope['raw_path'].decode('latin-1')}?{request.query_string.decode('latin-1')}")
    if g.holder is not None:
        g.holder.check_model(model.alias, alias)
    if model.supervisor.backend is None and not truth(request.args.get("autoload"), default=True):
        raise ModelNotLoaded(f"model {model.alias!r} is not loaded, and autoload=false", param="model")
    if model.scheduler.backend is None:
        g.check_page()
    model = await registry.load(alias)
    backend = model.supervisor.backend
    if backend is None:
        raise BackendUnavailable(f"model {model.alias!r} was unloaded meanwhile", param="model")
    client: BackendClient = backend.client
    return client


async def passed_on(client: BackendClient, path: str, body: bytes = b"", *, seconds: float | None = None) -> Response:
    """The answer of a llama-server to the request at hand, asked at `path`; a reading takes no time, `seconds` are for more."""
    query = request.query_string.decode("latin-1")
    target = f"{path}?{query}" if query else path
    headers = {
        name: request.headers[name] for name in ("Accept", "Accept-Encoding", "Content-Type") if name in request.headers
    }
    try:
        answer = await client.passed_on(request.method, target, headers, body, seconds)
    except NoAnswer as error:
        raise BackendUnavailable(f"its llama-server did not answer: {error}", param="model") from error
    response = Response(answer.content, answer.status_code)
    del response.headers["content-type"]
    for name in PASSED_HEADERS:
        if name in answer.headers:
            response.headers[name] = answer.headers[name]
    return response


def model_meant(registry: Registry, body: Any = None) -> str:
    """The model that the request at hand is about: its query says it, or its body, or it is the default one.

    Raises MissingModel.
    """
    said = request.args.get("model")
    if said is None and isinstance(body, dict):
        said = body.get("model")
    if said is None:
        said = registry.config.system.default_model
    if not isinstance(said, str):
        raise MissingModel(f"{request.path} is one model's: ?model=ALIAS", param="model")
    return registry.meant(said)


def split(registry: Registry, target: str) -> tuple[str, str]:
    """The name that a path below `/upstream/` begins with, and the rest; a name may hold slashes. Raises UnknownModel."""
    said = registry.names.longest_before(target)
    if said is None:
        said = registry.names[target.partition("/")[0]].said
    return said, target[len(said) :]


def add_routes(app: QuartTrio, registry: Registry, events: Events, infer: Infer, reloader: Reloader) -> None:
    """Add them to `app`."""
    _add_all_models(app, registry, events, reloader)
    _add_one_model(app, registry)
    _add_control(app, registry)
    _add_upstream(app, registry, infer)


def _add_all_models(app: QuartTrio, registry: Registry, events: Events, reloader: Reloader) -> None:
    told = ModelEvents.of(registry, events)

    @app.get("/models")
    async def router_models() -> Response:
        if asks_to_reload():
            await reloader.reload()
        entries = [entry(registry, said) for said in registry.names.listed()]
        return json_response({"object": "list", "data": entries})

    @app.post("/models/load")
    async def router_load() -> Response:
        model = registry.model(await named_model())
        if model.state.resident and model.retiring is None:
            raise ModelIsRunning(f"model {model.alias!r} is running already", param="model")
        registry.load_soon(model.alias)
        return json_response({"success": True})

    @app.post("/models/unload")
    async def router_unload() -> Response:
        model = registry.model(await named_model())
        running = any(each.state.resident and each.retiring is None for each in (model, *model.replicas))
        # at once, as llama-server does: running requests may take longer than programs wait for this (Open WebUI: 30 s)
        registry.eject_soon(model.alias)
        if not running:
            raise ModelIsNotRunning(f"model {model.alias!r} is not running", param="model")
        return json_response({"success": True})

    @app.get("/models/sse")
    async def model_events() -> Response:
        borrowed: AsyncExitStack = request.borrowed  # type: ignore[attr-defined]
        reader = borrowed.enter_context(told.hub.reader(request.headers.get("Last-Event-ID")))
        return stream_response(reader)


def _add_one_model(app: QuartTrio, registry: Registry) -> None:
    @app.get("/props")
    async def model_props() -> Response:
        if "model" not in request.args:
            default = registry.config.system.default_model
            hidden = g.holder is not None and default is not None and not g.holder.may_ask(default)
            return json_response(router_props(registry) if hidden else await props(registry))
        return await passed_on(await loaded(registry, model_meant(registry)), "/props")

    async def of_one_model() -> Response:
        return await passed_on(await loaded(registry, model_meant(registry)), request.path)

    async def to_one_model(**_: int) -> Response:
        body = await read_body(request, COMMAND_BYTES)
        client = await loaded(registry, model_meant(registry, parsed(body) if body else None))
        # an action on a slot waits until that is free
        return await passed_on(client, request.path, body, seconds=registry.config.system.request_timeout_sec)

    for path in OF_ONE_MODEL:
        app.add_url_rule(path, f"of one model {path}", of_one_model, methods=["GET"])
    for path in TO_ONE_MODEL:
        app.add_url_rule(path, f"to one model {path}", to_one_model, methods=["POST"])


def _add_control(app: QuartTrio, registry: Registry) -> None:
    @app.post(CONTROL_PATH)
    async def control() -> Response:
        body = await read_body(request, COMMAND_BYTES)
        said = model_meant(registry, parsed(body))
        model = registry.model(said)
        if g.holder is not None:
            g.holder.check_model(model.alias, said)
        backends = [each.supervisor.backend for each in (model, *model.replicas)]
        answers = [await passed_on(each.client, CONTROL_PATH, body) for each in backends if each is not None]
        if not answers:
            return json_response({"success": False, "message": f"no active completion: {model.alias!r} is not loaded"})
        done = [answer for answer in answers if DONE.search(await answer.get_data(as_text=False))]
        return (done or answers)[0]


def _add_upstream(app: QuartTrio, registry: Registry, infer: Infer) -> None:
    async def upstream(target: str) -> Response | WerkzeugResponse:
        said, path = split(registry, target)
        if not path:
            return redirect(f"{UPSTREAM}{said}/")
        if request.method == "POST" and path in INFERENCE_PATHS:
            response: Response = await infer(said, path)
            return response
        reads = request.method in SAFE_METHODS
        if not reads and g.holder is not None:  # only what `infer` answers is asking a model
            g.holder.check_admin()
        if path.startswith("//") or not DOTS.isdisjoint(
            path.split("/")
        ):  # another path, or a host, to whoever sends it on
            raise UnknownPath(f"nothing is at {shown(request.path)}")
        body = await read_body(request, registry.config.api.max_body_bytes)
        seconds = registry.config.system.request_timeout_sec
        client = await loaded(registry, said)
        # it was unquoted: a `?` in it would begin a query, and make another path of what was checked
        return await passed_on(client, quote(path), body, seconds=None if reads else seconds)

    app.add_url_rule(f"{UPSTREAM}<path:target>", "upstream", upstream, methods=["GET", "POST", "DELETE"])
