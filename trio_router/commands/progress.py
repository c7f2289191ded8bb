"""A bar while a model loads, for people who wait at a terminal."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from trio_router.commands.said import Said
from trio_router.commands.talk import Router, in_path

LOOK_SECONDS: Final = 0.25


@contextmanager
def progress(router: Router, model: str) -> Iterator[None]:
    """Show how far the model is until this is left; it runs to and fro where that is not known."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    over = threading.Event()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"loading {model}", total=None, state="")

        def look() -> None:
            while not over.wait(LOOK_SECONDS):
                try:
                    found = router.get(f"/v1/models/{in_path(model)}/status")
                except Said:  # whoever waits is told
                    return
                percent = found["load_progress"]
                bar.update(task, total=None if percent is None else 100, completed=percent or 0, state=found["status"])

        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        try:
            yield
        finally:
            over.set()
            looking.join()
