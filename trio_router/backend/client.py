"""What the router asks of a llama-server for itself: is it well, what is it. The only user of httpx.

One client per incarnation, closed with it. `trust_env=False`, or `HTTP_PROXY` would be asked for a loopback
address; `verify=False`, because making a TLS context we never use takes 100 ms.
"""

import errno
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import attrs
import httpx
import trio

from trio_router.backend.address import Address

MAX_ANSWER_BYTES = 4 * 1024 * 1024
MAX_PASSED_BYTES = 64 * 1024 * 1024
TIMEOUT = httpx.Timeout(5.0)


class NoAnswer(Exception):
    """Raised when a llama-server does not answer a question of ours as it should."""


class NoFiles(NoAnswer):
    """Raised when there is no file descriptor left to ask with: that says nothing of the llama-server."""


@attrs.define(eq=False)
class BackendClient:
    """Questions to one incarnation."""

    _http: httpx.AsyncClient

    async def healthy(self) -> bool:
        """Whether `/health` says 200; False while it says 503: loading. Raises NoAnswer for anything else."""
        answer = await self._get("/health")
        if answer.status_code == 503:
            return False
        if answer.status_code != 200:
            raise NoAnswer(f"/health answered {answer.status_code}")
        return True

    async def props(self) -> dict[str, Any]:
        """`/props`: what was loaded and with which settings. Raises NoAnswer."""
        return await self._object("/props")

    async def meta(self) -> dict[str, Any] | None:
        """What `/v1/models` says of the model: sizes, its vocabulary; None: nothing. Raises NoAnswer."""
        match await self._object("/v1/models"):
            case {"data": [{"meta": dict(found)}, *_]}:
                return found
            case _:
                return None

    async def metrics(self) -> str:
        """`/metrics`, Prometheus text (it needs the flag `--metrics`). Raises NoAnswer."""
        answer = await self._get("/metrics")
        if answer.status_code != 200:
            raise NoAnswer(f"/metrics answered {answer.status_code}")
        return answer.text

    async def _object(self, path: str) -> dict[str, Any]:
        answer = await self._get(path)
        if answer.status_code != 200:
            raise NoAnswer(f"{path} answered {answer.status_code}")
        try:
            found = json.loads(answer.content)
        except (ValueError, RecursionError) as error:
            raise NoAnswer(f"{path} answered something that is not JSON") from error
        if not isinstance(found, dict):
            raise NoAnswer(f"{path} answered something that is not a JSON object")
        return found

    async def passed_on(
        self, method: str, target: str, headers: dict[str, str], body: bytes, seconds: float | None = None
    ) -> "Answered":
        """What it answers, within `seconds` if those are said, to somebody else's question, its bytes as they came. Raises NoAnswer."""
        return await self._ask(method, target, headers, body, most=MAX_PASSED_BYTES, seconds=seconds)

    async def _get(self, path: str) -> "Answered":
        return await self._ask("GET", path, {}, b"", most=MAX_ANSWER_BYTES)

    async def _ask(
        self, method: str, path: str, sent: dict[str, str], content: bytes, *, most: int, seconds: float | None = None
    ) -> "Answered":
        body = bytearray()
        timeout = TIMEOUT if seconds is None else httpx.Timeout(seconds)
        seconds = timeout.read or 5.0
        try:
            # a bound on the whole, beside httpx's own on each read: one byte a second would satisfy those
            with trio.move_on_after(seconds) as patience:
                async with self._http.stream(method, path, headers=sent, content=content, timeout=timeout) as answer:
                    async for piece in answer.aiter_raw():
                        body += piece
                        if len(body) > most:
                            patience.cancel()  # raising here would leave httpx's generators to the garbage collector
        # RuntimeError: closed with its incarnation meanwhile; OSError: of what httpx imports at its first use
        except (httpx.HTTPError, httpx.InvalidURL, RuntimeError, OSError) as error:
            what = NoFiles if _is_shortage(error) else NoAnswer
            raise what(f"{path}: {type(error).__name__} {error}".rstrip()) from error
        if len(body) > most:
            raise NoAnswer(f"{path} answered more than {most} bytes")
        if patience.cancelled_caught:
            raise NoAnswer(f"{path} did not answer within {seconds:g} s")
        return Answered(answer.status_code, answer.headers, bytes(body))


def _is_shortage(error: BaseException) -> bool:
    """Whether it was a lack of file descriptors in the end."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in {errno.EMFILE, errno.ENFILE}:
            return True
        cause = cause.__cause__ or cause.__context__
    return False


@attrs.frozen
class Answered:
    """An answer, its content as it came: compressed, if its headers say so."""

    status_code: int
    headers: Mapping[str, str]
    """By name, whatever its case."""
    content: bytes

    @property
    def text(self) -> str:
        """The content of an answer that is not compressed."""
        return self.content.decode("utf-8", "replace")


@asynccontextmanager
async def backend_client(address: Address) -> AsyncIterator[BackendClient]:
    """A client for the llama-server at `address`; it need not be listening yet. Raises NoFiles."""
    try:
        transport = httpx.AsyncHTTPTransport(
            uds=address.path,
            verify=False,
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=1),
        )
    except OSError as error:  # the first one has httpx import most of itself
        raise NoFiles(f"cannot ask llama-server: {error.strerror}") from error
    headers = {} if address.key is None else {"authorization": f"Bearer {address.key}"}
    base = "http://backend" if address.path is not None else f"http://{address.host}:{address.port}"
    async with httpx.AsyncClient(
        transport=transport, base_url=base, headers=headers, timeout=TIMEOUT, trust_env=False
    ) as http:
        yield BackendClient(http)
