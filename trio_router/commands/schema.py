"""`schema`."""

from trio_router.commands.said import CLEAN, print_json


def schema() -> int:
    """Print the JSON Schema of router.toml, for editors."""
    from trio_router.config.json_schema import json_schema  # noqa: PLC0415  (as in `check`)

    print_json(json_schema())
    return CLEAN
