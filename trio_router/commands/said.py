"""How commands end, and what they say to programs."""

import json
import sys
from typing import Any, Final, TextIO

CLEAN: Final = 0
FAILED: Final = 1
USAGE: Final = 2
NO_SERVER: Final = 3
NOT_FOUND: Final = 4
BAD_CONFIG: Final = 78
"""sysexits' EX_CONFIG. `serve` and `check` say 2, as their contract has it."""
INTERRUPTED: Final = 130
"""128 and SIGINT, as shells have it."""


class Said(Exception):
    """Raised when a command ends with something to say; `status` is the exit status."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


def say(line: str, stream: TextIO) -> None:
    """Print `line`, in which a file name need not be text."""
    print(line.encode(errors="backslashreplace").decode(), file=stream)


def print_json(found: Any) -> None:
    """For programs."""
    json.dump(found, sys.stdout, indent=2, ensure_ascii=False)
    print()
