import os
from pathlib import Path

import pytest

from trio_router.config.schema import ModelConfig
from trio_router.memory.fingerprint import fingerprint, server_print


def entry(file: Path, flags: str = "", slots: int = 1) -> ModelConfig:
    return ModelConfig(alias="m", model_path=str(file), file=file, flags=tuple(flags.split()), slots=slots)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"1234")
    return path


def test_the_same_is_the_same(file: Path) -> None:
    first = fingerprint(entry(file, "-c 512"), "server")
    os.utime(file, ns=(1, file.stat().st_mtime_ns))
    assert fingerprint(entry(file, "-c 512"), "server") == first
    assert len(first) == 32


@pytest.mark.parametrize("flags", ["", "-c 513", "-c 512 -fa on", "-c 512 --new-flag", "-ctk q8_0 -c 512"])
def test_flags_that_may_take_memory_count(file: Path, flags: str) -> None:
    assert fingerprint(entry(file, flags), "server") != fingerprint(entry(file, "-c 512"), "server")


@pytest.mark.parametrize(
    "flags", ["-c 512 --temp 0.3", "--jinja -c 512", "--top_k 5 -c 512 -t 8", "-c 512 --chat-template-file x.jinja -v"]
)
def test_others_do_not(file: Path, flags: str) -> None:
    assert fingerprint(entry(file, flags), "server") == fingerprint(entry(file, "-c 512"), "server")


def test_slots_and_the_server_count(file: Path) -> None:
    first = fingerprint(entry(file), "server")
    assert fingerprint(entry(file, slots=2), "server") != first
    assert fingerprint(entry(file), "another") != first


def test_files_count_with_size_and_time(file: Path, tmp_path: Path) -> None:
    projector = tmp_path / "mmproj.gguf"
    flags = f"--mmproj {projector}"
    seen = {fingerprint(entry(file, flags), "s")}
    projector.write_bytes(b"1")
    seen.add(fingerprint(entry(file, flags), "s"))
    file.write_bytes(b"12345")
    seen.add(fingerprint(entry(file, flags), "s"))
    os.utime(file, ns=(1, 1))
    seen.add(fingerprint(entry(file, flags), "s"))
    assert len(seen) == 4


def test_every_file_of_a_split_model_counts(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    first.write_bytes(b"1")
    second.write_bytes(b"1")
    before = fingerprint(entry(first), "s")
    second.write_bytes(b"12")
    assert fingerprint(entry(first), "s") != before


def test_a_copy_that_kept_its_times_is_the_same(file: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    copy = tmp_path / "other" / "m.gguf"
    copy.write_bytes(file.read_bytes())
    os.utime(copy, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    assert fingerprint(entry(copy), "s") == fingerprint(entry(file), "s")


def test_a_server_is_known_by_its_libraries_too(tmp_path: Path) -> None:
    server = tmp_path / "llama-server"
    server.write_bytes(b"1")
    first = server_print(server, [])
    assert server_print(server, ["H100", "H100"]) == server_print(server, ["H100"]) != first
    (tmp_path / "libggml-cuda.so").write_bytes(b"1")
    assert server_print(server, []) != first
    assert server_print(tmp_path / "nowhere" / "llama-server", []) != first


def test_names_need_not_be_text(tmp_path: Path) -> None:
    assert fingerprint(entry(tmp_path / "\udcff.gguf", "\udcfe"), "s")
