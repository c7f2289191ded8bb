"""Tables on the terminal, bars beside their numbers, and the same as JSON."""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs

from benchmarks.machine import Cores, hardware, versions

RESULTS = Path(__file__).parent / "results"


@attrs.frozen(kw_only=True)
class Options:
    """What the command line asks for."""

    quick: bool
    check: bool
    out: Path
    cores: Cores
    only: tuple[str, ...]
    patience_seconds: float
    """How long each run may wait for a quiet machine."""


@attrs.frozen(kw_only=True)
class Bar:
    """A number and what it must be. `at_most` or `at_least` is None."""

    name: str
    measured: float | None
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def holds(self) -> bool | None:
        """None: it could not be measured here."""
        if self.measured is None:
            return None
        return (self.at_most is None or self.measured <= self.at_most) and (
            self.at_least is None or self.measured >= self.at_least
        )

    def line(self) -> str:
        verdict = {True: "pass", False: "FAIL", None: "not measured"}[self.holds]
        limit = f"<= {self.at_most:,.6g}" if self.at_most is not None else f">= {self.at_least:,.6g}"
        measured = "-" if self.measured is None else f"{self.measured:,.4g}"
        return f"  {verdict:<12} {self.name:<58} {measured:>10} {self.unit:<10} bar {limit}"


@attrs.define(kw_only=True)
class Report:
    """What one benchmark found."""

    name: str
    options: Options
    tables: dict[str, list[dict[str, Any]]] = attrs.field(factory=dict)
    bars: list[Bar] = attrs.field(factory=list)
    notes: list[str] = attrs.field(factory=list)
    llama_server: Path | None = None
    began: datetime = attrs.field(factory=lambda: datetime.now(UTC))
    hardware: dict[str, Any] = attrs.field(factory=hardware)

    def table(self, title: str, rows: Sequence[dict[str, Any]]) -> None:
        """Print it, and keep it."""
        self.tables[title] = list(rows)
        print(f"\n{title}")
        names = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[_shown(row.get(name)) for name in names] for row in rows]
        widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
        print("  " + "  ".join(name.ljust(width) for name, width in zip(names, widths, strict=True)))
        for line in cells:
            print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Something a reader of the figures must know."""
        self.notes.append(text)
        print(f"note: {text}", flush=True)

    def finish(self) -> int:
        """Print the bars, write the JSON; the exit status."""
        print("\nbars")
        for bar in self.bars:
            print(bar.line())
        self.options.out.mkdir(parents=True, exist_ok=True)
        path = self.options.out / f"{self.name}.json"
        record = {
            "benchmark": self.name,
            "date": self.began.isoformat(timespec="seconds"),
            "quick": self.options.quick,
            "versions": versions(self.llama_server),
            "hardware": self.hardware,
            "notes": self.notes,
            "tables": self.tables,
            "bars": [{**attrs.asdict(bar), "holds": bar.holds} for bar in self.bars],
        }
        path.write_text(json.dumps(record, indent=1) + "\n")
        return int(self.options.check and any(bar.holds is False for bar in self.bars))


def _shown(value: Any) -> str:
    match value:
        case None:
            return "-"
        case float() if abs(value) >= 1000:
            return f"{value:,.0f}"
        case float() if abs(value) >= 10:
            return f"{value:.1f}"
        case float():
            return f"{value:.3f}"
        case int() if not isinstance(value, bool):
            return f"{value:,}"
    return str(value)


def median(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def main(name: str, about: str, run: Callable[[Report], None]) -> None:
    """The command line of one benchmark."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar does not hold")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (%(default)s)")
    parser.add_argument("--cores", metavar="SERVER,LOAD", help="default: the first two that may be used")
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="a part of it; may be repeated")
    parser.add_argument(
        "--patience", metavar="SECONDS", type=float, default=10.0,
        help="how long each run may wait until nobody else uses the machine (%(default)g)",
    )  # fmt: skip
    given = parser.parse_args()
    if given.cores:
        server, load = (int(core) for core in given.cores.split(","))
        cores = Cores(server=server, load=load)
    else:
        cores = Cores.default()
    options = Options(
        quick=given.quick,
        check=given.check,
        out=given.out,
        cores=cores,
        only=tuple(given.only),
        patience_seconds=given.patience,
    )
    report = Report(name=name, options=options)
    run(report)
    raise SystemExit(report.finish())
