"""`logs`."""

import json
from typing import Annotated

from cyclopts import Parameter

from trio_router.commands.options import AsJson
from trio_router.commands.said import CLEAN
from trio_router.commands.talk import HERE, Router, in_path


def logs(
    model: str,
    /,
    *,
    follow: Annotated[bool, Parameter(alias="-f")] = False,
    lines: Annotated[int, Parameter(alias="-n")] = 100,
    router: Router = HERE,
    as_json: AsJson = False,
) -> int:
    """Print what a model's llama-server wrote.

    Parameters
    ----------
    follow
        Go on as it writes.
    lines
        How many of the last ones.
    """
    query = f"?lines={lines}{'&follow=1' if follow else ''}"
    for line in router.lines(f"/v1/models/{in_path(model)}/logs{query}"):
        print(json.dumps({"model": model, "line": line}, ensure_ascii=False) if as_json else line, flush=follow)
    return CLEAN
