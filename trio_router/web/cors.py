"""What a browser is told about pages of other origins."""

from typing import Final

from trio_router.backend.answer import Headers
from trio_router.web.admission import Admission

ALLOWED_METHODS: Final = b"GET, POST, DELETE, OPTIONS"
ALLOWED_HEADERS: Final = (
    # any, as far as a browser knows the star: OpenAI's and Anthropic's clients send a dozen that describe themselves
    b"*, Authorization, Content-Type, Last-Event-ID, X-Api-Key, X-Request-ID, X-Request-Priority, "
    b"OpenAI-Organization, OpenAI-Project"
)
EXPOSED_HEADERS: Final = (
    b"X-Request-ID, Request-ID, X-Queue-Time-Ms, X-Queue-Position, X-Queue-Estimate-Ms, Retry-After, X-Should-Retry"
)
MAX_AGE: Final = b"600"


def cors_headers(admission: Admission, origin: str | None) -> Headers:
    """Headers of every answer to a request that came with `origin`."""
    if not admission.knows_origins:
        return []
    headers: Headers = [(b"vary", b"Origin")]
    if origin is not None and admission.origin_allowed(origin):
        headers.append((b"access-control-allow-origin", origin.encode("latin-1")))
        headers.append((b"access-control-expose-headers", EXPOSED_HEADERS))
    return headers


def preflight_headers(admission: Admission, origin: str | None) -> Headers:
    """What the answer to a browser's question, whether it may ask, has besides."""
    if origin is None or not admission.origin_allowed(origin):
        return []
    return [
        (b"access-control-allow-methods", ALLOWED_METHODS),
        (b"access-control-allow-headers", ALLOWED_HEADERS),
        (b"access-control-max-age", MAX_AGE),
    ]
