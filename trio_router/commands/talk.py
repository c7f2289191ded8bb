"""How commands talk to a router that runs: the standard library's client, because `ps` should be back at once."""

import http.client
import json
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import quote, urlsplit

import attrs

CLEAN: Final = 0
FAILED: Final = 1
NO_SERVER: Final = 3
NOT_FOUND: Final = 4
BAD_CONFIG: Final = 78
"""sysexits' EX_CONFIG. `serve` and `check` say 2, as their contract has it."""
STATUSES: Final = {
    "model_not_found": NOT_FOUND, "request_not_found": NOT_FOUND, "not_found": NOT_FOUND, "invalid_config": BAD_CONFIG,
}  # fmt: skip
"""By the error's code."""
SECONDS: Final = 10.0


class Said(Exception):
    """Raised when a command ends with something to say; `status` is the exit status."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


@attrs.frozen(kw_only=True)
class Router:
    """The router that is spoken to."""

    url: str
    key: str | None = attrs.field(default=None, repr=False)

    def get(self, path: str, seconds: float = SECONDS) -> Any:
        """The object at `path`. Raises Said."""
        with self.answer("GET", path, None, seconds) as answer:
            return json.loads(answer.read())

    def post(self, path: str, body: Mapping[str, Any] | None = None, seconds: float | None = SECONDS) -> Any:
        """What is answered to `body`; `seconds` None waits for ever. Raises Said."""
        with self.answer("POST", path, body or {}, seconds) as answer:
            return json.loads(answer.read())

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
        parts = urlsplit(self.url if "://" in self.url else f"http://{self.url}")
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise Said(f"{self.url!r} is not the URL of a router", 2)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=SECONDS)
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            connection.connect()
            connection.sock.settimeout(seconds)
            connection.request(
                method, parts.path.rstrip("/") + path, None if body is None else json.dumps(body), headers
            )
            answer = connection.getresponse()
            if answer.status >= 400:
                raise _refused(answer)
            yield answer
        except TimeoutError as error:
            raise Said(f"no answer from {self.url} within {seconds or SECONDS:g} s", NO_SERVER) from error
        except (ConnectionError, socket.gaierror) as error:
            raise Said(f"no router at {self.url}: {error.strerror or error}", NO_SERVER) from error
        except http.client.HTTPException as error:
            raise Said(f"{self.url} broke off: {type(error).__name__}") from error
        finally:
            connection.close()


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


def print_json(found: Any) -> None:
    """For programs."""
    json.dump(found, sys.stdout, indent=2, ensure_ascii=False)
    print()
