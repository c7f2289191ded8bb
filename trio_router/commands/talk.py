"""How commands talk to a router that runs: the standard library's client, because `ps` should be back at once."""

import http.client
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Final
from urllib.parse import quote, urlsplit

import attrs
from cyclopts import Parameter

from trio_router.commands.said import BAD_CONFIG, FAILED, NO_SERVER, NOT_FOUND, USAGE, Said

STATUSES: Final = {
    "model_not_found": NOT_FOUND, "request_not_found": NOT_FOUND, "not_found": NOT_FOUND, "invalid_config": BAD_CONFIG,
}  # fmt: skip
"""By the error's code."""
SECONDS: Final = 10.0
PATH: Final = re.compile(r"[!-~]*")


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class Router:
    """The router that is spoken to."""

    url: Annotated[str, Parameter(help="Of the router; without it $TRIO_ROUTER_URL.")] = "http://127.0.0.1:8000"
    api_key: Annotated[
        str | None,
        Parameter(help="Without it $API_KEY, which others on this machine cannot read as they can this."),
    ] = attrs.field(default=None, repr=False)

    def get(self, path: str, seconds: float = SECONDS) -> Any:
        """The object at `path`. Raises Said."""
        with self.answer("GET", path, None, seconds) as answer:
            return self._object(answer.read())

    def post(self, path: str, body: Mapping[str, Any] | None = None, seconds: float | None = SECONDS) -> Any:
        """What is answered to `body`; `seconds` None waits for ever. Raises Said."""
        with self.answer("POST", path, body or {}, seconds) as answer:
            return self._object(answer.read())

    def _object(self, said: bytes) -> Any:
        try:
            return json.loads(said)
        except ValueError as error:
            raise Said(f"no router at {self.url}: what answers there says no JSON", NO_SERVER) from error

    def lines(self, path: str, body: Mapping[str, Any] | None = None) -> Iterator[str]:
        """Lines as they come, without their ends; of an answer that may have no end. Raises Said."""
        with self.answer("GET" if body is None else "POST", path, body, None) as answer:
            while line := answer.readline():
                yield line.decode("utf-8", "replace").rstrip("\r\n")

    def events(self, path: str, body: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Any]]:
        """The events of a stream: their names and data, until `[DONE]`. Raises Said."""
        name, data = "message", ""
        for line in self.lines(path, body):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if not line and data:
                if data == "[DONE]":
                    return
                yield name, json.loads(data)
                name, data = "message", ""
            elif field == "event":
                name = value
            elif field == "data":
                data += value

    @contextmanager
    def answer(
        self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float | None
    ) -> Iterator[http.client.HTTPResponse]:
        """An answer that has begun. Raises Said for one that is an error, and for none."""
        connection, base = self._connection()
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            if not (self.api_key.isascii() and self.api_key.isprintable()):
                raise Said("the API key has characters that no header may have", USAGE)
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            self._connect(connection)
            connection.sock.settimeout(seconds)
            connection.request(method, base + path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            if answer.status >= 400:
                raise _refused(answer)
            yield answer
        except TimeoutError as error:
            raise Said(f"no answer from {self.url} within {seconds or SECONDS:g} s", NO_SERVER) from error
        except ConnectionError as error:
            raise Said(f"no router at {self.url}: {error.strerror or error}", NO_SERVER) from error
        except http.client.HTTPException as error:
            raise Said(f"{self.url} broke off: {type(error).__name__}") from error
        finally:
            connection.close()

    def _connection(self) -> tuple[http.client.HTTPConnection, str]:
        """One to the router that is not open yet, and what its paths begin with. Raises Said."""
        try:
            parts = urlsplit(self.url if "://" in self.url else f"http://{self.url}")
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise Said(f"{self.url!r} is not the URL of a router", USAGE) from error
        if not host or parts.scheme not in {"http", "https"} or not PATH.fullmatch(parts.path):
            raise Said(f"{self.url!r} is not the URL of a router", USAGE)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        base = parts.path.rstrip("/").removesuffix("/v1")  # as clients of OpenAI's have it
        return kind(host, port, timeout=SECONDS), base

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        try:
            connection.connect()
        except TimeoutError:
            raise
        except OSError as error:
            hint = "; a router itself speaks no TLS" if self.url.startswith("https") else ""
            raise Said(f"no router at {self.url}: {error.strerror or error}{hint}", NO_SERVER) from error


HERE: Final = Router()


def _refused(answer: http.client.HTTPResponse) -> Said:
    raw = answer.read(65536)
    try:
        error = json.loads(raw)["error"]
        message, code = "\n".join([str(error["message"]), *error.get("problems", ())[1:]]), error.get("code")
    except (ValueError, KeyError, TypeError):
        message, code = f"answered {answer.status} {answer.reason}", None
    return Said(message, STATUSES.get(code, FAILED))


def in_path(alias: str) -> str:
    """An alias as a part of a path."""
    return quote(alias, safe="/:")
