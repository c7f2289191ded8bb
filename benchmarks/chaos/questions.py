"""What is asked, what is a right answer, and what else may become of a request."""

import json
from typing import Any, Final

import attrs

ALIASES: Final = ("one", "two", "three")
PATHS: Final = ("/v1/chat/completions", "/v1/completions")
PROMPTS: Final = ("alpha", "bravo charlie", "delta echo foxtrot", "golf hotel india juliet kilo")
LENGTHS: Final = (4, 48, 256)
"""Tokens."""
REFUSALS: Final = frozenset(
    {
        "backend_crashed", "backend_unavailable", "backend_timeout", "bad_backend_response", "load_timeout",
        "model_failed", "queue_full", "queue_timeout", "shutting_down",
    }
)  # fmt: skip
"""Codes of the errors that a request may be refused with while things go wrong."""


class Violation(Exception):
    """Raised when something happened that must not."""


class BrokenOff(Exception):
    """Raised when a stream that had begun ended with an error event."""


class Refused(Exception):
    """Raised when a request got an error of the router's, or llama-server's own."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@attrs.frozen
class Question:
    """A request, but for who sends it and how."""

    alias: str
    path: str
    prompt: str
    tokens: int

    def body(self, *, stream: bool) -> dict[str, Any]:
        said: dict[str, Any] = (
            {"messages": [{"role": "user", "content": self.prompt}]} if "chat" in self.path else {"prompt": self.prompt}
        )
        return {
            **said, "model": self.alias, "max_tokens": self.tokens, "temperature": 0, "seed": 1, "stream": stream,
            "cache_prompt": False, "ignore_eos": True,
        }  # fmt: skip


QUESTIONS: Final = tuple(
    Question(alias, path, prompt, tokens)
    for alias in ALIASES
    for path in PATHS
    for prompt in PROMPTS
    for tokens in LENGTHS
)


def words(answer: dict[str, Any]) -> str:
    """Of an answer, or of one event of a stream."""
    text = ""
    for choice in answer["choices"]:
        part = choice.get("message") or choice.get("delta") or choice
        text += part.get("content") or part.get("text") or ""
    return text


def refusal(status: int, raw: bytes) -> Exception:
    """What an answer that is none means: `Refused`, or a `Violation`."""
    try:
        error = json.loads(raw)["error"]
        code = error["code"]
    except (ValueError, KeyError, TypeError):
        return Violation(f"{status} without an error object: {raw[:500]!r}")
    if status == code == 500 and error["message"] == "Compute error.":  # llama-server's own words pass unchanged
        return Refused("compute error")
    if code not in REFUSALS:
        return Violation(f"{status} {code}: {raw[:500]!r}")
    return Refused(code)


def text_of_stream(raw: bytes) -> str:
    """The words of a stream that ended. Raises BrokenOff, Violation."""
    text, finished, done = "", False, False
    for line in raw.decode().splitlines():
        if not line.startswith("data: "):
            continue
        if done:
            raise Violation(f"more after [DONE]: {line}")
        if line == "data: [DONE]":
            done = True
            continue
        try:
            event = json.loads(line.removeprefix("data: "))
        except ValueError as error:
            raise Violation(f"an event that is no JSON: {line}") from error
        if "error" in event:
            if not raw.endswith(line.encode() + b"\n\n"):
                raise Violation(f"more after an error event: {raw[-500:]!r}")
            raise BrokenOff(f"{event['error']['code']}")
        text += words(event)
        finished = finished or any(choice.get("finish_reason") for choice in event["choices"])
    if not (finished and done):
        raise Violation(f"a stream ended cleanly in the middle, finish_reason={finished}, [DONE]={done}: {text!r}")
    return text
