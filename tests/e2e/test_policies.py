"""What a policy writes into a body, the real llama-server goes by, in every dialect."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.router import RouterProcess
from tests.harness.toml import router_toml

pytestmark = pytest.mark.e2e

MOST = 6
MESSAGES = {"messages": [{"role": "user", "content": "Say hello."}]}
PROMPT = {"prompt": "Once upon a time"}
CHAT, MESSAGE, RESPONSE, RAW = "/v1/chat/completions", "/v1/messages", "/v1/responses", "/completion"
ASKED: list[tuple[str, dict[str, Any], int]] = [
    (CHAT, MESSAGES, MOST),
    (CHAT, {**MESSAGES, "max_tokens": 3}, 3),
    (CHAT, {**MESSAGES, "max_completion_tokens": 3}, 3),
    (CHAT, {**MESSAGES, "max_completion_tokens": 300}, MOST),
    (CHAT, {**MESSAGES, "n_predict": 300}, MOST),
    (CHAT, {**MESSAGES, "max_tokens": "300"}, MOST),
    (CHAT, {**MESSAGES, "max_tokens": -1}, MOST),
    ("/v1/completions", PROMPT, MOST),
    ("/v1/completions", {**PROMPT, "max_tokens": 300}, MOST),
    ("/v1/completions", {**PROMPT, "n_predict": 300}, MOST),
    (RAW, PROMPT, MOST),
    (RAW, {**PROMPT, "n_predict": 3}, 3),
    (RAW, {**PROMPT, "n_predict": -1}, MOST),
    (RAW, {**PROMPT, "max_tokens": 300}, MOST),
    (RESPONSE, {"input": "Say hello."}, MOST),
    (RESPONSE, {"input": "Say hello.", "max_output_tokens": 300}, MOST),
    (RESPONSE, {"input": "Say hello.", "max_tokens": 300, "n_predict": 300}, MOST),
    (MESSAGE, {**MESSAGES, "max_tokens": 300}, MOST),
    (MESSAGE, {**MESSAGES, "max_tokens": 3}, 3),
    (MESSAGE, {**MESSAGES, "max_tokens": 300, "n_predict": 300}, MOST),
]


@pytest.fixture(scope="module")
def router(
    real_llama: Path, tiny_models: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RouterProcess]:
    table = {
        "model_path": tiny_models[0],
        "flags": ["-c", "1024", "-t", "1"],
        "set": {"ignore_eos": True, "temperature": 0.0},
        "max_output_tokens": MOST,
        "variants": {"marked": {"set": {"chat_template_kwargs": {"mark": 1}}, "max_output_tokens": 2}},
    }
    text = router_toml(models={"tiny": table}, system={"gpu_devices": [], "llama_server_path": real_llama})
    environment = {"PATH": os.defpath, "LD_LIBRARY_PATH": str(real_llama.parent)}
    with RouterProcess(tmp_path_factory.mktemp("policies"), text, environment=environment) as started:
        yield started


def generated(answer: Any) -> int:
    usage = answer.get("usage") or {}
    count = usage.get("completion_tokens", usage.get("output_tokens", answer.get("tokens_predicted")))
    assert isinstance(count, int), answer
    return count


@pytest.mark.parametrize(("path", "body", "count"), ASKED)
def test_no_answer_is_longer(router: RouterProcess, path: str, body: dict[str, Any], count: int) -> None:
    answer = router.post(path, {"model": "tiny", **body})
    assert answer.status_code == 200, answer.text
    assert generated(answer.json()) == count


def test_a_variant_and_keep_alive(router: RouterProcess) -> None:
    answer = router.post(CHAT, {"model": "tiny:marked", "keep_alive": "5m", **MESSAGES}).json()
    assert (generated(answer), answer["model"]) == (2, "tiny"), "as llama-server says it"
    assert len(router.servers()) == 1
