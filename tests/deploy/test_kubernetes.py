"""The manifests, without a cluster: Kubernetes' own schemas, and what they promise of the router."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from tests.deploy.conftest import DEPLOY, ROOT
from tests.harness.router import clean_environment
from trio_router.web.admission import OPEN_PATHS

MANIFESTS: list[dict[str, Any]] = list(YAML(typ="safe").load_all(DEPLOY / "scale-out" / "kubernetes.yaml"))
BY_NAME = {(each["kind"], each["metadata"]["name"]): each for each in MANIFESTS}
STATEFUL = BY_NAME["StatefulSet", "trio-router"]["spec"]
POD = STATEFUL["template"]["spec"]
(CONTAINER,) = POD["containers"]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_kubernetes_knows_every_word(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_a_word_it_does_not_know_is_found() -> None:
    wrong = {**BY_NAME["Service", "trio-router"], "spce": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_probes_ask_what_is_answered_without_a_key() -> None:
    assert CONTAINER["livenessProbe"]["httpGet"]["path"] == CONTAINER["startupProbe"]["httpGet"]["path"] == "/livez"
    assert CONTAINER["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert {"/livez", "/readyz"} <= OPEN_PATHS


def test_it_may_take_as_long_as_it_drains(tmp_path: Path, fake_llama: Path, header_gguf: Path) -> None:
    text = BY_NAME["ConfigMap", "trio-router"]["data"]["router.toml"]
    config = tmp_path / "router.toml"
    config.write_text(text)
    (tmp_path / "qwen2.5-7b-instruct-q4_k_m.gguf").write_bytes(header_gguf.read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "trio_router", "check", "--config", config], capture_output=True, text=True, check=False,
        env=clean_environment({"LLAMA_SERVER_PATH": str(fake_llama), "BASE_MODELS_PATH": str(tmp_path)}),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "drain_timeout_sec = 120\n" in text
    command = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert command == ["sh", "-c", "sleep 5; trio-router drain"]
    assert POD["terminationGracePeriodSeconds"] >= 120 + 5 + 10


def test_everything_that_belongs_together_does() -> None:
    labels = STATEFUL["template"]["metadata"]["labels"]
    for each in (STATEFUL["selector"]["matchLabels"], BY_NAME["PodDisruptionBudget", "trio-router"]["spec"]["selector"]["matchLabels"]):  # fmt: skip
        assert each == labels
    for name in ("trio-router", STATEFUL["serviceName"]):
        assert BY_NAME["Service", name]["spec"]["selector"] == labels
    annotations = STATEFUL["template"]["metadata"]["annotations"]
    (port,) = CONTAINER["ports"]
    assert annotations["prometheus.io/port"] == str(port["containerPort"])
    assert annotations["prometheus.io/path"] == "/metrics"
    image = (ROOT / "deploy" / "Dockerfile").read_text()
    assert f"USER {POD['securityContext']['runAsUser']}:" in image
    assert f'"--port", "{port["containerPort"]}"' in image
    mounts = {each["name"] for each in CONTAINER["volumeMounts"]}
    assert mounts == {each["name"] for each in POD["volumes"]}
