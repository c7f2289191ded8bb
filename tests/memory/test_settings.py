from pathlib import Path

import pytest

from trio_router.config.schema import ModelConfig
from trio_router.memory.ggml import CACHE_TYPES
from trio_router.memory.settings import MemorySettings, draft_settings_of, settings_of


def model(flags: str, slots: int = 1) -> ModelConfig:
    return ModelConfig(alias="m", model_path="m.gguf", file=Path("m.gguf"), flags=tuple(flags.split()), slots=slots)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {}),
        ("-c 4096 --ctx-size 8192", {"context": 8192}),
        ("-c 0", {}),
        ("-c lots", {}),
        ("--ctx_size 512", {"context": 512}),
        ("-ngl 99", {"gpu_layers": 99}),
        ("--n-gpu-layers 0", {"gpu_layers": 0}),
        ("--gpu-layers all", {}),
        ("-ngl auto", {}),
        ("-ngl -1", {}),
        ("-ngl 99 --device none", {"gpu_layers": 0}),
        ("-ctk q8_0 --cache-type-v q4_0", {"type_k": CACHE_TYPES["q8_0"], "type_v": CACHE_TYPES["q4_0"]}),
        ("-ctk nonsense", {}),
        ("-kvu", {"unified": True}),
        ("--kv-unified --no-kv-unified", {}),
        ("--swa-full", {"full_windows": True}),
        ("-nkvo", {"cache_on_device": False}),
        ("-nkvo --kv-offload", {}),
        ("-ub 1024", {"micro_batch": 1024}),
        ("-ub 1024 --embedding", {"micro_batch": 1024, "outputs": 1024}),
        ("--reranking", {"outputs": 512}),
        ("-b 128", {"micro_batch": 128}),
        ("-fa off", {"flash_attention": False}),
        ("-fa auto", {}),
        ("--n-cpu-moe 3", {"cpu_expert_layers": 3}),
        ("-cmoe", {"cpu_expert_layers": 2**31}),
        ("--no-mmproj-offload", {"projector_on_device": False}),
    ],
)
def test_flags(flags: str, expected) -> None:
    assert settings_of(model(flags)) == MemorySettings(**expected)


def test_slots_are_the_models() -> None:
    assert settings_of(model("", slots=4)).slots == 4


def test_a_draft_has_layers_and_cache_types_of_its_own() -> None:
    draft = draft_settings_of(model("-c 4096 -ngl 3 -ngld 5 -ctk q8_0 -ctvd q4_0", slots=2))
    assert draft == MemorySettings(context=4096, slots=2, outputs=2, gpu_layers=5, type_v=CACHE_TYPES["q4_0"])
