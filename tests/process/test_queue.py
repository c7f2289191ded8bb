"""Slots, order, bounds of the queue."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from tests.conftest import StartRouter
from tests.harness.record import Record
from tests.harness.router import chat_body
from trio_router.cli import main

pytestmark = pytest.mark.process


async def test_32_clients_on_4_slots(start_router: StartRouter, record: Record) -> None:
    """Four run at once, high overtakes low, low still finishes."""
    gate = record.path.with_name("gate")
    router = start_router(qwen=["-np", "4", *record.flags])
    statuses: dict[str, int] = {}

    async def ask(client: httpx.AsyncClient, tag: str, priority: str, **fake: Any) -> None:
        body = chat_body("qwen", fake={"tag": tag, "tokens": 1, **fake})
        answer = await client.post("/v1/chat/completions", json=body, headers={"X-Request-Priority": priority})
        statuses[tag] = answer.status_code

    async def until(**wanted: int) -> None:
        await trio.to_thread.run_sync(lambda: router.wait_for_status("qwen", **wanted))

    with trio.fail_after(30):
        async with router.async_client() as client, trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(lambda n=number: ask(client, f"first-{n}", "normal", hold_until=str(gate)))
            await until(active=4)
            for number in range(14):
                nursery.start_soon(lambda n=number: ask(client, f"low-{n}", "low", token_seconds=0.02))
            await until(queued=14)
            for number in range(14):
                nursery.start_soon(lambda n=number: ask(client, f"high-{n}", "high", token_seconds=0.02))
            await until(queued=28)
            gate.touch()
    assert len(statuses) == 32
    assert set(statuses.values()) == {200}
    assert record.most_at_once() == 4
    kinds = [tag.partition("-")[0] for tag in record.tags("started")]
    assert kinds[:4] == ["first"] * 4
    # those whose slots were given at the same moment may reach the backend in any order: three of them at most
    assert kinds[4:15].count("high") == 11
    assert kinds[21:].count("low") == 11
    status = router.status("qwen")
    assert (status["active"], status["queued"]) == (0, 0)


def test_order_is_strict_with_one_slot(start_router: StartRouter, record: Record) -> None:
    gate = record.path.with_name("gate")
    router = start_router(qwen=record.flags)
    pending = [router.in_background("qwen", fake={"tag": "first", "hold_until": str(gate)})]
    router.wait_for_status("qwen", active=1)
    order = ["low", "normal", "high", "Normal", "HIGH", "low"]
    for count, priority in enumerate(order, 1):
        tag = f"{priority}-{count}"
        pending.append(router.in_background("qwen", fake={"tag": tag}, headers={"X-Request-Priority": priority}))
        router.wait_for_status("qwen", queued=count)
    gate.touch()
    assert {each.answer().status_code for each in pending} == {200}
    assert record.tags("started") == ["first", "high-3", "HIGH-5", "normal-2", "Normal-4", "low-1", "low-6"]


def test_low_is_not_starved(start_router: StartRouter, record: Record) -> None:
    router = start_router(qwen=record.flags, system={"aging_sec": 0.2})
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            router.chat("qwen", fake={"tokens": 1, "token_seconds": 0.05}, headers={"X-Request-Priority": "high"})

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        record.wait_for("started", 4)
        answer = router.chat("qwen", fake={"tag": "low"}, headers={"X-Request-Priority": "low"}, timeout=10)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert answer.status_code == 200


def test_slots_come_from_the_configuration(start_router: StartRouter, record: Record) -> None:
    router = start_router(
        one=record.flags, four=["--parallel", "4", *record.flags], two=["-np", "2"], system={"default_parallel": 3}
    )
    assert [router.status(alias)["slots"] for alias in ("one", "four", "two")] == [3, 4, 2]
    router.chat("one")
    argv = record.lines("spawned")[0]["argv"]
    assert argv[argv.index("--parallel" if "--parallel" in argv else "-np") + 1] == "3"


def test_queue_full(start_router: StartRouter, record: Record) -> None:
    gate = record.path.with_name("gate")
    router = start_router(qwen=record.flags, system={"max_queue_size_per_model": 1})
    running = router.in_background("qwen", fake={"hold_until": str(gate)})
    router.wait_for_status("qwen", active=1)
    waiting = router.in_background("qwen")
    router.wait_for_status("qwen", queued=1)
    refused = router.chat("qwen", headers={"X-Request-Priority": "high"})
    assert refused.status_code == 503
    assert refused.json()["error"]["type"] == "service_unavailable_error"
    assert refused.json()["error"]["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.headers["x-request-id"]
    gate.touch()
    assert [running.answer().status_code, waiting.answer().status_code] == [200, 200]


def test_no_queue_at_all_still_serves(start_router: StartRouter, record: Record) -> None:
    """`max_queue_size_per_model = 0`: a slot or nothing; but a load is waited for by as many as there are slots."""
    router = start_router(qwen=["-np", "2", *record.flags], system={"max_queue_size_per_model": 0})
    first = router.chat("qwen")
    assert first.status_code == 200, first.text
    assert router.chat("qwen").status_code == 200


def test_queue_timeout(start_router: StartRouter, record: Record) -> None:
    router = start_router(qwen=record.flags, system={"queue_timeout_sec": 0.3})
    assert router.post("/v1/models/load", {"model": "qwen"}).status_code == 200  # which may take longer than 0.3 s
    connection = router.start_raw(b'{"model":"qwen","fake":{"stall":true}}')
    try:
        router.wait_for_status("qwen", active=1)
        began = time.monotonic()
        answer = router.chat("qwen")
        assert 0.25 < time.monotonic() - began < 2
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "queue_timeout")
        assert answer.json()["error"]["type"] == "timeout_error"
        assert router.status("qwen")["queued"] == 0
    finally:
        connection.close()


def test_queue_timeout_covers_loading(start_router: StartRouter) -> None:
    router = start_router(qwen=["--fake-never-ready"], system={"queue_timeout_sec": 0.4})
    answer = router.chat("qwen")
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "queue_timeout")
    router.wait_for_status("qwen", status="off")  # nobody waits for the load any more
    assert router.servers() == {}


def test_replicas_serve_one_queue(
    start_router: StartRouter, record: Record, header_gguf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second llama-server is loaded when somebody waits; one that is killed takes only its own request along."""
    gate = record.path.with_name("gate")
    model = {"model_path": header_gguf, "flags": record.flags, "replicas": 2}
    router = start_router(models={"qwen": model})
    pending = [router.in_background("qwen", fake={"hold_until": str(gate)}) for _ in range(3)]
    router.wait_for_status("qwen", active=2, queued=1)
    status = router.status("qwen")
    [replica] = status["replicas"]
    assert (status["status"], replica["status"], replica["active"]) == ("ready", "ready", 1)
    assert {status["pid"], replica["pid"]} == set(router.servers())
    assert main(["ps", "--url", router.url], {}) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(row[:4], row[-1]) for row in shown] == [
        (["qwen", "ready", "1/1", "1"], str(status["pid"])),
        ([replica["name"], "ready", "1/1", "-"], str(replica["pid"])),
    ]
    os.kill(replica["pid"], signal.SIGKILL)
    gate.touch()
    assert [each.answer().status_code for each in pending] == [200, 200, 200]
    assert router.post("/v1/models/eject", {"model": "qwen"}).status_code == 200
    assert router.servers() == {}
