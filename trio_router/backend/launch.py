"""How a llama-server is started: its command line, its environment, its address."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

from trio_router.backend.address import Address, tcp_address, unix_address
from trio_router.backend.binding import Binding, split_flags
from trio_router.backend.fit import PROJECTING, fit_environment
from trio_router.backend.process import ServerProcess
from trio_router.backend.reaper import Reaper
from trio_router.config import LlamaServer, last_value, unusable_reason
from trio_router.config.schema import BackendTransport, ModelConfig
from trio_router.memory.room import Spot

SECRET = re.compile(r"(?i)key|token|secret|passw|passphrase|pass(?:_|$)|credential|auth|private|cookie")
USER_IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]+@")
PARALLEL = ("-np", "--parallel")


class LaunchFailed(Exception):
    """Raised when a llama-server could not even be started; the message says why."""


def child_environment(own: Mapping[str, str], server: Mapping[str, str], key: str | None) -> dict[str, str]:
    """What a child gets to know: our environment less what would change its behaviour or is a secret.

    `LLAMA_*` set flags behind the configuration's back (container images set `LLAMA_ARG_HOST`); a variable whose
    name sounds like a secret, or that holds a URL with a password, is none of the child's business. `server` is what its package asks for; `key` goes
    by environment because a command line is world-readable.
    """
    kept = {
        name: value
        for name, value in own.items()
        if not name.startswith("LLAMA_") and not SECRET.search(name) and not USER_IN_URL.search(value)
    }
    kept.update(server)
    if key is not None:
        kept["LLAMA_API_KEY"] = key
    return kept


@attrs.frozen(kw_only=True)
class Launcher:
    """Starts llama-servers."""

    server: LlamaServer
    folder: Callable[[], Path]
    """Where sockets live now: private. Raises OSError."""
    transport: BackendTransport
    reaper: Reaper | None = None
    gpu: Callable[[], bool] = lambda: False
    """Whether there is a GPU now."""
    binding: Binding = attrs.field(factory=Binding)

    def launch(self, model: ModelConfig, number: int, incarnation: int, spot: Spot) -> tuple[ServerProcess, Address]:
        """Start one for `model`, the `number`th of the configuration, at `spot`. Raises LaunchFailed."""
        if problem := unusable_reason(model):
            raise LaunchFailed(problem)
        try:
            match self.transport:
                case BackendTransport.UNIX:
                    address = unix_address(self._sockets(), number, incarnation)
                case BackendTransport.TCP:
                    address = tcp_address()
            environment = child_environment(os.environ, self.server.environment, address.key)
            environment |= fit_environment(model.flags, gpu=self.gpu(), hidden=self.binding.hides_all)
            environment |= self.binding.environment(spot.devices or model.gpu or ())
            command = [*self.command(model, address), *split_flags(spot)]
            return ServerProcess.spawn(command, environment, self.reaper), address
        except OSError as error:
            raise LaunchFailed(f"cannot start {self.server.path}: {error.strerror or error}") from error

    def launch_to_project(self, model: ModelConfig, number: int) -> tuple[ServerProcess, Address]:
        """Start the `number`th that is only to say what it would take; it is to be ended then. Raises LaunchFailed."""
        if problem := unusable_reason(model):
            raise LaunchFailed(problem)
        try:
            address = Address(path=str(self._sockets() / f"projection-{number}.sock"))
            environment = child_environment(os.environ, self.server.environment, None)
            environment |= self.binding.environment(self.binding.first)
            command = [*self.command(model, address), *PROJECTING]
            return ServerProcess.spawn(command, environment, self.reaper), address
        except OSError as error:
            raise LaunchFailed(f"cannot start {self.server.path}: {error.strerror or error}") from error

    def _sockets(self) -> Path:
        try:
            return self.folder()
        except OSError as error:
            raise LaunchFailed(f"there is no folder for its socket: {error}") from error

    async def prepare(self) -> None:
        """Look once at what there is; after the GPUs were seen first."""
        await self.binding.ask_vulkan(child_environment(os.environ, self.server.environment, None))

    def command(self, model: ModelConfig, address: Address) -> list[str]:
        """The command line: what the router owns, then the model's flags unchanged."""
        where = (
            ["--host", address.path]
            if address.path is not None
            else ["--host", address.host, "--port", str(address.port)]
        )
        # without it llama-server makes four slots that share one context, and ours would not match
        slots = [] if last_value(model.flags, PARALLEL) is not None else ["--parallel", str(model.slots)]
        return [
            str(self.server.path), *where, "--model", str(model.file), "--alias", model.alias, "--metrics", *slots, *model.flags,
        ]  # fmt: skip
