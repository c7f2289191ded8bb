import os
from pathlib import Path

import attrs
import pytest

from trio_router.config import ApiConfig, ModelConfig, RouterConfig, SystemConfig, file_problems, places


@pytest.fixture
def config(tmp_path):
    """A configuration with one model, whose file and llama-server are right."""
    server = tmp_path / "llama-server"
    server.write_text("")
    server.chmod(0o755)
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF" + bytes(20))
    model = ModelConfig(alias="a.b", model_path="a.gguf", file=file)
    return RouterConfig(
        path=Path("router.toml"),
        api=ApiConfig(),
        system=SystemConfig(base_models_path=tmp_path, llama_server_path=server),
        models={"a.b": model},
    )


def with_file(config, file, written="a.gguf"):
    return attrs.evolve(config, models={"a.b": attrs.evolve(config.models["a.b"], file=file, model_path=written)})


def texts(config):
    return [str(problem) for problem in file_problems(config, {"PATH": ""})]


def test_nothing_wrong(config):
    assert texts(config) == []


def test_a_missing_file_names_model_and_path(config, tmp_path):
    file = tmp_path / "missing.gguf"
    assert texts(with_file(config, file)) == [f'router.toml: models."a.b".model_path: no such file: {file}']


@pytest.mark.parametrize(
    ("content", "start"),
    [(b"", "b''"), (b"GGU", "b'GGU'"), (b"ggml....", "b'ggml'"), (b"PK\x03\x04", r"b'PK\\x03\\x04'")],
)
def test_no_gguf(config, content, start):
    config.models["a.b"].file.write_bytes(content)
    with pytest.raises(AssertionError, match=rf"not a GGUF file \(starts with {start}, not b'GGUF'\)"):
        raise AssertionError(*texts(config))


def test_a_folder(config, tmp_path):
    assert "not a file" in texts(with_file(config, tmp_path))[0]


def test_a_pipe_is_not_waited_for(config, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in texts(with_file(config, tmp_path / "pipe"))[0]


def test_a_file_that_cannot_be_reached(config, tmp_path):
    (tmp_path / "plain").write_text("")
    assert "cannot be read: Not a directory" in texts(with_file(config, tmp_path / "plain" / "x"))[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(config):
    config.models["a.b"].file.chmod(0)
    assert "cannot be read: Permission denied" in texts(config)[0]


def test_a_missing_package_is_named_instead_of_its_file(config, tmp_path):
    (problem,) = texts(with_file(config, tmp_path / "x", "package:no_such_package_here/x.gguf"))
    assert problem.endswith(": package 'no_such_package_here' is not installed")


def test_llama_server_comes_first(config, tmp_path):
    gone = attrs.evolve(config, system=attrs.evolve(config.system, llama_server_path=tmp_path / "gone"))
    first, second = texts(with_file(gone, tmp_path / "missing"))
    assert first == f"router.toml: system.llama_server_path: llama-server: no such file: {tmp_path / 'gone'}"
    assert "models" in second


def test_no_llama_server_anywhere(config, monkeypatch):
    monkeypatch.setattr(places, "DEMO_WHEEL", "no_such_wheel_as_this")
    nowhere = attrs.evolve(config, system=attrs.evolve(config.system, llama_server_path=None))
    assert "pip install" in texts(nowhere)[0]
