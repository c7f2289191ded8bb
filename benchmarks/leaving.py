"""Clients that leave: how soon their slot can be used again, in the middle of a prompt and of an answer, streamed or not.

A real llama-server with two slots computes for a stream all along. In its other slot a long request is begun and left;
then one for a single token is sent: what it takes longer than in a slot that was free is what the one that left still
held. The same with `stop_at_once = false`, when every request goes to llama-server as it came, and in the prompt where
nothing is computed beside. Of a message (`/v1/messages`) llama-server says nothing in the middle of its prompt, so there
is no bar for that. Takes some 14 minutes, `--quick` 8.
"""

import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import attrs

from benchmarks.machine import until_quiet
from benchmarks.peers import Peer, a_place, ask, trio_router
from benchmarks.real import what_is_real
from benchmarks.report import Bar, Report, main, median
from trio_router.config import LlamaServer

MODEL: Final = "smollm2"
BATCH: Final = 16
FLAGS: Final = ["-t", "1", "-np", "2", "-c", "8192", "-b", str(BATCH), "-ub", str(BATCH), "--no-webui"]
ONE_SLOT: Final = ["-np", "1", "-c", "4096"]
CHAT: Final = "/v1/chat/completions"
RESPONSES: Final = "/v1/responses"
MESSAGES: Final = "/v1/messages"
NATIVE: Final = "/completion"
TOOLS: Final = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
PROMPT_WORDS: Final = 800
TOKENS: Final = 400
INTO_SECONDS: Final = 1.5
"""How long a request has been computed when its client leaves."""
LONGEST_SECONDS: Final = 180.0
SLOT_SECONDS: Final = 0.3
_numbers = itertools.count()


@attrs.frozen(kw_only=True)
class Case:
    """What is left, and when."""

    path: str
    stream: bool
    stage: str
    tools: bool = False

    def body(self) -> dict[str, Any]:
        words = "word " * PROMPT_WORDS if self.stage == "prompt" else "Tell a story."
        common = {"model": MODEL, "stream": self.stream, "cache_prompt": False, "ignore_eos": True}
        if self.path == RESPONSES:
            return {**common, "input": words, "max_output_tokens": TOKENS}
        if self.path == NATIVE:
            return {**common, "prompt": words, "n_predict": TOKENS}
        if self.path == MESSAGES:  # it takes what it knows of a prompt, whatever is asked
            words = f"{next(_numbers)} {words}"
        if self.tools:
            common["tools"] = TOOLS
        return {**common, "messages": [{"role": "user", "content": words}], "max_tokens": TOKENS}

    @property
    def barred(self) -> bool:
        """Whether llama-server can be made to stop."""
        return self.path != MESSAGES or self.stage != "prompt"

    def __str__(self) -> str:
        tools = " with tools" if self.tools else ""
        path = self.path.removeprefix("/v1/").removeprefix("/")
        return f"{path}{tools}, {'stream' if self.stream else 'whole'}, in the {self.stage}"


CASES: Final = [
    *(
        Case(path=path, stream=stream, stage=stage)
        for path in (CHAT, RESPONSES, MESSAGES)
        for stage in ("prompt", "answer")
        for stream in (False, True)
    ),
    *(Case(path=CHAT, tools=True, stream=False, stage=stage) for stage in ("prompt", "answer")),
    *(Case(path=NATIVE, stream=False, stage=stage) for stage in ("prompt", "answer")),
]


def connect(peer: Peer, path: str, body: dict[str, Any]) -> socket.socket:
    """A connection on which a request was sent."""
    host, port = peer.target.split(":")
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n"
    connection = socket.create_connection((host, int(port)), timeout=LONGEST_SECONDS)
    connection.sendall(head.encode() + b"\r\n" + raw)
    return connection


