"""`ps`, `ls`, `load`, `eject`, `reset`, `requests`, `cancel`, `health`, `reload`, `drain`."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import quote

from trio_router.commands.options import AsJson
from trio_router.commands.said import CLEAN, FAILED, print_json
from trio_router.commands.talk import HERE, Router, in_path

GONE: Final = frozenset({"off", "failed"})
"""States of a model that has no llama-server."""


def ps(*, router: Router = HERE, as_json: AsJson = False) -> int:
    """List the models that are in memory."""
    found = router.get("/v1/models/status")
    resident = {
        alias: one
        for alias, one in found["models"].items()
        if any(each["status"] not in GONE for each in (one, *one["replicas"]))
    }
    if as_json:
        print_json(resident)
    else:
        rows = []
        for alias, one in resident.items():
            of = one["slots"]
            active = one["active"] - sum(replica["active"] for replica in one["replicas"])
            rows.append(
                (
                    alias, one["status"], f"{active}/{of}", str(one["queued"]), _memory(one), _ago(one["last_used_at"]),
                    str(one["pid"] or "-"),
                )
            )  # fmt: skip
            for each in one["replicas"]:
                if each["status"] not in GONE:
                    memory = _memory({**each, "vram_mb": one["vram_mb"], "ram_mb": one["ram_mb"]})
                    slots = f"{each['active']}/{of}"
                    rows.append((each["name"], each["status"], slots, "-", memory, "-", str(each["pid"] or "-")))
        table(("MODEL", "STATE", "SLOTS", "WAITING", "MEMORY", "USED", "PID"), rows)
    return CLEAN


def ls(*, router: Router = HERE, as_json: AsJson = False) -> int:
    """List every model."""
    found = router.get("/v1/models/status")
    if as_json:
        print_json(found["models"])
    else:
        rows = []
        for alias, one in found["models"].items():
            why = (one["error_message"] or "").partition("\n")[0] if one["status"] == "failed" else ""
            rows.append((alias, one["status"], str(one["slots"]), str(one["n_ctx"] or "-"), _memory(one), why))
        table(("MODEL", "STATE", "SLOTS", "CONTEXT", "MEMORY", ""), rows)
    return CLEAN


def load(model: str, /, *, router: Router = HERE, as_json: AsJson = False) -> int:
    """Load a model, and wait for it."""

    def wait() -> Any:
        return router.post("/v1/models/load", {"model": model}, None)

    if as_json:
        return _told(wait(), as_json=True)
    from trio_router.commands.progress import progress  # noqa: PLC0415  (the rest need not wait for rich)

    with progress(router, model):
        said = wait()
    return _told(said, as_json=False)


def eject(model: str, /, *, force: bool = False, router: Router = HERE, as_json: AsJson = False) -> int:
    """Unload a model.

    Parameters
    ----------
    force
        Cut running requests.
    """
    path = "/v1/models/eject?force=true" if force else "/v1/models/eject"
    said = _waited(f"ejecting {model}", lambda: router.post(path, {"model": model}, None), quiet=as_json)
    return _told(said, as_json=as_json)


def reset(model: str, /, *, router: Router = HERE, as_json: AsJson = False) -> int:
    """Let a failed model be tried again."""
    return _told(router.post(f"/v1/models/{in_path(model)}/reset"), as_json=as_json)


def requests(*, router: Router = HERE, as_json: AsJson = False) -> int:
    """List the requests under way."""
    found = router.get("/v1/requests")
    if as_json:
        print_json(found)
    else:
        rows = [
            (
                one["id"], one["model"] or "-", one["state"], one["priority"] or "-", one["key"] or one["client"] or "-",
                _span(one["age_ms"] / 1000), one["endpoint"],
            )
            for one in found["requests"]
        ]  # fmt: skip
        table(("REQUEST", "MODEL", "STATE", "PRIORITY", "FROM", "AGE", "ENDPOINT"), rows)
    return CLEAN


def cancel(request: str, /, *, router: Router = HERE, as_json: AsJson = False) -> int:
    """End a request that is under way."""
    said = router.post(f"/v1/requests/{quote(request, safe='')}/cancel")
    return _told({**said, "message": f"{said['cancelled']} cancelled"}, as_json=as_json)


def health(*, router: Router = HERE, as_json: AsJson = False) -> int:
    """Say whether the router is well."""
    with router.answer("GET", "/livez", None, 10.0):
        pass
    try:
        found = router.get("/health")
    except Exception:
        if as_json:
            print_json({"status": "degraded"})
        raise
    if as_json:
        print_json(found)
    else:
        manager = found["checks"]["manager"]
        print(f"{found['status']}: {manager['active_models']} models in memory, up {_span(found['uptime_seconds'])}")
    return CLEAN if found["status"] == "ok" else FAILED


def reload(*, router: Router = HERE, as_json: AsJson = False) -> int:
    """Have the router read its configuration again."""
    found = router.post("/v1/config/reload", seconds=60)
    if as_json:
        print_json(found)
    else:
        print(f"changed: {', '.join(found['changed']) or 'nothing'}")
        for what, aliases in found["models"].items():
            if aliases and what != "unchanged":
                print(f"{what}: {', '.join(aliases)}")
        if found["after_restart"]:
            print(f"after another start of the router: {', '.join(found['after_restart'])}")
    return CLEAN


def drain(*, router: Router = HERE, as_json: AsJson = False) -> int:
    """Have the router finish what runs, and stop."""
    return _told(router.post("/v1/router/drain"), as_json=as_json)


def _told(said: Any, *, as_json: bool) -> int:
    if as_json:
        print_json(said)
    else:
        print(said["message"])
    return CLEAN


def _waited(what: str, does: Callable[[], Any], *, quiet: bool) -> Any:
    """What it returns; people see that it goes on."""
    if quiet:
        return does()
    from rich.console import Console  # noqa: PLC0415  (the rest need not wait for it)

    with Console(stderr=True).status(what):
        return does()


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns that programs can cut, too."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _memory(one: dict[str, Any]) -> str:
    """Of GPUs, or of the host where it needs none of theirs."""
    mib = one["vram_used_mb"] if one["vram_used_mb"] is not None else one["vram_mb"]
    if not mib and one.get("ram_mb"):
        return f"{one['ram_mb']} MiB RAM"
    return "-" if mib is None else f"{mib} MiB"


def _ago(when: str | None) -> str:
    return "-" if when is None else f"{_span((datetime.now(UTC) - datetime.fromisoformat(when)).total_seconds())} ago"


def _span(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
