"""Other names, parameters and variants: what is right, and where what is wrong stands."""

from pathlib import Path

import pytest

from tests.harness.toml import located
from trio_router.config import ConfigError, load_config
from trio_router.config.policies import ModelPolicy, Policy

MODEL = '[models.m]\nmodel_path = "m.gguf"\n'
OTHER = '[models.n]\nmodel_path = "n.gguf"\n'


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(text):
        Path("router.toml").write_text(text)
        return load_config(Path("router.toml"), {})

    return load


def problems(load, text):
    with pytest.raises(ConfigError) as caught:
        load(text)
    return [located(problem).removeprefix("router.toml:") for problem in caught.value.problems]


def test_all_of_it(load):
    config = load(
        MODEL
        + """
aliases = ["gpt-4o", "org/other"]
name = "M"
description = "the one"
strip = ["a", "b.c"]
max_output_tokens = 10
default.top_p = 1
set.chat_template_kwargs.enable_thinking = false
[models.m.variants.creative]
set = {temperature = 1.5}
[models.m.variants."v1.5"]
"""
    )
    assert config.models["m"].policy == ModelPolicy(
        aliases=("gpt-4o", "org/other"),
        name="M",
        description="the one",
        strip=("a", "b.c"),
        max_output_tokens=10,
        default={"top_p": 1},
        set={"chat_template_kwargs": {"enable_thinking": False}},
        variants={"creative": Policy(set={"temperature": 1.5}), "v1.5": Policy()},
    )


def test_other_names_go_where_names_go(load):
    text = 'system.default_model = "m:v"\n' + MODEL + 'aliases = ["x"]\nvariants.v = {}\n'
    config = load(text + '[[keys]]\nname = "k"\nkey = "secret"\nmodels = ["x", "m:v"]\n')
    assert config.system.default_model == "m:v"
    assert config.keys[0].models == ("x", "m:v")
    assert problems(load, 'system.preload_models = ["x"]\n' + MODEL + 'aliases = ["x"]') == [
        "1: system.preload_models[0]: no model 'x'; known: m"
    ]


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ('aliases = ["m"]', "aliases[0]: 'm' is a name of model 'm' already"),
        ('aliases = ["n"]', "aliases[0]: 'n' is a name of model 'n' already"),
        ('aliases = ["x", "x"]', "aliases[1]: 'x' is a name of model 'm' already"),
        ('aliases = ["a b"]', "aliases[0]: 'a b': an alias starts with"),
        ('aliases = "x"', "aliases: expected a list, got str 'x'"),
        ('aliases = ["m:v"]\nvariants.v = {}', "variants.v: 'm:v' is a name of model 'm' already"),
        ('variants."a/b" = {}', 'variants."a/b": a variant\'s name starts with'),
        ("variants = []", "variants: expected tables [models.m.variants.NAME], got a list"),
        ("variants.v = 3", "variants.v: expected a table, got int 3"),
        ("variants.v.flags = []", "variants.v.flags: unknown key; known here: name, description, set,"),
        ("variants.v.set.stream = true", "variants.v.set.stream: the router itself goes by 'stream'"),
        ("set = 3", "set: expected a table, got int 3"),
        ('set.model = "x"', "set.model: the router itself goes by 'model'"),
        ("default.keep_alive = 3", "default.keep_alive: the router itself goes by 'keep_alive'"),
        ("set.x = 2026-11-25", "set.x: expected what JSON has a word for, got date 2026-11-25"),
        ("set.x.y = [1, inf]", "set.x: expected what JSON has a word for, got float inf"),
        ("set.x = 0xffffffffffffffff", "set.x: expected a smaller number, got int 18446744073709551615"),
        ("set." + "x." * 20 + "x = 1", "set.x: nested too deeply"),
        ('strip = ["model"]', "strip[0]: the router itself goes by 'model'"),
        ('strip = ["a..b"]', "strip[0]: expected the name of a parameter, got str 'a..b'"),
        ('strip = ["a", ""]', "strip[1]: expected the name of a parameter, got str ''"),
        ("max_output_tokens = 0", "max_output_tokens: expected a number >= 1, got 0"),
        ("max_output_tokens = 1.5", "max_output_tokens: expected int, got float 1.5"),
        ("max_output_token = 1", "max_output_token: unknown key; did you mean 'max_output_tokens'?"),
    ],
)
def test_what_is_wrong(load, keys, found):
    lines = problems(load, f"{MODEL}{keys}\n{OTHER}")
    line = 2 + len(keys.splitlines())
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"{line}: models.m.{found}")
