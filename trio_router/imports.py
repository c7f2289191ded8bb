"""What a router that runs does not need in memory.

Its command line: cyclopts is 1.9 MB of modules, classes and caches, which what is imported next takes the place of.

What other packages import and the server does not use:
httpx brings a command line, structlog a way to show tracebacks; both load rich and Pygments for that if they are
there, and they are, since our own command line uses rich: 65 modules, 3.6 MB, a tenth of the time a start takes.
Both packages do without where these cannot be imported.
"""

import gc
import importlib
import sys
from typing import Any, Final, cast

UNUSED: Final = ("rich", "pygments")
THEIRS: Final = ("httpx", "structlog")
SPENT: Final = "cyclopts"


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


def forget_command_line() -> None:
    """Let go of `SPENT`.

    Its modules are emptied, too: typing's caches still hold some of its classes, and they would hold all the rest.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == SPENT]:
        vars(sys.modules.pop(name)).clear()
    gc.collect()
    gc.set_threshold(3_000, 20, 20)  # what is imported from here on stays; the tree sets its own when all is there
