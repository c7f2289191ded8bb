"""`trio-router init`: from a folder of GGUF files to a configuration that is right."""

import json
import os
import struct
import tomllib
from pathlib import Path

import pytest

from tests.harness.tiny_gguf import write_header_only, write_split_llama
from trio_router.cli import main
from trio_router.config import load_config


def gguf(path: Path, architecture: str, kind: str = "", **numbers: int) -> Path:
    """A model of one tensor."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    entries = [text("general.architecture") + struct.pack("<I", 8) + text(architecture)]
    if kind:
        entries.append(text("general.type") + struct.pack("<I", 8) + text(kind))
    entries += [text(f"{architecture}.{name}") + struct.pack("<II", 4, value) for name, value in numbers.items()]
    tensor = text("t") + struct.pack("<IQIQ", 1, 8, 0, 0)  # eight floats
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(entries)) + b"".join(entries) + tensor
    path.write_bytes(head + bytes(-len(head) % 32 + 32))
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


def init(folder: Path, out: Path, *more: str, **environ: str) -> int:
    return main(["init", "--models-dir", str(folder), "--out", str(out), *more], environ)


def test_a_split_model_is_one(tmp_path: Path, smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    write_split_llama(folder, "Big-Q4", tokenizer_from=smollm2, parts=3)
    for number in (1, 2):
        gguf(folder / f"Part-0000{number}-of-00003.gguf", "llama", kind="model")
    assert init(folder, tmp_path / "r.toml") == 0
    models = load_config(tmp_path / "r.toml", {}).models
    assert {alias: model.file.name for alias, model in models.items()} == {
        "big-q4": "Big-Q4-00001-of-00003.gguf", "part": "Part-00001-of-00003.gguf",
    }  # fmt: skip
    (folder / "Big-Q4-00003-of-00003.gguf").unlink()
    assert init(folder, tmp_path / "r.toml", "--force") == 0
    assert "Big-Q4-00003-of-00003.gguf" in capsys.readouterr().err
    assert set(load_config(tmp_path / "r.toml", {}).models) == {"part"}


def test_what_is_no_model_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "m"
    gguf(folder / "model.GGUF", "llama", context_length=64)
    gguf(folder / "lora.gguf", "llama", kind="adapter")
    gguf(folder / "imatrix.gguf", "llama", kind="imatrix")
    gguf(folder / "vision.gguf", "clip")
    (folder / "vocabulary.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    (folder / "empty.gguf").touch()
    (folder / "text.gguf").write_text("not a model")
    (folder / "old.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    whole = gguf(folder / "cut.gguf", "llama").read_bytes()
    (folder / "cut.gguf").write_bytes(whole[:-8])
    (folder / "huge.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63))
    (folder / "gone.gguf").symlink_to(folder / "nowhere")
    (folder / "loop.gguf").symlink_to(folder / "loop.gguf")
    (folder / "around").symlink_to(folder)
    (folder / "folder.gguf").mkdir()
    os.mkfifo(folder / "pipe.gguf")
    out = tmp_path / "r.toml"
    assert init(folder, out) == 0
    (model,) = load_config(out, {}).models.values()
    assert (model.alias, model.file) == ("model", folder / "model.GGUF")
    assert model.flags == ("-c", "64", "--mmproj", str(folder / "vision.gguf"))
    told = capsys.readouterr().err
    for name in ("lora", "imatrix", "vocabulary", "empty", "text", "old", "cut", "huge", "gone", "loop", "pipe"):
        assert f"{name}.gguf" in told, name
    assert "vision.gguf" not in told


def test_no_file_writes_anything_into_the_configuration(tmp_path: Path) -> None:
    """Names of files and words in them come from strangers; `llama_server_path` would be theirs to choose."""
    folder = tmp_path / "m"
    evil = 'x"\nllama_server_path = "/tmp/evil'
    gguf(folder / f"{evil.replace('/', '')}.gguf", f"llama{evil}\r# \x7f\u2028")
    gguf(folder / "del\x7f.gguf", "llama", kind="model")
    gguf(folder / "ünï'cödé \t.gguf", "llama")
    gguf(folder / "mmproj-\n[system].gguf", "clip")
    out = tmp_path / "r.toml"
    assert init(folder, out) == 0
    config = load_config(out, {})
    assert config.system.llama_server_path is None
    assert {model.file for model in config.models.values()} == set(folder.glob("*.gguf")) - set(folder.glob("mmproj*"))
    assert all(model.file.exists() for model in config.models.values())


def test_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "m"
    gguf(folder / os.fsdecode(b"caf\xe9.gguf"), "llama")
    gguf(folder / "good.gguf", "llama")
    assert init(folder, tmp_path / "r.toml") == 0
    assert "its name is no text" in capsys.readouterr().err
    assert set(load_config(tmp_path / "r.toml", {}).models) == {"good"}
    other = tmp_path / os.fsdecode(b"\xff")
    gguf(other / "good.gguf", "llama")
    assert init(other, tmp_path / "s.toml") == 2
    assert "no text" in capsys.readouterr().err


def test_links_as_download_caches_have_them(tmp_path: Path) -> None:
    """A file's name is that of the link: what it leads to is called by its hash, and lies elsewhere."""
    blob = gguf(tmp_path / "blobs" / "3fa9", "llama", context_length=64)
    folder = tmp_path / "snapshots" / "main"
    folder.mkdir(parents=True)
    (folder / "Nice.gguf").symlink_to(blob)
    assert init(tmp_path / "snapshots", tmp_path / "r.toml") == 0
    (model,) = load_config(tmp_path / "r.toml", {}).models.values()
    assert (model.alias, model.file) == ("nice", folder / "Nice.gguf")


def test_where_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "m"
    gguf(folder / "a.gguf", "llama")
    assert init(folder, tmp_path / "nowhere" / "r.toml") == 1
    assert "cannot be written" in capsys.readouterr().err
    assert init(folder, tmp_path / "r.toml", API_KEY="a b") == 78, "the environment is wrong"
    assert "API_KEY" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--models-dir", "m"], {}) == 0
    assert "`trio-router serve` serves them" in capsys.readouterr().out
    assert load_config(Path("router.toml"), {}).models["a"].file == folder / "a.gguf"
    assert main(["init", "--models-dir", "m", "--json", "--force"], {}) == 0
    told = json.loads(capsys.readouterr().out)
    assert [model["alias"] for model in told["models"]] == ["a"]
