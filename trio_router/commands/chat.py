"""`run`: one answer, or a talk."""

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

from cyclopts import Parameter

from trio_router.commands.options import AsJson
from trio_router.commands.said import CLEAN, Said
from trio_router.commands.talk import HERE, Router

Message = dict[str, str]


def run(
    model: str,
    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    /,
    *,
    router: Router = HERE,
    as_json: AsJson = False,
) -> int:
    """Answer a prompt, or talk.

    Parameters
    ----------
    prompt
        Without it what a pipe brings; at a terminal, a talk.
    """
    if prompt is None and (as_json or not sys.stdin.isatty()):
        prompt = sys.stdin.read()
    if as_json:
        for event in answer(router, model, [{"role": "user", "content": prompt or ""}]):
            print(json.dumps(event, ensure_ascii=False), flush=True)
        return CLEAN
    if prompt is not None:
        say(router, model, [{"role": "user", "content": prompt}])
        return CLEAN
    print(f"Talking to {model}; Ctrl-D ends it.")
    talk: list[Message] = []
    while True:
        try:
            words = input("> ").strip()
        except EOFError:
            print()
            return CLEAN
        if words:
            talk.append({"role": "user", "content": words})
            try:
                talk.append({"role": "assistant", "content": say(router, model, talk)})
            except KeyboardInterrupt:  # enough of this answer
                talk.pop()
                print()


def say(router: Router, model: str, talk: list[Message]) -> str:
    """Print the answer as it comes, and return it. Raises Said."""
    whole = ""
    for event in answer(router, model, talk):
        piece = _text(event)
        whole += piece
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    return whole


def answer(router: Router, model: str, talk: list[Message]) -> Iterator[dict[str, Any]]:
    """The events of an answer. Raises Said."""
    begun = False
    for _, event in router.events("/v1/chat/completions", {"model": model, "messages": talk, "stream": True}):
        if "error" in event:
            if begun:
                print()
            raise Said(f"broken off: {event['error']['message']}")
        begun = True
        yield event


def _text(event: dict[str, Any]) -> str:
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        return str(delta.get("content") or delta.get("reasoning_content") or "")
    return ""
