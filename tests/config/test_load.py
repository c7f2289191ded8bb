import os
from pathlib import Path

import attrs
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.harness.toml import located, router_toml
from trio_router.config import (
    ApiConfig,
    BackendTransport,
    ConfigError,
    ModelConfig,
    RouterConfig,
    SystemConfig,
    load_config,
)
from trio_router.config.policies import ModelPolicy
from trio_router.config.schema import DERIVED

KNOWN = ", ".join(
    field.name for kind in (ModelConfig, ModelPolicy) for field in attrs.fields(kind) if field.metadata != DERIVED
)
"""Keys of a model."""
MODEL = '[models.m]\nmodel_path = "m.gguf"\n'


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`load(text, **environ)` with the text in ./router.toml."""
    monkeypatch.chdir(tmp_path)

    def load(text, **environ):
        Path("router.toml").write_text(text)
        return load_config(Path("router.toml"), environ)

    return load


@pytest.fixture
def problems(load):
    """What loading a text ends in, each with its line in front."""

    def problems(text, **environ):
        with pytest.raises(ConfigError) as caught:
            load(text, **environ)
        return [located(problem) for problem in caught.value.problems]

    return problems


# --- what is right ----------------------------------------------------------------------------------


def test_the_least_file_has_the_defaults(load, tmp_path):
    config = load(MODEL)
    assert config.path == Path("router.toml")
    assert config.api == ApiConfig()
    assert config.system == SystemConfig(base_models_path=tmp_path)
    model = config.models["m"]
    assert (model.alias, model.model_path, model.file) == ("m", "m.gguf", tmp_path / "m.gguf")
    assert (model.flags, model.slots) == ((), 1)


def test_every_type(load, tmp_path):
    config = load(
        router_toml(
            api={"host": "::1", "port": 0, "cors_origins": ["http://x:1"], "allowed_hosts": []},
            system={
                "idle_timeout_sec": 5,
                "gpu_devices": [],
                "enable_idle_timeout": False,
                "backend_transport": "tcp",
                "llama_server_path": "bin/llama-server",
                "base_models_path": "models",
                "default_parallel": 3,
            },
            models={
                "a/b": {"model_path": "x/m.gguf", "flags": ["-c", "1"]},
                "c": {"model_path": "m", "flags": ["-np", "2"]},
            },
        )
    )
    assert config.api == ApiConfig(host="::1", port=0, cors_origins=("http://x:1",), allowed_hosts=())
    assert config.system.idle_timeout_sec == 5.0
    assert type(config.system.idle_timeout_sec) is float
    assert config.system.gpu_devices == ()
    assert config.system.enable_idle_timeout is False
    assert config.system.backend_transport is BackendTransport.TCP
    assert config.system.llama_server_path == tmp_path / "bin" / "llama-server"
    assert config.system.base_models_path == tmp_path / "models"
    assert config.models["a/b"].file == tmp_path / "models" / "x" / "m.gguf"
    assert [(alias, model.slots) for alias, model in config.models.items()] == [("a/b", 3), ("c", 2)]


def test_paths_start_at_the_file_not_where_we_stand(tmp_path, monkeypatch):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "my.toml").write_text(MODEL + '[system]\nbase_models_path = "../models"\n')
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("conf/my.toml"), {})
    assert config.models["m"].file == tmp_path / "conf" / ".." / "models" / "m.gguf"


def test_home(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load(MODEL + '[system]\nbase_models_path = "~/models"\nllama_server_path = "~/bin/x"\n')
    assert config.models["m"].file == Path("/home/me/models/m.gguf")
    assert config.system.llama_server_path == Path("/home/me/bin/x")


@pytest.mark.parametrize(
    ("written", "preloaded"),
    [([], ()), (["*"], ("b", "a", "c")), (["c", "b"], ("c", "b")), (["a", "a"], ("a",)), (["a", "*"], ("b", "a", "c"))],
)
def test_preloading(load, written, preloaded):
    models = {alias: {"model_path": "m"} for alias in ("b", "a", "c")}
    assert load(router_toml(system={"preload_models": written}, models=models)).system.preload_models == preloaded


def test_editors_that_put_a_mark_in_front(load):
    assert load("\ufeff" + MODEL).models


def test_windows_line_ends(load, problems):
    assert load(MODEL.replace("\n", "\r\n")).models
    assert problems((MODEL + "\nbad = 1\n").replace("\n", "\r\n"))[0].startswith("router.toml:4: models.m.bad: ")


# --- precedence -------------------------------------------------------------------------------------

OVERRIDDEN = MODEL + '[system]\nllama_server_path = "/file/s"\nbase_models_path = "/file/m"\n'


def test_environment_over_dotenv_over_file_over_default(load, tmp_path):
    assert load(OVERRIDDEN).system.llama_server_path == Path("/file/s")
    (tmp_path / ".env").write_text("LLAMA_SERVER_PATH=/dotenv/s\nBASE_MODELS_PATH=/dotenv/m\nAPI_KEY=dotenv\n")
    config = load(OVERRIDDEN, BASE_MODELS_PATH="/env/m", API_KEY="")
    assert config.system.llama_server_path == Path("/dotenv/s")
    assert config.system.base_models_path == Path("/env/m")
    assert config.models["m"].file == Path("/env/m/m.gguf")
    assert config.api.key == "dotenv"
    assert load(OVERRIDDEN, API_KEY="env").api.key == "env"


def test_without_a_key_there_is_none(load):
    assert load(MODEL, API_KEY="").api.key is None


def test_relative_paths_in_the_environment_start_at_the_file(load, tmp_path):
    config = load(MODEL, BASE_MODELS_PATH="m", LLAMA_SERVER_PATH="s")
    assert config.models["m"].file == tmp_path / "m" / "m.gguf"
    assert config.system.llama_server_path == tmp_path / "s"


def test_a_wrong_value_is_told_even_if_the_environment_overrides_it(problems):
    assert problems("system.llama_server_path = 3\n" + MODEL, LLAMA_SERVER_PATH="/x") == [
        "router.toml:1: system.llama_server_path: expected a path, got int 3"
    ]


def test_problems_of_the_environment_name_the_variable(problems, tmp_path):
    (tmp_path / ".env").write_text("\nBASE_MODELS_PATH=~no-such-user-here/x\n")
    assert problems(MODEL + "flags = 1\n", API_KEY="hunter 2") == [
        "router.toml:3: models.m.flags: expected a list, got int 1",
        "environment: API_KEY: expected visible ASCII characters without blanks",
        f"{tmp_path / '.env'}:2: BASE_MODELS_PATH: no home folder is known for '~no-such-user-here/x'",
    ]


# --- what is wrong ----------------------------------------------------------------------------------


def test_everything_at_once_in_file_order(problems):
    text = """\
