"""What each model of a configuration needs, and what is wrong with its files: for `check`."""

import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import attrs
import trio

from trio_router.backend.address import private_folder
from trio_router.backend.dry_run import FlagsRefused, can_say, project
from trio_router.backend.launch import Launcher, LaunchFailed
from trio_router.config import (
    LlamaServer,
    LlamaServerNotFound,
    LlamaServerUnusable,
    ModelConfig,
    Problem,
    RouterConfig,
    file_problems,
    find_llama_server,
    model_problem,
)
from trio_router.memory.fingerprint import fingerprint, server_print
from trio_router.memory.footprint import MIB, Footprint, Place, driver_allowance, estimate
from trio_router.memory.gguf import GgufError, read_header
from trio_router.memory.learned import Learned, default_folder
from trio_router.memory.needs import best
from trio_router.memory.nvml import DriverFailed, NoDriver, NvmlSampler
from trio_router.telemetry.logs import configure_logs

HEAD = ("ALIAS", "SLOTS", "SIZE", "GPU", "HOST", "FROM", "OF WHICH (MiB)", "FILE")
Row = tuple[str, ...]


@attrs.frozen(kw_only=True)
class _Machine:
    """What there is to reckon with."""

    config: RouterConfig
    server: LlamaServer | None
    print: str
    """Of the llama-server."""
    learned: Learned
    uuids: Mapping[str, str]
    """GPUs: UUID -> name."""


def needs(config: RouterConfig, environ: Mapping[str, str], *, ask: bool) -> tuple[list[Row], list[Problem]]:
    """A table of what each model needs, and everything that is wrong.

    `ask`: llama-server is asked, where nobody knows yet; what it says is kept, as by a router that runs.
    """
    machine = _machine(config, environ)
    problems = list(file_problems(config, environ))
    known = {problem.key for problem in problems}
    models = [model for model in config.models.values() if model_problem(config.path, model, "").key not in known]
    if ask and machine.server is not None:
        problems += _ask(machine, machine.server, models)
    rows: list[Row] = [HEAD]
    for model in config.models.values():
        numbers: Row = ("-",) * 5
        if model in models:
            try:
                read_header(model.file)
                numbers = _numbers(model, _footprint(machine, model))
            except (GgufError, OSError) as error:
                problems.append(model_problem(config.path, model, str(error)))
        rows.append((model.alias, str(model.slots), *numbers, str(model.file)))
    return rows, problems


def _machine(config: RouterConfig, environ: Mapping[str, str]) -> _Machine:
    server = None
    try:
        server = find_llama_server(config.system.llama_server_path, environ)
    except LlamaServerUnusable as error:  # among the problems
        server = error.server
    except LlamaServerNotFound:  # likewise
        pass
    learned = Learned(config.system.state_dir or default_folder(environ))
    learned.read()
    uuids = _devices(config)
    name = "" if server is None else server_print(server.path, uuids.values())
    return _Machine(config=config, server=server, print=name, learned=learned, uuids=uuids)


def _devices(config: RouterConfig) -> Mapping[str, str]:
    """Names of the GPUs by UUID, as far as there are any here."""
    if not config.system.gpu_devices:
        return {}
    try:
        devices, _ = NvmlSampler(config.system.gpu_devices).sample()
    except (NoDriver, DriverFailed):
        return {}
    return {device.uuid: device.name for device in devices}


def _ask(machine: _Machine, server: LlamaServer, models: list[ModelConfig]) -> list[Problem]:
    """Have llama-server say what nobody knows, and which flags it refuses."""
    problems = []
    configure_logs("text", "warning", sys.stderr)
    with private_folder() as folder:
        launcher = Launcher(server=server, folder=folder.ensured, transport=machine.config.system.backend_transport)
        for number, model in enumerate(models):
            name = fingerprint(model, machine.print)
            if machine.learned.model(name).projection is not None or not can_say(model):
                continue
            try:
                projection = trio.run(partial(project, launcher, model, number))
            except FlagsRefused as error:
                if _is_about(str(error), model.flags):  # else about ours: it is older than what we know
                    problems.append(model_problem(machine.config.path, model, f"llama-server: {error}", "flags"))
                continue
            except LaunchFailed:  # among the problems
                continue
            if projection is not None:
                machine.learned.projected(name, machine.print, projection)
    machine.learned.save()
    return problems


def _is_about(refusal: str, flags: tuple[str, ...]) -> bool:
    return any(flag in re.split(r"[\s\":]+", refusal) for flag in flags)


def _footprint(machine: _Machine, model: ModelConfig) -> Footprint:
    system = machine.config.system
    path = Path("llama-server") if machine.server is None else machine.server.path
    gpu = bool(system.gpu_devices)
    formula = estimate(model, multiplier=1.0, gpu=gpu, driver_bytes=driver_allowance(path))
    facts = machine.learned.model(fingerprint(model, machine.print))
    driver = machine.learned.driver(machine.print, machine.uuids)
    return best(model, formula, facts, driver, multiplier=system.vram_multiplier)


def _numbers(model: ModelConfig, footprint: Footprint) -> Row:
    """The columns SIZE to OF WHICH."""
    host = sum(part.bytes for part in footprint.parts if part.place is Place.HOST and part.name != "margin")
    sizes = (model.file.stat().st_size, footprint.projected_device_bytes, host)
    size, on_gpu, on_host = (f"{_mib(size)} MiB" for size in sizes)
    note = f" ({footprint.note})" if footprint.note else ""
    return size, on_gpu, on_host, footprint.trust.value, _of_which(footprint) + note


def _of_which(footprint: Footprint) -> str:
    """Each part by its source: `llama-server: weights 92, cache 180; learned: driver 55`."""
    told: dict[str, dict[str, int]] = {}
    for part in footprint.parts:  # a name stands once for the device and once for the host
        sizes = told.setdefault(part.source, {})
        sizes[part.name] = sizes.get(part.name, 0) + part.bytes
    groups = []
    for source, sizes in told.items():
        parts = ", ".join(f"{name} {_mib(size)}" for name, size in sizes.items() if size >= MIB // 2)
        groups += [f"{source}: {parts}"] if parts else []
    return "; ".join(groups)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:.0f}"
