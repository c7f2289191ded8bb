"""Whether the files that a configuration names are there. Apart from loading it: a disk may be mounted later."""

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from trio_router.config.places import (
    LlamaServerNotFound,
    LlamaServerUnusable,
    find_llama_server,
    missing_package,
)
from trio_router.config.problems import Problem, written_key
from trio_router.config.schema import ModelConfig, RouterConfig

GGUF_MAGIC = b"GGUF"


def file_problems(config: RouterConfig, environ: Mapping[str, str]) -> tuple[Problem, ...]:
    """What is missing or unusable, in the order of the file: llama-server, then every model's file."""
    problems: list[Problem] = []
    try:
        find_llama_server(config.system.llama_server_path, environ)
    except (LlamaServerNotFound, LlamaServerUnusable) as error:
        problems.append(Problem(file=str(config.path), key="system.llama_server_path", message=str(error)))
    return (*problems, *model_file_problems(config.path, config.models.values()))


def model_file_problems(path: Path, models: Iterable[ModelConfig]) -> list[Problem]:
    """Those of models' files alone."""
    return [model_problem(path, model, reason) for model in models if (reason := unusable_reason(model))]


def model_problem(path: Path, model: ModelConfig, message: str, name: str = "model_path") -> Problem:
    """`message` about the key `name` of `model`, located in the configuration at `path`."""
    return Problem(file=str(path), key=written_key(("models", model.alias, name)), message=message)


def unusable_reason(model: ModelConfig) -> str | None:
    """Why llama-server could not read the file of `model`; None when it looks like it could."""
    if reason := missing_package(model.model_path):
        return reason
    try:
        if not stat.S_ISREG(model.file.stat().st_mode):  # before opening: a pipe would wait for a writer
            return f"not a file: {model.file}"
        with model.file.open("rb") as file:
            start = file.read(len(GGUF_MAGIC))
    except FileNotFoundError:
        return f"no such file: {model.file}"
    except OSError as error:
        return f"cannot be read: {error.strerror}: {model.file}"
    if start != GGUF_MAGIC:
        return f"not a GGUF file (starts with {start!r}, not {GGUF_MAGIC!r}): {model.file}"
    return None
