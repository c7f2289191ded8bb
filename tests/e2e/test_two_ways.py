"""The real llama-server bare, and through both ways in: the same bytes but for the time of day and the clock."""

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest

from tests.harness.processes import wait_until
from tests.harness.router import RouterProcess
from tests.harness.toml import router_toml

pytestmark = pytest.mark.e2e

FLAGS = ["-c", "2048", "-np", "1", "-t", "1"]
QUART = {"TE": "trailers"}
"""Any header that asks for more than the plain case."""
OURS = {
    "content-length",
    "x-request-id",
    "request-id",
    "x-queue-time-ms",
    "x-queue-position",
    "x-accel-buffering",
    "cache-control",
}
THEIRS = {"server", "keep-alive", "date", "connection", "access-control-allow-origin"}
"""Of llama-server's headers: hop-by-hop, or its own opinion on web pages."""
CLOCK = re.compile(
    rb'"(?:created|created_at|completed_at)":\d+|"(?:id|item_id|call_id)":"[^"]*"|"timings":\{[^{}]*\}'
    rb'|"(?:t_[a-z_]+|[a-z_]*_ms|[a-z_]*_per_second|tokens_cached|generation_settings)":[-\d.e]+'
)


@attrs.frozen
class Ways:
    """Where to ask."""

    bare: str
    router: str
    passing: str
    """A router that sends every request as it came (`system.stop_at_once = false`)."""

    def ask(self, path: str, body: Any, *, raw: bytes | None = None) -> list[httpx.Response]:
        """The answers of the bare server and of both ways of both routers."""
        content = httpx.Request("POST", "http://x", json=body).content if raw is None else raw
        found = []
        ways = [(router, headers) for router in (self.router, self.passing) for headers in ({}, QUART)]
        for base, headers in ((self.bare, {}), *ways):
            with httpx.Client(trust_env=False, timeout=60) as client:
                found.append(
                    client.post(base + path, content=content, headers={"Content-Type": "application/json", **headers})
                )
        return found


@pytest.fixture(scope="module")
def ways(real_llama: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    folder = tmp_path_factory.mktemp("ways")
    models = {
        "smollm2": {"model_path": smollm2, "flags": FLAGS},
    }
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [real_llama, "--model", smollm2, "--alias", "smollm2", *FLAGS, "--host", "127.0.0.1", "--port", str(port)]
    environment = {"PATH": os.defpath, "LD_LIBRARY_PATH": str(real_llama.parent)}
    with (
        (folder / "bare.log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment) as bare,
        RouterProcess(folder, router_toml(models=models, system={"gpu_devices": []})) as router,
        RouterProcess(
            folder / "passing", router_toml(models=models, system={"gpu_devices": [], "stop_at_once": False})
        ) as passing,
    ):

        def ready() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_until(ready, timeout_seconds=60)
            yield Ways(f"http://127.0.0.1:{port}", router.url, passing.url)
        finally:
            bare.terminate()


PLAIN = {"model": "smollm2", "temperature": 0, "seed": 1, "cache_prompt": False}
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
MESSAGES = [{"role": "user", "content": "Name three colours."}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 12}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 12, "stream": True}),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}},
        ),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 30, "stop": ["e", "\n"], "stream": False}),
        ("/v1/chat/completions", {"messages": MESSAGES, "grammar": r'root ::= "😀 \"ö\\" <b>\n"'}),
        ("/v1/chat/completions", {"messages": MESSAGES, "grammar": 'root ::= ""'}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "stream_options": {"include_usage": False}}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "n": 2}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "tools": TOOLS}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 2, "tools": TOOLS, "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 5000}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 5000}], "stream": True}),
        ("/v1/completions", {"prompt": ["Once", "Twice"], "max_tokens": 3, "logprobs": 1}),
        ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 3, "stream": True}),
        ("/v1/completions", {"prompt": "Once", "max_tokens": 3, "n": 2, "stream": True}),
        ("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 8}),
        ("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 8, "stream": True, "logprobs": 2}),
        ("/v1/responses", {"input": "Name three colours.", "max_output_tokens": 6}),
        ("/v1/responses", {"input": "Name three colours.", "max_output_tokens": 6, "stream": True}),
        ("/v1/responses", {"input": MESSAGES, "max_output_tokens": 6, "instructions": "Be brief."}),
        ("/v1/responses", {"input": "word " * 5000}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 6}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 6, "stream": True}),
        ("/completion", {"prompt": "Once", "n_predict": 3, "n_probs": 2, "stream": True}),
        (
            "/completion",
            {"prompt": "Once", "n_predict": 2, "response_fields": ["content", "generation_settings/top_k"]},
        ),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 9, "response_format": {"type": "json_object"}}),
        ("/v1/chat/completions", {"messages": MESSAGES, "grammar": "root ::= (", "stream": True}),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 3}),
        ("/v1/messages/count_tokens", {"messages": MESSAGES}),
        ("/tokenize", {"content": "Hello, wörld", "with_pieces": True}),
        ("/detokenize", {"tokens": [1, 2, 3]}),
        ("/apply-template", {"messages": MESSAGES}),
        ("/v1/chat/completions", {"messages": "no list"}),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}),
        ("/v1/completions", {}),
        ("/v1/embeddings", {"input": "not with this model"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "stream" if value.get("stream") else "plain",
)
def test_the_same_bytes(ways: Ways, path: str, body: dict[str, Any]) -> None:
    bare, *ours = ways.ask(path, PLAIN | body)
    for answer in ours:
        assert answer.status_code == bare.status_code
        assert CLOCK.sub(b"#", answer.content) == CLOCK.sub(b"#", bare.content)
        passed = {name: value for name, value in answer.headers.items() if name not in OURS | THEIRS}
        expected = {name: value for name, value in bare.headers.items() if name not in OURS | THEIRS}
        assert passed == expected
        assert answer.headers["x-request-id"]
        assert int(answer.headers.get("content-length", len(answer.content))) == len(answer.content)
    names = [{name for name in answer.headers if name != "date"} for answer in ours]
    assert names == names[:1] * 4
