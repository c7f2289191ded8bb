"""The command line."""

import argparse
import json
import secrets
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import chaos
from benchmarks.machine import hardware, versions
from benchmarks.report import RESULTS


def main() -> None:
    """Run, print, write, and exit with 1 if there are violations."""
    about = (chaos.__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=about)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON (%(default)s)")
    parser.add_argument("--keep", type=Path, default=None, help="folder for the logs (default: one that is removed)")
    given = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if given.seed is None else given.seed
    print(f"seed {seed}, {given.minutes:g} minutes", flush=True)
    began, clock = datetime.now(UTC), time.monotonic()
    before = hardware()
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        found = chaos.run(folder, given.minutes * 60, seed)
    ledger = found.ledger
    tables = {"fates of requests": ledger.fates, "faults": ledger.faults, "whom they met": ledger.stages}
    for title, counts in tables.items():
        print(f"\n{title}")
        for name, count in counts.most_common():
            print(f"  {name:<40} {count:>8,}")
    print(f"\nviolations: {len(ledger.violations)}")
    for violation in ledger.violations:
        print(f"  {violation}")
    record = {
        "benchmark": "chaos",
        "date": began.isoformat(timespec="seconds"),
        "seed": seed,
        "minutes": given.minutes,
        "seconds_in_all": round(time.monotonic() - clock),
        "versions": versions(found.place.server.path),
        "hardware": before,
        **{title.replace(" ", "_"): dict(counts.most_common()) for title, counts in tables.items()},
        "most_resident_mb": round(found.misfortune.most_resident_bytes / 1e6, 1),
        "violations": ledger.violations,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "chaos.json").write_text(json.dumps(record, indent=1) + "\n")
    raise SystemExit(1 if ledger.violations else 0)


if __name__ == "__main__":
    sys.exit(main())
