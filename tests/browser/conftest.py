"""Debian's Chromium without a screen, driven by Playwright."""

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.conftest import _missing

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FLAGS = (
    "--no-sandbox",  # tests may run as root, in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-proxy-server",
)
MILLISECONDS = 15_000
"""How long something may take to be seen."""


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """One for a module's tests."""
    chromium = shutil.which("chromium")
    if chromium is None:
        _missing("no Chromium: apt-get install chromium")
        raise AssertionError
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=MILLISECONDS)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser: "Browser") -> Iterator["Page"]:
    """A window that nobody has used."""
    with browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-GB") as context:
        context.set_default_timeout(MILLISECONDS)
        yield context.new_page()
