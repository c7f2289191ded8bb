"""The dashboard in a real browser: what is there to be seen, and what its buttons do."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.conftest import StartRouter
from tests.harness.processes import wait_until
from tests.harness.router import RouterProcess

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytestmark = [pytest.mark.process, pytest.mark.browser, pytest.mark.once]

SECONDS = 15
ENDLESS = {"tokens": 10_000, "token_seconds": 0.05}


def says(page: "Page", *words: str) -> None:
    """Wait until the page says all of it."""
    from playwright.sync_api import expect

    for each in words:
        expect(page.locator("body")).to_contain_text(each, use_inner_text=True)


def row(page: "Page", alias: str) -> "Locator":
    return page.locator(f"tr[data-alias='{alias}']")


def press(page: "Page", alias: str, button: str) -> None:
    row(page, alias).get_by_role("button", name=button, exact=True).click()


def until_state(page: "Page", alias: str, wanted: str) -> None:
    from playwright.sync_api import expect

    expect(row(page, alias).locator(".state")).to_have_text(wanted, use_inner_text=True)


def ask(page: "Page", words: str) -> None:
    page.get_by_role("textbox", name="message").fill(words)
    page.get_by_role("button", name="Send").click()


@pytest.fixture
def router(start_router: StartRouter) -> RouterProcess:
    models = {"swift": ["-np", "4"], "broken": ["--fake-exit-at-start", "1"]}
    return start_router(models=models, system={"max_load_attempts": 1})


@pytest.fixture
def complaints(page: "Page") -> list[str]:
    """What the browser's console says is wrong, a policy that was not kept among it."""
    found: list[str] = []
    page.on("console", lambda said: found.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: found.append(str(error)))
    return found


@pytest.fixture
def dashboard(router: RouterProcess, page: "Page", complaints: list[str]) -> "Iterator[Page]":
    """Nothing is wrong on it when the test is over."""
    page.goto(f"{router.url}/")
    yield page
    assert complaints == []


def test_what_an_operator_does(dashboard: "Page", router: RouterProcess) -> None:
    says(dashboard, "swift", "broken", "0 of 2 models in memory")
    assert dashboard.url == f"{router.url}/ui/"
    press(dashboard, "swift", "Load")
    until_state(dashboard, "swift", "ready")
    says(dashboard, "1 of 2 models in memory")

    # a chat answers, and its figures are shown
    ask(dashboard, "hello")
    says(dashboard, "first token after", "tokens/s")

    # a crash shows, and heals as soon as somebody asks
    pid = httpx.get(f"{router.url}/v1/models/swift/status").json()["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(
        lambda: httpx.get(f"{router.url}/v1/models/swift/status").json()["pid"] not in {pid, None},
        timeout_seconds=SECONDS,
    )
    until_state(dashboard, "swift", "ready")

    # what was decided stands there, with the reason
    says(dashboard, "Decisions", "start")
    says(dashboard, httpx.get(f"{router.url}/v1/router/decisions").json()["decisions"][-1]["why"])

    # what fails says why, and can be reset
    press(dashboard, "broken", "Load")
    until_state(dashboard, "broken", "failed")
    why = httpx.get(f"{router.url}/v1/models/broken/status").json()["error_message"]
    says(dashboard, why.splitlines()[0])
    press(dashboard, "broken", "Reset")
    until_state(dashboard, "broken", "off")

    press(dashboard, "swift", "Eject")
    until_state(dashboard, "swift", "off")


def test_a_request_is_seen_and_cancelled(dashboard: "Page", router: RouterProcess) -> None:
    assert router.chat("swift").status_code == 200
    says(dashboard, "Requests under way", "None.")
    pending = router.in_background("swift", stream=True, fake=ENDLESS, headers={"X-Request-ID": "mine"}, timeout=60)
    dashboard.locator("tr[data-request='mine']").get_by_role("button", name="Cancel").click()
    assert "request_cancelled" in pending.answer().text
    says(dashboard, "None.")


