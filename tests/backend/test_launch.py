import errno
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.backend.peer import descriptors
from trio_router.backend.address import Address
from trio_router.backend.launch import Launcher, LaunchFailed, child_environment
from trio_router.config import LlamaServer
from trio_router.config.schema import BackendTransport, ModelConfig
from trio_router.memory.room import Spot

SOCKET = Address(path="/run/x/3-7.sock")
PORT = Address(port=4711, key="the-key")


def launcher(folder: Path = Path("/run/x"), server: str = "/bin/llama-server", **options) -> Launcher:
    options = {"transport": BackendTransport.UNIX, **options}
    return Launcher(server=LlamaServer(path=Path(server)), folder=lambda: folder, **options)


def model(*flags: str, slots: int = 1, file: Path = Path("/m/q.gguf"), alias: str = "qwen") -> ModelConfig:
    return ModelConfig(alias=alias, model_path=str(file), file=file, flags=flags, slots=slots)


def test_the_command_line_over_a_socket():
    assert launcher().command(model("-c", "4096", "-fa", "on"), SOCKET) == [
        "/bin/llama-server", "--host", "/run/x/3-7.sock", "--model", "/m/q.gguf", "--alias", "qwen", "--metrics",
        "--parallel", "1", "-c", "4096", "-fa", "on",
    ]  # fmt: skip


def test_the_command_line_over_tcp_does_not_hold_the_key():
    command = launcher().command(model(), PORT)
    assert command[1:5] == ["--host", "127.0.0.1", "--port", "4711"]
    assert "the-key" not in " ".join(command)


@pytest.mark.parametrize(
    "flags", [("-np", "4"), ("--parallel", "4"), ("-np", "2", "-np", "4"), ("-c", "1", "-np", "4")]
)
def test_slots_are_said_once(flags):
    command = launcher().command(model(*flags, slots=4), SOCKET)
    assert command[-len(flags) :] == list(flags)
    assert command[: -len(flags)].count("--parallel") == 0


def test_slots_are_always_said():
    assert launcher().command(model(slots=3), SOCKET)[-2:] == ["--parallel", "3"]


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20), max_size=8))
def test_flags_are_unchanged_and_last(flags):
    command = launcher().command(model(*flags), SOCKET)
    assert command[len(command) - len(flags) :] == flags


@pytest.mark.parametrize("alias", ["a/b:c", "--looks-like-a-flag", "with space", "ü"])
def test_an_alias_is_one_argument(alias):
    command = launcher().command(model(alias=alias), SOCKET)
    assert command[command.index("--alias") + 1] == alias


def test_a_child_does_not_get_what_is_not_its_business():
    own = {
        "PATH": "/bin", "HOME": "/root", "CUDA_VISIBLE_DEVICES": "1", "GGML_VK_VISIBLE_DEVICES": "0", "LD_LIBRARY_PATH": "/x",
        "LLAMA_ARG_HOST": "0.0.0.0", "LLAMA_API_KEY": "theirs", "LLAMA_SERVER_ROUTER_PORT": "1",
        "API_KEY": "secret", "OPENAI_API_KEY": "sk", "HF_TOKEN": "hf", "aws_secret_access_key": "s", "DB_PASSWORD": "p",
        "Credentials": "c", "DB_PASS": "p", "PASS": "p", "SSH_AUTH_SOCK": "/s", "PRIVATE": "p", "SESSION_COOKIE": "c",
        "DATABASE_URL": "postgres://me:pw@db/x", "HTTPS_PROXY": "http://u:p@proxy:1", "BYPASSED": "1", "NO_PROXY": "a:1",
        "REPOSITORY": "https://me@example.org/x",
    }  # fmt: skip
    assert child_environment(own, {}, None) == {
        "PATH": "/bin", "HOME": "/root", "CUDA_VISIBLE_DEVICES": "1", "GGML_VK_VISIBLE_DEVICES": "0", "LD_LIBRARY_PATH": "/x",
        "BYPASSED": "1", "NO_PROXY": "a:1", "REPOSITORY": "https://me@example.org/x",
    }  # fmt: skip


