"""Reads a Dockerfile, as far as ours goes."""

import json
import re
import shlex
from pathlib import Path

import attrs


@attrs.frozen
class Step:
    """One instruction; its words are in `text`."""

    name: str
    text: str

    def words(self) -> list[str]:
        """Of the exec form, `["a", "b"]`, or of a COPY."""
        text = self.text[self.text.index("[") :] if "[" in self.text else ""
        return json.loads(text) if text else self.text.split()


@attrs.frozen
class Dockerfile:
    """The instructions in order."""

    steps: list[Step]

    @classmethod
    def read(cls, path: Path) -> "Dockerfile":
        """Without comments, lines joined."""
        lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
        return cls([Step(*line.split(None, 1)) for line in text.splitlines() if line.strip()])

    def all(self, name: str) -> list[str]:
        """What stands behind each instruction of that name."""
        return [step.text for step in self.steps if step.name == name]

    def last(self, name: str) -> Step:
        """The one that counts."""
        return [step for step in self.steps if step.name == name][-1]

    def environment(self) -> dict[str, str]:
        """Of all ENV instructions."""
        return dict(word.split("=", 1) for text in self.all("ENV") for word in shlex.split(text))


def left_in(root: Path, ignore: Path) -> set[str]:
    """The top names of `root` that a `.dockerignore` of the form `*`, `!name` leaves in the context."""
    lines = [line for line in ignore.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert all((root / name).exists() for name in kept), kept
    return kept
