"""The dashboard in a real browser: what is there to be seen, and what its buttons do."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.conftest import StartRouter
from tests.harness.processes import wait_until
from tests.harness.router import RouterProcess

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

pytestmark = [pytest.mark.process, pytest.mark.browser]

SECONDS = 15
TEXT = "return document.body.innerText"


def says(browser: "Chrome", *words: str) -> str:
    """Wait until the page says all of it; returns what it says."""
    text = ""

    def look() -> bool:
        nonlocal text
        text = browser.execute_script(TEXT)
        return all(word in text for word in words)

    try:
        wait_until(look, timeout_seconds=SECONDS)
    except TimeoutError:
        raise AssertionError(f"the page does not say {words}: {text}") from None
    return text


def press(browser: "Chrome", alias: str, button: str) -> None:
    pressed = browser.execute_script(
        "const row = document.querySelector(`tr[data-alias='${arguments[0]}']`);"
        "const found = [...row.querySelectorAll('button')].find((each) => each.innerText === arguments[1]);"
        "found?.click(); return Boolean(found)",
        alias,
        button,
    )
    assert pressed, f"{alias} has no button {button}"


def state(browser: "Chrome", alias: str) -> str:
    found: str = browser.execute_script(
        "return document.querySelector(`tr[data-alias='${arguments[0]}'] .state`)?.innerText ?? ''", alias
    )
    return found


def until_state(browser: "Chrome", alias: str, wanted: str) -> None:
    wait_until(lambda: state(browser, alias) == wanted, timeout_seconds=SECONDS, what=f"{alias} {wanted}")


def complaints(browser: "Chrome") -> list[dict[str, Any]]:
    """What the browser's console says is wrong, a policy that was not kept among it."""
    return [each for each in browser.get_log("browser") if each["level"] == "SEVERE"]


@pytest.fixture
def router(start_router: StartRouter) -> RouterProcess:
    models = {"swift": ["-np", "4"], "broken": ["--fake-exit-at-start", "1"]}
    return start_router(models=models, system={"max_load_attempts": 1})


@pytest.fixture
def page(browser: "Chrome", router: RouterProcess) -> Iterator["Chrome"]:
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(f"{router.url}/")
    yield browser
    browser.get("about:blank")  # its streams end


def test_what_an_operator_does(page: "Chrome", router: RouterProcess) -> None:
    says(page, "swift", "broken", "0 of 2 models in memory")
    assert page.current_url == f"{router.url}/ui/"
    press(page, "swift", "Load")
    until_state(page, "swift", "ready")
    says(page, "1 of 2 models in memory")

    # a chat answers, and its figures are shown
    page.execute_script(
        "const form = document.querySelector('form.say'); form.words.value = 'hello'; form.requestSubmit()"
    )
    says(page, "first token after", "tokens/s")

    # a crash shows, and heals as soon as somebody asks
    pid = httpx.get(f"{router.url}/v1/models/swift/status").json()["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(
        lambda: httpx.get(f"{router.url}/v1/models/swift/status").json()["pid"] not in {pid, None},
        timeout_seconds=SECONDS,
    )
    until_state(page, "swift", "ready")

    # what was decided stands there, with the reason
    says(page, "Decisions", "start")
    said = httpx.get(f"{router.url}/v1/router/decisions").json()["decisions"][-1]["why"]
    says(page, said)

    # what fails says why, and can be reset
    press(page, "broken", "Load")
    until_state(page, "broken", "failed")
    why = httpx.get(f"{router.url}/v1/models/broken/status").json()["error_message"]
    says(page, why.splitlines()[0])
    press(page, "broken", "Reset")
    until_state(page, "broken", "off")

    press(page, "swift", "Eject")
    until_state(page, "swift", "off")
    assert complaints(page) == []


def test_a_request_is_seen_and_cancelled(page: "Chrome", router: RouterProcess) -> None:
    assert router.chat("swift").status_code == 200
    says(page, "Requests under way", "None.")
    endless = {"tokens": 10_000, "token_seconds": 0.05}
    pending = router.in_background("swift", stream=True, fake=endless, headers={"X-Request-ID": "mine"}, timeout=60)
    pressed = "const found = document.querySelector(`tr[data-request='mine'] button`); found?.click(); return !!found"
    wait_until(lambda: page.execute_script(pressed), timeout_seconds=SECONDS)
    assert "request_cancelled" in pending.answer().text
    says(page, "None.")
    assert complaints(page) == []


