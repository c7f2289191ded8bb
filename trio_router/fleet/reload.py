"""What another router.toml means for a router that runs: a pure comparison."""

from collections.abc import Iterator
from typing import Any, Final

import attrs

from trio_router.config.problems import written_key
from trio_router.config.schema import DERIVED, RouterConfig

FROM_THE_START: Final = {
    "api": ("host", "port"),
    "system": ("llama_server_path", "gpu_devices", "backend_transport", "state_dir"),
}
"""Keys that a router reads once: it listens, and has looked at its devices."""


@attrs.frozen(kw_only=True)
class Changes:
    """What is different."""

    config: RouterConfig
    """What is gone by from now on: the new one, with the old values of `after_restart`."""
    keys: tuple[str, ...]
    """Keys of the file whose values differ, as written there; of `[[keys]]` only that word."""
    after_restart: tuple[str, ...]
    """Those among them that need another start of the router."""
    added: tuple[str, ...]
    """Models."""
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    """Models whose own settings differ: they are drained, and started again if they were loaded."""
    unchanged: tuple[str, ...]


def compare(old: RouterConfig, new: RouterConfig) -> Changes:
    """What changes from `old` to `new`."""
    keys: list[str] = []
    after_restart: list[str] = []
    kept: dict[str, dict[str, Any]] = {}
    for section, values, before in (("api", new.api, old.api), ("system", new.system, old.system)):
        differing = list(_differing(before, values))
        keys += [f"{section}.{name}" for name in differing]
        late = [name for name in differing if name in FROM_THE_START[section]]
        after_restart += [f"{section}.{name}" for name in late]
        kept[section] = {name: getattr(before, name) for name in late}
    if old.api.key != new.api.key or old.keys != new.keys:
        keys.append("keys")
    common = [alias for alias in new.models if alias in old.models]
    # a policy needs no other llama-server
    changed = tuple(
        alias
        for alias in common
        if attrs.evolve(new.models[alias], policy=old.models[alias].policy) != old.models[alias]
    )
    for alias in common:
        # slots and file follow from others' keys too, which are told above
        names = list(_differing(old.models[alias], new.models[alias]))
        names += _differing(old.models[alias].policy, new.models[alias].policy)
        keys += [written_key(("models", alias, name)) for name in names]
    return Changes(
        config=attrs.evolve(
            new, api=attrs.evolve(new.api, **kept["api"]), system=attrs.evolve(new.system, **kept["system"])
        ),
        keys=tuple(keys),
        after_restart=tuple(after_restart),
        added=tuple(alias for alias in new.models if alias not in old.models),
        removed=tuple(alias for alias in old.models if alias not in new.models),
        changed=changed,
        unchanged=tuple(alias for alias in common if alias not in changed),
    )


def _differing(before: attrs.AttrsInstance, after: attrs.AttrsInstance) -> Iterator[str]:
    """Names of the keys of a table that have other values."""
    for field in attrs.fields(type(before)):
        if field.metadata != DERIVED and getattr(before, field.name) != getattr(after, field.name):
            yield field.name
