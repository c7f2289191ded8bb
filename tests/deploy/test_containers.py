"""Dockerfile and compose files, without a Docker engine: linters, and the Dockerfile's own steps outside of an image."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from ruamel.yaml import YAML

from tests.deploy.conftest import DEPLOY, MONITORING, ROOT, tool
from tests.deploy.dockerfile import Dockerfile, left_in
from tests.harness.processes import wait_until
from tests.harness.router import chat_body, clean_environment
from tests.harness.toml import router_toml
from trio_router.config.schema import SystemConfig

DOCKERFILE = DEPLOY / "Dockerfile"
COMPOSE = DEPLOY / "compose.yaml"
COMPOSE_MONITORING = DEPLOY / "docker-compose.monitoring.yml"
DCLINT = "dclint@3.1.0"
NPM_SECONDS = 90.0
BASE = "ghcr.io/ggml-org/llama.cpp:server-cuda"
BIN = Path(sys.executable).parent
"""Where the linters of the test group are."""


def run(command: list[str | Path], **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def yaml(path: Path) -> Any:
    return YAML(typ="safe").load(path)


# --- linters -------------------------------------------------------------------------------------------


def test_hadolint() -> None:
    assert run([BIN / "hadolint", DOCKERFILE]) == ""


@pytest.mark.parametrize("path", [COMPOSE, COMPOSE_MONITORING], ids=lambda path: path.name)
def test_compose_schema(path: Path) -> None:
    run([BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path])


def test_dclint(tmp_path: Path) -> None:
    npm = tool("npm", "dclint is an npm package")
    install = [npm, "install", "--no-save", "--no-fund", "--no-audit", "--ignore-scripts", "--prefix", tmp_path, DCLINT]
    try:
        subprocess.run(install, capture_output=True, check=True, timeout=NPM_SECONDS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip(f"npm cannot install {DCLINT}")
    run([tmp_path / "node_modules" / ".bin" / "dclint", COMPOSE, COMPOSE_MONITORING])


# --- the image -----------------------------------------------------------------------------------------


def test_the_base_image_is_a_build_argument() -> None:
    image = Dockerfile.read(DOCKERFILE)
    assert (image.all("ARG"), image.all("FROM")) == ([f"LLAMA_CPP_IMAGE={BASE}"], ["${LLAMA_CPP_IMAGE}"])


def test_what_the_base_image_has_is_reset() -> None:
    image = Dockerfile.read(DOCKERFILE)
    assert image.last("USER").text == "10001:10001"
    entry = image.last("ENTRYPOINT").words()
    assert entry == ["tini", "-s", "--", "env", "-u", "LLAMA_ARG_HOST", "trio-router"]
    assert image.last("CMD").words() == ["serve", "--host", "0.0.0.0", "--port", "8000"]
    assert "/livez" in image.last("HEALTHCHECK").words()[-1]
    packages = image.all("RUN")[0].split()
    assert {"tini", "curl", "python3", "python3-venv"} <= set(packages)


def test_only_the_package_is_in_the_context() -> None:
    image = Dockerfile.read(DOCKERFILE)
    copied = {source for text in image.all("COPY") for source in text.split()[:-1]}
    assert copied == left_in(ROOT, ROOT / ".dockerignore")


class Image:
    """What the Dockerfile makes, laid out in a folder: its own steps, run in a plain virtual environment.

    The steps that need root (packages, the user) are left out.
    """

    def __init__(self, folder: Path) -> None:
        self.recipe = Dockerfile.read(DOCKERFILE)
        self.app = folder / "app"
        self.places = {
            "/opt/trio-router": folder / "venv",
            "/src": folder / "context",
            "/app": self.app,
            "python3": Path(sys.executable),
        }

    def here(self, text: str) -> str:
        """`text` with the image's places in the folder."""
        return re.sub(r"/opt/trio-router|/src\b|/app\b|\bpython3\b", lambda found: str(self.places[found[0]]), text)

    def build(self) -> None:
        for step in self.recipe.steps:
            if step.name == "COPY":
                *sources, target = step.text.split()
                for source in sources:
                    self._copy(ROOT / source, target, Path(self.here(target)))
            elif step.name == "RUN" and "pip install" in step.text:
                run(["/bin/sh", "-e", "-c", self.here(step.text)], env=clean_environment())

    def _copy(self, source: Path, written: str, target: Path) -> None:
        if source.is_dir():  # Docker copies what is in a folder
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            assert written.endswith("/")
            target.mkdir(exist_ok=True)
            shutil.copy(source, target)

    def environment(self) -> dict[str, str]:
        own = {
            name: self.here(value).replace("$PATH", os.environ["PATH"])
            for name, value in self.recipe.environment().items()
        }
        return {**clean_environment(), "LLAMA_ARG_HOST": "0.0.0.0", **own}  # the first is the base image's

    def command(self, port: int) -> list[str]:
        words = self.recipe.last("ENTRYPOINT").words() + self.recipe.last("CMD").words()
        if shutil.which("tini") is None:
            words = words[words.index("--") + 1 :]
        return [str(port) if word == "8000" else word for word in words]

    def health(self, port: int) -> int:
        command = [word.replace(":8000/", f":{port}/") for word in self.recipe.last("HEALTHCHECK").words()]
        tool(command[0], "the image installs it")
        return subprocess.run(command, capture_output=True, check=False).returncode


