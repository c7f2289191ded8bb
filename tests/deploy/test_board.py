"""The Grafana board as a file; that its expressions find data is in test_monitoring.py."""

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deploy.conftest import MONITORING

BOARD = json.loads((MONITORING / "grafana" / "dashboards" / "trio-router.json").read_text())
QUESTIONS = [
    "At a glance",
    "Is each model well?",
    "Who waits?",
    "How fast?",
    "What fills the memory of the GPUs?",
    "What was loaded, evicted, crashed?",
    "The router itself",
]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def cells(panel: dict[str, Any]) -> Iterator[tuple[int, int]]:
    at = panel["gridPos"]
    return itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"]))


def test_rows_are_the_questions() -> None:
    assert [panel["title"] for panel in BOARD["panels"] if panel["type"] == "row"] == QUESTIONS


def test_panels_have_a_place_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        here = set(cells(panel))
        assert not here & taken, panel["title"]
        assert max(x for x, _ in here) < 24
        taken |= here
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_queries_are_for_any_data_source_router_and_model(panel: dict[str, Any]) -> None:
    assert panel["datasource"]["uid"] == "${datasource}"
    for target in panel["targets"]:
        assert target["datasource"]["uid"] == "${datasource}"
        assert "$instance" in target["expr"] or "ALERTS" in target["expr"]
        if target["range"]:
            assert "[5m]" not in target["expr"], "a fixed window hides what zooming in should show"
