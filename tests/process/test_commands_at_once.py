"""Loads, ejects, resets and requests of the same models at the same time: each has one clear answer, none hangs."""

import random
import threading
from collections import Counter
from collections.abc import Callable

import httpx
import pytest

from tests.conftest import StartRouter
from tests.harness.processes import wait_until
from tests.harness.router import RouterProcess, chat_body

pytestmark = pytest.mark.process

THREADS = 8
ROUNDS = 40
MODELS = ("a", "org/b", "broken")

ALLOWED = {
    "chat": {(200, ""), (503, "backend_unavailable"), (503, "model_failed"), (502, "backend_crashed")},
    "stream": {(200, ""), (503, "backend_unavailable"), (503, "model_failed"), (502, "backend_crashed")},
    "load": {(200, "success"), (503, "backend_unavailable"), (503, "model_failed")},
    "load_soon": {(202, "accepted"), (503, "model_failed")},
    "eject": {(200, "success"), (200, "not_found")},
    "force": {(200, "success"), (200, "not_found")},
    "reset": {(200, "success"), (200, "not_found")},
    "list": {(200, "")},
    "status": {(200, "")},
}


def do(client: httpx.Client, what: str, model: str) -> tuple[int, str]:
    """Ask, and what the answer was: its status, and its error's code or what it says of a command."""
    match what:
        case "chat" | "stream":
            answer = client.post("/v1/chat/completions", json=chat_body(model, stream=what == "stream"))
        case "load" | "load_soon":
            query = "" if what == "load" else "?wait=false"
            answer = client.post(f"/v1/models/load{query}", json={"model": model})
        case "eject" | "force":
            query = "" if what == "eject" else "?force=true"
            answer = client.post(f"/v1/models/eject{query}", json={"model": model})
        case "reset":
            answer = client.post(f"/v1/models/{model}/reset")
        case "list":
            answer = client.get("/v1/models")
        case _:
            answer = client.get(f"/v1/models/{model}/status")
    if what in {"chat", "stream"} and answer.status_code == 200:
        return 200, ""
    said = answer.json()
    if answer.status_code == 503:
        assert answer.headers["retry-after"]
    return answer.status_code, said["error"]["code"] if "error" in said else str(said.get("status", "")) * (
        what not in {"list", "status"}
    )


def client_of(router: RouterProcess, number: int, seen: Counter[tuple[str, tuple[int, str]]]) -> Callable[[], None]:
    chance = random.Random(number)

    def run() -> None:
        with router.client(timeout=30) as client:
            for _ in range(ROUNDS):
                what, model = chance.choice(list(ALLOWED)), chance.choice(MODELS)
                seen[what, do(client, what, model)] += 1

    return run


def test_each_has_one_clear_answer(start_router: StartRouter) -> None:
    router = start_router(
        models={
            "a": ["--fake-load-seconds", "0.05", "-np", "2"],
            "org/b": ["-np", "2"],
            "broken": ["--fake-exit-at-start", "1"],
        },
        system={"max_concurrent_models": 2, "max_load_attempts": 1},
    )
    seen: Counter[tuple[str, tuple[int, str]]] = Counter()
    threads = [threading.Thread(target=client_of(router, number, seen), daemon=True) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    odd = {pair: count for pair, count in seen.items() if pair[1] not in ALLOWED[pair[0]]}
    assert odd == {}
    assert sum(seen.values()) == THREADS * ROUNDS
    # what is said is what is so
    for model in MODELS:
        router.post("/v1/models/eject", {"model": model})
    wait_until(lambda: not router.servers())
    said = router.get("/v1/models/status").json()["models"]
    assert {(model["active"], model["queued"], model["pid"]) for model in said.values()} == {(0, 0, None)}
    assert {said["a"]["status"], said["org/b"]["status"]} == {"off"}
    assert router.chat("org/b").status_code == 200
