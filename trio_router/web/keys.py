"""Who may ask for what: the keys of router.toml and of the environment, and how much each has under way."""

from collections.abc import Iterable, Mapping
from typing import Final

import attrs

from trio_router.config.environment import API_KEY
from trio_router.config.schema import ApiConfig, KeyConfig
from trio_router.config.tables import key_digest
from trio_router.errors import AdminRequired, ModelNotAllowed, TooManyRequests
from trio_router.fleet.ticket import Priority

ANY_MODEL: Final = "*"


@attrs.define(eq=False)
class Holder:
    """Whoever sends one key. Outlives a reload that keeps the key's name."""

    config: KeyConfig
    running: int = 0
    """Its inference requests that have begun and not ended."""

    @property
    def name(self) -> str:
        """Stands for it in logs and metrics."""
        return self.config.name

    @property
    def weight(self) -> float:
        """Of its share."""
        return self.config.weight

    def enter(self, alias: str, wanted: Priority, said: str | None = None) -> Priority:
        """Begin a request for `alias`, which the client called `said`; returns the priority it gets. `leave` ends it.

        Raises ModelNotAllowed, TooManyRequests.
        """
        self.check_model(alias, said)
        config = self.config
        if config.max_concurrency is not None and self.running >= config.max_concurrency:
            raise TooManyRequests(
                f"the key {config.name!r} has {self.running} requests under way, as many as it may",
                details={"running": self.running},
            )
        self.running += 1
        return self.allowed(wanted)

    def allowed(self, wanted: Priority) -> Priority:
        """The priority that a request gets."""
        return max(wanted, Priority[self.config.max_priority.name], key=lambda priority: priority.value)

    def may_ask(self, alias: str, said: str | None = None) -> bool:
        """Whether it may ask `alias`, which the client called `said`."""
        return not {alias, said, ANY_MODEL}.isdisjoint(self.config.models)

    def check_model(self, alias: str, said: str | None = None) -> None:
        """Raise ModelNotAllowed unless it may ask `alias`, which the client called `said`."""
        config = self.config
        if not self.may_ask(alias, said):
            raise ModelNotAllowed(
                f"the key {config.name!r} may not ask model {alias!r}; it may ask {', '.join(config.models) or 'none'}",
                param="model",
            )

    def leave(self) -> None:
        """End it."""
        self.running -= 1

    def check_admin(self) -> None:
        """Raise AdminRequired unless it may change what runs."""
        if not self.config.admin:
            raise AdminRequired(f"the key {self.name!r} may not do this: it has no `admin = true` in [[keys]]")


def key_holders(api: ApiConfig, keys: Iterable[KeyConfig], known: Mapping[bytes, Holder]) -> dict[bytes, Holder]:
    """Holders by the SHA-256 of their key. Those of `known` that still have their name go on counting."""
    by_name = {holder.name: holder for holder in known.values()}
    if api.key is not None:
        keys = [KeyConfig(name=API_KEY, key=api.key, admin=True), *keys]
    holders = {}
    for key in keys:
        holder = by_name.get(key.name, Holder(key))
        holder.config = key
        holders[key_digest(key.key) if key.key is not None else bytes.fromhex(key.key_sha256 or "")] = holder
    return holders
