"""The real llama-server behind a queue: conversations that keep their slots, streams that wait and are told so."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.harness.router import RouterProcess
from tests.harness.toml import router_toml

pytestmark = pytest.mark.e2e

INSTRUCTIONS = {"role": "system", "content": "river stone paper cloud garden window music bread " * 60}


def turn(router: RouterProcess, conversation: list[dict[str, str]], words: str) -> int:
    """Say something; how many tokens of the prompt were computed for it."""
    conversation.append({"role": "user", "content": words})
    body = {"model": "tiny", "messages": conversation, "max_tokens": 8}
    with router.client() as client:
        answer = client.post("/v1/chat/completions", json=body).json()
    conversation.append(answer["choices"][0]["message"])
    computed: int = answer["timings"]["prompt_n"]
    return computed


def test_conversations_in_turn_are_computed_as_alone(
    real_llama: Path, tiny_models: tuple[Path, ...], tmp_path: Path
) -> None:
    """With the same instructions, where llama-server by itself would have them in each other's slot."""
    assert real_llama.exists()
    flags = ["-c", "8192", "-np", "2", "-t", "1", "--cache-ram", "0"]
    models = {"tiny": {"model_path": tiny_models[0], "flags": flags}}
    text = router_toml(models=models, system={"gpu_devices": []})
    turns = [f"{word} " * 20 for word in ("letter", "winter", "bread", "stone")]
    with RouterProcess(tmp_path / "router", text, environment={"PATH": os.defpath}) as router:
        alone: list[dict[str, str]] = [INSTRUCTIONS]
        once = sum(turn(router, alone, words) for words in turns)
        with router.client() as client:
            client.post("/v1/models/eject", json={"model": "tiny"}).raise_for_status()
        both: list[list[dict[str, str]]] = [[INSTRUCTIONS], [INSTRUCTIONS]]
        computed = sum(
            turn(router, conversation, f"{number} {words}")
            for words in turns
            for number, conversation in enumerate(both)
        )
    assert computed <= 1.1 * 2 * once


@pytest.mark.parametrize("quart", [False, True])
def test_openais_client_takes_comments_for_what_they_are(
    real_llama: Path, tiny_models: tuple[Path, ...], tmp_path: Path, quart: bool
) -> None:
    assert real_llama.exists()
    models = {"tiny": {"model_path": tiny_models[0], "flags": ["-c", "512", "-np", "1", "-t", "1"]}}
    slow = tmp_path / "slow-llama-server"
    slow.write_text(f'#!/bin/sh\nsleep 1\nexec {real_llama} "$@"\n')
    slow.chmod(0o755)
    text = router_toml(
        models=models, system={"llama_server_path": slow, "gpu_devices": [], "keepalive_after_sec": 0.01}
    )
    got = bytearray()
    headers = {"TE": "trailers"} if quart else {}  # a request that asks for more is answered by Quart

    def seen(response: httpx.Response) -> None:
        stream: Any = response.stream
        response.stream = Copied(stream, got)

    with (
        RouterProcess(tmp_path / "router", text, environment={"PATH": os.defpath}) as router,
        httpx.Client(trust_env=False, timeout=60, event_hooks={"response": [seen]}, headers=headers) as http,
        openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", http_client=http, max_retries=0) as client,
    ):
        messages: Any = [{"role": "user", "content": "Hi"}]
        stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, stream=True)
        assert [chunk.object for chunk in stream if chunk.choices]
        assert bytes(got).startswith(b": ")  # its model had to be loaded
        assert json.loads(bytes(got).split(b"data: ")[1])["object"] == "chat.completion.chunk"


class Copied(httpx.SyncByteStream):
    """A response's body, of which somebody keeps a copy."""

    def __init__(self, stream: httpx.SyncByteStream, copy: bytearray) -> None:
        self.stream, self.copy = stream, copy

    def __iter__(self) -> Any:
        for piece in self.stream:
            self.copy += piece
            yield piece

    def close(self) -> None:
        self.stream.close()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_one_that_made_way_says_what_it_would_have_said(
    real_llama: Path, smollm2: Path, tmp_path: Path, path: str
) -> None:
    """At temperature 0, and where a prompt is computed token by token, as an answer is.

    In a batch it comes to other digits, by which a small model soon says something else, though no worse. So it does where
    what it had said is read as other tokens; numbers are not.
    """
    assert real_llama.exists()

    def asking(what: str) -> dict[str, Any]:
        return {"prompt": what} if path == "/v1/completions" else {"messages": [{"role": "user", "content": what}]}

    body = {"model": "smollm2", "max_tokens": 120, "temperature": 0, "ignore_eos": True}
    long = body | asking("Count with commas between the numbers, and go on: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,")
    short = body | asking("No.") | {"max_tokens": 1}
    models = {"smollm2": {"model_path": smollm2, "flags": ["-c", "1024", "-np", "1", "-t", "1", "-ub", "1"]}}
    text = router_toml(models=models, system={"gpu_devices": [], "preempt_low": True})
    found: list[dict[str, Any]] = []
    with (
        RouterProcess(tmp_path / "router", text, environment={"PATH": os.defpath}) as router,
        router.client(timeout=120) as client,
    ):

        def ask(what: dict[str, Any], priority: str) -> None:
            answer = client.post(path, json=what, headers={"X-Request-Priority": priority})
            found.append(answer.raise_for_status().json())

        ask(long, "low")
        alone = found.pop()
        low = threading.Thread(target=ask, args=(long, "low"))
        low.start()
        for _ in range(2):
            time.sleep(alone["timings"]["predicted_ms"] / 4000)
            ask(short, "high")
        low.join()
        log = router.stderr
    interrupted = found[-1]
    assert log.count("a high request has its slot") >= 1
    assert "asked otherwise" not in log
    assert _said(interrupted) == _said(alone)
    assert interrupted["usage"]["completion_tokens"] == alone["usage"]["completion_tokens"] == 120
    assert interrupted["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    assert interrupted["choices"][0]["finish_reason"] == "length"
    assert interrupted.keys() == alone.keys()


def _said(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    said: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return said
