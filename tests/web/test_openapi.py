"""The description is valid, and describes the routes there are: all of them, and no others."""

import re

import pytest
from openapi_spec_validator import validate

from tests.web.site import wiring
from trio_router.config.schema import ApiConfig, RouterConfig, SystemConfig
from trio_router.telemetry.events import Events
from trio_router.web.openapi import ENDPOINTS, document


@pytest.mark.parametrize("keys", [True, False])
def test_it_is_openapi(keys):
    described = document(["qwen", "org/b"], keys=keys)
    validate(described)
    assert bool(described["security"]) is keys


def test_no_endpoint_is_described_twice():
    seen = [(endpoint.method, endpoint.path) for endpoint in ENDPOINTS]
    assert len(seen) == len(set(seen))


def test_it_describes_the_routes_there_are(tmp_path):
    config = RouterConfig(
        path=tmp_path / "router.toml",
        api=ApiConfig(),
        system=SystemConfig(base_models_path=tmp_path, gpu_devices=()),
        models={},
    )
    _, connections = wiring(config, Events())
    routes = {
        (method.lower(), re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in connections.app.app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    pages = {("get", path) for path in ("/", "/ui", "/ui/", "/ui/{name}")}  # for people
    theirs = {(method, "/upstream/{target}") for method in ("get", "post", "delete")}  # whatever a llama-server has
    assert {(endpoint.method, endpoint.path) for endpoint in ENDPOINTS} == routes - pages - theirs