@pytest.mark.process
def test_the_images_own_steps_make_a_router(tmp_path: Path, fake_llama: Path, header_gguf: Path) -> None:
    """Also that CONFIG_PATH, LLAMA_SERVER_PATH, BASE_MODELS_PATH and API_KEY do what they should in there."""
    image = Image(tmp_path)
    image.build()
    assert not (tmp_path / "context").exists()
    (image.app / "models").mkdir(parents=True)
    shutil.copy(header_gguf, image.app / "models" / "qwen.gguf")
    shutil.copy(fake_llama, image.app / "llama-server")
    (image.app / "router.toml").write_text(
        router_toml(models={"qwen": {"model_path": "qwen.gguf"}}, system={"llama_server_path": "/nowhere"})
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert image.health(port) != 0
    environment = {**image.environment(), "API_KEY": "secret"}
    log = (tmp_path / "log").open("wb")
    with log:
        router = subprocess.Popen(
            image.command(port), cwd=image.app, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        wait_until(lambda: image.health(port) == 0, timeout_seconds=20, what="a healthy router")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as client:
            assert client.get("/v1/models").status_code == 401
            client.headers["Authorization"] = "Bearer secret"
            answer = client.post("/v1/chat/completions", json=chat_body("qwen"))
            assert answer.status_code == 200, answer.text
        assert b"LLAMA_ARG_HOST" not in Path(f"/proc/{router.pid}/environ").read_bytes()
        router.terminate()
        assert router.wait(15) == 0, (tmp_path / "log").read_text()
    finally:
        router.kill()
        router.wait()


# --- the compose files ---------------------------------------------------------------------------------


def test_compose() -> None:
    file = yaml(COMPOSE)
    router = file["services"]["router"]
    assert router["ports"] == ["127.0.0.1:8000:8000"]
    assert router["deploy"]["resources"]["reservations"]["devices"] == [
        {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    ]
    build = router["build"]
    assert (COMPOSE.parent / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).resolve() == DOCKERFILE
    assert build["args"]["LLAMA_CPP_IMAGE"] == f"${{LLAMA_CPP_IMAGE:-{BASE}}}"
    environment, image = router["environment"], Dockerfile.read(DOCKERFILE).environment()
    assert environment.pop("API_KEY") == "${API_KEY:-}"
    assert environment == {name: image[name] for name in ("BASE_MODELS_PATH", "CONFIG_PATH", "LLAMA_SERVER_PATH")}
    assert [volume.split(":")[-2] for volume in router["volumes"]] == [image["BASE_MODELS_PATH"], image["CONFIG_PATH"]]
    assert router["init"] is True
    assert "/livez" in router["healthcheck"]["test"][-1]
    assert int(router["stop_grace_period"].rstrip("s")) > SystemConfig(base_models_path=Path()).drain_timeout_sec


def test_compose_monitoring() -> None:
    """What is mounted exists, stands where the programs look, and nothing is open to the network."""
    file = yaml(COMPOSE_MONITORING)
    services = file["services"]
    published = {name: service["ports"] for name, service in services.items()}
    assert published == {"prometheus": ["127.0.0.1:9090:9090"], "grafana": ["127.0.0.1:3000:3000"]}
    mounted = {}
    for service in services.values():
        for volume in service["volumes"]:
            source, target, *_ = volume.split(":")
            if source.startswith("."):
                mounted[target] = (DEPLOY / source).resolve()
                assert mounted[target].exists(), source
            else:
                assert source in file["volumes"]
    assert mounted["/etc/prometheus/prometheus.yml"] == MONITORING / "prometheus.yml"
    config = yaml(MONITORING / "prometheus.yml")
    needed = {f"/etc/prometheus/{name}" for name in (*config["rule_files"], "targets.yml")}
    assert needed <= mounted.keys()
    (key,) = services["prometheus"]["configs"]
    for job in config["scrape_configs"]:
        assert f"/etc/prometheus/{job['authorization']['credentials_file']}" == key["target"]
        assert job["file_sd_configs"] == [{"files": ["targets.yml"]}]
    (group,) = yaml(MONITORING / "targets.yml")
    assert group["targets"] == ["host.docker.internal:8000"]
    assert services["prometheus"]["extra_hosts"] == ["host.docker.internal:host-gateway"]


def test_grafana_finds_prometheus_and_the_board() -> None:
    grafana = yaml(COMPOSE_MONITORING)["services"]["grafana"]
    targets = [volume.split(":")[1] for volume in grafana["volumes"]]
    provisioning = MONITORING / "grafana" / "provisioning"
    (source,) = yaml(provisioning / "datasources" / "prometheus.yml")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert source["jsonData"]["timeInterval"] == yaml(MONITORING / "prometheus.yml")["global"]["scrape_interval"]
    (provider,) = yaml(provisioning / "dashboards" / "trio-router.yml")["providers"]
    assert provider["options"]["path"] in targets
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/trio-router.json"
    assert (MONITORING / "grafana" / "dashboards" / "trio-router.json").exists()
