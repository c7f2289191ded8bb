"""A real Prometheus in a process of its own, and what it answers."""

import json
import math
import re
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs
import httpx

from tests.harness.processes import wait_until

START_SECONDS = 30.0
VARIABLES = {"$instance": ".*", "$model": ".*", "$__rate_interval": "10s", "$__range": "120s"}
"""What Grafana would put into a board's expressions."""
COMPARISON = re.compile(r"(?s)^(?P<left>.*?)\s*(?P<operator>==|>=|>)\s*(?P<right>[0-9.]+)\s*$")


class Prometheus:
    """Runs on a copy of our configuration in which everything happens every second."""

    def __init__(self, executable: str, monitoring: Path, targets: list[str], *, key: str) -> None:
        config = monitoring / "prometheus.yml"
        text, count = re.subn(r"(_interval|_timeout): \d+s", r"\1: 1s", config.read_text())
        assert count >= 3, text
        config.write_text(text)
        (monitoring / "targets.yml").write_text(json.dumps([{"targets": targets}]))  # JSON is YAML
        (monitoring / "router-api-key").write_text(key)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = monitoring / "prometheus.log"
        self.command = [
            executable,
            f"--config.file={config}",
            f"--storage.tsdb.path={monitoring / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--log.level=warn",
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(self._is_ready, timeout_seconds=START_SECONDS, what="Prometheus")
        return self

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self.log.read_text()
        with suppress(httpx.TransportError):
            return self._get("/-/ready").status_code == 200
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(15)
        finally:
            self._process.kill()
            self._process.wait()
        if error is not None:
            error.add_note(f"--- Prometheus\n{self.log.read_text()[-4000:]}")

    def _get(self, path: str, **parameters: Any) -> httpx.Response:
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False, timeout=20) as client:
            return client.get(path, params=parameters)

    def ask(self, path: str, **parameters: Any) -> Any:
        """The `data` of an answer of the API."""
        answer = self._get(f"/api/v1/{path}", **parameters)
        assert answer.status_code == 200, f"{parameters}: {answer.text}"
        return answer.json()["data"]

    def now(self, expression: str) -> list[float]:
        """The values of `expression` now."""
        return [float(found["value"][1]) for found in self.ask("query", query=filled(expression))["result"]]

    def since(self, start: float, end: float, expression: str) -> list[float]:
        """Every value of `expression` between two Unix times, a second apart, that is a number."""
        found = self.ask("query_range", query=filled(expression), start=start, end=end, step=1)["result"]
        values = (float(value) for series in found for _, value in series["values"])
        return [value for value in values if math.isfinite(value)]


def filled(expression: str) -> str:
    """`expression` with a board's variables replaced."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


@attrs.frozen
class Asked:
    """One expression, and who asks it."""

    place: str
    expression: str


def board_expressions(monitoring: Path) -> list[Asked]:
    """Every expression of the board: panels, annotations, variables."""
    board = json.loads((monitoring / "grafana" / "dashboards" / "trio-router.json").read_text())
    found = [
        Asked(f"{panel['title']} {target['refId']}", target["expr"])
        for panel in board["panels"]
        for target in panel.get("targets", ())
    ]
    found += [Asked(note["name"], note["expr"]) for note in board["annotations"]["list"] if "expr" in note]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
            assert label, variable
            found.append(Asked(variable["name"], f"count by ({label[2]}) ({label[1]})"))
    return found


def rules(prometheus: Prometheus) -> list[dict[str, Any]]:
    """The rules as Prometheus has them."""
    groups = prometheus.ask("rules")["groups"]
    return [rule for group in groups for rule in group["rules"]]


def left_side(expression: str) -> str:
    """What an alert compares."""
    found = COMPARISON.match(expression)
    assert found, expression
    return found["left"]
