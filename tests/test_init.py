"""`trio-router init`: from a folder of GGUF files to a configuration that is right."""

import struct
import tomllib
from pathlib import Path

import pytest

from tests.harness.tiny_gguf import write_header_only
from trio_router.cli import main
from trio_router.config import load_config


def gguf(path: Path, architecture: str, **numbers: int) -> Path:
    """A header with nothing but metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    entries = [text("general.architecture") + struct.pack("<I", 8) + text(architecture)]
    entries += [text(f"{architecture}.{name}") + struct.pack("<II", 4, value) for name, value in numbers.items()]
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries))
    return path


def test_a_folder_of_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    write_header_only(folder / "Tiny Model.Q4_0.gguf")
    gguf(folder / "nomic" / "Nomic-Embed.gguf", "nomic-bert", context_length=2048, pooling_type=1)
    gguf(folder / "rank.gguf", "bert", context_length=512, pooling_type=4)
    gguf(folder / "gemma" / "gemma-3-4b.gguf", "gemma3", context_length=131072)
    gguf(folder / "gemma" / "mmproj-F16.gguf", "clip")
    (folder / "broken.gguf").write_bytes(b"GGUF")
    out = tmp_path / "router.toml"
    assert main(["init", "--models-dir", str(folder), "--out", str(out)], {}) == 0
    said = capsys.readouterr()
    assert "broken.gguf" in said.err
    models = tomllib.loads(out.read_text())["models"]
    assert set(models) == {"tiny-model.q4_0", "nomic-embed", "rank", "gemma-3-4b"}
    assert models["nomic-embed"]["flags"] == ["-c", "2048", "--embedding"]
    assert models["rank"]["flags"] == ["-c", "512", "--reranking"]
    assert models["gemma-3-4b"]["flags"] == ["-c", "8192", "--mmproj", str(folder / "gemma" / "mmproj-F16.gguf")]
    assert load_config(out, {}).models["gemma-3-4b"].file == folder / "gemma" / "gemma-3-4b.gguf"

    before = out.read_text()
    assert main(["init", "--models-dir", str(folder), "--out", str(out)], {}) == 2
    assert "there already" in capsys.readouterr().err
    assert main(["init", "--models-dir", str(folder), "--out", str(out), "--force"], {}) == 0
    assert out.read_text() == before


def test_names_that_are_alike_and_names_that_cannot_be(tmp_path: Path) -> None:
    for name in ("a/Model.gguf", "b/model.gguf", "status.gguf", "ß.gguf"):
        gguf(tmp_path / "m" / name, "llama", context_length=64)
    out = tmp_path / "r.toml"
    assert main(["init", "--models-dir", str(tmp_path / "m"), "--out", str(out)], {}) == 0
    assert set(load_config(out, {}).models) == {"model", "model-2", "model-3", "model-status"}


@pytest.mark.parametrize("make", [None, "empty"])
def test_no_folder_and_an_empty_one(tmp_path: Path, make: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "m"
    if make:
        folder.mkdir()
    assert main(["init", "--models-dir", str(folder), "--out", str(tmp_path / "r.toml")], {}) == (1 if make else 2)
    assert str(folder) in capsys.readouterr().err
    assert not (tmp_path / "r.toml").exists()
