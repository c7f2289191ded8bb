"""Reads router.toml and the environment into a `RouterConfig`, or says everything that is wrong with them."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from trio_router.config.environment import API_KEY, BASE_MODELS_PATH, LLAMA_SERVER_PATH, Variable, read_variables
from trio_router.config.lines import key_lines
from trio_router.config.problems import ConfigError, Problem
from trio_router.config.schema import ApiConfig, RouterConfig, SystemConfig
from trio_router.config.tables import Report
from trio_router.config.values import Mismatch, checked

LARGEST_BYTES = 1024 * 1024

_SECTIONS = ("api", "system", "models", "keys")
_TOML_PLACE = re.compile(r" \(at (?:line (?P<line>\d+), column \d+|end of document)\)$")


def load_config(path: Path, environ: Mapping[str, str]) -> RouterConfig:
    """The configuration in `path`, overridden by our names in `environ` and in the `.env` beside `path`.

    Raises ConfigError with all problems, in file order, those of the environment last. Whether the files that it
    names exist is not looked at: `file_problems` does.
    """
    text = _read(path)
    document = _parse(path, text)
    report = Report(file=str(path), lines=key_lines(text))
    folder = path.absolute().parent
    variables, problems = read_variables(folder, environ)

    report.unknown_keys((), document, _SECTIONS)
    api = report.fields(ApiConfig, ("api",), document.get("api", {}))
    system = report.fields(SystemConfig, ("system",), document.get("system", {}))
    for owner, field, name in (
        (api, attrs.fields(ApiConfig).key, API_KEY),
        (system, attrs.fields(SystemConfig).llama_server_path, LLAMA_SERVER_PATH),
        (system, attrs.fields(SystemConfig).base_models_path, BASE_MODELS_PATH),
    ):
        if name in variables:
            problems += _override(owner, field, variables[name])
    for name in ("llama_server_path", "base_models_path", "state_dir"):
        if system.get(name) is not None:
            system[name] = folder / system[name]
    base = system.setdefault("base_models_path", folder)

    tables = report.models(document)
    parallel = system.get("default_parallel", SystemConfig(base_models_path=base).default_parallel)
    models = {alias: report.model(alias, table, base, parallel) for alias, table in tables.items()}
    names = report.names(tables)
    report.gpus(models.values(), system.get("gpu_devices", SystemConfig(base_models_path=base).gpu_devices))
    if "preload_models" in system:
        system["preload_models"] = report.preload(system["preload_models"], tables)
    if system.get("default_model") is not None:
        report.named(("system", "default_model"), system["default_model"], names)
    keys = report.keys(document.get("keys", []), names, api.get("key"))

    report.problems.sort(key=lambda problem: (problem.line is None, problem.line))
    if everything := (*report.problems, *problems):
        raise ConfigError(everything, [model for model in models.values() if model is not None])
    return RouterConfig(
        path=path,
        api=ApiConfig(**api),
        system=SystemConfig(**system),
        models={alias: model for alias, model in models.items() if model is not None},
        keys=keys,
    )


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError([Problem(file=str(path), message="no such file")]) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError([Problem(file=str(path), message=f"cannot be read: {reason}")]) from None
    if len(content) > LARGEST_BYTES:
        raise ConfigError([Problem(file=str(path), message=f"larger than {LARGEST_BYTES} bytes")])
    try:
        return content.decode("utf-8-sig")  # some editors put a mark in front
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"not UTF-8: byte 0x{content[error.start]:02x}"
        raise ConfigError([Problem(file=str(path), line=line, message=message)]) from None


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError([Problem(file=str(path), message="nested too deeply")]) from None
    except ValueError as error:  # TOMLDecodeError, or an int of thousands of digits
        place = _TOML_PLACE.search(str(error))
        line = None
        if place is not None:  # TOMLDecodeError has `lineno` from Python 3.14 on only
            line = int(place["line"]) if place["line"] else text.count("\n") + 1
        message = f"not TOML: {_TOML_PLACE.sub('', str(error))}"
        raise ConfigError([Problem(file=str(path), line=line, message=message)]) from None


def _override(owner: dict[str, Any], field: "attrs.Attribute[Any]", variable: Variable) -> list[Problem]:
    """Puts `variable` into the place of `field`."""
    try:
        owner[field.name] = checked(field, variable.value)
    except Mismatch as error:
        return [variable.problem(message) for _, message in error.problems]
    return []
