"""A trace, played with a configuration: for `simulate`."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import structlog

from trio_router.commands.said import CLEAN, FAILED, print_json
from trio_router.config.schema import RouterConfig
from trio_router.memory.footprint import Footprint, estimate
from trio_router.memory.gguf import GgufError
from trio_router.simulation.plot import svg
from trio_router.simulation.report import as_numbers, in_words
from trio_router.simulation.run import load_times, simulate
from trio_router.telemetry.trace import BadTrace, TracedLoad, TracedRequest, read_line


def replay(config: RouterConfig, trace: Path, *, as_json: bool, plot: Path | None) -> int:
    """Play a trace with a configuration, and say what would have happened."""
    try:
        happened = list(_read(trace))
    except (OSError, BadTrace) as error:
        print(f"trio-router: {error}", file=sys.stderr)
        return FAILED
    requests = [each for each in happened if isinstance(each, TracedRequest)]
    unknown = sorted({each.model for each in requests} - set(config.models))
    if unknown:
        print(f"trio-router: not in the configuration, left out: {', '.join(unknown)}", file=sys.stderr)
    requests = [each for each in requests if each.model in config.models]
    if not requests:
        print(f"trio-router: {trace} has no request for a model of the configuration", file=sys.stderr)
        return FAILED
    times = load_times(each for each in happened if isinstance(each, TracedLoad))
    if not times.by_model:
        print(f"trio-router: no load in the trace: each is taken to last {times.usual:g} s", file=sys.stderr)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    outcome = simulate(config, requests, times, dict(_footprints(config)))
    if plot is not None:
        plot.write_text(svg(outcome), encoding="utf-8")
    if as_json:
        print_json(as_numbers(outcome))
    else:
        for line in in_words(outcome):
            print(line)
    return CLEAN


def _read(trace: Path) -> Iterator[TracedRequest | TracedLoad]:
    """Raises OSError, BadTrace."""
    with trace.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield read_line(line)
                except BadTrace as error:
                    raise BadTrace(f"{trace}:{number}: {error}") from None


def _footprints(config: RouterConfig) -> Iterator[tuple[str, Footprint]]:
    """Of the models whose files are here."""
    system = config.system
    for alias, model in config.models.items():
        try:
            yield alias, estimate(model, multiplier=system.vram_multiplier, gpu=bool(system.gpu_devices))
        except GgufError:
            continue
