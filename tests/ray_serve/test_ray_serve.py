"""A router owned by Ray Serve, on one node, with the real llama-server: `nox -s ray`. Ray is too large for every run."""

import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve

from tests.harness.processes import marked, wait_until
from tests.harness.router import chat_body
from tests.harness.toml import router_toml

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(500)]

APP = Path(__file__).parents[2] / "deploy" / "scale-out"
MARK = f"TRIO_ROUTER_TEST_RUN=ray-{os.getpid()}"
"""In the environment of a replica and of what it starts."""


def routers() -> list[int]:
    return [pid for pid in marked(MARK) if b"serve\0--config" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.fixture(scope="module")
def client(real_llama: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    assert real_llama.exists()
    config = tmp_path_factory.mktemp("ray") / "router.toml"
    models = {"smollm2": {"model_path": smollm2, "flags": ["-c", "2048", "-np", "2", "-t", "1"]}}
    config.write_text(router_toml(models=models, system={"gpu_devices": []}))
    name, value = MARK.split("=")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"env_vars": {"PATH": path, "PYTHONPATH": str(APP), name: value}}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # sockets: a short name
        ray.init(
            num_cpus=2, include_dashboard=False, runtime_env=environment, _temp_dir=folder, object_store_memory=10**8
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            sys.path.insert(0, str(APP))
            from ray_serve import app

            serve.run(app({"config": str(config), "gpus": "0"}))
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60) as client:
                yield client
            assert len(routers()) == 1
            serve.shutdown()
            wait_until(lambda: not routers(), timeout_seconds=30, what="the router is gone with its replica")
        finally:
            ray.shutdown()


def test_a_chat(client: httpx.Client) -> None:
    answer = client.post("/v1/chat/completions?a=b", json=chat_body("smollm2", max_tokens=8))
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"]
    assert answer.headers["x-request-id"] == answer.headers["request-id"]
    unknown = client.post("/v1/chat/completions", json=chat_body("nobody"))
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_a_client_that_leaves_a_stream_frees_its_slot(client: httpx.Client) -> None:
    def active() -> int:
        return int(client.get("/v1/models/smollm2/status").json()["active"])

    body = chat_body("smollm2", stream=True, max_tokens=1500, ignore_eos=True)
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        pieces = answer.iter_bytes()
        assert b"data: " in next(pieces)
        assert active() == 1
    wait_until(lambda: active() == 0, timeout_seconds=15)
