"""`run`: one answer, or a talk."""

import sys
from typing import Any

from trio_router.commands.talk import CLEAN, Router, Said

Message = dict[str, str]


def run(router: Router, model: str, prompt: str | None) -> int:
    """Answer `prompt`; without one talk, or read it from a pipe."""
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
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
    for _, event in router.events("/v1/chat/completions", {"model": model, "messages": talk, "stream": True}):
        if "error" in event:
            print()
            raise Said(f"broken off: {event['error']['message']}")
        piece = _text(event)
        whole += piece
        sys.stdout.write(piece)
        sys.stdout.flush()
    print()
    return whole


def _text(event: dict[str, Any]) -> str:
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        return str(delta.get("content") or delta.get("reasoning_content") or "")
    return ""
