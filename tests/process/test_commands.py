"""The commands that speak to a router that runs."""

import io
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.conftest import StartRouter
from tests.harness.processes import wait_until
from tests.harness.router import RouterProcess
from trio_router.cli import main

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def router(start_shared_router: StartRouter) -> RouterProcess:
    return start_shared_router(
        models={"one": ["-np", "2"], "org/two": [], "broken": ["--fake-exit-at-start", "3"]},
        system={"max_load_attempts": 1},
    )


def run(router: RouterProcess, *arguments: str) -> int:
    return main([arguments[0], "--url", router.url, *arguments[1:]], {})


def test_load_ps_ls_eject(router: RouterProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(router, "load", "org/two") == 0
    assert capsys.readouterr().out == "model 'org/two' is ready\n"
    assert run(router, "ps") == 0
    names, two = capsys.readouterr().out.splitlines()
    assert names.split() == ["MODEL", "STATE", "SLOTS", "WAITING", "MEMORY", "USED", "PID"]
    assert two.split()[:4] == ["org/two", "ready", "0/1", "0"]
    assert run(router, "ls") == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["one", "off"], ["org/two", "ready"], ["broken", "off"],
    ]  # fmt: skip
    assert run(router, "ps", "--json") == 0
    assert json.loads(capsys.readouterr().out)["org/two"]["status"] == "ready"
    assert run(router, "eject", "org/two", "--force") == 0
    assert "was unloaded" in capsys.readouterr().out
    assert run(router, "eject", "org/two", "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"] == "not_found"


def test_what_fails_says_why(router: RouterProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(router, "load", "broken") == 1
    assert "broken" in capsys.readouterr().err
    assert run(router, "reset", "broken") == 0
    assert run(router, "load", "nobody") == 4
    assert "no model is called 'nobody'" in capsys.readouterr().err
    assert run(router, "logs", "nobody") == 4


def test_requests_and_cancel(router: RouterProcess, capsys: pytest.CaptureFixture[str]) -> None:
    pending = router.in_background(
        "one", stream=True, fake={"tokens": 9999, "token_seconds": 0.05}, headers={"X-Request-ID": "a/b"}, timeout=60
    )

    def listed() -> list[str]:
        assert run(router, "requests") == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("a/b ")]

    row = wait_until(listed, timeout_seconds=10)[0].split()
    assert (row[1], row[3], row[-1]) == ("one", "normal", "/v1/chat/completions")
    assert run(router, "requests", "--json") == 0
    assert json.loads(capsys.readouterr().out)["total"] == 1
    assert run(router, "cancel", "a/b") == 0
    assert capsys.readouterr().out == "1 cancelled\n"
    assert "request_cancelled" in pending.answer().text
    assert run(router, "cancel", "a/b") == 4


