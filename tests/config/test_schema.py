import enum
from pathlib import Path

import attrs
import pytest

from trio_router.config import ApiConfig, ModelConfig, OutOfRange, SystemConfig


def build(schema, **values):
    required = {
        SystemConfig: {"base_models_path": Path()},
        ModelConfig: {"alias": "a", "model_path": "m", "file": Path("m")},
    }
    return schema(**{**required.get(schema, {}), **values})


@pytest.mark.parametrize(
    ("schema", "name", "value"),
    [
        (ApiConfig, "port", 0),
        (ApiConfig, "port", 65535),
        (ApiConfig, "cors_origins", ("http://localhost:3000", "chrome-extension://abc")),
        (ApiConfig, "allowed_hosts", ("*",)),
        (ApiConfig, "allowed_hosts", ()),
        (
            ApiConfig,
            "allowed_hosts",
            ("Router.example", "a_b", "10.0.0.1", "::1", "fe80::1", "::ffff:10.0.0.1", "rüter"),
        ),
        (ApiConfig, "key", "sk-x~!"),
        (SystemConfig, "idle_timeout_sec", 0.001),
        (SystemConfig, "drain_timeout_sec", 0),
        (SystemConfig, "gpu_devices", ()),
        (SystemConfig, "gpu_devices", (1, 0)),
        (SystemConfig, "max_queue_size_per_model", 0),
        (SystemConfig, "max_retries", 0),
        (SystemConfig, "vram_multiplier", 1),
        (ModelConfig, "flags", ("", "ü")),
    ],
)
def test_within_its_range(schema, name, value):
    assert getattr(build(schema, **{name: value}), name) == value


@pytest.mark.parametrize(
    ("schema", "name", "value", "reason"),
    [
        (ApiConfig, "host", "", "a name without blanks, got ''"),
        (ApiConfig, "host", "a b", "a name without blanks, got 'a b'"),
        (ApiConfig, "port", -1, "a number from 0 to 65535, got -1"),
        (ApiConfig, "port", 65536, "a number from 0 to 65535, got 65536"),
        (ApiConfig, "max_body_mb", 0, "a number from 1 to 16384, got 0"),
        (ApiConfig, "cors_origins", ("http://x", "http://x/"), "an origin such as"),
        (ApiConfig, "cors_origins", ("localhost",), "an origin such as"),
        *(
            (ApiConfig, "allowed_hosts", ("localhost", name), "without port and brackets")
            for name in ("a:80", "http://x", "*.y.org", "[::2]", "x.", "a b", "", ".", "u@x", "x/y")
        ),
        (SystemConfig, "idle_timeout_sec", 0, "a number > 0, got 0"),
        (SystemConfig, "idle_timeout_sec", float("nan"), "a number > 0, got nan"),
        (SystemConfig, "drain_timeout_sec", -1.0, "a number >= 0, got -1.0"),
        (SystemConfig, "gpu_devices", (0, -1), "a number >= 0, got -1"),
        (SystemConfig, "gpu_devices", (0, 1, 0), "each entry once, got 0"),
        (SystemConfig, "vram_multiplier", 0.9, "a number >= 1, got 0.9"),
        (ModelConfig, "model_path", "", "a path, got ''"),
        (ModelConfig, "flags", ("a\0",), "an argument without NUL"),
        (ModelConfig, "slots", 0, "a number >= 1, got 0"),
    ],
)
def test_out_of_range(schema, name, value, reason):
    with pytest.raises(OutOfRange) as caught:
        build(schema, **{name: value})
    assert reason in caught.value.reason
    assert str(caught.value).startswith(f"{name}: expected ")


@pytest.mark.parametrize("key", ["a b", "", "ü", "hunter2\n"])
def test_a_key_is_never_repeated(key):
    with pytest.raises(OutOfRange) as caught:
        ApiConfig(key=key)
    assert str(caught.value) == "key: expected visible ASCII characters without blanks"


def test_a_key_is_not_in_the_repr():
    assert "hunter2" not in repr(ApiConfig(key="hunter2"))


@pytest.mark.parametrize("schema", [ApiConfig, SystemConfig, ModelConfig])
def test_facts_are_frozen_and_numbers_have_ranges(schema):
    fact = build(schema)
    for field in attrs.fields(schema):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(fact, field.name, None)
        if field.type in {int, float}:
            assert field.validator is not None, field.name
        assert not (isinstance(field.type, type) and issubclass(field.type, enum.StrEnum)), "cattrs takes these for str"
