"""One tree of errors. Each knows the HTTP status, `type` and `code` its client sees.

The body is OpenAI's: ``{"error": {"message", "type", "param", "code", ...}}``. An error is named after the
situation; whoever raises it says in the message what was found, what is allowed, and the numbers.
Nothing here knows of HTTP libraries: the rooms in `web/` turn an error into bytes.
"""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Self

MAX_ECHO = 100
"""Longest piece of a client's own input, in characters, that a message repeats."""
MAX_RETRY_AFTER_SECONDS = 120
"""OpenAI's and Anthropic's clients go by a `Retry-After` of up to two minutes, and by their own ideas beyond it."""


def shown(value: str) -> str:
    """`value` quoted for a message, cut so that a client cannot make us echo a novel."""
    cut = value if len(value) <= MAX_ECHO else value[:MAX_ECHO] + "…"
    return repr(cut)


class RouterError(Exception):
    """Anything a client is told as an error object."""

    status: int = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    permanent: ClassVar[bool] = False
    """Whether the same request meets the same fate until somebody does something about it, or comes when it is too late."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        details: Mapping[str, Any] | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.details = dict(details or {})
        self.retry_after_seconds = retry_after_seconds

    def again(self) -> Self:
        """Another of the same: one error told to many, each of whom raises it and gives it a traceback."""
        same = copy.copy(self)
        same.__traceback__ = None
        return same

    @property
    def headers(self) -> list[tuple[str, str]]:
        """Headers that go with it: `Retry-After` on every 429 and 503, `X-Queue-Position` if there was a place.

        OpenAI's and Anthropic's clients repeat every 429 and 5xx two times, unless `x-should-retry` tells them not to.
        """
        headers = [("x-should-retry", "false")] if self.permanent else []
        if self.retry_after_seconds is not None:
            headers.append(("Retry-After", str(min(self.retry_after_seconds, MAX_RETRY_AFTER_SECONDS))))
        elif self.status in {429, 503}:
            headers.append(("Retry-After", "1"))
        if (position := self.details.get("queue_position")) is not None:
            headers.append(("X-Queue-Position", str(position)))
        return headers

    def body(self) -> dict[str, Any]:
        """The error object, OpenAI's four keys first, ours beside them."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
                **self.details,
            },
        }


class InternalError(RouterError):
    """Raised when a bug of ours ended a request; the message never holds a traceback."""


# --- the client is to blame -------------------------------------------------------------------------


class InvalidRequest(RouterError):
    """Raised when a request cannot be understood."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"


class InvalidConfig(InvalidRequest):
    """Raised when router.toml is to be read again and is wrong; `details` has every problem."""

    code = "invalid_config"


class HeadRefused(RouterError):
    """Raised when a request's head is no HTTP we speak; `status` is what HTTP has for that."""

    type = "invalid_request_error"
    code = "bad_request"

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class HeadTooLarge(InvalidRequest):
    """Raised when a request has more headers, or longer ones, than llama-server takes."""

    status = 431
    code = "bad_request"


class TargetTooLong(HeadTooLarge):
    """Raised when a request's path and query are longer than llama-server takes."""

    status = 414


class InvalidJSON(InvalidRequest):
    """Raised when a body is not a JSON object."""

    code = "invalid_json"


class InvalidForm(InvalidRequest):
    """Raised when a body that is called a form is none."""

    code = "invalid_form"


class MissingModel(InvalidRequest):
    """Raised when a body names no model, or something that is not a string."""

    code = "missing_model"


class InvalidPriority(InvalidRequest):
    """Raised when `X-Request-Priority` is none of high, normal, low."""

    code = "invalid_priority"


class InvalidDeadline(InvalidRequest):
    """Raised when `X-Request-Deadline-Ms` is no whole number of milliseconds."""

    code = "invalid_deadline"


class InvalidKeepAlive(InvalidRequest):
    """Raised when `keep_alive` of a body is no time."""

    code = "invalid_keep_alive"


class InvalidApiKey(RouterError):
    """Raised when keys are configured and the request brings none of them."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"

    @property
    def headers(self) -> list[tuple[str, str]]:
        return [("WWW-Authenticate", "Bearer")]


class HostNotAllowed(RouterError):
    """Raised when `Host` is not one of ours: a page that rebound its name to this machine."""

    status = 403
    type = "permission_error"
    code = "host_not_allowed"


class OriginNotAllowed(RouterError):
    """Raised when a web page of a foreign origin asks for something that changes state."""

    status = 403
    type = "permission_error"
    code = "origin_not_allowed"


class AdminRequired(RouterError):
    """Raised when a key that is no admin's asks for something that changes what runs."""

    status = 403
    type = "permission_error"
    code = "admin_required"


