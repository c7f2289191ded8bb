from pathlib import Path

import pytest

from tests.memory import gguf_bytes
from tests.memory.headers import SMOLLM2, header
from trio_router.config.schema import ModelConfig
from trio_router.memory import footprint
from trio_router.memory.footprint import CUDA_DRIVER_BYTES, MIB, Footprint, Part, Place, estimate
from trio_router.memory.gguf import GgufError, GgufHeader


def model(file: Path, flags: str = "", slots: int = 1) -> ModelConfig:
    return ModelConfig(alias="m", model_path=str(file), file=file, flags=tuple(flags.split()), slots=slots)


def estimated(
    monkeypatch: pytest.MonkeyPatch, of: GgufHeader, flags: str, *, slots: int = 1, multiplier: float = 1.0, **settings
) -> Footprint:
    """The estimate for a header whose file we do not have."""
    monkeypatch.setattr(footprint, "read_header", lambda _: of)
    return estimate(model(Path("none.gguf"), flags, slots), multiplier=multiplier, **settings)


def rows(of: Footprint) -> list[tuple[str, int, str, str]]:
    return [(part.name, part.bytes, part.source, part.place.value) for part in of.parts]


@pytest.mark.parametrize(
    ("flags", "slots", "projected"),
    [
        # `projected to use ... MiB of device memory`, llama-server b10068, one H100.
        ("-c 8192 -ngl 99", 4, 285),
        ("-c 65536", 8, 1551),
        ("-c 65536 -ctk q8_0 -ctv q8_0 -fa on", 8, 876),
        ("-c 8192 -ngl 10", 1, 123),
        ("-kvu", 4, 291),
        ("-c 4096 -ub 2048 --embedding", 2, 578),
        ("-c 8192 -fa off", 4, 315),
        ("-c 8192 -nkvo", 4, 111),
        ("-c 4096 -ngl 0", 4, 17),
    ],
)
def test_what_llama_server_projected_on_a_gpu(monkeypatch, flags: str, slots: int, projected: int) -> None:
    found = estimated(monkeypatch, SMOLLM2, flags, slots=slots, driver_bytes=0)
    assert found.device_bytes / MIB == pytest.approx(projected, abs=5)
    assert found.note is None


@pytest.mark.parametrize(
    ("flags", "slots", "projected"),
    [
        # The same over two H200, all layers on them.
        ("-c 8192 -ngl 99", 4, 324),
        ("-c 65536 -ngl 99", 8, 1632),
    ],
)
def test_what_llama_server_projected_on_two_gpus(monkeypatch, flags: str, slots: int, projected: int) -> None:
    found = estimated(monkeypatch, SMOLLM2, flags, slots=slots, driver_bytes=0)
    assert found.over(2) / MIB == pytest.approx(projected, abs=8)
    assert found.spread is not None
    assert found.spread.grain / MIB == pytest.approx(28, abs=1) if slots == 4 else found.spread.grain > 48 * MIB


@pytest.mark.parametrize(
    ("flags", "slots", "projected"),
    [
        # The same, of host memory, without a GPU.
        ("-c 2048 -ngl 99", 1, 152),
        ("-c 8192 -ctk q8_0 -ctv q8_0", 2, 204),
        ("-c 65536", 8, 1553),
        ("-c 1000", 3, 139),
        ("-c 8192 -ub 1024", 1, 315),
        ("-c 8192 -ub 128", 1, 277),
        ("-c 8192 -fa off", 1, 438),
    ],
)
def test_what_llama_server_projected_without_a_gpu(monkeypatch, flags: str, slots: int, projected: int) -> None:
    found = estimated(monkeypatch, SMOLLM2, flags, slots=slots, gpu=False)
    assert found.host_bytes / MIB == pytest.approx(projected, abs=2)
    assert found.device_bytes == 0


SMALL = {
    "block_count": 4,
    "context_length": 256,
    "embedding_length": 64,
    "attention.head_count": 1,
}
LAYERS = [(f"blk.{layer}.attn_k.weight", 100) for layer in range(4)]
CACHE = 256 * 64 * 2 * 2
TIED = header("llama", SMALL, ("token_embd.weight", 1000), ("output_norm.weight", 10), *LAYERS)
UNTIED = header("llama", SMALL, ("token_embd.weight", 1000), ("output.weight", 2000), *LAYERS)


@pytest.mark.parametrize(
    ("of", "flags", "device", "host"),
    [
        (TIED, "", 1000 + 10 + 400, 1000),
        (UNTIED, "", 2000 + 400, 1000),
        (UNTIED, "-ngl 5", 2000 + 400, 1000),
        (UNTIED, "-ngl 4", 2000 + 300, 1000 + 100),
        (UNTIED, "-ngl 1", 2000, 1000 + 400),
        (UNTIED, "-ngl 0", 0, 1000 + 2000 + 400),
        (TIED, "-ngl 0", 0, 1000 + 10 + 400),
        (UNTIED, "--device none", 0, 1000 + 2000 + 400),
    ],
)
def test_weights_of_offloaded_layers(monkeypatch, of: GgufHeader, flags: str, device: int, host: int) -> None:
    found = estimated(monkeypatch, of, flags)
    weights = {part.place: part.bytes for part in found.parts if part.name == "weights"}
    assert weights.get(Place.DEVICE, 0) == device
    assert weights.get(Place.HOST, 0) == host


