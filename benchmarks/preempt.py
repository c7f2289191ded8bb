"""How soon a high request has its first token while low ones fill every slot: SmolLM2, one core, two slots.

Held against the same request when nobody else is there, before and after. The low ones are whole answers, which go on
later where they were; how many came to their end meanwhile is counted. Once more with `preempt_low` off, for comparison.
"""

import http.client
import itertools
import json
import statistics
import threading
import time
from contextlib import ExitStack
from typing import Final, Self

from benchmarks.peers import Peer, a_place, trio_router
from benchmarks.real import what_is_real
from benchmarks.report import Bar, Report, main

SLOTS: Final = 2
PROMPT_WORDS: Final = 150
LOW_TOKENS: Final = 200
PAUSE_SECONDS: Final = 0.5
PATIENCE_SECONDS: Final = 300.0

_numbers = itertools.count()


def question(**more: object) -> bytes:
    """One that has not been asked before."""
    number = next(_numbers)
    text = f"{number} " + "river stone paper cloud garden " * (PROMPT_WORDS // 5)
    return json.dumps({"model": "smollm2", "messages": [{"role": "user", "content": text}], **more}).encode()


def first_token_seconds(peer: Peer) -> float:
    """Of a high request for a stream."""
    connection = http.client.HTTPConnection(peer.target, timeout=PATIENCE_SECONDS)
    headers = {"content-type": "application/json", "x-request-priority": "high"}
    try:
        began = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", question(stream=True, max_tokens=4), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise SystemExit(f"{peer.target} answered {answer.status}")
        while line := answer.readline():
            if b'"content":"' in line:
                return time.perf_counter() - began
        raise SystemExit("a stream without a token")
    finally:
        connection.close()


class Low:
    """Clients that ask for long answers, one after the other."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.over = threading.Event()
        self.answered = 0
        self.problems: list[str] = []
        self.threads = [threading.Thread(target=self._ask) for _ in range(SLOTS + 1)]

    def _ask(self) -> None:
        headers = {"content-type": "application/json", "x-request-priority": "low"}
        while not self.over.is_set():
            connection = http.client.HTTPConnection(self.peer.target, timeout=PATIENCE_SECONDS)
            body = question(max_tokens=LOW_TOKENS, ignore_eos=True)
            try:
                connection.request("POST", "/v1/chat/completions", body, headers)
                answer = connection.getresponse()
                made = json.loads(answer.read())["usage"]["completion_tokens"]
            except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
                self.problems.append(f"a low request failed: {error!r}")
                return
            finally:
                connection.close()
            if made != LOW_TOKENS:
                self.problems.append(f"a low request got {made} tokens, not {LOW_TOKENS}")
                return
            self.answered += 1

    def __enter__(self) -> Self:
        for thread in self.threads:
            thread.start()
        time.sleep(4 * PAUSE_SECONDS)  # until low ones fill every slot
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()
        if self.problems:
            raise SystemExit("; ".join(self.problems))


def first_tokens(peer: Peer, tries: int) -> list[float]:
    """Of so many high requests, each in its own time."""
    found = []
    for _ in range(tries):
        found.append(first_token_seconds(peer))
        time.sleep(PAUSE_SECONDS)  # a request now and then
    return found


def run(report: Report) -> None:
    real = what_is_real(report)
    if real is None:
        return
    server, model = real
    tries = 3 if report.options.quick else 8
    rows = []
    for preempt in (True, False):
        with ExitStack() as stack:
            place = stack.enter_context(a_place(report.options.cores))
            peer = stack.enter_context(
                trio_router(
                    place,
                    models={"smollm2": {"model_path": model, "flags": ["-t", "1", "-np", str(SLOTS), "-c", "4096"]}},
                    system={"llama_server_path": server.path, "preempt_low": preempt},
                    body={"model": "smollm2", "prompt": "x", "max_tokens": 1},
                    path="/v1/completions",
                )
            )
            some = tries if preempt else 2
            alone = first_tokens(peer, some)
            with Low(peer) as low:
                filled = statistics.median(first_tokens(peer, 2 * some if preempt else 1))
            quiet = statistics.median([*alone, *first_tokens(peer, some)])
            rows.append(
                {
                    "preempt_low": "on" if preempt else "off",
                    "first token, quiet, ms": quiet * 1e3,
                    "first token, low everywhere, ms": filled * 1e3,
                    "over quiet": filled / quiet,
                    "low answers meanwhile": low.answered,
                }
            )
            if preempt:
                report.bars.append(
                    Bar(name="high's first token over quiet", measured=filled / quiet, unit="", at_most=1.2)
                )
    report.table(f"a high request while low ones fill {SLOTS} slots", rows)


if __name__ == "__main__":
    main("preempt", __doc__ or "", run)
