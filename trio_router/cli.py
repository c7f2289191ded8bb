"""The commands. Nothing else parses argv.

Exit codes: 0 clean, 1 failed while running, 2 bad usage (of `serve` and `check` also a bad configuration), 3 no router, 4
no such model, 78 a bad configuration. What a command does, and which options it has, stands in `commands/`, in a function
of its name; a module there is imported when its command is called, and imports what is heavy when it is needed, so that
`--help` and a misspelt flag answer at once.
"""

import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from trio_router import __version__
from trio_router.commands.said import CLEAN, FAILED, INTERRUPTED, USAGE, Said, say

if TYPE_CHECKING:
    from cyclopts import App
    from cyclopts.config import Dict

SERVING: Final = "Serving"
TALKING: Final = "A router that runs"
WRITING: Final = "Configuration and shell"
COMMANDS: Final = (
    (SERVING, "serve", "serve", "Accept requests until SIGTERM or SIGINT."),
    (SERVING, "check", "check", "Say what is wrong with the configuration and its files."),
    (SERVING, "simulate", "simulate", "Play what happened again, in virtual time."),
    (TALKING, "ps", "models", "List the models in memory."),
    (TALKING, "ls", "models", "List every model."),
    (TALKING, "load", "models", "Load a model, and wait for it."),
    (TALKING, "eject", "models", "Unload a model."),
    (TALKING, "reset", "models", "Let a failed model be tried again."),
    (TALKING, "logs", "logs", "Print what a model's llama-server wrote."),
    (TALKING, "run", "chat", "Answer a prompt, or talk."),
    (TALKING, "top", "top", "Show requests, queues and tokens, live."),
    (TALKING, "requests", "models", "List the requests under way."),
    (TALKING, "cancel", "models", "End a request that is under way."),
    (TALKING, "health", "models", "Say whether the router is well."),
    (TALKING, "reload", "models", "Have it read its configuration again."),
    (TALKING, "drain", "models", "Have it finish what runs, and stop."),
    (TALKING, "plan", "plan", "Say what would happen to a request for a model."),
    (WRITING, "init", "init", "Write a router.toml for a folder of GGUF files."),
    (WRITING, "schema", "schema", "Print the JSON Schema of router.toml, for editors."),
    (WRITING, "completion", "completion", "Print what makes a shell complete commands."),
)
"""Under which heading, its name, its module, and the line about it."""
VARIABLES: Final = {"url": "TRIO_ROUTER_URL", "api-key": "API_KEY"}
"""What stands for an option that is not given."""


def main(arguments: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Run the command in `arguments` (default: this process's own) and return its exit code."""
    try:
        return _said(_parsed(sys.argv[1:] if arguments is None else arguments, environ)() or CLEAN)
    except Said as error:
        say(f"trio-router: {error}", sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `| head`: it has what it wanted
        _forget_output()
        return CLEAN
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _forget_output()
        say(f"trio-router: cannot write: {error.strerror}", sys.stderr)
        return FAILED


def _said(status: int) -> int:
    """The same, once all is written: what cannot be is told of now."""
    if sys.stdout is not None:  # it may be closed
        sys.stdout.flush()
    return status


def _forget_output() -> None:
    """What is left of it is not tried again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parsed(arguments: Sequence[str], environ: Mapping[str, str]) -> Callable[[], int | None]:
    """The command, ready to be called; nothing of cyclopts stays behind. Raises Said."""
    from cyclopts import CycloptsError  # noqa: PLC0415  (a router that runs lets go of it: imports.py)

    app = _app(environ)
    if not arguments:
        app.help_print([], console=app.error_console)
        return lambda: USAGE
    try:
        command, bound, injected = app.parse_args(arguments, print_error=False, exit_on_error=False)
    except CycloptsError as error:
        named = " ".join(["trio-router", *(error.command_chain or ()), "--help"])
        raise Said(f"{error} Try `{named}`.", USAGE) from error
    known = {"environ": environ, "app": app}
    return partial(command, *bound.args, **bound.kwargs, **{name: known[name] for name in injected})


def _app(environ: Mapping[str, str]) -> "App":
    """What there is to be called; of its functions' parameters, `environ` and `app` are not the command line's."""
    from cyclopts import App, Group, Parameter  # noqa: PLC0415  (as above)

    app = App(
        name="trio-router",
        help="One OpenAI-compatible address in front of many llama-server processes.",
        help_format="plaintext",
        version=f"trio-router {__version__}",
        config=_from_environment(environ),
        default_parameter=Parameter(
            allow_repeating=True, negative=(), parse="^(?!(environ|app)$)", show_default=_default
        ),
        group_parameters=Group("Options", sort_key=9),
        group_arguments=Group("Arguments", sort_key=8),
    )
    for flag in ("--help", "--version"):
        app[flag].group = "Options"
    groups = {name: Group(name, sort_key=place) for place, name in enumerate((SERVING, TALKING, WRITING))}
    for group, name, module, about in COMMANDS:
        app.command(f"trio_router.commands.{module}:{name}", name=name, help=about, group=groups[group])
    return app


def _from_environment(environ: Mapping[str, str]) -> "Dict | None":
    """Options of those commands that have them."""
    found = {option: environ[name] for option, name in VARIABLES.items() if environ.get(name)}
    if not found:
        return None
    from cyclopts.config import Dict  # noqa: PLC0415  (the rest need not wait for it)

    return Dict(found, allow_unknown=True, use_commands_as_keys=False, source="the environment")


def _default(value: object) -> str | None:
    """What a flag is without being given, and that nothing is given, goes without saying."""
    return None if value is False or value is None else str(value)
