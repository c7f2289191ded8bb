"""Everything that a client may send as `model`: aliases, their other names, variants."""

from collections.abc import Iterable, Mapping

import attrs

from trio_router.config.policies import Policy, overlaid
from trio_router.config.schema import ModelConfig
from trio_router.errors import UnknownModel, shown
from trio_router.fleet.rewriting import Rewriting


@attrs.frozen(kw_only=True)
class Name:
    """A name, and what it stands for."""

    said: str
    """What clients send."""
    alias: str
    """The model that answers."""
    policy: Policy
    variant: bool = False

    @property
    def listed(self) -> bool:
        """Whether it is a model of its own to those who list them."""
        return self.variant or self.said == self.alias


@attrs.frozen
class Names:
    """All of one configuration."""

    _names: Mapping[str, Name]
    rewritings: Mapping[str, Rewriting]
    """What is done to the bodies of requests, for names under which something is."""

    @classmethod
    def of(cls, models: Iterable[ModelConfig]) -> "Names":
        """Of these models."""
        names: dict[str, Name] = {}
        for model in models:
            of_model: list[tuple[str, Policy]] = [(model.alias, model.policy)]
            of_model += [(other, model.policy) for other in model.policy.aliases]
            for said, policy in of_model:
                names[said] = Name(said=said, alias=model.alias, policy=policy)
            for variant, above in model.policy.variants.items():
                said = f"{model.alias}:{variant}"
                names[said] = Name(said=said, alias=model.alias, policy=overlaid(model.policy, above), variant=True)
        found = {said: Rewriting.of(name.policy) for said, name in names.items()}
        return cls(names, {said: rewriting for said, rewriting in found.items() if rewriting is not None})

    def __contains__(self, said: object) -> bool:
        return said in self._names

    def __getitem__(self, said: str) -> Name:
        """What `said` stands for. Raises UnknownModel."""
        found = self._names.get(said)
        if found is None:
            raise UnknownModel(f"no model is called {shown(said)}; GET /v1/models lists those there are", param="model")
        return found

    def listed(self) -> list[str]:
        """What clients are told there is, in the order of the file."""
        return [said for said, name in self._names.items() if name.listed]

    def longest_before(self, target: str) -> str | None:
        """The longest name that `target` begins with, as a path does; a name may hold slashes."""
        found = [said for said in self._names if target == said or target.startswith(f"{said}/")]
        return max(found, key=len, default=None)
