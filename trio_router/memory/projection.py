"""What llama-server says of its own memory while it starts, with `-lv 4`: exact, and before it allocates.

Read from its log, as llama.cpp writes it (`common/fit.cpp`, `common_memory_breakdown_print` in `common/common.cpp`,
`load_tensors` in `src/llama-model.cpp`):

    common_memory_breakdown_print: | memory breakdown [MiB]       | total    free    self   model   context   compute ...
    common_memory_breakdown_print: |   - Vulkan0 (H100 80GB HBM3) | 81559 = 81029 + ( 285 =    92 +     180 +      13) + ...
    common_memory_breakdown_print: |   - Host                     |                    32 =    28 +       0 +       4 ...
    common_params_fit_impl: projected to use 285 MiB of device memory vs. 81029 MiB of free device memory

The last table before the `projected` line is what the flags ask for; those after it are tries with less. A draft model has
a table too: before the other, ended by `estimated memory usage of draft model`, or after it, begun by `for the extra
model`, by llama-server's age. A line that is not
understood is passed over: another llama-server may say it otherwise, and then says nothing to us.
"""

import re
from collections.abc import Sequence
from typing import Final

import attrs

MIB: Final = 1024 * 1024
HOST: Final = "Host"
_MAX_DEVICES: Final = 64

_HEADER: Final = re.compile(r"\| memory breakdown \[MiB\]")
_ROW: Final = re.compile(
    r"\|\s+- (?P<name>[A-Za-z][\w.]{0,63})(?: \([^|]*\))?\s*\|[^|]*?"
    r"(?P<self>\d{1,9}) =\s*(?P<model>\d{1,9}) \+\s*(?P<context>\d{1,9}) \+\s*(?P<compute>\d{1,9})\b"
)
_ON_DEVICE: Final = re.compile(r"= *-?\d+ \+ \(")
"""Rows of devices say their total and free memory too; what has none of its own is the host's, whatever it is called."""
_EXTRA: Final = re.compile(r"device memory data for the extra model")
_DRAFT: Final = re.compile(r"estimated memory usage of draft model")
_PROJECTED: Final = re.compile(r"projected to use \d+ MiB of (?:device|host) memory")
_LOADS: Final = re.compile(r"llama_model_loader: loaded meta data|load_tensors: ")
_LAYERS: Final = re.compile(r"offloaded (\d{1,6})/(\d{1,6}) layers to GPU")
_REDUCED: Final = re.compile(r"context size reduced from (\d{1,12}) to (\d{1,12})")


@attrs.frozen(kw_only=True)
class Share:
    """What lies in one place, in bytes; llama-server says it in whole MiB."""

    name: str
    """`Vulkan0`, `CUDA1`, `Host`."""
    model: int
    context: int
    compute: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.model + self.context + self.compute


@attrs.frozen(kw_only=True)
class Projection:
    """What one llama-server is going to take. Without a device everything is the host's."""

    devices: tuple[Share, ...] = ()
    host: Share | None = None
    draft: tuple[Share, ...] = ()
    """The draft model's, host included; empty if it was not said."""

    @property
    def kind(self) -> str | None:
        """What drives the devices: `Vulkan`, `CUDA`."""
        return self.devices[0].name.rstrip("0123456789") if self.devices else None


@attrs.define(eq=False)
class StartLog:
    """Listens to a llama-server's lines until it is ready."""

    projection: Projection | None = None
    """There once it was said, and whole."""
    loads: bool = False
    """Whether it has begun to load in earnest."""
    layers: tuple[int, int] | None = None
    """How many layers are on devices, and of how many."""
    reduced: tuple[int, int] | None = None
    """The context it would have had, and the one it chose since memory is short."""
    _table: list[Share] = attrs.field(factory=list)
    _main: list[Share] = attrs.field(factory=list)
    _draft: list[Share] = attrs.field(factory=list)
    _extra: bool = False

    def hear(self, line: str) -> None:
        """Take one line."""
        if "MiB" in line:
            self._hear_table(line)
        elif (row := _ROW.search(line)) and len(self._table) < _MAX_DEVICES:
            self._add(_share(row, device=_ON_DEVICE.search(line) is not None))
        elif _EXTRA.search(line):
            self._extra = True
        if found := _LAYERS.search(line):
            self.layers = int(found[1]), int(found[2])
        elif found := _REDUCED.search(line):
            self.reduced = int(found[1]), int(found[2])
        if _LOADS.search(line):
            self.loads = True

    def _add(self, share: Share) -> None:
        """One row; those of the host are one."""
        before = next((one for one in self._table if one.name == HOST == share.name), None)
        if before is None:
            self._table.append(share)
        else:
            self._table[self._table.index(before)] = attrs.evolve(
                share,
                model=before.model + share.model,
                context=before.context + share.context,
                compute=before.compute + share.compute,
            )

    def _hear_table(self, line: str) -> None:
        if _HEADER.search(line):
            self._table = []
            if self._extra:
                self._draft = self._table
            else:
                self._main = self._table
        elif _DRAFT.search(line):
            self._draft, self._main = self._main, []
        elif _PROJECTED.search(line) and self.projection is None and self._main:
            self.projection = _projection(self._main, self._draft)

    @property
    def fitted(self) -> tuple[str, ...]:
        """What it has less of than it might have had, in words."""
        told = []
        if self.reduced is not None:
            told.append(f"context {self.reduced[1]} of {self.reduced[0]} tokens")
        if self.layers is not None and 0 < self.layers[0] < self.layers[1]:
            told.append(f"{self.layers[0]} of {self.layers[1]} layers on GPUs")
        return tuple(told)


def _share(row: "re.Match[str]", *, device: bool) -> Share:
    """Each number is rounded down; the sum is nearer to the truth than its parts."""
    model, context, total = (int(row[name]) * MIB for name in ("model", "context", "self"))
    compute = max(int(row["compute"]) * MIB, total - model - context)
    return Share(name=row["name"] if device else HOST, model=model, context=context, compute=compute)


def _projection(main: Sequence[Share], draft: Sequence[Share]) -> Projection:
    return Projection(
        devices=tuple(share for share in main if share.name != HOST),
        host=next((share for share in main if share.name == HOST), None),
        draft=tuple(draft),
    )