def test_the_servers_own_needs_win_and_the_key_is_ours():
    made = child_environment({"LD_LIBRARY_PATH": "/x", "LLAMA_API_KEY": "theirs"}, {"LD_LIBRARY_PATH": "/y"}, "ours")
    assert made == {"LD_LIBRARY_PATH": "/y", "LLAMA_API_KEY": "ours"}


@given(st.dictionaries(st.text(min_size=1, max_size=12), st.text(max_size=5)))
def test_no_environment_of_ours_is_changed(own):
    before = dict(own)
    made = child_environment(own, {"A": "b"}, "key")
    assert own == before
    assert {name for name in made if name.startswith("LLAMA_")} == {"LLAMA_API_KEY"}


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF and more")
    return path


@pytest.mark.parametrize(
    ("content", "why"), [(None, "no such file"), (b"", "not a GGUF file"), (b"PK\x03\x04", "not a GGUF file")]
)
def test_a_model_that_cannot_be_read_starts_nothing(tmp_path, content, why):
    file = tmp_path / "m.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(LaunchFailed, match=why):
        launcher(tmp_path, server="/nowhere").launch(model(file=file), 0, 1, Spot())


def test_a_folder_whose_path_is_too_long(tmp_path, gguf):
    with pytest.raises(LaunchFailed, match=r"cannot start .*longer than 107 bytes"):
        launcher(tmp_path / ("d" * 120)).launch(model(file=gguf), 0, 1, Spot())


def test_a_command_line_that_the_kernel_refuses(tmp_path, sockets, gguf):
    before = descriptors()
    with pytest.raises(LaunchFailed, match="Argument list too long"):
        launcher(sockets).launch(model("x" * 3_000_000, file=gguf), 0, 1, Spot())
    assert descriptors() == before


@pytest.mark.process
@pytest.mark.parametrize("transport", BackendTransport)
async def test_what_a_real_child_was_given(sockets, gguf, monkeypatch, transport):
    server = sockets / "llama-server"
    server.write_text('#!/bin/sh\nprintf "%s|" "$@"\necho\nenv\n')
    server.chmod(0o755)
    monkeypatch.setenv("LLAMA_ARG_PORT", "1")
    monkeypatch.setenv("API_KEY", "very-secret")
    made = launcher(sockets, server=str(server), transport=transport)
    made = attrs.evolve(made, server=LlamaServer(path=server, environment={"FROM_WHEEL": "yes"}))
    process, address = made.launch(model("--flag", "", "two words", file=gguf), 3, 7, Spot())
    await process.wait()
    await process.stop_within(0)
    await process.read_log_until_stopped("qwen")
    arguments, *environment = process.tail.lines
    assert arguments.endswith("|--parallel|1|--flag||two words|")
    assert "FROM_WHEEL=yes" in environment
    assert not [line for line in environment if "very-secret" in line or line.startswith("LLAMA_ARG")]
    if transport is BackendTransport.UNIX:
        assert address.path == str(sockets / "3-7.sock")
        assert not [line for line in environment if line.startswith("LLAMA_")]
    else:
        assert f"LLAMA_API_KEY={address.key}" in environment
        assert str(address.key) not in arguments


def test_without_a_folder_for_its_socket(header_gguf):
    def nowhere() -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    without = Launcher(server=LlamaServer(path=Path("/bin/true")), folder=nowhere, transport=BackendTransport.UNIX)
    entry = model(file=header_gguf)
    for launch in (lambda: without.launch(entry, 0, 1, Spot()), lambda: without.launch_to_project(entry, 0)):
        with pytest.raises(LaunchFailed, match=r"there is no folder for its socket: .*No space left"):
            launch()
