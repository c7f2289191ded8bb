"""`/openapi.json`: every endpoint, from one table. A test holds it against the app's own routes."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs
from quart import Response
from quart_trio import QuartTrio

from trio_router import __version__
from trio_router.fleet.registry import Registry
from trio_router.web.admission import CONTROL_PATH, INFERENCE_PATHS, OPEN_PATHS, Admission
from trio_router.web.form import FORM_PATHS
from trio_router.web.openapi_schemas import (
    ANY,
    COUNT,
    DONE,
    EVENTS,
    FORM,
    HEALTH,
    JSON,
    MODELS,
    NAME_A_MODEL,
    NUMBER,
    OBJECT,
    PLAN,
    SCHEMAS,
    STATUS,
    STRING,
    STRINGS,
    TEXT,
    TEXT_OR_NULL,
    Schema,
    object_with,
    ref,
)
from trio_router.web.responses import json_response


def _parameter(name: str, where: str, schema: Schema, text: str, *, needed: bool = False) -> Schema:
    needs = {"required": True} if needed or where == "path" else {}
    return {"name": name, "in": where, "schema": schema, "description": text, **needs}


ALIAS: Final = _parameter("alias", "path", {"type": "string", "minLength": 1}, "A model's name; it may hold slashes.")
PRIORITY: Final = _parameter(
    "X-Request-Priority", "header", {"enum": ["high", "normal", "low"]}, "Who goes first; in any case of letters."
)
DEADLINE: Final = _parameter(
    "X-Request-Deadline-Ms",
    "header",
    {"type": "integer", "minimum": 1, "maximum": 10**12 - 1},
    "How long the client waits until the request begins; 504 at once if that cannot be met.",
)
REQUEST_ID: Final = _parameter(
    "X-Request-ID", "header", STRING, "Comes back if it is 1 to 128 visible ASCII characters; else one is made."
)
LAST_EVENT: Final = _parameter("Last-Event-ID", "header", STRING, "Where to go on.")
SWITCH: Final[Schema] = {"type": "string", "description": "0, false, no, off; anything else is a yes."}


@attrs.frozen(kw_only=True)
class Endpoint:
    """One method of one path."""

    method: str
    path: str
    """In OpenAPI's way."""
    summary: str
    tag: str
    answers: Mapping[int, tuple[str, Schema]]
    """What is said when all is well: content type and schema by status."""
    errors: tuple[int, ...] = ()
    """Beside those that any request may get."""
    parameters: tuple[Schema, ...] = ()
    body: str | None = None
    """Name of the body's schema."""
    takes: str = JSON
    """Content type of the body."""
    error: Schema = attrs.field(factory=lambda: ref("Error"))
    """What an error looks like."""
    streams: bool = False
    """Whether it answers with events when asked for a stream."""

    def operation(self) -> dict[str, Any]:
        """As OpenAPI has it."""
        responses: dict[str, Any] = {
            str(status): {"description": self.summary, "content": {kind: {"schema": schema}}}
            for status, (kind, schema) in self.answers.items()
        }
        if self.streams:
            responses["200"]["content"][EVENTS] = {"schema": ANY}
        usual = (400, 403) if self.path in OPEN_PATHS else (400, 401, 403)
        for status in sorted({*usual, *self.errors}):
            error = {"description": "An error.", "content": {JSON: {"schema": self.error}}}
            if str(status) in responses:  # /health answers 503 with its own body
                continue
            responses[str(status)] = error
        operation: dict[str, Any] = {
            "operationId": f"{self.method} {self.path}",
            "summary": self.summary,
            "tags": [self.tag],
            "parameters": [
                {"$ref": "#/components/parameters/alias"} if parameter is ALIAS else parameter
                for parameter in (*self.parameters, REQUEST_ID)
            ],
            "responses": responses,
        }
        if self.path in OPEN_PATHS:
            operation["security"] = []
        if self.body is not None:
            operation["requestBody"] = {"required": True, "content": {self.takes: {"schema": ref(self.body)}}}
        return operation


def _get(path: str, summary: str, schema: Schema = OBJECT, tag: str = "monitoring", **more: Any) -> Endpoint:
    answers = more.pop("answers", {200: (JSON, schema)})
    return Endpoint(method="get", path=path, summary=summary, tag=tag, answers=answers, **more)


def _inference(path: str) -> Endpoint:
    return Endpoint(
        method="post",
        path=path,
        summary="Answered by the llama-server of the body's model; its own errors pass through.",
        tag="inference",
        answers={200: (JSON, ANY)},
        errors=(404, 408, 413, 415, 429, 500, 501, 502, 503, 504),
        parameters=(PRIORITY, DEADLINE),
        body="Transcription" if path in FORM_PATHS else "InferenceRequest",
        takes=FORM if path in FORM_PATHS else JSON,
        error=object_with(error=OBJECT),  # llama-server's own errors have other fields
        streams=True,
    )


