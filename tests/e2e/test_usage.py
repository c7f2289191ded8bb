"""The token counts that the real llama-server tells, in every dialect it speaks."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.processes import wait_until
from tests.harness.router import RouterProcess
from tests.harness.toml import router_toml
from tests.telemetry.samples import samples

pytestmark = pytest.mark.e2e

MESSAGES = {"messages": [{"role": "user", "content": "Say hello."}]}
DIALECTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {**MESSAGES, "max_tokens": 5}),
    ("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 5}),
    ("/completion", {"prompt": "Once upon a time", "n_predict": 5}),
    ("/v1/responses", {"input": "Say hello.", "max_output_tokens": 5}),
    ("/v1/messages", {**MESSAGES, "max_tokens": 5}),
]


@pytest.fixture(scope="module")
def smol(real_llama: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    flags = ["-c", "1024"]
    pooling = ["--embedding", "--pooling", "mean", *flags]
    models = {"chat": {"model_path": smollm2, "flags": flags}, "embed": {"model_path": smollm2, "flags": pooling}}
    text = router_toml(models=models, system={"gpu_devices": [], "llama_server_path": real_llama})
    environment = {"PATH": os.defpath, "LD_LIBRARY_PATH": str(real_llama.parent)}
    with RouterProcess(tmp_path_factory.mktemp("usage"), text, environment=environment) as router:
        yield router


def tokens(router: RouterProcess, model: str) -> tuple[float, float]:
    told = samples(router.get("/metrics").text)
    count = {kind: told["router_tokens_total", f"kind={kind}", f"model={model}"] for kind in ("input", "output")}
    return count["input"], count["output"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), DIALECTS, ids=[path for path, _ in DIALECTS])
def test_tokens_of(smol: RouterProcess, path: str, body: dict[str, Any], stream: bool) -> None:
    before = tokens(smol, "chat")
    answer = smol.post(path, {"model": "chat", "stream": stream, "temperature": 0, "ignore_eos": True, **body})
    assert answer.status_code == 200, answer.text
    wait_until(lambda: tokens(smol, "chat")[1] - before[1] == 5, what=f"five tokens: {answer.text[-1500:]}")
    assert tokens(smol, "chat")[0] - before[0] >= 4


def test_tokens_of_embeddings(smol: RouterProcess) -> None:
    before = tokens(smol, "embed")
    answer = smol.post("/v1/embeddings", {"model": "embed", "input": "Once upon a time"})
    said = answer.json()["usage"]["prompt_tokens"]
    wait_until(lambda: tokens(smol, "embed")[0] - before[0] == said, what=f"{said} tokens")
    assert tokens(smol, "embed")[1] == before[1]


def test_times_and_its_own_metrics(smol: RouterProcess) -> None:
    for stream in (False, True):
        answer = smol.post(DIALECTS[0][0], {"model": "chat", "stream": stream, **DIALECTS[0][1]})
        assert answer.status_code == 200
    told = samples(smol.get("/metrics").text)
    assert told["router_time_to_first_token_seconds_count", "model=chat"] >= 2
    assert 0 < told["router_time_per_output_token_seconds_sum", "model=chat"] < 10
    own = samples(smol.get("/metrics/backends").text)
    assert own["llamacpp:tokens_predicted_total", "model=chat"] >= 10