def test_for_programs(
    router: RouterProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(router, "run", "--json", "one", "hello") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"]).split()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    assert run(router, "run", "--json", "one") == 0
    assert capsys.readouterr().out
    assert run(router, "logs", "--json", "-n", "1", "one") == 0
    assert set(json.loads(capsys.readouterr().out)) == {"model", "line"}


def test_a_bar_while_a_model_loads(
    start_router: StartRouter, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    gate = tmp_path / "gate"
    router = start_router(models={"slow": ["--fake-load-until", str(gate)], "none": []})
    opened = threading.Timer(1.5, gate.touch)
    opened.start()
    assert run(router, "load", "slow") == 0
    opened.join()
    said = capfd.readouterr()
    assert said.out == "model 'slow' is ready\n"
    assert "loading slow" in said.err
    assert run(router, "load", "none", "--json") == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["status"] == "success"
    assert said.err == ""


def test_what_is_wrong_with_a_configuration(start_router: StartRouter, capsys: pytest.CaptureFixture[str]) -> None:
    router = start_router(models={"one": []})
    text = router.config_path.read_text()
    router.config_path.write_text(text.replace("[api]", "[api]\nport = -1\nmax_body_mb = 0"))
    assert run(router, "reload") == 78
    told = capsys.readouterr().err
    assert "api.port" in told
    assert "api.max_body_mb" in told


def test_who_asks_is_answered_at_once(router: RouterProcess) -> None:
    """What `ps` imports, and so what it takes: 0.3 s is the bound on a machine with nothing else to do."""
    code = """
import sys, time
before = time.perf_counter()
from trio_router.cli import main
status = main(sys.argv[1:], {})
heavy = {"trio", "quart", "hypercorn", "httpx", "cattrs", "rich", "asyncio"} & sys.modules.keys()
print(status, sorted(heavy), file=sys.stderr)
"""
    for command in ("ps", "ls", "requests", "health"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, "--url", router.url],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert done.stderr == "0 []\n"


def test_no_router(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ps", "--url", "http://127.0.0.1:9"], {}) == 3
    assert main(["ps"], {"TRIO_ROUTER_URL": "127.0.0.1:9"}) == 3
    assert capsys.readouterr().err.count("no router at") == 2
    for url in ("ftp://x", "http://127.0.0.1:99999", "http://127.0.0.1:abc", "http://[::1", "http://127.0.0.1:9/ x"):
        assert main(["ps", "--url", url], {}) == 2
        assert "is not the URL of a router" in capsys.readouterr().err
    assert main(["ps", "--api-key", "sk\nx"], {}) == 2
    said = capsys.readouterr().err
    assert "characters that no header may have" in said
    assert "sk" not in said


def test_what_answers_is_no_router(router: RouterProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ps", "--url", router.url.replace("http:", "https:")], {}) == 3
    assert "a router itself speaks no TLS" in capsys.readouterr().err
    assert main(["ps", "--url", f"{router.url}/ui/vendor/uplot.js?"], {}) != 0
    assert main(["ps", "--url", f"{router.url}/v1"], {}) == 0, "the address that clients of OpenAI's have"


def test_run(router: RouterProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(router, "run", "one", "hello") == 0
    assert capsys.readouterr().out == "tök0 tök1 tök2 tök3 \n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nthere\n"))
    assert run(router, "run", "one") == 0
    assert capsys.readouterr().out == "tök0 tök1 tök2 tök3 \n"
    assert run(router, "run", "nobody", "hello") == 4


def test_a_talk(router: RouterProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["hello", "", "again"])

    def read(_prompt: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda _: True})())
    assert run(router, "run", "one") == 0
    assert capsys.readouterr().out.count("tök0 tök1 tök2 tök3 ") == 2


def test_logs(router: RouterProcess, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(router, "load", "one") == 0
    assert run(router, "logs", "one") == 0
    assert "load_model: model loaded" in capfd.readouterr().out
    follows = subprocess.Popen(
        [sys.executable, "-m", "trio_router", "logs", "-f", "--url", router.url, "one"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert follows.stdout is not None
        assert follows.stdout.readline()
        seen: list[str] = []
        reader = threading.Thread(target=lambda: seen.extend(follows.stdout or ()), daemon=True)
        reader.start()
        run(router, "eject", "one")
        wait_until(lambda: any("incarnation 1: stopped" in line for line in seen), timeout_seconds=10, what=f"{seen}")
    finally:
        follows.terminate()
        follows.wait(5)
        reader.join(5)
        follows.stdout.close()


def test_top_health_reload(
    router: RouterProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(router, "top") == 0
    out = capsys.readouterr().out
    assert "one" in out
    assert "FIRST TOKEN" in out
    assert run(router, "top", "--json") == 0
    assert "totals" in json.loads(capsys.readouterr().out)
    assert run(router, "health") == 0
    assert capsys.readouterr().out.startswith("ok: ")
    assert run(router, "health", "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"] == "ok"
    assert run(router, "reload") == 0
    assert capsys.readouterr().out == "changed: nothing\n"


def test_a_key(start_router: StartRouter, capsys: pytest.CaptureFixture[str]) -> None:
    router = start_router(models={"one": []}, environment={"API_KEY": "sk-secret"})
    assert main(["ps", "--url", router.url], {}) == 1
    assert "no API key was sent" in capsys.readouterr().err
    assert main(["ps"], {"TRIO_ROUTER_URL": router.url, "API_KEY": "sk-secret"}) == 0
    assert main(["ps", "--url", router.url, "--api-key", "sk-secret"], {}) == 0


def test_drain(start_router: StartRouter) -> None:
    router = start_router(models={"one": []})
    assert run(router, "load", "one") == 0
    assert run(router, "drain") == 0
    assert router.wait() == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["completion", shell], {}) == 0
    script = capsys.readouterr().out
    assert "eject" in script
    assert "force" in script
    if shell == "zsh":
        assert script.splitlines()[0].split() == ["#compdef", "trio-router"]
        _, function, program = script.splitlines()[-1].split()
        assert f"\n{function}() {{\n" in script
        assert program == "trio-router"
    if shell == "bash":
        (tmp_path / "script").write_text(script)
        assert completed(tmp_path, "trio-router", "ej") == ["eject"]
        assert completed(tmp_path, "trio-router", "eject", "--f") == ["--force"]
        assert completed(tmp_path, "trio-router", "plan", "one", "--priority", "") == ["high", "normal", "low"]
        assert completed(tmp_path, "trio-router", "serve", "--config", "scr") == ["script"]


def completed(folder: Path, *words: str) -> list[str]:
    """What bash offers for the last of them."""
    asked = 'source ./script; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _trio_router; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", asked, "bash", *words], capture_output=True, text=True, check=True, cwd=folder, timeout=20
    )
    return done.stdout.splitlines()