ENDPOINTS: Final[tuple[Endpoint, ...]] = (
    *map(_inference, sorted(INFERENCE_PATHS)),
    _get(
        "/v1/models",
        "The models there are.",
        MODELS,
        tag="models",
    ),
    _get("/v1/models/{alias}", "One model.", ref("Model"), tag="models", errors=(404,), parameters=(ALIAS,)),
    _get("/v1/models/status", "How every model is.", STATUS, tag="models"),
    _get(
        "/v1/models/status/stream",
        "Every change: full_status, then model_update, server_update and heartbeat.",
        tag="models",
        answers={200: (EVENTS, ANY)},
        parameters=(LAST_EVENT,),
    ),
    _get(
        "/v1/models/failed",
        "Models that used up their attempts.",
        object_with(failed_models={"type": "array", "items": object_with(model=STRING, attempts=COUNT, error=STRING)}),
        tag="models",
    ),
    _get(
        "/v1/models/{alias}/status",
        "How one model is.",
        {"allOf": [ref("ModelStatus"), object_with(model=STRING, is_alive={"type": "boolean"})]},
        tag="models",
        errors=(404,),
        parameters=(ALIAS,),
    ),
    _get(
        "/v1/models/{alias}/logs",
        "llama-server's last lines.",
        tag="models",
        answers={200: (TEXT, STRING)},
        errors=(404,),
        parameters=(
            ALIAS,
            _parameter("lines", "query", {"type": "integer", "minimum": 0, "maximum": 100_000}, "How many."),
            _parameter(
                "follow", "query", {"enum": ["0", "1"]}, "Go on as lines come; as events if those are accepted."
            ),
        ),
    ),
    _get("/v1/models/{alias}/footprint", "What it needs.", tag="models", errors=(404,), parameters=(ALIAS,)),
    Endpoint(
        method="post",
        path="/v1/models/load",
        summary="Load a model, and wait until it is ready unless told not to.",
        tag="models",
        answers={
            200: (JSON, object_with(status=STRING, model=STRING)),
            202: (JSON, object_with(status=STRING, model=STRING)),
        },
        errors=(404, 408, 413, 503, 504),
        parameters=(_parameter("wait", "query", SWITCH, "false: answer at once."),),
        body="NamedModel",
    ),
    Endpoint(
        method="post",
        path="/v1/models/eject",
        summary="Unload a model, after its running requests unless forced.",
        tag="models",
        answers={200: (JSON, DONE)},
        errors=(404, 408, 413),
        parameters=(_parameter("force", "query", SWITCH, "true: cut running requests."),),
        body="NamedModel",
    ),
    Endpoint(
        method="post",
        path="/v1/models/{alias}/reset",
        summary="Let a failed model be tried again.",
        tag="models",
        answers={200: (JSON, DONE)},
        errors=(404,),
        parameters=(ALIAS,),
    ),
    _get(
        "/v1/requests",
        "What is being answered now, the oldest first; with a key that is no operator's, its own.",
        object_with(
            total=COUNT, requests={"type": "array", "items": object_with(id=STRING, state=STRING, model=TEXT_OR_NULL)}
        ),
        tag="requests",
    ),
    Endpoint(
        method="post",
        path="/v1/requests/{id}/cancel",
        summary="End a request, wherever it is; its client is told.",
        tag="requests",
        answers={200: (JSON, object_with(status=STRING, cancelled=COUNT))},
        errors=(404,),
        parameters=(_parameter("id", "path", {"type": "string", "minLength": 1}, "Its X-Request-ID."),),
    ),
    Endpoint(
        method="post",
        path="/v1/config/reload",
        summary="Read router.toml again: refused whole if wrong; only models whose settings changed are restarted.",
        tag="configuration",
        answers={200: (JSON, object_with(status=STRING, changed=STRINGS, after_restart=STRINGS, models=OBJECT))},
    ),
    Endpoint(
        method="post",
        path="/v1/router/drain",
        summary="Finish what runs, and stop, as SIGTERM does.",
        tag="configuration",
        answers={200: (JSON, object_with(status=STRING, message=STRING))},
    ),
    Endpoint(
        method="post",
        path="/v1/router/plan",
        summary="What would happen to a request that came now: run, where in the queue, who would leave, or why never.",
        tag="monitoring",
        answers={200: (JSON, PLAN)},
        errors=(404,),
        parameters=(PRIORITY,),
        body="NamedModel",
    ),
    _get(
        "/v1/router/decisions",
        "The last decisions on which models are loaded, oldest first.",
        object_with(decisions={"type": "array", "items": PLAN}),
        parameters=(
            _parameter("last", "query", {"type": "string", "pattern": "^[0-9]{1,9}$"}, "How many; without it all."),
        ),
    ),
    _get(
        "/v1/router/trace",
        "The last requests and loads, without what was said: for `trio-router simulate`.",
        answers={200: ("application/jsonl", STRING)},
    ),
    _get(
        "/models",
        "The models there are, as llama-server's router tells.",
        MODELS,
        tag="llama-server's router",
        parameters=(_parameter("reload", "query", {"type": "string"}, "Read router.toml again first."),),
    ),
    Endpoint(
        method="post",
        path="/models/load",
        summary="Load a model; answers at once.",
        tag="llama-server's router",
        answers={200: (JSON, object_with(success={"const": True}))},
        errors=(404, 408, 413, 503),
        body="NamedModel",
    ),
    Endpoint(
        method="post",
        path="/models/unload",
        summary="Unload a model, after its running requests; answers at once.",
        tag="llama-server's router",
        answers={200: (JSON, object_with(success={"const": True}))},
        errors=(404, 408, 413),
        body="NamedModel",
    ),
    _get(
        "/models/sse",
        "Every change of a model's status: model_status, models_reload.",
        tag="llama-server's router",
        answers={200: (EVENTS, ANY)},
        parameters=(LAST_EVENT,),
    ),
    *(
        _get(
            path,
            f"A model's own {path}; it is loaded for it unless autoload is false.",
            tag="llama-server's router",
            answers={200: (JSON, ANY)},
            errors=(400, 404, 501, 503, 504),
            parameters=(
                _parameter("model", "query", STRING, "Its alias.", needed=path != "/props"),
                _parameter("autoload", "query", SWITCH, "false: an error if it is not loaded."),
            ),
            error=object_with(error=OBJECT),
        )
        for path in ("/props", "/slots", "/lora-adapters")
    ),
    *(
        Endpoint(
            method="post",
            path=path,
            summary=summary,
            tag="llama-server's router",
            answers={200: (JSON, ANY)},
            errors=(404, 408, 413, 500, 501, 503, 504),
            parameters=(
                *parameters,
                _parameter("model", "query", STRING, "Its alias; or the body says it.", needed=True),
                _parameter("autoload", "query", SWITCH, "false: an error if it is not loaded."),
            ),
            error=object_with(error=OBJECT),
        )
        for path, summary, parameters in (
            ("/props", "Change a model's own settings, as far as its llama-server lets.", ()),
            ("/lora-adapters", "How much each of a model's adapters counts.", ()),
            (
                "/slots/{id}",
                "Save, restore or erase what a slot holds.",
                (_parameter("id", "path", COUNT, "Its number."), _parameter("action", "query", STRING, "What to do.")),
            ),
        )
    ),
    Endpoint(
        method="post",
        path=CONTROL_PATH,
        summary="A word to llama-server about an answer under way: its `id`, and an `action` (`reasoning_end`).",
        tag="llama-server's router",
        answers={200: (JSON, ANY)},
        errors=(404, 408, 413, 500, 501, 503),
        error=object_with(error=OBJECT),
        body="NamedModel",
    ),
    _get("/health", "Is the router well?", answers={200: (JSON, HEALTH), 503: (JSON, HEALTH)}),
    _get("/v1/health", "The same.", answers={200: (JSON, HEALTH), 503: (JSON, HEALTH)}),
    _get("/livez", "Is it alive?", object_with(status=STRING)),
    _get(
        "/readyz", "Is it to be sent requests?", answers=dict.fromkeys((200, 503), (JSON, object_with(status=STRING)))
    ),
    _get("/metrics", "Prometheus.", answers={200: (TEXT, STRING)}),
    _get("/metrics/backends", "Every llama-server's own series.", answers={200: (TEXT, STRING)}),
    _get(
        "/metrics/stream",
        "The numbers of a dashboard every 2 s: metrics, heartbeat.",
        answers={200: (EVENTS, ANY)},
        parameters=(LAST_EVENT,),
    ),
    _get(
        "/vram",
        "What fills the GPUs.",
        object_with(status={"enum": ["healthy", "warning", "critical", "unavailable"]}, gpu_info=OBJECT),
    ),
    _get("/v1/queue/stats", "Who waits.", object_with(summary=OBJECT, per_model=OBJECT)),
    _get("/v1/telemetry/summary", "The last hour's requests.", object_with(total_requests=COUNT, success_rate=NUMBER)),
    _get("/v1/health/models", "How loaded models are."),
    _get("/openapi.json", "This.", tag="documentation"),
)


def document(aliases: Sequence[str], *, keys: bool) -> dict[str, Any]:
    """The whole, for a router of these models; `keys` says whether one must be sent."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method] = endpoint.operation()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "trio-router",
            "version": __version__,
            "description": "One OpenAI-compatible address in front of many llama-server processes.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "paths": paths,
        "security": [{"bearer": []}, {"header": []}] if keys else [],
        "components": {
            "parameters": {"alias": {**ALIAS, "examples": {alias: {"value": alias} for alias in aliases}}},
            "schemas": {
                name: {**schema, "examples": [{"model": alias} for alias in aliases]}
                if name in NAME_A_MODEL
                else schema
                for name, schema in SCHEMAS.items()
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
    }


def add_routes(app: QuartTrio, registry: Registry, admission: Admission) -> None:
    """Add it to `app`."""

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return json_response(document(list(registry.models), keys=admission.needs_key))
