"""The walk over the tables of router.toml: takes what is right, notes what is not.

cattrs gives each value its type (`values`) and attrs its range (`schema`). The walk itself is ours, since a problem
here is a line of a file, fields of the schema are not one to one the keys of the file, and the first mistake must
not hide the second.
"""

import difflib
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from trio_router.config.aliases import alias_problem
from trio_router.config.environment import API_KEY
from trio_router.config.flags import BadSlots, owned_reason, slots_in
from trio_router.config.lines import line_of
from trio_router.config.places import BadModelPath, resolve_model_path
from trio_router.config.policies import ModelPolicy, Policy, variant_problem
from trio_router.config.problems import KeyPath, Problem, written_key
from trio_router.config.schema import DERIVED, KeyConfig, ModelConfig
from trio_router.config.values import Mismatch, checked, found

Schema = type[attrs.AttrsInstance]
VARIANTS: Final = "variants"
"""A key of tables, each of which is checked as one."""
POLICY_KEYS: Final = tuple(field.name for field in attrs.fields(ModelPolicy))


@attrs.frozen(kw_only=True)
class Report:
    """Takes what is right out of a document, and notes what is not."""

    file: str
    lines: Mapping[KeyPath, int]
    problems: list[Problem] = attrs.Factory(list)

    def add(self, path: KeyPath, message: str) -> None:
        line = line_of(self.lines, path)
        self.problems.append(Problem(file=self.file, line=line, key=written_key(path), message=message))

    def unknown_keys(self, path: KeyPath, table: Mapping[str, Any], known: Collection[str]) -> None:
        for key in table:
            if key in known:
                continue
            if (*path, key) == ("api", "key"):
                self.add(
                    (*path, key), f"a key does not belong into a file: set {API_KEY} in the environment or in .env"
                )
            elif path[:1] == ("models",) and len(path) == 2 and isinstance(table[key], dict):
                self.add((*path, key), f"unknown key; an alias with dots stands in quotes: {_quoted(path, key, table)}")
            elif close := difflib.get_close_matches(key, known, n=1, cutoff=0.7):
                self.add((*path, key), f"unknown key; did you mean {close[0]!r}?")
            else:
                self.add((*path, key), f"unknown key; known here: {', '.join(known)}")

    def fields(self, schema: Schema, path: KeyPath, table: object, *more: Schema) -> dict[str, Any]:
        """The values of `table` by field of `schema` and `more`, as far as they are right."""
        if not isinstance(table, dict):
            self.add(path, f"expected a table, got {found(table)}")
            return {}
        known = {
            field.name: field for one in (schema, *more) for field in attrs.fields(one) if field.metadata != DERIVED
        }
        self.unknown_keys(path, table, known)
        values: dict[str, Any] = {}
        for name, value in table.items():
            if name not in known or name == VARIANTS:
                continue
            try:
                values[name] = checked(known[name], value)
            except Mismatch as error:
                for index, message in error.problems:
                    self.add((*path, name) if index is None else (*path, name, index), message)
        return values

    def models(self, document: Mapping[str, Any]) -> dict[str, Any]:
        tables = document.get("models", {})
        if not isinstance(tables, dict):
            self.add(("models",), f"expected tables [models.ALIAS], got {found(tables)}")
            return {}
        if not tables:
            self.add(("models",), "expected at least one table [models.ALIAS], got none")
        return tables

    def model(self, alias: str, table: object, base: Path, parallel: int) -> ModelConfig | None:
        """The model, or None once one of its problems is noted."""
        key: KeyPath = ("models", alias)
        before = len(self.problems)
        if reason := alias_problem(alias):
            self.add(key, reason)
        values = self.fields(ModelConfig, key, table, ModelPolicy)
        policy = {name: values.pop(name) for name in POLICY_KEYS if name in values}
        variants = self._variants((*key, VARIANTS), table.get(VARIANTS, {})) if isinstance(table, dict) else {}
        flags = values.get("flags", ())
        written = table.get("flags") if isinstance(table, dict) else None
        for index, flag in enumerate(written if isinstance(written, list) else ()):
            if isinstance(flag, str) and (reason := owned_reason(flag)):  # also beside one that is no string
                self.add((*key, "flags", index), reason)
        slots = file = None
        try:
            slots = slots_in(flags)
        except BadSlots as error:
            self.add((*key, "flags"), str(error))
        if "model_path" in values:
            try:
                file = resolve_model_path(values["model_path"], base)
            except BadModelPath as error:
                self.add((*key, "model_path"), str(error))
        elif isinstance(table, dict) and "model_path" not in table:
            self.add((*key, "model_path"), "missing; a path, or 'package:NAME/FILE.gguf'")
        if file is None or len(self.problems) > before:
            return None
        return ModelConfig(
            alias=alias,
            file=file,
            slots=slots or parallel,
            policy=ModelPolicy(variants=variants, **policy),
            **values,
        )

    def _variants(self, path: KeyPath, tables: object) -> dict[str, Policy]:
        if not isinstance(tables, dict):
            self.add(path, f"expected tables [{written_key(path)}.NAME], got {found(tables)}")
            return {}
        variants = {}
        for name, table in tables.items():
            if reason := variant_problem(name):
                self.add((*path, name), reason)
            values = self.fields(Policy, (*path, name), table)
            variants[name] = Policy(**values)
        return variants

    def names(self, tables: Mapping[str, Any]) -> list[str]:
        """What clients may send as `model`, also for models that have problems; no two things have the same name."""
        whose = {alias: alias for alias in tables}
        for alias, table in tables.items():
            for path, said in _other_names(alias, table):
                if reason := alias_problem(said):
                    self.add(path, f"{said!r}: {reason}")
                elif said in whose:
                    self.add(path, f"{said!r} is a name of model {whose[said]!r} already")
                whose.setdefault(said, alias)
        return list(whose)

    def gpus(self, models: Iterable[ModelConfig | None], devices: Collection[int]) -> None:
        """Models are on GPUs that the router may use."""
        known = f"system.gpu_devices has {', '.join(map(str, devices)) or 'none'}"
        for model in filter(None, models):
            for gpu in model.gpu or ():
                if gpu not in devices:
                    self.add(("models", model.alias, "gpu"), f"{gpu} is no GPU of ours; {known}")

    def named(self, key: KeyPath, alias: str, models: Collection[str]) -> None:
        """A key whose value must be a model's alias."""
        if alias not in models:
            close = difflib.get_close_matches(alias, models, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(models) or 'none'}"
            self.add(key, f"no model {alias!r}; {hint}")

    def preload(self, written: tuple[str, ...], models: Collection[str]) -> tuple[str, ...]:
        for index, alias in enumerate(written):
            if alias != "*":
                self.named(("system", "preload_models", index), alias, models)
        return tuple(models) if "*" in written else tuple(dict.fromkeys(written))

    def keys(self, written: object, models: Collection[str], environment_key: str | None) -> tuple[KeyConfig, ...]:
        """`[[keys]]`, as far as they are right."""
        if not isinstance(written, list):
            self.add(("keys",), f"expected tables [[keys]], got {found(written)}")
            return ()
        names: set[str] = {API_KEY}
        digests = set() if environment_key is None else {key_digest(environment_key)}
        keys = []
        for index, table in enumerate(written):
            path: KeyPath = ("keys", index)
            before = len(self.problems)
            values = self.fields(KeyConfig, path, table)
            if isinstance(table, dict):
                self._key_problems(path, table, values, models)
            if len(self.problems) > before:
                continue
            key = KeyConfig(**values)
            if key.name in names:
                self.add((*path, "name"), f"there is another key called {key.name!r}")
            names.add(key.name)
            digest = key_digest(key.key) if key.key is not None else bytes.fromhex(key.key_sha256 or "")
            if digest in digests:
                self.add(path, f"the key of {key.name!r} is another's too")
            digests.add(digest)
            keys.append(key)
        return tuple(keys)

    def _key_problems(
        self, path: KeyPath, table: Mapping[str, Any], values: Mapping[str, Any], models: Collection[str]
    ) -> None:
        if "name" not in table:
            self.add((*path, "name"), "missing; it stands for the key in logs and metrics")
        if ("key" in table) == ("key_sha256" in table):
            self.add(path, "expected either `key` or `key_sha256`")
        for number, alias in enumerate(values.get("models", ())):
            if alias != "*":
                self.named((*path, "models", number), alias, models)


def _other_names(alias: str, table: object) -> Iterator[tuple[KeyPath, str]]:
    """Where they stand, and what they are, as far as that can be seen."""
    if not isinstance(table, dict):
        return
    key: KeyPath = ("models", alias)
    aliases, variants = table.get("aliases"), table.get(VARIANTS)
    for index, said in enumerate(aliases if isinstance(aliases, list) else ()):
        if isinstance(said, str):
            yield (*key, "aliases", index), said
    for name in variants if isinstance(variants, dict) else ():
        if variant_problem(name) is None:
            yield (*key, VARIANTS, name), f"{alias}:{name}"


def key_digest(key: str) -> bytes:
    """What is kept of a key, and compared."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _quoted(path: KeyPath, key: str, table: Mapping[str, Any]) -> str:
    """The header meant by `[models.qwen2.5]`, which TOML reads as table `5` in table `qwen2`."""
    parts = [*map(str, path[1:]), key]
    inner = table[key]
    while len(inner) == 1 and isinstance(following := next(iter(inner.values())), dict):
        parts += inner
        inner = following
    return f"[{written_key(('models', '.'.join(parts)))}]"
