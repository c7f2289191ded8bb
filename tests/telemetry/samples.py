"""Prometheus text, read back."""

import re

SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")


def samples(text: str) -> dict[tuple[str, ...], float]:
    """`{("router_slots", "model=qwen", "state=busy"): 1.0}`; labels sorted."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            matched = SAMPLE.fullmatch(line)
            assert matched, line
            name, labels, value = matched.groups()
            pairs = sorted(f"{label}={text}" for label, text in re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or ""))
            assert (name, *pairs) not in found, line
            found[name, *pairs] = float(value)
    return found


def families(text: str) -> dict[str, str]:
    """Family -> type."""
    return dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE "))
