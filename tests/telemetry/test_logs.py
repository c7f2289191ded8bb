"""A line an event: readable, one line whatever a client sent, and nothing of local variables."""

import json
import sys

import pytest
import structlog

from trio_router.telemetry.logs import as_line, configure_logs


def test_a_line_for_people():
    event = {"timestamp": "T", "level": "info", "event": "request", "id": "req_1", "model": None, "status": 200}
    assert as_line(None, "info", event) == "T [info   ] request id=req_1 status=200"


@pytest.mark.parametrize("hostile", ["a b", "a=b", "a\nT [error  ] forged", "\x1b[31mred", ""])
def test_what_a_client_sent_stays_one_value(hostile):
    line = as_line(None, "info", {"timestamp": "T", "level": "info", "event": "e", "id": hostile})
    assert line == f"T [info   ] e id={hostile!r}"
    assert line.isprintable()


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_traceback_without_the_values_of_variables(log_format, capsys):
    configure_logs(log_format, "info", sys.stderr)
    secret = "hunter" + "2"
    try:
        int(f"x{len(secret)}")
    except ValueError:
        structlog.get_logger("test").exception("it failed", id="req_1")
    said = capsys.readouterr().err
    assert "ValueError" in said
    assert "it failed" in said
    assert "hunter2" not in said


def test_json_is_one_object_a_line(capsys):
    configure_logs("json", "info", sys.stderr)
    structlog.get_logger("test").info("request", id="a\nb", status=200)
    structlog.get_logger("test").debug("not told")
    (line,) = capsys.readouterr().err.splitlines()
    said = json.loads(line)
    assert said["event"] == "request"
    assert said["id"] == "a\nb"
    assert said["level"] == "info"