def test_variants_can_be_talked_to(start_router: StartRouter, page: "Page", header_gguf: Path) -> None:
    table = {
        "model_path": header_gguf,
        "name": "Swift One",
        "variants": {"wild": {"set": {"temperature": 1.5}}},
    }
    router = start_router(models={"swift": table})
    page.goto(f"{router.url}/ui/")
    says(page, "Swift One")
    page.get_by_label("model of the chat").select_option("swift:wild")
    says(page, "Ask swift:wild something")
    ask(page, "hello")
    says(page, "first token after")
    until_state(page, "swift", "ready")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where pictures go: TRIO_ROUTER_SCREENSHOTS says where they are kept, to be looked at."""
    folder = Path(os.environ.get("TRIO_ROUTER_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_a_phone(router: RouterProcess, browser: "Browser", pictures: Path) -> None:
    """Nothing stands beside the screen, and everything can be done there."""
    with browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True) as phone:
        page = phone.new_page()
        page.goto(f"{router.url}/ui/")
        row(page, "swift").get_by_role("button", name="Load").tap()
        until_state(page, "swift", "ready")
        row(page, "broken").get_by_role("button", name="Load").tap()
        until_state(page, "broken", "failed")
        assert page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]") == [390, 390]
        buttons = page.locator("td.actions button").all()
        assert len(buttons) == 7
        assert max(right(each) for each in buttons) <= 390
        pending = router.in_background("swift", stream=True, fake=ENDLESS, headers={"X-Request-ID": "mine"}, timeout=60)
        cancel = page.locator("tr[data-request='mine']").get_by_role("button", name="Cancel")
        assert right(cancel) <= 390
        page.screenshot(path=pictures / "dashboard-phone.png", full_page=True)
        cancel.tap()
        assert "request_cancelled" in pending.answer().text


def right(found: "Locator") -> float:
    box = found.bounding_box()
    assert box is not None
    return box["x"] + box["width"]


def test_both_themes(dashboard: "Page", router: RouterProcess, pictures: Path) -> None:
    # as it looks while something is done
    press(dashboard, "swift", "Load")
    press(dashboard, "broken", "Load")
    ask(dashboard, "hello")
    says(dashboard, "first token after")
    until_state(dashboard, "broken", "failed")
    pending = router.in_background("swift", stream=True, fake=ENDLESS, headers={"X-Request-ID": "mine"}, timeout=60)
    mine = dashboard.locator("tr[data-request='mine']")
    mine.wait_for()
    assert dashboard.locator("canvas").count() == 3
    for before, theme in (("auto", "light"), ("light", "dark")):
        dashboard.get_by_role("button", name=f"colours: {before}").click()
        until_theme(dashboard, theme)
        dashboard.mouse.move(0, 0)
        picture = pictures / f"dashboard-{theme}.png"
        dashboard.screenshot(path=picture, full_page=True, animations="disabled")
        assert picture.stat().st_size > 20_000
    dashboard.reload()
    until_theme(dashboard, "dark")
    mine.get_by_role("button", name="Cancel").click()
    assert "request_cancelled" in pending.answer().text


def until_theme(page: "Page", theme: str) -> None:
    page.get_by_role("button", name=f"colours: {theme}").wait_for()
    page.wait_for_function("theme => document.documentElement.dataset.theme === theme", arg=theme)
    # pico's ground: white, or nearly black
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (min(int(each) for each in re.findall(r"\d+", ground)[:3]) > 128) == (theme == "light"), ground


def test_with_keys_it_asks_for_one(start_router: StartRouter, page: "Page") -> None:
    from playwright.sync_api import expect

    router = start_router(models={"swift": []}, environment={"API_KEY": "sk-secret"})
    page.goto(f"{router.url}/ui/")
    key, enter = page.get_by_label("API key"), page.get_by_role("button", name="Enter")
    key.fill("sk-wrong")
    enter.click()
    expect(key).to_have_value("")  # it asks again
    key.fill("sk-secret")
    enter.click()
    says(page, "swift", "0 of 1 models in memory")
    press(page, "swift", "Load")
    until_state(page, "swift", "ready")
    assert page.evaluate("sessionStorage.length") == 1
    assert page.evaluate("Object.values(localStorage).includes('sk-secret')") is False
