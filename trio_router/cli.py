"""The commands. Nothing else parses argv.

Exit codes: 0 clean, 1 failed while running, 2 bad usage (of `serve` and `check` also a bad configuration), 3 no router, 4
no such model, 78 a bad configuration. Heavy imports wait for the command that needs them, so that `--help` and a misspelt
flag answer at once. What speaks to a router that runs is in `commands/`.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from trio_router import __version__

if TYPE_CHECKING:
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # noqa: SLF001  (it has no other name)

    from trio_router.config import Problem, RouterConfig

CLEAN = 0
BAD_CONFIG = 2
"""Of `serve` and `check`."""
EX_CONFIG = 78
"""Of all others: sysexits' word for it."""

_DEFAULT_CONFIG = "router.toml"
_DEFAULT_URL = "http://127.0.0.1:8000"
_INTERRUPTED = 130
_TALKING = {
    *("ps", "ls", "load", "eject", "reset", "logs", "run", "top", "requests", "cancel", "health", "reload", "drain"),
    "plan",
}
_WRITING = {"init", "schema", "completion"}


def main(arguments: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Run the command in `arguments` (default: this process's own) and return its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command in _TALKING | _WRITING:
        return _command(options, environ)
    from trio_router.config import ConfigError, load_config  # noqa: PLC0415 - see above

    path = _config_path(options.config, environ)

    def read() -> "RouterConfig":
        return load_config(path, environ)

    try:
        config = read()
    except ConfigError as error:
        if options.command == "check":
            return _checked([], error.problems, as_json=options.as_json)
        _print_problems(error.problems)
        return EX_CONFIG if options.command == "simulate" else BAD_CONFIG
    if options.command == "check":
        return _check(config, environ, ask=options.ask, as_json=options.as_json)
    if options.command == "simulate":
        from trio_router.commands.simulate import simulate_trace  # noqa: PLC0415

        return simulate_trace(config, options.trace, as_json=options.as_json, plot=options.plot)
    config = _with_address(config, options, parser)
    return _serve(config, environ, options, lambda: _with_address(read(), options, parser))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trio-router",
        description="One OpenAI-compatible address in front of many llama-server processes.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trio-router {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument(
        "--config",
        metavar="FILE",
        help=f"what to read (default: $CONFIG_PATH, else ./{_DEFAULT_CONFIG})",
    )
    _add_talking(commands)
    _add_writing(commands)
    serve = commands.add_parser(
        "serve", parents=[config], allow_abbrev=False, help="accept requests until SIGTERM or SIGINT"
    )
    serve.add_argument("--host", metavar="HOST", help="address to listen on, instead of the file's api.host")
    serve.add_argument("--port", metavar="PORT", type=int, help="port, instead of the file's api.port; 0 picks one")
    serve.add_argument("--log-format", choices=("text", "json"), default="text", help="default: %(default)s")
    serve.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="default: %(default)s"
    )
    simulate = commands.add_parser(
        "simulate", parents=[config], allow_abbrev=False, help="play what happened again, in virtual time"
    )
    simulate.add_argument("trace", metavar="TRACE", type=Path, help="what GET /v1/router/trace said")
    simulate.add_argument("--json", dest="as_json", action="store_true", help="for programs")
    simulate.add_argument("--plot", metavar="FILE", type=Path, help="write a picture, as SVG")
    check = commands.add_parser(
        "check", parents=[config], allow_abbrev=False, help="say what is wrong with the configuration and its files"
    )
    check.add_argument(
        "--ask", action="store_true", help="have llama-server say what each model needs, if nobody knows"
    )
    check.add_argument("--json", dest="as_json", action="store_true", help="for programs")
    return parser


