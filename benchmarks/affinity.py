"""Conversations that take turns on one model with as many slots: how many tokens of prompts are computed.

Held against the same conversations one after the other, each on a llama-server that knows nothing yet: what they cost
when nobody is beside them. All of them begin with the same long instructions, as an agent's do; that is where
llama-server's own choice of a slot goes wrong.
"""

import json
import random
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final

import attrs

from benchmarks.peers import Peer, a_place, ask, trio_router
from benchmarks.real import what_is_real
from benchmarks.report import Bar, Report, main
from tests.harness.tiny_gguf import write_tiny_llama

SLOTS: Final = 4
WORDS: Final = ["river", "stone", "paper", "cloud", "garden", "window", "music", "bread", "winter", "letter"]
ANSWER_TOKENS: Final = 16


@attrs.define(eq=False)
class Conversation:
    """Messages so far, and what their prompts cost."""

    chance: random.Random
    messages: list[dict[str, str]]
    computed: int = 0

    @classmethod
    def of(cls, number: int, instruction_words: int) -> "Conversation":
        """The `number`th; all of them begin with the same instructions of so many words."""
        shared = random.Random(0)
        system = " ".join(shared.choice(WORDS) for _ in range(instruction_words))
        messages = [{"role": "system", "content": system}] if instruction_words else []
        return cls(random.Random(number + 1), messages)

    def turn(self, target: str) -> None:
        """Say something, and take the answer for granted."""
        words = " ".join(self.chance.choice(WORDS) for _ in range(self.chance.randint(30, 90)))
        self.messages.append({"role": "user", "content": words})
        body = {"model": "tiny", "messages": self.messages, "max_tokens": ANSWER_TOKENS, "seed": 1}
        status, answer = ask(target, "/v1/chat/completions", body)
        if status != 200:
            raise SystemExit(f"{target} answered {status}: {answer[:300]!r}")
        found = json.loads(answer)
        self.computed += found["timings"]["prompt_n"]
        self.messages.append(found["choices"][0]["message"])


Way = Callable[[Peer, int, int, int], int]


def forget(peer: Peer) -> None:
    """Have the model leave memory, with all that it has cached."""
    ask(peer.target, "/v1/models/eject", {"model": "tiny"})


def alone(peer: Peer, count: int, turns: int, words: int) -> int:
    """Tokens computed when each conversation has a llama-server that knows nothing, and nobody beside it."""
    computed = 0
    for number in range(count):
        forget(peer)
        conversation = Conversation.of(number, words)
        for _ in range(turns):
            conversation.turn(peer.target)
        computed += conversation.computed
    return computed


def in_turn(peer: Peer, count: int, turns: int, words: int) -> int:
    """The same when they take turns, in an order of chance."""
    forget(peer)
    conversations = [Conversation.of(number, words) for number in range(count)]
    order = [conversation for conversation in conversations for _ in range(turns)]
    random.Random(5).shuffle(order)
    for conversation in order:
        conversation.turn(peer.target)
    return sum(conversation.computed for conversation in conversations)


def side_by_side(peer: Peer, count: int, turns: int, words: int) -> int:
    """The same when each goes on as soon as it was answered."""
    forget(peer)
    conversations = [Conversation.of(number, words) for number in range(count)]

    def talk(conversation: Conversation) -> None:
        for _ in range(turns):
            conversation.turn(peer.target)

    threads = [threading.Thread(target=talk, args=(conversation,)) for conversation in conversations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(conversation.computed for conversation in conversations)


WAYS: Final[dict[str, Way]] = {"in turn": in_turn, "side by side": side_by_side}


def run(report: Report) -> None:
    real = what_is_real(report)
    if real is None:
        return
    server, tokenizer = real
    turns = 4 if report.options.quick else 8
    rows = []
    for title, more in {"": [], ", no cache in host memory": ["--cache-ram", "0"]}.items():
        for affinity in (True, False):
            with ExitStack() as stack:
                place = stack.enter_context(a_place(None))
                model = write_tiny_llama(place.folder / "tiny.gguf", tokenizer_from=tokenizer)
                flags = [*more, "-t", "1", "-np", str(SLOTS), "-c", str(SLOTS * 8192), "--no-webui"]
                peer = stack.enter_context(
                    trio_router(
                        place,
                        models={"tiny": {"model_path": model, "flags": flags}},
                        system={"llama_server_path": server.path, "cache_affinity": affinity},
                        body={"model": "tiny", "prompt": "x", "max_tokens": 1},
                        path="/v1/completions",
                    )
                )
                for words in (0, 100, 600):
                    least = alone(peer, SLOTS, turns, words)
                    for name, way in WAYS.items():
                        ratio = way(peer, SLOTS, turns, words) / least
                        rows.append(
                            {
                                "what": f"{name}, {words} words of instructions{title}",
                                "slot": "ours" if affinity else "llama-server's choice",
                                "over alone": ratio,
                            }
                        )
    rows.sort(key=lambda row: str(row["what"]))
    report.table(f"tokens of prompts computed: {SLOTS} conversations of {turns} turns, {SLOTS} slots", rows)
    for name in WAYS:
        worst = max(float(str(row["over alone"])) for row in rows if row["slot"] == "ours" and name in str(row["what"]))
        report.bars.append(
            Bar(name=f"{name}: tokens computed over alone, the worst", measured=worst, unit="", at_most=1.1)
        )


if __name__ == "__main__":
    main("affinity", __doc__ or "", run)
