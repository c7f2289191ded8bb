"""`completion`: scripts for shells, made from the parser itself."""

import argparse
from collections.abc import Iterator


def completion(shell: str, parser: argparse.ArgumentParser) -> str:
    """What `shell` is to read: `eval "$(trio-router completion bash)"`."""
    commands = dict(_commands(parser))
    names = " ".join(commands)
    match shell:
        case "fish":
            lines = [f"complete -c trio-router -f -n __fish_use_subcommand -a '{names}'"]
            for name, options in commands.items():
                lines += [
                    f"complete -c trio-router -n '__fish_seen_subcommand_from {name}' -l {option.removeprefix('--')}"
                    for option in options
                    if option.startswith("--")
                ]
            return "\n".join(lines)
        case "zsh":
            cases = "\n".join(f"  {name}) compadd -- {' '.join(options)};;" for name, options in commands.items())
            return (
                "_trio_router() {\n"
                f"  if (( CURRENT == 2 )); then compadd -- {names}; return; fi\n"
                f"  case $words[2] in\n{cases}\n  esac\n}}\ncompdef _trio_router trio-router"
            )
    cases = "\n".join(f'    {name}) words="{" ".join(options)}";;' for name, options in commands.items())
    return (
        "_trio_router() {\n"
        f'  local words="{names}"\n'
        f'  if (( COMP_CWORD > 1 )); then words=""; case ${{COMP_WORDS[1]}} in\n{cases}\n  esac; fi\n'
        '  mapfile -t COMPREPLY < <(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}")\n'
        "}\ncomplete -o default -F _trio_router trio-router"
    )


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    for action in parser._actions:  # noqa: SLF001  (argparse has no other way to be asked)
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for name, sub in action.choices.items():
                yield name, [option for each in sub._actions for option in each.option_strings]  # noqa: SLF001
