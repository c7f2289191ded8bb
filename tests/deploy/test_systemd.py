"""The systemd unit; what the router tells systemd is tested in tests/test_notify.py."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.deploy.conftest import DEPLOY, tool
from trio_router.config.schema import SystemConfig

UNIT = DEPLOY / "trio-router.service"


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """A copy whose program exists: systemd-analyze looks for it."""
    text, count = re.subn(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text())
    assert count == 1
    path = tmp_path / UNIT.name
    path.write_text(text)
    return path


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [tool("systemd-analyze", "apt-get install -y systemd"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_verify(unit: Path) -> None:
    done = analyze("verify", unit)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_exposure(unit: Path) -> None:
    """3.0 of 10.0; what is left open is the network and the GPUs."""
    done = analyze("security", "--offline=true", "--threshold=30", unit)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze cannot look at a file's security")
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_unit_relies_on() -> None:
    settings = dict(line.split("=", 1) for line in UNIT.read_text().splitlines() if re.match(r"[A-Z]\w*=", line))
    assert settings["Type"] == "notify"
    assert int(settings["WatchdogSec"]) > 0
    assert int(settings["TimeoutStopSec"]) > SystemConfig(base_models_path=Path()).drain_timeout_sec
    assert (settings["KillMode"], settings["OOMPolicy"]) == ("mixed", "continue")
    assert settings["RestartPreventExitStatus"] == "2"
    assert settings["DynamicUser"] == "yes"
    # each of these would take the GPUs away
    assert settings.keys().isdisjoint({"PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock"})
    assert "MemoryDenyWriteExecute" not in settings