def test_variants_can_be_talked_to(browser: "Chrome", start_router: StartRouter, header_gguf: Path) -> None:
    table = {
        "model_path": header_gguf,
        "name": "Swift One",
        "variants": {"wild": {"set": {"temperature": 1.5}}},
    }
    router = start_router(models={"swift": table})
    browser.get(f"{router.url}/ui/")
    says(browser, "Swift One", "swift:wild")
    browser.execute_script(
        "const chosen = document.querySelector('select[aria-label=\"model of the chat\"]');"
        "chosen.value = 'swift:wild'; chosen.dispatchEvent(new Event('change'))"
    )
    says(browser, "Ask swift:wild something")
    browser.execute_script(
        "const form = document.querySelector('form.say'); form.words.value = 'hello'; form.requestSubmit()"
    )
    says(browser, "first token after")
    until_state(browser, "swift", "ready")
    browser.get("about:blank")


def test_a_phone(page: "Chrome", router: RouterProcess, pictures: Path) -> None:
    """Nothing stands beside the screen, and everything can be done there."""
    screen = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        press_when_there(page)
        until_state(page, "swift", "ready")
        press(page, "broken", "Load")
        until_state(page, "broken", "failed")
        wide = page.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert wide == [390, 390]
        buttons = page.execute_script(
            "return [...document.querySelectorAll('td.actions button')].map((each) => each.getBoundingClientRect().right)"
        )
        assert buttons
        assert max(buttons) <= 390
        endless = {"tokens": 10_000, "token_seconds": 0.05}
        pending = router.in_background("swift", stream=True, fake=endless, headers={"X-Request-ID": "mine"}, timeout=60)
        cancel = (
            "const found = document.querySelector(`tr[data-request='mine'] button`); if (!found) return 0;"
            "found.click(); return found.getBoundingClientRect().right"
        )
        assert wait_until(lambda: page.execute_script(cancel), timeout_seconds=SECONDS) <= 390
        assert "request_cancelled" in pending.answer().text
        assert page.save_screenshot(str(pictures / "dashboard-phone.png"))
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where pictures go: TRIO_ROUTER_SCREENSHOTS says where they are kept, to be looked at."""
    folder = Path(os.environ.get("TRIO_ROUTER_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes(page: "Chrome", theme: str, pictures: Path) -> None:
    page.execute_script("localStorage.setItem('theme', arguments[0])", theme)
    page.set_window_size(1280, 1600)
    page.refresh()
    press_when_there(page)
    until_state(page, "swift", "ready")
    wait_until(lambda: page.execute_script("return document.querySelectorAll('canvas').length") == 3)
    assert page.execute_script("return document.documentElement.dataset.theme") == theme
    # pico's ground: white, or nearly black
    ground = page.execute_script("return getComputedStyle(document.documentElement).backgroundColor")
    assert (min(int(each) for each in re.findall(r"\d+", ground)[:3]) > 128) == (theme == "light"), ground
    picture = pictures / f"dashboard-{theme}.png"
    assert page.save_screenshot(str(picture))
    assert picture.stat().st_size > 20_000
    assert complaints(page) == []


def press_when_there(page: "Chrome") -> None:
    says(page, "swift")
    press(page, "swift", "Load")


def test_with_keys_it_asks_for_one(browser: "Chrome", start_router: StartRouter) -> None:
    router = start_router(models={"swift": []}, environment={"API_KEY": "sk-secret"})
    browser.get(f"{router.url}/ui/")
    says(browser, "API key")
    enter = "const form = document.querySelector('form.key'); form.key.value = arguments[0]; form.requestSubmit()"
    browser.execute_script(enter, "sk-wrong")
    says(browser, "API key")
    browser.execute_script(enter, "sk-secret")
    says(browser, "swift", "0 of 1 models in memory")
    press(browser, "swift", "Load")
    until_state(browser, "swift", "ready")
    assert browser.execute_script("return sessionStorage.length") == 1
    assert browser.execute_script("return Object.values(localStorage).includes('sk-secret')") is False
    browser.execute_script("sessionStorage.clear()")
    browser.get("about:blank")
