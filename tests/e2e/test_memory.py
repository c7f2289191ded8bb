"""What the real llama-server says of its memory, and what it is told about it."""

import json
from pathlib import Path

import pytest

from tests.conftest import StartRouter
from tests.harness.toml import router_toml
from trio_router.cli import main

pytestmark = [pytest.mark.process, pytest.mark.e2e]


def test_check_asks_llama_server_once(
    tmp_path: Path, real_llama: Path, smollm2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {"m": {"model_path": smollm2, "flags": ["-c", "2048", "--device", "none"]}}
    system = {"llama_server_path": real_llama, "gpu_devices": [], "state_dir": tmp_path / "state"}
    config = tmp_path / "router.toml"
    config.write_text(router_toml(models=models, system=system))

    def row(*options: str) -> str:
        assert main(["check", "--config", str(config), *options], {}) == 0
        return capsys.readouterr().out.splitlines()[1]

    assert " formula " in row()
    assert not (tmp_path / "state").exists()
    asked = row("--ask")
    assert "llama-server: weights 92, cache 45, compute" in asked
    assert row() == asked
    (fact,) = json.loads((tmp_path / "state" / "memory.json").read_text())["models"].values()
    assert fact["projection"]["devices"] == []


def test_check_says_which_flags_llama_server_refuses(
    tmp_path: Path, real_llama: Path, smollm2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"right": ["-c", "512"], "unknown": ["--foo", "1"], "wrong": ["-c", "many"]}
    models = {name: {"model_path": smollm2, "flags": [*these, "--device", "none"]} for name, these in flags.items()}
    system = {"llama_server_path": real_llama, "gpu_devices": [], "state_dir": tmp_path / "state"}
    config = tmp_path / "router.toml"
    config.write_text(router_toml(models=models, system=system))
    assert main(["check", "--config", str(config), "--ask"], {}) == 2
    out, err = capsys.readouterr()
    assert "llama-server: weights 92" in out.splitlines()[1]
    assert err.splitlines() == [
        f"{config}: models.unknown.flags: llama-server: error: invalid argument: --foo",
        f'{config}: models.wrong.flags: llama-server: error while handling argument "-c": stoi',
    ]


@pytest.mark.parametrize(("gpus", "flags", "fits"), [([0], ["-ngl", "99"], False), ([0], [], True), ([], [], False)])
def test_llama_server_fits_only_what_is_not_said(
    start_router: StartRouter, real_llama: Path, smollm2: Path, gpus: list[int], flags: list[str], fits: bool
) -> None:
    router = start_router(
        models={"m": {"model_path": smollm2, "flags": ["-c", "512", "-t", "1", "-lv", "4", *flags]}},
        system={"llama_server_path": real_llama, "gpu_devices": gpus},
    )
    router.post("/v1/models/load", {"model": "m"})
    lines = router.get("/v1/models/m/logs?lines=1000").text
    assert ("fitting params to device memory" in lines) is fits
    assert router.status("m")["n_ctx"] == 512