def _add_talking(commands: "_Commands") -> None:
    """The commands that speak to a router that runs."""
    where = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    where.add_argument("--url", help=f"of the router (default: $TRIO_ROUTER_URL, else {_DEFAULT_URL})")
    where.add_argument(
        "--api-key", metavar="KEY", help="default: $API_KEY, which others on this machine cannot read as they can this"
    )
    where.add_argument("--json", dest="as_json", action="store_true", help="for programs; a line each for what goes on")

    def add(name: str, about: str, *positional: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, parents=[where], allow_abbrev=False, help=about)
        for each in positional:
            parser.add_argument(each, metavar=each.upper())
        return parser

    add("ps", "models in memory")
    add("ls", "every model")
    add("load", "load a model, and wait for it", "model")
    add("eject", "unload a model", "model").add_argument("--force", action="store_true", help="cut running requests")
    add("reset", "let a failed model be tried again", "model")
    logs = add("logs", "what a model's llama-server wrote", "model")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as it writes")
    logs.add_argument("-n", "--lines", type=int, default=100, help="default: %(default)s")
    add("run", "answer a prompt, or talk", "model").add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="default: read it from a pipe; at a terminal, talk"
    )
    add("top", "requests, queues and tokens, live")
    add("requests", "requests under way")
    add("cancel", "end a request that is under way", "request")
    add("health", "whether the router is well")
    add("reload", "have it read its configuration again")
    add("drain", "have it finish what runs, and stop")
    add("plan", "what would happen to a request for a model", "model").add_argument(
        "--priority", choices=("high", "normal", "low"), default="normal", help="default: %(default)s"
    )


def _add_writing(commands: "_Commands") -> None:
    """The commands that write something down."""
    init = commands.add_parser("init", allow_abbrev=False, help="write a router.toml for a folder of GGUF files")
    init.add_argument(
        "--models-dir", metavar="FOLDER", required=True, type=Path, help="looked through, folders in it too"
    )
    init.add_argument("--out", metavar="FILE", type=Path, default=Path(_DEFAULT_CONFIG), help="default: %(default)s")
    init.add_argument("--force", action="store_true", help="write over a file that is there")
    init.add_argument("--json", dest="as_json", action="store_true", help="say what was found for programs")
    commands.add_parser("schema", allow_abbrev=False, help="the JSON Schema of router.toml, for editors")
    completion = commands.add_parser("completion", allow_abbrev=False, help="what makes a shell complete commands")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))


