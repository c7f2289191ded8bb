import pytest

from tests.harness.toml import located
from trio_router.config import ConfigError, KeyConfig, PriorityBound, load_config

MODELS = '[models.a]\nmodel_path = "a.gguf"\n[models.b]\nmodel_path = "b.gguf"\n'
HASH = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"  # of "foo"


@pytest.fixture
def load(tmp_path):
    def load(text, **environ):
        path = tmp_path / "router.toml"
        path.write_text(text + MODELS)
        return load_config(path, environ)

    return load


def test_a_key_with_everything(load):
    (key,) = load(
        f'[[keys]]\nname = "app"\nkey_sha256 = "{HASH}"\nmodels = ["a"]\nmax_priority = "low"\n'
        "max_concurrency = 3\nadmin = true\n"
    ).keys
    assert key == KeyConfig(
        name="app", key_sha256=HASH, models=("a",), max_priority=PriorityBound.LOW, max_concurrency=3, admin=True
    )


def test_the_least_key(load):
    (key,) = load('[[keys]]\nname = "app"\nkey = "sk-1"\n').keys
    assert (key.models, key.max_priority, key.max_concurrency, key.admin) == (("*",), PriorityBound.HIGH, None, False)
    assert "sk-1" not in repr(key)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("keys = 3\n", "router.toml:1: keys: expected tables [[keys]], got int 3"),
        ("keys = [3]\n", "router.toml:1: keys[0]: expected a table, got int 3"),
        ('[[keys]]\nkey = "x"\n', "router.toml:1: keys[0].name: missing; it stands for the key in logs and metrics"),
        ('[[keys]]\nname = "a"\n', "router.toml:1: keys[0]: expected either `key` or `key_sha256`"),
        (f'[[keys]]\nname = "a"\nkey = "x"\nkey_sha256 = "{HASH}"\n', "router.toml:1: keys[0]: expected either"),
        ('[[keys]]\nname = "a"\nkey_sha256 = "x"\n', "router.toml:3: keys[0].key_sha256: expected 64 hexadecimal digits"),
        ('[[keys]]\nname = "a b"\nkey = "x"\n', "router.toml:2: keys[0].name: expected letters, digits and ._-"),
        ('[[keys]]\nname = "a"\nkey = "se cret"\n', "router.toml:3: keys[0].key: expected visible ASCII characters"),
        ('[[keys]]\nname = "a"\nkey = "x"\nmodels = ["c"]\n', "router.toml:4: keys[0].models[0]: no model 'c'"),
        ('[[keys]]\nname = "a"\nkey = "x"\nmax_concurrency = 0\n', "router.toml:4: keys[0].max_concurrency: expected"),
        ('[[keys]]\nname = "a"\nkey = "x"\nmax_priority = "top"\n', "router.toml:4: keys[0].max_priority: expected one"),
        ('[[keys]]\nname = "a"\nkey = "x"\nadmn = true\n', "router.toml:4: keys[0].admn: unknown key; did you mean"),
        (
            '[[keys]]\nname = "a"\nkey = "x"\n[[keys]]\nname = "a"\nkey = "y"\n',
            "router.toml:5: keys[1].name: there is another key called 'a'",
        ),
        (
            f'[[keys]]\nname = "a"\nkey = "foo"\n[[keys]]\nname = "b"\nkey_sha256 = "{HASH}"\n',
            "router.toml:4: keys[1]: the key of 'b' is another's too",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_it(load, tmp_path, text, problem):
    with pytest.raises(ConfigError) as caught:
        load(text)
    (found,) = [located(each).replace(f"{tmp_path}/", "") for each in caught.value.problems]
    assert found.startswith(problem)
    assert "se cret" not in found


def test_the_key_of_the_environment_is_none_of_them(load):
    with pytest.raises(ConfigError, match="another's too"):
        load('[[keys]]\nname = "a"\nkey = "foo"\n', API_KEY="foo")
    with pytest.raises(ConfigError, match="another key called 'API_KEY'"):
        load('[[keys]]\nname = "API_KEY"\nkey = "foo"\n')
