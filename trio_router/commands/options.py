"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

AsJson = Annotated[bool, Parameter(name="--json", help="Print JSON, for programs.")]
ConfigFile = Annotated[
    Path | None, Parameter(name="--config", help="What to read; without it $CONFIG_PATH, else ./router.toml.")
]
