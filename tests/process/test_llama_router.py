"""The paths of llama-server's own router mode."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import StartRouter
from tests.harness.processes import wait_until
from tests.harness.router import RouterProcess, chat_body

pytestmark = pytest.mark.process


@pytest.fixture
def router(start_router: StartRouter) -> RouterProcess:
    return start_router(
        models={"one": ["-np", "2"], "org/two": [], "broken": ["--fake-exit-at-start", "3"], "sees": ["--mmproj", "x"]},
        system={"max_load_attempts": 1},
    )


def values(router: RouterProcess) -> dict[str, str]:
    return {each["id"]: each["status"]["value"] for each in router.get("/models").json()["data"]}


def test_load_and_unload(router: RouterProcess) -> None:
    assert set(values(router).values()) == {"unloaded"}
    assert router.post("/models/load", {"model": "org/two"}).json() == {"success": True}
    wait_until(lambda: values(router)["org/two"] == "loaded")
    again = router.post("/models/load", {"model": "org/two"})
    assert (again.status_code, again.json()["error"]["code"]) == (400, "model_is_running")
    assert router.post("/models/unload", {"model": "org/two"}).json() == {"success": True}
    assert values(router)["org/two"] == "unloaded"
    again = router.post("/models/unload", {"model": "org/two"})
    assert (again.status_code, again.json()["error"]["code"]) == (400, "model_is_not_running")
    assert router.post("/models/load", {"model": "none"}).status_code == 404
    entry = next(each for each in router.get("/models").json()["data"] if each["id"] == "sees")
    assert entry["architecture"] == {"input_modalities": ["text", "image"], "output_modalities": ["text"]}
    assert entry["status"]["args"] == ["llama-server", "--mmproj", "x"]


def test_unload_does_not_wait_for_what_runs(router: RouterProcess, tmp_path: Path) -> None:
    """Open WebUI gives it 30 s, as long as running requests may take."""
    gate = tmp_path / "gate"
    running = router.in_background("one", fake={"hold_until": str(gate)})
    router.wait_for_status("one", active=1)
    assert router.post("/models/unload", {"model": "one"}).json() == {"success": True}
    assert values(router)["one"] == "unloaded"
    router.wait_for_status("one", active=1)
    again = router.post("/models/unload", {"model": "one"})
    assert (again.status_code, again.json()["error"]["code"]) == (400, "model_is_not_running")
    gate.touch()
    assert running.answer().status_code == 200
    router.wait_for_status("one", status="off")


def test_what_failed_says_so(router: RouterProcess) -> None:
    router.post("/models/load", {"model": "broken"})
    router.wait_for_status("broken", status="failed")
    entry = next(each for each in router.get("/models").json()["data"] if each["id"] == "broken")
    assert (entry["status"]["value"], entry["status"]["failed"]) == ("unloaded", True)
    assert entry["status"]["exit_code"] != 0
    assert router.get("/v1/models/broken").json()["status"]["value"] == "failed"


def test_events(router: RouterProcess) -> None:
    seen: list[dict[str, Any]] = []
    with httpx.stream("GET", f"{router.url}/models/sse", timeout=10) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        for line in lines:
            if line.startswith("data: "):
                seen.append(json.loads(line.removeprefix("data: ")))
                if len(seen) == 1:
                    router.post("/models/load", {"model": "one"})
                if seen[-1].get("data", {}).get("status") == "loaded":
                    router.post("/models/unload", {"model": "one"})
                    router.post("/models/load", {"model": "org/two"})
                if seen[-1]["model"] == "org/two":
                    break
    assert seen.pop()["data"]["status"] == "loading"
    assert seen[0] == {"model": "*", "event": "models_reload"}
    told = [each["data"]["status"] for each in seen[1:]]
    assert told == ["loading", "loaded", "unloaded"], "each once, though we know more states"
    assert {(each["model"], each["event"]) for each in seen[1:]} == {("one", "model_status")}
    assert seen[1]["data"]["progress"]["stages"] == ["text_model"]
    assert seen[2]["data"]["info"]["id"] == "one"


def test_asked_to_reload_it_reads_router_toml_again(start_router: StartRouter) -> None:
    router = start_router(
        models={"one": []}, keys=[{"name": "app", "key": "sk-app"}], environment={"API_KEY": "sk-admin"}
    )
    text = router.config_path.read_text()
    one = text[text.index('[models."one"]') : text.index("[[keys]]")]
    router.config_path.write_text(text + one.replace('"one"', '"two"'))

    def ask(query: str, key: str) -> httpx.Response:
        return httpx.get(f"{router.url}/models{query}", headers={"Authorization": f"Bearer {key}"})

    assert ask("?reload=1", "sk-app").json()["error"]["code"] == "admin_required"
    assert [each["id"] for each in ask("", "sk-app").json()["data"]] == ["one"]
    assert [each["id"] for each in ask("?reload=1", "sk-admin").json()["data"]] == ["one", "two"]
    router.config_path.write_text("[api")
    refused = ask("?reload=1", "sk-admin")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_config")


def test_what_belongs_to_one_model(router: RouterProcess) -> None:
    assert router.get("/props").json()["role"] == "router"
    refused = router.get("/props?model=one&autoload=false")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "model_not_loaded")
    assert values(router)["one"] == "unloaded"
    props = router.get("/props?model=one").json()
    assert props["total_slots"] == 2
    assert router.get("/props?model=one&autoload=false").status_code == 200
    nobodys = router.get("/slots")
    assert (nobodys.status_code, nobodys.json()["error"]["code"]) == (400, "missing_model")
    assert router.get("/slots?model=none").json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("headers", [{}, {"Expect": "100-continue"}])
def test_a_model_that_may_not_be_loaded(router: RouterProcess, headers: dict[str, str]) -> None:
    def ask(query: str) -> httpx.Response:
        return httpx.post(f"{router.url}/v1/chat/completions{query}", json=chat_body("one"), headers=headers)

    refused = ask("?autoload=false")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "model_not_loaded")
    assert ask("?autoload=true").status_code == 200
    assert ask("?autoload=false").status_code == 200


def test_upstream_is_the_llama_server_itself(router: RouterProcess) -> None:
    moved = httpx.get(f"{router.url}/upstream/org/two")
    assert (moved.status_code, moved.headers["location"]) == (302, "/upstream/org/two/")
    assert router.get("/upstream/org/two/health").json() == {"status": "ok"}
    assert router.get("/upstream/org/two/nothing").status_code == 404
    assert router.get("/upstream/none/health").json()["error"]["code"] == "model_not_found"
    assert router.request("DELETE", "/upstream/org/two/v1/stream?conv_id=x").status_code == 204
    body = chat_body("whatever the page says")
    answer = router.post("/upstream/org/two/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-queue-time-ms"]
    nonsense = router.request("POST", "/upstream/org/two/v1/chat/completions", content=b'{"messages": [}')
    assert (nonsense.status_code, nonsense.json()["error"]["code"]) == (400, "invalid_json")
    stats = router.get("/v1/queue/stats").json()["per_model"]["org/two"]
    assert stats["total_requests"] == 1


def test_upstream_needs_an_admin_for_what_computes_nothing(start_router: StartRouter) -> None:
    router = start_router(models={"one": []}, keys=[{"name": "app", "key": "sk-app"}])
    bearer = {"Authorization": "Bearer sk-app"}
    assert httpx.post(f"{router.url}/upstream/one/slots/0", json={}, headers=bearer).status_code == 403
    assert httpx.post(
        f"{router.url}/upstream/one/v1/chat/completions", json=chat_body("one"), headers=bearer
    ).is_success
    assert httpx.post(f"{router.url}/models/unload", json={"model": "one"}, headers=bearer).status_code == 403
    assert httpx.get(f"{router.url}/upstream/one/health").status_code == 401


@pytest.mark.parametrize("headers", [{}, {"Expect": "100-continue"}])
@pytest.mark.parametrize("changed", [{"model": "gpt-4o"}, {"model": None}])
def test_a_default_model(start_router: StartRouter, changed: dict[str, Any], headers: dict[str, str]) -> None:
    router = start_router(models={"one": [], "two": []}, system={"default_model": "two"})
    body = {name: value for name, value in {**chat_body("one"), **changed}.items() if value is not None}
    answer = httpx.post(f"{router.url}/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert (values(router)["one"], values(router)["two"]) == ("unloaded", "loaded")


def test_a_key_is_not_told_of_a_default_model_that_it_may_not_ask(start_router: StartRouter) -> None:
    keys = [{"name": "app", "key": "sk-app", "models": ["one"]}, {"name": "all", "key": "sk-all"}]
    router = start_router(models={"one": [], "two": []}, system={"default_model": "two"}, keys=keys)
    one, every = ({"Authorization": f"Bearer {key}"} for key in ("sk-app", "sk-all"))
    assert httpx.post(f"{router.url}/v1/chat/completions", json=chat_body("two"), headers=every).is_success
    assert httpx.get(f"{router.url}/props", headers=every).json()["model_alias"] == "two"
    assert httpx.get(f"{router.url}/props", headers=one).json()["model_alias"] == "trio-router"


COMMANDS = ["/slots/0?action=save", "/slots/0?action=erase", "/lora-adapters", "/props"]


@pytest.mark.parametrize("target", COMMANDS)
def test_what_is_said_to_one_model(router: RouterProcess, target: str) -> None:
    """llama-server's router takes the model's name from the body, where there is one that can hold it."""
    body = {"model": "org/two", "filename": "a.bin"}
    told = {"path": target, "body": body}
    assert router.post(target, body).json() == told
    named = target + ("&" if "?" in target else "?") + "model=org/two"
    assert router.post(named, [{"id": 0, "scale": 0.5}]).json() == {"path": named, "body": [{"id": 0, "scale": 0.5}]}
    assert router.request("POST", named).json() == {"path": named, "body": None}
    assert values(router) == {"one": "unloaded", "org/two": "loaded", "broken": "unloaded", "sees": "unloaded"}
    if "slots" in target:
        absent = router.post("/slots/1?action=save", body)
        assert (absent.status_code, absent.json()["error"]["message"]) == (400, "Invalid slot ID")
    for wrong, status, code in (
        (b"", 400, "missing_model"),
        (b"[]", 400, "missing_model"),
        (b'{"model": 1}', 400, "missing_model"),
        (b"{", 400, "invalid_json"),
        (b'{"model": "nobody"}', 404, "model_not_found"),
    ):
        answer = router.request("POST", target, content=wrong)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_slot_that_computes_has_its_action_wait(router: RouterProcess, tmp_path: Path) -> None:
    """Longer than a question about it may take."""
    gate = tmp_path / "gate"
    running = router.in_background("sees", fake={"hold_until": str(gate)})
    router.wait_for_status("sees", active=1)
    with ThreadPoolExecutor() as pool:
        erased = pool.submit(router.post, "/slots/0?action=erase", {"model": "sees"})
        with pytest.raises(TimeoutError):
            erased.result(6)
        gate.touch()
        assert erased.result(10).status_code == 200
    assert running.answer().status_code == 200


def test_commands_to_a_model_are_an_operators(start_router: StartRouter) -> None:
    router = start_router(models={"one": []}, keys=[{"name": "app", "key": "sk-app"}])
    for target in COMMANDS:
        answer = httpx.post(router.url + target, json={"model": "one"}, headers={"Authorization": "Bearer sk-app"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_required")


def test_a_word_to_an_answer_under_way(start_router: StartRouter) -> None:
    keys = [
        {"name": "app", "key": "sk-app", "models": ["one"]},
        {"name": "other", "key": "sk-other", "models": ["two"]},
        {"name": "boss", "key": "sk-boss", "admin": True},
    ]
    router = start_router(models={"one": [], "two": []}, keys=keys)

    def end(id: str, model: str = "one", key: str = "sk-app") -> httpx.Response:
        body = {"model": model, "id": id, "action": "reasoning_end"}
        return httpx.post(f"{router.url}/v1/chat/completions/control", json=body, headers={"X-Api-Key": key})

    assert end("x").json() == {"success": False, "message": "no active completion: 'one' is not loaded"}
    body = chat_body("one", stream=True, fake={"tokens": 200, "token_seconds": 0.05})
    headers = {"X-Api-Key": "sk-app"}
    with httpx.stream("POST", f"{router.url}/v1/chat/completions", json=body, headers=headers) as answer:
        lines = answer.iter_lines()
        first = next(line for line in lines if line.startswith("data: "))
        # its only slot is taken: what is said about it waits for none
        said = end(json.loads(first.removeprefix("data: "))["id"])
        assert (said.status_code, said.json()["success"]) == (200, True)
        assert end("another").json()["success"] is False
    assert end("x", key="sk-other").json()["error"]["code"] == "model_not_allowed"
    assert end("x", "nobody", key="sk-boss").json()["error"]["code"] == "model_not_found"


def test_a_default_model_answers_questions_too(start_router: StartRouter) -> None:
    router = start_router(models={"one": ["-np", "2"], "two": []}, system={"default_model": "one"})
    assert router.get("/props").json()["model_path"] == "none"
    assert values(router)["one"] == "unloaded"
    for path in ("/slots", "/slots?model=gpt-4o", "/props?model=gpt-4o"):
        assert router.get(path).status_code == 200
    assert len(router.get("/slots").json()) == 2
    assert router.request("POST", "/slots/0?action=erase").json()["path"] == "/slots/0?action=erase"
    assert router.post("/lora-adapters", [{"id": 0, "scale": 1}]).status_code == 200
    props = router.get("/props").json()  # of whom a program that knows of one llama-server would ask
    assert (props["role"], props["max_instances"]) == ("router", 3)
    assert (props["total_slots"], props["build_info"]) == (2, "b1-fake")
    assert props["default_generation_settings"]["n_ctx"] == 1024
    assert props["model_path"].endswith(".gguf")
    assert values(router)["two"] == "unloaded"