@pytest.mark.parametrize(
    ("flags", "device", "host"),
    [("", 4, 0), ("-ngl 3", 2, 2), ("-nkvo", 0, 4), ("-ngl 0", 0, 4)],
)
def test_the_cache_is_where_its_layer_is(monkeypatch, flags: str, device: int, host: int) -> None:
    found = estimated(monkeypatch, UNTIED, flags)
    caches = {part.place: part.bytes for part in found.parts if part.name == "cache"}
    assert caches.get(Place.DEVICE, 0) == device * CACHE
    assert caches.get(Place.HOST, 0) == host * CACHE


def test_experts_may_stay_on_the_host(monkeypatch) -> None:
    experts = [(f"blk.{layer}.ffn_up_exps.weight", 7) for layer in range(4)]
    of = header("llama", {**SMALL, "expert_used_count": 2, "expert_feed_forward_length": 32}, *LAYERS, *experts)
    weights = [part.bytes for part in estimated(monkeypatch, of, "--n-cpu-moe 3").parts if part.name == "weights"]
    assert weights == [400 + 7, 21]
    weights = [part.bytes for part in estimated(monkeypatch, of, "--cpu-moe").parts if part.name == "weights"]
    assert weights == [400, 28]


def test_every_part_says_where_it_is_from(monkeypatch) -> None:
    found = estimated(monkeypatch, UNTIED, "", multiplier=1.1)
    compute = 300 * MIB  # no feed_forward_length
    assert rows(found) == [
        ("weights", 2400, "header", "device"),
        ("weights", 1000, "header", "host"),
        ("cache", 4 * CACHE, "formula", "device"),
        ("compute", compute, "allowance", "device"),
        ("driver", CUDA_DRIVER_BYTES, "allowance", "device"),
        ("margin", round((2400 + 4 * CACHE + compute + CUDA_DRIVER_BYTES) * 0.1), "vram_multiplier", "device"),
        ("margin", 100, "vram_multiplier", "host"),
    ]
    assert found.total_bytes == sum(part.bytes for part in found.parts)
    assert found.device_bytes + found.host_bytes == found.total_bytes


def test_feed_forward_may_differ_per_layer(monkeypatch) -> None:
    of = header("llama", {**SMALL, "feed_forward_length": (32, 128, 64, 0)}, *LAYERS)
    (compute,) = [part for part in estimated(monkeypatch, of, "").parts if part.name == "compute"]
    assert (compute.source, compute.bytes) == ("formula", 512 * 4 * (4 * 64 + 3 * 128) + 512 * 256 * 2)


def test_a_real_file(tmp_path: Path) -> None:
    found = estimate(model(gguf_bytes.write_llama(tmp_path / "m.gguf"), "-c 512"), multiplier=1.0, driver_bytes=0)
    assert [row for row in rows(found) if row[0] != "compute"] == [
        ("weights", 2048 + 2 * 2176, "header", "device"),
        ("weights", 2048, "header", "host"),
        ("cache", 512 * (2 + 1) * 16 * 2 * 2, "formula", "device"),
        ("driver", 0, "allowance", "device"),
    ]


def test_a_file_that_is_no_gguf_counts_with_its_size(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(bytes(1000))
    found = estimate(model(file), multiplier=1.5)
    assert rows(found) == [("weights", 1000, "file size", "device"), ("margin", 500, "vram_multiplier", "device")]
    assert found.note == f"{file}: not a GGUF file: it starts with b'\\x00\\x00\\x00\\x00'"
    assert estimate(model(file, "-ngl 0"), multiplier=1.5).device_bytes == 0
    assert estimate(model(file), multiplier=1.0, gpu=False).parts == (
        Part(name="weights", bytes=1000, source="file size", place=Place.HOST),
    )


def test_a_header_that_lacks_something_counts_with_its_files_size(monkeypatch) -> None:
    found = estimated(monkeypatch, header("llama", {}, file_bytes=5000), "", multiplier=2)
    assert (found.device_bytes, found.note) == (10000, "block_count is None")


def test_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="No such file"):
        estimate(model(tmp_path / "absent.gguf"), multiplier=1.1)


def test_projector_and_draft_model(tmp_path: Path) -> None:
    file, projector = gguf_bytes.write_llama(tmp_path / "m.gguf"), tmp_path / "mmproj.gguf"
    projector.write_bytes(bytes(300))
    alone = rows(estimate(model(file, "-c 512"), multiplier=1.0))

    def beside(flags: str, **settings) -> list[tuple[str, int, str, str]]:
        found = rows(estimate(model(file, f"-c 512 {flags}"), multiplier=1.0, **settings))
        return [row for row in found if row not in alone and row[0] not in {"weights", "cache", "compute"}]

    assert beside(f"--mmproj {projector}") == [("projector", 300, "file size", "device")]
    assert beside(f"--mmproj {projector} --no-mmproj-offload") == [("projector", 300, "file size", "host")]
    assert beside(f"--mmproj {projector}", gpu=False) == [("projector", 300, "file size", "host")]
    assert beside("--mmproj absent") == [("projector", 0, "file missing", "device")]
    assert beside(f"-md {projector}") == [("draft weights", 300, "file size", "device")]
    assert beside(f"--model_draft {file} -ctkd q8_0") == [
        ("draft weights", 2048 + 2 * 2176, "header", "device"),
        ("draft weights", 2048, "header", "host"),
        ("draft cache", 512 * (2 + 1) * 16 * 2 + 512 * (34 + 34), "formula", "device"),
    ]
    assert [row[3] for row in beside(f"-md {file} -ngld 0")] == ["host", "host"]