server = 1

[system]
idle_timeout_sec = -1
preload_models = ["qwem", "*"]
gpu_devices = [0, "1", true]

[models.qwen]
flags = ["--host", "x", "-c", 4]
slots = 3

[models.status]
model_path = "m.gguf"

[api]
port = "80"
max_body = 5
"""
    assert problems(text) == [
        "router.toml:1: server: unknown key; known here: api, system, models, keys",
        "router.toml:4: system.idle_timeout_sec: expected a number > 0, got -1.0",
        "router.toml:5: system.preload_models[0]: no model 'qwem'; did you mean 'qwen'?",
        "router.toml:6: system.gpu_devices[1]: expected int, got str '1'",
        "router.toml:6: system.gpu_devices[2]: expected int, got bool true",
        "router.toml:8: models.qwen.model_path: missing; a path, or 'package:NAME/FILE.gguf'",
        "router.toml:9: models.qwen.flags[3]: expected str, got int 4",
        "router.toml:9: models.qwen.flags[0]: --host belongs to the router: the router chooses where llama-server listens",
        f"router.toml:10: models.qwen.slots: unknown key; known here: {KNOWN}",
        "router.toml:12: models.status: reserved: paths under /v1/models/ use eject, failed, load, reset, status themselves",
        "router.toml:16: api.port: expected int, got str '80'",
        "router.toml:17: api.max_body: unknown key; did you mean 'max_body_mb'?",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("api.port = true", "api.port: expected int, got bool true"),
        ("api.port = 80.0", "api.port: expected int, got float 80.0"),
        ("api.port = 70000", "api.port: expected a number from 0 to 65535, got 70000"),
        ("api.port = -1", "api.port: expected a number from 0 to 65535, got -1"),
        ("api.port = [1]", "api.port: expected int, got a list"),
        ("api.port = {}", "api.port: expected int, got a table"),
        ("api.port = 1979-05-27", "api.port: expected int, got date 1979-05-27"),
        (f"api.port = {'9' * 50}", "api.port: expected int, got an int of more than 64 bits"),
        ("api.host = 1", "api.host: expected str, got int 1"),
        ("api.host = ''", "api.host: expected a name without blanks, got ''"),
        ("api.cors_origins = 'http://x'", "api.cors_origins: expected a list, got str 'http://x'"),
        (
            "api.key = 'hunter2'",
            "api.key: a key does not belong into a file: set API_KEY in the environment or in .env",
        ),
        ("api = 3", "api: expected a table, got int 3"),
        ("system = []", "system: expected a table, got a list"),
        ("system.enable_idle_timeout = 1", "system.enable_idle_timeout: expected bool, got int 1"),
        ("system.enable_idle_timeout = 'yes'", "system.enable_idle_timeout: expected bool, got str 'yes'"),
        ("system.idle_timeout_sec = '5m'", "system.idle_timeout_sec: expected float, got str '5m'"),
        ("system.idle_timeout_sec = true", "system.idle_timeout_sec: expected float, got bool true"),
        ("system.idle_timeout_sec = nan", "system.idle_timeout_sec: expected a finite float, got float nan"),
        ("system.idle_timeout_sec = inf", "system.idle_timeout_sec: expected a finite float, got float inf"),
        (
            f"system.idle_timeout_sec = {'9' * 400}",
            "system.idle_timeout_sec: expected float, got an int of more than 64 bits",
        ),
        ("system.max_concurrent_models = 0", "system.max_concurrent_models: expected a number >= 1, got 0"),
        ("system.gpu_devices = [1, 1]", "system.gpu_devices: expected each entry once, got 1"),
        (
            "system.backend_transport = 'pipe'",
            "system.backend_transport: expected one of 'unix', 'tcp', got str 'pipe'",
        ),
        ("system.backend_transport = 1", "system.backend_transport: expected one of 'unix', 'tcp', got int 1"),
        ("system.base_models_path = ''", "system.base_models_path: expected a path, got str ''"),
        ('system.base_models_path = "a\\u0000"', r"system.base_models_path: expected a path, got str 'a\x00'"),
        ("system.idle_timeout_secs = 1", "system.idle_timeout_secs: unknown key; did you mean 'idle_timeout_sec'?"),
        ("system.preload_models = ['x']", "system.preload_models[0]: no model 'x'; known: m"),
        ("api.allowed_host = 1", "api.allowed_host: unknown key; did you mean 'allowed_hosts'?"),
        ("apis.port = 1", "apis: unknown key; did you mean 'api'?"),
    ],
)
def test_one_thing_wrong(problems, line, message):
    assert problems(f"\n{line}\n{MODEL}") == [f"router.toml:2: {message}"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("flags = '-c 1'", "flags: expected a list, got str '-c 1'"),
        (
            "flags = ['--port=1']",
            "flags[0]: --port belongs to the router: the router chooses where llama-server listens",
        ),
        (
            "flags = ['-c', '1', '--api_key', 'x']",
            "flags[2]: --api-key belongs to the router: the router checks keys itself (API_KEY)",
        ),
        ("flags = ['-np', 'x']", "flags: -np/--parallel: expected an int >= 1, got 'x'"),
        ('flags = ["a\\u0000"]', r"flags: expected an argument without NUL, got 'a\x00'"),
        ("slots = '3'", f"slots: unknown key; known here: {KNOWN}"),
        ("alias = 'x'", "alias: unknown key; did you mean 'aliases'?"),
        ("flag = []", "flag: unknown key; did you mean 'flags'?"),
    ],
)
def test_one_thing_wrong_in_a_model(problems, line, message):
    assert problems(f"{MODEL}{line}\n") == [f"router.toml:3: models.m.{message}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "router.toml: models: expected at least one table [models.ALIAS], got none"),
        ("[models]", "router.toml:1: models: expected at least one table [models.ALIAS], got none"),
        ("models = 3", "router.toml:1: models: expected tables [models.ALIAS], got int 3"),
        ("[[models]]", "router.toml:1: models: expected tables [models.ALIAS], got a list"),
        ("models.m = 3", "router.toml:1: models.m: expected a table, got int 3"),
        ("[models.m]\nmodel_path = 3", "router.toml:2: models.m.model_path: expected str, got int 3"),
        ("[models.m]\nmodel_path = ''", "router.toml:2: models.m.model_path: expected a path, got ''"),
        (
            "[models.m]\nmodel_path = 'package:x/../y'",
            "router.toml:2: models.m.model_path: a file of a package stays inside the package, got 'package:x/../y'",
        ),
        (
            "[models.'a//b']\nmodel_path = 'x'",
            (
                "router.toml:1: models.\"a//b\": an alias holds no '//' and does not end in '/': "
                "paths under /v1/models/ would be ambiguous"
            ),
        ),
    ],
)
def test_models_that_are_none(problems, text, message):
    assert problems(text) == [message]


def test_an_alias_with_dots_and_no_quotes(problems):
    first, second = problems("[models.qwen2.5.1]\nmodel_path = 'x'\n")
    assert first.startswith("router.toml:1: models.qwen2.5: unknown key; an alias with dots stands in quotes: ")
    assert first.endswith('[models."qwen2.5.1"]')
    assert "models.qwen2.model_path: missing" in second


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[api\nport = 1", "router.toml:1: not TOML: Expected ']' at the end of a table declaration"),
        (b"\n\nport = \n", "router.toml:3: not TOML: Invalid value"),
        (b"[api]\n[api]\n", "router.toml:2: not TOML: Cannot declare ('api',) twice"),
        (b'\nx = """', "router.toml:2: not TOML: Unterminated string"),
        (b"x = " + b"9" * 5000, "router.toml: not TOML: Exceeds the limit"),
        (b"x = " + b"[" * 100_000, "router.toml: nested too deeply"),
        (b"[api]\nhost = '\xff'\n", "router.toml:2: not UTF-8: byte 0xff"),
        (b"#" * 1024 * 1025, "router.toml: larger than 1048576 bytes"),
    ],
)
def test_text_that_is_no_toml(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    Path("router.toml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(Path("router.toml"), {})
    (problem,) = caught.value.problems
    assert located(problem).startswith(message)
    assert "(at " not in str(problem)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.toml", "no such file"),
        ("", "cannot be read: Is a directory"),
        ("x" * 300, "cannot be read: File name too long"),
        ("a\0b", "cannot be read: embedded null byte"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, path, message):
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / path, {})
    assert [problem.message for problem in caught.value.problems] == [message]


def test_a_long_value_is_not_repeated_in_full(problems):
    (problem,) = problems(f"api.port = '{'x' * 10_000}'\n{MODEL}")
    assert len(problem) < 200


# --- whatever is written ----------------------------------------------------------------------------

SCALARS = st.one_of(
    st.booleans(),
    st.integers(-5, 70_000),
    st.floats(allow_nan=False, allow_infinity=False, width=16),
    st.sampled_from(
        ["", "a", "*", "m", "unix", "http://x", "-np", "--host", "~", "package:x/y", "package:", "\0", "ü"]
    ),
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3)
ALIASES = st.sampled_from(["m", "a.b", "status", "", "a//b", "ü"]) | st.text(st.characters(codec="utf-8"), max_size=3)


def table(*names):
    return st.dictionaries(st.sampled_from(names), VALUES, max_size=4)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "router.toml"


def either_loads_or_says_why(file, text):
    file.write_bytes(text.encode(errors="surrogatepass"))
    problems, config = (), None
    try:
        config = load_config(file, {})
    except ConfigError as error:
        problems = error.problems
    if config is not None:
        assert isinstance(config, RouterConfig)
        assert all(model.slots >= 1 and model.file.is_absolute() for model in config.models.values())
        return
    assert problems
    assert all("\n" not in str(problem) for problem in problems)
    lines = [problem.line for problem in problems if problem.line is not None]
    assert lines == sorted(lines)
    assert all(1 <= line <= text.count("\n") + 1 for line in lines)


@given(
    api=table("host", "port", "cors_origins", "allowed_hosts", "max_body_mb", "key", "hosts"),
    system=table("gpu_devices", "preload_models", "base_models_path", "aging_sec", "backend_transport", "x"),
    models=st.dictionaries(ALIASES, table("model_path", "flags", "slots"), max_size=3),
)
def test_any_document_loads_or_says_why(file, api, system, models):
    either_loads_or_says_why(file, router_toml(api=api, system=system, models=models))


TEXT = (Path(__file__).parents[2] / "router.toml").read_text()
TEXT = "\n".join(line for line in TEXT.splitlines() if line and not line.startswith("# "))


@settings(max_examples=200)
@given(st.data())
def test_any_damage_to_a_file_is_told(file, data):
    start = data.draw(st.integers(0, len(TEXT)))
    end = data.draw(st.integers(start, min(len(TEXT), start + 20)))
    piece = data.draw(st.text(alphabet="[]{}=.,\"'#\n\\ -1axé", max_size=8))
    either_loads_or_says_why(file, TEXT[:start] + piece + TEXT[end:])


@given(st.text())
@example("\ud800")
@example("a = 00:99:00")
def test_any_text_is_no_traceback(file, text):
    either_loads_or_says_why(file, text)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "router.toml"
    path.write_text(MODEL)
    path.chmod(0)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        load_config(path, {})
