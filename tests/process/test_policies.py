"""Other names, variants and keep_alive of a router that runs."""

import json

import pytest

from tests.conftest import StartRouter
from tests.harness.processes import wait_until
from tests.harness.record import Record
from tests.process.test_reload import rewrite

pytestmark = pytest.mark.process


def test_variants_share_one_llama_server(start_router: StartRouter, record: Record, header_gguf) -> None:
    table = {
        "model_path": header_gguf,
        "flags": ["-np", "2", *record.flags],
        "aliases": ["gpt-4o"],
        "name": "Qwen",
        "set": {"temperature": 0.5},
        "variants": {"creative": {"set": {"temperature": 1.25}, "description": "wilder"}},
    }
    router = start_router(models={"qwen": table, "other": []})
    listed = {entry["id"]: entry for entry in router.get("/v1/models").json()["data"]}
    assert list(listed) == ["qwen", "qwen:creative", "other"]
    assert (listed["qwen"]["name"], listed["qwen:creative"]["description"]) == ("Qwen", "wilder")
    for said in ("qwen", "qwen:creative", "gpt-4o"):
        answer = router.chat(said)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == said, "as llama-server says it"
    assert set(router.servers().values()) == {"qwen"}
    assert len(router.servers()) == 1
    pid = router.status("qwen")["pid"]

    # another policy is no reason for another llama-server
    rewrite(router, "1.25", "0.75")
    rewrite(router, '"gpt-4o"', '"gpt-5"')
    told = router.post("/v1/config/reload").json()
    assert told["changed"] == ["models.qwen.aliases", "models.qwen.variants"]
    assert told["models"] == {"added": [], "removed": [], "restarted": [], "unchanged": ["qwen", "other"]}
    assert router.chat("gpt-4o").json()["error"]["code"] == "model_not_found"
    assert router.chat("gpt-5").status_code == 200
    assert router.status("qwen")["pid"] == pid

    # operators may call it by any of its names
    assert router.post("/v1/models/eject", {"model": "qwen:creative"}).json()["status"] == "success"
    assert router.status("gpt-5")["status"] == "off"


def test_keep_alive(start_router: StartRouter) -> None:
    router = start_router(models={"one": [], "two": []}, system={"idle_timeout_sec": 600})
    assert router.chat("one").status_code == 200
    assert router.chat("two", keep_alive=0).status_code == 200
    router.wait_for_status("two", status="off")
    assert router.status("one")["status"] == "ready"
    assert router.chat("one", keep_alive="200ms").status_code == 200
    router.wait_for_status("one", status="off")

    # a request that says nothing goes by what holds for all
    assert router.chat("one", keep_alive=0, stream=True).text.endswith("data: [DONE]\n\n")
    router.wait_for_status("one", status="off")
    assert router.chat("one").status_code == 200
    assert router.chat("two").status_code == 200
    assert router.status("one")["status"] == "ready"
    refused = router.chat("one", keep_alive="a while")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_keep_alive")


def test_stay(start_router: StartRouter) -> None:
    router = start_router(models={"one": [], "two": []}, system={"idle_timeout_sec": 0.2})
    assert router.chat("one", keep_alive=-1).status_code == 200
    assert router.chat("two").status_code == 200
    router.wait_for_status("two", status="off")
    assert router.status("one")["status"] == "ready"
    assert router.chat("one").status_code == 200
    wait_until(lambda: json.loads(router.get("/v1/models/one/status").text)["status"] == "off", timeout_seconds=10)
