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


def test_the_server_does_not_load_what_it_does_not_use() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", LOOK], check=True, timeout=60)
