"""What all llama-servers say of themselves to Prometheus, asked side by side."""

import trio

from trio_router.backend.client import BackendClient, NoAnswer
from trio_router.fleet.registry import Registry
from trio_router.telemetry.exposition import Scraped

SCRAPE_SECONDS = 2.0
"""A llama-server that takes longer, because it computes, is left out this time: Prometheus gives us ten."""


async def scrape_backends(registry: Registry) -> list[Scraped]:
    """The metrics of every model that is ready, in the order of router.toml; returns within `SCRAPE_SECONDS`."""
    found: dict[str, Scraped] = {}

    async def ask(alias: str, client: BackendClient) -> None:
        found[alias] = Scraped(alias=alias, problem=f"no answer within {SCRAPE_SECONDS:g} s")
        with trio.move_on_after(SCRAPE_SECONDS):
            try:
                found[alias] = Scraped(alias=alias, text=await client.metrics())
            except NoAnswer as error:
                found[alias] = Scraped(alias=alias, problem=str(error))

    async with trio.open_nursery() as nursery:
        for alias, model in registry.models.items():
            if model.supervisor.backend is not None:
                nursery.start_soon(ask, alias, model.supervisor.backend.client)
    return [found[alias] for alias in registry.models if alias in found]
