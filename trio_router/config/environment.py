"""The environment variables that override router.toml, and the `.env` file beside it that may hold them."""

import re
from collections.abc import Mapping
from pathlib import Path

import attrs

from trio_router.config.problems import Problem

CONFIG_PATH = "CONFIG_PATH"
LLAMA_SERVER_PATH = "LLAMA_SERVER_PATH"
BASE_MODELS_PATH = "BASE_MODELS_PATH"
API_KEY = "API_KEY"

_NAMES = (CONFIG_PATH, LLAMA_SERVER_PATH, BASE_MODELS_PATH, API_KEY)
_LINE = re.compile(rf"\s*(?:export\s+)?(?P<name>{'|'.join(_NAMES)})\s*=(?P<value>.*)")
_QUOTED = re.compile(r"""\s*(?:'(?P<literal>[^']*)'|"(?P<escaped>(?:\\.|[^"\\])*)")\s*(?:\#.*)?""")
_ESCAPE = re.compile(r"\\(.)")


@attrs.frozen(kw_only=True)
class Variable:
    """One of our names with a value, and where it was set."""

    name: str
    value: str = attrs.field(repr=False)
    file: str = "environment"
    line: int | None = None

    def problem(self, message: str) -> Problem:
        """`message` about this variable, located."""
        return Problem(file=self.file, line=self.line, key=self.name, message=message)


def read_variables(folder: Path, environ: Mapping[str, str]) -> tuple[dict[str, Variable], list[Problem]]:
    """Our names from `environ`, else from `folder/.env`. An empty one is as good as unset."""
    variables, problems = _read_dotenv(folder / ".env")
    for name in _NAMES:
        if value := environ.get(name):
            variables[name] = Variable(name=name, value=value)
            problems = [problem for problem in problems if problem.key != name]
    return variables, problems


def _read_dotenv(path: Path) -> tuple[dict[str, Variable], list[Problem]]:
    """What `.env` sets of ours. Its other lines belong to others and are not even looked at."""
    if not path.is_file():  # some container set-ups mount a folder or /dev/null of that name
        return {}, []
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        return {}, [Problem(file=str(path), message=f"cannot be read: {error.strerror}")]
    variables: dict[str, Variable] = {}
    problems: list[Problem] = []
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        variable = Variable(name=match["name"], value=_value(match["value"]) or "", file=str(path), line=number)
        variables.pop(variable.name, None)
        if _value(match["value"]) is None:
            problems.append(variable.problem("the quote is not closed on this line, or something follows it"))
        elif variable.value:
            variables[variable.name] = variable
    return variables, problems


def _value(written: str) -> str | None:
    """The value right of `=`; None if its quotes make no sense."""
    if written.lstrip()[:1] in {"'", '"'}:
        quoted = _QUOTED.fullmatch(written)
        if quoted is None:
            return None
        if quoted["literal"] is not None:
            return quoted["literal"]
        return _ESCAPE.sub(lambda escape: "\n" if escape[1] == "n" else escape[1], quoted["escaped"])
    return re.sub(r"\s+#.*", "", written).strip()
