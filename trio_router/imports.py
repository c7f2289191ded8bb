"""What other packages import and the server does not use.

httpx brings a command line, structlog a way to show tracebacks; both load rich and Pygments for that if they are
there, and they are, since our own command line uses rich: 65 modules, 3.6 MB, a tenth of the time a start takes.
Both packages do without where these cannot be imported.
"""

import importlib
import sys
from typing import Any, Final, cast

UNUSED: Final = ("rich", "pygments")
THEIRS: Final = ("httpx", "structlog")


def import_without_unused() -> None:
    """Import `THEIRS` as if `UNUSED` were not installed; who imports those later gets them."""
    hidden = [name for name in UNUSED if name not in sys.modules]
    modules = cast("dict[str, Any]", sys.modules)
    try:
        modules.update(dict.fromkeys(hidden))  # an import of what is None here fails, says the import system
        for name in THEIRS:
            importlib.import_module(name)
    finally:
        for name in hidden:
            del modules[name]