class ModelNotAllowed(RouterError):
    """Raised when a key asks for a model that is not among its own."""

    status = 403
    type = "permission_error"
    code = "model_not_allowed"


class TooManyRequests(RouterError):
    """Raised when a key has as many requests under way as it may."""

    status = 429
    type = "rate_limit_error"
    code = "too_many_requests"


class UnknownPath(RouterError):
    """Raised when nothing lives at a path."""

    status = 404
    type = "not_found_error"
    code = "not_found"


class ModelNotLoaded(InvalidRequest):
    """Raised when a request for a model that is not loaded says that it must not be loaded for it."""

    code = "model_not_loaded"


class ModelIsRunning(InvalidRequest):
    """Raised when llama-server's own API is asked to load what is loaded, or being loaded."""

    code = "model_is_running"


class ModelIsNotRunning(InvalidRequest):
    """Raised when llama-server's own API is asked to unload what is not loaded."""

    code = "model_is_not_running"


class UnknownModel(RouterError):
    """Raised when no model of router.toml has the name."""

    status = 404
    type = "not_found_error"
    code = "model_not_found"


class UnknownRequest(RouterError):
    """Raised when no request that is under way has the id."""

    status = 404
    type = "not_found_error"
    code = "request_not_found"


class MethodNotAllowed(RouterError):
    """Raised when the path exists, but not for this method. `allowed` goes into the `Allow` header."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"

    def __init__(self, message: str, *, allowed: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.allowed = allowed

    @property
    def headers(self) -> list[tuple[str, str]]:
        return [("Allow", ", ".join(self.allowed))] if self.allowed else []


class RequestTimeout(RouterError):
    """Raised when a client does not finish sending its body in time."""

    status = 408
    type = "timeout_error"
    code = "request_timeout"


class BodyTooLarge(RouterError):
    """Raised when a body passes `api.max_body_mb`, announced or counted."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class UnsupportedMediaType(RouterError):
    """Raised when a body is encoded in a way we do not read."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


# --- not now ----------------------------------------------------------------------------------------


class ServiceUnavailable(RouterError):
    """Raised when a request is fine but cannot be served now."""

    status = 503
    type = "service_unavailable_error"
    code = "backend_unavailable"


class BackendUnavailable(ServiceUnavailable):
    """Raised when the model's llama-server went away, or was taken away, before it answered."""


class QueueFull(ServiceUnavailable):
    """Raised when as many requests wait for a model as may."""

    code = "queue_full"


class ModelFailed(ServiceUnavailable):
    """Raised when a model used up its load attempts and nobody has reset it."""

    code = "model_failed"
    permanent = True


class ShuttingDown(ServiceUnavailable):
    """Raised when the router drains."""

    code = "shutting_down"


class RequestCancelled(ServiceUnavailable):
    """Raised when an operator ended the request."""

    code = "request_cancelled"
    permanent = True


class InsufficientMemory(RouterError):
    """Raised when a model can never fit; `details` has `model`, `required_mb`, `available_mb`, `loaded_models`."""

    status = 503
    type = "insufficient_vram_error"
    code = "vram_exhausted"
    permanent = True


class BackendBroken(RouterError):
    """Raised when a llama-server that is alive breaks off before its answer, or answers what is not HTTP."""

    status = 502
    type = "server_error"
    code = "bad_backend_response"


class BackendCrashed(RouterError):
    """Raised when a request saw as many llama-servers die as it may: it is not given another."""

    status = 502
    type = "server_error"
    code = "backend_crashed"
    permanent = True


class TimedOut(RouterError):
    """Raised when a bound in time passed."""

    status = 504
    type = "timeout_error"
    code = "timeout"


class QueueTimeout(TimedOut):
    """Raised when a request waited `system.queue_timeout_sec` for a slot."""

    code = "queue_timeout"


class DeadlineUnreachable(TimedOut):
    """Raised when a request would wait for longer than its client does, as far as can be known."""

    code = "deadline_unreachable"
    permanent = True


class DeadlineExceeded(TimedOut):
    """Raised when a request still waits at its client's deadline."""

    code = "deadline_exceeded"
    permanent = True


class LoadTimeout(TimedOut):
    """Raised when llama-server was not ready `system.load_timeout_sec` after its start."""

    code = "load_timeout"


class BackendTimeout(TimedOut):
    """Raised when llama-server was silent for `system.request_timeout_sec` in the middle of a request."""

    code = "backend_timeout"
