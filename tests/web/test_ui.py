"""The dashboard's files; what they do in a browser is `tests/browser/test_dashboard.py`."""

import hashlib
import json
import re
from importlib import resources

import pytest

from tests.web.site import open_site
from trio_router.config.schema import KeyConfig
from trio_router.web.ui import POLICY, read_assets

ASSETS = read_assets()


async def prompt(*_: object) -> None:
    """A backend that is not asked."""


@pytest.mark.parametrize("path", ["/", "/ui"])
async def test_the_way_to_it(tmp_path, path):
    async with open_site(tmp_path, prompt) as site:
        reply = await site.ask("GET", path)
        assert reply.status == 302
        assert reply.headers["location"] == "/ui/"


@pytest.mark.parametrize("keys", [(), (KeyConfig(name="a", key="sk-a"),)])
@pytest.mark.parametrize("name", sorted(ASSETS))
async def test_every_file_needs_no_key_and_runs_nothing_of_others(tmp_path, name, keys):
    async with open_site(tmp_path, prompt, keys=keys) as site:
        reply = await site.ask("GET", f"/ui/{name}")
        assert reply.status == 200
        assert reply.body == ASSETS[name].content
        assert reply.headers["content-security-policy"] == POLICY
        assert reply.headers["x-content-type-options"] == "nosniff"
        tag = reply.headers["etag"]
        again = await site.ask("GET", f"/ui/{name}", [("If-None-Match", tag)])
        assert (again.status, again.body) == (304, b"")


@pytest.mark.parametrize("name", ["nothing", "../app.py", "%2e%2e/app.py", "..%2fapp.py", "vendor", "vendor/"])
async def test_nothing_else_is_there(tmp_path, name):
    async with open_site(tmp_path, prompt) as site:
        assert (await site.ask("GET", f"/ui/{name}")).status == 404


def test_what_it_needs_came_with_it():
    page = ASSETS["index.html"].content.decode()
    named = re.findall(r'(?:href|src)="([^"]+)"', page)
    for name in ("app.js", "net.js"):
        named += [each.removeprefix("./") for each in re.findall(r'from "([^"]+)"', ASSETS[name].content.decode())]
    assert len(named) > 6
    assert set(named) <= set(ASSETS)
    assert "style=" not in page
    assert "<script>" not in page


def test_what_was_brought_along_is_what_the_list_says():
    folder = resources.files("trio_router.web") / "ui" / "vendor"
    listed = json.loads((folder / "vendor.json").read_text())
    assert {entry["file"] for entry in listed} | {"vendor.json"} == {each.name for each in folder.iterdir()}
    for entry in listed:
        assert hashlib.sha256((folder / entry["file"]).read_bytes()).hexdigest() == entry["sha256"], entry["file"]
        assert entry["licence"]
        assert entry["version"]
