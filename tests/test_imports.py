import subprocess
import sys

LOOK = """
import sys
from trio_router.imports import UNUSED, import_without_unused
import_without_unused()
import trio_router.tree
assert not [name for name in UNUSED if name in sys.modules], "still loaded"
import rich.console
import httpx
assert httpx.get and httpx.AsyncClient
"""

SPENT = """
import sys, weakref
from trio_router.cli import _parsed
from trio_router.imports import forget_command_line
command = _parsed(["serve", "--port", "1"], {"API_KEY": "k"})
assert "rich" not in sys.modules
import cyclopts.core
app, parse = weakref.ref(cyclopts.App), weakref.ref(cyclopts.core.create_bound_arguments)
del cyclopts
forget_command_line()
assert not [name for name in sys.modules if "cyclopts" in name], "still loaded"
assert (app(), parse()) == (None, None), "still held"
assert command.keywords["port"] == 1
"""


def test_a_router_that_runs_lets_go_of_its_command_line() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", SPENT], check=True, timeout=60)


def test_the_server_does_not_load_what_it_does_not_use() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", LOOK], check=True, timeout=60)
