"""Several routers behind HAProxy, on loopback: the configuration that is shipped, with the addresses of the test."""

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import attrs
import httpx
import pytest

from tests.conftest import REQUIRED, StartRouter
from tests.deploy.conftest import DEPLOY
from tests.harness.processes import wait_until
from tests.harness.router import RouterProcess, chat_body, clean_environment

pytestmark = pytest.mark.process

CONFIG = DEPLOY / "scale-out" / "haproxy.cfg"
MODELS = [f"model-{number}" for number in range(8)]
FLAGS = ["--parallel", "4"]


def haproxy() -> str:
    found = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)("no haproxy: Debian's package")
    return found


@attrs.define(eq=False)
class Site:
    """HAProxy before two routers."""

    url: str
    routers: list[RouterProcess]

    def chat(self, model: str, **more: Any) -> httpx.Response:
        with httpx.Client(trust_env=False, timeout=30) as client:
            return client.post(f"{self.url}/v1/chat/completions", json=chat_body(model, **more))

    def home(self, model: str) -> RouterProcess:
        """The router that has it loaded."""
        (found,) = [each for each in self.routers if each.status(model)["status"] == "ready"]
        return found


@contextmanager
def balancing(folder: Path, addresses: list[str]) -> Iterator[str]:
    """The shipped configuration with these servers, listening on a socket of ours; its address."""
    text = CONFIG.read_text()
    names = re.findall(r"server \S+ (192\.0\.2\.\d+:\d+)", text)
    for shipped, address in zip(names, addresses, strict=True):
        text = text.replace(shipped, address)
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        number = listening.fileno()
        text = text.replace("bind :8080", f"bind fd@{number}")
        config, log = folder / "haproxy.cfg", folder / "haproxy.log"
        config.write_text(text)
        with log.open("wb") as output:
            process = subprocess.Popen(
                [haproxy(), "-db", "-f", config], stdout=output, stderr=output, pass_fds=[number],
                env=clean_environment(),
            )  # fmt: skip
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def site(start_router: StartRouter, tmp_path: Path) -> Iterator[Site]:
    haproxy()
    routers = [start_router(models=dict.fromkeys(MODELS, FLAGS), system={"max_concurrent_models": 8}) for _ in range(2)]
    with balancing(tmp_path, [f"127.0.0.1:{router.port}" for router in routers]) as url:
        found = Site(url, routers)
        wait_until(lambda: httpx.get(f"{url}/readyz", trust_env=False).status_code == 200, timeout_seconds=10)
        yield found


def test_haproxy_likes_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [haproxy(), "-c", "-V", "-f", CONFIG], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "[WARNING]" not in done.stderr, done.stderr


def test_each_model_has_a_host_of_its_own(site: Site) -> None:
    for _ in range(3):
        for model in MODELS:
            assert site.chat(model).status_code == 200
    homes = {site.home(model).pid for model in MODELS}
    assert len(homes) == 2  # and no model is loaded on both
    long = {"messages": [{"role": "user", "content": "word " * 100_000}], "model": MODELS[0]}
    answer = httpx.post(f"{site.url}/v1/chat/completions", json=long, trust_env=False, timeout=30)
    assert answer.status_code == 200
    assert site.home(MODELS[0])
    asked = httpx.get(f"{site.url}/props?model={MODELS[0]}", trust_env=False, timeout=30)
    assert asked.json()["model_alias"] == MODELS[0]
    assert site.home(MODELS[0])


def test_a_stream_comes_as_it_is_made_and_a_client_that_leaves_frees_its_slot(site: Site) -> None:
    body = chat_body(MODELS[0], stream=True, fake={"tokens": 1000, "token_seconds": 0.05})
    with (
        httpx.Client(trust_env=False, timeout=30) as client,
        client.stream("POST", f"{site.url}/v1/chat/completions", json=body) as answer,
    ):
        assert answer.headers["content-type"] == "text/event-stream"
        pieces = answer.iter_bytes()
        next(pieces)  # 50 s before the last of them
        home = site.home(MODELS[0])
        assert home.status(MODELS[0])["active"] == 1
    home.wait_for_status(MODELS[0], active=0)


def test_a_router_that_drains_finishes_its_streams_while_the_other_takes_over(site: Site) -> None:
    assert site.chat(MODELS[0]).status_code == 200
    leaving = site.home(MODELS[0])
    staying = next(router for router in site.routers if router is not leaving)
    body = chat_body(MODELS[0], stream=True, fake={"tokens": 40, "token_seconds": 0.2})
    with (
        httpx.Client(trust_env=False, timeout=30) as client,
        client.stream("POST", f"{site.url}/v1/chat/completions", json=body) as answer,
    ):
        pieces = answer.iter_bytes()
        first = next(pieces)
        leaving.terminate()
        for _ in range(5):
            assert site.chat(MODELS[0]).status_code == 200  # at once, whatever HAProxy knows yet
        assert staying.status(MODELS[0])["status"] == "ready"
        assert leaving.is_running()
        whole = first + b"".join(pieces)
    assert whole.rstrip().endswith(b"data: [DONE]")
    assert leaving.wait() == 0


def test_a_router_that_dies_is_replaced(site: Site) -> None:
    assert site.chat(MODELS[0]).status_code == 200
    dying = site.home(MODELS[0])
    os.kill(dying.pid, signal.SIGSTOP)  # so that nothing can be said before the end
    dying.kill()
    dying.wait()
    assert site.chat(MODELS[0]).status_code == 200
