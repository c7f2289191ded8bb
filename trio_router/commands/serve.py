"""`serve`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trio_router.commands.said import USAGE, Said, say

if TYPE_CHECKING:
    from trio_router.config import RouterConfig

# Its imports wait, so that wrong usage is said at once; and it names nothing of cyclopts', which a router that runs
# has let go of.


def serve(
    *,
    config: Path | None = None,
    host: str | None = None,
    port: int | None = None,
    log_format: Literal["text", "json"] = "text",
    log_level: Literal["debug", "info", "warning", "error"] = "info",
    environ: Mapping[str, str],
) -> int:
    """Accept requests until SIGTERM or SIGINT.

    Parameters
    ----------
    config
        What to read; without it $CONFIG_PATH, else ./router.toml.
    host
        Address to listen on, instead of the file's api.host.
    port
        Port, instead of the file's api.port; 0 picks one.
    log_format
        Of the lines on standard error.
    log_level
        The least that is written.
    """
    from trio_router.commands.config import config_path, print_problems  # noqa: PLC0415
    from trio_router.config import (  # noqa: PLC0415
        ConfigError,
        LlamaServerNotFound,
        LlamaServerUnusable,
        file_problems,
        find_llama_server,
        load_config,
        missing_package,
    )

    path = config_path(config, environ)

    def read() -> "RouterConfig":
        return _with_address(load_config(path, environ), host, port)

    try:
        found = read()
    except ConfigError as error:
        print_problems(error.problems)
        return USAGE
    problems = file_problems(found, environ)
    try:
        server = find_llama_server(found.system.llama_server_path, environ)
    except LlamaServerUnusable as error:
        server = error.server  # it may come; until then each load fails and says why
    except LlamaServerNotFound:
        print_problems(problems)
        return USAGE
    if all(missing_package(model.model_path) for model in found.models.values()):
        print_problems(problems)
        return USAGE
    for problem in problems:
        warning = {"level": "warning", "event": str(problem)}
        say(json.dumps(warning) if log_format == "json" else f"warning: {problem}", sys.stderr)

    from trio_router.imports import forget_command_line, import_without_unused  # noqa: PLC0415

    forget_command_line()
    import_without_unused()
    from trio_router import tree  # noqa: PLC0415

    return tree.main(found, server, read, log_format=log_format, log_level=log_level)


def _with_address(config: "RouterConfig", host: str | None, port: int | None) -> "RouterConfig":
    """`config` with `--host` and `--port` in the place of the file's. Raises Said."""
    import attrs  # noqa: PLC0415

    from trio_router.config import OutOfRange  # noqa: PLC0415

    given: dict[str, Any] = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    try:
        return attrs.evolve(config, api=attrs.evolve(config.api, **given))
    except OutOfRange as error:
        raise Said(f"--{error}", USAGE) from error  # the names of options and fields are the same
