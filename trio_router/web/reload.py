"""Another router.toml for a router that runs: checked first, refused whole if anything is wrong with it.

SIGHUP and `POST /v1/config/reload` are the two ways to ask for it, and the same thing.

*Error handling.* What is wrong is an `InvalidConfig` with every problem; everything goes on as before.

*Cancellation.* While the file is read; what follows is done at once.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import attrs
import structlog
import trio
from quart import Response
from quart_trio import QuartTrio

from trio_router.config import ConfigError, RouterConfig, model_problem, unusable_reason
from trio_router.errors import InvalidConfig
from trio_router.fleet.registry import Registry
from trio_router.fleet.reload import Changes, compare
from trio_router.web.admission import Admission
from trio_router.web.responses import json_response

log = structlog.get_logger("trio_router")


@attrs.define(eq=False, kw_only=True)
class Reloader:
    """Reads the file again, and has everybody go by it."""

    read: Callable[[], RouterConfig]
    """Reads it; blocks. Raises ConfigError."""
    registry: Registry
    admission: Admission
    stop: trio.Event = attrs.field(factory=trio.Event)
    """Set to have the router finish what runs, and stop; any number of times."""
    told: list[Callable[[Changes], None]] = attrs.field(factory=list)
    """Called once all others go by it."""
    _turn: trio.Lock = attrs.field(factory=trio.Lock)

    async def reload(self) -> Changes:
        """Go by the file as it is now; returns what is different. Raises InvalidConfig."""
        async with self._turn:
            try:
                changes = await trio.to_thread.run_sync(self._read_and_compare, abandon_on_cancel=True)
            except ConfigError as error:
                problems = [str(problem) for problem in error.problems]
                log.error("configuration refused", problems=problems)  # noqa: TRY400  (the problems say all)
                raise InvalidConfig(
                    f"the configuration is wrong, and everything goes on as before: {problems[0]}",
                    details={"problems": problems},
                ) from error
            self.registry.apply(changes)
            self.admission.renew(changes.config.api, changes.config.keys)
            for tell in self.told:
                tell(changes)
        log.info("configuration reloaded", **described(changes))
        return changes

    def _read_and_compare(self) -> Changes:
        config = self.read()
        changes = compare(self.registry.config, config)
        problems = [
            model_problem(config.path, config.models[alias], reason)
            for alias in (*changes.added, *changes.changed)
            if (reason := unusable_reason(config.models[alias]))
        ]
        problems += [
            model_problem(config.path, config.models[alias], reason, "gpu")
            for alias in (*changes.added, *changes.changed)
            if (reason := _elsewhere(changes.config, alias))
        ]
        if problems:
            raise ConfigError(problems)
        return changes

    async def reload_by_signal(self) -> None:
        """The same; whoever sent the signal reads the log."""
        with suppress(InvalidConfig):
            await self.reload()


def _elsewhere(config: RouterConfig, alias: str) -> str | None:
    """Why a model cannot be where it is to be, until the router is started again."""
    late = [gpu for gpu in config.models[alias].gpu or () if gpu not in config.system.gpu_devices]
    return f"GPU {late[0]} of system.gpu_devices is the router's only after another start" if late else None


def described(changes: Changes) -> dict[str, Any]:
    """What is different, in lists of words."""
    return {
        "changed": list(changes.keys),
        "after_restart": list(changes.after_restart),
        "models": {
            "added": list(changes.added),
            "removed": list(changes.removed),
            "restarted": list(changes.changed),
            "unchanged": list(changes.unchanged),
        },
    }


def add_routes(app: QuartTrio, reloader: Reloader) -> None:
    """Add it to `app`."""

    @app.post("/v1/router/drain")
    async def drain() -> Response:
        reloader.stop.set()
        return json_response({"status": "success", "message": "the router finishes what runs, and stops"})

    @app.post("/v1/config/reload")
    async def reload() -> Response:
        return json_response({"status": "success", **described(await reloader.reload())})
