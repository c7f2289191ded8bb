"""The steps of `on_oom` on a real header."""

from pathlib import Path

import pytest

from tests.memory.gguf_bytes import LLAMA, LLAMA_DATA, LLAMA_TENSORS, gguf
from trio_router.config.schema import ModelConfig, OomStep
from trio_router.memory.lighter import lighter

SMALLER, FEWER = OomStep


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A model of 8 layers, trained on 4,096 tokens."""
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf({**LLAMA, "llama.block_count": 8}, LLAMA_TENSORS, data=LLAMA_DATA))
    return path


def changed(file: Path, step: OomStep, *flags: str, slots: int = 1) -> tuple[tuple[str, ...], str] | None:
    model = ModelConfig(alias="a", model_path="a", file=file, flags=flags, slots=slots)
    made = lighter(model, step)
    if made is None:
        return None
    assert made.model.flags[: len(flags)] == flags, "its own flags stay as they are"
    return made.model.flags[len(flags) :], made.change


def test_half_the_context(file: Path) -> None:
    assert changed(file, SMALLER, "-c", "8192") == (("-c", "4096"), "smaller_context: 8192 -> 4096 tokens")
    assert changed(file, SMALLER) == (("-c", "2048"), "smaller_context: 4096 -> 2048 tokens")
    assert changed(file, SMALLER, "-c", "9000", slots=4) == (("-c", "4096"), "smaller_context: 9000 -> 4096 tokens")


def test_no_less_than_is_of_use(file: Path) -> None:
    assert changed(file, SMALLER, "-c", "1024") == (("-c", "512"), "smaller_context: 1024 -> 512 tokens")
    assert changed(file, SMALLER, "-c", "1000") is None
    assert changed(file, SMALLER, "-c", "2048", slots=4) is None


def test_three_quarters_of_the_layers(file: Path) -> None:
    assert changed(file, FEWER) == (("-ngl", "6"), "fewer_layers: 9 -> 6 on the GPU")
    assert changed(file, FEWER, "-ngl", "99") == (("-ngl", "6"), "fewer_layers: 9 -> 6 on the GPU")
    assert changed(file, FEWER, "-ngl", "4") == (("-ngl", "3"), "fewer_layers: 4 -> 3 on the GPU")
    assert changed(file, FEWER, "-ngl", "1") == (("-ngl", "0"), "fewer_layers: 1 -> 0 on the GPU")
    assert changed(file, FEWER, "-ngl", "0") is None


def test_nothing_without_a_header(tmp_path: Path) -> None:
    assert changed(tmp_path / "missing.gguf", SMALLER) is None
    assert changed(tmp_path / "missing.gguf", FEWER) is None
    assert changed(tmp_path / "missing.gguf", SMALLER, "-c", "4096") is not None, "the flag says it all"
