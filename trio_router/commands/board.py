"""What `top` shows."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

COLOURS = {
    "ready": "green", "starting": "yellow", "loading": "yellow", "stopping": "yellow", "crashed": "red", "failed": "red",
}  # fmt: skip


def watch(told: Iterable[dict[str, Any]]) -> None:
    """The numbers as they come, until Ctrl-C."""
    with Live(console=Console(), screen=True, auto_refresh=False) as live:
        for numbers in told:
            live.update(_shown(numbers), refresh=True)


def show(numbers: dict[str, Any]) -> None:
    """Print them."""
    Console().print(_shown(numbers))


def _shown(numbers: dict[str, Any]) -> Group:
    totals, gpu = numbers["totals"], numbers["gpu"]
    head = Text.assemble(
        ("trio-router ", "bold"), numbers["server"]["status"],
        f"   running {totals['active_requests']}   waiting {totals['queue_depth']}"
        f"   requests/min {totals['requests_1m']}   errors/min {totals['errors_1m']}   tokens/min {totals['tokens_1m']}",
    )  # fmt: skip
    if gpu["vram_total_mb"]:
        head.append(f"   GPU memory {gpu['vram_used_mb']} of {gpu['vram_total_mb']} MiB")
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("MODEL")
    table.add_column("STATE")
    for name in ("RUNNING", "WAITING", "MEMORY", "REQ/MIN", "ERR/MIN", "TOK/MIN", "FIRST TOKEN", "MEAN"):
        table.add_column(name, justify="right")
    for one in numbers["models"]:
        table.add_row(
            one["alias"], Text(one["status"], COLOURS.get(one["status"], "dim")), str(one["active_requests"]),
            str(one["queue_depth"]), f"{one['vram_mb']} MiB", str(one["requests_1m"]), str(one["errors_1m"]),
            str(one["tokens_1m"]), _ms(one["first_token_ms"]), _ms(one["avg_latency_ms"]),
        )  # fmt: skip
    return Group(head, Text(), table)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value / 1000:.1f} s" if value >= 1000 else f"{value:.0f} ms"
