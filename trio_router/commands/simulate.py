"""`simulate`."""

from collections.abc import Mapping
from pathlib import Path

from trio_router.commands.options import AsJson, ConfigFile
from trio_router.commands.said import BAD_CONFIG


def simulate(
    trace: Path,
    /,
    *,
    config: ConfigFile = None,
    plot: Path | None = None,
    as_json: AsJson = False,
    environ: Mapping[str, str],
) -> int:
    """Play what happened again, in virtual time.

    Parameters
    ----------
    trace
        What GET /v1/router/trace said.
    plot
        Write a picture, as SVG.
    """
    from trio_router.commands.config import config_path, print_problems  # noqa: PLC0415  (as in `check`)
    from trio_router.config import ConfigError, load_config  # noqa: PLC0415

    try:
        found = load_config(config_path(config, environ), environ)
    except ConfigError as error:
        print_problems(error.problems)
        return BAD_CONFIG
    from trio_router.commands.replay import replay  # noqa: PLC0415

    return replay(found, trace, as_json=as_json, plot=plot)
