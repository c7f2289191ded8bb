"""The schema for editors."""

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest

from trio_router.config.json_schema import json_schema

HERE = Path(__file__).parents[2]
VALIDATOR = jsonschema.Draft4Validator(json_schema())


def test_the_file_is_what_the_classes_say():
    written = json.loads((HERE / "router.schema.json").read_text())
    assert written == json_schema(), "trio-router schema > router.schema.json"


def test_it_is_a_schema_and_ours_is_right():
    jsonschema.Draft4Validator.check_schema(json_schema())
    text = (HERE / "router.toml").read_text()
    assert text.startswith("#:schema ./router.schema.json\n")
    VALIDATOR.validate(tomllib.loads(text))


def test_every_key_is_explained():
    properties = json_schema()["properties"]
    tables = (properties["api"], properties["system"], properties["models"]["additionalProperties"])
    silent = [name for table in tables for name, entry in table["properties"].items() if "description" not in entry]
    assert silent == []


@pytest.mark.parametrize(
    "text",
    [
        "[api]\nport = 70000",
        "[api]\nport = '80'",
        "[api]\nprot = 80",
        "[system]\naging_sec = 0",
        "[system]\nbackend_transport = 'udp'",
        "[system]\ngpu_devices = [0, 0]",
        "[models.a]\nflags = []",
        "[[keys]]\nkey = 'x'",
    ],
)
def test_what_is_wrong_is_seen(text):
    assert list(VALIDATOR.iter_errors(tomllib.loads(text)))
