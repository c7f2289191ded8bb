"""A router on each GPU host of a Ray cluster, behind Ray Serve's one address.

    pip install "ray[serve]" trio-router
    cd deploy/scale-out && serve run ray_serve:app config=/etc/trio-router/router.toml hosts=2 gpus=8

One replica a host, each with `gpus` of it (0: none), owns a `trio-router serve` and hands requests to it. Ray starts them,
looks after them (`/livez`), takes out those that drain, and puts another in the place of one that is lost; which
model runs, who waits and who may ask is the router's business as everywhere. Each host has the configuration file.
Ray sends a request to the less busy of two hosts, whatever its model: hosts load the same ones. Where each is to have
its own, haproxy.cfg beside this file goes by the model.
"""

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from contextlib import suppress

import httpx
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

START_SECONDS = 60.0
STOP_SECONDS = 150.0
"""More than the router's `drain_timeout_sec`."""
MANY = 10_000
"""Requests at a time: it is the router that has them wait."""
OF_ONE_CONNECTION = {
    "connection",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "host",
    "date",
    "server",
}
READY = re.compile(rb"listens on (http://\S+)")


@serve.deployment(
    max_ongoing_requests=MANY,
    max_replicas_per_node=1,
    health_check_period_s=5,
    graceful_shutdown_timeout_s=STOP_SECONDS,
)
class Router:
    """One host's."""

    def __init__(self, config: str) -> None:
        self._config = config
        self._started = asyncio.Lock()
        self._child: asyncio.subprocess.Process | None = None
        self._http: httpx.AsyncClient | None = None

    async def _running(self) -> httpx.AsyncClient:
        """Who speaks to the child; it is started first."""
        async with self._started:
            if self._http is None:
                # setpriv: it ends, and its llama-servers with it, should this process be killed
                self._child = await asyncio.create_subprocess_exec(
                    "setpriv", "--pdeathsig", "TERM", "trio-router", "serve", "--config", self._config, "--port", "0",
                    stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
                )  # fmt: skip
                assert self._child.stdout is not None
                line = await asyncio.wait_for(self._child.stdout.readline(), START_SECONDS)
                found = READY.search(line)
                if found is None:
                    raise RuntimeError(f"trio-router serve did not start: {line!r}")
                limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
                self._http = httpx.AsyncClient(
                    base_url=found[1].decode(), timeout=httpx.Timeout(None, connect=5), limits=limits, trust_env=False
                )
            return self._http

    async def check_health(self) -> None:
        """Ray asks now and then, before the first request too. Raises what is wrong."""
        client = await self._running()
        assert self._child is not None
        if self._child.returncode is not None:
            raise RuntimeError(f"trio-router serve ended with {self._child.returncode}")
        (await client.get("/livez", timeout=5)).raise_for_status()

    async def __call__(self, request: Request) -> Response:
        """Hand it on, and its answer back as it comes."""
        client = await self._running()
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = [(name, value) for name, value in request.headers.items() if name not in OF_ONE_CONNECTION]
        asked = client.build_request(request.method, target, headers=headers, content=await request.body())
        answer = await client.send(asked, stream=True)

        async def body() -> AsyncIterator[bytes]:
            try:
                async for piece in answer.aiter_raw():
                    yield piece
            finally:  # a client that leaves ends this: the router notices, and llama-server stops
                await answer.aclose()

        named = OF_ONE_CONNECTION | {"x-request-id"}  # Ray names requests itself, and tells the router the same name
        kept = {name: value for name, value in answer.headers.items() if name not in named}
        return StreamingResponse(body(), answer.status_code, kept)

    async def __del__(self) -> None:
        """Ray is done with it: let what runs finish."""
        if self._http is not None:
            await self._http.aclose()
        if self._child is not None and self._child.returncode is None:
            self._child.send_signal(signal.SIGTERM)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._child.wait(), STOP_SECONDS)


def app(arguments: dict[str, str]) -> DeploymentHandle:
    """What `serve run` runs."""
    options = {"num_gpus": float(arguments.get("gpus", "1"))}
    return Router.options(num_replicas=int(arguments.get("hosts", "1")), ray_actor_options=options).bind(
        arguments["config"]
    )
