"""What happened, what became of whom, and what must not have happened."""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import attrs


@attrs.define(eq=False)
class Ledger:
    """The books of one run."""

    path: Path
    """Of a log with the time of everything."""
    fates: Counter[str] = attrs.field(factory=Counter)
    """Of requests: each has one."""
    faults: Counter[str] = attrs.field(factory=Counter)
    stages: Counter[str] = attrs.field(factory=Counter)
    """In which state of a llama-server a fault met it, and which sicknesses there were."""
    violations: list[str] = attrs.field(factory=list)
    asked: int = 0
    """Requests that were begun: as many as there are fates in the end."""

    def violation(self, what: str) -> None:
        """Something that must not happen."""
        self.violations.append(what)
        self.note(f"VIOLATION: {what}")

    def note(self, what: str) -> None:
        """Into the log."""
        with self.path.open("a") as log:
            log.write(f"{datetime.now(UTC).isoformat()} {what}\n")
