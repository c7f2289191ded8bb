"""`/ui`: the dashboard, a page that asks the same endpoints as everybody else.

Its files are read once. They hold no secret, so they need no key; what the page then asks for does.
"""

import hashlib
import mimetypes
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Final

import attrs
from quart import Response, redirect, request
from quart_trio import QuartTrio
from werkzeug.wrappers import Response as WerkzeugResponse

from trio_router.errors import UnknownPath, shown

PREFIX: Final = "/ui/"
TYPES: Final = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
}
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Nothing that did not come with us is run or shown, and nobody frames us."""
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@attrs.frozen
class Asset:
    """A file of the page."""

    content: bytes
    content_type: str
    tag: str


def read_assets() -> Mapping[str, Asset]:
    """All of them by their path below `/ui/`."""
    found: dict[str, Asset] = {}

    def read(folder: Traversable, prefix: str) -> None:
        for entry in folder.iterdir():
            name = prefix + entry.name
            if entry.is_dir():
                read(entry, f"{name}/")
            else:
                content = entry.read_bytes()
                suffix = "." + name.rpartition(".")[2]
                kind = TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
                found[name] = Asset(content, kind, f'"{hashlib.sha256(content).hexdigest()[:24]}"')

    read(resources.files("trio_router.web") / "ui", "")
    return found


def add_routes(app: QuartTrio) -> None:
    """Add it to `app`, and the way to it from `/`."""
    assets = read_assets()

    @app.get("/")
    async def root() -> WerkzeugResponse:
        return redirect(PREFIX)

    @app.get("/ui")
    async def without_slash() -> WerkzeugResponse:
        return redirect(PREFIX)

    @app.get("/ui/")
    async def first() -> Response:
        return await page("index.html")

    @app.get("/ui/<path:name>")
    async def page(name: str) -> Response:
        asset = assets.get(name)
        if asset is None:
            raise UnknownPath(f"nothing is at {shown(request.path)}")
        headers = {**HEADERS, "ETag": asset.tag}
        if asset.tag in request.headers.get("If-None-Match", ""):
            return Response(b"", 304, headers)
        return Response(asset.content, 200, headers, content_type=asset.content_type)
