"""What `/openapi.json` says of bodies and answers: JSON Schema, as OpenAPI 3.1 has it."""

from collections.abc import Mapping
from typing import Any, Final

Schema = Mapping[str, Any]

OBJECT: Final[Schema] = {"type": "object"}
ANY: Final[Schema] = {}
JSON: Final = "application/json"
TEXT: Final = "text/plain"
EVENTS: Final = "text/event-stream"
FORM: Final = "multipart/form-data"


def object_with(**properties: Schema) -> Schema:
    """An object that has at least these."""
    return {"type": "object", "required": list(properties), "properties": properties}


STRING: Final[Schema] = {"type": "string"}
STRINGS: Final[Schema] = {"type": "array", "items": STRING}
TEXT_OR_NULL: Final[Schema] = {"type": ["string", "null"]}
NUMBER: Final[Schema] = {"type": "number"}
COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
COUNT_OR_NULL: Final[Schema] = {"type": ["integer", "null"], "minimum": 0}

SCHEMAS: Final[Mapping[str, Schema]] = {
    "Error": object_with(
        error={
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": STRING, "type": STRING, "param": TEXT_OR_NULL, "code": STRING},
        }
    ),
    "Model": object_with(
        id=STRING,
        object={"const": "model"},
        created=COUNT,
        owned_by=STRING,
        n_ctx=COUNT_OR_NULL,
        status=object_with(value={"enum": ["loaded", "loading", "unloaded", "failed"]}),
    ),
    "ModelStatus": object_with(
        alias=STRING,
        status={"enum": ["off", "starting", "loading", "ready", "stopping", "crashed", "failed"]},
        port=COUNT_OR_NULL,
        vram_mb=COUNT_OR_NULL,
        vram_used_mb=COUNT_OR_NULL,
        ram_mb=COUNT_OR_NULL,
        load_progress=COUNT_OR_NULL,
        started_at=TEXT_OR_NULL,
        last_used_at=TEXT_OR_NULL,
        updated_at=STRING,
        error_message=TEXT_OR_NULL,
    ),
    "NamedModel": object_with(model={"type": "string", "description": "An alias of router.toml."}),
    "InferenceRequest": {
        "type": "object",
        "required": ["model"],
        "properties": {"model": STRING, "stream": {"description": "true: an answer in events."}},
        "description": "What llama-server reads at this path; the router reads `model` and `stream`, takes "
        "`keep_alive` (seconds, or '5m') for itself, and passes the rest on.",
    },
    "Transcription": {
        "type": "object",
        "required": ["model", "file"],
        "properties": {"model": STRING, "file": {"type": "string", "format": "binary"}},
        "description": "A form that llama-server reads; the router reads `model`.",
    },
}


NAME_A_MODEL: Final = frozenset({"NamedModel", "InferenceRequest", "Transcription"})


def ref(name: str) -> Schema:
    """Where one of `SCHEMAS` stands."""
    return {"$ref": f"#/components/schemas/{name}"}


STATUS: Final = object_with(
    server=OBJECT, models={"type": "object", "additionalProperties": ref("ModelStatus")}, summary=OBJECT
)
MODELS: Final = object_with(object={"const": "list"}, data={"type": "array", "items": ref("Model")})
DONE: Final = object_with(status={"enum": ["success", "not_found"]}, message=STRING)
HEALTH: Final = object_with(
    status={"enum": ["ok", "degraded"]}, checks=OBJECT, version=STRING, uptime_seconds=NUMBER, port=COUNT_OR_NULL
)

PLAN: Final = object_with(
    at={"type": ["number", "null"]},
    model=STRING,
    priority=TEXT_OR_NULL,
    outcome={"enum": ["run", "queue", "load", "wait", "never", "start", "evict", "yield", "unload"]},
    why=STRING,
    code=TEXT_OR_NULL,
    queue_position=COUNT_OR_NULL,
    evicts=STRINGS,
    place_in_ms=COUNT_OR_NULL,
    estimated_wait_ms=COUNT_OR_NULL,
    memory_before_mb=COUNT_OR_NULL,
    memory_after_mb=COUNT_OR_NULL,
)
