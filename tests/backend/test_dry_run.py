"""Asking a llama-server what it would take: real processes."""

import sys
from pathlib import Path

import pytest
import trio

from tests.harness.processes import is_alive
from tests.memory.test_start_log import H100, LOADS
from trio_router.backend import dry_run
from trio_router.backend.dry_run import FlagsRefused, can_say, project
from trio_router.backend.launch import Launcher, LaunchFailed
from trio_router.config import LlamaServer
from trio_router.config.schema import BackendTransport, ModelConfig
from trio_router.memory.footprint import estimate
from trio_router.memory.projection import MIB, Projection, StartLog

pytestmark = pytest.mark.process


def said(text: str) -> Projection | None:
    log = StartLog()
    for line in text.splitlines():
        log.hear(line)
    return log.projection


def launcher(folder: Path, body: str) -> Launcher:
    """Of a program that writes down its pid and arguments, and then does `body`."""
    path = folder / "llama-server"
    head = f"import os,sys,time\nopen({str(folder / 'told')!r},'w').write(f'{{os.getpid()}} '+' '.join(sys.argv[1:]))\n"
    path.write_text(f"#!{sys.executable} -S\n{head}{body}\n")
    path.chmod(0o755)
    return Launcher(server=LlamaServer(path=path), folder=lambda: folder, transport=BackendTransport.UNIX)


def entry(file: Path, flags: str = "") -> ModelConfig:
    return ModelConfig(alias="m", model_path=str(file), file=file, flags=tuple(flags.split()))


def told(folder: Path) -> tuple[int, str]:
    pid, arguments = (folder / "told").read_text().split(maxsplit=1)
    return int(pid), arguments


async def test_it_is_ended_once_it_has_said_it(tmp_path: Path, header_gguf: Path) -> None:
    seen = []

    async def look(pid: int) -> None:
        seen.append((pid, is_alive(pid)))

    asked = launcher(tmp_path, f"print({H100!r}, flush=True)\ntime.sleep(60)")
    assert await project(asked, entry(header_gguf, "-c 512 --fit off"), 3, look) == said(H100)
    pid, arguments = told(tmp_path)
    assert seen == [(pid, True)]
    assert not is_alive(pid)
    assert arguments.endswith("-c 512 --fit off --fit on -lv 4")
    assert "--host " + str(tmp_path / "projection-3.sock") in arguments


@pytest.mark.parametrize(
    "body",
    [
        f"print({LOADS!r}, flush=True)\ntime.sleep(60)",
        "print('what is this?', flush=True)\nsys.exit(1)",
        "time.sleep(60)",
    ],
)
async def test_one_that_does_not_say_it_is_ended(
    tmp_path: Path, header_gguf: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    monkeypatch.setattr(dry_run, "PATIENCE_SECONDS", 2.0 if body == "time.sleep(60)" else 60.0)
    assert await project(launcher(tmp_path, body), entry(header_gguf), 0) is None
    assert not is_alive(told(tmp_path)[0])


@pytest.mark.parametrize("line", ["error: invalid argument: --foo", 'error while handling argument "-c": stoi'])
async def test_flags_may_be_refused(tmp_path: Path, header_gguf: Path, line: str) -> None:
    asked = launcher(tmp_path, f"print('hello')\nprint({line!r})\nprint('usage: ...', flush=True)\nsys.exit(1)")
    with pytest.raises(FlagsRefused) as refused:
        await project(asked, entry(header_gguf), 0)
    assert str(refused.value) == line
    assert not is_alive(told(tmp_path)[0])


async def test_it_is_ended_when_we_are_cancelled(tmp_path: Path, header_gguf: Path) -> None:
    asked = launcher(tmp_path, "time.sleep(60)")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(project, asked, entry(header_gguf), 0)
        with trio.fail_after(20):
            while not (tmp_path / "told").exists() or " " not in (tmp_path / "told").read_text():  # noqa: ASYNC110
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert not is_alive(told(tmp_path)[0])


async def test_a_model_that_cannot_be_loaded_cannot_be_asked_about(tmp_path: Path) -> None:
    with pytest.raises(LaunchFailed):
        await project(launcher(tmp_path, ""), entry(tmp_path / "absent.gguf"), 0)


def test_one_that_may_not_speak_is_not_asked(tmp_path: Path) -> None:
    assert can_say(entry(tmp_path, "-c 512"))
    assert not can_say(entry(tmp_path, "--log-disable"))
    assert not can_say(entry(tmp_path, "--log-file x"))


@pytest.mark.e2e
async def test_the_real_one_says_what_the_formula_says(tmp_path: Path, real_llama: Path, smollm2: Path) -> None:
    server = LlamaServer(path=real_llama, environment={"LD_LIBRARY_PATH": str(real_llama.parent)})
    asked = Launcher(server=server, folder=lambda: tmp_path, transport=BackendTransport.UNIX)
    model = entry(smollm2, "-c 2048 --device none")
    found = await project(asked, model, 0)
    assert found.devices == ()
    assert found.host.total / MIB == pytest.approx(estimate(model, multiplier=1, gpu=False).host_bytes / MIB, abs=3)
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240
