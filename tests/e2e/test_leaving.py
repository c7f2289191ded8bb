"""A client leaves while llama-server computes for another one too: its slot is free at once, whatever the stage."""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness.router import RouterProcess, chat_body
from tests.harness.toml import router_toml

pytestmark = [pytest.mark.e2e, pytest.mark.once]

LONG = [{"role": "user", "content": "word " * 1500}]
"""Half a minute of prompt, in batches of 0.3 s."""
MANY = 1800
"""Tokens: half a minute, too."""


@pytest.fixture(scope="module")
def busy(real_llama: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    """A router whose llama-server has two slots, one of which streams all along."""
    assert real_llama.exists()
    flags = ["-c", "8192", "-np", "2", "-t", "1", "-b", "32", "-ub", "32"]
    models = {"smollm2": {"model_path": smollm2, "flags": flags}}
    text = router_toml(models=models, system={"gpu_devices": []})
    with RouterProcess(tmp_path_factory.mktemp("busy"), text, environment={"PATH": os.defpath}) as router:
        over = threading.Event()

        def read() -> None:
            body = chat_body("smollm2", stream=True, max_tokens=4000, ignore_eos=True)
            while not over.is_set():
                with router.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    for _ in answer.iter_bytes():
                        if over.is_set():
                            break

        reader = threading.Thread(target=read)
        reader.start()
        try:
            router.wait_for_status("smollm2", status="ready", active=1, timeout_seconds=60)
            yield router
        finally:
            over.set()
            reader.join(30)


CHAT = "/v1/chat/completions"
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize(
    ("path", "more", "stage", "stream", "by_quart"),
    [
        (CHAT, {}, "prompt", False, False),
        (CHAT, {}, "prompt", True, True),
        (CHAT, {}, "tokens", False, True),
        (CHAT, {}, "tokens", True, False),
        (CHAT, {"tools": TOOLS}, "prompt", False, True),
        (CHAT, {"tools": TOOLS}, "tokens", False, False),
        ("/v1/messages", {}, "tokens", False, False),
        ("/completion", {"prompt": "Once upon a time"}, "tokens", False, True),
        ("/completion", {"prompt": "word " * 1500}, "prompt", True, False),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_its_slot_is_free_at_once(
    busy: RouterProcess, path: str, more: dict[str, Any], stage: str, *, stream: bool, by_quart: bool
) -> None:
    if stage == "prompt":
        more = {"messages": LONG, **more}
    body = chat_body("smollm2", stream=stream, max_tokens=MANY, ignore_eos=True, cache_prompt=False) | more
    with busy.start_raw(json.dumps(body).encode(), path=path, by_quart=by_quart) as connection:
        busy.wait_for_status("smollm2", active=2)
        if stage == "tokens" and stream:
            assert b"data:" in connection.recv(4096) + connection.recv(4096)
        time.sleep(0.5 if stage == "prompt" else 1.0)
    left = time.monotonic()
    answer: httpx.Response = busy.chat("smollm2", max_tokens=1)
    assert answer.status_code == 200
    assert time.monotonic() - left < 6  # or half a minute
    assert int(answer.headers["x-queue-time-ms"]) < 3000


@pytest.mark.parametrize("by_quart", [False, True])
def test_a_name_for_the_conversation_does_not_hold_the_slot(busy: RouterProcess, *, by_quart: bool) -> None:
    """With that header llama-server computes on for who left: its own page comes back to the answer."""
    body = json.dumps(chat_body("smollm2", stream=True, max_tokens=MANY, ignore_eos=True)).encode()
    with busy.start_raw(body, headers="X-Conversation-Id: one\r\n", by_quart=by_quart) as connection:
        busy.wait_for_status("smollm2", active=2)
        assert b"data:" in connection.recv(4096) + connection.recv(4096)
    left = time.monotonic()
    assert busy.chat("smollm2", max_tokens=1).status_code == 200
    assert time.monotonic() - left < 6  # or half a minute


def test_what_cannot_be_stopped_keeps_its_slot_and_nobody_waits_behind_it_in_llama_server(busy: RouterProcess) -> None:
    """A message in its prompt: the next request waits here until llama-server is done with it, and is answered then."""
    words = [{"role": "user", "content": "word " * 600}]
    body = chat_body("smollm2", messages=words, max_tokens=3)
    with busy.start_raw(json.dumps(body).encode(), path="/v1/messages"):
        busy.wait_for_status("smollm2", active=2)
        time.sleep(0.3)
    busy.wait_for_status("smollm2", active=1)
    answer: httpx.Response = busy.chat("smollm2", max_tokens=1)
    assert answer.status_code == 200
    assert int(answer.headers["x-queue-time-ms"]) > 100
    quick: httpx.Response = busy.chat("smollm2", max_tokens=1)
    assert int(quick.headers["x-queue-time-ms"]) < 100