def _command(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Do what needs no configuration."""
    from trio_router.commands.talk import Said  # noqa: PLC0415

    try:
        return _does(options, environ)
    except Said as error:
        _say(f"trio-router: {error}", sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # `| head`: it has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLEAN


def _does(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    if options.command in _WRITING:
        return _writes(options, environ)
    from trio_router.commands.talk import Router  # noqa: PLC0415

    taken = {"command", "url", "api_key", "as_json"}
    given = {name: value for name, value in vars(options).items() if name not in taken}
    url = options.url or environ.get("TRIO_ROUTER_URL") or _DEFAULT_URL
    router = Router(url=url, key=options.api_key or environ.get("API_KEY"))
    match options.command:
        case "logs":
            from trio_router.commands.watch import logs  # noqa: PLC0415

            return logs(router, as_json=options.as_json, **given)
        case "run":
            from trio_router.commands.chat import run  # noqa: PLC0415

            return run(router, as_json=options.as_json, **given)
        case "top":
            from trio_router.commands.watch import top  # noqa: PLC0415

            return top(router, as_json=options.as_json)
        case "plan":
            from trio_router.commands.plan import plan  # noqa: PLC0415

            return plan(router, as_json=options.as_json, **given)
        case name:
            from trio_router.commands import models  # noqa: PLC0415

            does: Callable[..., int] = getattr(models, name)
            return does(router, as_json=options.as_json, **given)


def _writes(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    match options.command:
        case "init":
            from trio_router.commands.init import init  # noqa: PLC0415

            given = {"force": options.force, "as_json": options.as_json}
            return init(options.models_dir, options.out, environ=environ, **given)
        case "schema":
            from trio_router.commands.talk import print_json  # noqa: PLC0415
            from trio_router.config.json_schema import json_schema  # noqa: PLC0415

            print_json(json_schema())
        case "completion":
            from trio_router.commands.completion import completion  # noqa: PLC0415

            _say(completion(options.shell, _parser()), sys.stdout)
    return CLEAN


def _config_path(given: str | None, environ: Mapping[str, str]) -> Path:
    """`--config`, else CONFIG_PATH (also from ./.env), else ./router.toml."""
    from trio_router.config import CONFIG_PATH, read_variables  # noqa: PLC0415

    if given is not None:
        return Path(given)
    variables, _ = read_variables(Path(), environ)
    return Path(variables[CONFIG_PATH].value if CONFIG_PATH in variables else _DEFAULT_CONFIG)


def _with_address(
    config: "RouterConfig", options: argparse.Namespace, parser: argparse.ArgumentParser
) -> "RouterConfig":
    """`config` with `--host` and `--port` in the place of the file's."""
    import attrs  # noqa: PLC0415

    from trio_router.config import OutOfRange  # noqa: PLC0415

    def refuse(error: OutOfRange) -> NoReturn:
        parser.error(f"--{error}")  # the names of options and fields are the same

    given = {name: value for name in ("host", "port") if (value := getattr(options, name)) is not None}
    try:
        return attrs.evolve(config, api=attrs.evolve(config.api, **given))
    except OutOfRange as error:
        refuse(error)


def _serve(
    config: "RouterConfig",
    environ: Mapping[str, str],
    options: argparse.Namespace,
    read: Callable[[], "RouterConfig"],
) -> int:
    from trio_router.config import (  # noqa: PLC0415
        LlamaServerNotFound,
        LlamaServerUnusable,
        file_problems,
        find_llama_server,
        missing_package,
    )

    problems = file_problems(config, environ)
    try:
        server = find_llama_server(config.system.llama_server_path, environ)
    except LlamaServerUnusable as error:
        server = error.server  # it may come; until then each load fails and says why
    except LlamaServerNotFound:
        _print_problems(problems)
        return BAD_CONFIG
    if all(missing_package(model.model_path) for model in config.models.values()):
        _print_problems(problems)
        return BAD_CONFIG
    for problem in problems:
        warning = {"level": "warning", "event": str(problem)}
        _say(json.dumps(warning) if options.log_format == "json" else f"warning: {problem}", sys.stderr)

    from trio_router.imports import import_without_unused  # noqa: PLC0415

    import_without_unused()
    from trio_router import tree  # noqa: PLC0415

    return tree.main(config, server, read, log_format=options.log_format, log_level=options.log_level)


def _check(config: "RouterConfig", environ: Mapping[str, str], *, ask: bool, as_json: bool) -> int:
    """Print what each model would need, and everything that is wrong."""
    from trio_router.commands.check import check  # noqa: PLC0415

    return _checked(*check(config, environ, ask=ask), as_json=as_json)


def _checked(rows: Sequence[tuple[str, ...]], problems: "Sequence[Problem]", *, as_json: bool) -> int:
    if as_json:
        head, *models = rows or [()]
        table = [dict(zip(map(str.lower, head), model, strict=True)) for model in models]
        told = [{name: getattr(problem, name) for name in ("file", "line", "key", "message")} for problem in problems]
        _say(json.dumps({"models": table, "problems": told}, indent=2), sys.stdout)
    else:
        if rows:
            _print_table(rows)
        _print_problems(problems)
    return BAD_CONFIG if problems else CLEAN


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        _say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), sys.stdout)


def _print_problems(problems: "Iterable[Problem]") -> None:
    for problem in problems:
        _say(str(problem), sys.stderr)


def _say(line: str, stream: TextIO) -> None:
    """Print `line`, in which a file name need not be text."""
    print(line.encode(errors="backslashreplace").decode(), file=stream)
