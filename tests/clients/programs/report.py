"""How a program tells its test where it is. It runs where nothing of ours is installed."""

import json
import sys
from typing import Any


def report(step: str, **facts: Any) -> None:
    """A line of JSON."""
    sys.stdout.write(json.dumps({"step": step, **facts}) + "\n")
    sys.stdout.flush()


def wait(step: str) -> None:
    """Report, and go on when the test says so."""
    report(step)
    sys.stdin.readline()