@contextmanager
def a_stream_beside(peer: Peer) -> Iterator[None]:
    """One slot computes all along."""
    over = threading.Event()
    begun = threading.Event()

    def read() -> None:
        while not over.is_set():
            with connect(peer, CHAT, Case(path=CHAT, stream=True, stage="answer").body()) as connection:
                while not over.is_set() and connection.recv(65536):
                    begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        begun.wait(LONGEST_SECONDS)
        yield
    finally:
        over.set()
        reader.join()


def one_token_seconds(peer: Peer) -> float:
    """Of a request in the slot that is, or is to be, free."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "cache_prompt": False}
    began = time.perf_counter()
    status, answer = ask(peer.target, CHAT, body, LONGEST_SECONDS + 10)
    if status != 200:
        raise SystemExit(f"{status}: {answer[:300]!r}")
    return time.perf_counter() - began


def held_seconds(peer: Peer, case: Case) -> float:
    """How much longer one token takes after a client left."""
    quiet = one_token_seconds(peer)
    with connect(peer, case.path, case.body()):
        time.sleep(INTO_SECONDS)  # until it is in the middle of its stage
    return max(0.0, one_token_seconds(peer) - quiet)


def batch_seconds(peer: Peer) -> float:
    """Of a prompt, beside the stream."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "word " * 100}], "max_tokens": 1}
    _, answer = ask(peer.target, CHAT, {**body, "cache_prompt": False}, LONGEST_SECONDS)
    return float(json.loads(answer)["timings"]["prompt_per_token_ms"]) / 1e3 * BATCH


def alone(report: Report, server: LlamaServer, model: Path) -> dict[Case, float]:
    """Each case's median in the prompt, with one slot and nobody beside."""
    models = {MODEL: {"model_path": model, "flags": [*FLAGS, *ONE_SLOT]}}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    times = 1 if report.options.quick else 3
    with (
        a_place(None) as place,
        trio_router(place, models=models, system={"llama_server_path": server.path}, body=body) as peer,
    ):
        until_quiet(report.options.patience_seconds)
        return {
            case: median(held_seconds(peer, case) for _ in range(times)) or 0.0
            for case in CASES
            if case.stage == "prompt"
        }


def measured(report: Report, server: LlamaServer, model: Path, *, at_once: bool) -> tuple[dict[Case, float], float]:
    """Each case's median, and what a batch takes."""
    found: dict[Case, float] = {}
    times = 1 if report.options.quick or not at_once else 5
    system = {"llama_server_path": server.path, "stop_at_once": at_once}
    models = {MODEL: {"model_path": model, "flags": FLAGS}}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    with a_place(None) as place, trio_router(place, models=models, system=system, body=body) as peer:
        until_quiet(report.options.patience_seconds)
        with a_stream_beside(peer):
            batch = batch_seconds(peer)
            for case in CASES:
                found[case] = median(held_seconds(peer, case) for _ in range(times)) or 0.0
    return found, batch


def run(report: Report) -> None:
    """The whole."""
    real = what_is_real(report)
    if real is None:
        return
    server, model = real
    at_once, batch = measured(report, server, model, at_once=True)
    as_it_came, _ = measured(report, server, model, at_once=False)
    report.table(
        "seconds for which a slot is held after its client left",
        [{"what": str(case), "default": at_once[case], "stop_at_once = false": as_it_came[case]} for case in CASES],
    )
    report.table(
        "the same in the prompt, with one slot and nothing beside",
        [{"what": str(case), "default": seconds} for case, seconds in alone(report, server, model).items()],
    )
    report.note(
        f"a batch of {BATCH} tokens of a prompt takes {batch:.2f} s on the one core that a stream computes on too; "
        "llama-server looks up between batches only, and may have begun the next"
    )
    for stage, most in (("answer", SLOT_SECONDS), ("prompt", 2 * batch + SLOT_SECONDS)):
        worst = max(seconds for case, seconds in at_once.items() if case.stage == stage and case.barred)
        report.bars.append(Bar(name=f"held after leaving in the {stage}", measured=worst, unit="s", at_most=most))


if __name__ == "__main__":
    main("leaving", __doc__ or "", run)
